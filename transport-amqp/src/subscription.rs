//! A subscription as its owner sees it.

use std::fmt;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use antiphon_core::Error;
use antiphon_core::transport::{Delivery, Subscription, SubscriptionEvent};
use async_trait::async_trait;
use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot};

use crate::error::closed;
use crate::settle::Command;

/// The most deliveries that are handed over at once.
const BATCH: usize = 256;

/// Deliveries that were handed over and not received yet: the subscription's task takes them back when it is over, whatever its owner
/// does.
#[derive(Clone, Debug)]
pub(crate) struct Handover(Arc<Mutex<mpsc::UnboundedReceiver<Delivery>>>);

impl Handover {
    pub(crate) fn new(deliveries: mpsc::UnboundedReceiver<Delivery>) -> Self {
        Self(Arc::new(Mutex::new(deliveries)))
    }

    /// Takes all that is there; nothing only once it is over.
    async fn receive(&self) -> Vec<Delivery> {
        let mut taken = Vec::new();
        poll_fn(|cx| {
            let mut deliveries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            deliveries.poll_recv_many(cx, &mut taken, BATCH)
        })
        .await;
        taken
    }

    /// Hands over nothing more, and releases what was not received: nobody has started it.
    pub(crate) fn give_back(&self) {
        let mut deliveries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        deliveries.close();
        while let Ok(delivery) = deliveries.try_recv() {
            // Once polled it happens: its outcome is of no interest.
            let _ = delivery.release().now_or_never();
        }
    }
}

/// A stream of deliveries from RabbitMQ.
pub(crate) struct AmqpSubscription {
    deliveries: Handover,
    commands: mpsc::UnboundedSender<Command>,
    /// Why it is over.
    over: Arc<OnceLock<Error>>,
}

impl AmqpSubscription {
    pub(crate) fn new(
        deliveries: Handover,
        commands: mpsc::UnboundedSender<Command>,
        over: Arc<OnceLock<Error>>,
    ) -> Self {
        Self {
            deliveries,
            commands,
            over,
        }
    }

    /// Tells the task to take nothing more, and gives back what was not received.
    fn give_back(&self) -> oneshot::Receiver<()> {
        self.deliveries.give_back();
        let (done, stopped) = oneshot::channel();
        let _ = self.commands.send(Command::Stop { done });
        stopped
    }
}

#[async_trait]
impl Subscription for AmqpSubscription {
    async fn recv(&mut self) -> SubscriptionEvent {
        let deliveries = self.deliveries.receive().await;
        if !deliveries.is_empty() {
            return SubscriptionEvent::Deliveries(deliveries);
        }
        SubscriptionEvent::Closed(self.over.get().cloned().unwrap_or_else(closed))
    }

    async fn stop(&mut self) {
        // An error means that its task is over, and takes nothing either.
        let _ = self.give_back().await;
    }
}

impl Drop for AmqpSubscription {
    fn drop(&mut self) {
        drop(self.give_back());
    }
}

impl fmt::Debug for AmqpSubscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AmqpSubscription")
            .field("over", &self.over.get())
            .finish_non_exhaustive()
    }
}

//! A subscription as its owner sees it.

use std::fmt;
use std::sync::{Arc, OnceLock};

use antiphon_core::Error;
use antiphon_core::transport::{Delivery, Subscription, SubscriptionEvent};
use async_trait::async_trait;
use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot};

use crate::error::closed;
use crate::settle::Command;

/// The most deliveries that are handed over at once.
const BATCH: usize = 256;

/// A stream of deliveries from RabbitMQ.
pub(crate) struct AmqpSubscription {
    deliveries: mpsc::UnboundedReceiver<Delivery>,
    commands: mpsc::UnboundedSender<Command>,
    /// Why it is over.
    over: Arc<OnceLock<Error>>,
}

impl AmqpSubscription {
    pub(crate) fn new(
        deliveries: mpsc::UnboundedReceiver<Delivery>,
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
    fn give_back(&mut self) -> oneshot::Receiver<()> {
        self.deliveries.close();
        while let Ok(delivery) = self.deliveries.try_recv() {
            // Once polled it happens: its outcome is of no interest.
            let _ = delivery.release().now_or_never();
        }
        let (done, stopped) = oneshot::channel();
        let _ = self.commands.send(Command::Stop { done });
        stopped
    }
}

#[async_trait]
impl Subscription for AmqpSubscription {
    async fn recv(&mut self) -> SubscriptionEvent {
        let mut deliveries = Vec::new();
        if self.deliveries.recv_many(&mut deliveries, BATCH).await > 0 {
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

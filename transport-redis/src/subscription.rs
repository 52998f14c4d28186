//! What a server's subscription hands over.

use std::collections::VecDeque;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use antiphon_core::transport::{
    Delivery, Settlement, SubscribeOptions, Subscription, SubscriptionEvent,
};
use antiphon_core::{Error, ErrorKind, Request, ServiceName};
use async_trait::async_trait;
use futures_util::future::join_all;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::naming::ServiceKeys;
use crate::settlement::RedisSettlement;
use crate::taker::Taker;
use crate::transport::Shared;

/// A stream of deliveries.
#[derive(Debug)]
pub(crate) struct RedisSubscription {
    buffer: Arc<Buffer>,
    stopping: CancellationToken,
    stopped: CancellationToken,
    _dropped: DropGuard,
}

impl RedisSubscription {
    /// Subscribes: live as soon as the session is registered.
    pub(crate) async fn open(
        shared: &Arc<Shared>,
        service: &ServiceName,
        options: SubscribeOptions,
    ) -> Result<Self, Error> {
        let keys = Arc::new(ServiceKeys::new(service));
        let buffer = Arc::new(Buffer::default());
        let stopping = shared.ending.child_token();
        let stopped = CancellationToken::new();
        let taker = Taker::begin(
            shared,
            &keys,
            options,
            Arc::clone(&buffer),
            stopping.clone(),
        )
        .await?;
        let done = stopped.clone().drop_guard();
        shared.workers.spawn(async move {
            taker.run().await;
            drop(done);
        });
        Ok(Self {
            buffer,
            stopped,
            _dropped: stopping.clone().drop_guard(),
            stopping,
        })
    }
}

#[async_trait]
impl Subscription for RedisSubscription {
    async fn recv(&mut self) -> SubscriptionEvent {
        self.buffer.recv().await
    }

    async fn stop(&mut self) {
        self.buffer.end(stopped());
        self.stopping.cancel();
        self.stopped.cancelled().await;
    }
}

impl Drop for RedisSubscription {
    fn drop(&mut self) {
        self.buffer.end(stopped());
    }
}

fn stopped() -> Error {
    Error::not_executed(ErrorKind::Closed, "the subscription was stopped")
}

/// What was taken and not yet received.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    state: Mutex<State>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct State {
    taken: VecDeque<Taken>,
    end: Option<Error>,
}

/// A delivery before it is received; dropped, it goes back with no attempt counted.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) request: Arc<Request>,
    pub(crate) attempt: u32,
    pub(crate) expires: Option<Instant>,
    pub(crate) settlement: Box<RedisSettlement>,
}

impl Taken {
    /// Receives those whose lease stands: what another server may have by now must not be started here.
    fn receive_all(taken: VecDeque<Self>) -> Vec<Delivery> {
        let mut deliveries = Vec::with_capacity(taken.len());
        for taken in taken {
            if !taken.settlement.lease().is_cancelled() {
                deliveries.push(taken.receive());
            }
        }
        deliveries
    }

    fn receive(mut self) -> Delivery {
        self.settlement.receive();
        Delivery::new(self.request, self.attempt, self.expires, self.settlement)
    }
}

impl Buffer {
    /// Hands over what was taken.
    pub(crate) fn add(&self, taken: Vec<Taken>) {
        let mut state = self.lock();
        if state.taken.is_empty() {
            state.taken = taken.into();
        } else {
            state.taken.extend(taken);
        }
        drop(state);
        self.arrived.notify_one();
    }

    /// Ends it, for the first reason that is given: nothing is received any more.
    pub(crate) fn end(&self, reason: Error) {
        self.lock().end.get_or_insert(reason);
        self.arrived.notify_one();
    }

    /// Gives back what was not received. The last one first, since each goes to the head of the queue.
    pub(crate) async fn give_back(&self) {
        let left = mem::take(&mut self.lock().taken);
        // Whatever becomes of them: what cannot be given back now is returned by a monitor.
        join_all(
            left.into_iter()
                .rev()
                .map(|taken| taken.receive().release()),
        )
        .await;
    }

    async fn recv(&self) -> SubscriptionEvent {
        loop {
            {
                let mut state = self.lock();
                if let Some(end) = &state.end {
                    return SubscriptionEvent::Closed(end.clone());
                }
                let taken = mem::take(&mut state.taken);
                drop(state);
                let deliveries = Taken::receive_all(taken);
                if !deliveries.is_empty() {
                    return SubscriptionEvent::Deliveries(deliveries);
                }
            }
            self.arrived.notified().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

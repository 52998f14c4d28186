//! Replies that were finished while the broker was away, kept until it is back.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::envelope::{CorrelationId, Reply};
use crate::error::ErrorKind;
use crate::name::ReplyAddress;
use crate::transport::{ConnectionState, Outbound, Transport};

/// How much is kept: what comes on top is dropped, and its request runs again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OutboxBounds {
    pub(crate) replies: usize,
    pub(crate) bytes: usize,
}

/// A reply is kept until its deadline: to be sent, and to answer its request if that is delivered again.
#[derive(Debug)]
pub(crate) struct Outbox {
    transport: Arc<dyn Transport>,
    bounds: OutboxBounds,
    state: Mutex<State>,
    /// How many are kept: mostly none, and then a request costs no look at them.
    count: AtomicUsize,
    added: Notify,
    sent: Notify,
}

#[derive(Debug, Default)]
struct State {
    kept: HashMap<CorrelationId, Kept>,
    unsent: VecDeque<CorrelationId>,
    bytes: usize,
}

#[derive(Debug)]
struct Kept {
    to: ReplyAddress,
    reply: Arc<Reply>,
    expires: Instant,
}

impl Outbox {
    pub(crate) fn new(transport: Arc<dyn Transport>, bounds: OutboxBounds) -> Arc<Self> {
        Arc::new(Self {
            transport,
            bounds,
            state: Mutex::default(),
            count: AtomicUsize::new(0),
            added: Notify::new(),
            sent: Notify::new(),
        })
    }

    /// Keeps a reply that could not be sent. False if there is no room.
    pub(crate) fn keep(&self, to: ReplyAddress, reply: Arc<Reply>, expires: Instant) -> bool {
        let id = reply.id.clone();
        if !self.remember(to, reply, expires) {
            return false;
        }
        let mut state = self.lock();
        if !state.unsent.contains(&id) {
            state.unsent.push_back(id);
        }
        drop(state);
        self.added.notify_one();
        true
    }

    /// Keeps a reply only for the case that its request comes again. False if there is no room.
    pub(crate) fn remember(&self, to: ReplyAddress, reply: Arc<Reply>, expires: Instant) -> bool {
        let mut state = self.lock();
        state.forget_expired();
        let size = reply.body.len();
        state.forget(&reply.id);
        if !state.make_room(size, self.bounds) {
            return false;
        }
        let id = reply.id.clone();
        state.bytes += size;
        state.kept.insert(id, Kept { to, reply, expires });
        self.count.store(state.kept.len(), Ordering::Release);
        true
    }

    /// The reply to a request that was executed here before. Ids of ours are nobody else's; those of plain peers need not
    /// be, and are not looked for.
    pub(crate) fn find(&self, id: &CorrelationId, to: Option<&ReplyAddress>) -> Option<Arc<Reply>> {
        if self.count() == 0 || id.as_u128().is_none() {
            return None;
        }
        let state = self.lock();
        let kept = state.kept.get(id).filter(|kept| to == Some(&kept.to))?;
        Some(Arc::clone(&kept.reply))
    }

    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Sends what is kept whenever the broker is there, until `stop`.
    pub(crate) async fn run(self: Arc<Self>, stop: CancellationToken) {
        let send_all = async {
            loop {
                self.added.notified().await;
                while let Some(id) = self.first() {
                    self.send(&id).await;
                }
            }
        };
        tokio::select! {
            () = send_all => {}
            () = stop.cancelled() => {}
        }
    }

    /// Sends one reply, as often as it takes until its deadline.
    async fn send(&self, id: &CorrelationId) {
        let kept = || {
            let state = self.lock();
            let kept = state.kept.get(id)?;
            Some((kept.to.clone(), Arc::clone(&kept.reply), kept.expires))
        };
        while let Some((to, reply, expires)) = kept() {
            let sent = async {
                let connected = |state: &ConnectionState| *state == ConnectionState::Connected;
                // An error would mean that the transport is gone, which sending tells.
                let _ = self.transport.state().wait_for(connected).await;
                self.transport.send(Outbound::Reply { to, reply }).await
            };
            let sent = tokio::time::timeout_at(expires, sent).await;
            let lost = matches!(&sent, Ok(Err(error)) if error.kind() == ErrorKind::ConnectionLost);
            if !lost {
                break;
            }
        }
        self.lock().unsent.retain(|unsent| unsent != id);
        self.sent.notify_waiters();
    }

    /// Waits until all is sent, or the broker is away.
    pub(crate) async fn flushed(&self) {
        let mut state = self.transport.state();
        loop {
            let mut sent = std::pin::pin!(self.sent.notified());
            // Before the look: what is sent between the two would be missed.
            sent.as_mut().enable();
            if self.lock().unsent.is_empty()
                || *state.borrow_and_update() != ConnectionState::Connected
            {
                return;
            }
            tokio::select! {
                () = sent => {}
                _ = state.changed() => {}
            }
        }
    }

    fn first(&self) -> Option<CorrelationId> {
        let mut state = self.lock();
        state.forget_expired();
        self.count.store(state.kept.len(), Ordering::Release);
        state.unsent.front().cloned()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code of a user runs under the lock, so a poisoned state is still a whole one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Forgets what was sent already, if there is no room else. False if there is none then either.
    fn make_room(&mut self, size: usize, bounds: OutboxBounds) -> bool {
        let fits =
            |state: &Self| state.kept.len() < bounds.replies && state.bytes + size <= bounds.bytes;
        if !fits(self) {
            let sent: Vec<_> = self
                .kept
                .keys()
                .filter(|id| !self.unsent.contains(id))
                .cloned()
                .collect();
            sent.iter().for_each(|id| self.forget(id));
        }
        fits(self)
    }

    fn forget(&mut self, id: &CorrelationId) {
        if let Some(kept) = self.kept.remove(id) {
            self.bytes -= kept.reply.body.len();
        }
    }

    fn forget_expired(&mut self) {
        let now = Instant::now();
        self.kept.retain(|_, kept| kept.expires > now);
        self.unsent.retain(|id| self.kept.contains_key(id));
        self.bytes = self.kept.values().map(|kept| kept.reply.body.len()).sum();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[derive(Debug)]
    struct Nowhere;

    #[async_trait::async_trait]
    impl Transport for Nowhere {
        fn capabilities(&self) -> crate::transport::Capabilities {
            crate::transport::Capabilities::none()
        }
        async fn send(&self, _: Outbound) -> Result<(), crate::Error> {
            Ok(())
        }
        async fn broadcast(
            &self,
            _: &crate::ServiceName,
            _: crate::Request,
        ) -> Result<Option<usize>, crate::Error> {
            Ok(Some(0))
        }
        async fn withdraw(
            &self,
            _: &crate::ServiceName,
            _: &CorrelationId,
        ) -> Result<bool, crate::Error> {
            Ok(false)
        }
        async fn open_inbox(&self) -> Result<Box<dyn crate::transport::Inbox>, crate::Error> {
            Err(crate::Error::not_executed(ErrorKind::Unsupported, "none"))
        }
        async fn subscribe(
            &self,
            _: &crate::ServiceName,
            _: crate::transport::SubscribeOptions,
        ) -> Result<Box<dyn crate::transport::Subscription>, crate::Error> {
            Err(crate::Error::not_executed(ErrorKind::Unsupported, "none"))
        }
        fn state(&self) -> tokio::sync::watch::Receiver<ConnectionState> {
            tokio::sync::watch::channel(ConnectionState::Connected).1
        }
        async fn close(&self) {}
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_bounded_and_forgets() {
        let bounds = OutboxBounds {
            replies: 2,
            bytes: 10,
        };
        let outbox = Outbox::new(Arc::new(Nowhere), bounds);
        let to = ReplyAddress::new("inbox").unwrap();
        let keep = |id: u128, body: &'static str| {
            let reply = Reply::value(CorrelationId::from_u128(id), body);
            outbox.keep(
                to.clone(),
                reply.into(),
                Instant::now() + Duration::from_secs(5),
            )
        };
        // What is only remembered makes room for what is to be sent.
        let old = Reply::value(CorrelationId::from_u128(9), "1234567890");
        assert!(outbox.remember(
            to.clone(),
            old.into(),
            Instant::now() + Duration::from_secs(5)
        ));
        assert!(keep(1, "12345") && !keep(2, "123456") && keep(2, "1234") && !keep(3, ""));
        assert!(keep(2, "12345"), "it takes its own place");
        let find = |id: u128, to| outbox.find(&CorrelationId::from_u128(id), Some(to));
        assert!(find(1, &to).is_some() && find(3, &to).is_none());
        assert!(find(1, &ReplyAddress::new("other").unwrap()).is_none());
        tokio::time::advance(Duration::from_secs(6)).await;
        assert_eq!(outbox.first(), None);
        assert_eq!(outbox.count(), 0);
        assert!(keep(3, "1234567890"));
    }
}

//! Replies that were finished while the broker was away, kept until it is back.

mod index;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

pub(crate) use self::index::OutboxBounds;
use self::index::{Forgotten, Index, Kept};
use crate::config::TIMEOUT_MAX;
use crate::envelope::{CorrelationId, Reply};
use crate::error::{Error, ErrorKind};
use crate::name::ReplyAddress;
use crate::outbox_store::{KeptReply, OutboxChange, OutboxKey, OutboxStore, StoreWrite};
use crate::transport::{ConnectionState, Outbound, Transport};

/// How long a server that starts waits for its store.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a reply waits to be stored. Then it is in memory only, and sent as if there were no store.
const STORE_PATIENCE: Duration = Duration::from_secs(3);

/// After what the broker had no room for.
const FULL_WAITS: Duration = Duration::from_millis(200);

/// After the connection was lost under a reply.
const LOST_WAITS: Duration = Duration::from_millis(50);

/// A reply is kept until its deadline: to be sent, and to answer its request if that is delivered again.
#[derive(Debug)]
pub(crate) struct Outbox {
    transport: Arc<dyn Transport>,
    bounds: OutboxBounds,
    /// What survives the process, if anything does. Changes of the index and of the store are made under one lock, and so
    /// in one order.
    store: Option<Arc<dyn OutboxStore>>,
    index: Mutex<Index>,
    /// How many are kept: mostly none, and then a request costs no look at them.
    count: AtomicUsize,
    added: Notify,
    sent: Notify,
}

/// What a reply is kept for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeptTo {
    /// It is sent when the broker is back, and answers its request if that comes again.
    Send,
    /// It only answers its request.
    Answer,
}

/// How a reply is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keeping {
    /// Beyond the life of the process, if there is a store.
    AsAsked,
    /// There is a store, and it failed.
    InMemory,
    NoRoom,
}

/// How sending a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tried {
    /// It was sent, or is not to be sent any more.
    Done,
    /// The broker has no room for it now.
    Refused,
}

impl Outbox {
    /// An outbox with what its store has, if it has one.
    ///
    /// # Errors
    /// The store's, also if it does not answer.
    pub(crate) async fn open(
        transport: Arc<dyn Transport>,
        bounds: OutboxBounds,
        store: Option<Arc<dyn OutboxStore>>,
    ) -> Result<Arc<Self>, Error> {
        let found = match &store {
            Some(store) => timeout(OPEN_TIMEOUT, store.open())
                .await
                .unwrap_or_else(|_| {
                    let message = format!("the outbox was not opened within {OPEN_TIMEOUT:?}");
                    Err(Error::not_executed(ErrorKind::Outbox, message))
                })?,
            None => Vec::new(),
        };
        let outbox = Self {
            transport,
            bounds,
            store,
            index: Mutex::default(),
            count: AtomicUsize::new(0),
            added: Notify::new(),
            sent: Notify::new(),
        };
        outbox.take_over(found);
        Ok(Arc::new(outbox))
    }

    /// True if what is kept survives the process.
    pub(crate) fn is_durable(&self) -> bool {
        self.store.is_some()
    }

    /// Keeps a reply that could not be sent; when it resolves, what is to survive the process does, unless the store fails or takes
    /// too long, which is said.
    pub(crate) async fn keep(
        &self,
        to: &ReplyAddress,
        reply: Arc<Reply>,
        expires: Instant,
        kept_to: KeptTo,
    ) -> Keeping {
        let kept = KeptReply {
            to: to.clone(),
            reply,
            unsent: kept_to == KeptTo::Send,
            kept_at: SystemTime::now(),
            lasts: expires.saturating_duration_since(Instant::now()),
        };
        let key = kept.key();
        let (number, written) = {
            let mut index = self.lock();
            self.forget_expired(&mut index);
            let room = index.keep(key.clone(), kept.reply.clone(), expires, self.bounds);
            self.show_count(&index);
            let Some((number, forgotten)) = room else {
                // One with the same key had to go first.
                self.write_forgotten(vec![key]);
                return Keeping::NoRoom;
            };
            self.write_forgotten(forgotten);
            let store = self.store.as_ref();
            (
                number,
                store.map(|store| store.write(OutboxChange::Keep(Box::new(kept)))),
            )
        };
        let stored = match written {
            Some(written) => stored(&key, written).await,
            None => true,
        };
        // It may have expired meanwhile.
        let kept = self.lock().settle(&key, number, kept_to);
        // Also for what only answers: it expires.
        self.added.notify_one();
        match (kept, stored) {
            (false, _) => Keeping::NoRoom,
            (true, false) => Keeping::InMemory,
            (true, true) => Keeping::AsAsked,
        }
    }

    /// The reply to a request that was executed before. Ids of ours are nobody else's; those of plain peers need not
    /// be, and are not looked for.
    pub(crate) fn find(&self, id: &CorrelationId, to: Option<&ReplyAddress>) -> Option<Arc<Reply>> {
        if self.count() == 0 || id.as_u128().is_none() {
            return None;
        }
        let key = key(id, to?);
        Some(Arc::clone(&self.lock().find(&key)?.reply))
    }

    /// Forgets a reply that its caller has.
    pub(crate) fn forget(&self, id: &CorrelationId, to: &ReplyAddress) {
        let key = key(id, to);
        let mut index = self.lock();
        if index.remove(&key) {
            self.show_count(&index);
            self.write_forgotten(vec![key]);
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Waits until the connection is not there.
    pub(crate) async fn away(&self) {
        let away = |state: &ConnectionState| *state != ConnectionState::Connected;
        // An error would mean that the transport is gone, and with it the connection.
        let _ = self.transport.state().wait_for(away).await;
    }

    /// Sends what is kept whenever the broker is there, and forgets what has expired, until `stop`.
    pub(crate) async fn run(self: Arc<Self>, stop: CancellationToken) {
        tokio::select! {
            () = self.send_all() => {}
            () = stop.cancelled() => {}
        }
    }

    async fn send_all(&self) {
        // The broker had no room just now: what it had none for before waits.
        let mut rests = false;
        loop {
            if let Some(key) = self.first(rests) {
                rests = self.send(&key).await == Tried::Refused;
                continue;
            }
            let again = rests.then(|| Instant::now() + FULL_WAITS);
            let wake = again.into_iter().chain(self.lock().next_expiry()).min();
            tokio::select! {
                () = self.added.notified() => {}
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
            }
            rests = false;
        }
    }

    /// Sends one reply, as often as it takes until its deadline, or until the broker has no room for it.
    async fn send(&self, key: &OutboxKey) -> Tried {
        let unsent = || self.lock().find_unsent(key).cloned();
        while let Some(Kept {
            reply,
            expires,
            number,
            ..
        }) = unsent()
        {
            let sent = async {
                let connected = |state: &ConnectionState| *state == ConnectionState::Connected;
                // An error would mean that the transport is gone, which sending tells.
                let _ = self.transport.state().wait_for(connected).await;
                let to = key.to.clone();
                self.transport.send(Outbound::Reply { to, reply }).await
            };
            match timeout_at(expires, sent).await {
                // It may not show yet that the connection is away.
                Ok(Err(error)) if error.kind() == ErrorKind::ConnectionLost => {
                    sleep(LOST_WAITS).await
                }
                Ok(Err(error)) if error.kind() == ErrorKind::Overloaded => {
                    self.lock().refused(key);
                    self.sent.notify_waiters();
                    return Tried::Refused;
                }
                // It stays unsent, for whoever opens the store next.
                Ok(Err(error)) if error.kind() == ErrorKind::Closed => std::future::pending().await,
                // Sent, or its caller is gone.
                Ok(_) => {
                    let mut index = self.lock();
                    // Another one may have its place.
                    if index.sent(key, number) {
                        self.write(OutboxChange::Sent(key.clone()));
                    }
                }
                Err(_) => self.forget(&key.id, &key.to),
            }
        }
        self.sent.notify_waiters();
        Tried::Done
    }

    /// Waits until all is sent but what there is no room for, or the broker is away.
    pub(crate) async fn flushed(&self) {
        let mut state = self.transport.state();
        loop {
            let mut sent = std::pin::pin!(self.sent.notified());
            // Before the look: what is sent between the two would be missed.
            sent.as_mut().enable();
            if self.lock().all_tried() || *state.borrow_and_update() != ConnectionState::Connected {
                return;
            }
            tokio::select! {
                () = sent => {}
                _ = state.changed() => {}
            }
        }
    }

    /// Closes the store.
    pub(crate) async fn close(&self) {
        if let Some(store) = &self.store {
            store.close().await;
        }
    }

    /// Takes what a former process kept.
    fn take_over(&self, mut found: Vec<KeptReply>) {
        found.sort_by_key(|kept| kept.kept_at);
        let (now, clock) = (Instant::now(), SystemTime::now());
        let mut index = self.lock();
        let mut dropped = Vec::new();
        let all = found.len();
        for kept in found {
            let key = kept.key();
            let room = kept.remaining(clock).and_then(|remaining| {
                let expires = now + remaining.min(TIMEOUT_MAX);
                index.keep(key.clone(), kept.reply, expires, self.bounds)
            });
            match room {
                Some((number, forgotten)) => {
                    dropped.extend(forgotten);
                    let kept_to = match kept.unsent {
                        true => KeptTo::Send,
                        false => KeptTo::Answer,
                    };
                    index.settle(&key, number, kept_to);
                }
                None => dropped.push(key),
            }
        }
        self.show_count(&index);
        if all > 0 {
            let gone = dropped.len();
            tracing::info!(
                all,
                gone,
                "replies were kept before; those gone had expired or do not fit"
            );
        }
        self.write_forgotten(dropped);
    }

    /// What is to be sent next.
    fn first(&self, rests: bool) -> Option<OutboxKey> {
        let mut index = self.lock();
        self.forget_expired(&mut index);
        let refused = || index.first_refused().filter(|_| !rests);
        index.first().or_else(refused)
    }

    fn forget_expired(&self, index: &mut Index) {
        let expired = index.remove_expired(Instant::now());
        if !expired.is_empty() {
            self.show_count(index);
            self.write_forgotten(expired);
            self.sent.notify_waiters();
        }
    }

    fn write_forgotten(&self, forgotten: Forgotten) {
        for key in forgotten {
            self.write(OutboxChange::Forget(key));
        }
    }

    /// Changes the store, waiting for nothing: it makes it good by itself if it cannot at once.
    fn write(&self, change: OutboxChange) {
        if let Some(store) = &self.store {
            drop(store.write(change));
        }
    }

    fn show_count(&self, index: &Index) {
        self.count.store(index.count(), Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        // No code of a user runs under the lock, so a poisoned index is still a whole one.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until a reply survives the process; false if it does not. Nothing is undone then: it may survive later.
async fn stored(key: &OutboxKey, written: StoreWrite) -> bool {
    let (id, waited) = (&key.id, STORE_PATIENCE);
    match timeout(STORE_PATIENCE, written).await {
        Ok(Ok(())) => {
            tracing::debug!(%id, "a reply survives in the outbox");
            return true;
        }
        Ok(Err(error)) => tracing::error!(%id, %error, "a reply is kept in memory only"),
        Err(_) => {
            tracing::error!(%id, ?waited, "a reply is kept in memory only: no word from the store")
        }
    }
    false
}

fn key(id: &CorrelationId, to: &ReplyAddress) -> OutboxKey {
    OutboxKey {
        id: id.clone(),
        to: to.clone(),
    }
}

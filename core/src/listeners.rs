//! Who wants to hear more than one reply: long calls what their server says meanwhile, gatherings the replies of many.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;

use crate::envelope::{CorrelationId, Outcome, Reply};

/// How much of what a call has not yet taken is kept. What comes on top is dropped: a signal is out of date soon.
const BACKLOG_MAX: usize = 1024;

/// The same for a gathering, which takes what comes at once, and two messages from each server.
const GATHERED_MAX: usize = 65_536;

/// Beside the table of pending calls, so that a plain call costs nothing here.
#[derive(Debug, Default)]
pub(crate) struct Listeners {
    table: Mutex<HashMap<u128, Listener, foldhash::fast::RandomState>>,
    /// How many of them want replies too.
    gatherings: AtomicUsize,
}

#[derive(Debug)]
struct Listener {
    wants: Wants,
    sender: mpsc::Sender<Arc<Reply>>,
}

/// What a listener is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wants {
    Signals,
    SignalsAndReplies,
}

impl Listeners {
    /// Listens to what is said under an id, until the returned guard is dropped.
    pub(crate) fn listen(self: &Arc<Self>, id: u128, wants: Wants) -> Listening {
        let backlog = match wants {
            Wants::Signals => BACKLOG_MAX,
            Wants::SignalsAndReplies => GATHERED_MAX,
        };
        let (sender, receiver) = mpsc::channel(backlog);
        if wants == Wants::SignalsAndReplies {
            self.gatherings.fetch_add(1, Ordering::Relaxed);
        }
        self.lock().insert(id, Listener { wants, sender });
        Listening {
            listeners: Arc::clone(self),
            id,
            receiver,
        }
    }

    /// True if the replies of many are gathered under an id.
    pub(crate) fn gathers(&self, id: &CorrelationId) -> bool {
        self.gatherings.load(Ordering::Relaxed) > 0
            && id.as_u128().is_some_and(|id| {
                let table = self.lock();
                table
                    .get(&id)
                    .is_some_and(|listener| listener.wants == Wants::SignalsAndReplies)
            })
    }

    /// True if somebody listens to an id.
    pub(crate) fn listens(&self, id: &CorrelationId) -> bool {
        id.as_u128().is_some_and(|id| self.lock().contains_key(&id))
    }

    /// Gives a message to who listens; returns a reply that nobody gathers.
    pub(crate) fn hear(&self, reply: Arc<Reply>) -> Option<Arc<Reply>> {
        let is_signal = matches!(reply.outcome, Outcome::Signal(_));
        if !is_signal && self.gatherings.load(Ordering::Relaxed) == 0 {
            return Some(reply);
        }
        let table = self.lock();
        let listener = reply.id.as_u128().and_then(|id| table.get(&id));
        match listener {
            Some(listener) if is_signal || listener.wants == Wants::SignalsAndReplies => {
                // Full or about to go: see `BACKLOG_MAX`.
                let _ = listener.sender.try_send(reply);
                None
            }
            // The call has ended, or is too young to listen.
            _ if is_signal => None,
            _ => Some(reply),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u128, Listener, foldhash::fast::RandomState>> {
        // No code of a user runs under the lock, so a poisoned table is still a whole one.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place among the listeners.
#[derive(Debug)]
pub(crate) struct Listening {
    listeners: Arc<Listeners>,
    id: u128,
    receiver: mpsc::Receiver<Arc<Reply>>,
}

impl Listening {
    /// Waits for the next message. It never ends by itself.
    ///
    /// **Cancel safety**: a message is not lost by dropping the future.
    pub(crate) async fn recv(&mut self) -> Arc<Reply> {
        match self.receiver.recv().await {
            Some(reply) => reply,
            None => std::future::pending().await,
        }
    }

    /// The next message, if it is there.
    pub(crate) fn try_recv(&mut self) -> Option<Arc<Reply>> {
        self.receiver.try_recv().ok()
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let removed = self.listeners.lock().remove(&self.id);
        if removed.is_some_and(|listener| listener.wants == Wants::SignalsAndReplies) {
            self.listeners.gatherings.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::Node;
    use crate::signal::Signal;

    fn value(id: u128) -> Arc<Reply> {
        Arc::new(Reply::value(CorrelationId::from_u128(id), ""))
    }

    fn signal(id: u128) -> Arc<Reply> {
        let node = Node::new("n").unwrap();
        Arc::new(Reply::signal(
            CorrelationId::from_u128(id),
            Signal::Progress { node },
        ))
    }

    #[tokio::test]
    async fn each_hears_what_it_wants() {
        let listeners = Arc::new(Listeners::default());
        let mut long = listeners.listen(1, Wants::Signals);
        let mut gathering = listeners.listen(2, Wants::SignalsAndReplies);
        assert!(listeners.hear(value(1)).is_some());
        assert!(listeners.hear(signal(1)).is_none());
        assert!(listeners.hear(value(2)).is_none());
        assert!(listeners.hear(signal(3)).is_none());
        assert!(matches!(long.recv().await.outcome, Outcome::Signal(_)));
        assert_eq!(gathering.recv().await.outcome, Outcome::Value);
        drop((long, gathering));
        assert!(listeners.hear(value(2)).is_some());
        assert!(listeners.lock().is_empty());
        assert_eq!(listeners.gatherings.load(Ordering::Relaxed), 0);
    }
}

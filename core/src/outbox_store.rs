//! Where a server's finished replies are kept beyond the life of its process, while its broker is away.

use std::fmt::Debug;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;

use crate::envelope::{CorrelationId, Reply};
use crate::error::Error;
use crate::name::ReplyAddress;

/// Where a server's finished replies are kept beyond the life of its process, while its broker is away. The server holds
/// them in memory too, within its bounds (see [`Server::outbox`](crate::Server::outbox)), so a store is written often and read
/// once: it is a list that survives.
///
/// It belongs to one running server, which opens it when it starts, and closes it when it was shut down. Dropping it closes
/// it too, some time later.
#[async_trait]
pub trait OutboxStore: Debug + Send + Sync + 'static {
    /// Opens the store, and gives all that it has.
    ///
    /// # Errors
    /// [`ErrorKind::Outbox`](crate::ErrorKind::Outbox) if it cannot be used; the server is not started then, nor if it takes
    /// longer than 10 s.
    async fn open(&self) -> Result<Vec<KeptReply>, Error>;

    /// Changes what is kept. Changes take effect in the order of the calls, whether their futures are polled or not.
    ///
    /// **Resolves when** the change survives the end of the process, and of the machine.
    /// **Cancel safety**: dropping the future does not undo the change.
    /// **Errors**: the reply of a [`Keep`](OutboxChange::Keep) is not in the store then, and lives in the server's memory only, as does
    /// one that takes longer than 3 s. The other changes are made good with a later one.
    fn write(&self, change: OutboxChange) -> StoreWrite;

    /// Closes the store: when it resolves, another process may open it. What was written before is done first; writing
    /// afterwards is an error.
    async fn close(&self);
}

/// A change on its way to a store.
pub type StoreWrite = Pin<Box<dyn Future<Output = Result<(), Error>> + Send>>;

/// What becomes of one reply in a store.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum OutboxChange {
    /// It is kept, in place of one with the same key.
    Keep(Box<KeptReply>),
    /// It was sent, and stays only in case its request comes again.
    Sent(OutboxKey),
    /// It is kept no longer.
    Forget(OutboxKey),
}

/// Which reply: ids of plain peers are unique only with the inbox that they come from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct OutboxKey {
    /// The id of the request.
    pub id: CorrelationId,
    /// The inbox of its caller.
    pub to: ReplyAddress,
}

/// A reply that could not be sent.
#[derive(Clone, Debug)]
pub struct KeptReply {
    /// The inbox of its caller.
    pub to: ReplyAddress,
    /// The reply.
    pub reply: Arc<Reply>,
    /// It is to be sent; else it only answers its request, should that come again.
    pub unsent: bool,
    /// When it was kept, by this host's wall clock: the only one that survives a process. A clock that is set forward while
    /// the process is dead makes the reply live shorter; one that is set back longer, at most its whole life again after each start.
    pub kept_at: SystemTime,
    /// How long it was to live then, at most.
    pub lasts: Duration,
}

impl KeptReply {
    /// Which reply it is.
    #[must_use]
    pub fn key(&self) -> OutboxKey {
        OutboxKey {
            id: self.reply.id.clone(),
            to: self.to.clone(),
        }
    }

    /// What is left of its life at `now`; none once it is over.
    #[must_use]
    pub fn remaining(&self, now: SystemTime) -> Option<Duration> {
        // Kept in the future: the clock was set back.
        let age = now.duration_since(self.kept_at).unwrap_or_default();
        self.lasts.checked_sub(age).filter(|left| !left.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_has_at_most_its_whole_life_left() {
        let second = Duration::from_secs(1);
        let now = SystemTime::now();
        let kept = KeptReply {
            to: ReplyAddress::new("inbox").unwrap(),
            reply: Reply::value(CorrelationId::from_u128(1), "body").into(),
            unsent: true,
            kept_at: now,
            lasts: 10 * second,
        };
        assert_eq!(kept.remaining(now), Some(10 * second));
        assert_eq!(kept.remaining(now + 4 * second), Some(6 * second));
        assert_eq!(kept.remaining(now + 10 * second), None);
        assert_eq!(kept.remaining(now + 3600 * second), None);
        assert_eq!(kept.remaining(now - 3600 * second), Some(10 * second));
    }
}

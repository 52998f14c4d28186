//! Who wins between sending a request and giving it up.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::Instant;

use crate::error::{Error, Executed};
use crate::pending::Wait;

/// As a ticket begins.
const WAITING: u8 = 0;
const COMMITTED: u8 = 1;
const WITHDRAWN: u8 = 2;

/// Decides, once, whether a request is sent or withdrawn.
///
/// The transport commits it right before the first byte may leave; the caller withdraws it at its deadline or when its
/// future is dropped. Exactly one of them succeeds. So a call that times out in front of a broken connection knows that
/// it was never executed, and a request is never sent after its caller has gone.
#[derive(Clone, Debug)]
pub struct Ticket(Arc<Wait>);

impl Ticket {
    /// A ticket that is neither committed nor withdrawn.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::default())
    }

    /// The ticket of a call that waits.
    pub(crate) fn of(wait: Arc<Wait>) -> Self {
        Self(wait)
    }

    pub(crate) fn wait(&self) -> &Wait {
        &self.0
    }

    /// For the caller: what is known of a request that gets no reply. It will not be sent if it was not.
    pub(crate) fn executed(&self) -> Executed {
        if self.withdraw() {
            Executed::No
        } else {
            Executed::Maybe
        }
    }

    /// For the transport: true if the request may be sent now, and counts as sent from now on. True again if it was
    /// committed before: whoever tries a second time must first see whether it [is abandoned](Self::is_abandoned).
    #[must_use]
    pub fn commit(&self) -> bool {
        self.decide(COMMITTED) != WITHDRAWN
    }

    /// The same for less, within [`post`](crate::Transport::post): until that returns, the caller is in it, and cannot withdraw. Not to be
    /// used by whoever has it later, or a request might be sent after its caller has gone.
    #[must_use]
    pub fn commit_in_post(&self) -> bool {
        if self.is_withdrawn() {
            return false;
        }
        self.0.decided.store(COMMITTED, Ordering::Release);
        true
    }

    /// For the transport: the request was sent and came back as it was, so that it may be withdrawn again. Only if that is
    /// certain.
    pub fn reopen(&self) {
        let _ = self.0.decided.compare_exchange(
            COMMITTED,
            WAITING,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
    }

    /// For the caller: true if the request was not sent, and will not be.
    #[must_use]
    pub fn withdraw(&self) -> bool {
        self.decide(WITHDRAWN) != COMMITTED
    }

    /// True if the caller gave up before it was sent; such a request may be forgotten.
    #[must_use]
    pub fn is_withdrawn(&self) -> bool {
        self.0.decided.load(Ordering::Acquire) == WITHDRAWN
    }

    /// For the transport, before it sends a second time: true if nobody waits for the request any more, whether it was sent or not.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.is_withdrawn() || self.0.is_over()
    }

    /// For the transport: when the caller stops waiting, if that is known, by this host's monotonic clock.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.0.deadline
    }

    /// For the transport: the request that it [took](crate::Transport::post) was not sent, or not accepted; the error is that of
    /// [`send`](crate::Transport::send). Ends the call at once, unless it has ended, and is heard once. Whoever drops a request that it
    /// took says so too, or the call waits until its deadline. Not to be called under a lock that the transport takes when it is used.
    pub fn fail(&self, error: Error) {
        self.0.fail(error);
    }

    /// The state after the attempt to move from waiting to `state`.
    fn decide(&self, state: u8) -> u8 {
        let decided = &self.0.decided;
        let before = decided.load(Ordering::Acquire);
        if before != WAITING {
            return before;
        }
        match decided.compare_exchange(WAITING, state, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => state,
            Err(decided) => decided,
        }
    }
}

impl Default for Ticket {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_one_wins() {
        let sent = Ticket::new();
        assert!(sent.commit() && !sent.withdraw() && sent.commit());
        let withdrawn = Ticket::new();
        assert!(withdrawn.withdraw() && !withdrawn.commit() && withdrawn.is_withdrawn());
        withdrawn.reopen();
        assert!(!withdrawn.commit() && !withdrawn.commit_in_post());
        let posted = Ticket::new();
        assert!(posted.commit_in_post() && posted.commit() && !posted.withdraw());
    }

    #[test]
    fn what_came_back_may_be_withdrawn() {
        let ticket = Ticket::new();
        assert!(ticket.commit());
        ticket.reopen();
        assert!(ticket.withdraw() && !ticket.commit());
    }
}

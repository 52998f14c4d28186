//! The calls that wait for a reply, and the memory of those that ended. No I/O.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::envelope::{CorrelationId, Reply};
use crate::error::{Error, ErrorKind, Executed};
use crate::name::ReplyAddress;

/// How many ended calls are remembered, to tell a duplicate or late reply from an unknown one.
const ENDED_MAX: usize = 16_384;

/// For how long they are remembered.
const ENDED_AGE: Duration = Duration::from_secs(60);

/// What a client has seen, and what waits now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClientStats {
    /// Calls that wait for their reply.
    pub pending: usize,
    /// Replies to calls that had their reply before. Discarded.
    pub duplicates: u64,
    /// Replies to calls that had timed out or been dropped. Discarded.
    pub late: u64,
    /// Replies to nothing that this client remembers: it keeps its last 16,384 ended calls, for at most 60 s. Discarded.
    pub unknown: u64,
}

/// How a wait for a reply ends, if not by the caller.
#[derive(Debug)]
pub(crate) enum Ended {
    /// By the reply.
    Reply(Reply),
    /// By a reply that is none.
    Bad(Error),
    /// The inbox lost what was under way.
    InboxLost(Error),
    /// The client was closed.
    Closed(Error),
}

/// The table of one client. One lock: entering and leaving cost less than a sharded table saves below four threads.
#[derive(Debug)]
pub(crate) struct Pending {
    max_pending: usize,
    table: Mutex<Table>,
}

#[derive(Debug)]
struct Table {
    calls: HashMap<u128, Call, foldhash::fast::RandomState>,
    ended: VecDeque<(u128, Instant)>,
    /// Beside the calls, so that a call cannot enter with an address that was lost a moment before.
    address: ReplyAddress,
    closed: Option<Error>,
    stats: ClientStats,
}

#[derive(Debug)]
enum Call {
    Waiting(oneshot::Sender<Ended>),
    Answered,
    Abandoned,
}

impl Pending {
    pub(crate) fn new(address: ReplyAddress, max_pending: usize) -> Arc<Self> {
        let table = Table {
            calls: HashMap::default(),
            ended: VecDeque::new(),
            address,
            closed: None,
            stats: ClientStats::default(),
        };
        Arc::new(Self {
            max_pending,
            table: Mutex::new(table),
        })
    }

    /// Enters a call, before its request is sent: a reply may be faster than `send`.
    pub(crate) fn enter(self: &Arc<Self>, id: u128) -> Result<(Slot, ReplyAddress), Error> {
        let mut table = self.lock();
        // Under the lock that `close` takes: else a call entered behind it would wait for nobody.
        if let Some(error) = &table.closed {
            return Err(error.clone());
        }
        if table.stats.pending >= self.max_pending {
            let message = format!("{} calls wait already", self.max_pending);
            return Err(Error::not_executed(ErrorKind::Overloaded, message));
        }
        let (sender, receiver) = oneshot::channel();
        table.calls.insert(id, Call::Waiting(sender));
        table.stats.pending += 1;
        let address = table.address.clone();
        Ok((
            Slot {
                pending: Arc::clone(self),
                id,
                receiver,
            },
            address,
        ))
    }

    /// Fails if the table is closed.
    pub(crate) fn check_open(&self) -> Result<(), Error> {
        self.lock().closed.clone().map_or(Ok(()), Err)
    }

    /// Hands what arrived to the call that waits for it, or discards and counts it.
    pub(crate) fn resolve(&self, id: &CorrelationId, ended: Ended) {
        let mut table = self.lock();
        table.forget_old(Instant::now());
        let waiting = match id
            .as_u128()
            .and_then(|id| table.calls.get_mut(&id).map(|call| (id, call)))
        {
            Some((id, call @ Call::Waiting(_))) => {
                Ok((id, std::mem::replace(call, Call::Answered)))
            }
            Some((_, Call::Answered)) => Err(&mut table.stats.duplicates),
            Some((_, Call::Abandoned)) => Err(&mut table.stats.late),
            None => Err(&mut table.stats.unknown),
        };
        match waiting {
            Ok((id, call)) => {
                table.remember(id);
                drop(table);
                if let Call::Waiting(sender) = call {
                    // The receiver may be gone by a hair: its call ended first, and has its outcome.
                    let _ = sender.send(ended);
                }
            }
            Err(counter) => *counter += 1,
        }
    }

    /// Counts a reply that cannot be told whose it is.
    pub(crate) fn count_unknown(&self) {
        self.lock().stats.unknown += 1;
    }

    /// Ends all that waits, since their replies may never come, and has later calls use the new address.
    pub(crate) fn inbox_lost(&self, error: &Error, address: ReplyAddress) {
        let mut table = self.lock();
        table.address = address;
        let waiting = table.abandon_all();
        drop(table);
        for sender in waiting {
            let _ = sender.send(Ended::InboxLost(error.clone()));
        }
    }

    /// Ends all that waits, and lets no more calls in.
    pub(crate) fn close(&self, error: &Error) {
        let mut table = self.lock();
        // Whoever comes later was not executed, whatever is true of those who wait.
        table
            .closed
            .get_or_insert_with(|| error.clone().with_executed(Executed::No));
        let waiting = table.abandon_all();
        drop(table);
        for sender in waiting {
            let _ = sender.send(Ended::Closed(error.clone()));
        }
    }

    pub(crate) fn stats(&self) -> ClientStats {
        self.lock().stats
    }

    pub(crate) fn address(&self) -> ReplyAddress {
        self.lock().address.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // No code of a user runs under the lock, so a poisoned table is still a whole one.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Keeps an ended call's id for a while, and counts it as no longer waiting.
    fn remember(&mut self, id: u128) {
        self.stats.pending -= 1;
        let now = Instant::now();
        self.ended.push_back((id, now));
        self.forget_old(now);
    }

    fn forget_old(&mut self, now: Instant) {
        while let Some(&(oldest, ended)) = self.ended.front()
            && (self.ended.len() > ENDED_MAX || now.duration_since(ended) > ENDED_AGE)
        {
            self.ended.pop_front();
            // A call that entered again, behind a lost inbox, waits under the id of its first try.
            if !matches!(self.calls.get(&oldest), Some(Call::Waiting(_))) {
                self.calls.remove(&oldest);
            }
        }
    }

    fn abandon_all(&mut self) -> Vec<oneshot::Sender<Ended>> {
        let waiting: Vec<u128> = self
            .calls
            .iter()
            .filter(|(_, call)| matches!(call, Call::Waiting(_)))
            .map(|(&id, _)| id)
            .collect();
        waiting
            .into_iter()
            .filter_map(|id| self.abandon(id))
            .collect()
    }

    fn abandon(&mut self, id: u128) -> Option<oneshot::Sender<Ended>> {
        let call = self.calls.get_mut(&id)?;
        if !matches!(call, Call::Waiting(_)) {
            return None;
        }
        let call = std::mem::replace(call, Call::Abandoned);
        self.remember(id);
        match call {
            Call::Waiting(sender) => Some(sender),
            Call::Answered | Call::Abandoned => None,
        }
    }
}

/// A call's place in the table; dropping it leaves nothing behind but the memory of its id.
#[derive(Debug)]
pub(crate) struct Slot {
    pending: Arc<Pending>,
    id: u128,
    pub(crate) receiver: oneshot::Receiver<Ended>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.pending.lock().abandon(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(max_pending: usize) -> Arc<Pending> {
        Pending::new(ReplyAddress::new("inbox").unwrap(), max_pending)
    }

    fn answer(pending: &Pending, id: u128) {
        let id = CorrelationId::from_u128(id);
        pending.resolve(&id, Ended::Reply(Reply::value(id.clone(), "")));
    }

    #[test]
    fn replies_are_told_apart() {
        let pending = table(10);
        let (mut answered, _) = pending.enter(1).unwrap();
        let (dropped, _) = pending.enter(2).unwrap();
        assert_eq!(pending.stats().pending, 2);
        answer(&pending, 1);
        answer(&pending, 1);
        drop(dropped);
        answer(&pending, 2);
        answer(&pending, 3);
        pending.resolve(
            &CorrelationId::parse("foreign").unwrap(),
            Ended::Bad(closed()),
        );
        let stats = ClientStats {
            pending: 0,
            duplicates: 1,
            late: 1,
            unknown: 2,
        };
        assert_eq!(pending.stats(), stats);
        assert!(matches!(answered.receiver.try_recv(), Ok(Ended::Reply(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn ended_calls_are_forgotten_by_count_and_by_age() {
        let pending = table(10);
        for id in 0..=ENDED_MAX as u128 {
            let entered = pending.enter(id).unwrap();
            answer(&pending, id);
            drop(entered);
        }
        answer(&pending, 0);
        answer(&pending, 1);
        assert_eq!(
            (pending.stats().unknown, pending.stats().duplicates),
            (1, 1)
        );
        tokio::time::advance(ENDED_AGE + Duration::from_secs(1)).await;
        drop(pending.enter(u128::MAX).unwrap());
        answer(&pending, 1);
        assert_eq!(pending.stats().unknown, 2);
        assert_eq!(pending.lock().calls.len(), 1);
    }

    #[test]
    fn a_lost_inbox_ends_what_waits_and_changes_the_address() {
        let pending = table(1);
        let (mut slot, address) = pending.enter(1).unwrap();
        assert_eq!(address.as_str(), "inbox");
        assert_eq!(pending.enter(2).unwrap_err().kind(), ErrorKind::Overloaded);
        pending.inbox_lost(&closed(), ReplyAddress::new("other").unwrap());
        assert!(matches!(slot.receiver.try_recv(), Ok(Ended::InboxLost(_))));
        assert_eq!(pending.enter(3).unwrap().1.as_str(), "other");
    }

    #[test]
    fn nobody_enters_a_closed_table() {
        let pending = table(10);
        let (mut slot, _) = pending.enter(1).unwrap();
        pending.close(&closed());
        assert!(matches!(slot.receiver.try_recv(), Ok(Ended::Closed(_))));
        assert_eq!(pending.enter(2).unwrap_err().kind(), ErrorKind::Closed);
    }

    fn closed() -> Error {
        Error::not_executed(ErrorKind::Closed, "closed")
    }
}

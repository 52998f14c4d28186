//! The calls that wait for a reply, and the memory of those that ended. No I/O.

mod deadlines;
mod ended;
mod heartbeats;
mod place;
mod wait;
mod wall;

pub(crate) use self::place::{Place, Slot};
pub(crate) use self::wait::Wait;

use std::collections::HashMap;
use std::future::pending;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};

use self::deadlines::Deadlines;
use self::ended::{EndedCalls, Fate};
use self::heartbeats::Heartbeats;
use self::wall::WallClock;
use crate::envelope::{CorrelationId, Reply};
use crate::error::{Error, ErrorKind, Executed};
use crate::name::ReplyAddress;
use crate::transport::ConnectionState;

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
    Reply(Arc<Reply>),
    /// By a reply that is none.
    Bad(Error),
    /// By its request, which was not sent, or not accepted. Nobody took it out of the table.
    SendFailed(Error),
    /// By its deadline.
    TimedOut,
    /// Its server said that it runs, and has been silent since.
    ServerLost,
    /// The inbox lost what was under way.
    InboxLost(Error),
    /// The client was closed.
    Closed(Error),
}

/// What arrived for a call.
#[derive(Debug)]
pub(crate) struct Arrived {
    id: Option<u128>,
    ended: Ended,
    /// Who waits for it, once that is known.
    wait: Option<Arc<Wait>>,
}

impl Arrived {
    pub(crate) fn reply(reply: Arc<Reply>) -> Self {
        Self {
            id: reply.id.as_u128(),
            ended: Ended::Reply(reply),
            wait: None,
        }
    }

    /// A reply that is none.
    pub(crate) fn bad(id: &CorrelationId, error: Error) -> Self {
        Self {
            id: id.as_u128(),
            ended: Ended::Bad(error),
            wait: None,
        }
    }
}

/// The table of one client.
#[derive(Debug)]
pub(crate) struct Pending {
    max_pending: usize,
    table: Mutex<Table>,
    /// Rung for the sweeper when there is an earlier deadline than the one that it sleeps until, and at the end.
    earlier: Notify,
}

#[derive(Debug)]
struct Table {
    waiting: HashMap<u128, Arc<Wait>, foldhash::fast::RandomState>,
    deadlines: Deadlines,
    heartbeats: Heartbeats,
    ended: EndedCalls,
    /// Beside the calls, so that a call cannot enter with an address that was lost a moment before.
    address: ReplyAddress,
    wall: WallClock,
    closed: Option<Error>,
    duplicates: u64,
    late: u64,
    unknown: u64,
}

impl Pending {
    pub(crate) fn new(address: ReplyAddress, max_pending: usize) -> Arc<Self> {
        let table = Table {
            waiting: HashMap::default(),
            deadlines: Deadlines::default(),
            heartbeats: Heartbeats::default(),
            ended: EndedCalls::default(),
            address,
            wall: WallClock::read(Instant::now()),
            closed: None,
            duplicates: 0,
            late: 0,
            unknown: 0,
        };
        Arc::new(Self {
            max_pending,
            table: Mutex::new(table),
            earlier: Notify::new(),
        })
    }

    /// Enters a call, before its request is sent: a reply may be faster than `send`. It ends by `deadline`. If
    /// who enters it polls for its end within the same poll, its waker saves the first look.
    ///
    /// Who enters it has it [leave](Self::leave) in the end.
    pub(crate) fn enter(
        &self,
        id: u128,
        now: Instant,
        deadline: Instant,
        waker: Option<&Waker>,
    ) -> Result<Entered, Error> {
        let wait = Arc::new(Wait::until(deadline, waker.cloned()));
        let (is_first, address, wall) = {
            let mut guard = self.lock();
            let table = &mut *guard;
            // Under the lock that `close` takes: else a call entered behind it would wait for nobody.
            if let Some(error) = &table.closed {
                return Err(error.clone());
            }
            if table.waiting.len() >= self.max_pending {
                let message = format!("{} calls wait already", self.max_pending);
                return Err(Error::not_executed(ErrorKind::Overloaded, message));
            }
            table.waiting.insert(id, Arc::clone(&wait));
            let waits = |id| table.waiting.contains_key(&id);
            let is_first = table
                .deadlines
                .insert(deadline, id, table.waiting.len(), waits);
            (is_first, table.address.clone(), table.wall.at(now))
        };
        if is_first {
            self.earlier.notify_one();
        }
        Ok(Entered {
            place: Place::new(id, wait),
            address,
            wall,
        })
    }

    /// Leaves nothing behind of a call but the memory of its id, unless it has ended.
    pub(crate) fn leave(&self, place: &mut Place) {
        if let Some(id) = place.take_out() {
            let abandoned = self.lock().abandon(id, Instant::now());
            drop(abandoned);
            place.ticket().wait().leave();
        }
    }

    /// Fails if the table is closed.
    pub(crate) fn check_open(&self) -> Result<(), Error> {
        self.lock().closed.clone().map_or(Ok(()), Err)
    }

    /// Hands what arrived to the calls that wait for it, or discards and counts it. Leaves `arrived` empty.
    pub(crate) fn resolve(&self, arrived: &mut Vec<Arrived>, now: Instant) {
        if arrived.is_empty() {
            return;
        }
        {
            let mut table = self.lock();
            for arrived in &mut *arrived {
                arrived.wait = table.answer(arrived.id, now);
            }
        }
        for Arrived { wait, ended, .. } in arrived.drain(..) {
            if let Some(wait) = wait {
                // Its future may be gone by a hair: the call ended first, and has its outcome.
                wait.end(ended);
            }
        }
    }

    /// True if a call waits for its reply.
    pub(crate) fn waits(&self, id: &CorrelationId) -> bool {
        id.as_u128()
            .is_some_and(|id| self.lock().waiting.contains_key(&id))
    }

    /// Notes that the server of a call lives, and says so again within `every`.
    pub(crate) fn hear(&self, id: &CorrelationId, every: Duration, now: Instant) {
        let mut table = self.lock();
        let is_first = match id.as_u128() {
            Some(id) if table.waiting.contains_key(&id) => table.heartbeats.hear(id, every, now),
            _ => false,
        };
        drop(table);
        if is_first {
            self.earlier.notify_one();
        }
    }

    /// Counts a reply that cannot be told whose it is.
    pub(crate) fn count_unknown(&self) {
        self.lock().unknown += 1;
    }

    /// Ends calls at their deadlines and when their servers are lost, until the table is closed.
    ///
    /// One timer for all of them: most calls end long before their deadline, and would have set and removed one for nothing.
    pub(crate) async fn sweep(&self, mut state: watch::Receiver<ConnectionState>) {
        let mut connected: Option<Instant> = None;
        loop {
            let now = Instant::now();
            connected = match *state.borrow_and_update() {
                ConnectionState::Connected => connected.or(Some(now)),
                _ => None,
            };
            let (due, lost, next) = {
                let mut guard = self.lock();
                let table = &mut *guard;
                if table.closed.is_some() {
                    return;
                }
                let mut due = Vec::new();
                while let Some(id) = table.deadlines.pop_due(now) {
                    due.extend(table.abandon(id, now));
                }
                let mut lost = Vec::new();
                for id in table.heartbeats.take_lost(now, connected) {
                    lost.extend(table.abandon(id, now));
                }
                let next = table.deadlines.arm(|id| table.waiting.contains_key(&id));
                let next = next.into_iter().chain(table.heartbeats.next()).min();
                (due, lost, next)
            };
            for wait in due {
                wait.end(Ended::TimedOut);
            }
            for wait in lost {
                wait.end(Ended::ServerLost);
            }
            let timer = async {
                match next {
                    Some(next) => sleep_until(next).await,
                    None => pending().await,
                }
            };
            // However it ends, all is looked at again.
            tokio::select! {
                () = timer => {}
                () = self.earlier.notified() => {}
                // A transport that is gone changes its state no more.
                Ok(()) = state.changed() => {}
            }
        }
    }

    /// Ends all that waits, since their replies may never come, and has later calls use the new address.
    pub(crate) fn inbox_lost(&self, error: &Error, address: ReplyAddress) {
        let mut table = self.lock();
        table.address = address;
        let waiting = table.abandon_all();
        drop(table);
        for wait in waiting {
            wait.end(Ended::InboxLost(error.clone()));
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
        self.earlier.notify_one();
        for wait in waiting {
            wait.end(Ended::Closed(error.clone()));
        }
    }

    pub(crate) fn stats(&self) -> ClientStats {
        let table = self.lock();
        ClientStats {
            pending: table.waiting.len(),
            duplicates: table.duplicates,
            late: table.late,
            unknown: table.unknown,
        }
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
    /// Takes the call out that a reply is for. An id that is no number is none of ours.
    fn answer(&mut self, id: Option<u128>, now: Instant) -> Option<Arc<Wait>> {
        let Some(id) = id else {
            self.unknown += 1;
            return None;
        };
        if let Some(wait) = self.waiting.remove(&id) {
            self.heartbeats.forget(id);
            self.ended.remember(id, Fate::Answered, now);
            return Some(wait);
        }
        match self.ended.find(id, now) {
            Some(Fate::Answered) => self.duplicates += 1,
            Some(Fate::Abandoned) => self.late += 1,
            None => self.unknown += 1,
        }
        None
    }

    fn abandon_all(&mut self) -> Vec<Arc<Wait>> {
        self.heartbeats = Heartbeats::default();
        let now = Instant::now();
        let ended = &mut self.ended;
        let waiting = self.waiting.drain();
        waiting
            .map(|(id, wait)| {
                ended.remember(id, Fate::Abandoned, now);
                wait
            })
            .collect()
    }

    fn abandon(&mut self, id: u128, now: Instant) -> Option<Arc<Wait>> {
        let wait = self.waiting.remove(&id)?;
        self.heartbeats.forget(id);
        self.ended.remember(id, Fate::Abandoned, now);
        Some(wait)
    }
}

/// What a call that entered is told.
pub(crate) struct Entered {
    pub(crate) place: Place,
    /// Where its reply is to go.
    pub(crate) address: ReplyAddress,
    /// What the wall clock says.
    pub(crate) wall: SystemTime,
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Poll, Wake};

    use super::ended::{ENDED_AGE, ENDED_MAX};
    use super::*;
    use crate::ticket::Ticket;

    fn table(max_pending: usize) -> Arc<Pending> {
        Pending::new(ReplyAddress::new("inbox").unwrap(), max_pending)
    }

    fn answer(pending: &Pending, id: u128) {
        let reply = Reply::value(CorrelationId::from_u128(id), "");
        arrive(pending, Arrived::reply(Arc::new(reply)));
    }

    fn arrive(pending: &Pending, arrived: Arrived) {
        pending.resolve(&mut vec![arrived], Instant::now());
    }

    fn enter(pending: &Pending, id: u128) -> Result<(Slot<'_>, ReplyAddress), Error> {
        enter_until(pending, id, Instant::now() + Duration::from_secs(30), None)
    }

    fn enter_until<'a>(
        pending: &'a Pending,
        id: u128,
        deadline: Instant,
        waker: Option<&Waker>,
    ) -> Result<(Slot<'a>, ReplyAddress), Error> {
        let Entered { place, address, .. } = pending.enter(id, Instant::now(), deadline, waker)?;
        Ok((Slot { pending, place }, address))
    }

    /// How a call has ended.
    fn end(mut slot: Slot<'_>) -> Option<Ended> {
        match slot
            .place
            .poll_ended(&mut Context::from_waker(Waker::noop()))
        {
            Poll::Ready(ended) => Some(ended),
            Poll::Pending => None,
        }
    }

    #[test]
    fn replies_are_told_apart() {
        let pending = table(10);
        let (answered, _) = enter(&pending, 1).unwrap();
        let (dropped, _) = enter(&pending, 2).unwrap();
        assert_eq!(pending.stats().pending, 2);
        answer(&pending, 1);
        answer(&pending, 1);
        drop(dropped);
        answer(&pending, 2);
        answer(&pending, 3);
        let foreign = CorrelationId::parse("foreign").unwrap();
        arrive(&pending, Arrived::bad(&foreign, closed()));
        let stats = ClientStats {
            pending: 0,
            duplicates: 1,
            late: 1,
            unknown: 2,
        };
        assert_eq!(pending.stats(), stats);
        assert!(matches!(end(answered), Some(Ended::Reply(_))));
    }

    #[test]
    fn replies_that_arrive_together_are_told_apart() {
        let pending = table(10);
        let (first, _) = enter(&pending, 1).unwrap();
        let (second, _) = enter(&pending, 2).unwrap();
        let reply = |id| Arrived::reply(Arc::new(Reply::value(CorrelationId::from_u128(id), "")));
        let mut arrived = vec![reply(1), reply(3), reply(1), reply(2)];
        pending.resolve(&mut arrived, Instant::now());
        assert!(arrived.is_empty());
        for (slot, id) in [(first, 1), (second, 2)] {
            let Some(Ended::Reply(reply)) = end(slot) else {
                panic!("{id} was answered");
            };
            assert_eq!(reply.id, CorrelationId::from_u128(id));
        }
        let stats = pending.stats();
        assert_eq!((stats.duplicates, stats.unknown, stats.late), (1, 1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn ended_calls_are_forgotten_by_count_and_by_age() {
        let pending = table(10);
        for id in 0..=ENDED_MAX as u128 {
            let entered = enter(&pending, id).unwrap();
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
        drop(enter(&pending, u128::MAX).unwrap());
        answer(&pending, 1);
        assert_eq!(pending.stats().unknown, 2);
        assert_eq!(pending.lock().ended.len(), 1);
        assert_eq!(pending.stats().pending, 0);
    }

    #[test]
    fn a_lost_inbox_ends_what_waits_and_changes_the_address() {
        let pending = table(1);
        let (slot, address) = enter(&pending, 1).unwrap();
        assert_eq!(address.as_str(), "inbox");
        assert_eq!(
            enter(&pending, 2).unwrap_err().kind(),
            ErrorKind::Overloaded
        );
        pending.inbox_lost(&closed(), ReplyAddress::new("other").unwrap());
        assert!(matches!(end(slot), Some(Ended::InboxLost(_))));
        assert_eq!(enter(&pending, 3).unwrap().1.as_str(), "other");
    }

    #[test]
    fn a_send_that_fails_ends_its_call_once() {
        let pending = table(10);
        let (mut slot, _) = enter(&pending, 1).unwrap();
        let ticket = slot.place.ticket().clone();
        let woken = Arc::new(Wakes::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut cx = Context::from_waker(&waker);
        assert!(slot.place.poll_ended(&mut cx).is_pending());
        assert!(!ticket.is_abandoned());
        ticket.fail(failed("first"));
        ticket.fail(failed("second"));
        assert_eq!(woken.0.load(Ordering::SeqCst), 1);
        let Poll::Ready(Ended::SendFailed(error)) = slot.place.poll_ended(&mut cx) else {
            panic!("the send failed");
        };
        assert_eq!(error.message(), "first");
        // It leaves the table itself, and its reply comes too late.
        assert_eq!(pending.stats().pending, 1);
        drop(slot);
        ticket.fail(failed("third"));
        answer(&pending, 1);
        assert_eq!((pending.stats().pending, pending.stats().late), (0, 1));
        assert_eq!(woken.0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_reply_is_more_than_a_send_that_failed() {
        let pending = table(10);
        for id in 1..=2 {
            let (slot, _) = enter(&pending, id).unwrap();
            let ticket = slot.place.ticket().clone();
            if id == 1 {
                ticket.fail(failed("before the reply"));
            }
            answer(&pending, id);
            ticket.fail(failed("after the reply"));
            assert!(ticket.commit() && ticket.is_abandoned());
            assert!(matches!(end(slot), Some(Ended::Reply(_))));
            assert!(ticket.is_abandoned());
            // Of a call that has its reply nobody hears more.
            ticket.fail(failed("after the end"));
        }
        let stats = pending.stats();
        assert_eq!((stats.pending, stats.late, stats.duplicates), (0, 0, 0));
    }

    #[test]
    fn nobody_hears_of_a_send_whose_call_was_dropped() {
        let pending = table(10);
        let (slot, _) = enter(&pending, 1).unwrap();
        let ticket = slot.place.ticket().clone();
        assert!(ticket.commit());
        drop(slot);
        assert!(ticket.is_abandoned() && !ticket.is_withdrawn());
        ticket.fail(failed("too late"));
        assert_eq!(pending.stats().pending, 0);
        Ticket::new().fail(failed("of no call"));
    }

    #[test]
    fn who_enters_with_a_waker_is_woken() {
        let pending = table(10);
        let deadline = Instant::now() + Duration::from_secs(1);
        let woken = Arc::new(Wakes::default());
        let waker = Waker::from(Arc::clone(&woken));
        let (failing, _) = enter_until(&pending, 1, deadline, Some(&waker)).unwrap();
        failing.place.ticket().fail(failed("at once"));
        let (_answered, _) = enter_until(&pending, 2, deadline, Some(&waker)).unwrap();
        answer(&pending, 2);
        assert_eq!(woken.0.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn nobody_enters_a_closed_table() {
        let pending = table(10);
        let (slot, _) = enter(&pending, 1).unwrap();
        pending.close(&closed());
        assert!(matches!(end(slot), Some(Ended::Closed(_))));
        assert_eq!(enter(&pending, 2).unwrap_err().kind(), ErrorKind::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn each_call_ends_at_its_deadline_and_not_before() {
        let pending = table(1000);
        let sweeper = tokio::spawn({
            let pending = Arc::clone(&pending);
            async move {
                pending
                    .sweep(watch::channel(ConnectionState::Connected).1)
                    .await
            }
        });
        let start = Instant::now();
        let after = |milliseconds| start + Duration::from_millis(milliseconds);
        // Those that end early, many of them, leave the others their deadlines.
        for id in 1000..2000 {
            drop(enter_until(&pending, id, after(5), None).unwrap());
        }
        let mut calls = Vec::new();
        for (id, milliseconds) in [(1, 300), (2, 100), (3, 200), (4, 100)] {
            let (slot, _) = enter_until(&pending, id, after(milliseconds), None).unwrap();
            calls.push((slot, after(milliseconds)));
            tokio::task::yield_now().await;
        }
        calls.sort_by_key(|(_, deadline)| *deadline);
        for (mut slot, deadline) in calls {
            let ended = slot.ended().await;
            assert!(matches!(ended, Ended::TimedOut));
            let late = Instant::now().duration_since(deadline);
            assert!(
                Instant::now() >= deadline && late <= Duration::from_millis(2),
                "{late:?}"
            );
        }
        answer(&pending, 1);
        assert_eq!((pending.stats().late, pending.stats().pending), (1, 0));
        pending.close(&closed());
        sweeper.await.unwrap();
    }

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn closed() -> Error {
        Error::not_executed(ErrorKind::Closed, "closed")
    }

    fn failed(message: &str) -> Error {
        Error::maybe_executed(ErrorKind::ConnectionLost, message)
    }
}

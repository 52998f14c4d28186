//! A client's reply address and what arrived there.

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use antiphon_core::transport::{Inbox, InboxEvent, Incoming};
use antiphon_core::{Error, ErrorKind, Reply, ReplyAddress, ServiceName};
use async_trait::async_trait;
use tokio::task::coop;
use tokio::time::{Instant, Sleep, sleep_until};
use uuid::Uuid;

use crate::connection::Connection;
use crate::{BATCH_MAX, closed, lock};

/// An inbox that is empty keeps room for so many replies; that of a greater burst is given back.
const ROOM_MAX: usize = 1024;

/// The broker's half of an inbox, found by its address.
pub(crate) struct Letters {
    connection: u64,
    state: Mutex<State>,
}

struct State {
    address: ReplyAddress,
    arrived: VecDeque<Incoming>,
    /// On their way, if a delay is injected.
    travelling: VecDeque<(Instant, Incoming)>,
    /// Set while a `recv` waits; taken by the first of a batch of replies, so that a batch wakes once.
    waker: Option<Waker>,
    lost: Option<Error>,
    closed: bool,
}

impl Letters {
    pub(crate) fn new(connection: u64) -> Self {
        let state = State {
            address: new_address(),
            arrived: VecDeque::new(),
            travelling: VecDeque::new(),
            waker: None,
            lost: None,
            closed: false,
        };
        Self {
            connection,
            state: Mutex::new(state),
        }
    }

    pub(crate) fn connection(&self) -> u64 {
        self.connection
    }

    pub(crate) fn address(&self) -> ReplyAddress {
        lock(&self.state).address.clone()
    }

    /// Adds a reply, and says whom to wake for it.
    pub(crate) fn push(&self, incoming: Incoming, arrives: Option<Instant>) -> Option<Waker> {
        let mut state = lock(&self.state);
        match arrives {
            // Behind one that still travels there is no overtaking.
            None if state.travelling.is_empty() => state.arrived.push_back(incoming),
            arrives => state
                .travelling
                .push_back((arrives.unwrap_or_else(Instant::now), incoming)),
        }
        state.waker.take()
    }

    /// Adds a reply that has arrived, and says whom to wake for it. Gives it back if this is not, or no longer, that inbox.
    pub(crate) fn push_to(
        &self,
        to: &ReplyAddress,
        reply: Arc<Reply>,
    ) -> Result<Option<Waker>, Arc<Reply>> {
        let mut state = lock(&self.state);
        // One that still travels must not be overtaken.
        if state.closed || state.address != *to || !state.travelling.is_empty() {
            return Err(reply);
        }
        state.arrived.push_back(Incoming::Reply(reply));
        Ok(state.waker.take())
    }

    pub(crate) fn is_closed(&self) -> bool {
        lock(&self.state).closed
    }

    pub(crate) fn take_waker(&self) -> Option<Waker> {
        lock(&self.state).waker.take()
    }

    /// Forgets all replies and moves to a new address; says whom to wake for it.
    pub(crate) fn lose(&self) -> Option<Waker> {
        let mut state = lock(&self.state);
        state.arrived.clear();
        state.travelling.clear();
        state.address = new_address();
        state.lost = Some(Error::maybe_executed(
            ErrorKind::ConnectionLost,
            "the broker lost its messages",
        ));
        state.waker.take()
    }

    pub(crate) fn close(&self) {
        let waker = {
            let mut state = lock(&self.state);
            state.closed = true;
            // Their room too: a queue may keep this for long.
            state.arrived = VecDeque::new();
            state.travelling = VecDeque::new();
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The next event, or when to look again if nobody wakes.
    fn poll(
        &self,
        connection: &Connection,
        cx: &Context<'_>,
    ) -> Result<InboxEvent, Option<Instant>> {
        let mut state = lock(&self.state);
        if state.closed {
            return Ok(InboxEvent::Closed(closed("connection")));
        }
        // Asked under the lock: who restores the connection takes it afterwards, to wake this.
        if !connection.is_reachable() {
            state.waker = Some(cx.waker().clone());
            return Err(None);
        }
        if let Some(error) = state.lost.take() {
            return Ok(InboxEvent::Lost(error));
        }
        if !state.travelling.is_empty() {
            state.unload(Instant::now());
        }
        if state.arrived.is_empty() {
            state.waker = Some(cx.waker().clone());
            return Err(state.travelling.front().map(|(arrives, _)| *arrives));
        }
        let batch = state.arrived.len().min(BATCH_MAX);
        let replies = state.arrived.drain(..batch).collect();
        if state.arrived.is_empty() && state.arrived.capacity() > ROOM_MAX {
            state.arrived = VecDeque::new();
        }
        Ok(InboxEvent::Replies(replies))
    }
}

impl State {
    fn unload(&mut self, now: Instant) {
        let here = self
            .travelling
            .iter()
            .take_while(|(arrives, _)| *arrives <= now)
            .count();
        self.arrived
            .extend(self.travelling.drain(..here).map(|(_, incoming)| incoming));
    }
}

impl fmt::Debug for Letters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Letters")
            .field("connection", &self.connection)
            .finish_non_exhaustive()
    }
}

/// The client's half of an inbox.
#[derive(Debug)]
pub(crate) struct MemoryInbox {
    connection: Arc<Connection>,
    letters: Arc<Letters>,
}

impl MemoryInbox {
    pub(crate) fn new(connection: Arc<Connection>, letters: Arc<Letters>) -> Self {
        Self {
            connection,
            letters,
        }
    }
}

#[async_trait]
impl Inbox for MemoryInbox {
    fn address(&self) -> ReplyAddress {
        self.letters.address()
    }

    async fn join(&mut self, service: &ServiceName) -> Result<(), Error> {
        let join = || {
            self.connection.hub().join(service, &self.letters);
            Ok(())
        };
        self.connection.open(join).await
    }

    async fn recv(&mut self) -> InboxEvent {
        coop::consume_budget().await;
        let mut timer = Timer::default();
        poll_fn(|cx| {
            loop {
                match self.letters.poll(&self.connection, cx) {
                    Ok(event) => return Poll::Ready(event),
                    Err(next) if timer.is_due(next, cx) => {}
                    Err(_) => return Poll::Pending,
                }
            }
        })
        .await
    }
}

impl Drop for MemoryInbox {
    fn drop(&mut self) {
        self.connection.hub().remove_inbox(&self.letters);
    }
}

/// Wakes a task at a time that may change from poll to poll; costs nothing while there is none.
#[derive(Default)]
pub(crate) struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    /// True if `next` has come; else the task is woken when it does.
    pub(crate) fn is_due(&mut self, next: Option<Instant>, cx: &mut Context<'_>) -> bool {
        self.0 = next.map(|next| Box::pin(sleep_until(next)));
        self.0
            .as_mut()
            .is_some_and(|sleep| sleep.as_mut().poll(cx).is_ready())
    }
}

fn new_address() -> ReplyAddress {
    let address = format!("memory.{}", Uuid::new_v4());
    // 43 bytes of printable ASCII are a valid address.
    ReplyAddress::new(&address).unwrap_or_else(|_| unreachable!("an address of ours is valid"))
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use antiphon_core::CorrelationId;

    use super::*;
    use crate::MemoryBroker;

    #[test]
    fn the_room_of_a_burst_is_given_back() {
        let transport = MemoryBroker::new().connect();
        let connection = transport.connection();
        let letters = connection.hub().open_inbox(connection.id());
        let burst = 4 * ROOM_MAX;
        for _ in 0..burst {
            let reply = Arc::new(Reply::value(CorrelationId::random(), ""));
            letters.push(Incoming::Reply(reply), None);
        }
        assert!(lock(&letters.state).arrived.capacity() >= burst);
        let mut arrived = 0;
        while let Ok(InboxEvent::Replies(replies)) =
            letters.poll(connection, &Context::from_waker(Waker::noop()))
        {
            arrived += replies.len();
        }
        assert_eq!(arrived, burst);
        assert!(lock(&letters.state).arrived.capacity() <= ROOM_MAX);
    }
}

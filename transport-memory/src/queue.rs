//! One service's requests: those that wait, those in some server's hands, and the dead.

use std::collections::VecDeque;
use std::mem;
use std::sync::Mutex;
use std::task::Waker;

use antiphon_core::transport::{SubscribeMode, SubscribeOptions};
use antiphon_core::{Error, ErrorKind, Request, ServiceName, Ticket};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::broker::{DeadLetter, ServiceStats};
use crate::config::MemoryConfig;
use crate::session::{Presence, Session};
use crate::table::{Key, Table};
use crate::{closed, lock};

/// One short lock guards it all, so that a request is always in exactly one place. Nothing is woken, cancelled or
/// awaited under it.
#[derive(Debug)]
pub(crate) struct Queue {
    name: ServiceName,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    ready: VecDeque<Queued>,
    held: Table<Held>,
    sessions: Table<Session>,
    /// Sessions with free hands that wait for a request, the longest waiting first.
    idle: VecDeque<Key>,
    dead: VecDeque<DeadLetter>,
    /// The earliest end of a paused session's lease. Nobody sleeps for it but those that could take what it frees;
    /// everybody else looks when they come by.
    lease_check: Option<Instant>,
}

/// A request that nobody has.
#[derive(Debug)]
pub(crate) struct Queued {
    pub(crate) request: Request,
    pub(crate) attempt: u32,
    pub(crate) expires: Option<Instant>,
    /// When it has travelled to here, if a delay is injected.
    pub(crate) arrives: Option<Instant>,
}

/// A request in a session's hands.
#[derive(Debug)]
struct Held {
    queued: Queued,
    session: Key,
}

/// A copy of a held request for its server.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) request: Request,
    pub(crate) attempt: u32,
    pub(crate) expires: Option<Instant>,
    pub(crate) key: Key,
}

/// What came of asking for requests.
#[derive(Debug)]
pub(crate) enum Claim {
    /// Some were taken, under this lease.
    Taken(CancellationToken),
    /// None now; ask again when woken, or at this time.
    Wait(Option<Instant>),
    /// None ever again.
    Over(Error),
}

/// Whether a request that comes back was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Return {
    /// Perhaps: its server died or dropped it.
    Counted,
    /// No.
    Uncounted,
}

impl Queue {
    pub(crate) fn new(name: ServiceName) -> Self {
        let state = State {
            ready: VecDeque::new(),
            held: Table::new(),
            sessions: Table::new(),
            idle: VecDeque::new(),
            dead: VecDeque::new(),
            lease_check: None,
        };
        Self {
            name,
            state: Mutex::new(state),
        }
    }

    /// Adds a request if it may still be sent, and says whom to wake for it.
    pub(crate) fn push(
        &self,
        queued: Queued,
        expect_responder: bool,
        ticket: &Ticket,
        now: Instant,
        config: &MemoryConfig,
    ) -> Result<Option<Waker>, Error> {
        let mut state = lock(&self.state);
        if expect_responder && !state.is_served(now) {
            return Err(Error::not_executed(
                ErrorKind::NoResponder,
                format!("nobody serves {}", self.name),
            ));
        }
        while state
            .ready
            .front()
            .is_some_and(|front| front.is_forgotten(now, config))
        {
            state.ready.pop_front();
        }
        if state.ready.len() >= config.max_queued {
            return Err(Error::not_executed(
                ErrorKind::Overloaded,
                format!("the queue of {} is full", self.name),
            ));
        }
        if !ticket.commit() {
            return Err(Error::not_executed(
                ErrorKind::Cancelled,
                "withdrawn before it was sent",
            ));
        }
        state.ready.push_back(queued);
        Ok(state.next_idle())
    }

    /// Adds a subscriber.
    pub(crate) fn subscribe(
        &self,
        connection: u64,
        options: SubscribeOptions,
    ) -> Result<Key, Error> {
        self.update(|state, effects| {
            state.end_leases(Instant::now(), effects);
            if state.is_excluded(options.mode) {
                return Err(already_owned(&self.name));
            }
            Ok(state.sessions.insert(Session::new(connection, options)))
        })
    }

    /// Takes all that the session has free hands for; if nothing, `waker` is woken when that may have changed.
    pub(crate) fn claim(&self, session: Key, waker: &Waker, taken: &mut Vec<Taken>) -> Claim {
        self.update(|state, effects| state.claim(session, waker, taken, effects))
    }

    /// Undoes the waiting of a claim whose future is dropped.
    pub(crate) fn cancel_wait(&self, key: Key) {
        self.update(|state, effects| {
            state.leave_idle(key);
            if let Some(session) = state.sessions.find_mut(key) {
                session.waker = None;
            }
            // It may have been woken for a request, or be the one that sleeps until it arrives: somebody else must.
            state.pass_on(effects);
        });
    }

    /// Ends a held delivery for good; `None` if it is held no more.
    pub(crate) fn settle(&self, key: Key) -> Option<()> {
        self.update(|state, effects| {
            let held = state.held.remove(key)?;
            state.free_hand(held.session, effects);
            Some(())
        })
    }

    /// Moves a held delivery to the dead letters; `None` if it is held no more.
    pub(crate) fn bury(&self, key: Key, reason: String, config: &MemoryConfig) -> Option<()> {
        self.update(|state, effects| {
            let Held { queued, session } = state.held.remove(key)?;
            state.dead.push_back(DeadLetter {
                request: queued.request,
                attempt: queued.attempt,
                reason,
            });
            while state.dead.len() > config.max_dead {
                state.dead.pop_front();
            }
            state.free_hand(session, effects);
            Some(())
        })
    }

    /// Puts a held delivery back to the head; `None` if it is held no more.
    pub(crate) fn give_back(&self, key: Key, how: Return) -> Option<()> {
        self.update(|state, effects| {
            let session = state.put_back(key, how)?;
            state.free_hand(session, effects);
            state.pass_on(effects);
            Some(())
        })
    }

    /// Ends a session; what is in its hands stays there.
    pub(crate) fn stop(&self, key: Key) {
        self.update(|state, effects| state.end(key, closed("subscription"), effects));
    }

    /// Ends a session whose subscription is dropped, and forgets it once its hands are empty.
    pub(crate) fn abandon(&self, key: Key) {
        self.update(|state, effects| {
            state.end(key, closed("subscription"), effects);
            if let Some(session) = state.sessions.find_mut(key) {
                session.abandoned = true;
                if session.held == 0 {
                    state.sessions.remove(key);
                }
            }
        });
    }

    /// The connection is cut: its sessions lose what they hold, and are no subscribers until they rejoin.
    pub(crate) fn detach(&self, connection: u64) {
        self.update(|state, effects| {
            for key in state
                .sessions
                .keys(|session| session.connection == connection)
            {
                state.detach(key, effects);
            }
        });
    }

    /// The connection is back, and so are its sessions, except where an exclusive one stands in the way.
    pub(crate) fn rejoin(&self, connection: u64) {
        self.update(|state, effects| {
            state.end_leases(Instant::now(), effects);
            for key in state
                .sessions
                .keys(|session| session.connection == connection && session.is_away())
            {
                state.rejoin(key, &self.name, effects);
            }
        });
    }

    /// The connection is closed: its sessions lose what they hold and are over.
    pub(crate) fn close(&self, connection: u64) {
        self.update(|state, effects| {
            for key in state
                .sessions
                .keys(|session| session.connection == connection)
            {
                state.detach(key, effects);
                state.end(key, closed("connection"), effects);
            }
        });
    }

    /// The connection stops renewing its leases: they end at `lease_ends`, unless it resumes.
    pub(crate) fn pause(&self, connection: u64, lease_ends: Instant) {
        self.update(|state, effects| {
            for key in state
                .sessions
                .keys(|session| session.connection == connection)
            {
                if let Some(session) = state.sessions.find_mut(key) {
                    session.lease_ends = Some(lease_ends);
                }
                state.leave_idle(key);
            }
            state.find_lease_check();
            // Those that can take what the lease frees must now sleep until it ends.
            while let Some(waker) = state.next_idle() {
                effects.wake(waker);
            }
        });
    }

    /// The connection renews its leases again, those that did not end meanwhile.
    pub(crate) fn resume(&self, connection: u64) {
        self.update(|state, effects| {
            state.end_leases(Instant::now(), effects);
            for key in state
                .sessions
                .keys(|session| session.connection == connection)
            {
                if let Some(session) = state.sessions.find_mut(key) {
                    session.lease_ends = None;
                    effects.wake_all(session.waker.take());
                }
            }
            state.find_lease_check();
        });
    }

    /// Everything held, by one connection or by all, is lost to its server; the sessions go on.
    pub(crate) fn expire_leases(&self, connection: Option<u64>) {
        self.update(|state, effects| {
            let lost = |session: &Session| {
                connection.is_none_or(|connection| session.connection == connection)
            };
            for key in state.sessions.keys(lost) {
                state.lose(key, effects);
            }
            state.wake_waiting(effects);
        });
    }

    /// The broker forgets every message; subscribers stay.
    pub(crate) fn clear(&self) {
        self.update(|state, effects| {
            for key in state.sessions.keys(|_| true) {
                state.lose(key, effects);
            }
            state.ready.clear();
            state.dead.clear();
            state.wake_waiting(effects);
        });
    }

    /// Forgets what is over, and says what is left.
    pub(crate) fn inspect(&self, config: &MemoryConfig) -> ServiceStats {
        self.update(|state, effects| {
            state.end_leases(Instant::now(), effects);
            state.forget_expired(config);
            ServiceStats {
                queued: state.ready.len(),
                held: state.held.len(),
                dead: state.dead.len(),
                subscribers: state
                    .sessions
                    .iter()
                    .filter(|(_, session)| session.is_live())
                    .count(),
            }
        })
    }

    /// True if forgetting the whole queue loses nothing.
    pub(crate) fn is_unused(&self, config: &MemoryConfig) -> bool {
        let mut state = lock(&self.state);
        state.forget_expired(config);
        state.ready.is_empty()
            && state.dead.is_empty()
            && state.held.len() == 0
            && state.sessions.len() == 0
    }

    pub(crate) fn dead_letters(&self) -> Vec<DeadLetter> {
        lock(&self.state).dead.iter().cloned().collect()
    }

    /// Changes the state, then, with the lock released, wakes and cancels what the change concerns.
    fn update<T>(&self, change: impl FnOnce(&mut State, &mut Effects) -> T) -> T {
        let mut effects = Effects::default();
        let result = change(&mut lock(&self.state), &mut effects);
        effects.run();
        result
    }
}

impl State {
    fn claim(
        &mut self,
        key: Key,
        waker: &Waker,
        taken: &mut Vec<Taken>,
        effects: &mut Effects,
    ) -> Claim {
        if self.lease_check.is_some() {
            self.end_leases(Instant::now(), effects);
        }
        let Some(session) = self.sessions.find_mut(key) else {
            return Claim::Over(closed("subscription"));
        };
        if let Presence::Over(error) = &session.presence {
            return Claim::Over(error.clone());
        }
        let free = session.options.prefetch.saturating_sub(session.held);
        if free == 0 || !session.takes() {
            session.wait(waker);
            return Claim::Wait(None);
        }
        while taken.len() < free {
            let Some(queued) = self.ready.pop_front() else {
                break;
            };
            if !queued.is_here() {
                self.ready.push_front(queued);
                break;
            }
            let Queued {
                request,
                attempt,
                expires,
                ..
            } = &queued;
            let (request, attempt, expires) = (request.clone(), *attempt, *expires);
            let key = self.held.insert(Held {
                queued,
                session: key,
            });
            taken.push(Taken {
                request,
                attempt,
                expires,
                key,
            });
        }
        if taken.is_empty() {
            session.wait(waker);
            if !mem::replace(&mut session.idle, true) {
                self.idle.push_back(key);
            }
            let arrives = self.ready.front().and_then(|queued| queued.arrives);
            return Claim::Wait(arrives.into_iter().chain(self.lease_check).min());
        }
        session.held += taken.len();
        session.waker = None;
        let lease = session.lease.clone();
        self.leave_idle(key);
        self.pass_on(effects);
        Claim::Taken(lease)
    }

    /// If requests wait, wakes the next session that may take them. Each claim that leaves some does so, which is why
    /// one wake-up is enough for any number of requests.
    fn pass_on(&mut self, effects: &mut Effects) {
        if !self.ready.is_empty() {
            effects.wake_all(self.next_idle());
        }
    }

    fn next_idle(&mut self) -> Option<Waker> {
        while let Some(key) = self.idle.pop_front() {
            if let Some(session) = self.sessions.find_mut(key) {
                session.idle = false;
                if let Some(waker) = session.waker.take() {
                    return Some(waker);
                }
            }
        }
        None
    }

    fn leave_idle(&mut self, key: Key) {
        if let Some(session) = self.sessions.find_mut(key)
            && mem::take(&mut session.idle)
        {
            self.idle.retain(|other| *other != key);
        }
    }

    /// A delivery left the session's hands.
    fn free_hand(&mut self, key: Key, effects: &mut Effects) {
        let Some(session) = self.sessions.find_mut(key) else {
            return;
        };
        session.held = session.held.saturating_sub(1);
        if session.abandoned {
            if session.held == 0 {
                self.sessions.remove(key);
            }
            return;
        }
        if session.idle || session.waker.is_none() || !session.takes() {
            return;
        }
        // It waits with hands that were full. With nothing to take, it need not run to learn that it may take again.
        if self.ready.is_empty() && self.lease_check.is_none() {
            session.idle = true;
            self.idle.push_back(key);
        } else {
            effects.wake_all(session.waker.take());
        }
    }

    /// Moves a held request to the head, and says who held it.
    fn put_back(&mut self, key: Key, how: Return) -> Option<Key> {
        let Held {
            mut queued,
            session,
        } = self.held.remove(key)?;
        if how == Return::Counted {
            queued.attempt = queued.attempt.saturating_add(1);
        }
        queued.arrives = None;
        self.ready.push_front(queued);
        Some(session)
    }

    /// The session's lease is lost with all that it holds. A later one has its own.
    fn lose(&mut self, key: Key, effects: &mut Effects) {
        for held in self.held.keys(|held| held.session == key).into_iter().rev() {
            self.put_back(held, Return::Counted);
        }
        let Some(session) = self.sessions.find_mut(key) else {
            return;
        };
        session.held = 0;
        effects.leases.push(mem::take(&mut session.lease));
        if session.abandoned {
            self.sessions.remove(key);
        }
    }

    fn detach(&mut self, key: Key, effects: &mut Effects) {
        self.leave_idle(key);
        if let Some(session) = self.sessions.find_mut(key)
            && session.is_live()
        {
            session.presence = Presence::Away;
        }
        self.lose(key, effects);
        self.pass_on(effects);
    }

    fn rejoin(&mut self, key: Key, name: &ServiceName, effects: &mut Effects) {
        let Some(mode) = self
            .sessions
            .find_mut(key)
            .map(|session| session.options.mode)
        else {
            return;
        };
        let excluded = self.is_excluded(mode);
        let Some(session) = self.sessions.find_mut(key) else {
            return;
        };
        session.presence = if excluded {
            Presence::Over(already_owned(name))
        } else {
            Presence::Live
        };
        effects.wake_all(session.waker.take());
    }

    fn end(&mut self, key: Key, error: Error, effects: &mut Effects) {
        self.leave_idle(key);
        if let Some(session) = self.sessions.find_mut(key) {
            if !matches!(session.presence, Presence::Over(_)) {
                session.presence = Presence::Over(error);
            }
            effects.wake_all(session.waker.take());
        }
        self.pass_on(effects);
    }

    /// Ends the leases of sessions that have been paused for too long.
    fn end_leases(&mut self, now: Instant, effects: &mut Effects) {
        if self.lease_check.is_none_or(|check| now < check) {
            return;
        }
        let is_over = |session: &Session| {
            (session.is_live() || session.held > 0)
                && session.lease_ends.is_some_and(|ends| ends <= now)
        };
        for key in self.sessions.keys(is_over) {
            self.detach(key, effects);
        }
        self.find_lease_check();
    }

    fn find_lease_check(&mut self) {
        let leased = self
            .sessions
            .iter()
            .filter(|(_, session)| session.is_live() || session.held > 0);
        self.lease_check = leased.filter_map(|(_, session)| session.lease_ends).min();
    }

    fn is_served(&self, now: Instant) -> bool {
        let serves = |session: &Session| {
            session.is_live() && session.lease_ends.is_none_or(|ends| now < ends)
        };
        self.sessions.iter().any(|(_, session)| serves(session))
    }

    fn is_excluded(&self, mode: SubscribeMode) -> bool {
        self.sessions
            .iter()
            .any(|(_, session)| session.excludes(mode))
    }

    fn wake_waiting(&mut self, effects: &mut Effects) {
        for key in self.sessions.keys(|session| session.waker.is_some()) {
            self.leave_idle(key);
            effects.wake_all(
                self.sessions
                    .find_mut(key)
                    .and_then(|session| session.waker.take()),
            );
        }
    }

    fn forget_expired(&mut self, config: &MemoryConfig) {
        let now = Instant::now();
        self.ready
            .retain(|queued| !queued.is_forgotten(now, config));
    }
}

impl Queued {
    fn is_here(&self) -> bool {
        self.arrives.is_none_or(|arrives| arrives <= Instant::now())
    }

    /// True once it has been expired for so long that no server need report it.
    fn is_forgotten(&self, now: Instant, config: &MemoryConfig) -> bool {
        self.expires
            .is_some_and(|expires| now.saturating_duration_since(expires) > config.keep_expired)
    }
}

/// What is done once the lock is released: a waker or a cancelled token may run code that takes it.
#[derive(Default)]
struct Effects {
    waker: Option<Waker>,
    wakers: Vec<Waker>,
    leases: Vec<CancellationToken>,
}

impl Effects {
    fn wake(&mut self, waker: Waker) {
        if self.waker.is_none() {
            self.waker = Some(waker);
        } else {
            self.wakers.push(waker);
        }
    }

    fn wake_all(&mut self, wakers: impl IntoIterator<Item = Waker>) {
        for waker in wakers {
            self.wake(waker);
        }
    }

    fn run(self) {
        // First, so that a server learns of its loss before anybody else can have the request.
        for lease in self.leases {
            lease.cancel();
        }
        for waker in self.waker.into_iter().chain(self.wakers) {
            waker.wake();
        }
    }
}

fn already_owned(service: &ServiceName) -> Error {
    Error::not_executed(
        ErrorKind::AlreadyOwned,
        format!("another subscriber of {service} excludes this one"),
    )
}

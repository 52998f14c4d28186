//! One service's requests: those that wait, those in some server's hands, and the dead.

mod last_inbox;
mod state;

use std::sync::{Arc, Mutex};
use std::task::Waker;

use antiphon_core::transport::{FlaggedToken, SubscribeMode, SubscribeOptions};
use antiphon_core::{CorrelationId, Error, ErrorKind, Reply, Request, ServiceName};
use tokio::time::Instant;

use self::state::{Effects, Held, State, already_owned};
use crate::broker::{DeadLetter, ServiceStats};
use crate::config::MemoryConfig;
use crate::hub::Hub;
use crate::session::Session;
use crate::sweeper::Sweeper;
use crate::table::Key;
use crate::{closed, lock};

/// One short lock guards it all, so that a request is always in exactly one place. Nothing is woken, cancelled or
/// awaited under it.
#[derive(Debug)]
pub(crate) struct Queue {
    name: ServiceName,
    sweeper: Arc<Sweeper>,
    state: Mutex<State>,
}

/// A request that nobody has.
#[derive(Debug)]
pub(crate) struct Queued {
    pub(crate) request: Arc<Request>,
    pub(crate) attempt: u32,
    pub(crate) expires: Option<Instant>,
    /// When it has travelled to here, if a delay is injected.
    pub(crate) arrives: Option<Instant>,
}

/// A copy of a held request for its server.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) request: Arc<Request>,
    pub(crate) attempt: u32,
    pub(crate) expires: Option<Instant>,
    pub(crate) key: Key,
}

/// What came of asking for requests.
#[derive(Debug)]
pub(crate) enum Claim {
    /// Some were taken, under this lease.
    Taken(Arc<FlaggedToken>),
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
    pub(crate) fn new(name: ServiceName, sweeper: Arc<Sweeper>) -> Self {
        Self {
            name,
            sweeper,
            state: Mutex::new(State::new()),
        }
    }

    /// Adds a request if it can be committed, and says whom to wake for it.
    pub(crate) fn push(
        &self,
        queued: Queued,
        expect_responder: bool,
        commit: impl FnOnce() -> bool,
        config: &MemoryConfig,
    ) -> Result<Option<Waker>, Error> {
        let mut state = lock(&self.state);
        if expect_responder && !state.is_served(Instant::now()) {
            return Err(Error::not_executed(
                ErrorKind::NoResponder,
                format!("nobody serves {}", self.name),
            ));
        }
        if state.len() >= config.max_queued {
            state.forget_oldest(config);
        }
        if state.len() >= config.max_queued {
            return Err(Error::not_executed(
                ErrorKind::Overloaded,
                format!("the queue of {} is full", self.name),
            ));
        }
        if !commit() {
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
            if options.mode == SubscribeMode::TakeOver {
                state.fence_off_owner(&self.name, effects);
            }
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
            state.stop_waiting(key);
            if let Some(session) = state.sessions.find_mut(key) {
                session.waker = None;
            }
            // It may have been woken for a request, or be the one that sleeps until it arrives: somebody else must.
            state.pass_on(effects);
        });
    }

    /// Ends a held delivery for good, and delivers the reply; gives it back if it is held no more.
    pub(crate) fn settle(
        &self,
        key: Key,
        reply: Option<Arc<Reply>>,
        hub: &Hub,
    ) -> Result<(), Option<Arc<Reply>>> {
        let (request, server, delivered, is_stale) = {
            let mut guard = lock(&self.state);
            let state = &mut *guard;
            let Some(Held { queued, session }) = state.held.remove(key) else {
                return Err(reply);
            };
            let delivered = match (&queued.request.reply_to, reply) {
                (Some(to), Some(reply)) if hub.faults.are_none() => {
                    state.last_inbox.deliver(to, reply)
                }
                (Some(_), Some(reply)) => Err(reply),
                (None, _) | (_, None) => Ok(None),
            };
            let is_stale = state.last_inbox.is_stale();
            (
                queued.request,
                state.free_hand(session),
                delivered,
                is_stale,
            )
        };
        if let Some(server) = server {
            server.wake();
        }
        match (delivered, &request.reply_to) {
            (Ok(Some(client)), _) => client.wake(),
            (Err(reply), Some(to)) => {
                if is_stale && let Some(letters) = hub.inbox(to) {
                    lock(&self.state).last_inbox.remember(to.clone(), letters);
                }
                hub.reply(to, reply);
            }
            (Ok(None), _) | (Err(_), None) => {}
        }
        Ok(())
    }

    /// Moves a held delivery to the dead letters, and gives its request; `None` if it is held no more.
    pub(crate) fn bury(
        &self,
        key: Key,
        reason: String,
        config: &MemoryConfig,
    ) -> Option<Arc<Request>> {
        self.update(|state, effects| {
            let Held { queued, session } = state.held.remove(key)?;
            state.dead.push_back(DeadLetter {
                request: Request::clone(&queued.request),
                attempt: queued.attempt,
                reason,
            });
            while state.dead.len() > config.max_dead {
                state.dead.pop_front();
            }
            effects.wake_all(state.free_hand(session));
            Some(queued.request)
        })
    }

    /// Puts a held delivery back; `None` if it is held no more.
    pub(crate) fn give_back(&self, key: Key, how: Return) -> Option<()> {
        self.update(|state, effects| {
            let session = state.put_back(key, how, effects)?;
            effects.wake_all(state.free_hand(session));
            state.pass_on(effects);
            Some(())
        })
    }

    /// Takes out a request that nobody has. The latest are looked at first: a caller that gives up mostly does so soon.
    pub(crate) fn withdraw(&self, id: &CorrelationId) -> bool {
        let mut state = lock(&self.state);
        let found = state
            .ready
            .iter()
            .rposition(|queued| queued.request.id == *id);
        found.and_then(|index| state.ready.remove(index)).is_some()
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
                state.stop_waiting(key);
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
            state.suspects.clear();
            state.dead.clear();
            state.wake_waiting(effects);
        });
    }

    /// What there is, leases that are over having ended.
    pub(crate) fn inspect(&self) -> ServiceStats {
        self.update(|state, effects| {
            state.end_leases(Instant::now(), effects);
            ServiceStats {
                queued: state.len(),
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

    /// Forgets what expired long ago, and says when the first of the rest expires.
    pub(crate) fn forget_expired(&self, config: &MemoryConfig) -> Option<Instant> {
        self.update(|state, effects| {
            let next = state.forget_expired(config);
            state.pass_on(effects);
            next
        })
    }

    /// True if forgetting the whole queue loses nothing.
    pub(crate) fn is_unused(&self) -> bool {
        let state = lock(&self.state);
        // What is held has a session.
        state.sessions.len() == 0 && state.dead.is_empty() && state.is_empty()
    }

    pub(crate) fn dead_letters(&self) -> Vec<DeadLetter> {
        lock(&self.state).dead.iter().cloned().collect()
    }

    /// Changes the state, then, with the lock released, wakes and cancels what the change concerns.
    fn update<T>(&self, change: impl FnOnce(&mut State, &mut Effects) -> T) -> T {
        let mut effects = Effects::default();
        let result = change(&mut lock(&self.state), &mut effects);
        if let Some(expires) = effects.run() {
            self.sweeper.watch(expires);
        }
        result
    }
}

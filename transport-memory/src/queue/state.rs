//! What a queue holds, and how it changes under the queue's lock.

use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use std::task::Waker;

use antiphon_core::transport::{FlaggedToken, SubscribeMode};
use antiphon_core::{Error, ErrorKind, ServiceName};
use tokio::time::Instant;

use super::last_inbox::LastInbox;
use super::{Claim, Queued, Return, Taken};
use crate::broker::DeadLetter;
use crate::config::MemoryConfig;
use crate::session::{Presence, Session};
use crate::table::{Key, Table};
use crate::{BATCH_MAX, closed};

#[derive(Debug)]
pub(super) struct State {
    pub(super) ready: VecDeque<Queued>,
    /// Requests that came back counted: one of them may be what kills its servers. So each is given to a session with
    /// empty hands, and alone, lest it cost its neighbours their attempts; and before all others.
    pub(super) suspects: VecDeque<Queued>,
    /// The busy session that takes nothing until its hands are empty for a suspect, where no idle one is found.
    pub(super) draining: Option<Key>,
    pub(super) held: Table<Held>,
    pub(super) sessions: Table<Session>,
    /// Sessions with free hands that wait for a request, the longest waiting first.
    pub(super) idle: VecDeque<Key>,
    pub(super) dead: VecDeque<DeadLetter>,
    pub(super) last_inbox: LastInbox,
    /// The earliest end of a paused session's lease. Nobody sleeps for it but those that could take what it frees;
    /// everybody else looks when they come by.
    pub(super) lease_check: Option<Instant>,
}

/// A request in a session's hands.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) queued: Queued,
    pub(super) session: Key,
}

impl State {
    pub(super) fn new() -> Self {
        Self {
            ready: VecDeque::new(),
            suspects: VecDeque::new(),
            draining: None,
            held: Table::new(),
            sessions: Table::new(),
            idle: VecDeque::new(),
            dead: VecDeque::new(),
            last_inbox: LastInbox::default(),
            lease_check: None,
        }
    }

    pub(super) fn claim(
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
        if free == 0 || session.isolated || !session.takes() {
            session.wait(waker);
            return Claim::Wait(None);
        }
        let drains = self.draining.is_none_or(|draining| draining == key);
        if drains && session.held > 0 && !self.suspects.is_empty() {
            session.wait(waker);
            self.stop_waiting(key);
            self.draining = Some(key);
            // It may have been woken for a request that it now leaves.
            self.pass_on(effects);
            return Claim::Wait(None);
        }
        if session.held == 0
            && let Some(suspect) = self.suspects.pop_front()
        {
            session.isolated = true;
            taken.push(hold(&mut self.held, suspect, key));
        } else {
            let most = free.min(BATCH_MAX);
            while taken.len() < most && self.ready.front().is_some_and(Queued::is_here) {
                let Some(queued) = self.ready.pop_front() else {
                    break;
                };
                taken.push(hold(&mut self.held, queued, key));
            }
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
        let lease = Arc::clone(&session.lease);
        self.stop_waiting(key);
        self.pass_on(effects);
        Claim::Taken(lease)
    }

    /// If requests wait, wakes the next session that may take them. Each claim that leaves some does so, which is why
    /// one wake-up is enough for any number of requests.
    pub(super) fn pass_on(&mut self, effects: &mut Effects) {
        if !self.suspects.is_empty() {
            let sessions = &mut self.sessions;
            let mut idle = self.idle.iter();
            let empty = idle.position(|key| {
                sessions
                    .find_mut(*key)
                    .is_some_and(|session| session.held == 0)
            });
            if let Some(key) = empty.and_then(|empty| self.idle.remove(empty)) {
                self.idle.push_front(key);
            }
        }
        if !self.is_empty() {
            effects.wake_all(self.next_idle());
        }
        // Nothing is left to drain for: it may take others again.
        if self.suspects.is_empty()
            && let Some(key) = self.draining.take()
        {
            effects.wake_all(
                self.sessions
                    .find_mut(key)
                    .and_then(|session| session.waker.take()),
            );
        }
    }

    pub(super) fn next_idle(&mut self) -> Option<Waker> {
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

    /// It is no longer one to be woken, nor one to be waited for.
    pub(super) fn stop_waiting(&mut self, key: Key) {
        self.draining.take_if(|draining| *draining == key);
        if let Some(session) = self.sessions.find_mut(key)
            && mem::take(&mut session.idle)
        {
            self.idle.retain(|other| *other != key);
        }
    }

    /// A delivery left the session's hands; says whom to wake for it.
    pub(super) fn free_hand(&mut self, key: Key) -> Option<Waker> {
        let session = self.sessions.find_mut(key)?;
        session.held = session.held.saturating_sub(1);
        session.isolated &= session.held > 0;
        if session.abandoned {
            if session.held == 0 {
                self.sessions.remove(key);
            }
            return None;
        }
        if session.idle || session.waker.is_none() || !session.takes() {
            return None;
        }
        if self.draining == Some(key) && session.held > 0 {
            return None;
        }
        // It waits with hands that were full. With nothing to take, it need not run to learn that it may take again.
        if self.ready.is_empty() && self.suspects.is_empty() && self.lease_check.is_none() {
            session.idle = true;
            self.idle.push_back(key);
            None
        } else {
            session.waker.take()
        }
    }

    /// Takes a request out of a session's hands to be taken again, and says whose they were.
    pub(super) fn put_back(&mut self, key: Key, how: Return, effects: &mut Effects) -> Option<Key> {
        let Held {
            mut queued,
            session,
        } = self.held.remove(key)?;
        queued.arrives = None;
        effects.waits_again(queued.expires);
        match how {
            Return::Counted => {
                queued.attempt = queued.attempt.saturating_add(1);
                self.suspects.push_back(queued);
            }
            Return::Uncounted if queued.attempt > 1 => self.suspects.push_front(queued),
            Return::Uncounted => self.ready.push_front(queued),
        }
        Some(session)
    }

    /// The session's lease is lost with all that it holds. A later one has its own.
    pub(super) fn lose(&mut self, key: Key, effects: &mut Effects) {
        for held in self.held.keys(|held| held.session == key) {
            self.put_back(held, Return::Counted, effects);
        }
        let Some(session) = self.sessions.find_mut(key) else {
            return;
        };
        session.held = 0;
        session.isolated = false;
        effects.leases.push(mem::take(&mut session.lease));
        if session.abandoned {
            self.sessions.remove(key);
        }
    }

    pub(super) fn detach(&mut self, key: Key, effects: &mut Effects) {
        self.stop_waiting(key);
        if let Some(session) = self.sessions.find_mut(key)
            && session.is_live()
        {
            session.presence = Presence::Away;
        }
        self.lose(key, effects);
        self.pass_on(effects);
    }

    pub(super) fn rejoin(&mut self, key: Key, name: &ServiceName, effects: &mut Effects) {
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

    /// Ends the exclusive session, if there is one. What it held goes to the next.
    pub(super) fn fence_off_owner(&mut self, name: &ServiceName, effects: &mut Effects) {
        let owns = |session: &Session| {
            (session.is_live() || session.held > 0) && session.options.mode.is_exclusive()
        };
        for key in self.sessions.keys(owns) {
            self.end(key, already_owned(name), effects);
            self.lose(key, effects);
        }
    }

    pub(super) fn end(&mut self, key: Key, error: Error, effects: &mut Effects) {
        self.stop_waiting(key);
        if let Some(session) = self.sessions.find_mut(key) {
            if !matches!(session.presence, Presence::Over(_)) {
                session.presence = Presence::Over(error);
            }
            effects.wake_all(session.waker.take());
        }
        self.pass_on(effects);
    }

    /// Ends the leases of sessions that have been paused for too long.
    pub(super) fn end_leases(&mut self, now: Instant, effects: &mut Effects) {
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

    pub(super) fn find_lease_check(&mut self) {
        let leased = self
            .sessions
            .iter()
            .filter(|(_, session)| session.is_live() || session.held > 0);
        self.lease_check = leased.filter_map(|(_, session)| session.lease_ends).min();
    }

    /// How many requests nobody has.
    pub(super) fn len(&self) -> usize {
        self.ready.len() + self.suspects.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.suspects.is_empty()
    }

    pub(super) fn is_served(&self, now: Instant) -> bool {
        let serves = |session: &Session| {
            session.is_live() && session.lease_ends.is_none_or(|ends| now < ends)
        };
        self.sessions.iter().any(|(_, session)| serves(session))
    }

    pub(super) fn is_excluded(&self, mode: SubscribeMode) -> bool {
        self.sessions
            .iter()
            .any(|(_, session)| session.excludes(mode))
    }

    pub(super) fn wake_waiting(&mut self, effects: &mut Effects) {
        for key in self.sessions.keys(|session| session.waker.is_some()) {
            self.stop_waiting(key);
            effects.wake_all(
                self.sessions
                    .find_mut(key)
                    .and_then(|session| session.waker.take()),
            );
        }
    }

    /// Forgets what expired long ago, as long as the oldest requests have.
    pub(super) fn forget_oldest(&mut self, config: &MemoryConfig) {
        let now = Instant::now();
        let is_forgotten = |front: &Queued| front.is_forgotten(now, config);
        while self.ready.front().is_some_and(is_forgotten) {
            self.ready.pop_front();
        }
    }

    /// Says when the first of those that are left expires.
    pub(super) fn forget_expired(&mut self, config: &MemoryConfig) -> Option<Instant> {
        let now = Instant::now();
        self.ready
            .retain(|queued| !queued.is_forgotten(now, config));
        self.suspects
            .retain(|queued| !queued.is_forgotten(now, config));
        let left = self.ready.iter().chain(&self.suspects);
        left.filter_map(|queued| queued.expires).min()
    }
}

fn hold(held: &mut Table<Held>, queued: Queued, session: Key) -> Taken {
    let (request, attempt, expires) = (Arc::clone(&queued.request), queued.attempt, queued.expires);
    let key = held.insert(Held { queued, session });
    Taken {
        request,
        attempt,
        expires,
        key,
    }
}

impl Queued {
    pub(super) fn is_here(&self) -> bool {
        self.arrives.is_none_or(|arrives| arrives <= Instant::now())
    }

    /// True once it has been expired for so long that no server need report it.
    pub(super) fn is_forgotten(&self, now: Instant, config: &MemoryConfig) -> bool {
        self.expires
            .is_some_and(|expires| expires <= now && now - expires >= config.keep_expired)
    }
}

/// What is done once the lock is released: a waker or a cancelled token may run code that takes it.
#[derive(Default)]
pub(super) struct Effects {
    waker: Option<Waker>,
    wakers: Vec<Waker>,
    leases: Vec<Arc<FlaggedToken>>,
    /// When the first of the requests that came back expires.
    expires: Option<Instant>,
}

impl Effects {
    pub(super) fn wake(&mut self, waker: Waker) {
        if self.waker.is_none() {
            self.waker = Some(waker);
        } else {
            self.wakers.push(waker);
        }
    }

    pub(super) fn wake_all(&mut self, wakers: impl IntoIterator<Item = Waker>) {
        for waker in wakers {
            self.wake(waker);
        }
    }

    pub(super) fn waits_again(&mut self, expires: Option<Instant>) {
        self.expires = self.expires.into_iter().chain(expires).min();
    }

    /// Says when the first of the requests that came back expires.
    pub(super) fn run(self) -> Option<Instant> {
        // First, so that a server learns of its loss before anybody else can have the request.
        for lease in self.leases {
            lease.cancel();
        }
        for waker in self.waker.into_iter().chain(self.wakers) {
            waker.wake();
        }
        self.expires
    }
}

pub(super) fn already_owned(service: &ServiceName) -> Error {
    Error::not_executed(
        ErrorKind::AlreadyOwned,
        format!("another subscriber of {service} excludes this one"),
    )
}

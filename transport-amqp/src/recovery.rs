//! Who has come back after a lost connection, and the state that users see.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use antiphon_core::ConnectionState;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::link::{Link, LinkState};
use crate::press::Press;

/// After this time a connection counts as restored even if somebody has not come back on it: one service that
/// cannot be subscribed again must not hold up the others.
const RESTORE_TIMEOUT: Duration = Duration::from_secs(2);

/// All inboxes and subscriptions, and the life of the consuming connection that each was last ready on.
#[derive(Debug)]
pub(crate) struct Members {
    ready: Mutex<HashMap<u64, (Role, u64)>>,
    changed: watch::Sender<u64>,
}

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Nothing is sent until it is back.
    Inbox,
    /// What is sent does not depend on it.
    Subscription,
}

/// One inbox or subscription. It is no longer waited for when this is dropped.
#[derive(Debug)]
pub(crate) struct Member {
    id: u64,
    role: Role,
    members: Arc<Members>,
}

impl Members {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            ready: Mutex::default(),
            changed: watch::Sender::new(0),
        })
    }

    /// Enters somebody who is ready on the given life of the connection.
    pub(crate) fn enter(self: &Arc<Self>, role: Role, session: u64) -> Member {
        let mut id = 0;
        self.changed.send_modify(|next| {
            id = *next;
            *next += 1;
        });
        self.lock().insert(id, (role, session));
        Member {
            id,
            role,
            members: Arc::clone(self),
        }
    }

    /// Whether all inboxes, and all of both, are back.
    fn ready(&self, session: u64) -> (bool, bool) {
        let ready = self.lock();
        let missing = |role| {
            ready
                .values()
                .any(|&(other, at)| other == role && at < session)
        };
        let inboxes = !missing(Role::Inbox);
        (inboxes, inboxes && !missing(Role::Subscription))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, (Role, u64)>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Member {
    /// Says that it is back, on the given life of the connection.
    pub(crate) fn ready(&self, session: u64) {
        let entry = (self.role, session);
        self.members.lock().insert(self.id, entry);
        self.members.changed.send_modify(|next| *next += 1);
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.members.lock().remove(&self.id);
        self.members.changed.send_modify(|next| *next += 1);
    }
}

/// Keeps the state that users see, and the gate of what is sent, until the consuming connection is closed.
///
/// The gate is shut while inboxes are being restored: a request that went out then would carry an address that may be given
/// up a moment later, and its call would end although it could simply have been sent later.
pub(crate) async fn keep_state(
    mut publish: Link<Press>,
    mut consume: Link,
    members: Arc<Members>,
    state: watch::Sender<ConnectionState>,
    gate: watch::Sender<bool>,
) {
    let mut changed = members.changed.subscribe();
    let mut patience = (0, Instant::now());
    loop {
        let current = consume.state.borrow_and_update().clone();
        let (open, restored, deadline) = match &current {
            LinkState::Up(session) => {
                if patience.0 != session.number {
                    patience = (session.number, Instant::now() + RESTORE_TIMEOUT);
                }
                let over = patience.1 <= Instant::now();
                let (inboxes, all) = members.ready(session.number);
                let restored = all || over;
                (inboxes || over, restored, (!restored).then_some(patience.1))
            }
            LinkState::Down(_) | LinkState::Closed => (false, false, None),
        };
        gate.send_if_modified(|old| std::mem::replace(old, open) != open);
        let new = describe(
            &current,
            &publish.state.borrow_and_update(),
            publish.blocked.borrow_and_update().as_ref(),
            restored,
        );
        let closed = new == ConnectionState::Closed;
        state.send_if_modified(|old| {
            let modified = *old != new;
            *old = new;
            modified
        });
        if closed {
            return;
        }
        tokio::select! {
            _ = consume.state.changed() => {}
            _ = publish.state.changed() => {}
            Ok(()) = publish.blocked.changed() => {}
            _ = changed.changed() => {}
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {}
        }
    }
}

fn describe(
    consume: &LinkState,
    publish: &LinkState<Press>,
    blocked: Option<&Arc<str>>,
    restored: bool,
) -> ConnectionState {
    match (consume, publish) {
        (LinkState::Closed, _) | (_, LinkState::Closed) => ConnectionState::Closed,
        (LinkState::Down(reason), _) | (_, LinkState::Down(reason)) => {
            ConnectionState::Disconnected {
                reason: Arc::clone(reason),
            }
        }
        _ if !restored => ConnectionState::Disconnected {
            reason: "inboxes and subscriptions are being restored".into(),
        },
        _ => match blocked {
            Some(reason) => ConnectionState::Blocked {
                reason: Arc::clone(reason),
            },
            None => ConnectionState::Connected,
        },
    }
}

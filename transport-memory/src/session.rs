//! One subscription as its queue sees it.

use std::sync::Arc;
use std::task::Waker;

use antiphon_core::Error;
use antiphon_core::transport::{FlaggedToken, SubscribeMode, SubscribeOptions};
use tokio::time::Instant;

/// Lives as long as its subscription, or until all that it held is settled, whichever is later.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) connection: u64,
    pub(crate) options: SubscribeOptions,
    pub(crate) presence: Presence,
    /// How many deliveries are in its hands.
    pub(crate) held: usize,
    /// What it holds is one suspect, beside which it takes nothing.
    pub(crate) isolated: bool,
    /// Set while a `recv` waits.
    pub(crate) waker: Option<Waker>,
    /// In the queue's list of those that a new request may wake.
    pub(crate) idle: bool,
    /// The lease under which all that it holds is held.
    pub(crate) lease: Arc<FlaggedToken>,
    /// When the lease ends, while the connection is paused and cannot renew it.
    pub(crate) lease_ends: Option<Instant>,
    /// The subscription was dropped; nobody will ask again.
    pub(crate) abandoned: bool,
}

/// Whether a session counts as a subscriber.
#[derive(Debug)]
pub(crate) enum Presence {
    /// It does.
    Live,
    /// Its connection is cut, or was paused for too long; it comes back with the connection.
    Away,
    /// It is over for good.
    Over(Error),
}

impl Session {
    pub(crate) fn new(connection: u64, options: SubscribeOptions) -> Self {
        Self {
            connection,
            options,
            presence: Presence::Live,
            held: 0,
            isolated: false,
            waker: None,
            idle: false,
            lease: Arc::default(),
            lease_ends: None,
            abandoned: false,
        }
    }

    pub(crate) fn is_live(&self) -> bool {
        matches!(self.presence, Presence::Live)
    }

    pub(crate) fn is_away(&self) -> bool {
        matches!(self.presence, Presence::Away)
    }

    /// True if it may be given requests now.
    pub(crate) fn takes(&self) -> bool {
        self.is_live() && self.lease_ends.is_none()
    }

    /// True if it and one that asks for `mode` cannot serve together: also one that was stopped, while its handlers run.
    pub(crate) fn excludes(&self, mode: SubscribeMode) -> bool {
        (self.is_live() || self.held > 0)
            && (self.options.mode.is_exclusive() || mode.is_exclusive())
    }

    pub(crate) fn wait(&mut self, waker: &Waker) {
        match &mut self.waker {
            Some(present) => present.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
    }
}

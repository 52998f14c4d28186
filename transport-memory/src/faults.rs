//! Fault injection: what a broker, a network and a process do to each other, on request.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::broker::MemoryBroker;
use crate::lock;
use crate::transport::MemoryTransport;

/// Faults of one connection. They happen at once, and last until they are undone.
impl MemoryTransport {
    /// Cuts the connection, as a network does. Its state is `Disconnected`; sends wait; its subscriptions are no
    /// subscribers and own nothing; what they held goes to other servers, with the attempt counted, and can be neither
    /// settled nor replied to by this one. Its inboxes keep what arrives meanwhile.
    pub fn cut(&self) {
        self.connection().cut();
    }

    /// Undoes [`cut`](Self::cut). Its subscriptions are live again when this returns, except that one which an
    /// exclusive owner now stands against is over.
    pub fn restore(&self) {
        self.connection().restore();
    }

    /// Pauses the connection, as a process that is stopped or stalled: nothing leaves it or reaches it, and its lease is
    /// not renewed. For as long as [`lease`](crate::MemoryConfig::lease) it keeps its deliveries and its ownership;
    /// then they are lost as in [`cut`](Self::cut). It does not notice: its state stays as it is.
    pub fn pause(&self) {
        self.connection().pause();
    }

    /// Undoes [`pause`](Self::pause). Deliveries that were settled meanwhile are settled now, or have lost their lease.
    pub fn resume(&self) {
        self.connection().resume();
    }

    /// Ends the leases of all that it holds: its deliveries go back with the attempt counted, and cannot be settled.
    /// It remains a subscriber.
    pub fn expire_leases(&self) {
        let id = self.connection().id();
        self.connection()
            .hub()
            .for_each_queue(|queue| queue.expire_leases(Some(id)));
    }

    /// Lets its requests wait, as a broker in a memory alarm does. Its state is `Blocked`; replies pass.
    pub fn block(&self) {
        self.connection().set_blocked(true);
    }

    /// Undoes [`block`](Self::block).
    pub fn unblock(&self) {
        self.connection().set_blocked(false);
    }
}

/// Faults of the whole broker.
impl MemoryBroker {
    /// Ends every lease; see [`MemoryTransport::expire_leases`].
    pub fn expire_leases(&self) {
        self.hub().for_each_queue(|queue| queue.expire_leases(None));
    }

    /// Loses every message and every dead letter, as a broker that restarts without a disk. Inboxes get a new address
    /// and say `Lost`; subscriptions stay.
    pub fn lose_everything(&self) {
        self.hub().clear();
    }

    /// [Cuts](MemoryTransport::cut) every connection that there is.
    pub fn cut_all(&self) {
        for connection in self.hub().connections(|_| ()) {
            connection.cut();
        }
    }

    /// [Restores](MemoryTransport::restore) every connection.
    pub fn restore_all(&self) {
        for connection in self.hub().connections(|_| ()) {
            connection.restore();
        }
    }

    /// [Blocks](MemoryTransport::block) every connection, later ones too.
    pub fn block(&self) {
        self.set_blocked(true);
    }

    /// Undoes [`block`](Self::block), on single connections too.
    pub fn unblock(&self) {
        self.set_blocked(false);
    }

    /// Delivers each of the next `count` replies twice, in addition to those that were asked for before.
    pub fn duplicate_next_replies(&self, count: usize) {
        self.hub()
            .faults
            .update(|settings| settings.duplicate = settings.duplicate.saturating_add(count));
    }

    /// Loses the next `count` replies, in addition to those that were asked for before; their requests are settled. It
    /// goes before duplication.
    pub fn drop_next_replies(&self, count: usize) {
        self.hub()
            .faults
            .update(|settings| settings.drop = settings.drop.saturating_add(count));
    }

    /// From now on every request and every reply travels for so long, so that a call takes twice that at least. Order
    /// is kept. Zero, the default, undoes it for what is sent afterwards.
    pub fn delay(&self, delay: Duration) {
        self.hub().faults.update(|settings| settings.delay = delay);
    }

    fn set_blocked(&self, blocked: bool) {
        let connections = self
            .hub()
            .connections(|faults| faults.blocked.store(blocked, Ordering::Release));
        for connection in connections {
            connection.set_blocked(blocked);
        }
    }
}

/// What the broker was told to do to messages.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// False while there is nothing to do, so that messages need not look at the settings.
    active: AtomicBool,
    settings: Mutex<Settings>,
    blocked: AtomicBool,
}

#[derive(Debug, Default)]
struct Settings {
    delay: Duration,
    duplicate: usize,
    drop: usize,
}

/// What happens to one reply.
#[derive(Debug)]
pub(crate) struct Fate {
    pub(crate) copies: usize,
    pub(crate) arrives: Option<Instant>,
}

impl Faults {
    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked.load(Ordering::Acquire)
    }

    /// When a message that is sent now arrives; `None` for at once.
    pub(crate) fn arrival(&self) -> Option<Instant> {
        if !self.active.load(Ordering::Acquire) {
            return None;
        }
        lock(&self.settings).arrival(Instant::now())
    }

    /// True if nothing is done to messages.
    pub(crate) fn are_none(&self) -> bool {
        !self.active.load(Ordering::Acquire)
    }

    /// What happens to the next reply; `None` for nothing special.
    pub(crate) fn reply_fate(&self) -> Option<Fate> {
        if !self.active.load(Ordering::Acquire) {
            return None;
        }
        Some(self.update(|settings| {
            let copies = if settings.drop > 0 {
                settings.drop -= 1;
                0
            } else if settings.duplicate > 0 {
                settings.duplicate -= 1;
                2
            } else {
                1
            };
            Fate {
                copies,
                arrives: settings.arrival(Instant::now()),
            }
        }))
    }

    fn update<T>(&self, update: impl FnOnce(&mut Settings) -> T) -> T {
        let mut settings = lock(&self.settings);
        let result = update(&mut settings);
        let active = !settings.delay.is_zero() || settings.duplicate > 0 || settings.drop > 0;
        self.active.store(active, Ordering::Release);
        result
    }
}

impl Settings {
    fn arrival(&self, now: Instant) -> Option<Instant> {
        if self.delay.is_zero() {
            None
        } else {
            now.checked_add(self.delay)
        }
    }
}

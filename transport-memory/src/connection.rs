//! One connection to the broker: whether anything passes, and what waits until it does.

use std::pin::pin;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::{fmt, mem};

use antiphon_core::transport::{Settle, Settled};
use antiphon_core::{ConnectionState, Error};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::hub::Hub;
use crate::queue::Queue;
use crate::subscription::MemorySettlement;
use crate::{closed, lock};

pub(crate) const CUT: u8 = 1;
pub(crate) const PAUSED: u8 = 2;
pub(crate) const BLOCKED: u8 = 4;
const CLOSED: u8 = 8;

pub(crate) struct Connection {
    id: u64,
    hub: Arc<Hub>,
    /// What stands in the way, as bits; zero when all is well.
    gate: AtomicU8,
    /// Rung after every change of the gate.
    changed: Notify,
    state: watch::Sender<ConnectionState>,
    /// Held while the gate changes with all that this entails, and while something is opened through it: else what is
    /// opened during a cut would escape it.
    transition: Mutex<()>,
    /// Deliveries that were settled while the connection was paused.
    parked: Mutex<Vec<Parked>>,
}

struct Parked {
    settlement: MemorySettlement,
    settle: Settle,
    settled: Settled,
}

impl Connection {
    pub(crate) fn new(id: u64, hub: Arc<Hub>, blocked: bool) -> Self {
        let gate = if blocked { BLOCKED } else { 0 };
        Self {
            id,
            hub,
            gate: AtomicU8::new(gate),
            changed: Notify::new(),
            state: watch::Sender::new(describe(gate)),
            transition: Mutex::new(()),
            parked: Mutex::default(),
        }
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn hub(&self) -> &Arc<Hub> {
        &self.hub
    }

    pub(crate) fn state(&self) -> watch::Receiver<ConnectionState> {
        self.state.subscribe()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.is(CLOSED)
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.is(PAUSED)
    }

    /// True if what arrives at the broker for this connection reaches it.
    pub(crate) fn is_reachable(&self) -> bool {
        !self.is(CUT | PAUSED)
    }

    /// True if none of `obstacles` stands in the way of what is sent now.
    pub(crate) fn is_open(&self, obstacles: u8) -> bool {
        !self.is(obstacles | CLOSED)
    }

    /// Waits until none of `obstacles` stands in the way. True if it had to.
    pub(crate) async fn pass(&self, obstacles: u8) -> Result<bool, Error> {
        let mut waited = false;
        loop {
            if self.is_open(obstacles) {
                return Ok(waited);
            }
            waited = true;
            let mut changed = pin!(self.changed.notified());
            // Before the second look at the gate: a change between the look and the wait would be missed.
            changed.as_mut().enable();
            if self.is_closed() {
                return Err(closed("connection"));
            }
            if self.is(obstacles) {
                changed.await;
            }
        }
    }

    /// Opens something through the connection once it stands.
    pub(crate) async fn open<T>(&self, open: impl Fn() -> Result<T, Error>) -> Result<T, Error> {
        loop {
            self.pass(CUT | PAUSED).await?;
            let _transition = lock(&self.transition);
            if !self.is(CUT | PAUSED | CLOSED) {
                return open();
            }
        }
    }

    pub(crate) fn cut(&self) {
        let _transition = lock(&self.transition);
        if !self.is(CUT | CLOSED) {
            self.change(|gate| gate | CUT);
            self.hub.for_each_queue(|queue| queue.detach(self.id));
        }
    }

    pub(crate) fn restore(&self) {
        let _transition = lock(&self.transition);
        if self.is(CUT) && !self.is(CLOSED) {
            // Subscriptions first: who sees the connection stand again finds them live.
            if !self.is(PAUSED) {
                self.rejoin();
            }
            self.change(|gate| gate & !CUT);
            self.hub.wake_inboxes(self.id);
        }
    }

    pub(crate) fn pause(&self) {
        let _transition = lock(&self.transition);
        if !self.is(PAUSED | CLOSED) {
            self.change(|gate| gate | PAUSED);
            let now = Instant::now();
            let lease_ends = now.checked_add(self.hub.config.lease).unwrap_or(now);
            self.hub
                .for_each_queue(|queue| queue.pause(self.id, lease_ends));
        }
    }

    pub(crate) fn resume(&self) {
        {
            let _transition = lock(&self.transition);
            if !self.is(PAUSED) || self.is(CLOSED) {
                return;
            }
            self.hub.for_each_queue(|queue| queue.resume(self.id));
            if !self.is(CUT) {
                self.rejoin();
            }
            self.change(|gate| gate & !PAUSED);
            self.hub.wake_inboxes(self.id);
        }
        self.unpark();
    }

    pub(crate) fn set_blocked(&self, blocked: bool) {
        let _transition = lock(&self.transition);
        if !self.is(CLOSED) {
            self.change(|gate| {
                if blocked {
                    gate | BLOCKED
                } else {
                    gate & !BLOCKED
                }
            });
        }
    }

    pub(crate) fn close(&self) {
        {
            let _transition = lock(&self.transition);
            if self.is(CLOSED) {
                return;
            }
            self.change(|gate| gate | CLOSED);
            self.hub
                .for_each_queue(|queue: &Queue| queue.close(self.id));
            self.hub.close_inboxes(self.id);
        }
        self.unpark();
    }

    /// Settles a delivery once the connection is no longer paused.
    pub(crate) fn park(&self, settlement: MemorySettlement, settle: Settle, settled: Settled) {
        lock(&self.parked).push(Parked {
            settlement,
            settle,
            settled,
        });
        // If it resumed just before the push, nobody else will look here.
        if !self.is_paused() || self.is_closed() {
            self.unpark();
        }
    }

    /// Not under a lock: who is told may use the connection.
    fn unpark(&self) {
        let parked = mem::take(&mut *lock(&self.parked));
        for Parked {
            mut settlement,
            settle,
            settled,
        } in parked
        {
            let end = settlement.settle_now(settle);
            settled.tell(end.map_err(|unsettled| unsettled.error));
        }
    }

    fn rejoin(&self) {
        self.hub.for_each_queue(|queue| queue.rejoin(self.id));
    }

    fn is(&self, obstacles: u8) -> bool {
        self.gate.load(Ordering::Acquire) & obstacles != 0
    }

    /// Only under `transition`.
    fn change(&self, change: impl FnOnce(u8) -> u8) {
        let gate = change(self.gate.load(Ordering::Acquire));
        self.gate.store(gate, Ordering::Release);
        self.changed.notify_waiters();
        let state = describe(gate);
        self.state
            .send_if_modified(|present| mem::replace(present, state.clone()) != state);
    }
}

/// A paused process does not know that it is, so that is no state.
fn describe(gate: u8) -> ConnectionState {
    if gate & CLOSED != 0 {
        ConnectionState::Closed
    } else if gate & CUT != 0 {
        ConnectionState::Disconnected {
            reason: "cut by fault injection".into(),
        }
    } else if gate & BLOCKED != 0 {
        ConnectionState::Blocked {
            reason: "blocked by fault injection".into(),
        }
    } else {
        ConnectionState::Connected
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = describe(self.gate.load(Ordering::Acquire));
        f.debug_struct("Connection")
            .field("id", &self.id)
            .field("state", &state)
            .finish_non_exhaustive()
    }
}

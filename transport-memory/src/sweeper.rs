//! Forgets requests that expired long ago and that nobody took, without being asked.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::hub::Hub;
use crate::lock;

/// There is no timer.
const NEVER: u64 = u64::MAX;

/// One timer for the whole broker, set for when the first of the waiting requests may be forgotten. While nothing
/// waits that can expire there is none, once the last one has run.
pub(crate) struct Sweeper {
    hub: Weak<Hub>,
    keep: Duration,
    /// By how much a request may outstay, so that requests which expire one by one are forgotten many at a time.
    slack: Duration,
    epoch: Instant,
    /// When the timer fires, in nanoseconds since `epoch`. Read for every request, so it is no lock.
    next: AtomicU64,
    /// Ends the timer's task when another one takes its place, and with the broker.
    timer: Mutex<Option<DropGuard>>,
}

impl Sweeper {
    pub(crate) fn new(hub: Weak<Hub>, keep: Duration) -> Arc<Self> {
        Arc::new(Self {
            hub,
            keep,
            slack: (keep / 2).clamp(Duration::from_millis(10), Duration::from_secs(15)),
            epoch: Instant::now(),
            next: AtomicU64::new(NEVER),
            timer: Mutex::default(),
        })
    }

    /// Sees to it that a waiting request is forgotten some time after it expires.
    pub(crate) fn watch(self: &Arc<Self>, expires: Instant) {
        let due = expires.checked_add(self.keep);
        if let Some(due) = due
            && self
                .nanoseconds(due)
                .saturating_add(nanoseconds(self.slack))
                < self.next.load(Ordering::Acquire)
        {
            self.set_timer(due);
        }
    }

    fn set_timer(self: &Arc<Self>, due: Instant) {
        // Outside of a runtime there are no timers; the next request from within one sets it.
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let at = self.nanoseconds(due);
        let replaced = CancellationToken::new();
        let before = {
            let mut timer = lock(&self.timer);
            // Somebody else may have set an earlier one since.
            if at >= self.next.load(Ordering::Acquire) {
                return;
            }
            self.next.store(at, Ordering::Release);
            timer.replace(replaced.clone().drop_guard())
        };
        // Not under the lock: to cancel and to spawn may drop a task, which looks at the timer too.
        drop(before);
        let set = Set {
            sweeper: Arc::downgrade(self),
            at,
        };
        runtime.spawn(async move {
            tokio::select! {
                () = replaced.cancelled() => return,
                () = sleep_until(due) => {}
            }
            if let Some(sweeper) = set.sweeper.upgrade() {
                // Before the sweep: a request that comes after it has passed must find that there is no timer.
                drop(set);
                sweeper.sweep();
            }
        });
    }

    fn sweep(self: &Arc<Self>) {
        let Some(hub) = self.hub.upgrade() else {
            return;
        };
        let Some(due) = hub
            .sweep()
            .and_then(|expires| expires.checked_add(self.keep))
        else {
            return;
        };
        self.set_timer(due.max(Instant::now() + self.slack));
    }

    fn nanoseconds(&self, instant: Instant) -> u64 {
        nanoseconds(instant.saturating_duration_since(self.epoch))
    }
}

/// A timer that is set. It is no longer when this is dropped, be it that its runtime has gone.
struct Set {
    sweeper: Weak<Sweeper>,
    at: u64,
}

impl Drop for Set {
    fn drop(&mut self) {
        if let Some(sweeper) = self.sweeper.upgrade() {
            // Fails if another one has taken its place, which is always set for another time.
            let _ =
                sweeper
                    .next
                    .compare_exchange(self.at, NEVER, Ordering::AcqRel, Ordering::Acquire);
        }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(NEVER)
}

impl fmt::Debug for Sweeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sweeper").finish_non_exhaustive()
    }
}

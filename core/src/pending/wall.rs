//! What the wall clock says at an instant.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// So long it is taken for steady. Nobody judges by it: it travels for whoever reads the messages.
const STEADY: Duration = Duration::from_secs(1);

/// A look at the wall clock, so that calls need not each take their own.
#[derive(Debug)]
pub(super) struct WallClock {
    here: Instant,
    there: SystemTime,
    steady_until: Instant,
}

impl WallClock {
    pub(super) fn read(now: Instant) -> Self {
        Self {
            here: now,
            there: SystemTime::now(),
            steady_until: now + STEADY,
        }
    }

    /// What it will say at `instant`, to the second.
    pub(super) fn at(&mut self, instant: Instant, now: Instant) -> SystemTime {
        if now > self.steady_until {
            *self = Self::read(now);
        }
        let ahead = instant.saturating_duration_since(self.here);
        self.there.checked_add(ahead).unwrap_or(self.there)
    }
}

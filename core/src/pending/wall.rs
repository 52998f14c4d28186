//! What the wall clock says.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// So long it is taken to stand still. Nobody judges by it: it travels for whoever reads the messages.
const STEADY: Duration = Duration::from_millis(100);

/// A look at the wall clock, so that calls need not each take their own.
#[derive(Debug)]
pub(super) struct WallClock {
    said: SystemTime,
    steady_until: Instant,
}

impl WallClock {
    pub(super) fn read(now: Instant) -> Self {
        Self {
            said: SystemTime::now(),
            steady_until: now + STEADY,
        }
    }

    /// What it says now, or said less than [`STEADY`] before.
    pub(super) fn at(&mut self, now: Instant) -> SystemTime {
        if now > self.steady_until {
            *self = Self::read(now);
        }
        self.said
    }
}

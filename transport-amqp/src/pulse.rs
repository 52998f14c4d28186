//! Whether this process has stood still.
//!
//! A process that is frozen, or whose runtime is blocked, sends no heartbeats: after two of them the broker takes its connection for
//! dead, and gives what it holds to others. When it runs again it finds deliveries in its socket before it finds the end of the
//! connection. By its pulse it knows that it has to ask first.
//!
//! Clocks that stop with the machine (suspended, or a paused virtual one) do not show such a pause.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// The pulse of one connection.
#[derive(Debug)]
pub(crate) struct Pulse {
    born: Instant,
    limit: Duration,
    /// When it last beat, in microseconds since it was born.
    beat: AtomicU64,
    pauses: AtomicU64,
}

impl Pulse {
    /// The broker waits two `heartbeat`s, of which up to a half may have passed before a pause: half of one is well before that.
    pub(crate) fn new(heartbeat: Duration) -> Self {
        Self {
            born: Instant::now(),
            limit: heartbeat / 2,
            beat: AtomicU64::new(0),
            pauses: AtomicU64::new(0),
        }
    }

    /// How long one that did not stand still may rely on what it knew.
    pub(crate) fn limit(&self) -> Duration {
        self.limit
    }

    /// To be called several times within the limit.
    pub(crate) fn beat(&self) {
        let now = Instant::now();
        self.pauses(now);
        self.beat.fetch_max(self.micros(now), Ordering::AcqRel);
    }

    /// How often it has stood still, as of `now`; sometimes one pause counts for more.
    pub(crate) fn pauses(&self, now: Instant) -> u64 {
        let at = self.micros(now);
        let since = at.saturating_sub(self.beat.load(Ordering::Acquire));
        if Duration::from_micros(since) > self.limit {
            // In this order: who sees the beat must see the pause before it.
            self.pauses.fetch_add(1, Ordering::AcqRel);
            self.beat.fetch_max(at, Ordering::AcqRel);
        }
        self.pauses.load(Ordering::Acquire)
    }

    fn micros(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.born).as_micros();
        u64::try_from(since).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_pause_is_seen_by_whoever_looks_first_and_all_others() {
        let pulse = Pulse::new(Duration::from_secs(10));
        for _ in 0..10 {
            advance(Duration::from_secs(4)).await;
            pulse.beat();
            assert_eq!(pulse.pauses(Instant::now()), 0);
        }
        let before = Instant::now();
        advance(Duration::from_millis(5001)).await;
        pulse.beat();
        assert_eq!(pulse.pauses(Instant::now()), 1);
        assert_eq!(pulse.pauses(before), 1);
        advance(Duration::from_millis(5001)).await;
        assert_eq!(pulse.pauses(Instant::now()), 2);
        pulse.beat();
        assert_eq!(pulse.pauses(Instant::now()), 2);
    }
}

//! The clock of Redis, as seen from here.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use antiphon_core::Request;
use tokio::time::Instant;

/// How long a sample may stand before a slower one replaces it.
const SAMPLE_LIFE: Duration = Duration::from_secs(60);

/// Longer than anybody waits.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// When a request expires that is sent now, by this host's clock; none if it has no deadline.
pub(crate) fn expires(request: &Request) -> Option<Instant> {
    let budget = request.deadline?.budget;
    let now = Instant::now();
    // A budget that the clock cannot hold.
    Some(now.checked_add(budget).unwrap_or(now + FOR_EVER))
}

/// Estimates the time of Redis from samples of it. The wall clock of this host never enters.
///
/// The estimate is late by at most the round trip of the sample, so a deadline stamped by it is never early.
#[derive(Debug, Default)]
pub(crate) struct Clock(Mutex<Option<Sample>>);

#[derive(Clone, Copy, Debug)]
struct Sample {
    asked: Instant,
    trip: Duration,
    /// What Redis answered, in microseconds since the epoch.
    micros: u64,
}

impl Clock {
    /// Takes a sample: `micros` was the answer to a question of `asked` that arrived at `answered`.
    pub(crate) fn observe(&self, asked: Instant, answered: Instant, micros: u64) {
        let sample = Sample {
            asked,
            trip: answered - asked,
            micros,
        };
        let mut best = self.lock();
        if best.is_none_or(|best| sample.trip <= best.trip || asked - best.asked > SAMPLE_LIFE) {
            *best = Some(sample);
        }
    }

    /// Forgets all samples: after a new connection the clock may be another server's.
    pub(crate) fn reset(&self) {
        *self.lock() = None;
    }

    /// The time of Redis in milliseconds since the epoch; `None` without a sample.
    pub(crate) fn now(&self) -> Option<u64> {
        let sample = (*self.lock())?;
        let micros = u64::try_from(sample.asked.elapsed().as_micros()).unwrap_or(u64::MAX);
        Some(sample.micros.saturating_add(micros) / 1000)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Sample>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_shortest_trip_counts_for_a_minute() {
        let clock = Clock::default();
        assert_eq!(clock.now(), None);
        let start = Instant::now();
        clock.observe(start, start + Duration::from_millis(2), 1_000_000);
        assert_eq!(clock.now(), Some(1000));
        clock.observe(start, start + Duration::from_millis(9), 9_000_000);
        assert_eq!(clock.now(), Some(1000));
        tokio::time::advance(Duration::from_secs(61)).await;
        assert_eq!(clock.now(), Some(62_000));
        let later = Instant::now();
        clock.observe(later, later + Duration::from_millis(9), 70_000_000);
        assert_eq!(clock.now(), Some(70_000));
    }
}

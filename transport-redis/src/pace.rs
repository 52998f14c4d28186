//! How many calls are under way, so that they go out in two waves.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use antiphon_core::CorrelationId;
use tokio::time::Instant;

/// How long the reply to a sample is waited for.
const SAMPLE_LIFE: Duration = Duration::from_secs(1);

/// A wave is never smaller than this for the sake of the next one.
const WAVE_MIN: usize = 32;

/// Estimates how many calls are under way: as many as went out between one request and its reply. So it does not drift
/// with calls that are never answered.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Requests sent so far that ask for a reply.
    sent: AtomicU64,
    pending: AtomicUsize,
    sample: Mutex<Option<Sample>>,
}

#[derive(Debug)]
struct Sample {
    id: CorrelationId,
    /// How many were sent before it.
    before: u64,
    at: Instant,
}

impl Pace {
    /// How many of `waiting` messages go out at once. Half of the calls that are under way: all of them in one batch would
    /// be answered in one batch, and client, server and broker would wait for each other in turn.
    pub(crate) fn wave(&self, waiting: usize) -> usize {
        let pending = self.pending.load(Ordering::Relaxed).max(waiting);
        pending.div_ceil(2).max(WAVE_MIN)
    }

    /// Notes the first request of a batch, if there is no sample on its way.
    pub(crate) fn sample(&self, id: &CorrelationId, now: Instant) {
        let mut sample = self.lock();
        if sample
            .as_ref()
            .is_none_or(|sample| now.saturating_duration_since(sample.at) > SAMPLE_LIFE)
        {
            *sample = Some(Sample {
                id: id.clone(),
                before: self.sent.load(Ordering::Relaxed),
                at: now,
            });
        }
    }

    /// Counts a batch.
    pub(crate) fn sent(&self, count: u64) {
        self.sent.fetch_add(count, Ordering::Relaxed);
    }

    /// Looks for the sample among replies.
    pub(crate) fn answered<'a>(&self, mut replies: impl Iterator<Item = &'a CorrelationId>) {
        let mut sample = self.lock();
        let Some(Sample { id, before, .. }) = &*sample else {
            return;
        };
        if replies.any(|reply| reply == id) {
            let pending = self.sent.load(Ordering::Relaxed).saturating_sub(*before);
            let pending = usize::try_from(pending).unwrap_or(usize::MAX);
            self.pending.store(pending, Ordering::Relaxed);
            *sample = None;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Sample>> {
        self.sample.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wave_is_half_of_what_is_under_way() {
        let pace = Pace::default();
        let (now, id, other) = (
            Instant::now(),
            CorrelationId::random(),
            CorrelationId::random(),
        );
        assert_eq!((pace.wave(1), pace.wave(64)), (WAVE_MIN, 32));
        pace.sent(1000);
        pace.sample(&id, now);
        pace.sent(30);
        pace.sample(&other, now);
        pace.sent(70);
        pace.answered([&other].into_iter());
        assert_eq!(pace.wave(1), WAVE_MIN);
        pace.answered([&other, &id].into_iter());
        assert_eq!((pace.wave(1), pace.wave(200)), (50, 100));
        pace.sample(&id, now);
        // Never answered, it gives way.
        pace.sample(&other, now + 2 * SAMPLE_LIFE);
        pace.sent(40);
        pace.answered([&other].into_iter());
        assert_eq!(pace.wave(1), WAVE_MIN);
    }
}

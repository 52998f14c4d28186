//! The long calls whose servers were heard of, and when each is taken for lost.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

/// So many heartbeats may be missed.
const MISSED_MAX: u32 = 3;

/// No server is taken at its word below this.
const EVERY_MIN: Duration = Duration::from_millis(100);

/// Only calls that their server has spoken of are here, so that fast ones cost nothing.
#[derive(Debug, Default)]
pub(super) struct Heartbeats {
    calls: HashMap<u128, Heard>,
    /// No call is lost before; it may be too early, by what was heard since.
    next: Option<Instant>,
}

#[derive(Debug)]
struct Heard {
    lost_at: Instant,
    every: Duration,
}

impl Heartbeats {
    /// Notes that a call's server lives. True if the sweeper must be woken for it.
    pub(super) fn hear(&mut self, id: u128, every: Duration, now: Instant) -> bool {
        let every = every.max(EVERY_MIN);
        let lost_at = now + every * MISSED_MAX;
        self.calls.insert(id, Heard { lost_at, every });
        let is_first = self.next.is_none_or(|next| lost_at < next);
        if is_first {
            self.next = Some(lost_at);
        }
        is_first
    }

    pub(super) fn forget(&mut self, id: u128) {
        if !self.calls.is_empty() {
            self.calls.remove(&id);
        }
    }

    /// Takes the calls whose servers have been silent for too long. Nobody is to blame for silence while the connection was
    /// not there, or while this process did not look: they have one more heartbeat then, in which what waits is heard.
    pub(super) fn take_lost(&mut self, now: Instant, connected: Option<Instant>) -> Vec<u128> {
        let Some(next) = self.next.filter(|next| *next <= now) else {
            return Vec::new();
        };
        let looked = now - next < EVERY_MIN;
        let mut lost = Vec::new();
        self.calls.retain(|id, heard| {
            let is_silent = heard.lost_at <= now;
            let could_hear = connected.is_some_and(|since| since + heard.every <= heard.lost_at);
            if is_silent && looked && could_hear {
                lost.push(*id);
                return false;
            }
            if is_silent {
                heard.lost_at = now + heard.every;
            }
            true
        });
        self.next = self.calls.values().map(|heard| heard.lost_at).min();
        lost
    }

    /// When to look next.
    pub(super) fn next(&self) -> Option<Instant> {
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_secs(5);

    #[tokio::test(start_paused = true)]
    async fn silence_is_loss_but_not_without_a_connection() {
        let mut heartbeats = Heartbeats::default();
        let start = Instant::now();
        assert!(heartbeats.hear(1, EVERY, start));
        assert!(!heartbeats.hear(2, EVERY, start + EVERY));
        let end = start + 3 * EVERY;
        assert!(heartbeats.take_lost(end - EVERY, Some(start)).is_empty());
        assert_eq!(heartbeats.take_lost(end, Some(start)), [1]);
        assert_eq!(heartbeats.next(), Some(end + EVERY));
        assert!(heartbeats.take_lost(end + EVERY, None).is_empty());
        assert_eq!(heartbeats.take_lost(end + 2 * EVERY, Some(start)), [2]);
        heartbeats.hear(3, EVERY, end);
        heartbeats.forget(3);
        assert!(
            heartbeats
                .take_lost(end + 9 * EVERY, Some(start))
                .is_empty()
        );
        assert_eq!(heartbeats.next(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn who_comes_back_hears_what_waits_first() {
        let mut heartbeats = Heartbeats::default();
        let start = Instant::now();
        heartbeats.hear(1, EVERY, start);
        let end = start + 3 * EVERY;
        let just_now = end - Duration::from_millis(50);
        assert!(heartbeats.take_lost(end, Some(just_now)).is_empty());
        // As after the process was stopped.
        assert!(
            heartbeats
                .take_lost(end + 9 * EVERY, Some(start))
                .is_empty()
        );
        assert_eq!(heartbeats.take_lost(end + 10 * EVERY, Some(start)), [1]);
        // What is no time at all does not keep the sweeper busy.
        heartbeats.hear(2, Duration::ZERO, start);
        assert!(heartbeats.next() >= Some(start + EVERY_MIN));
    }
}

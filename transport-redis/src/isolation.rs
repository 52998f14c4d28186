//! Which work to take next, so that a request that kills its server costs no other request an attempt.
//!
//! Work that came back is suspect. A server takes it with empty hands, one at a time, and nothing beside it. Neither
//! waiting for empty hands nor having it alone lasts for ever, or a slow handler would starve the rest.

use std::time::Duration;

use tokio::time::Instant;

use crate::claim::Claimed;

/// The most that fresh work waits for suspect work, each way, from its third attempt on.
const BOUND_MAX: Duration = Duration::from_secs(2);

/// The same on its second attempt. All that a dead server held comes back so, and next to none of it is to blame: a long wait
/// for each would cost more than the one that is.
const BOUND_SECOND: Duration = Duration::from_millis(200);

/// Take suspect work before fresh work, after it, or not at all.
const NONE: u8 = 0;
const FIRST: u8 = 1;
const LAST: u8 = 2;

/// The state of one subscription.
#[derive(Debug)]
pub(crate) struct Isolation {
    bound: Duration,
    /// Suspect work waits for empty hands until then.
    draining: Option<Instant>,
    /// A suspect is alone in hand until then.
    alone: Option<Instant>,
    /// The last one was a suspect: fresh work first, if there is any.
    fresh_first: bool,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// Claim up to `count`.
    Claim { count: usize, suspects: u8 },
    /// Wait for a free slot, or until then.
    Wait { until: Option<Instant> },
}

impl Isolation {
    pub(crate) fn new(lease: Duration) -> Self {
        Self {
            bound: BOUND_MAX.min(lease / 2),
            draining: None,
            alone: None,
            fresh_first: false,
        }
    }

    fn bound(&self, attempt: u32) -> Duration {
        if attempt > 2 {
            self.bound
        } else {
            self.bound.min(BOUND_SECOND)
        }
    }

    pub(crate) fn plan(&mut self, held: usize, prefetch: usize, now: Instant) -> Plan {
        let free = prefetch.saturating_sub(held);
        if held == 0 {
            self.draining = None;
            self.alone = None;
            return Plan::Claim {
                count: free,
                suspects: if self.fresh_first { LAST } else { FIRST },
            };
        }
        if let Some(until) = self.alone.or(self.draining)
            && now < until
        {
            return Plan::Wait { until: Some(until) };
        }
        if free == 0 {
            return Plan::Wait { until: None };
        }
        self.alone = None;
        let suspects = if self.draining.take().is_some() {
            FIRST
        } else {
            NONE
        };
        Plan::Claim {
            count: free,
            suspects,
        }
    }

    pub(crate) fn note(&mut self, claimed: &Claimed, held: usize, now: Instant) {
        if claimed.attempt > 0 {
            self.alone = Some(now + self.bound(claimed.attempt));
            self.fresh_first = true;
        } else {
            self.fresh_first = false;
            if claimed.returned_left > 0 && held > 0 && self.draining.is_none() {
                self.draining = Some(now + self.bound(claimed.returned_left));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claimed(attempt: u32, returned_left: u32) -> Claimed {
        Claimed {
            fresh_left: false,
            returned_left,
            attempt,
            frames: Vec::new(),
        }
    }

    #[test]
    fn suspects_are_taken_alone_with_empty_hands_and_within_the_bound() {
        let (now, lease) = (Instant::now(), Duration::from_secs(10));
        let later = now + BOUND_MAX;
        let mut isolation = Isolation::new(lease);
        assert_eq!(
            isolation.plan(0, 4, now),
            Plan::Claim {
                count: 4,
                suspects: FIRST
            }
        );
        isolation.note(&claimed(0, 0), 2, now);
        assert_eq!(
            isolation.plan(2, 4, now),
            Plan::Claim {
                count: 2,
                suspects: NONE
            }
        );
        isolation.note(&claimed(0, 3), 2, now);
        assert_eq!(isolation.plan(2, 4, now), Plan::Wait { until: Some(later) });
        assert_eq!(
            isolation.plan(1, 4, later),
            Plan::Claim {
                count: 3,
                suspects: FIRST
            }
        );
        isolation.note(&claimed(3, 2), 2, later);
        assert_eq!(
            isolation.plan(2, 4, later),
            Plan::Wait {
                until: Some(later + BOUND_MAX)
            }
        );
        assert_eq!(
            isolation.plan(0, 4, later),
            Plan::Claim {
                count: 4,
                suspects: LAST
            }
        );
        isolation.note(&claimed(0, 2), 4, later);
        assert_eq!(
            isolation.plan(0, 4, later),
            Plan::Claim {
                count: 4,
                suspects: FIRST
            }
        );
        isolation.note(&claimed(2, 0), 1, later);
        let soon = later + BOUND_SECOND;
        assert_eq!(
            isolation.plan(1, 4, later),
            Plan::Wait { until: Some(soon) }
        );
        assert_eq!(
            isolation.plan(1, 4, soon),
            Plan::Claim {
                count: 3,
                suspects: NONE
            }
        );
    }
}

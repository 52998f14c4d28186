//! When the calls that wait must end.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use tokio::time::Instant;

/// So many entries of ended calls are left alone, lest a few calls at once clean up all the time.
const STALE_MIN: usize = 64;

/// With so many entries for each call they are cleaned up: the more there may be, the fewer are looked at in vain.
const STALE_FACTOR: usize = 4;

/// The deadlines of the calls that wait, the first one on top. What ended before its deadline leaves its entry behind,
/// as most calls do; those are removed many at a time, once they are many more than the calls.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    heap: BinaryHeap<Reverse<(Instant, u128)>>,
    /// What the sweeper sleeps until; nothing if it waits to be told.
    armed: Option<Instant>,
}

impl Deadlines {
    /// Adds a call to those that `waits` tells of. True if the sweeper must be woken for it.
    pub(super) fn insert(
        &mut self,
        deadline: Instant,
        id: u128,
        waiting: usize,
        waits: impl Fn(u128) -> bool,
    ) -> bool {
        if self.heap.len() >= STALE_FACTOR * waiting + STALE_MIN {
            self.heap.retain(|Reverse((_, id))| waits(*id));
        }
        self.heap.push(Reverse((deadline, id)));
        let is_first = self.armed.is_none_or(|armed| deadline < armed);
        if is_first {
            self.armed = Some(deadline);
        }
        is_first
    }

    /// Takes one call whose deadline has come.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<u128> {
        match self.heap.peek() {
            Some(Reverse((deadline, _))) if *deadline <= now => {
                self.heap.pop().map(|Reverse((_, id))| id)
            }
            _ => None,
        }
    }

    /// Says when the next of the calls that `waits` tells of is due, until which the sweeper sleeps.
    pub(super) fn arm(&mut self, waits: impl Fn(u128) -> bool) -> Option<Instant> {
        while let Some(Reverse((_, id))) = self.heap.peek()
            && !waits(*id)
        {
            self.heap.pop();
        }
        self.armed = self.heap.peek().map(|Reverse((deadline, _))| *deadline);
        self.armed
    }
}

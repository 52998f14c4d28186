//! The memory of calls that ended.

use std::collections::VecDeque;
use std::collections::hash_map::{Entry, HashMap};
use std::time::Duration;

use tokio::time::Instant;

/// How many ended calls are remembered, to tell a duplicate or late reply from an unknown one.
pub(super) const ENDED_MAX: usize = 16_384;

/// For how long they are remembered: what is older is forgotten when one is looked up, so that ending a call costs no look.
pub(super) const ENDED_AGE: Duration = Duration::from_secs(60);

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// By what arrived for it.
    Answered,
    /// Otherwise.
    Abandoned,
}

/// The last calls that ended. Every call comes here, while next to no reply is one that must be looked up: so the ids are
/// only written down, one after the other, and those written since the last look-up are indexed by the next one.
#[derive(Debug, Default)]
pub(super) struct EndedCalls {
    recent: VecDeque<EndedCall>,
    /// The newest entry of each id, of the first `indexed` of `recent`.
    index: HashMap<u128, Indexed, foldhash::fast::RandomState>,
    indexed: usize,
    /// The number of the first of `recent`.
    first: u64,
}

#[derive(Debug)]
struct EndedCall {
    id: u128,
    at: Instant,
    fate: Fate,
}

#[derive(Debug)]
struct Indexed {
    number: u64,
    fate: Fate,
}

impl EndedCalls {
    pub(super) fn remember(&mut self, id: u128, fate: Fate, now: Instant) {
        self.recent.push_back(EndedCall { id, at: now, fate });
        // By their age they are forgotten when it matters.
        if self.recent.len() > ENDED_MAX {
            self.forget_oldest();
        }
    }

    pub(super) fn find(&mut self, id: u128, now: Instant) -> Option<Fate> {
        while let Some(oldest) = self.recent.front()
            && oldest.at + ENDED_AGE < now
        {
            self.forget_oldest();
        }
        for (offset, call) in self.recent.iter().enumerate().skip(self.indexed) {
            let number = self.first + offset as u64;
            let fate = call.fate;
            self.index.insert(call.id, Indexed { number, fate });
        }
        self.indexed = self.recent.len();
        self.index.get(&id).map(|found| found.fate)
    }

    fn forget_oldest(&mut self) {
        let Some(oldest) = self.recent.pop_front() else {
            return;
        };
        if let Some(indexed) = self.indexed.checked_sub(1) {
            self.indexed = indexed;
            // A call that entered again, behind a lost inbox, ended twice: the later end stays.
            if let Entry::Occupied(found) = self.index.entry(oldest.id)
                && found.get().number == self.first
            {
                found.remove();
            }
        }
        self.first += 1;
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.recent.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ended_twice_is_remembered_by_its_later_end() {
        let (mut ended, now) = (EndedCalls::default(), Instant::now());
        ended.remember(1, Fate::Abandoned, now);
        assert_eq!(ended.find(1, now), Some(Fate::Abandoned));
        ended.remember(1, Fate::Answered, now);
        assert_eq!(ended.find(1, now), Some(Fate::Answered));
        for id in 2..=ENDED_MAX as u128 {
            ended.remember(id, Fate::Answered, now);
        }
        assert_eq!(ended.find(1, now), Some(Fate::Answered));
        ended.remember(0, Fate::Abandoned, now);
        assert_eq!(
            (ended.find(1, now), ended.find(0, now)),
            (None, Some(Fate::Abandoned))
        );
        assert_eq!((ended.index.len(), ended.indexed), (ENDED_MAX, ENDED_MAX));
    }
}

//! Where a queue's replies went last.

use std::sync::Arc;
use std::task::Waker;

use antiphon_core::{Reply, ReplyAddress};

use crate::inbox::Letters;

/// With so many replies in a row to other inboxes, one of those takes its place.
const MISSES_MAX: u8 = 16;

/// The inbox that replies went to last, since most of a queue's go there again: it is found without the lock and the map of all
/// inboxes. Where many clients take turns it is of no use, and costs a comparison.
#[derive(Debug, Default)]
pub(super) struct LastInbox {
    found: Option<(ReplyAddress, Arc<Letters>)>,
    misses: u8,
}

impl LastInbox {
    /// Delivers a reply and says whom to wake for it, if it goes there; else gives it back.
    pub(super) fn deliver(
        &mut self,
        to: &ReplyAddress,
        reply: Arc<Reply>,
    ) -> Result<Option<Waker>, Arc<Reply>> {
        match &self.found {
            Some((address, letters)) if address == to => {
                self.misses = 0;
                // It may be gone, or have another address by now.
                letters
                    .push_to(to, reply)
                    .inspect_err(|_| self.found = None)
            }
            _ => {
                self.misses = self.misses.saturating_add(1);
                Err(reply)
            }
        }
    }

    /// True if another inbox should take its place.
    pub(super) fn is_stale(&self) -> bool {
        self.found.is_none() || self.misses >= MISSES_MAX
    }

    pub(super) fn remember(&mut self, address: ReplyAddress, letters: Arc<Letters>) {
        self.found = Some((address, letters));
        self.misses = 0;
    }
}

#[cfg(test)]
mod tests {
    use antiphon_core::CorrelationId;

    use super::*;

    #[test]
    fn it_makes_way_when_replies_go_elsewhere() {
        let mut last = LastInbox::default();
        assert!(last.is_stale());
        let letters = Arc::new(Letters::new(1));
        let (known, other) = (letters.address(), Letters::new(2).address());
        last.remember(known.clone(), letters);
        let reply = Arc::new(Reply::value(CorrelationId::random(), ""));
        for round in [1, 2] {
            for _ in 1..MISSES_MAX {
                assert!(last.deliver(&other, Arc::clone(&reply)).is_err());
            }
            assert!(!last.is_stale(), "{round}");
            // One that finds it in between counts more.
            assert!(last.deliver(&known, Arc::clone(&reply)).is_ok());
        }
        for _ in 0..MISSES_MAX {
            assert!(last.deliver(&other, Arc::clone(&reply)).is_err());
        }
        assert!(last.is_stale());
    }
}

//! What was answered lately.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use crate::held::Identity;

/// A copy that comes back with a lost connection comes soon after it, and a lost connection is noticed within two heartbeats.
const RECENT_FOR: Duration = Duration::from_secs(60);
const RECENT_MAX: usize = 65_536;

/// The identities of the requests that were answered lately. They are indexed when somebody asks, which is after a loss.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    order: VecDeque<(Instant, Identity)>,
    /// How often each is among the first so many.
    known: HashMap<Identity, usize>,
    indexed: usize,
}

impl Recent {
    pub(crate) fn insert(&mut self, identity: Identity) {
        let now = Instant::now();
        while let Some((since, _)) = self.order.front()
            && (self.order.len() >= RECENT_MAX || now - *since > RECENT_FOR)
        {
            let Some((_, old)) = self.order.pop_front() else {
                break;
            };
            if self.indexed > 0 {
                self.indexed -= 1;
                self.forget(old);
            }
        }
        self.order.push_back((now, identity));
    }

    pub(crate) fn contains(&mut self, identity: &Identity) -> bool {
        for (_, identity) in self.order.range(self.indexed..) {
            *self.known.entry(identity.clone()).or_default() += 1;
        }
        self.indexed = self.order.len();
        self.known.contains_key(identity)
    }

    fn forget(&mut self, identity: Identity) {
        if let Entry::Occupied(mut entry) = self.known.entry(identity) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::BasicProperties;

    fn identity(n: usize) -> Identity {
        let request =
            antiphon_core::Request::new(antiphon_core::Deadline::after(Duration::ZERO), "");
        let properties = crate::message::encode_request(&request, None);
        let properties: BasicProperties = properties.with_reply_to(n.to_string().into());
        Identity::of(&properties).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn it_forgets_by_age_and_by_number() {
        let mut recent = Recent::default();
        let first = identity(0);
        recent.insert(first.clone());
        assert!(recent.contains(&first));
        tokio::time::advance(RECENT_FOR + Duration::from_millis(1)).await;
        recent.insert(identity(1));
        assert!(!recent.contains(&first));
        let many: Vec<_> = (0..RECENT_MAX + 10).map(identity).collect();
        for (n, identity) in many.iter().enumerate() {
            recent.insert(identity.clone());
            // Some are indexed early, and most late.
            assert!(n % 1000 > 0 || recent.contains(identity));
        }
        assert!(!recent.contains(&many[9]) && recent.contains(&many[10]));
        assert_eq!(
            (recent.known.len(), recent.order.len()),
            (RECENT_MAX, RECENT_MAX)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_was_answered_twice_is_forgotten_with_the_second() {
        let mut recent = Recent::default();
        let twice = identity(0);
        recent.insert(twice.clone());
        tokio::time::advance(RECENT_FOR / 2).await;
        recent.insert(twice.clone());
        assert!(recent.contains(&twice));
        tokio::time::advance(RECENT_FOR / 2 + Duration::from_millis(1)).await;
        recent.insert(identity(1));
        assert!(recent.contains(&twice));
        tokio::time::advance(RECENT_FOR / 2).await;
        recent.insert(identity(2));
        assert!(!recent.contains(&twice));
    }
}

//! What was answered lately.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use crate::held::Identity;

/// A copy that comes back with a lost connection comes soon after it, and a lost connection is noticed within two heartbeats.
const RECENT_FOR: Duration = Duration::from_secs(60);
const RECENT_MAX: usize = 65_536;

/// The identities of the requests that were answered lately.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    known: HashSet<Identity>,
    order: VecDeque<(Instant, Identity)>,
}

impl Recent {
    pub(crate) fn insert(&mut self, identity: Identity) {
        let now = Instant::now();
        while let Some((since, _)) = self.order.front()
            && (self.order.len() >= RECENT_MAX || now - *since > RECENT_FOR)
        {
            if let Some((_, old)) = self.order.pop_front() {
                self.known.remove(&old);
            }
        }
        if self.known.insert(identity.clone()) {
            self.order.push_back((now, identity));
        }
    }

    pub(crate) fn contains(&self, identity: &Identity) -> bool {
        self.known.contains(identity)
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
        for n in 0..RECENT_MAX + 10 {
            recent.insert(identity(n));
        }
        assert_eq!(
            (recent.known.len(), recent.order.len()),
            (RECENT_MAX, RECENT_MAX)
        );
    }
}

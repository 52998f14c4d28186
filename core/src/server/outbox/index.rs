//! What is kept, within its bounds.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use tokio::time::Instant;

use super::KeptTo;
use crate::envelope::{Outcome, Reply};
use crate::outbox_store::OutboxKey;

/// How much is kept: what comes on top is dropped, and its request runs again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OutboxBounds {
    pub(crate) replies: usize,
    pub(crate) bytes: usize,
}

#[derive(Debug, Default)]
pub(super) struct Index {
    kept: HashMap<OutboxKey, Kept>,
    /// What is to be sent, in order.
    unsent: VecDeque<OutboxKey>,
    /// What is to be sent again, since there was no room for it.
    refused: VecDeque<OutboxKey>,
    /// What only answers its request, by age.
    idle: BTreeMap<u64, OutboxKey>,
    expiries: BTreeMap<(Instant, u64), OutboxKey>,
    bytes: usize,
    entered: u64,
}

#[derive(Clone, Debug)]
pub(super) struct Kept {
    pub(super) reply: Arc<Reply>,
    pub(super) expires: Instant,
    /// Tells it from another one with the same key, and the older from the younger.
    pub(super) number: u64,
    purpose: Purpose,
}

/// What a kept reply is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// It is being stored, and said to be kept when it is: so it makes room for nothing.
    Unsettled,
    Unsent,
    Idle,
}

/// What is forgotten to make room for something else.
pub(super) type Forgotten = Vec<OutboxKey>;

impl Index {
    /// Keeps a reply in place of one with the same key, until it is [settled](Self::settle) what for. None if there is
    /// no room, or with its number and what had to go for it: of what is not to be sent, the oldest.
    pub(super) fn keep(
        &mut self,
        key: OutboxKey,
        reply: Arc<Reply>,
        expires: Instant,
        bounds: OutboxBounds,
    ) -> Option<(u64, Forgotten)> {
        self.remove(&key);
        let size = size(&reply);
        let forgotten = self.make_room(size, bounds)?;
        self.entered += 1;
        let number = self.entered;
        self.bytes += size;
        self.expiries.insert((expires, number), key.clone());
        let kept = Kept {
            reply,
            expires,
            number,
            purpose: Purpose::Unsettled,
        };
        self.kept.insert(key, kept);
        Some((number, forgotten))
    }

    /// Forgets as much as must go for a reply of this size; nothing if that would not do.
    fn make_room(&mut self, size: usize, bounds: OutboxBounds) -> Option<Forgotten> {
        let (mut replies, mut bytes) = (self.kept.len(), self.bytes);
        let mut oldest = self.idle.values();
        let mut forgotten = Vec::new();
        while replies >= bounds.replies || bytes + size > bounds.bytes {
            let key = oldest.next()?;
            replies -= 1;
            bytes -= self.kept.get(key).map_or(0, |kept| self::size(&kept.reply));
            forgotten.push(key.clone());
        }
        for key in &forgotten {
            self.remove(key);
        }
        Some(forgotten)
    }

    /// Settles what a reply is kept for. False if it is not there any more.
    pub(super) fn settle(&mut self, key: &OutboxKey, number: u64, kept_to: KeptTo) -> bool {
        let Some(kept) = self.kept.get_mut(key).filter(|kept| kept.number == number) else {
            return false;
        };
        match kept_to {
            KeptTo::Send => {
                kept.purpose = Purpose::Unsent;
                self.unsent.push_back(key.clone());
            }
            KeptTo::Answer => {
                kept.purpose = Purpose::Idle;
                self.idle.insert(number, key.clone());
            }
        }
        true
    }

    /// Notes that a reply is not to be sent any more. False if it is not there any more.
    pub(super) fn sent(&mut self, key: &OutboxKey, number: u64) -> bool {
        let Some(kept) = self.kept.get_mut(key).filter(|kept| kept.number == number) else {
            return false;
        };
        kept.purpose = Purpose::Idle;
        self.idle.insert(number, key.clone());
        self.unqueue(key);
        true
    }

    /// Has a reply that there was no room for sent again, behind all others.
    pub(super) fn refused(&mut self, key: &OutboxKey) {
        if self.find_unsent(key).is_some() {
            self.unqueue(key);
            self.refused.push_back(key.clone());
        }
    }

    fn unqueue(&mut self, key: &OutboxKey) {
        self.unsent.retain(|unsent| unsent != key);
        self.refused.retain(|refused| refused != key);
    }

    /// Forgets a reply; false if it was not there.
    pub(super) fn remove(&mut self, key: &OutboxKey) -> bool {
        let Some(kept) = self.kept.remove(key) else {
            return false;
        };
        self.bytes -= size(&kept.reply);
        self.idle.remove(&kept.number);
        self.expiries.remove(&(kept.expires, kept.number));
        if kept.purpose == Purpose::Unsent {
            self.unqueue(key);
        }
        true
    }

    /// Forgets what has expired.
    pub(super) fn remove_expired(&mut self, now: Instant) -> Forgotten {
        let mut forgotten = Vec::new();
        while let Some(((expires, _), key)) = self.expiries.first_key_value()
            && *expires <= now
        {
            let key = key.clone();
            self.remove(&key);
            forgotten.push(key);
        }
        forgotten
    }

    pub(super) fn find(&self, key: &OutboxKey) -> Option<&Kept> {
        self.kept.get(key)
    }

    /// A reply, if it is to be sent.
    pub(super) fn find_unsent(&self, key: &OutboxKey) -> Option<&Kept> {
        self.find(key)
            .filter(|kept| kept.purpose == Purpose::Unsent)
    }

    /// The first that is to be sent.
    pub(super) fn first(&self) -> Option<OutboxKey> {
        self.unsent.front().cloned()
    }

    /// The first that is to be sent again.
    pub(super) fn first_refused(&self) -> Option<OutboxKey> {
        self.refused.front().cloned()
    }

    /// When the next one expires.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.expiries.keys().next().map(|(expires, _)| *expires)
    }

    pub(super) fn count(&self) -> usize {
        self.kept.len()
    }

    /// True if each was sent, or refused.
    pub(super) fn all_tried(&self) -> bool {
        self.unsent.is_empty()
    }
}

/// What a reply counts for: what could be large of it.
fn size(reply: &Reply) -> usize {
    let details = match &reply.outcome {
        Outcome::Fault { fault, .. } => fault.details_size(),
        Outcome::Value | Outcome::Signal(_) => 0,
    };
    let headers: usize = reply
        .headers
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum();
    reply.body.len() + details + headers
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::envelope::CorrelationId;
    use crate::name::ReplyAddress;

    const BOUNDS: OutboxBounds = OutboxBounds {
        replies: 2,
        bytes: 10,
    };

    fn key(id: u128) -> OutboxKey {
        OutboxKey {
            id: CorrelationId::from_u128(id),
            to: ReplyAddress::new("inbox").unwrap(),
        }
    }

    fn keep(index: &mut Index, id: u128, body: &'static str, expires: Instant) -> Option<u64> {
        let reply = Reply::value(CorrelationId::from_u128(id), body);
        let (number, _) = index.keep(key(id), reply.into(), expires, BOUNDS)?;
        index.settle(&key(id), number, KeptTo::Send);
        Some(number)
    }

    #[test]
    fn it_is_bounded_and_forgets() {
        let mut index = Index::default();
        let (now, later) = (Instant::now(), Instant::now() + Duration::from_secs(5));
        assert!(keep(&mut index, 1, "12345", later).is_some());
        assert!(keep(&mut index, 2, "123456", later).is_none());
        assert!(keep(&mut index, 2, "1234", later).is_some());
        assert!(keep(&mut index, 3, "", later).is_none(), "two are enough");
        assert!(
            keep(&mut index, 2, "12345", later).is_some(),
            "it takes its own place"
        );
        assert_eq!((index.count(), index.bytes), (2, 10));
        assert_eq!(index.first(), Some(key(1)));
        assert!(index.remove_expired(now).is_empty());
        assert_eq!(index.remove_expired(later), [key(1), key(2)]);
        assert_eq!((index.count(), index.bytes), (0, 0));
        assert!(index.all_tried() && index.next_expiry().is_none());
    }

    #[test]
    fn the_oldest_of_what_was_sent_makes_room() {
        let mut index = Index::default();
        let later = Instant::now() + Duration::from_secs(5);
        for (id, body) in [(1, "1"), (2, "2")] {
            let number = keep(&mut index, id, body, later).unwrap();
            assert!(index.sent(&key(id), number));
        }
        let reply = Reply::value(CorrelationId::from_u128(3), "3");
        let (_, forgotten) = index.keep(key(3), reply.into(), later, BOUNDS).unwrap();
        assert_eq!(forgotten, [key(1)], "and no more than is needed");
        assert!(index.find(&key(2)).is_some() && index.find(&key(3)).is_some());
    }

    #[test]
    fn what_is_refused_costs_no_other_one_its_place() {
        let mut index = Index::default();
        let later = Instant::now() + Duration::from_secs(5);
        let number = keep(&mut index, 1, "1", later).unwrap();
        index.sent(&key(1), number);
        keep(&mut index, 2, "12345", later).unwrap();
        assert!(keep(&mut index, 3, "123456", later).is_none());
        assert!(index.find(&key(1)).is_some() && index.find(&key(2)).is_some());
        assert!(keep(&mut index, 3, "12345", later).is_some());
        assert!(index.find(&key(1)).is_none());
    }

    #[test]
    fn what_is_being_stored_makes_no_room() {
        let mut index = Index::default();
        let later = Instant::now() + Duration::from_secs(5);
        let enter = |index: &mut Index, id: u128| {
            let reply = Reply::value(CorrelationId::from_u128(id), "12345");
            index.keep(key(id), reply.into(), later, BOUNDS)
        };
        let (first, _) = enter(&mut index, 1).unwrap();
        let (second, _) = enter(&mut index, 2).unwrap();
        assert!(enter(&mut index, 3).is_none());
        assert!(index.settle(&key(2), second, KeptTo::Answer));
        let (_, forgotten) = enter(&mut index, 3).unwrap();
        assert_eq!(forgotten, [key(2)]);
        assert!(index.settle(&key(1), first, KeptTo::Send));
        assert!(!index.settle(&key(2), second, KeptTo::Answer), "it is gone");
        assert_eq!(index.first(), Some(key(1)));
    }

    #[test]
    fn one_that_took_its_place_is_not_taken_for_it() {
        let mut index = Index::default();
        let later = Instant::now() + Duration::from_secs(5);
        let first = keep(&mut index, 1, "1", later).unwrap();
        keep(&mut index, 1, "2", later).unwrap();
        assert!(!index.sent(&key(1), first));
        assert!(!index.settle(&key(1), first, KeptTo::Answer));
        assert_eq!(index.find_unsent(&key(1)).unwrap().reply.body, "2");
        assert_eq!(index.unsent.len(), 1);
    }
}

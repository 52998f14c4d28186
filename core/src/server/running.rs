//! The requests that run here, so that a word about one of them finds its handler; and those whose callers gave them up
//! before they came.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::envelope::CorrelationId;

/// How many given-up requests are remembered; the oldest are forgotten first.
const GIVEN_UP_MAX: usize = 16_384;

/// For how long at most.
const GIVEN_UP_AGE: Duration = Duration::from_secs(600);

/// One table for all services of a server.
#[derive(Debug, Default)]
pub(crate) struct Running {
    table: Mutex<Table>,
    /// How many given-up requests are remembered: mostly none, and then a request costs no look at the table.
    given_up: AtomicUsize,
}

#[derive(Debug, Default)]
struct Table {
    /// The number tells a request from its own earlier delivery, which may still be ending.
    running: HashMap<CorrelationId, (u64, CancellationToken)>,
    entered: u64,
    given_up: HashMap<CorrelationId, Instant>,
    /// In which order they were given up, and when each is forgotten; some are no longer in the map.
    order: VecDeque<(CorrelationId, Instant)>,
}

impl Running {
    /// Enters a request whose handler did not end at once: its token fires if the caller gives it up. It has been given up
    /// already if its token has fired when this returns.
    pub(crate) fn enter(
        self: &Arc<Self>,
        id: &CorrelationId,
        given_up: CancellationToken,
    ) -> Entered {
        let mut table = self.lock();
        if self.take(&mut table, id) {
            given_up.cancel();
        }
        table.entered += 1;
        let number = table.entered;
        table.running.insert(id.clone(), (number, given_up));
        Entered {
            running: Arc::clone(self),
            id: id.clone(),
            number,
        }
    }

    /// The caller of a request gave it up: fires its token if it runs here; else it will not be started here within
    /// `lasts`.
    pub(crate) fn give_up(&self, id: &CorrelationId, lasts: Duration) {
        let mut table = self.lock();
        if let Some((_, token)) = table.running.get(id).cloned() {
            drop(table);
            return token.cancel();
        }
        if table.order.len() >= GIVEN_UP_MAX
            && let Some((first, _)) = table.order.pop_front()
        {
            table.given_up.remove(&first);
        }
        let ends = Instant::now() + lasts.min(GIVEN_UP_AGE);
        if table.given_up.insert(id.clone(), ends).is_none() {
            table.order.push_back((id.clone(), ends));
        }
        self.given_up.store(table.given_up.len(), Ordering::Release);
    }

    /// True if callers have given requests up that did not come here.
    pub(crate) fn remembers_any(&self) -> bool {
        self.given_up.load(Ordering::Acquire) > 0
    }

    /// True if the request's caller has given it up.
    pub(crate) fn was_given_up(&self, id: &CorrelationId) -> bool {
        self.remembers_any() && self.take(&mut self.lock(), id)
    }

    /// How many run.
    pub(crate) fn count(&self) -> usize {
        self.lock().running.len()
    }

    fn take(&self, table: &mut Table, id: &CorrelationId) -> bool {
        let ends = table.given_up.remove(id);
        let now = Instant::now();
        // Most were given up at another server, and never come here: they go by age, so that requests need not look for ever.
        while let Some((first, ends)) = table.order.front()
            && *ends <= now
        {
            let first = first.clone();
            table.given_up.remove(&first);
            table.order.pop_front();
        }
        self.given_up.store(table.given_up.len(), Ordering::Release);
        ends.is_some_and(|ends| ends > now)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // No code of a user runs under the lock, so a poisoned table is still a whole one.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request's place among those that run.
#[derive(Debug)]
pub(crate) struct Entered {
    running: Arc<Running>,
    id: CorrelationId,
    number: u64,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut table = self.running.lock();
        if table
            .running
            .get(&self.id)
            .is_some_and(|(number, _)| *number == self.number)
        {
            table.running.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_word_finds_its_handler_or_waits_for_it() {
        let running = Arc::new(Running::default());
        let (one, two, three) = (
            CorrelationId::from_u128(1),
            CorrelationId::from_u128(2),
            CorrelationId::from_u128(3),
        );
        let token = CancellationToken::new();
        let entered = running.enter(&one, token.clone());
        assert_eq!(running.count(), 1);
        running.give_up(&one, Duration::from_secs(1));
        assert!(token.is_cancelled() && !running.was_given_up(&one));
        drop(entered);
        assert_eq!(running.count(), 0);

        running.give_up(&two, Duration::from_secs(1));
        running.give_up(&three, Duration::from_secs(1));
        assert!(running.was_given_up(&two) && !running.was_given_up(&two));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(!running.was_given_up(&three));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let running = Running::default();
        for id in 0..GIVEN_UP_MAX as u128 + 10 {
            running.give_up(&CorrelationId::from_u128(id), Duration::from_secs(60));
        }
        assert_eq!(running.lock().given_up.len(), GIVEN_UP_MAX);
    }
}

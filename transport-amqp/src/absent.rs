//! Requests to services that have no queue, or may have none. Clients declare none, so the requests stay here until a server has.

use std::collections::{HashMap, HashSet};
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use lapin::types::ShortString;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::prober::Prober;
use crate::publisher::Job;

/// How often the broker is asked for a queue that is not there: after this time, and then at twice the distance each time.
const LOOK_MIN: Duration = Duration::from_millis(25);
const LOOK_MAX: Duration = Duration::from_millis(400);

/// How long a queue without consumers must have been there. What is published to a quorum queue while it is being declared is
/// sometimes neither confirmed nor returned.
const SETTLED: Duration = Duration::from_millis(100);

/// What has no more time than this is sent without asking.
const HASTE: Duration = Duration::from_secs(1);

/// How many queues are remembered to be there. Who sends to more of them asks again.
const KNOWN_MAX: usize = 4096;

/// How often withdrawn requests are thrown out.
const PURGE: Duration = Duration::from_millis(500);

/// The queues that are there, those that are not, and the requests that wait for them.
///
/// Nothing is published to a queue of which the broker was not asked: it may be just being declared.
#[derive(Debug)]
pub(crate) struct Absent {
    prober: Arc<Prober>,
    queues: HashMap<ShortString, Waiting>,
    /// Those that were there when the broker was asked, on the present connection.
    known: HashSet<ShortString>,
    found: mpsc::UnboundedSender<ShortString>,
    /// When something must be given up or thrown out, at the latest.
    next: Option<Instant>,
}

#[derive(Debug)]
struct Waiting {
    jobs: Vec<Job>,
    /// Ends the task that asks the broker.
    _asking: DropGuard,
}

impl Absent {
    /// None yet. Each queue that appears is told to `found`.
    pub(crate) fn new(prober: Arc<Prober>, found: mpsc::UnboundedSender<ShortString>) -> Self {
        Self {
            prober,
            queues: HashMap::new(),
            known: HashSet::new(),
            found,
            next: None,
        }
    }

    /// True if a request is to be parked, until its queue is known to be there.
    pub(crate) fn waits(&self, queue: &ShortString, deadline: Option<Instant>) -> bool {
        if self.known.contains(queue) {
            return false;
        }
        // Whoever has little time has little to lose either: at worst the request ends at its deadline.
        let hasty = deadline.is_some_and(|at| at <= Instant::now() + HASTE);
        !hasty || self.queues.contains_key(queue)
    }

    /// The queue was not there after all.
    pub(crate) fn forget(&mut self, queue: &ShortString) {
        self.known.remove(queue);
    }

    /// On another connection nothing is known.
    pub(crate) fn forget_all(&mut self) {
        self.known.clear();
    }

    /// Keeps a request until its queue is there.
    pub(crate) fn park(&mut self, queue: &ShortString, job: Job) {
        let at = job.deadline().map_or_else(
            || Instant::now() + PURGE,
            |at| at.min(Instant::now() + PURGE),
        );
        self.next = Some(self.next.map_or(at, |next| next.min(at)));
        if let Some(waiting) = self.queues.get_mut(queue) {
            waiting.jobs.push(job);
            return;
        }
        let token = CancellationToken::new();
        let asking = ask(Arc::clone(&self.prober), queue.clone(), self.found.clone());
        tokio::spawn(token.clone().run_until_cancelled_owned(asking));
        let waiting = Waiting {
            jobs: vec![job],
            _asking: token.drop_guard(),
        };
        self.queues.insert(queue.clone(), waiting);
    }

    /// A queue is there: what waited for it, in order.
    pub(crate) fn take(&mut self, queue: ShortString) -> Vec<Job> {
        let Some(waiting) = self.queues.remove(&queue) else {
            return Vec::new();
        };
        if self.known.len() >= KNOWN_MAX {
            self.known.clear();
        }
        self.known.insert(queue);
        waiting.jobs
    }

    /// When [`overdue`](Self::overdue) should be called next.
    pub(crate) fn next_wake(&self) -> Option<Instant> {
        self.next
    }

    /// What has no time left. Forgets what was withdrawn.
    pub(crate) fn overdue(&mut self, now: Instant) -> Vec<Job> {
        if self.next.is_none_or(|next| now < next) {
            return Vec::new();
        }
        let mut overdue = Vec::new();
        let mut next = None::<Instant>;
        for waiting in self.queues.values_mut() {
            for job in mem::take(&mut waiting.jobs) {
                let at = job.deadline();
                if at.is_some_and(|at| at <= now) {
                    overdue.push(job);
                } else if !job.is_abandoned() {
                    let at = at.map_or(now + PURGE, |at| at.min(now + PURGE));
                    next = Some(next.map_or(at, |next| next.min(at)));
                    waiting.jobs.push(job);
                }
            }
        }
        self.queues.retain(|_, waiting| !waiting.jobs.is_empty());
        self.next = next;
        overdue
    }

    /// All that waits, for the end.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Job> {
        self.queues.drain().flat_map(|(_, waiting)| waiting.jobs)
    }
}

/// Asks the broker until a queue is there, and has been for a moment if nobody consumes from it.
async fn ask(prober: Arc<Prober>, queue: ShortString, found: mpsc::UnboundedSender<ShortString>) {
    let mut pause = LOOK_MIN;
    loop {
        match prober.consumers(&queue).await {
            // Nobody waits for what is sent to it, so it need not be sent at once.
            Ok(0) => break sleep(SETTLED).await,
            Ok(_) => break,
            // Not there; or nobody can say, and the next round waits for the connection.
            Err(_) => {
                sleep(pause).await;
                pause = (pause * 2).min(LOOK_MAX);
            }
        }
    }
    let _ = found.send(queue);
}

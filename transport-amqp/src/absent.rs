//! Requests to services that have no queue yet. Clients declare none, so the requests stay here until a server has.

use std::collections::HashMap;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use lapin::types::ShortString;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::prober::Prober;
use crate::publisher::Job;

/// How often the broker is asked for a queue: first after this time, and then at twice the distance each time.
const LOOK_MIN: Duration = Duration::from_millis(25);
const LOOK_MAX: Duration = Duration::from_millis(400);

/// How long a queue without consumers must have been there. What is published to a quorum queue while it is being declared is
/// sometimes neither confirmed nor returned.
const SETTLED: Duration = Duration::from_millis(100);

/// How often withdrawn requests are thrown out.
const PURGE: Duration = Duration::from_millis(500);

/// The queues that are not there, and the requests that wait for them.
#[derive(Debug)]
pub(crate) struct Absent {
    prober: Arc<Prober>,
    queues: HashMap<ShortString, Waiting>,
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
            found,
            next: None,
        }
    }

    /// True if the queue is known not to be there.
    pub(crate) fn is_absent(&self, queue: &ShortString) -> bool {
        self.queues.contains_key(queue)
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

    /// A queue is there: what waited for it.
    pub(crate) fn take(&mut self, queue: &ShortString) -> Vec<Job> {
        self.queues
            .remove(queue)
            .map_or_else(Vec::new, |waiting| waiting.jobs)
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

/// Asks the broker until a queue is there, and told so.
async fn ask(prober: Arc<Prober>, queue: ShortString, found: mpsc::UnboundedSender<ShortString>) {
    let mut pause = LOOK_MIN;
    let mut since = None;
    loop {
        sleep(pause).await;
        match prober.consumers(&queue).await {
            Ok(0) => {
                let since = *since.get_or_insert_with(Instant::now);
                if since.elapsed() >= SETTLED {
                    break;
                }
                pause = SETTLED;
            }
            Ok(_) => break,
            // Not there; or nobody can say, and the next round waits for the connection.
            Err(_) => {
                since = None;
                pause = (pause * 2).min(LOOK_MAX);
            }
        }
    }
    let _ = found.send(queue);
}

//! Returns the work of dead servers. Every server watches its services; any number may.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::sleep;

use crate::QUEUE_TTL;
use crate::command::Pipeline;
use crate::completer::millis;
use crate::connection::{Live, random_part};
use crate::naming::{self, ServiceKeys};
use crate::settle_batch::{Reclaim, reclaim};
use crate::transport::Shared;
use crate::value::Value;

/// How many sessions of a service are looked at, at random: those that live all look, so that each one is looked at by about
/// so many.
const SAMPLE: usize = 16;

/// How long several monitors spread over when a process is gone.
const SPREAD: Duration = Duration::from_millis(150);

/// The services of this transport, watched by one task for all.
#[derive(Debug, Default)]
pub(crate) struct Monitor {
    watched: Mutex<Vec<Arc<Watched>>>,
    changed: Notify,
}

#[derive(Debug)]
struct Watched {
    keys: Arc<ServiceKeys>,
    /// Somebody held work at the last look, or has taken some since. It may be wrong: then there is one look at all.
    warm: AtomicBool,
}

/// A service is watched until this is dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    shared: Arc<Shared>,
    watched: Arc<Watched>,
}

impl Watch {
    pub(crate) fn new(shared: &Arc<Shared>, keys: &Arc<ServiceKeys>) -> Self {
        let watched = Arc::new(Watched {
            keys: Arc::clone(keys),
            warm: AtomicBool::new(false),
        });
        shared.monitor.lock().push(Arc::clone(&watched));
        shared.monitor.changed.notify_one();
        Self {
            shared: Arc::clone(shared),
            watched,
        }
    }

    /// Work of the service was taken.
    pub(crate) fn warm(&self) {
        self.watched.warm.store(true, Ordering::Relaxed);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut all = self.shared.monitor.lock();
        all.retain(|watched| !Arc::ptr_eq(watched, &self.watched));
    }
}

/// A session of another process, where it was found.
struct Found {
    keys: Arc<ServiceKeys>,
    session: String,
}

/// Watches the services of a transport until its end.
pub(crate) async fn run(shared: Arc<Shared>) {
    let watching = async {
        let mut turn = 0;
        // Also within the time that is granted to a queue of which nothing else is known.
        let tick = (shared.config.lease / 3).min(shared.config.inbox_ttl / 4);
        let mut pause = tick;
        loop {
            sleep(pause).await;
            let services = shared.monitor.lock().clone();
            if services.is_empty() {
                shared.monitor.changed.notified().await;
                pause = tick;
                continue;
            }
            turn = (turn + 1) % services.len();
            pause = match look(&shared, &services, turn).await {
                Some(next) => next.min(tick),
                None => Duration::from_millis(100) + random_part(SPREAD),
            };
        }
    };
    shared.ending.run_until_cancelled(watching).await;
}

/// Looks where there is something, and at one service in turn: a session that held nothing may be left there. Gives when to
/// look again, if that is known; fails if Redis cannot be asked.
async fn look(shared: &Shared, services: &[Arc<Watched>], turn: usize) -> Option<Duration> {
    let live = shared.link.clone().ready(&shared.ending).await?;
    let in_turn = services.get(turn)?;
    let is_warm = |watched: &&Arc<Watched>| watched.warm.load(Ordering::Relaxed);
    let (warm, cold): (Vec<_>, Vec<_>) = services.iter().partition(is_warm);
    let mut pipeline = Pipeline::new();
    pipeline
        .cmd("SRANDMEMBER")
        .arg(&in_turn.keys.sessions)
        .arg(SAMPLE);
    if !cold.is_empty() {
        let exists = pipeline.cmd("EXISTS");
        for watched in cold {
            exists.arg(&watched.keys.queue).arg(&watched.keys.holding);
        }
    }
    let mut answers = live.execute(&pipeline).await.ok()?.into_iter();
    let mut found = HashMap::new();
    add(shared, &mut found, &in_turn.keys, answers.next()?);
    let closer = match answers.next() {
        None | Some(Value::Int(0)) => warm,
        Some(_) => services.iter().collect(),
    };
    let mut pipeline = Pipeline::new();
    for Watched { keys, .. } in closer.iter().map(|watched| &***watched) {
        // A queue lives as long as its requests do, as far as its senders know. Those of plain peers, and what is longer
        // than the life of others, must not vanish while somebody serves.
        let expire = pipeline.cmd("PEXPIRE").arg(&keys.queue);
        expire.arg(millis(QUEUE_TTL)).arg("GT");
        pipeline.cmd("SRANDMEMBER").arg(&keys.holding).arg(SAMPLE);
    }
    if !pipeline.is_empty() {
        let answers = live.execute(&pipeline).await.ok()?;
        let holders = answers.into_iter().skip(1).step_by(2);
        for (watched, holders) in closer.into_iter().zip(holders) {
            let sessions = add(shared, &mut found, &watched.keys, holders);
            watched.warm.store(sessions > 0, Ordering::Relaxed);
        }
    }
    clear(&live, found).await
}

/// Adds the sessions of an answer, by their process; those of our own end by themselves. Gives how many there are of both.
fn add(
    shared: &Shared,
    found: &mut HashMap<String, Vec<Found>>,
    keys: &Arc<ServiceKeys>,
    sessions: Value,
) -> usize {
    let Value::Array(sessions) = sessions else {
        return 0;
    };
    let count = sessions.len();
    for session in sessions {
        if let Value::BulkString(session) = session
            && let Ok(session) = String::from_utf8(session.into())
            && !shared.process.is_mine(&session)
        {
            let process = naming::process_of(&session).to_owned();
            let keys = Arc::clone(keys);
            found
                .entry(process)
                .or_default()
                .push(Found { keys, session });
        }
    }
    count
}

/// Ends the sessions of those processes that are gone. Gives when the next one may be.
async fn clear(live: &Live, found: HashMap<String, Vec<Found>>) -> Option<Duration> {
    if found.is_empty() {
        return Some(Duration::MAX);
    }
    let mut pipeline = Pipeline::new();
    for process in found.keys() {
        pipeline.cmd("PTTL").arg(naming::sign_of_life(process));
    }
    let answers = live.execute(&pipeline).await.ok()?;
    let mut next = Duration::MAX;
    let mut over = Vec::new();
    for (sessions, answer) in found.into_values().zip(answers) {
        match answer {
            Value::Int(left @ 0..) => {
                let left = Duration::from_millis(left.unsigned_abs() + 1);
                next = next.min(left + random_part(SPREAD));
            }
            // Not there.
            Value::Int(-2) => over.extend(sessions),
            _ => {}
        }
    }
    if over.is_empty() {
        return Some(next);
    }
    let mut pipeline = Pipeline::new();
    for found in &over {
        pipeline.add_command(reclaim(&found.keys, &found.session, Reclaim::IfGone));
    }
    for (found, answer) in over.iter().zip(live.execute(&pipeline).await.ok()?) {
        if let Value::Int(count @ 0..) = answer {
            let (queue, session) = (&found.keys.queue, &found.session);
            tracing::info!(queue, session, count, "returned the work of a dead server");
        }
    }
    // There may be more of them.
    Some(Duration::from_millis(10) + random_part(SPREAD))
}

impl Monitor {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Watched>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

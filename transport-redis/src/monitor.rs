//! Returns the work of dead servers. Every server watches its services; any number may.

use std::sync::Arc;
use std::time::Duration;

use redis::{Pipeline, Value};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::QUEUE_TTL;
use crate::completer::millis;
use crate::connection::random_part;
use crate::naming::ServiceKeys;
use crate::settle_batch::reclaim;
use crate::transport::Shared;

/// The most sessions that are ended in one go.
const PAGE: usize = 8;

/// The longest grace for renewals after Redis could not be asked.
const GRACE_MAX: Duration = Duration::from_secs(2);

/// How long several monitors spread over when a lease ends.
const SPREAD: Duration = Duration::from_millis(150);

/// Watches the leases of one service until `ending`.
pub(crate) async fn watch(shared: Arc<Shared>, keys: Arc<ServiceKeys>, ending: CancellationToken) {
    let lease = shared.config.lease;
    let mut asked = Instant::now();
    let mut pause = lease / 3;
    loop {
        if ending.run_until_cancelled(sleep(pause)).await.is_none() {
            return;
        }
        let Some(soonest) = soonest(&shared, &keys, &ending).await else {
            pause = Duration::from_millis(100) + random_part(SPREAD);
            continue;
        };
        if asked.elapsed() > lease {
            // Redis stood still or was away, and so nobody could renew: give them the time to.
            asked = Instant::now();
            pause = (lease / 2).min(GRACE_MAX);
            continue;
        }
        asked = Instant::now();
        pause = match soonest {
            Soonest::None => lease / 3,
            Soonest::In(left) => {
                (left + Duration::from_millis(1) + random_part(SPREAD)).min(lease / 3)
            }
            Soonest::Over(sessions) => {
                let mut pipeline = Pipeline::new();
                for session in &sessions {
                    pipeline.add_command(reclaim(&keys, session, false));
                }
                if let Some(answers) = shared.link.try_execute(&pipeline).await {
                    report(&keys, &answers);
                }
                Duration::from_millis(10) + random_part(SPREAD)
            }
        };
    }
}

/// The leases that end first.
enum Soonest {
    None,
    In(Duration),
    Over(Vec<String>),
}

/// Asks for the leases that end first; `None` if Redis cannot be asked.
async fn soonest(
    shared: &Shared,
    keys: &ServiceKeys,
    ending: &CancellationToken,
) -> Option<Soonest> {
    let mut live = shared.link.clone().ready(ending).await?;
    let mut pipeline = Pipeline::new();
    pipeline.cmd("TIME");
    pipeline
        .cmd("ZRANGE")
        .arg(&keys.sessions)
        .arg(0)
        .arg(PAGE - 1)
        .arg("WITHSCORES");
    // A queue lives as long as its requests do, as far as its senders know. Those of plain peers, and what is longer than the
    // life of others, must not vanish while somebody serves.
    pipeline
        .cmd("PEXPIRE")
        .arg(&keys.queue)
        .arg(millis(QUEUE_TTL))
        .arg("GT");
    let answers = live.execute(&pipeline).await.ok()?;
    let [time, Value::Array(entries), _] = answers.as_slice() else {
        return None;
    };
    let now = crate::connection::time_of(time)? / 1000;
    let mut over = Vec::new();
    for entry in entries {
        let Value::Array(pair) = entry else {
            return None;
        };
        let [Value::BulkString(session), Value::Double(end)] = pair.as_slice() else {
            return None;
        };
        // A lease's end is a number of milliseconds, far below what a float holds exactly.
        let end = *end as u64;
        if end > now {
            if over.is_empty() {
                return Some(Soonest::In(Duration::from_millis(end - now)));
            }
            break;
        }
        over.push(String::from_utf8(session.clone()).ok()?);
    }
    Some(if over.is_empty() {
        Soonest::None
    } else {
        Soonest::Over(over)
    })
}

fn report(keys: &ServiceKeys, answers: &[Value]) {
    for answer in answers {
        if let Value::Int(count @ 0..) = answer {
            tracing::info!(
                queue = keys.queue,
                count,
                "returned the work of a server whose lease was over"
            );
        }
    }
}

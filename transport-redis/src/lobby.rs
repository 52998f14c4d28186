//! Where subscriptions without much to do wait together, on one connection.
//!
//! It waits for all their bells at once. Whoever is rung for claims over the shared connection, which is one trip more than a
//! connection of its own takes. A bell that nobody here waits for any more is rung again, for others.

use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use redis::RedisResult;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use crate::command::{Cmd, Pipeline};
use crate::completer::millis;
use crate::connection::{Backoff, Live};
use crate::naming::ServiceKeys;
use crate::transport::Shared;
use crate::value::Value;
use crate::{GHOST, QUEUE_TTL, error, scripts};

/// How long one wait is. Shorter than on a connection of its own, since it is for many: so long a lost connection may go on to
/// wait at the broker and take a ring, and so long work waits of which nobody told.
const WAIT: Duration = Duration::from_secs(2);

/// A socket that takes longer to answer is given up.
const ANSWER: Duration = Duration::from_secs(4);

/// For how long a bell that cannot be waited for is left out.
const LEFT_OUT: Duration = Duration::from_secs(30);

/// The waiting subscriptions of a transport.
#[derive(Debug, Default)]
pub(crate) struct Lobby {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<Arc<Waiting>>,
    /// Bells to be rung again.
    for_others: Vec<String>,
}

#[derive(Debug)]
struct Waiting {
    keys: Arc<ServiceKeys>,
    /// Keeps one ring, if nobody listens at the moment.
    rung: Notify,
}

/// A place in the lobby, held until it is dropped. To be held only while there is a free slot: what is rung here, nobody else
/// hears.
pub(crate) struct Seat {
    shared: Arc<Shared>,
    waiting: Arc<Waiting>,
}

impl Seat {
    pub(crate) fn new(shared: &Arc<Shared>, keys: &Arc<ServiceKeys>) -> Self {
        let waiting = Arc::new(Waiting {
            keys: Arc::clone(keys),
            rung: Notify::new(),
        });
        shared.lobby.lock().waiting.push(Arc::clone(&waiting));
        shared.lobby.changed.notify_one();
        Self {
            shared: Arc::clone(shared),
            waiting,
        }
    }

    /// Waits for the bell, or for work of which nobody told.
    pub(crate) async fn rung(&self) {
        self.waiting.rung.notified().await;
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let lobby = &self.shared.lobby;
        let mut state = lobby.lock();
        state
            .waiting
            .retain(|waiting| !Arc::ptr_eq(waiting, &self.waiting));
        // Under the lock, so that it is rung before this or not at all.
        if self.waiting.rung.notified().now_or_never().is_some() {
            state.for_others.push(self.waiting.keys.bell.clone());
            lobby.changed.notify_one();
        }
    }
}

impl Lobby {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> Vec<Arc<ServiceKeys>> {
        let state = self.lock();
        let mut waiting: Vec<_> = state
            .waiting
            .iter()
            .map(|one| Arc::clone(&one.keys))
            .collect();
        drop(state);
        waiting.sort_by(|one, other| one.bell.cmp(&other.bell));
        waiting.dedup_by(|one, other| one.bell == other.bell);
        waiting
    }

    /// True if somebody waits for a bell that is none of these, or one is to be rung again.
    fn has_more_than(&self, bells: &[Arc<ServiceKeys>]) -> bool {
        let state = self.lock();
        let known = |waiting: &Arc<Waiting>| {
            let by_bell = |keys: &Arc<ServiceKeys>| keys.bell.cmp(&waiting.keys.bell);
            bells.binary_search_by(by_bell).is_ok()
        };
        !state.for_others.is_empty() || !state.waiting.iter().all(known)
    }

    fn is_empty(&self) -> bool {
        let state = self.lock();
        state.waiting.is_empty() && state.for_others.is_empty()
    }

    /// Tells one of those who wait for this bell, each in turn.
    fn ring(&self, bell: &str) {
        let mut state = self.lock();
        match state.waiting.iter().position(|one| one.keys.bell == bell) {
            Some(at) => {
                let waiting = state.waiting.remove(at);
                waiting.rung.notify_one();
                state.waiting.push(waiting);
            }
            None => state.for_others.push(bell.to_owned()),
        }
    }
}

/// Waits for bells until the end of the transport.
pub(crate) async fn run(shared: Arc<Shared>) {
    let waiting = async {
        let mut backoff = Backoff::default();
        let mut ghost_until = Instant::now();
        loop {
            while shared.lobby.is_empty() {
                shared.lobby.changed.notified().await;
            }
            let opened = tokio::select! {
                opened = shared.connector.open_patiently(ANSWER, &shared.ending) => opened,
                () = look_meanwhile(&shared) => None,
            };
            let Some(live) = opened else { return };
            let since = Instant::now();
            if let Err(error) = wait(&shared, live, ghost_until).await {
                tracing::debug!(%error, "bells are waited for again");
            }
            // The lost connection may still wait at the broker, and take one ring.
            ghost_until = Instant::now() + ANSWER;
            if since.elapsed() > Duration::from_secs(1) {
                backoff = Backoff::default();
            }
            backoff.pause().await;
        }
    };
    shared.ending.run_until_cancelled(waiting).await;
}

/// Looks for work as long as there is no connection to wait on: Redis may take no more of them.
async fn look_meanwhile(shared: &Shared) {
    loop {
        sleep(WAIT).await;
        if let Some(live) = shared.link.now() {
            let services = shared.lobby.waiting();
            if let Err(error) = wake_who_has_work(&shared.lobby, &live, &services).await {
                tracing::debug!(%error, "work is looked for again");
            }
        }
    }
}

/// Waits on this connection; fails when it does.
async fn wait(shared: &Shared, live: Live, ghost_until: Instant) -> RedisResult<()> {
    let lobby = &shared.lobby;
    // An answer may have been lost with the connection before.
    let mut look_at = Instant::now();
    let mut left_out = LeftOut::default();
    loop {
        let bells = lobby.waiting();
        let for_others = mem::take(&mut lobby.lock().for_others);
        if bells.is_empty() && for_others.is_empty() {
            tokio::select! {
                () = lobby.changed.notified() => continue,
                () = live.broken.cancelled() => return Ok(()),
            }
        }
        let now = Instant::now();
        let block = if now < ghost_until { WAIT / 4 } else { WAIT };
        let look = now >= look_at;
        let waited = async {
            if look {
                wake_who_has_work(lobby, &live, &bells).await?;
            }
            wait_once(shared, &live, &bells, &for_others, &mut left_out, block).await
        };
        let waited = waited.await;
        match waited {
            // Those who are rung for all the time must not keep the others from being looked after.
            Ok(true) if look => look_at = now + WAIT,
            Ok(true) => {}
            // Nobody rang, which is no proof that there is nothing.
            Ok(false) => look_at = Instant::now(),
            Err(error) => {
                // Perhaps they were not rung.
                lobby.lock().for_others.extend(for_others);
                return Err(error);
            }
        }
    }
}

/// Rings for others, and waits once. True if there was a ring.
async fn wait_once(
    shared: &Shared,
    live: &Live,
    bells: &[Arc<ServiceKeys>],
    for_others: &[String],
    left_out: &mut LeftOut,
    block: Duration,
) -> RedisResult<bool> {
    let own = shared.process.bell();
    let mut pipeline = Pipeline::new();
    for bell in for_others {
        pipeline.add_command(ring(bell, QUEUE_TTL));
    }
    let wait = pipeline.cmd("BZPOPMIN").arg(&own);
    for keys in bells.iter().filter(|keys| !left_out.contains(&keys.bell)) {
        wait.arg(&keys.bell);
    }
    wait.arg(block.as_secs_f64());
    let mut answers = answers(shared, live, &pipeline, bells).await?;
    let popped = answers.pop();
    // A bell of others that is refused for good is theirs to see to.
    let refused =
        |answer: &&Value| matches!(answer, Value::ServerError(error) if !error::is_lasting(error));
    if let Some(Value::ServerError(error)) = answers.iter().find(refused) {
        return Err(error.clone().into());
    }
    match popped {
        Some(Value::Array(popped)) => {
            if let Some(Value::BulkString(bell)) = popped.first()
                && *bell != own.as_bytes()
            {
                shared.lobby.ring(&String::from_utf8_lossy(bell));
            }
            Ok(true)
        }
        Some(Value::ServerError(error)) => {
            if error::is_lasting(&error) && left_out.find(live, bells).await? {
                return Ok(true);
            }
            Err(error.into())
        }
        _ => Ok(false),
    }
}

/// Bells that cannot be waited for, because of their kind or of our rights. One of them would spoil the wait for all; without
/// it its service is looked at from time to time.
#[derive(Default)]
struct LeftOut {
    bells: Vec<String>,
    until: Option<Instant>,
}

impl LeftOut {
    fn contains(&mut self, bell: &str) -> bool {
        if self.until.is_some_and(|until| Instant::now() >= until) {
            *self = Self::default();
        }
        self.bells.iter().any(|left_out| left_out == bell)
    }

    /// Asks for each one by itself. True if there are some that were waited for.
    async fn find(&mut self, live: &Live, bells: &[Arc<ServiceKeys>]) -> RedisResult<bool> {
        let before = self.bells.len();
        let mut pipeline = Pipeline::new();
        for keys in bells {
            pipeline.cmd("TYPE").arg(&keys.bell);
        }
        for (keys, answer) in bells.iter().zip(live.execute(&pipeline).await?) {
            let can_ring =
                matches!(answer, Value::SimpleString(kind) if kind == "zset" || kind == "none");
            if !can_ring && !self.bells.contains(&keys.bell) {
                tracing::warn!(bell = keys.bell, "a bell cannot be waited for");
                self.bells.push(keys.bell.clone());
            }
        }
        self.until = Some(Instant::now() + LEFT_OUT);
        Ok(self.bells.len() > before)
    }
}

/// Runs a blocking pipeline, and interrupts it when there is somebody who waits for a bell that it does not wait for.
async fn answers(
    shared: &Shared,
    live: &Live,
    pipeline: &Pipeline,
    bells: &[Arc<ServiceKeys>],
) -> RedisResult<Vec<Value>> {
    let mut answers = std::pin::pin!(live.execute(pipeline));
    let interrupt = async {
        while !shared.lobby.has_more_than(bells) {
            shared.lobby.changed.notified().await;
        }
        let mut pipeline = Pipeline::new();
        pipeline.add_command(ring(&shared.process.bell(), GHOST));
        while shared.link.try_execute(&pipeline).await.is_none() {
            sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        answers = &mut answers => return answers,
        () = interrupt => {}
    }
    answers.await
}

fn ring(bell: &str, ttl: Duration) -> Cmd {
    let mut command = scripts::RING.on(&[bell]);
    command.arg(millis(ttl));
    command
}

/// Wakes those whose service has work, whether anybody rang or not: a plain peer need not, and a ring may be lost.
async fn wake_who_has_work(
    lobby: &Lobby,
    live: &Live,
    services: &[Arc<ServiceKeys>],
) -> RedisResult<()> {
    if services.is_empty() {
        return Ok(());
    }
    let mut all = Cmd::new("EXISTS");
    let mut each = Pipeline::new();
    for keys in services {
        all.arg(&keys.queue).arg(&keys.returned);
        each.cmd("EXISTS").arg(&keys.queue).arg(&keys.returned);
    }
    let mut pipeline = Pipeline::new();
    pipeline.add_command(all);
    if live.execute(&pipeline).await?.first() == Some(&Value::Int(0)) {
        return Ok(());
    }
    for (keys, answer) in services.iter().zip(live.execute(&each).await?) {
        if matches!(answer, Value::Int(1..)) {
            lobby.ring(&keys.bell);
        }
    }
    Ok(())
}

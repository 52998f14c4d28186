//! Takes work for a subscription: from the lobby while there is little, on a connection of its own while there is much.

use std::mem;
use std::sync::Arc;
use std::time::Duration;

use antiphon_core::transport::{SubscribeMode, SubscribeOptions};
use antiphon_core::{Error, Executed};
use futures_util::FutureExt;
use redis::RedisResult;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::claim::{self, Claimed};
use crate::command::Pipeline;
use crate::completer::millis;
use crate::connection::{Backoff, Live};
use crate::isolation::{Isolation, Plan};
use crate::lobby::Seat;
use crate::monitor::Watch;
use crate::naming::ServiceKeys;
use crate::opening::Opening;
use crate::registration::Refusal;
use crate::scan::Last;
use crate::session::{Session, Slots, Token};
use crate::subscription::Buffer;
use crate::transport::Shared;
use crate::value::Value;
use crate::{BLOCK, GHOST, QUEUE_TTL, error, scripts};

/// The most that one claim takes.
const CLAIM_MAX: usize = 512;

/// A subscription that finds work twice in this time takes it on a connection of its own.
const BUSY: Duration = Duration::from_secs(1);

/// The task behind a subscription.
pub(crate) struct Taker {
    pub(crate) shared: Arc<Shared>,
    pub(crate) keys: Arc<ServiceKeys>,
    pub(crate) options: SubscribeOptions,
    buffer: Arc<Buffer>,
    pub(crate) stopping: CancellationToken,
    slots: Arc<Slots>,
    session: Arc<Session>,
    /// The first token of the next claim. What a claim took whose answer never came has this number or a higher one.
    pub(crate) next: u64,
    /// The monitors know that the session may hold work.
    known: bool,
    last: Last,
    watch: Watch,
}

/// Why taking ended, in one place or altogether.
enum Exit {
    /// There is enough work for this connection of its own.
    Busy(Live),
    /// There is too little for one.
    Idle,
    Stopped,
    Lost,
    Broken,
}

impl Taker {
    /// Registers the first session.
    pub(crate) async fn begin(
        shared: &Arc<Shared>,
        keys: &Arc<ServiceKeys>,
        options: SubscribeOptions,
        buffer: Arc<Buffer>,
        stopping: CancellationToken,
    ) -> Result<Self, Error> {
        let slots = Arc::new(Slots::default());
        let session = Session::new(shared.process.next_name(), keys, &slots);
        let mut taker = Self {
            shared: Arc::clone(shared),
            keys: Arc::clone(keys),
            options,
            buffer,
            stopping,
            slots,
            session: Arc::clone(&session),
            next: 0,
            known: false,
            last: Last::default(),
            watch: Watch::new(shared, keys),
        };
        match taker.join(&session, None).await {
            Ok(()) => {
                // Once: it must not come back over the one that fences it off in turn.
                if taker.options.mode == SubscribeMode::TakeOver {
                    taker.options.mode = SubscribeMode::Exclusive;
                }
                Ok(taker)
            }
            Err(Refusal::Final(error) | Refusal::ForNow(error)) => {
                taker.undo(&session).await;
                Err(error)
            }
        }
    }

    /// Takes until it is stopped.
    pub(crate) async fn run(mut self) {
        let mut backoff = Backoff::default();
        let mut ghost_until = Instant::now();
        loop {
            let since = Instant::now();
            if let Exit::Stopped = self.serve(&mut ghost_until).await {
                break;
            }
            if since.elapsed() > Duration::from_secs(1) {
                backoff = Backoff::default();
            }
            let pause = backoff.pause();
            if self.stopping.run_until_cancelled(pause).await.is_none() {
                break;
            }
            if let Err(error) = self.succeed().await {
                if !self.stopping.is_cancelled() {
                    tracing::warn!(%error, "a subscription ended");
                }
                self.buffer.end(error);
                break;
            }
        }
        self.buffer.end(error::closed());
        self.buffer.give_back().await;
        self.retire(&self.session).await;
    }

    /// Goes on under a new name: what the old one still has on its way is refused. Fails if others own the service, and
    /// if the queue is of another kind; all else is tried until it is stopped.
    async fn succeed(&mut self) -> Result<(), Error> {
        let old = Arc::clone(&self.session);
        let name = self.shared.process.next_name();
        let session = Session::new(name, &self.keys, &self.slots);
        let mut backoff = Backoff::default();
        // Before the old one leaves, or somebody else might become the owner in between. Also if its lease is over by our
        // clock: as long as the registry shows it as the owner, nobody else was let in.
        while let Err(refusal) = self.join(&session, Some(&old)).await {
            let error = match refusal {
                Refusal::Final(error) => {
                    self.undo(&session).await;
                    return Err(error);
                }
                Refusal::ForNow(error) => error,
            };
            tracing::debug!(%error, "a subscription waits for Redis");
            let pause = backoff.pause();
            if self.stopping.run_until_cancelled(pause).await.is_none() {
                // It may be registered, if an answer was lost.
                self.undo(&session).await;
                return Err(error::closed());
            }
        }
        self.retire(&old).await;
        self.session = session;
        self.next = 0;
        self.known = false;
        Ok(())
    }

    /// Takes under the present session, here or there, as much as there are free slots.
    async fn serve(&mut self, ghost_until: &mut Instant) -> Exit {
        let mut isolation = Isolation::new(self.shared.config.lease);
        loop {
            let live = match self.take_from_lobby(&mut isolation).await {
                Exit::Busy(live) => live,
                exit => return exit,
            };
            match self.take(live, &mut isolation, *ghost_until).await {
                Exit::Idle => {}
                Exit::Broken => {
                    *ghost_until = Instant::now() + GHOST;
                    return Exit::Broken;
                }
                exit => return exit,
            }
        }
    }

    /// Takes on the shared connection, when the lobby tells that there is something; if there is much, until it has a connection
    /// of its own. Redis may take no more of them for a while.
    async fn take_from_lobby(&mut self, isolation: &mut Isolation) -> Exit {
        let mut opening = Opening::default();
        let mut wait = false;
        let mut seat = None;
        let mut took = None;
        let mut calm = Instant::now() + BLOCK;
        loop {
            if let Some(live) = opening.opened().now_or_never() {
                return Exit::Busy(live);
            }
            let session = Arc::clone(&self.session);
            let held = self.slots.held();
            let (count, suspects) = match isolation.plan(
                held,
                self.options.prefetch,
                Instant::now(),
            ) {
                Plan::Claim { count, suspects } => (count, suspects),
                Plan::Wait { until } => {
                    seat = None;
                    tokio::select! {
                        () = self.slots.freed.notified() => {}
                        () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => {}
                        live = opening.opened() => return Exit::Busy(live),
                        () = self.stopping.cancelled() => return Exit::Stopped,
                        () = session.lease.cancelled() => return Exit::Lost,
                    }
                    continue;
                }
            };
            if wait {
                let seat = seat.get_or_insert_with(|| Seat::new(&self.shared, &self.keys));
                tokio::select! {
                    () = seat.rung() => {}
                    live = opening.opened() => return Exit::Busy(live),
                    // There may be something else to claim then.
                    () = self.slots.freed.notified() => continue,
                    () = sleep_until(calm), if self.known && held == 0 => {
                        opening = Opening::default();
                        match self.rest(&session).await {
                            Some(exit) => return exit,
                            None => continue,
                        }
                    }
                    () = self.stopping.cancelled() => return Exit::Stopped,
                    () = session.lease.cancelled() => return Exit::Lost,
                }
            }
            let pipeline = self.claim(count.min(CLAIM_MAX), suspects, None);
            let answers = tokio::select! {
                answers = on_link(&self.shared, &pipeline) => answers,
                () = self.stopping.cancelled() => return Exit::Stopped,
                () = session.lease.cancelled() => return Exit::Lost,
            };
            let before = self.next;
            let claimed = match self.claimed(answers).await {
                Ok(claimed) => claimed,
                Err(exit) => return exit,
            };
            isolation.note(&claimed, self.slots.held(), Instant::now());
            wait = !claimed.fresh_left;
            if self.next > before {
                let now = Instant::now();
                let again = took.replace(now).is_some_and(|took| now < took + BUSY);
                if again || claimed.fresh_left {
                    opening.begin(&self.shared, &self.stopping);
                }
                calm = now + BLOCK;
            }
        }
    }

    /// Tells the monitors that the session holds nothing. If nobody knows whether they were told, the session is over: told
    /// late, they would not look for what it holds by then.
    async fn rest(&mut self, session: &Session) -> Option<Exit> {
        let mut pipeline = Pipeline::new();
        let remove = pipeline.cmd("SREM").arg(&self.keys.holding);
        remove.arg(&session.name);
        tokio::select! {
            answers = on_link(&self.shared, &pipeline) => match answers.as_deref() {
                Ok([Value::Int(_)]) => {
                    self.known = false;
                    None
                }
                _ => Some(Exit::Broken),
            },
            () = self.stopping.cancelled() => Some(Exit::Stopped),
            () = session.lease.cancelled() => Some(Exit::Lost),
        }
    }

    /// Takes on this connection, until there is little to take.
    async fn take(&mut self, live: Live, isolation: &mut Isolation, ghost_until: Instant) -> Exit {
        let mut wait = false;
        let mut took = Instant::now();
        loop {
            let session = Arc::clone(&self.session);
            let until =
                match isolation.plan(self.slots.held(), self.options.prefetch, Instant::now()) {
                    Plan::Claim { count, suspects } => {
                        let block = wait.then(|| {
                            if Instant::now() < ghost_until {
                                BLOCK / 10
                            } else {
                                BLOCK
                            }
                        });
                        let pipeline = self.claim(count.min(CLAIM_MAX), suspects, block);
                        // Stopped in the middle, the claim may still be executed. Then what it took is found by its number.
                        let answers = tokio::select! {
                            answers = live.execute(&pipeline) => answers,
                            () = self.stopping.cancelled() => return Exit::Stopped,
                            () = session.lease.cancelled() => return Exit::Lost,
                        };
                        let before = self.next;
                        match self.claimed(answers).await {
                            Ok(claimed) => {
                                let now = Instant::now();
                                isolation.note(&claimed, self.slots.held(), now);
                                wait = !claimed.fresh_left;
                                if self.next > before {
                                    took = now;
                                } else if wait && now >= took + BLOCK {
                                    return Exit::Idle;
                                }
                            }
                            Err(exit) => return exit,
                        }
                        continue;
                    }
                    Plan::Wait { until } => until,
                };
            tokio::select! {
                () = self.slots.freed.notified() => {}
                () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => {}
                () = self.stopping.cancelled() => return Exit::Stopped,
                () = session.lease.cancelled() => return Exit::Lost,
                () = live.broken.cancelled() => return Exit::Broken,
            }
        }
    }

    fn claim(&self, count: usize, suspects: u8, block: Option<Duration>) -> Pipeline {
        let keys = &self.keys;
        let mut pipeline = Pipeline::new();
        if let Some(block) = block {
            pipeline
                .cmd("BZPOPMIN")
                .arg(&keys.bell)
                .arg(block.as_secs_f64());
        }
        let mut command = scripts::CLAIM.on(&[
            &keys.live,
            &keys.queue,
            &keys.returned,
            &self.session.held_key,
            &keys.bell,
            &keys.holding,
        ]);
        command
            .arg(&self.session.name)
            .arg(count)
            .arg(self.next)
            .arg(suspects)
            .arg(millis(QUEUE_TTL))
            .arg(u8::from(!self.known));
        pipeline.add_command(command);
        pipeline.cmd("TIME");
        pipeline
    }

    /// Hands over what was claimed.
    async fn claimed(&mut self, answers: RedisResult<Vec<Value>>) -> Result<Claimed, Exit> {
        let mut answers = answers.map_err(|error| {
            tracing::debug!(%error, "work is taken again");
            Exit::Broken
        })?;
        // If only the bell or the clock was refused, the work is here all the same.
        let refused = error::first_refusal(&answers).cloned();
        if let Some(error) = &refused {
            tracing::warn!(
                queue = self.keys.queue,
                code = error.code(),
                "work cannot be taken"
            );
        }
        let time = answers.pop();
        let claimed = match answers.pop() {
            Some(Value::Int(_)) => {
                // Reclaimed, or the broker lost its data.
                self.session.lease.cancel();
                return Err(Exit::Lost);
            }
            Some(answer) => Claimed::parse(answer),
            None => None,
        };
        let Some(mut claimed) = claimed else {
            return Err(Exit::Broken);
        };
        let frames = mem::take(&mut claimed.frames);
        if frames.is_empty() {
            return match refused {
                Some(_) => Err(Exit::Broken),
                None => Ok(claimed),
            };
        }
        let now = time
            .as_ref()
            .and_then(crate::connection::time_of)
            .map(|micros| micros / 1000)
            .or_else(|| self.shared.clock.now())
            .unwrap_or_default();
        if !mem::replace(&mut self.known, true) {
            self.watch.warm();
        }
        let first = Token {
            number: self.next,
            attempt: claimed.attempt.max(1),
        };
        self.next += frames.len() as u64;
        self.session.hold(frames.len());
        let taken = claim::deliveries(
            &self.shared,
            &self.session,
            first,
            frames,
            now,
            &mut self.last,
            &self.stopping,
        )
        .await;
        self.buffer.add(taken);
        // Handlers first: those that end at once are settled before the next wait is written.
        yield_now().await;
        match refused {
            Some(_) => Err(Exit::Broken),
            None => Ok(claimed),
        }
    }
}

/// Runs commands on the shared connection, as soon as there is one.
async fn on_link(shared: &Shared, pipeline: &Pipeline) -> RedisResult<Vec<Value>> {
    match shared.link.clone().ready(&shared.ending).await {
        Some(live) => live.execute(pipeline).await,
        None => Err(std::io::Error::from(std::io::ErrorKind::NotConnected).into()),
    }
}

/// What the caller of a request is told that no handler can be given.
pub(crate) fn executed(attempt: u32) -> Executed {
    if attempt > 1 {
        Executed::Maybe
    } else {
        Executed::No
    }
}

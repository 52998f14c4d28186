//! Takes work for a subscription, on a connection of its own.

use std::sync::Arc;
use std::time::Duration;

use antiphon_core::transport::SubscribeOptions;
use antiphon_core::{Error, Executed};
use redis::{Pipeline, RedisResult, Value};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::claim::{self, Claimed};
use crate::completer::millis;
use crate::connection::{Backoff, Live};
use crate::isolation::{Isolation, Plan};
use crate::naming::ServiceKeys;
use crate::registration::Refusal;
use crate::session::{Session, Slots, Token};
use crate::subscription::Buffer;
use crate::transport::Shared;
use crate::{BLOCK, GHOST, QUEUE_TTL, error, scripts};

/// The most that one claim takes.
const CLAIM_MAX: usize = 512;

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
}

/// Why taking ended.
enum Exit {
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
        let session = Session::new(keys, &slots);
        let taker = Self {
            shared: Arc::clone(shared),
            keys: Arc::clone(keys),
            options,
            buffer,
            stopping,
            slots,
            session: Arc::clone(&session),
            next: 0,
        };
        match taker.join(&session, None).await {
            Ok(()) => Ok(taker),
            Err(Refusal::Final(error) | Refusal::ForNow(error)) => Err(error),
        }
    }

    /// Takes until it is stopped.
    pub(crate) async fn run(mut self) {
        let mut backoff = Backoff::default();
        let mut ghost_until = Instant::now();
        let answer = BLOCK + Duration::from_secs(2);
        while let Some(live) = self
            .shared
            .connector
            .open_patiently(answer, &self.stopping)
            .await
        {
            let since = Instant::now();
            match self.take(live, ghost_until).await {
                Exit::Stopped => break,
                Exit::Lost => {}
                Exit::Broken => ghost_until = Instant::now() + GHOST,
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
        let session = Session::new(&self.keys, &self.slots);
        let mut backoff = Backoff::default();
        // Before the old one leaves, or somebody else might become the owner in between. Also if its lease is over by our
        // clock: as long as the registry shows it as the owner, nobody else was let in.
        while let Err(refusal) = self.join(&session, Some(&old)).await {
            let error = match refusal {
                Refusal::Final(error) => return Err(error),
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
        Ok(())
    }

    /// Takes on this connection, as much as there are free slots.
    async fn take(&mut self, mut live: Live, ghost_until: Instant) -> Exit {
        let mut isolation = Isolation::new(self.shared.config.lease);
        let mut wait = false;
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
                        match self.claimed(answers).await {
                            Ok(claimed) => {
                                isolation.note(&claimed, self.slots.held(), Instant::now());
                                wait = !claimed.fresh_left;
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
        ]);
        command
            .arg(&self.session.name)
            .arg(count)
            .arg(self.next)
            .arg(suspects)
            .arg(millis(QUEUE_TTL));
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
        let frames = std::mem::take(&mut claimed.frames);
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
        let first = self.next;
        self.next += frames.len() as u64;
        self.session.hold(frames.len());
        let tokens = (first..).map(|number| Token {
            number,
            attempt: claimed.attempt.max(1),
        });
        let work = tokens.zip(frames).collect();
        let taken = claim::deliveries(&self.shared, &self.session, work, now, &self.stopping).await;
        self.buffer.add(taken);
        // Handlers first: those that end at once are settled before the next wait is written.
        yield_now().await;
        match refused {
            Some(_) => Err(Exit::Broken),
            None => Ok(claimed),
        }
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

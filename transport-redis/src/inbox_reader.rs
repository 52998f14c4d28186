//! Reads an inbox: without popping, so that a lost connection loses nothing.

use std::sync::Arc;
use std::time::Duration;

use antiphon_core::transport::{InboxEvent, Incoming};
use antiphon_core::{Deadline, Error, ErrorKind, Request};
use futures_util::{StreamExt, TryStreamExt, stream};
use redis::RedisResult;
use tokio::sync::mpsc;
use tokio::task::yield_now;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::audience::Audiences;
use crate::claim::{FETCH, TRIPS};
use crate::command::{Cmd, Pipeline};
use crate::completer::millis;
use crate::connection::{self, Backoff, Live};
use crate::frame::{self, Letter, RequestFrame};
use crate::naming::{self, InboxKeys};
use crate::transport::Shared;
use crate::value::Value;
use crate::{BLOCK, GHOST, QUEUE_TTL, error, scripts};

/// The most replies of one page.
const PAGE: usize = 256;

/// After so many replies they are acknowledged,
const ACK_REPLIES: usize = 256;

/// or after so many bytes of them.
const ACK_BYTES: usize = 256 * 1024;

/// Reads an inbox, on a connection of its own.
pub(crate) struct Reader {
    shared: Arc<Shared>,
    keys: InboxKeys,
    audiences: Audiences,
    /// When it was last seen to that the inbox stays in them, and how often the process had been taken for dead by then.
    attended: (Instant, u64),
    epoch: String,
    /// Replies read and not acknowledged.
    read: usize,
    bytes: usize,
    acknowledged: Instant,
    /// Keys of bodies that were read with them.
    bodies: Vec<String>,
}

impl Reader {
    pub(crate) fn new(shared: Arc<Shared>, keys: InboxKeys, audiences: Audiences) -> Self {
        let attended = (Instant::now(), shared.leases.gone());
        Self {
            shared,
            keys,
            audiences,
            attended,
            epoch: String::new(),
            read: 0,
            bytes: 0,
            acknowledged: Instant::now(),
            bodies: Vec::new(),
        }
    }

    /// Becomes the reader. True if there was one before, so that the inbox is as it was left.
    pub(crate) async fn begin(&mut self, live: &Live) -> RedisResult<bool> {
        self.epoch = naming::random_id();
        self.read = 0;
        self.bytes = 0;
        self.bodies.clear();
        self.acknowledged = Instant::now();
        let mut pipeline = Pipeline::new();
        let mut command = scripts::BEGIN.on(&[&self.keys.epoch(), self.keys.list()]);
        command
            .arg(&self.epoch)
            .arg(epoch_ttl(&self.shared))
            .arg(millis(self.shared.config.inbox_ttl));
        pipeline.add_command(command);
        self.attend(&mut pipeline);
        let answers = live.execute(&pipeline).await?;
        if let Some(error) = error::first_refusal(&answers) {
            return Err(error.clone().into());
        }
        Ok(answers.first() == Some(&Value::Int(1)))
    }

    pub(crate) async fn run(mut self, events: mpsc::Sender<InboxEvent>, ending: CancellationToken) {
        let mut ghost_until = Instant::now();
        let mut backoff = Backoff::default();
        while let Some(live) = self
            .shared
            .connector
            .open_patiently(self.block() + Duration::from_secs(2), &ending)
            .await
        {
            // On the first connection too: the broker may have been restarted since the inbox was opened.
            match ending.run_until_cancelled(self.begin(&live)).await {
                None => break,
                Some(Ok(true)) => {}
                Some(Ok(false)) => {
                    if events.send(lost()).await.is_err() {
                        break;
                    }
                }
                Some(Err(error)) => {
                    tracing::debug!(%error, "an inbox cannot be read");
                    if ending.run_until_cancelled(backoff.pause()).await.is_none() {
                        break;
                    }
                    continue;
                }
            }
            match ending
                .run_until_cancelled(self.read(live, &events, ghost_until, &mut backoff))
                .await
            {
                Some(Ok(())) | None => break,
                Some(Err(error)) => tracing::debug!(%error, "an inbox is read again"),
            }
            // The lost connection may still wait at the broker, and take one ring.
            ghost_until = Instant::now() + GHOST;
            if ending.run_until_cancelled(backoff.pause()).await.is_none() {
                break;
            }
        }
        let mut pipeline = Pipeline::new();
        let keys = [
            self.keys.list().to_owned(),
            self.keys.bell(),
            self.keys.epoch(),
        ];
        pipeline.cmd("UNLINK").arg(&keys).arg(&self.bodies);
        self.audiences.leave(&mut pipeline, self.keys.address());
        self.shared.link.try_execute(&pipeline).await;
    }

    /// Reads until the inbox is dropped; fails when the connection does.
    async fn read(
        &mut self,
        live: Live,
        events: &mpsc::Sender<InboxEvent>,
        ghost_until: Instant,
        backoff: &mut Backoff,
    ) -> RedisResult<()> {
        let mut wait = false;
        loop {
            let mut pipeline = Pipeline::new();
            let acknowledges = self.must_acknowledge();
            if acknowledges {
                pipeline.add_command(self.acknowledgement());
                if !self.bodies.is_empty() {
                    pipeline.cmd("UNLINK").arg(&self.bodies);
                }
                self.read = 0;
                self.bytes = 0;
                self.bodies.clear();
                self.acknowledged = Instant::now();
                // Seldom: each service costs a command.
                let (attended, gone) = self.attended;
                if gone != self.shared.leases.gone() || attended.elapsed() >= QUEUE_TTL / 4 {
                    self.attend(&mut pipeline);
                }
            }
            if wait {
                let block = if Instant::now() < ghost_until {
                    self.block().min(BLOCK / 10)
                } else {
                    self.block()
                };
                pipeline
                    .cmd("BZPOPMIN")
                    .arg(self.keys.bell())
                    .arg(block.as_secs_f64());
            }
            pipeline
                .cmd("LRANGE")
                .arg(self.keys.list())
                .arg(self.read)
                .arg(self.read + PAGE - 1);
            // As they are: an acknowledgement that was called again after the list was read would trim what is behind it.
            let mut answers = live.execute_as_is(&pipeline).await?;
            let acknowledged = match answers.first() {
                Some(answer) if acknowledges => Some(answer),
                _ => None,
            };
            if acknowledged.is_some_and(connection::is_missing_script) {
                // What was read is read again, from the beginning.
                if !self.begin(&live).await? && events.send(lost()).await.is_err() {
                    return Ok(());
                }
                wait = false;
                continue;
            }
            if acknowledged == Some(&Value::Int(0)) {
                // The broker lost the inbox: by FLUSHALL, a failover, or while this host was asleep.
                self.begin(&live).await?;
                wait = false;
                if events.send(lost()).await.is_err() {
                    return Ok(());
                }
                continue;
            }
            if let Some(error) = error::first_refusal(&answers) {
                return Err(error.clone().into());
            }
            *backoff = Backoff::default();
            let frames = match answers.pop() {
                Some(Value::Array(frames)) => frames,
                _ => Vec::new(),
            };
            wait = frames.len() < PAGE;
            if frames.is_empty() {
                continue;
            }
            self.read += frames.len();
            let replies = self.decode(frames, &live).await?;
            if replies.is_empty() {
                continue;
            }
            if events.send(InboxEvent::Replies(replies)).await.is_err() {
                return Ok(());
            }
            // Callers first: what they do next is written before the next wait.
            yield_now().await;
        }
    }

    /// The command that forgets what was read; if that is nothing, a cheaper one does for keeping the inbox.
    fn acknowledgement(&self) -> Cmd {
        let (epoch, ttl) = (self.keys.epoch(), epoch_ttl(&self.shared));
        if self.read == 0 {
            let mut command = Cmd::new("PEXPIRE");
            command.arg(epoch).arg(ttl);
            return command;
        }
        let mut command = scripts::ACK.on(&[&epoch, self.keys.list()]);
        command.arg(&self.epoch).arg(self.read);
        command.arg(ttl).arg(millis(self.shared.config.inbox_ttl));
        command
    }

    fn must_acknowledge(&self) -> bool {
        // Also by time, or the inbox of a slow and steady client would expire. Half a wait, so that each idle wait is
        // followed by one, which finds out if the inbox is still there.
        self.read >= ACK_REPLIES
            || self.bytes >= ACK_BYTES
            || self.acknowledged.elapsed() >= self.block() / 2
    }

    async fn decode(&mut self, frames: Vec<Value>, live: &Live) -> RedisResult<Vec<Incoming>> {
        let mut incoming = Vec::with_capacity(frames.len());
        let mut apart = Vec::new();
        for frame in frames {
            let Value::BulkString(bytes) = frame else {
                continue;
            };
            self.bytes += bytes.len();
            let (letter, id) = match frame::decode_letter(bytes) {
                Ok(Letter::Reply(frame)) => (Incoming::Reply(frame.reply), frame.apart),
                Ok(Letter::Request { service, mut frame }) => {
                    let id = frame.apart.take();
                    let request = self.left_of(frame);
                    (Incoming::Request { service, request }, id)
                }
                Ok(Letter::Ignored) => continue,
                Err(bad) => {
                    let (id, reason) = (bad.id, bad.reason);
                    (Incoming::Undecodable { id, reason }, None)
                }
            };
            apart.extend(id.map(|id| (incoming.len(), self.keys.body(&id))));
            incoming.push(letter);
        }
        self.shared
            .sender
            .pace
            .answered(incoming.iter().filter_map(|incoming| match incoming {
                Incoming::Reply(reply) => Some(&reply.id),
                Incoming::Request { .. } => None,
                Incoming::Undecodable { id, .. } => id.as_ref(),
            }));
        // While one answer is read, Redis writes the next.
        let trips: Vec<_> = apart
            .chunks(FETCH)
            .map(|few| fetch(live.clone(), few))
            .collect();
        let mut fetched = stream::iter(trips).buffered(TRIPS);
        let mut places = apart.iter();
        while let Some(answers) = fetched.try_next().await? {
            for (answer, (index, _)) in answers.into_iter().zip(&mut places) {
                let Some(slot) = incoming.get_mut(*index) else {
                    continue;
                };
                let (id, place) = match &mut *slot {
                    Incoming::Reply(reply) => {
                        let reply = Arc::make_mut(reply);
                        (&reply.id, &mut reply.body)
                    }
                    Incoming::Request { request, .. } => {
                        let request = Arc::make_mut(request);
                        (&request.id, &mut request.body)
                    }
                    Incoming::Undecodable { .. } => continue,
                };
                match answer {
                    Value::BulkString(body) => {
                        self.bytes += body.len();
                        *place = body;
                    }
                    // Nothing of this page is acknowledged: it is read again.
                    Value::ServerError(error) if !error::is_lasting(&error) => {
                        return Err(error.into());
                    }
                    _ => {
                        let id = Some(id.clone());
                        let reason = "the body is gone".to_owned();
                        *slot = Incoming::Undecodable { id, reason };
                    }
                }
            }
        }
        self.bodies.extend(apart.into_iter().map(|(_, key)| key));
        Ok(incoming)
    }

    /// How long one read waits: several times in the life of the inbox.
    fn block(&self) -> Duration {
        BLOCK.min(self.shared.config.inbox_ttl / 4)
    }

    /// Adds the commands by which the inbox stays in its audiences.
    fn attend(&mut self, pipeline: &mut Pipeline) {
        self.attended = (Instant::now(), self.shared.leases.gone());
        let inbox = self.keys.address();
        self.audiences.stay(&self.shared, pipeline, inbox);
    }

    /// A request with what is left of its budget now.
    fn left_of(&self, frame: RequestFrame) -> Arc<Request> {
        let mut request = frame.request;
        if let (Some(at), Some(now), Some(deadline)) =
            (frame.expiry.at, self.shared.clock.now(), request.deadline)
        {
            // The clock is late rather than early, so what it says is left is not too little.
            let left = Duration::from_millis(at.saturating_sub(now));
            let budget = match frame.expiry.budget {
                Some(_) => left.min(deadline.budget),
                None => left,
            };
            Arc::make_mut(&mut request).deadline = Some(Deadline { budget, ..deadline });
        }
        request
    }
}

/// Gets bodies in one trip.
fn fetch(
    live: Live,
    few: &[(usize, String)],
) -> impl Future<Output = RedisResult<Vec<Value>>> + use<> {
    let mut pipeline = Pipeline::new();
    for (_, key) in few {
        pipeline.cmd("GET").arg(key);
    }
    async move { live.execute(&pipeline).await }
}

/// Shorter than that of the replies: while the epoch is there, so is all that arrived.
fn epoch_ttl(shared: &Shared) -> u64 {
    millis(shared.config.inbox_ttl * 3 / 4)
}

fn lost() -> InboxEvent {
    InboxEvent::Lost(Error::maybe_executed(
        ErrorKind::ConnectionLost,
        "the broker lost the inbox, and replies with it",
    ))
}

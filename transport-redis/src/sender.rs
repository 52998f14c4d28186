//! Sends: whatever has piled up, in one trip.

use std::collections::VecDeque;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use antiphon_core::transport::Done;
use antiphon_core::{Error, ErrorKind, Reply, Request, ServiceName, Ticket};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::clock::{self, Clock};
use crate::config::RedisConfig;
use crate::connection::Link;
use crate::error;
use crate::naming::InboxKeys;
use crate::pace::Pace;
use crate::send_batch::Writer;

/// The most messages of one batch. Lua unpacks no more than about 8,000 values.
const BATCH_MAX: usize = 1024;

/// The most bytes of bodies in one batch, more or less.
const BATCH_BYTES: usize = 1 << 20;

/// The most batches under way at once: while one is on its way the next one fills.
const WAVES: usize = 2;

/// How often withdrawn requests are forgotten, queues get their time to live and the clock is read.
pub(crate) const TICK: Duration = Duration::from_secs(1);

/// How long answers are waited for at the end, each time.
const LAST_ANSWERS: Duration = Duration::from_millis(700);

/// The queue of sends.
#[derive(Debug, Default)]
pub(crate) struct Sender {
    queue: Mutex<Queue>,
    arrived: Notify,
    pub(crate) pace: Arc<Pace>,
}

#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

/// One message to send.
#[derive(Debug)]
pub(crate) enum Job {
    Request {
        service: ServiceName,
        request: Arc<Request>,
        expect_responder: bool,
        /// When it expires, by this host's clock; none if it never does.
        expires: Option<Instant>,
        done: Done,
    },
    Reply {
        to: InboxKeys,
        reply: Arc<Reply>,
        done: Done,
    },
}

impl Job {
    pub(crate) fn finish(self, result: Result<(), Error>) {
        let (Self::Request { done, .. } | Self::Reply { done, .. }) = self;
        done.tell(result);
    }

    fn size(&self) -> usize {
        match self {
            Self::Request { request, .. } => request.body.len(),
            Self::Reply { reply, .. } => reply.body.len(),
        }
    }

    /// True if nobody wants it any more and it was not written.
    fn is_withdrawn(&self) -> bool {
        match self {
            Self::Request { done, .. } => done.is_withdrawn(),
            Self::Reply { done, .. } => done.is_abandoned(),
        }
    }
}

impl Sender {
    /// Takes a request of a call, which its ticket tells if it fails. False if all is over, or nobody knows until when it is waited for.
    pub(crate) fn post(
        &self,
        service: &ServiceName,
        request: &Arc<Request>,
        expect_responder: bool,
        ticket: &Ticket,
    ) -> bool {
        let Some(deadline) = ticket.deadline() else {
            return false;
        };
        self.push(|| Job::Request {
            service: service.clone(),
            request: Arc::clone(request),
            expect_responder,
            expires: Some(deadline),
            done: Done::of_call(ticket.clone()),
        })
    }

    /// Sends a request; resolves when the broker has it.
    pub(crate) async fn request(
        &self,
        service: ServiceName,
        request: Arc<Request>,
        expect_responder: bool,
        ticket: Ticket,
    ) -> Result<(), Error> {
        let (done, told) = Done::of_request(ticket);
        let job = || Job::Request {
            service,
            expires: clock::expires(&request),
            request,
            expect_responder,
            done,
        };
        if !self.push(job) {
            return Err(error::closed());
        }
        told.await
    }

    /// Sends a message to an inbox; resolves when the broker has it.
    pub(crate) async fn reply(&self, to: InboxKeys, reply: Arc<Reply>) -> Result<(), Error> {
        let (done, told) = Done::of_reply();
        let job = || Job::Reply { to, reply, done };
        if !self.push(job) {
            return Err(error::closed());
        }
        told.await
    }

    /// Makes a job and takes it, unless all is over.
    fn push(&self, job: impl FnOnce() -> Job) -> bool {
        let mut queue = self.lock();
        if queue.closed {
            return false;
        }
        let is_first = queue.jobs.is_empty();
        queue.jobs.push_back(job());
        drop(queue);
        // Behind others it needs no bell: while there are any, `run` looks by itself whenever it can send.
        if is_first {
            self.arrived.notify_one();
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the next batch. True if it left some behind for the next wave.
    fn take(&self, batch: &mut Vec<Job>) -> bool {
        let mut queue = self.lock();
        let waiting = queue.jobs.len();
        let wave = self.pace.wave(waiting);
        let mut bytes = 0;
        let fits = |job: &&Job| {
            let fits = bytes < BATCH_BYTES;
            bytes += job.size();
            fits
        };
        let most = wave.min(BATCH_MAX);
        let count = queue.jobs.iter().take(most).take_while(fits).count();
        let left = count == wave && waiting > wave;
        batch.extend(queue.jobs.drain(..count));
        left
    }

    /// Forgets what its caller gave up while there was no connection.
    fn purge(&self) {
        let withdrawn: Vec<Job> = {
            let mut queue = self.lock();
            if !queue.jobs.iter().any(Job::is_withdrawn) {
                return;
            }
            let (withdrawn, kept): (Vec<Job>, Vec<Job>) = mem::take(&mut queue.jobs)
                .into_iter()
                .partition(Job::is_withdrawn);
            queue.jobs = kept.into();
            withdrawn
        };
        for job in withdrawn {
            job.finish(Err(withdrawn_error()));
        }
    }

    fn close(&self) {
        let jobs = {
            let mut queue = self.lock();
            queue.closed = true;
            mem::take(&mut queue.jobs)
        };
        for job in jobs {
            job.finish(Err(error::closed()));
        }
    }

    /// Sends until `ending`.
    pub(crate) async fn run(
        self: Arc<Self>,
        mut link: Link,
        clock: Arc<Clock>,
        config: Arc<RedisConfig>,
        ending: CancellationToken,
    ) {
        let mut writer = Writer::new(clock, config, Arc::clone(&self.pace));
        let mut waves = FuturesUnordered::new();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut left = false;
        // Reused: a list of a batch is dear to allocate.
        let mut jobs = Vec::new();
        loop {
            // What a wave left behind is the next one: it goes out when this one is answered, or both would arrive as one.
            let room = waves.is_empty() || (waves.len() < WAVES && !left);
            let waiting = !self.lock().jobs.is_empty();
            tokio::select! {
                biased;
                () = ending.cancelled() => break,
                Some(()) = waves.next() => left = false,
                _ = tick.tick() => {
                    self.purge();
                    if let Some(live) = link.now() {
                        // It waits for an answer, which must not hold up the end.
                        ending.run_until_cancelled(writer.tick(live)).await;
                    }
                }
                // The requests are committed after this, so they are withdrawn in time while there is no connection.
                live = link.ready(&ending), if room && waiting => {
                    if let Some(live) = live {
                        left = self.take(&mut jobs);
                        waves.push(writer.batch(&mut jobs, live));
                    }
                }
                () = self.arrived.notified(), if room && !waiting => {}
            }
        }
        self.close();
        // What was written may still be answered.
        let answered = async { while waves.next().await.is_some() {} };
        let _ = tokio::time::timeout(LAST_ANSWERS, answered).await;
        drop(waves);
        if let Some(live) = link.now() {
            let _ = tokio::time::timeout(LAST_ANSWERS, writer.tick(live)).await;
        }
    }
}

pub(crate) fn withdrawn_error() -> Error {
    Error::not_executed(ErrorKind::Cancelled, "it was withdrawn before it was sent")
}

//! One trip of sends: the commands, and what their answers mean.

use std::collections::HashMap;
use std::mem;
use std::sync::Arc;

use antiphon_core::{Error, ErrorKind, Executed, Request, ServiceName};
use redis::{Pipeline, Value};
use tokio::time::Instant;

use crate::clock::Clock;
use crate::completer::millis;
use crate::config::RedisConfig;
use crate::connection::{self, Live};
use crate::frame::{self, Expiry};
use crate::naming::{self, InboxKeys, ServiceKeys};
use crate::sender::{Job, TICK, withdrawn_error};
use crate::{QUEUE_TTL, error, scripts};

/// How often an idle connection is tried, in ticks.
const IDLE_TICKS: u32 = 5;

/// Turns messages into commands.
pub(crate) struct Writer {
    clock: Arc<Clock>,
    config: Arc<RedisConfig>,
    keys: HashMap<ServiceName, Arc<ServiceKeys>>,
    /// The queues that were pushed to since the last tick.
    lives: HashMap<ServiceName, Life>,
    idle: u32,
}

/// One command of the pipeline, and the jobs that it decides.
enum Sent {
    /// A body or a bell; nobody waits for it.
    Aside,
    Pushed(Vec<Job>),
    Conditional(Job),
}

/// Until when a queue must live, by the clock of Redis, in milliseconds.
#[derive(Clone, Copy, Default)]
struct Life {
    at: u64,
    /// What was asked for since the last tick.
    asked: u64,
    /// This batch has requests whose sender waits for nothing, and may be gone before the next tick.
    unwatched: bool,
}

/// The plain requests to one service.
#[derive(Default)]
struct Group {
    frames: Vec<Vec<u8>>,
    jobs: Vec<Job>,
}

impl Writer {
    pub(crate) fn new(clock: Arc<Clock>, config: Arc<RedisConfig>) -> Self {
        Self {
            clock,
            config,
            keys: HashMap::new(),
            lives: HashMap::new(),
            idle: 0,
        }
    }

    /// Commits the requests, and writes what may be sent.
    pub(crate) fn batch(
        &mut self,
        jobs: Vec<Job>,
        mut live: Live,
    ) -> impl Future<Output = ()> + use<> {
        let mut pipeline = Pipeline::new();
        let mut sent = Vec::new();
        let mut groups: HashMap<ServiceName, Group> = HashMap::new();
        let mut inboxes: HashMap<InboxKeys, Group> = HashMap::new();
        for job in jobs {
            match &job {
                Job::Request {
                    service,
                    request,
                    expect_responder,
                    ticket,
                    since,
                    ..
                } => {
                    let Some(expiry) = self.expiry(request, *since) else {
                        let late = Error::not_executed(
                            ErrorKind::DeadlineExceeded,
                            "the deadline passed before it was sent",
                        );
                        job.finish(Err(late));
                        continue;
                    };
                    if !ticket.commit() {
                        job.finish(Err(withdrawn_error()));
                        continue;
                    }
                    self.outlive(service, expiry, request.reply_to.is_none());
                    let apart =
                        (request.body.len() > self.config.inline_body).then(naming::random_id);
                    let frame = frame::encode_request(request, expiry, apart.as_deref());
                    if apart.is_none() && !expect_responder {
                        let group = match groups.get_mut(service) {
                            Some(group) => group,
                            None => groups.entry(service.clone()).or_default(),
                        };
                        group.frames.push(frame);
                        group.jobs.push(job);
                        continue;
                    }
                    let keys = self.keys_of(service);
                    let body = apart.map(|id| keys.body(&id));
                    if let Some(body) = &body {
                        let budget = expiry.budget.unwrap_or_else(|| millis(QUEUE_TTL));
                        let life = budget.saturating_add(millis(self.config.inbox_ttl));
                        pipeline
                            .cmd("SET")
                            .arg(body)
                            .arg(&request.body[..])
                            .arg("PX")
                            .arg(life);
                        sent.push(Sent::Aside);
                    }
                    let mut names: Vec<&str> = vec![&keys.queue, &keys.bell, &keys.live];
                    names.extend(body.as_deref());
                    let mut command = scripts::SEND_ONE.on(&names);
                    command.arg(frame).arg(u8::from(*expect_responder));
                    pipeline.add_command(command);
                    sent.push(Sent::Conditional(job));
                }
                Job::Reply { to, reply, .. } => {
                    let apart =
                        (reply.body.len() > self.config.inline_body).then(naming::random_id);
                    if let Some(id) = &apart {
                        let mut command = scripts::PUT.on(&[&to.body(id)]);
                        command
                            .arg(&reply.body[..])
                            .arg(millis(self.config.inbox_ttl));
                        pipeline.add_command(command);
                        sent.push(Sent::Aside);
                    }
                    let group = inboxes.entry(to.clone()).or_default();
                    group
                        .frames
                        .push(frame::encode_reply(reply, apart.as_deref()));
                    group.jobs.push(job);
                }
            }
        }
        for (service, group) in groups {
            let keys = self.keys_of(&service);
            pipeline.cmd("RPUSH").arg(&keys.queue).arg(group.frames);
            sent.push(Sent::Pushed(group.jobs));
            pipeline.cmd("ZADD").arg(&keys.bell).arg(0).arg(1);
            sent.push(Sent::Aside);
        }
        self.protect(&mut pipeline, &mut sent);
        for (inbox, group) in inboxes {
            let mut command = scripts::PUSH.on(&[inbox.list(), &inbox.bell()]);
            command.arg(millis(self.config.inbox_ttl)).arg(group.frames);
            pipeline.add_command(command);
            sent.push(Sent::Pushed(group.jobs));
        }
        async move {
            if pipeline.is_empty() {
                return;
            }
            match live.execute(&pipeline).await {
                Ok(answers) => {
                    for (entry, answer) in sent.into_iter().zip(answers) {
                        entry.finish(&answer);
                    }
                }
                Err(redis) => {
                    let lost = error::lost(Executed::Maybe, &redis);
                    for entry in sent {
                        entry.fail(&lost);
                    }
                }
            }
        }
    }

    /// When a request expires, with the time that it waited here taken off; `None` if it has.
    fn expiry(&self, request: &Request, since: Instant) -> Option<Expiry> {
        let Some(deadline) = request.deadline else {
            return Some(Expiry::default());
        };
        let left = deadline
            .budget
            .checked_sub(since.elapsed())
            .filter(|left| !left.is_zero())?;
        // Rounded up: a deadline is never early.
        let budget = millis(left).saturating_add(1);
        Some(Expiry {
            at: self.clock.now().map(|now| now.saturating_add(budget)),
            budget: Some(budget),
        })
    }

    fn outlive(&mut self, service: &ServiceName, expiry: Expiry, unwatched: bool) {
        let now = self.clock.now().unwrap_or_default();
        let at = expiry
            .at
            .unwrap_or_else(|| now.saturating_add(millis(QUEUE_TTL)));
        let life = match self.lives.get_mut(service) {
            Some(life) => life,
            None => self.lives.entry(service.clone()).or_default(),
        };
        life.at = life.at.max(at);
        life.unwatched |= unwatched;
    }

    /// Lets the queues of this batch live long enough, should this process be gone before the next tick. With the first batch
    /// since the last tick, with one that needs it longer, and with requests that nobody waits for; that is seldom
    /// enough to cost nothing on the way of a call.
    fn protect(&mut self, pipeline: &mut Pipeline, sent: &mut Vec<Sent>) {
        let slack = millis(TICK);
        let due: Vec<(ServiceName, u64)> = self
            .lives
            .iter_mut()
            .filter(|(_, life)| life.unwatched || life.at > life.asked.saturating_add(slack))
            .map(|(service, life)| {
                life.asked = life.at;
                life.unwatched = false;
                (service.clone(), life.at)
            })
            .collect();
        for (service, at) in due {
            let count = pipeline.len();
            self.live_until(pipeline, &service, at);
            sent.extend((count..pipeline.len()).map(|_| Sent::Aside));
        }
    }

    fn live_until(&mut self, pipeline: &mut Pipeline, service: &ServiceName, at: u64) {
        let keys = self.keys_of(service);
        let at = at.saturating_add(millis(self.config.inbox_ttl));
        for key in [&keys.queue, &keys.bell] {
            for condition in ["NX", "GT"] {
                pipeline.cmd("PEXPIREAT").arg(key).arg(at).arg(condition);
            }
        }
    }

    fn keys_of(&mut self, service: &ServiceName) -> Arc<ServiceKeys> {
        if let Some(keys) = self.keys.get(service) {
            return Arc::clone(keys);
        }
        let keys = Arc::new(ServiceKeys::new(service));
        self.keys.insert(service.clone(), Arc::clone(&keys));
        keys
    }

    /// Gives the queues that were pushed to a time to live, and reads the clock; on an idle connection now and then.
    ///
    /// A queue is emptied by servers, and gone with its time to live as soon as it is empty. Where there are none, it goes
    /// when all in it has expired for long.
    pub(crate) async fn tick(&mut self, mut live: Live) {
        self.idle += 1;
        if self.lives.is_empty() && self.idle < IDLE_TICKS {
            return;
        }
        self.idle = 0;
        let mut pipeline = Pipeline::new();
        pipeline.cmd("TIME");
        for (service, life) in mem::take(&mut self.lives) {
            self.live_until(&mut pipeline, &service, life.at);
        }
        let asked = Instant::now();
        if let Ok(answers) = live.execute(&pipeline).await
            && let Some(micros) = answers.first().and_then(connection::time_of)
        {
            self.clock.observe(asked, Instant::now(), micros);
        }
    }
}

impl Sent {
    fn finish(self, answer: &Value) {
        match (self, answer) {
            (Self::Aside, _) => {}
            (Self::Pushed(jobs), Value::Int(_)) => {
                for job in jobs {
                    job.finish(Ok(()));
                }
            }
            (Self::Conditional(job), Value::Int(1)) => job.finish(Ok(())),
            (Self::Conditional(job), Value::Int(0)) => {
                job.finish(Err(Error::not_executed(
                    ErrorKind::NoResponder,
                    "nobody serves the service",
                )));
            }
            (Self::Conditional(job), Value::Int(_)) => {
                job.finish(Err(Error::not_executed(
                    ErrorKind::Overloaded,
                    "Redis has no room for the body",
                )));
            }
            (entry, other) => entry.fail(&error::unexpected("a send", other)),
        }
    }

    fn fail(self, error: &Error) {
        match self {
            Self::Aside => {}
            Self::Pushed(jobs) => {
                for job in jobs {
                    job.finish(Err(error.clone()));
                }
            }
            Self::Conditional(job) => job.finish(Err(error.clone())),
        }
    }
}

//! One trip of sends: the commands, and what their answers mean.

use std::collections::HashMap;
use std::mem;
use std::sync::Arc;

use antiphon_core::transport::Done;
use antiphon_core::{Error, ErrorKind, Executed, ServiceName};
use tokio::time::Instant;

use crate::clock::Clock;
use crate::command::{Cmd, Pipeline};
use crate::completer::millis;
use crate::config::RedisConfig;
use crate::connection::{self, Live};
use crate::frame::{self, Expiry};
use crate::naming::{self, InboxKeys, ServiceKeys};
use crate::pace::Pace;
use crate::sender::{Job, TICK, withdrawn_error};
use crate::value::Value;
use crate::{QUEUE_TTL, audience, error, scripts};

/// How often an idle connection is tried, in ticks.
const IDLE_TICKS: u32 = 5;

/// More services than this are forgotten at a tick, and named again when they are called.
const KEYS_MAX: usize = 4096;

/// A frame without a body is seldom longer, nor is a small one with it.
const FRAME_BYTES: usize = 256;

/// Turns messages into commands.
pub(crate) struct Writer {
    clock: Arc<Clock>,
    config: Arc<RedisConfig>,
    pace: Arc<Pace>,
    keys: HashMap<ServiceName, Arc<ServiceKeys>>,
    /// The queues that were pushed to since the last tick.
    lives: HashMap<ServiceName, Life>,
    idle: u32,
}

/// One command of the pipeline, and the sends that it decides.
enum Sent {
    /// A body or a bell; nobody waits for it.
    Aside,
    Pushed(Vec<Done>),
    /// To an inbox, which may be gone.
    Delivered(Vec<Done>),
    Conditional(Done),
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

/// What goes to one list by one command.
struct Group {
    command: Cmd,
    sends: Vec<Done>,
}

/// The plain requests to one service.
struct Requests {
    service: ServiceName,
    keys: Arc<ServiceKeys>,
    life: Life,
    group: Group,
}

impl Writer {
    pub(crate) fn new(clock: Arc<Clock>, config: Arc<RedisConfig>, pace: Arc<Pace>) -> Self {
        Self {
            clock,
            config,
            pace,
            keys: HashMap::new(),
            lives: HashMap::new(),
            idle: 0,
        }
    }

    /// Commits the requests, and writes what may be sent.
    pub(crate) fn batch(
        &mut self,
        jobs: &mut Vec<Job>,
        live: Live,
    ) -> impl Future<Output = ()> + use<> {
        let mut pipeline = Pipeline::new();
        let mut sent = Vec::new();
        let mut requests: Vec<Requests> = Vec::new();
        let mut index: HashMap<ServiceName, usize> = HashMap::new();
        let mut inboxes: HashMap<InboxKeys, Group> = HashMap::new();
        let mut frame = Vec::with_capacity(FRAME_BYTES);
        // Read once: what is a little late then is no deadline, which is rounded up.
        let now = Now::of(&self.clock);
        let count = jobs.len();
        let mut asking = 0;
        for job in jobs.drain(..) {
            frame.clear();
            match job {
                Job::Request {
                    service,
                    request,
                    expect_responder,
                    expires,
                    done,
                } => {
                    let Some(expiry) = now.expiry(expires) else {
                        let late = Error::not_executed(
                            ErrorKind::DeadlineExceeded,
                            "the deadline passed before it was sent",
                        );
                        done.tell(Err(late));
                        continue;
                    };
                    if !done.commit() {
                        done.tell(Err(withdrawn_error()));
                        continue;
                    }
                    if request.reply_to.is_some() {
                        if asking == 0 {
                            self.pace.sample(&request.id, now.here);
                        }
                        asking += 1;
                    }
                    let at = self.entry(&mut requests, &mut index, service, count);
                    let Some(entry) = requests.get_mut(at) else {
                        continue;
                    };
                    entry
                        .life
                        .outlive(now.life(expiry), request.reply_to.is_none());
                    let apart =
                        (request.body.len() > self.config.inline_body).then(naming::random_id);
                    frame::encode_request(&request, expiry, apart.as_deref(), &mut frame);
                    if apart.is_none() && !expect_responder {
                        entry.group.command.arg(&frame[..]);
                        entry.group.sends.push(done);
                        continue;
                    }
                    let keys = &entry.keys;
                    let body = apart.map(|id| keys.body(&id));
                    if let Some(body) = &body {
                        let budget = expiry.budget.unwrap_or_else(|| millis(QUEUE_TTL));
                        let life = budget.saturating_add(millis(self.config.inbox_ttl));
                        let mut command = Cmd::new("SET");
                        command.arg(body).body(&request.body).arg("PX").arg(life);
                        pipeline.add_command(command);
                        sent.push(Sent::Aside);
                    }
                    let mut names: Vec<&str> = vec![&keys.queue, &keys.bell, &keys.live];
                    names.extend(body.as_deref());
                    let mut command = scripts::SEND_ONE.on(&names);
                    command.arg(&frame[..]).arg(u8::from(expect_responder));
                    pipeline.add_command(command);
                    sent.push(Sent::Conditional(done));
                }
                Job::Reply { to, reply, done } => {
                    let apart =
                        (reply.body.len() > self.config.inline_body).then(naming::random_id);
                    if let Some(id) = &apart {
                        let mut command = scripts::PUT.on(&[&to.body(id)]);
                        command.body(&reply.body).arg(millis(self.config.inbox_ttl));
                        pipeline.add_command(command);
                        sent.push(Sent::Aside);
                    }
                    frame::encode_reply(&reply, apart.as_deref(), &mut frame);
                    let group = inboxes.entry(to).or_insert_with_key(|to| {
                        Group::new(audience::push(to, self.config.inbox_ttl))
                    });
                    group.command.arg(&frame[..]);
                    group.sends.push(done);
                }
            }
        }
        self.pace.sent(asking);
        for entry in requests {
            if !entry.group.sends.is_empty() {
                pipeline.add_command(entry.group.command);
                sent.push(Sent::Pushed(entry.group.sends));
                pipeline.cmd("ZADD").arg(&entry.keys.bell).arg(0).arg(1);
                sent.push(Sent::Aside);
            }
            match self.lives.get_mut(&entry.service) {
                Some(life) => life.outlive(entry.life.at, entry.life.unwatched),
                None => drop(self.lives.insert(entry.service, entry.life)),
            }
        }
        self.protect(&mut pipeline, &mut sent);
        for group in inboxes.into_values() {
            pipeline.add_command(group.command);
            sent.push(Sent::Delivered(group.sends));
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

    /// Where the requests to a service are gathered; most batches are for the same one.
    fn entry(
        &mut self,
        requests: &mut Vec<Requests>,
        index: &mut HashMap<ServiceName, usize>,
        service: ServiceName,
        count: usize,
    ) -> usize {
        let next = requests.len();
        if requests.last().is_some_and(|last| last.service == service) {
            return next - 1;
        }
        if let Some(&at) = index.get(&service) {
            return at;
        }
        let keys = self.keys_of(&service);
        // Room for all of it, if there is but one service.
        let count = if next == 0 { count } else { 1 };
        let mut command = Cmd::with_capacity(count * FRAME_BYTES);
        command.arg("RPUSH").arg(&keys.queue);
        index.insert(service.clone(), next);
        requests.push(Requests {
            service,
            keys,
            life: Life::default(),
            group: Group {
                command,
                sends: Vec::with_capacity(count),
            },
        });
        next
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
    pub(crate) async fn tick(&mut self, live: Live) {
        self.idle += 1;
        if self.lives.is_empty() && self.idle < IDLE_TICKS {
            return;
        }
        self.idle = 0;
        if self.keys.len() > KEYS_MAX {
            self.keys.clear();
        }
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

impl Group {
    fn new(command: Cmd) -> Self {
        Self {
            command,
            sends: Vec::new(),
        }
    }
}

/// One moment, by both clocks.
pub(crate) struct Now {
    here: Instant,
    there: Option<u64>,
}

impl Now {
    pub(crate) fn of(clock: &Clock) -> Self {
        Self {
            here: Instant::now(),
            there: clock.now(),
        }
    }

    /// What is left of a request's time; `None` if nothing is.
    pub(crate) fn expiry(&self, expires: Option<Instant>) -> Option<Expiry> {
        let Some(expires) = expires else {
            return Some(Expiry::default());
        };
        let left = expires
            .checked_duration_since(self.here)
            .filter(|left| !left.is_zero())?;
        // Rounded up: a deadline is never early.
        let budget = millis(left).saturating_add(1);
        Some(Expiry {
            at: self.there.map(|now| now.saturating_add(budget)),
            budget: Some(budget),
        })
    }

    /// Until when the queue of such a request must live.
    fn life(&self, expiry: Expiry) -> u64 {
        let forever = || {
            let now = self.there.unwrap_or_default();
            now.saturating_add(millis(QUEUE_TTL))
        };
        expiry.at.unwrap_or_else(forever)
    }
}

impl Life {
    fn outlive(&mut self, at: u64, unwatched: bool) {
        self.at = self.at.max(at);
        self.unwatched |= unwatched;
    }
}

impl Sent {
    fn finish(self, answer: &Value) {
        match (self, answer) {
            (Self::Aside, _) => {}
            (Self::Delivered(sends), Value::Int(0)) => {
                Self::Delivered(sends).fail(&Error::not_executed(
                    ErrorKind::NoResponder,
                    "the inbox is gone",
                ));
            }
            (Self::Pushed(sends) | Self::Delivered(sends), Value::Int(_)) => {
                for done in sends {
                    done.tell(Ok(()));
                }
            }
            (Self::Conditional(done), Value::Int(answer)) => done.tell(match answer {
                1 => Ok(()),
                0 => Err(Error::not_executed(
                    ErrorKind::NoResponder,
                    "nobody serves the service",
                )),
                _ => Err(Error::not_executed(
                    ErrorKind::Overloaded,
                    "Redis has no room for the body",
                )),
            }),
            (entry, other) => entry.fail(&error::unexpected("a send", other)),
        }
    }

    fn fail(self, error: &Error) {
        match self {
            Self::Aside => {}
            Self::Pushed(sends) | Self::Delivered(sends) => {
                for done in sends {
                    done.tell(Err(error.clone()));
                }
            }
            Self::Conditional(done) => done.tell(Err(error.clone())),
        }
    }
}

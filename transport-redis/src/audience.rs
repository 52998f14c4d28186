//! What is said to every server of a service: who hears it, and how it gets there.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use antiphon_core::{Error, ErrorKind, Executed, ReplyAddress, Request, ServiceName};
use tokio::time::timeout_at;

use crate::command::{Cmd, Pipeline};
use crate::completer::millis;
use crate::connection::Live;
use crate::frame;
use crate::naming::{self, InboxKeys, ServiceKeys};
use crate::send_batch::Now;
use crate::transport::Shared;
use crate::value::Value;
use crate::{QUEUE_TTL, clock, error, scripts};

/// The audiences that an inbox belongs to, by their keys.
#[derive(Clone, Debug, Default)]
pub(crate) struct Audiences(Arc<Mutex<Vec<String>>>);

impl Audiences {
    /// Puts an inbox on the registry of a service, and sees to it that its reader keeps it there.
    pub(crate) async fn join(
        &self,
        shared: &Shared,
        service: &ServiceName,
        inbox: &ReplyAddress,
    ) -> Result<(), Error> {
        // It counts as long as its process shows that it lives.
        shared.leases.keep(&shared.connector, shared.config.lease)?;
        let key = ServiceKeys::new(service).audience;
        let mut pipeline = Pipeline::new();
        pipeline.add_command(attend(shared, &key, inbox));
        // First, so that it is taken off again even if this future is dropped.
        self.add(key);
        loop {
            let live = ready(shared).await?;
            // If it broke, nobody knows if it was registered; doing it again does no harm.
            let Ok(answers) = live.execute(&pipeline).await else {
                continue;
            };
            return match error::first_refusal(&answers) {
                None => Ok(()),
                Some(refusal) if error::is_elsewhere(refusal) => continue,
                Some(refusal) => Err(error::refused(refusal)),
            };
        }
    }

    fn add(&self, key: String) {
        let mut keys = self.lock();
        if !keys.contains(&key) {
            keys.push(key);
        }
    }

    /// Adds the commands by which an inbox stays registered. Their answers mean nothing.
    pub(crate) fn stay(&self, shared: &Shared, pipeline: &mut Pipeline, inbox: &ReplyAddress) {
        for key in &*self.lock() {
            pipeline.add_command(attend(shared, key, inbox));
        }
    }

    /// Adds the commands that take an inbox off the registries.
    pub(crate) fn leave(&self, pipeline: &mut Pipeline, inbox: &ReplyAddress) {
        for key in &*self.lock() {
            pipeline.cmd("ZREM").arg(key).arg(inbox.as_str());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn attend(shared: &Shared, key: &str, inbox: &ReplyAddress) -> Cmd {
    let mut command = scripts::ATTEND.on(&[key, shared.leases.sign_of_life()]);
    command.arg(inbox.as_str()).arg(millis(QUEUE_TTL));
    command.arg(millis(shared.config.lease));
    command
}

/// Sends a request to the inbox of every server of a service; says how many there were.
///
/// In two steps: the inboxes lie in other slots than the registry. One that has gone in between is seen by the second.
pub(crate) async fn broadcast(
    shared: &Shared,
    service: &ServiceName,
    request: Request,
) -> Result<usize, Error> {
    let expires = clock::expires(&request);
    let audience = audience(shared, service);
    let audience = match expires {
        Some(expires) => timeout_at(expires, audience)
            .await
            .unwrap_or_else(|_| Err(late())),
        None => audience.await,
    };
    let (live, inboxes) = audience?;
    let now = Now::of(&shared.clock);
    let expiry = now.expiry(expires).ok_or_else(late)?;
    let config = &shared.config;
    let apart = (request.body.len() > config.inline_body).then(naming::random_id);
    let mut bytes = Vec::new();
    frame::encode_broadcast(service, &request, expiry, apart.as_deref(), &mut bytes);
    let mut pipeline = Pipeline::new();
    for inbox in &inboxes {
        if let Some(id) = &apart {
            let mut command = scripts::PUT.on(&[&inbox.body(id)]);
            command.arg(&request.body[..]).arg(millis(config.inbox_ttl));
            pipeline.add_command(command);
        }
        let mut command = push(inbox, config.inbox_ttl);
        command.arg(&bytes[..]);
        pipeline.add_command(command);
    }
    if pipeline.is_empty() {
        return Ok(0);
    }
    let answers = live
        .execute(&pipeline)
        .await
        .map_err(|redis| error::lost(Executed::Maybe, &redis))?;
    let reached = answers
        .iter()
        .filter(|answer| **answer == Value::Int(1))
        .count();
    match error::first_refusal(&answers) {
        Some(refusal) if reached == 0 => Err(error::refused(refusal)),
        _ => Ok(reached),
    }
}

/// The command that pushes messages to an inbox, if it is there; the frames are appended to it.
pub(crate) fn push(inbox: &InboxKeys, ttl: Duration) -> Cmd {
    let (bell, sign) = (inbox.bell(), inbox.sign_of_life());
    let mut keys = vec![inbox.list(), &bell];
    keys.extend(sign.as_deref());
    let mut command = scripts::PUSH.on(&keys);
    command.arg(millis(ttl));
    command
}

/// Who hears what is said to a service, and the connection on which it was asked.
async fn audience(shared: &Shared, service: &ServiceName) -> Result<(Live, Vec<InboxKeys>), Error> {
    let key = ServiceKeys::new(service).audience;
    let mut pipeline = Pipeline::new();
    pipeline.add_command(scripts::AUDIENCE.on(&[&key]));
    loop {
        let live = ready(shared).await?;
        // Nothing was said yet, so it may be asked again.
        let Ok(mut answers) = live.execute(&pipeline).await else {
            continue;
        };
        match answers.pop().unwrap_or_default() {
            Value::Array(inboxes) => {
                // An address is the name of a key: what is not one of an inbox is nobody's.
                let inboxes = inboxes.iter().filter_map(|inbox| match inbox {
                    Value::BulkString(inbox) => {
                        let address = ReplyAddress::new(std::str::from_utf8(inbox).ok()?).ok()?;
                        InboxKeys::parse(&address)
                    }
                    _ => None,
                });
                return Ok((live, inboxes.collect()));
            }
            Value::ServerError(refusal) if error::is_elsewhere(&refusal) => {}
            other => {
                return Err(error::unexpected("a broadcast", &other).with_executed(Executed::No));
            }
        }
    }
}

async fn ready(shared: &Shared) -> Result<Live, Error> {
    let live = shared.link.clone().ready(&shared.ending).await;
    live.ok_or_else(error::closed)
}

fn late() -> Error {
    Error::not_executed(
        ErrorKind::DeadlineExceeded,
        "the deadline passed before it was sent",
    )
}

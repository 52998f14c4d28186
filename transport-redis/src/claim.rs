//! From what a claim answered to deliveries.

use std::sync::Arc;
use std::time::Duration;

use antiphon_core::{Code, Deadline, Fault, Reply};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::command::Pipeline;
use crate::connection::Backoff;
use crate::frame::{self, BadFrame, RequestFrame};
use crate::naming::InboxKeys;
use crate::session::{Session, Token};
use crate::settlement::{Hold, RedisSettlement};
use crate::subscription::Taken;
use crate::taker::executed;
use crate::transport::Shared;
use crate::value::Value;
use crate::{QUEUE_TTL, error};

/// The most large bodies that are fetched in one trip,
pub(crate) const FETCH: usize = 8;

/// and the most such trips at once.
pub(crate) const TRIPS: usize = 3;

/// What a claim answered.
#[derive(Debug)]
pub(crate) struct Claimed {
    /// There was more fresh work.
    pub(crate) fresh_left: bool,
    /// The attempt of the next work that came back; 0 if there is none.
    pub(crate) returned_left: u32,
    /// The attempt of work that came back; 0 for fresh work.
    pub(crate) attempt: u32,
    pub(crate) frames: Vec<Bytes>,
}

impl Claimed {
    pub(crate) fn parse(answer: Value) -> Option<Self> {
        let Value::Array(parts) = answer else {
            return None;
        };
        let mut parts = parts.into_iter();
        let mut number = || match parts.next() {
            Some(Value::Int(number)) => Some(number),
            _ => None,
        };
        let (fresh, returned, attempt) = (number()?, number()?, number()?);
        let frame = |part| match part {
            Value::BulkString(frame) => Some(frame),
            _ => None,
        };
        let Some(Value::Array(frames)) = parts.next() else {
            return None;
        };
        Some(Self {
            fresh_left: fresh > 0,
            returned_left: u32::try_from(returned).ok()?,
            attempt: u32::try_from(attempt).ok()?,
            frames: frames.into_iter().map(frame).collect::<Option<_>>()?,
        })
    }
}

/// What was decoded, and where its body is.
struct Decoded {
    taken: Taken,
    apart: Option<String>,
}

/// Decodes what was claimed at `now`, by the clock of Redis. What cannot be decoded is buried, and its caller told.
pub(crate) async fn deliveries(
    shared: &Arc<Shared>,
    session: &Arc<Session>,
    work: Vec<(Token, Bytes)>,
    now: u64,
    stopping: &CancellationToken,
) -> Vec<Taken> {
    let mut decoded = Vec::with_capacity(work.len());
    let mut any_apart = false;
    let mut last = None;
    let started = Instant::now();
    for (token, frame) in work {
        let hold = Hold {
            shared: Arc::clone(shared),
            session: Arc::clone(session),
            token,
            reply_to: None,
            body: None,
            keep: QUEUE_TTL,
            expires: None,
        };
        match frame::decode_request(frame) {
            Ok(frame) => {
                any_apart |= frame.apart.is_some();
                decoded.extend(take(hold, frame, now, started, &mut last));
            }
            Err(bad) => bury(hold, &bad),
        }
    }
    if any_apart {
        fetch(shared, session, &mut decoded, stopping).await;
    }
    decoded.into_iter().map(|decoded| decoded.taken).collect()
}

/// Decoded at `started` by our clock, which is `now` by that of Redis. Most of a batch comes from the `last` client.
fn take(
    mut hold: Hold,
    frame: RequestFrame,
    now: u64,
    started: Instant,
    last: &mut Option<InboxKeys>,
) -> Option<Decoded> {
    let RequestFrame {
        mut request,
        expiry,
        apart,
    } = frame;
    if let Some(address) = &request.reply_to {
        // Before anything is done with it: an address is the name of a key.
        if last.as_ref().is_none_or(|last| last.address() != address) {
            *last = InboxKeys::parse(address);
        }
        hold.reply_to = last.clone();
        if hold.reply_to.is_none() {
            let reason = "the reply address is not one of this transport".to_owned();
            bury(
                hold,
                &BadFrame {
                    id: None,
                    reply_to: None,
                    reason,
                },
            );
            return None;
        }
    }
    // Without a point in time the budget counts from now.
    let left = match expiry.at {
        Some(at) => Some(Duration::from_millis(at.saturating_sub(now))),
        None => expiry.budget.map(Duration::from_millis),
    };
    if let (Some(left), Some(deadline), None) = (left, request.deadline, expiry.budget) {
        request.deadline = Some(Deadline {
            budget: left,
            ..deadline
        });
    }
    if let Some(left) = left {
        hold.keep = left
            .saturating_add(hold.shared.config.inbox_ttl)
            .min(QUEUE_TTL);
    }
    let apart = apart.map(|id| hold.session.keys.body(&id));
    hold.body = apart.clone();
    let expires = left.map(|left| started.checked_add(left).unwrap_or(started + QUEUE_TTL));
    hold.expires = expires;
    let (attempt, lease) = (hold.token.attempt, hold.session.lease.clone());
    let settlement = RedisSettlement::new(hold);
    Some(Decoded {
        taken: Taken {
            request,
            attempt,
            expires,
            lease,
            settlement,
        },
        apart,
    })
}

fn bury(mut hold: Hold, bad: &BadFrame) {
    hold.reply_to = bad.reply_to.as_ref().and_then(InboxKeys::parse);
    let executed = executed(hold.token.attempt);
    let reply = bad.id.clone().map(|id| {
        let message = format!("the request cannot be decoded: {}", bad.reason);
        Reply::fault(id, Fault::new(Code::InvalidArgument, message), executed)
    });
    tracing::warn!(
        queue = hold.session.keys.queue,
        reason = bad.reason,
        "a request was buried"
    );
    RedisSettlement::new(hold).bury(&format!("undecodable: {}", bad.reason), reply.as_ref());
}

/// Fetches the bodies that have their own keys. What is not fetched when the lease ends or the subscription is stopped goes
/// back.
async fn fetch(
    shared: &Shared,
    session: &Session,
    decoded: &mut Vec<Decoded>,
    stopping: &CancellationToken,
) {
    let (apart, mut whole): (Vec<Indexed>, Vec<Indexed>) = decoded
        .drain(..)
        .enumerate()
        .partition(|(_, decoded)| decoded.apart.is_some());
    let mut trips: Vec<Vec<Indexed>> = Vec::new();
    for one in apart {
        match trips.last_mut().filter(|trip| trip.len() < FETCH) {
            Some(trip) => trip.push(one),
            None => trips.push(vec![one]),
        }
    }
    // While one answer is read, Redis writes the next.
    let mut fetched = stream::iter(trips)
        .map(|trip| fetch_few(shared, session, trip, stopping))
        .buffer_unordered(TRIPS);
    while let Some(few) = fetched.next().await {
        whole.extend(few);
    }
    whole.sort_by_key(|(index, _)| *index);
    decoded.extend(whole.into_iter().map(|(_, decoded)| decoded));
}

/// What was decoded, and its place in the batch.
type Indexed = (usize, Decoded);

/// Fetches bodies in one trip, which is tried until it succeeds.
async fn fetch_few(
    shared: &Shared,
    session: &Session,
    few: Vec<Indexed>,
    stopping: &CancellationToken,
) -> Vec<Indexed> {
    let mut backoff = Backoff::default();
    let mut pipeline = Pipeline::new();
    for (_, decoded) in &few {
        pipeline.cmd("GET").arg(&decoded.apart);
    }
    let answers = loop {
        let mut link = shared.link.clone();
        let ready = session.lease.run_until_cancelled(link.ready(stopping));
        let Some(Some(live)) = ready.await else {
            return Vec::new();
        };
        match live.execute(&pipeline).await {
            Ok(answers) if error::first_refusal(&answers).is_none_or(error::is_lasting) => {
                break answers;
            }
            Ok(_) => {
                let pause = session.lease.run_until_cancelled(backoff.pause());
                if stopping.run_until_cancelled(pause).await.is_none() {
                    return Vec::new();
                }
            }
            Err(error) => tracing::debug!(%error, "bodies are fetched again"),
        }
    };
    let mut whole = Vec::with_capacity(few.len());
    for ((index, mut decoded), answer) in few.into_iter().zip(answers) {
        match answer {
            Value::BulkString(body) => {
                decoded.taken.request.body = body;
                whole.push((index, decoded));
            }
            // It expired with the request, which nobody will start.
            _ if decoded
                .taken
                .expires
                .is_some_and(|expires| expires <= Instant::now()) =>
            {
                whole.push((index, decoded))
            }
            _ => {
                let Taken {
                    request,
                    attempt,
                    settlement,
                    ..
                } = decoded.taken;
                let fault = Fault::new(Code::DataLoss, "the broker lost the request's body");
                settlement.bury(
                    "its body is gone",
                    Some(&Reply::fault(request.id, fault, executed(attempt))),
                );
            }
        }
    }
    whole
}

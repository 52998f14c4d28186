//! From what a claim answered to deliveries.

use std::iter;
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
use crate::scan::Last;
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

/// Decodes what was claimed at `now`, by the clock of Redis, under tokens that count up from the `first`. What cannot be decoded is
/// buried, and its caller told.
pub(crate) async fn deliveries(
    shared: &Arc<Shared>,
    session: &Arc<Session>,
    first: Token,
    frames: Vec<Bytes>,
    now: u64,
    last: &mut Last,
    stopping: &CancellationToken,
) -> Vec<Taken> {
    let mut taken = Vec::with_capacity(frames.len());
    let mut apart = Vec::new();
    let started = Instant::now();
    for (number, frame) in (first.number..).zip(frames) {
        let hold = Hold {
            shared: Arc::clone(shared),
            session: Arc::clone(session),
            token: Token { number, ..first },
            reply_to: None,
            body: None,
            keep: QUEUE_TTL,
            expires: None,
        };
        match frame::decode_request(frame, last) {
            Ok(mut frame) => {
                let body = frame.apart.take().map(|id| session.keys.body(&id));
                let index = taken.len();
                taken.extend(take(hold, frame, body.clone(), now, started, last));
                if taken.len() > index {
                    apart.extend(body.map(|key| Apart { index, key }));
                }
            }
            Err(bad) => bury(hold, &bad),
        }
    }
    if apart.is_empty() {
        return taken;
    }
    fetch(shared, session, taken, &apart, stopping).await
}

/// Decoded at `started` by our clock, which is `now` by that of Redis; `body` is the key of its body, if it has one.
fn take(
    mut hold: Hold,
    frame: RequestFrame,
    body: Option<String>,
    now: u64,
    started: Instant,
    last: &mut Last,
) -> Option<Taken> {
    let RequestFrame {
        mut request,
        expiry,
        ..
    } = frame;
    if let Some(address) = &request.reply_to {
        // Before anything is done with it: an address is the name of a key.
        hold.reply_to = last.inbox(address);
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
        Arc::make_mut(&mut request).deadline = Some(Deadline {
            budget: left,
            ..deadline
        });
    }
    if let Some(left) = left {
        hold.keep = left
            .saturating_add(hold.shared.config.inbox_ttl)
            .min(QUEUE_TTL);
    }
    hold.body = body;
    let expires = left.map(|left| started.checked_add(left).unwrap_or(started + QUEUE_TTL));
    hold.expires = expires;
    Some(Taken {
        request,
        attempt: hold.token.attempt,
        expires,
        settlement: Box::new(RedisSettlement::new(hold)),
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

/// A body that has its own key.
struct Apart {
    /// Of its request.
    index: usize,
    key: String,
}

/// Fetches the bodies that have their own keys. What is not fetched when the lease ends or the subscription is stopped goes
/// back.
async fn fetch(
    shared: &Shared,
    session: &Session,
    taken: Vec<Taken>,
    apart: &[Apart],
    stopping: &CancellationToken,
) -> Vec<Taken> {
    let mut taken: Vec<Option<Taken>> = taken.into_iter().map(Some).collect();
    // While one answer is read, Redis writes the next.
    let trips: Vec<_> = apart
        .chunks(FETCH)
        .map(|few| async move { (few, fetch_few(shared, session, few, stopping).await) })
        .collect();
    let mut fetched = stream::iter(trips).buffer_unordered(TRIPS);
    while let Some((few, answers)) = fetched.next().await {
        // None for those that go back.
        let answers = answers.into_iter().map(Some).chain(iter::repeat(None));
        for (Apart { index, .. }, answer) in few.iter().zip(answers) {
            if let Some(slot) = taken.get_mut(*index)
                && let Some(bodiless) = slot.take()
            {
                *slot = answer.and_then(|answer| complete(bodiless, answer));
            }
        }
    }
    taken.into_iter().flatten().collect()
}

/// Fetches bodies in one trip, which is tried until it succeeds. Gives no answers if the lease ends or the subscription is stopped.
async fn fetch_few(
    shared: &Shared,
    session: &Session,
    few: &[Apart],
    stopping: &CancellationToken,
) -> Vec<Value> {
    let mut backoff = Backoff::default();
    let mut pipeline = Pipeline::new();
    for Apart { key, .. } in few {
        pipeline.cmd("GET").arg(key);
    }
    loop {
        let mut link = shared.link.clone();
        let ready = session.lease.run_until_cancelled(link.ready(stopping));
        let Some(Some(live)) = ready.await else {
            return Vec::new();
        };
        match live.execute(&pipeline).await {
            Ok(answers) if error::first_refusal(&answers).is_none_or(error::is_lasting) => {
                return answers;
            }
            Ok(_) => {
                let pause = session.lease.run_until_cancelled(backoff.pause());
                if stopping.run_until_cancelled(pause).await.is_none() {
                    return Vec::new();
                }
            }
            Err(error) => tracing::debug!(%error, "bodies are fetched again"),
        }
    }
}

/// Gives a request its body. Without one it is buried, unless it has expired.
fn complete(mut taken: Taken, answer: Value) -> Option<Taken> {
    match answer {
        Value::BulkString(body) => Arc::make_mut(&mut taken.request).body = body,
        // It expired with the request, which nobody will start.
        _ if taken
            .expires
            .is_some_and(|expires| expires <= Instant::now()) => {}
        _ => {
            let fault = Fault::new(Code::DataLoss, "the broker lost the request's body");
            let reply = Reply::fault(taken.request.id.clone(), fault, executed(taken.attempt));
            taken.settlement.bury("its body is gone", Some(&reply));
            return None;
        }
    }
    Some(taken)
}

//! The transport's half of a delivery.

use std::sync::Arc;
use std::time::Duration;

use antiphon_core::transport::{Settle, Settlement};
use antiphon_core::{Error, Reply};
use async_trait::async_trait;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::completer::{ApartBody, End, FullEnd, Item};
use crate::naming::{self, InboxKeys};
use crate::session::{Session, Token};
use crate::transport::Shared;
use crate::{error, frame};

/// One request in hand, to be settled or given back.
#[derive(Debug)]
pub(crate) struct RedisSettlement(Option<Hold>);

/// What is needed to settle a request.
#[derive(Debug)]
pub(crate) struct Hold {
    pub(crate) shared: Arc<Shared>,
    pub(crate) session: Arc<Session>,
    pub(crate) token: Token,
    pub(crate) reply_to: Option<InboxKeys>,
    /// The key of its body, if it has one.
    pub(crate) body: Option<String>,
    /// For how long it must be kept if it goes back.
    pub(crate) keep: Duration,
    /// Until when somebody waits for its reply.
    pub(crate) expires: Option<Instant>,
    /// It was given to the server: if it is dropped now, that counts as an attempt.
    pub(crate) received: bool,
}

impl RedisSettlement {
    pub(crate) fn new(hold: Hold) -> Self {
        Self(Some(hold))
    }

    pub(crate) fn receive(&mut self) {
        if let Some(hold) = &mut self.0 {
            hold.received = true;
        }
    }

    /// Buries the request, waiting for nothing.
    pub(crate) fn bury(mut self, reason: &str, reply: Option<&Reply>) {
        if let Some(hold) = self.0.take() {
            let end = hold.burial(reason, reply);
            hold.finish(end, None);
        }
    }
}

#[async_trait]
impl Settlement for RedisSettlement {
    async fn settle(mut self: Box<Self>, settle: Settle) -> Result<(), Error> {
        let Some(hold) = self.0.take() else {
            return Err(error::lost_lease());
        };
        let end = match settle {
            Settle::Reply(reply) => hold.reply(reply.as_deref()),
            Settle::DeadLetter { reason, reply } => hold.burial(&reason, reply.as_deref()),
            Settle::Release => End::GiveBack {
                attempt: hold.token.attempt,
                keep: hold.keep,
            },
        };
        let (done, result) = oneshot::channel();
        hold.finish(end, Some(done));
        result.await.unwrap_or_else(|_| Err(error::closed()))
    }
}

impl Drop for RedisSettlement {
    fn drop(&mut self) {
        if let Some(hold) = self.0.take() {
            let attempt = hold.token.attempt.saturating_add(u32::from(hold.received));
            let end = End::GiveBack {
                attempt,
                keep: hold.keep,
            };
            hold.finish(end, None);
        }
    }
}

impl Hold {
    fn reply(&self, reply: Option<&Reply>) -> End {
        let reply = self.reply_to.as_ref().zip(reply);
        let large =
            reply.is_some_and(|(_, reply)| reply.body.len() > self.shared.config.inline_body);
        if self.body.is_some() || large {
            return End::Full(Box::new(self.full(reply)));
        }
        End::Plain {
            reply: reply.map(|(inbox, reply)| (inbox.clone(), encoded(reply, None))),
        }
    }

    fn burial(&self, reason: &str, reply: Option<&Reply>) -> End {
        let at = self.shared.clock.now().unwrap_or_default();
        let mut end = self.full(self.reply_to.as_ref().zip(reply));
        end.dead = Some(frame::dead_letter_head(reason, self.token.attempt, at));
        End::Full(Box::new(end))
    }

    fn full(&self, reply: Option<(&InboxKeys, &Reply)>) -> FullEnd {
        let mut end = FullEnd {
            request_body: self.body.clone(),
            ..FullEnd::default()
        };
        if let Some((inbox, reply)) = reply {
            let apart = (reply.body.len() > self.shared.config.inline_body).then(naming::random_id);
            end.reply = Some((inbox.clone(), encoded(reply, apart.as_deref())));
            end.reply_body = apart.map(|id| ApartBody::new(inbox.body(&id), reply.body.clone()));
        }
        end
    }

    fn finish(self, end: End, done: Option<oneshot::Sender<Result<(), Error>>>) {
        self.shared.completer.push(Item {
            expires: self.expires,
            ..Item::new(self.session, self.token, end, done)
        });
    }
}

fn encoded(reply: &Reply, apart: Option<&str>) -> Vec<u8> {
    let body = if apart.is_some() { 0 } else { reply.body.len() };
    let mut frame = Vec::with_capacity(96 + body);
    frame::encode_reply(reply, apart, &mut frame);
    frame
}

//! The transport's half of a delivery.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use antiphon_core::transport::{FlaggedToken, Later, Settle, Settled, Settlement, Unsettled};
use antiphon_core::{Error, Reply};
use tokio::time::Instant;

use crate::completer::{ApartBody, End, FullEnd, Item};
use crate::naming::{self, InboxKeys};
use crate::session::{Session, Token};
use crate::transport::Shared;
use crate::{error, frame};

/// One request in hand, and then on its way to be settled or given back: one allocation is both.
#[derive(Debug)]
pub(crate) struct RedisSettlement {
    /// None once it is on its way.
    shared: Option<Arc<Shared>>,
    pub(crate) session: Arc<Session>,
    pub(crate) token: Token,
    pub(crate) reply_to: Option<InboxKeys>,
    body: Option<String>,
    pub(crate) keep: Duration,
    expires: Option<Instant>,
    /// How it ends; as long as nobody said, how it ends if it is dropped.
    pub(crate) end: End,
    settled: Option<Settled>,
    /// It was written before, and nobody knows if it was executed.
    pub(crate) repeated: bool,
    /// The batch that it was in was refused for good, so it is asked for by itself.
    pub(crate) alone: bool,
}

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
}

impl RedisSettlement {
    pub(crate) fn new(hold: Hold) -> Self {
        let attempt = hold.token.attempt;
        let mut settlement = Self::returned(hold.session, hold.token, attempt, hold.keep);
        settlement.shared = Some(hold.shared);
        settlement.reply_to = hold.reply_to;
        settlement.body = hold.body;
        settlement.expires = hold.expires;
        settlement
    }

    /// One that is on its way back, for that attempt, to be kept there so long.
    pub(crate) fn returned(
        session: Arc<Session>,
        token: Token,
        attempt: u32,
        keep: Duration,
    ) -> Self {
        Self {
            shared: None,
            session,
            token,
            reply_to: None,
            body: None,
            keep,
            expires: None,
            end: End::GiveBack { attempt },
            settled: None,
            repeated: false,
            alone: false,
        }
    }

    /// It is given to the server: if it is dropped now, that counts as an attempt.
    pub(crate) fn receive(&mut self) {
        self.end = End::GiveBack {
            attempt: self.token.attempt.saturating_add(1),
        };
    }

    /// Buries the request, waiting for nothing.
    pub(crate) fn bury(mut self, reason: &str, reply: Option<&Reply>) {
        if let Some(shared) = self.shared.take() {
            self.end = self.burial(&shared, reason, reply);
            shared.completer.push(Box::new(self));
        }
    }

    /// Tells how it was settled, once.
    pub(crate) fn tell(&mut self, result: Result<(), Error>) {
        if let Some(settled) = self.settled.take() {
            settled.tell(result);
        }
    }

    /// Leaves out a reply that nobody waits for any more; the request is settled all the same.
    pub(crate) fn drop_expired(&mut self, now: Instant) {
        if self.expires.is_none_or(|expires| expires > now) {
            return;
        }
        match &mut self.end {
            End::Plain { reply } => *reply = None,
            End::Full(full) => (full.reply, full.reply_body) = (None, None),
            End::GiveBack { .. } => {}
        }
    }

    fn reply(&self, shared: &Shared, reply: Option<Arc<Reply>>) -> End {
        let reply = reply.filter(|_| self.reply_to.is_some());
        let is_large = |reply: &Arc<Reply>| reply.body.len() > shared.config.inline_body;
        if self.body.is_some() || reply.as_ref().is_some_and(is_large) {
            return End::Full(Box::new(self.full(shared, reply.as_deref())));
        }
        End::Plain { reply }
    }

    fn burial(&self, shared: &Shared, reason: &str, reply: Option<&Reply>) -> End {
        let at = shared.clock.now().unwrap_or_default();
        let mut end = self.full(shared, reply);
        end.dead = Some(frame::dead_letter_head(reason, self.token.attempt, at));
        End::Full(Box::new(end))
    }

    fn full(&self, shared: &Shared, reply: Option<&Reply>) -> FullEnd {
        let mut end = FullEnd {
            request_body: self.body.clone(),
            ..FullEnd::default()
        };
        if let Some((inbox, reply)) = self.reply_to.as_ref().zip(reply) {
            let apart = (reply.body.len() > shared.config.inline_body).then(naming::random_id);
            end.reply = Some((inbox.clone(), encoded(reply, apart.as_deref())));
            end.reply_body = apart.map(|id| ApartBody::new(inbox.body(&id), reply.body.clone()));
        }
        end
    }
}

#[cfg(test)]
impl RedisSettlement {
    /// One on its way with a reply that is waited for until then.
    pub(crate) fn replying(session: Arc<Session>, reply: Reply, expires: Option<Instant>) -> Self {
        let token = Token {
            number: 1,
            attempt: 1,
        };
        let mut settlement = Self::returned(session, token, 1, Duration::ZERO);
        settlement.reply_to = InboxKeys::new("caller");
        settlement.expires = expires;
        let reply = Some(Arc::new(reply));
        settlement.end = End::Plain { reply };
        settlement
    }
}

impl Settlement for RedisSettlement {
    fn settle(
        mut self: Box<Self>,
        settle: Settle,
        later: Later<'_>,
    ) -> Poll<Result<(), Unsettled>> {
        let Some(shared) = self.shared.take() else {
            return Poll::Ready(Err(Unsettled::new(error::lost_lease(), settle)));
        };
        self.settled = Some(later.settled(&settle));
        self.end = match settle {
            Settle::Reply(reply) => self.reply(&shared, reply),
            Settle::DeadLetter { reason, reply } => self.burial(&shared, &reason, reply.as_deref()),
            Settle::Release => End::GiveBack {
                attempt: self.token.attempt,
            },
        };
        shared.completer.push(self);
        Poll::Pending
    }

    fn lease(&self) -> &FlaggedToken {
        &self.session.lease
    }
}

impl Drop for RedisSettlement {
    fn drop(&mut self) {
        if let (Some(shared), &End::GiveBack { attempt }) = (self.shared.take(), &self.end) {
            let session = Arc::clone(&self.session);
            let back = Self::returned(session, self.token, attempt, self.keep);
            shared.completer.push(Item::new(back));
        }
    }
}

fn encoded(reply: &Reply, apart: Option<&str>) -> Vec<u8> {
    let body = if apart.is_some() { 0 } else { reply.body.len() };
    let mut frame = Vec::with_capacity(96 + body);
    frame::encode_reply(reply, apart, &mut frame);
    frame
}

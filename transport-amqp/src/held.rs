//! One delivery in this server's hands, from its arrival to its acknowledgement.

use std::sync::Arc;
use std::time::Duration;

use antiphon_core::transport::{FlaggedToken, Settled};
use antiphon_core::{CorrelationId, Error, Reply, Request};
use bytes::Bytes;
use lapin::BasicProperties;
use lapin::types::ShortString;
use tokio::time::Instant;

use crate::intake::Origin;
use crate::message;
use crate::naming::QueueNames;
use crate::outlet::Message;

/// How long a reply that finds no inbox is tried again: its caller may be connecting again just now.
const RETURNED_FOR: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) origin: Origin,
    /// By which it is acknowledged on the present channel. None once that channel is lost: the request then waits in its
    /// queue again, and this is but a copy.
    pub(crate) tag: Option<u64>,
    pub(crate) attempt: u32,
    pub(crate) identity: Option<Identity>,
    pub(crate) progress: Progress,
    /// It is in another queue, or in its own once more.
    pub(crate) moved: bool,
    /// It takes a handler's place.
    pub(crate) handed: bool,
    /// Who is to be told when it is settled.
    pub(crate) settled: Option<Settled>,
    properties: BasicProperties,
    body: Bytes,
    plain: bool,
    taken: Instant,
    /// When a reply first came back.
    returned: Option<Instant>,
    /// Its reply was replaced by a fault.
    pub(crate) replaced: bool,
    /// How many channels the broker closed while something of it was on them.
    pub(crate) deaths: u32,
    /// How often the broker did not take what is published for it.
    pub(crate) refusals: u32,
}

/// By which a copy of the same request is known. Plain peers may use any id twice, so theirs have none.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Identity {
    id: CorrelationId,
    reply_to: Option<ShortString>,
}

#[derive(Debug)]
pub(crate) enum Progress {
    /// Not yet given to a handler: all handlers are busy.
    Waiting(Box<Decoded>),
    /// A handler has it.
    InHand,
    /// Something must be in its queue before it can be acknowledged.
    Publishing(Work),
    /// To be acknowledged, or just being.
    Acking,
}

/// A request as its handler gets it.
#[derive(Debug)]
pub(crate) struct Decoded {
    pub(crate) request: Request,
    pub(crate) expires: Option<Instant>,
    pub(crate) lease: Arc<FlaggedToken>,
    /// As of [`Delivery::waited`](antiphon_core::transport::Delivery::waited).
    pub(crate) waited: bool,
}

/// What is published for a delivery.
#[derive(Debug)]
pub(crate) enum Work {
    Reply(Arc<Reply>),
    /// To the dead letters, and then the reply.
    Bury {
        reason: String,
        reply: Option<Arc<Reply>>,
    },
    /// Back to the queue it came from, as it was.
    Release,
    /// To the retry queue, with its attempt counted.
    Retry,
}

impl Held {
    pub(crate) fn new(
        origin: Origin,
        tag: u64,
        properties: BasicProperties,
        body: Bytes,
        progress: Progress,
    ) -> Self {
        let attempt = match origin {
            Origin::Main => 1,
            Origin::Retry => message::attempt(&properties),
        };
        Self {
            origin,
            tag: Some(tag),
            attempt,
            identity: Identity::of(&properties),
            progress,
            moved: false,
            handed: false,
            settled: None,
            plain: message::is_plain(&properties),
            properties,
            body,
            taken: Instant::now(),
            returned: None,
            replaced: false,
            deaths: 0,
            refusals: 0,
        }
    }

    /// Where its reply goes.
    pub(crate) fn reply_to(&self) -> Option<&ShortString> {
        let address = self.properties.reply_to().as_ref()?;
        (!address.as_str().is_empty()).then_some(address)
    }

    /// True if both may be the same request.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        self.properties.correlation_id() == other.properties.correlation_id()
            && self.properties.reply_to() == other.properties.reply_to()
            && self.body == other.body
    }

    /// True while the request itself is on its way to a queue.
    pub(crate) fn goes_round(&self) -> bool {
        matches!(
            self.progress,
            Progress::Publishing(Work::Release | Work::Retry)
        )
    }

    /// The message that is to be published for it; `None` if there is none.
    pub(crate) fn message(&self, names: &QueueNames) -> Option<Message> {
        let Progress::Publishing(work) = &self.progress else {
            return None;
        };
        let left = message::time_to_live(&self.properties)
            .map(|budget| budget.saturating_sub(self.taken.elapsed()));
        // The headers of plain peers may be what the broker does not take back.
        let bare = self.deaths > 1;
        let (queue, properties, body) = match work {
            Work::Reply(reply) => {
                let correlation = self.properties.correlation_id().clone();
                let (properties, body) = message::encode_reply(reply, correlation, self.plain);
                (self.reply_to()?.clone(), properties, body)
            }
            Work::Bury { reason, .. } => {
                let properties = message::bury(&self.properties, self.attempt, reason, bare);
                (names.dead.clone(), properties, self.body.clone())
            }
            Work::Release => {
                let (queue, attempt) = match self.origin {
                    Origin::Main => (&names.main, 1),
                    Origin::Retry => (&names.retry, self.attempt),
                };
                let properties = message::forward(&self.properties, attempt, left, bare);
                (queue.clone(), properties, self.body.clone())
            }
            Work::Retry => {
                let attempt = self.attempt.saturating_add(1);
                let properties = message::forward(&self.properties, attempt, left, bare);
                (names.retry.clone(), properties, self.body.clone())
            }
        };
        Some(Message {
            exchange: ShortString::default(),
            queue,
            properties,
            body,
        })
    }

    /// A reply came back: when it is to be given up.
    pub(crate) fn returned_until(&mut self) -> Instant {
        let first = *self.returned.get_or_insert_with(Instant::now);
        let end = first + RETURNED_FOR;
        match message::time_to_live(&self.properties) {
            Some(budget) => end.min(self.taken + budget),
            None => end,
        }
    }

    /// True once its time is up.
    pub(crate) fn is_expired(&self) -> bool {
        let budget = message::time_to_live(&self.properties);
        budget.is_some_and(|budget| self.taken.elapsed() >= budget)
    }

    pub(crate) fn taken(&self) -> Instant {
        self.taken
    }

    /// Takes the request out for a handler, if it waits for one.
    pub(crate) fn hand(&mut self) -> Option<Decoded> {
        match std::mem::replace(&mut self.progress, Progress::InHand) {
            Progress::Waiting(decoded) => Some(*decoded),
            other => {
                self.progress = other;
                None
            }
        }
    }

    pub(crate) fn resolve(&mut self, result: Result<(), Error>) {
        if let Some(settled) = self.settled.take() {
            settled.tell(result);
        }
    }
}

impl Identity {
    pub(crate) fn of(properties: &BasicProperties) -> Option<Self> {
        if message::is_plain(properties) {
            return None;
        }
        let id = CorrelationId::parse(properties.correlation_id().as_ref()?.as_str()).ok()?;
        Some(Self {
            id,
            reply_to: properties.reply_to().clone(),
        })
    }
}

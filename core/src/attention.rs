//! What a call attends to besides its reply: a token that gives it up, offers to take it, and what its server says.

use std::future::pending;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until, timeout_at};

use crate::call::{Attended, CallEvent};
use crate::envelope::{CorrelationId, Outcome, Reply};
use crate::error::{Error, ErrorKind, Executed};
use crate::exchange::Exchange;
use crate::fault::{Code, Fault};
use crate::listeners::{Listening, Wants};
use crate::name::ReplyAddress;
use crate::signal::Signal;
use crate::transport::{Outbound, Transport};

/// Why a call ends before its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopped {
    Cancelled,
    NotPickedUp,
}

/// A call's ears. Only calls that asked for something have them.
pub(crate) struct Attention<'a> {
    attended: &'a Attended,
    transport: &'a Arc<dyn Transport>,
    listening: Option<Listening>,
    deadline: Instant,
    /// None if no server need ask any more.
    pickup: Option<Pin<Box<Sleep>>>,
}

impl<'a> Attention<'a> {
    pub(crate) fn new(exchange: &Exchange<'a>, attended: &'a Attended, number: u128) -> Self {
        let listens = attended.pickup_timeout.is_some() || attended.observer.is_some();
        Self {
            attended,
            transport: exchange.client.shared_transport(),
            deadline: exchange.deadline,
            listening: listens.then(|| exchange.client.listeners().listen(number, Wants::Signals)),
            pickup: attended
                .pickup_timeout
                .map(|timeout| Box::pin(sleep_until(exchange.started + timeout))),
        }
    }

    /// Attends, until the call is to be stopped.
    pub(crate) async fn attend(&mut self) -> Stopped {
        loop {
            let cancelled = async {
                match &self.attended.cancel {
                    Some(token) => token.cancelled().await,
                    None => pending().await,
                }
            };
            let heard = async {
                match &mut self.listening {
                    Some(listening) => listening.recv().await,
                    None => pending().await,
                }
            };
            let not_picked_up = async {
                match &mut self.pickup {
                    Some(sleep) => sleep.as_mut().await,
                    None => pending().await,
                }
            };
            tokio::select! {
                biased;
                () = cancelled => return Stopped::Cancelled,
                reply = heard => self.hear(reply),
                () = not_picked_up => return Stopped::NotPickedUp,
            }
        }
    }

    /// Hears what was said before the reply. No offer is accepted any more.
    pub(crate) fn hear_the_rest(&mut self) {
        while let Some(reply) = self.listening.as_mut().and_then(Listening::try_recv) {
            if !matches!(reply.outcome, Outcome::Signal(Signal::Offer { .. })) {
                self.hear(reply);
            }
        }
    }

    fn hear(&mut self, reply: Arc<Reply>) {
        let reply = Arc::unwrap_or_clone(reply);
        let Outcome::Signal(signal) = reply.outcome else {
            return;
        };
        let event = match signal {
            Signal::Running { node, .. } => CallEvent::Running { node },
            Signal::Progress { node } => CallEvent::Progress {
                node,
                body: reply.body,
            },
            Signal::Offer { to, id, .. } => return self.accept(to, Reply::value(id, "").into()),
        };
        if let Some(observer) = &self.attended.observer {
            // A panic in it ended its call.
            observer.lock().unwrap_or_else(PoisonError::into_inner)(event);
        }
    }

    /// Tells a server to start: the first that asks, and any that has the request after that one died.
    fn accept(&mut self, to: ReplyAddress, reply: Arc<Reply>) {
        self.pickup = None;
        answer_offer(self.transport, to, reply, self.deadline);
    }
}

/// Answers an offer that nobody attends to: a value has the request started, a fault has it left.
pub(crate) fn answer_unattended(
    transport: &Arc<dyn Transport>,
    (to, id): (ReplyAddress, CorrelationId),
    is_wanted: bool,
) {
    let answer = match is_wanted {
        true => Reply::value(id, ""),
        false => {
            let fault = Fault::new(Code::Cancelled, "the call has ended");
            Reply::fault(id, fault, Executed::No)
        }
    };
    answer_offer(
        transport,
        to,
        answer.into(),
        Instant::now() + ANSWERED_WITHIN,
    );
}

/// Not waited for: a call has its reply to wait for, and a client others.
fn answer_offer(
    transport: &Arc<dyn Transport>,
    to: ReplyAddress,
    reply: Arc<Reply>,
    deadline: Instant,
) {
    let transport = Arc::clone(transport);
    tokio::spawn(async move {
        let sent = timeout_at(deadline, transport.send(Outbound::Reply { to, reply })).await;
        if let Ok(Err(error)) = sent {
            tracing::debug!(%error, "a server's offer was not answered");
        }
    });
}

/// No server waits longer for an answer.
const ANSWERED_WITHIN: Duration = Duration::from_secs(10);

impl Stopped {
    pub(crate) fn kind(self) -> ErrorKind {
        match self {
            Self::Cancelled => ErrorKind::Cancelled,
            Self::NotPickedUp => ErrorKind::PickupTimeout,
        }
    }

    pub(crate) fn error(self, executed: Executed) -> Error {
        let message = match self {
            Self::Cancelled => "the call was given up",
            Self::NotPickedUp => "no server took it in time",
        };
        Error::new(self.kind(), executed, message)
    }
}

//! A valid call on its way, to its one outcome.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::attention::{Attention, Stopped};
use crate::call::Options;
use crate::client::Client;
use crate::envelope::{Deadline, Outcome, Reply, Request};
use crate::error::{Error, ErrorKind, Executed};
use crate::given_up::Lost;
use crate::name::{ReplyAddress, ServiceName};
use crate::pending::{Ended, Entered, Slot};
use crate::signal::Signals;
use crate::ticket::Ticket;
use crate::transport::Outbound;

/// A valid call on its way.
pub(crate) struct Exchange<'a> {
    pub(crate) client: &'a Client,
    pub(crate) service: &'a ServiceName,
    pub(crate) request: &'a mut Arc<Request>,
    pub(crate) options: &'a Options,
    pub(crate) started: Instant,
    pub(crate) deadline: Instant,
}

type Sending<'a> = Pin<Box<dyn Future<Output = Result<(), Error>> + Send + 'a>>;

/// How one try to get a reply ended.
enum Try {
    Ended(Ended),
    SendFailed(Error),
    Stopped(Stopped),
}

impl Exchange<'_> {
    /// The number behind the id.
    pub(crate) fn number(&self) -> Result<u128, Error> {
        self.request.id.as_u128().ok_or_else(|| {
            Error::not_executed(ErrorKind::Invalid, "a correlation id of ours is a UUID")
        })
    }

    pub(crate) async fn call(&mut self) -> Result<Arc<Reply>, Error> {
        let number = self.number()?;
        let mut now = self.started;
        loop {
            let budget = self.remaining(now)?;
            let attended = self.options.attended.as_ref();
            let mut attention =
                attended.map(|attended| Box::new(Attention::new(self, attended, number)));
            // Entered before it is sent: a reply may be there before `send` resolves.
            let Entered {
                mut slot,
                address,
                wall,
            } = self.client.pending().enter(number, now, self.deadline)?;
            self.address(Some(address), Deadline::of(wall, budget));
            let this = &*self;
            let mut outstanding = Outstanding {
                exchange: this,
                ticket: WithdrawOnDrop(slot.ticket()),
                is_unwanted: true,
            };
            let ticket = &outstanding.ticket;
            let attempt = this.attempt(&ticket.0, &mut slot);
            let tried = match &mut attention {
                None => attempt.await,
                Some(attention) => {
                    let tried = tokio::select! {
                        biased;
                        stopped = attention.attend() => Try::Stopped(stopped),
                        tried = attempt => tried,
                    };
                    if matches!(tried, Try::Ended(_)) {
                        attention.hear_the_rest();
                    }
                    tried
                }
            };
            let result = match tried {
                Try::Ended(Ended::Reply(reply)) => match &reply.outcome {
                    Outcome::Fault { fault, executed } => {
                        Err(Error::from_fault(fault.clone(), *executed))
                    }
                    _ => Ok(reply),
                },
                Try::Ended(Ended::Bad(error)) => Err(error),
                Try::SendFailed(error) => Err(this.send_failed(error, ticket)),
                Try::Ended(Ended::TimedOut) => {
                    Err(deadline_exceeded(this.started, ticket.executed()))
                }
                Try::Ended(Ended::Closed(error)) => Err(error.with_executed(ticket.executed())),
                // The inbox was lost before this request went out: nobody has seen it, so it goes out
                // with the new address.
                Try::Ended(Ended::InboxLost(_)) if ticket.0.withdraw() => {
                    now = Instant::now();
                    continue;
                }
                Try::Ended(Ended::InboxLost(error)) => Err(error.with_executed(Executed::Maybe)),
                Try::Ended(Ended::ServerLost) => {
                    let message = "its server has been silent for three heartbeats";
                    return Err(Error::maybe_executed(ErrorKind::ServerLost, message));
                }
                // No server starts before it was told to, and none was.
                Try::Stopped(Stopped::NotPickedUp) => {
                    return Err(Stopped::NotPickedUp.error(Executed::No));
                }
                Try::Stopped(stopped) => return Err(stopped.error(ticket.executed())),
            };
            outstanding.is_unwanted = false;
            return result;
        }
    }

    pub(crate) async fn notify(&mut self) -> Result<(), Error> {
        if self.options.attended.is_some() {
            let message =
                "a one-way request has no pickup timeout, no observer and nothing to cancel";
            return Err(Error::not_executed(ErrorKind::Invalid, message));
        }
        self.client.pending().check_open()?;
        let ticket = WithdrawOnDrop(Ticket::new());
        let budget = self.remaining(self.started)?;
        self.address(None, Deadline::after(budget));
        let sending = self.send(&ticket.0);
        match timeout_at(self.deadline, sending).await {
            Ok(sent) => sent.map_err(|error| self.send_failed(error, &ticket)),
            Err(_) => Err(deadline_exceeded(self.started, ticket.executed())),
        }
    }

    /// What is left of the time before the request is sent.
    pub(crate) fn remaining(&self, now: Instant) -> Result<Duration, Error> {
        match self.deadline.saturating_duration_since(now) {
            Duration::ZERO => Err(deadline_exceeded(self.started, Executed::No)),
            remaining => Ok(remaining),
        }
    }

    /// A transport that closes need not know of each request whether it went out; the ticket does.
    fn send_failed(&self, error: Error, ticket: &WithdrawOnDrop) -> Error {
        match error.kind() {
            ErrorKind::Closed => error.with_executed(ticket.executed()),
            _ => error,
        }
    }

    async fn attempt(&self, ticket: &Ticket, slot: &mut Slot) -> Try {
        let (service, expects) = (self.service, self.options.expect_responder);
        let transport = self.client.transport();
        let mut sending = match transport.send_at_once(service, self.request, expects, ticket) {
            Some(Ok(())) => None,
            Some(Err(error)) => return Try::SendFailed(error),
            None => Some(self.send(ticket)),
        };
        poll_fn(|cx| {
            // A reply proves that the request was accepted: nothing more is waited for. And what has timed out is not sent.
            if let Poll::Ready(ended) = slot.poll_ended(cx) {
                return Poll::Ready(Try::Ended(ended));
            }
            if let Some(send) = &mut sending
                && let Poll::Ready(sent) = send.as_mut().poll(cx)
            {
                sending = None;
                if let Err(error) = sent {
                    return Poll::Ready(Try::SendFailed(error));
                }
            }
            Poll::Pending
        })
        .await
    }

    /// Not async, so that the message has no place in the future of the call.
    fn send(&self, ticket: &Ticket) -> Sending<'_> {
        self.client.transport().send(Outbound::Request {
            service: self.service.clone(),
            request: Arc::clone(self.request),
            expect_responder: self.options.expect_responder,
            ticket: ticket.clone(),
        })
    }

    /// Writes on the request what is known when it is sent. It is copied only if it was sent before.
    pub(crate) fn address(&mut self, reply_to: Option<ReplyAddress>, deadline: Deadline) {
        let signals = match self.options.pickup_timeout() {
            Some(_) => Signals::Offer,
            None => Signals::Running,
        };
        let request = Arc::make_mut(self.request);
        request.reply_to = reply_to;
        request.deadline = Some(deadline);
        request.signals = signals;
    }
}

/// A request of which the outcome is not known. If its call ends without one, nobody wants it any more.
struct Outstanding<'a> {
    exchange: &'a Exchange<'a>,
    ticket: WithdrawOnDrop,
    is_unwanted: bool,
}

impl Drop for Outstanding<'_> {
    fn drop(&mut self) {
        if self.is_unwanted && !self.ticket.0.withdraw() {
            self.exchange.client.given_up().add(Lost {
                service: self.exchange.service.clone(),
                id: self.exchange.request.id.clone(),
                deadline: self.exchange.deadline,
            });
        }
    }
}

/// Withdraws a request that was not sent when its call ends, however it ends.
struct WithdrawOnDrop(Ticket);

impl WithdrawOnDrop {
    /// What is known of a request that gets no reply.
    fn executed(&self) -> Executed {
        if self.0.withdraw() {
            Executed::No
        } else {
            Executed::Maybe
        }
    }
}

impl Drop for WithdrawOnDrop {
    fn drop(&mut self) {
        // If it was sent, there is nothing to withdraw, and the answer says just that.
        let _ = self.0.withdraw();
    }
}

pub(crate) fn deadline_exceeded(started: Instant, executed: Executed) -> Error {
    let waited = started.elapsed();
    let message = match executed {
        Executed::No => format!("the request was not sent within {waited:.1?}"),
        Executed::Maybe | Executed::Yes => format!("no reply within {waited:.1?}"),
    };
    Error::new(ErrorKind::DeadlineExceeded, executed, message)
}

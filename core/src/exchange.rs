//! A valid call on its way, to its one outcome.

use std::future::{Future, pending, poll_fn};
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::attention::{Attention, Stopped};
use crate::call::Options;
use crate::client::Client;
use crate::envelope::{Deadline, Outcome, Reply, Request};
use crate::error::{Error, ErrorKind, Executed};
use crate::given_up::Lost;
use crate::name::{ReplyAddress, ServiceName};
use crate::pending::{Ended, Place};
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
    /// From the start to the deadline.
    pub(crate) budget: Duration,
}

type Sending = Pin<Box<dyn Future<Output = Result<(), Error>> + Send>>;

/// How one try to get a reply ended.
pub(crate) enum Try {
    Ended(Ended),
    Stopped(Stopped),
}

impl Exchange<'_> {
    /// The number behind the id.
    pub(crate) fn number(&self) -> Result<u128, Error> {
        self.request.id.as_u128().ok_or_else(|| {
            Error::not_executed(ErrorKind::Invalid, "a correlation id of ours is a UUID")
        })
    }

    /// A call that may attend to more than its reply.
    pub(crate) async fn call(&mut self) -> Result<Arc<Reply>, Error> {
        let (mut now, number) = (self.started, self.number()?);
        loop {
            let attended = self.options.attended.as_deref();
            let mut attention = attended.map(|attended| Attention::new(self, attended, number));
            let attempt = self.begin(now, None)?;
            let this = &*self;
            let mut outstanding = Outstanding {
                exchange: this,
                attempt,
                is_unwanted: true,
            };
            let stopped = async {
                match &mut attention {
                    Some(attention) => attention.attend().await,
                    None => pending().await,
                }
            };
            let mut is_sent = false;
            let ended = poll_fn(|cx| {
                // Others may have had their turn since it entered: not sent if it has stopped or ended already.
                let polled = outstanding.attempt.poll(cx);
                if polled.is_ready() || mem::replace(&mut is_sent, true) {
                    return polled;
                }
                this.send(&mut outstanding.attempt);
                outstanding.attempt.poll(cx)
            });
            let tried = tokio::select! {
                biased;
                stopped = stopped => Try::Stopped(stopped),
                ended = ended => Try::Ended(ended),
            };
            outstanding.is_unwanted = false;
            if let (Some(attention), Try::Ended(_)) = (&mut attention, &tried) {
                attention.hear_the_rest();
            }
            match this.outcome(tried, &outstanding.attempt) {
                Some(result) => return result,
                None => now = Instant::now(),
            }
        }
    }

    /// Enters the call, and writes on the request what is known when it is sent. If it is sent and polled for the first time within
    /// the present poll, the waker of that saves a look.
    pub(crate) fn begin(&mut self, now: Instant, waker: Option<&Waker>) -> Result<Attempt, Error> {
        let number = self.number()?;
        let budget = self.remaining(now)?;
        // Entered before it is sent: a reply may be there at once.
        let pending = self.client.pending();
        let entered = pending.enter(number, now, self.deadline, waker)?;
        let deadline = Deadline::of(entered.wall, budget);
        self.address(Some(entered.address), deadline);
        Ok(Attempt {
            place: entered.place,
            sending: None,
            is_new: waker.is_some(),
        })
    }

    /// Sends the request. An attempt that has not ended must be [given up](Self::give_up) before it is left.
    pub(crate) fn send(&self, attempt: &mut Attempt) {
        let ticket = attempt.place.ticket();
        let is_taken = self.client.transport().post(
            self.service,
            self.request,
            self.options.expect_responder,
            ticket,
        );
        if !is_taken {
            attempt.sending = Some(self.sending(ticket));
        }
    }

    /// What the end of a try means for the call; none if it is to be made again. What nobody wants any more is given up.
    pub(crate) fn outcome(
        &self,
        tried: Try,
        attempt: &Attempt,
    ) -> Option<Result<Arc<Reply>, Error>> {
        let ticket = attempt.place.ticket();
        Some(match tried {
            Try::Ended(Ended::Reply(reply)) => answer(reply),
            Try::Ended(Ended::Bad(error)) => Err(error),
            Try::Ended(Ended::SendFailed(error)) => Err(send_failed(error, ticket)),
            Try::Ended(Ended::TimedOut) => Err(deadline_exceeded(self.started, ticket.executed())),
            Try::Ended(Ended::Closed(error)) => {
                self.give_up(attempt);
                Err(error.with_executed(ticket.executed()))
            }
            // The inbox was lost before this request went out: nobody has seen it, so it goes out
            // with the new address.
            Try::Ended(Ended::InboxLost(_)) if ticket.withdraw() => return None,
            Try::Ended(Ended::InboxLost(error)) => Err(error.with_executed(Executed::Maybe)),
            Try::Ended(Ended::ServerLost) => {
                self.give_up(attempt);
                let message = "its server has been silent for three heartbeats";
                Err(Error::maybe_executed(ErrorKind::ServerLost, message))
            }
            // No server starts before it was told to, and none was.
            Try::Stopped(Stopped::NotPickedUp) => {
                self.give_up(attempt);
                Err(Stopped::NotPickedUp.error(Executed::No))
            }
            Try::Stopped(stopped) => {
                self.give_up(attempt);
                Err(stopped.error(ticket.executed()))
            }
        })
    }

    /// Nobody wants the outcome any more. What was sent is taken back, or the servers told.
    pub(crate) fn give_up(&self, attempt: &Attempt) {
        if !attempt.place.ticket().withdraw() {
            self.client.given_up().add(Lost {
                service: self.service.clone(),
                id: self.request.id.clone(),
                deadline: self.deadline,
            });
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
        let sending = self.sending(&ticket.0);
        match timeout_at(self.deadline, sending).await {
            Ok(sent) => sent.map_err(|error| send_failed(error, &ticket.0)),
            Err(_) => Err(deadline_exceeded(self.started, ticket.0.executed())),
        }
    }

    /// What is left of the time before the request is sent.
    pub(crate) fn remaining(&self, now: Instant) -> Result<Duration, Error> {
        let remaining = match now == self.started {
            // Most are sent at once, and to subtract times is not free.
            true => self.budget,
            false => self.deadline.saturating_duration_since(now),
        };
        match remaining {
            Duration::ZERO => Err(deadline_exceeded(self.started, Executed::No)),
            remaining => Ok(remaining),
        }
    }

    /// Not async, so that the message has no place in the future of the call.
    fn sending(&self, ticket: &Ticket) -> Sending {
        let transport = Arc::clone(self.client.shared_transport());
        let message = Outbound::Request {
            service: self.service.clone(),
            request: Arc::clone(self.request),
            expect_responder: self.options.expect_responder,
            ticket: ticket.clone(),
        };
        Box::pin(async move { transport.send(message).await })
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

/// One try to get a reply: a place in the table, and the request on its way. To be [left](Self::leave) in the end.
pub(crate) struct Attempt {
    place: Place,
    /// If its request takes a future to be sent: until it is accepted.
    sending: Option<Sending>,
    /// It entered within the present poll, with its waker.
    is_new: bool,
}

impl Attempt {
    /// Waits for the end; not to be polled again after it.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        // All that happened since has woken that waker.
        let may_have_ended = !mem::take(&mut self.is_new);
        // A reply proves that the request was accepted: nothing more is waited for.
        if may_have_ended && let Poll::Ready(ended) = self.place.poll_ended(cx) {
            return Poll::Ready(ended);
        }
        // After the end was asked for: what has timed out while it waited to be sent is not sent.
        if let Some(sending) = &mut self.sending
            && let Poll::Ready(sent) = sending.as_mut().poll(cx)
        {
            self.sending = None;
            if let Err(error) = sent {
                return Poll::Ready(Ended::SendFailed(error));
            }
        }
        Poll::Pending
    }

    /// Leaves nothing behind; the request is withdrawn if it was not sent.
    pub(crate) fn leave(&mut self, client: &Client) {
        // If it was sent, there is nothing to withdraw, and the answer says just that.
        let _ = self.place.ticket().withdraw();
        client.pending().leave(&mut self.place);
    }
}

/// An attempt that is left when this is dropped. If its outcome is not known then, nobody wants it any more.
struct Outstanding<'a> {
    exchange: &'a Exchange<'a>,
    attempt: Attempt,
    is_unwanted: bool,
}

impl Drop for Outstanding<'_> {
    fn drop(&mut self) {
        if self.is_unwanted {
            self.exchange.give_up(&self.attempt);
        }
        self.attempt.leave(self.exchange.client);
    }
}

/// Withdraws a one-way request that was not sent when its call ends, however it ends.
struct WithdrawOnDrop(Ticket);

impl Drop for WithdrawOnDrop {
    fn drop(&mut self) {
        let _ = self.0.withdraw();
    }
}

/// What a reply means for its call.
pub(crate) fn answer(reply: Arc<Reply>) -> Result<Arc<Reply>, Error> {
    match &reply.outcome {
        Outcome::Fault { fault, executed } => Err(Error::from_fault(fault.clone(), *executed)),
        _ => Ok(reply),
    }
}

/// A transport that closes need not know of each request whether it went out; the ticket does.
fn send_failed(error: Error, ticket: &Ticket) -> Error {
    match error.kind() {
        ErrorKind::Closed => error.with_executed(ticket.executed()),
        _ => error,
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

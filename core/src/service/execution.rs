//! The execution of one request: refused, or handled, and settled.

use std::any::Any;
use std::mem;
use std::panic::{self, AssertUnwindSafe};
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::task::{self, Poll, Waker};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::CatchUnwind;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::{Service, UnderWay};
use crate::config;
use crate::context::{self, Context};
use crate::envelope::{CorrelationId, Outcome, Reply, Request};
use crate::error::{Error, ErrorKind, Executed};
use crate::fault::{Code, Fault};
use crate::handler::{AnyHandler, Failure, Handling, Response};
use crate::server::{Keeping, KeptTo, count};
use crate::settled::never_told;
use crate::signal::{Signal, Signals};
use crate::transport::{Delivery, Later, Settle, Settled, Settlement, Told, Unsettled};

/// What is left of an execution where something was not ready at its first poll.
pub(super) enum Left {
    Handler(Box<Begun>),
    Settlement(Unended),
}

/// A settlement whose reply may have to be stored.
pub(super) enum Unended {
    Failed(Error, Unsent),
    /// It may have to be before the broker says anything.
    UnderWay(Told, Unsent),
}

/// A request whose handler runs.
pub(super) struct Begun {
    // Dropped first: what it holds is free before another server has the request.
    running: CatchUnwind<AssertUnwindSafe<Handling>>,
    /// None if the handler did not ask for it.
    context: Option<Context>,
    delivery: Delivery,
    deadline: Instant,
    at: Instant,
}

/// What is needed, besides the reply, to keep it if it cannot be sent.
struct Kept {
    request: Arc<Request>,
    expires: Option<Instant>,
}

impl Kept {
    fn unsent(self, settle: &Settle) -> Option<Unsent> {
        Some(Unsent {
            request: self.request,
            reply: Arc::clone(settle.reply()?),
            expires: self.expires,
        })
    }
}

/// A reply that may have to be kept.
pub(super) struct Unsent {
    /// It says where to.
    request: Arc<Request>,
    reply: Arc<Reply>,
    /// Until when somebody waits for it.
    expires: Option<Instant>,
}

/// How a handler ended, if not by a panic.
type Handled = Result<Result<Response, Failure>, Box<dyn Any + Send>>;

impl Service {
    /// Executes a request as far as it goes without waiting, which most go to their end: what waits carries places for all
    /// that it may wait for. `now` moves on.
    ///
    /// Nothing is woken by this: what is left must be [finished](Self::finish), which polls again.
    pub(super) fn begin(
        self: &Arc<Self>,
        mut delivery: Delivery,
        now: &mut Instant,
    ) -> Option<Left> {
        let at = *now;
        let deadline = delivery
            .expires
            .unwrap_or_else(|| at + self.config.default_timeout);
        let handler = match self.admit(&delivery, deadline <= at) {
            Ok(handler) => handler,
            Err(fault) => {
                let refused = Failed::refused(fault, delivery.attempt);
                return self.answer(delivery, Err(refused)).map(Left::Settlement);
            }
        };
        // It may have waited for its turn since it was taken. Dropped unsettled, it goes to another server.
        if self.kill.is_cancelled() || delivery.lease().is_cancelled() {
            return None;
        }
        let body = match own(&mut delivery.request) {
            // Nobody else reads it: a share of it would cost an allocation.
            Some(request) => mem::take(&mut request.body),
            None => delivery.request.body.clone(),
        };
        let mut context = None;
        let mut ask = || {
            let made = context.get_or_insert_with(|| self.context(&delivery, deadline));
            Context::clone(made)
        };
        let started = panic::catch_unwind(AssertUnwindSafe(|| handler.handle(body, &mut ask)));
        let handled = match started {
            Ok(running) => {
                let mut running = AssertUnwindSafe(running).catch_unwind();
                match poll_once(&mut running) {
                    Poll::Ready(handled) => handled,
                    Poll::Pending => {
                        *now = Instant::now();
                        return Some(Left::Handler(Box::new(Begun {
                            delivery,
                            deadline,
                            context,
                            running,
                            at,
                        })));
                    }
                }
            }
            Err(panic) => Err(panic),
        };
        *now = Instant::now();
        self.took(&delivery, *now - at);
        let outcome = self.outcome(handled, delivery.attempt);
        self.answer(delivery, outcome).map(Left::Settlement)
    }

    /// Takes what [`begin`](Self::begin) left to its end.
    pub(super) async fn finish(self: Arc<Self>, left: Left) {
        let unended = match left {
            Left::Settlement(unended) => Some(unended),
            Left::Handler(mut begun) => {
                let supervised = self.supervise(&mut begun).await;
                self.took(&begun.delivery, begun.at.elapsed());
                let Begun {
                    running, delivery, ..
                } = *begun;
                drop(running);
                let outcome = match supervised {
                    Supervised::Ended(handled) => self.outcome(handled, delivery.attempt),
                    Supervised::Overdue(why) => Err(self.overdue(why)),
                    Supervised::Killed => return, // Dropped unsettled: the request goes to another server.
                };
                self.answer(delivery, outcome)
            }
        };
        match unended {
            Some(Unended::Failed(error, unsent)) => {
                self.keep_or_count(&error, Some(&unsent), None).await;
            }
            Some(Unended::UnderWay(told, unsent)) => {
                let (settled, kept) = Box::pin(self.settled_or_kept(told, &unsent)).await;
                if let Some(Err(error)) = settled {
                    self.keep_or_count(&error, Some(&unsent), kept).await;
                }
            }
            None => {}
        }
    }

    fn took(&self, delivery: &Delivery, elapsed: Duration) {
        self.counters.took(elapsed);
        let (id, attempt) = (&delivery.request.id, delivery.attempt);
        tracing::debug!(service = %self.name, %id, attempt, ?elapsed, "a handler has ended");
    }

    /// Settles a request by what came of it. What is left, if anything, is to be [finished](Self::finish).
    fn answer(
        self: &Arc<Self>,
        delivery: Delivery,
        outcome: Result<Response, Failed>,
    ) -> Option<Unended> {
        // What all were asked does not come again, and counts for nothing without the node that replies.
        let (is_kept, expires) = (!delivery.asked, delivery.expires);
        let (request, settlement) = delivery.into_parts();
        if request.reply_to.is_none() {
            return self.end(settlement, self.end_one_way(outcome), None);
        }
        let reply = Arc::new(self.reply(request.id.clone(), outcome));
        let kept = is_kept.then_some(Kept { request, expires });
        self.end(settlement, Settle::Reply(Some(reply)), kept)
    }

    /// Settles a request. Where it is not known at once how that ends, the transport is left to tell it; only a reply that may have
    /// to be stored meanwhile is worth a task.
    fn end(
        self: &Arc<Self>,
        settlement: Box<dyn Settlement>,
        settle: Settle,
        mut kept: Option<Kept>,
    ) -> Option<Unended> {
        let mut under_way = None;
        let mut is_told = false;
        let mut later = |settle: &Settle| {
            is_told = true;
            let unsent = kept.take().and_then(|kept| kept.unsent(settle));
            match unsent {
                Some(unsent) if self.outbox.is_durable() => {
                    let (settled, told) = Settled::to_waiter();
                    under_way = Some(Unended::UnderWay(told, unsent));
                    settled
                }
                unsent => {
                    let counted = self.settling.token();
                    Settled::to_service(UnderWay::new(Arc::downgrade(self), unsent, counted))
                }
            }
        };
        match settlement.settle(settle, Later::new(&mut later)) {
            Poll::Ready(Ok(())) => None,
            Poll::Ready(Err(Unsettled { error, settle })) => {
                match kept.and_then(|kept| kept.unsent(&settle)) {
                    Some(unsent) => Some(Unended::Failed(error, unsent)),
                    None => {
                        self.unsettled(&error);
                        None
                    }
                }
            }
            Poll::Pending if !is_told => {
                self.unsettled(&never_told());
                None
            }
            Poll::Pending => under_way,
        }
    }

    fn end_one_way(&self, outcome: Result<Response, Failed>) -> Settle {
        match outcome {
            // Nobody would hear of the refusal, and an accepted request is never silently gone.
            Err(Failed { fault, executed })
                if executed != Executed::Yes && fault.code() != Code::DeadlineExceeded =>
            {
                count(&self.counters.dead_lettered);
                Settle::DeadLetter {
                    reason: fault.to_string(),
                    reply: None,
                }
            }
            outcome => {
                if let Err(Failed { fault, .. }) = outcome {
                    tracing::warn!(service = %self.name, %fault, "a one-way request failed");
                }
                Settle::Reply(None)
            }
        }
    }

    /// A reply that the connection was lost under is kept until it is back; all else is counted. It may be kept already, to answer
    /// its request.
    pub(super) async fn keep_or_count(
        &self,
        error: &Error,
        unsent: Option<&Unsent>,
        kept: Option<Keeping>,
    ) {
        let kept_to = match error.kind() {
            ErrorKind::ConnectionLost => KeptTo::Send,
            // Not ours to send any more; but should the request come here again, it need not run again.
            ErrorKind::LostLease => KeptTo::Answer,
            _ => return self.unsettled(error),
        };
        let keeping = match (unsent, kept) {
            (_, Some(kept)) if kept != Keeping::NoRoom && kept_to == KeptTo::Answer => Some(kept),
            (Some(unsent), _) => self.keep(unsent, kept_to).await,
            (None, _) => None,
        };
        match keeping {
            Some(Keeping::NoRoom) => count(&self.counters.not_kept),
            Some(Keeping::InMemory) => count(&self.counters.not_stored),
            Some(Keeping::AsAsked) | None => {}
        }
        if kept_to == KeptTo::Send && keeping.is_some_and(|kept| kept != Keeping::NoRoom) {
            tracing::info!(service = %self.name, %error, "a reply is kept until the broker is back");
        } else {
            self.unsettled(error);
        }
    }

    /// Waits for a settlement, and keeps the reply as soon as the connection is away: some transports settle only when it is
    /// back or the lease is over, and the process may not live as long.
    async fn settled_or_kept(
        &self,
        told: Told,
        unsent: &Unsent,
    ) -> (Option<Result<(), Error>>, Option<Keeping>) {
        let mut settling = pin!(told);
        tokio::select! {
            biased;
            settled = self.settled(&mut settling) => return (settled, None),
            () = self.outbox.away() => {}
        }
        let kept = self.keep(unsent, KeptTo::Answer).await;
        let settled = self.settled(settling).await;
        if let (Some(Ok(())), Some(to)) = (&settled, &unsent.request.reply_to) {
            self.outbox.forget(&unsent.reply.id, to);
        }
        (settled, kept)
    }

    /// Keeps a reply until its deadline. None if it is one that must not be kept.
    async fn keep(&self, unsent: &Unsent, kept_to: KeptTo) -> Option<Keeping> {
        // Another server may have the request by the time that this is sent, and execute it: then it were not true that
        // nobody did. If nobody does, it is soon refused again.
        if let Outcome::Fault {
            executed: Executed::No,
            ..
        } = unsent.reply.outcome
        {
            return None;
        }
        let to = unsent.request.reply_to.as_ref()?;
        let expires = unsent
            .expires
            .unwrap_or_else(|| Instant::now() + self.config.default_timeout);
        let reply = Arc::clone(&unsent.reply);
        Some(Box::pin(self.outbox.keep(to, reply, expires, kept_to)).await)
    }

    /// The handler that may start on a request, or why none may.
    fn admit(&self, delivery: &Delivery, expired: bool) -> Result<&Arc<dyn AnyHandler>, Fault> {
        let request = &delivery.request;
        if expired {
            count(&self.counters.expired);
            return Err(Fault::new(
                Code::DeadlineExceeded,
                "the request had expired in the queue",
            ));
        }
        if config::check_size(request.body.len(), self.config.max_body).is_err() {
            let message = format!(
                "a body of {} bytes is over the server's limit",
                request.body.len()
            );
            return Err(Fault::new(Code::ResourceExhausted, message));
        }
        self.handlers.get(&request.method).ok_or_else(|| {
            let message = match &request.method {
                Some(method) => format!("{} has no method {method}", self.name),
                None => format!("{} wants a method", self.name),
            };
            Fault::new(Code::Unimplemented, message)
        })
    }

    /// What a handler's end means.
    fn outcome(&self, handled: Handled, attempt: u32) -> Result<Response, Failed> {
        let ended = match handled {
            Ok(Err(Failure::Undecodable(reason))) => {
                let fault = Fault::new(Code::InvalidArgument, reason);
                return Err(Failed::refused(fault, attempt));
            }
            Ok(Ok(response)) => Ok(response),
            Ok(Err(Failure::Fault(fault))) => Err(Failed::executed(fault)),
            Err(panic) => {
                let message = panic_message(&*panic);
                tracing::error!(service = %self.name, message, "a handler panicked");
                let message = format!("the handler panicked: {message}");
                Err(Failed::executed(Fault::new(Code::Internal, message)))
            }
        };
        count(&self.counters.handled);
        ended
    }

    fn overdue(&self, why: Why) -> Failed {
        tracing::warn!(service = %self.name, "a handler did not end after its cancellation and was dropped");
        count(&self.counters.handled);
        Failed::executed(match why {
            Why::Deadline => Fault::new(
                Code::DeadlineExceeded,
                "the handler did not end by the deadline",
            ),
            Why::GivenUp => Fault::new(Code::Cancelled, "the caller gave the call up"),
        })
    }

    /// Waits for a handler, firing its cancellation at the deadline, when its lease is lost, and when its caller has given up
    /// or is gone; and says meanwhile that it runs.
    async fn supervise(&self, begun: &mut Begun) -> Supervised {
        let Begun {
            delivery,
            deadline,
            context,
            running,
            ..
        } = begun;
        let cancel = || {
            if let Some(context) = &*context {
                context.cancellation().cancel();
            }
        };
        let given_up = CancellationToken::new();
        let _entered = self.running.enter(&delivery.request.id, given_up.clone());
        let why = tokio::select! {
            biased;
            ended = &mut *running => return Supervised::Ended(ended),
            () = sleep_until(*deadline) => Why::Deadline,
            () = delivery.lease().cancelled() => Why::Deadline,
            () = given_up.cancelled() => Why::GivenUp,
            () = self.heartbeats(delivery) => Why::GivenUp,
            () = self.kill.cancelled() => {
                cancel();
                return Supervised::Killed;
            }
        };
        cancel();
        tokio::select! {
            biased;
            ended = &mut *running => Supervised::Ended(ended),
            () = sleep_until(Instant::now() + self.config.grace) => Supervised::Overdue(why),
            () = self.kill.cancelled() => Supervised::Killed,
        }
    }

    /// Says again and again that the handler runs. Ends only if the caller is gone.
    async fn heartbeats(&self, delivery: &Delivery) {
        let (Some(to), Signals::Running | Signals::Offer) =
            (&delivery.request.reply_to, delivery.request.signals)
        else {
            return std::future::pending().await;
        };
        let every = self.config.heartbeat;
        // Whoever waits has heard nothing since the server died that had it before.
        let mut next = match delivery.attempt {
            1 => Instant::now() + every,
            _ => Instant::now(),
        };
        loop {
            sleep_until(next).await;
            let node = self.node.clone();
            let signal = match delivery.asked {
                false => Signal::Running { node, every },
                // It was said when it was taken. Said again, it would count as the word of another server of this name; but
                // whether the caller is still there, anything tells.
                true => Signal::Progress { node },
            };
            if !self.say(delivery, to, signal).await {
                return;
            }
            next = (next + every).max(Instant::now());
        }
    }

    fn context(self: &Arc<Self>, delivery: &Delivery, deadline: Instant) -> Context {
        let inner = context::Inner {
            request: Arc::clone(&delivery.request),
            attempt: delivery.attempt,
            deadline,
            cancellation: OnceLock::new(),
            service: Arc::clone(self),
        };
        Context {
            inner: Arc::new(inner),
        }
    }

    fn reply(&self, id: CorrelationId, outcome: Result<Response, Failed>) -> Reply {
        let Failed { fault, executed } = match outcome {
            Ok(Response {
                body,
                content_type,
                headers,
            }) if body.len() <= self.config.max_body => {
                return Reply {
                    id,
                    outcome: Outcome::Value,
                    headers,
                    content_type,
                    node: None,
                    body,
                };
            }
            Ok(Response { body, .. }) => {
                let message = format!("a reply of {} bytes is over the server's limit", body.len());
                Failed {
                    fault: Fault::new(Code::ResourceExhausted, message),
                    executed: Executed::Yes,
                }
            }
            Err(Failed { fault, executed }) if fault.details_size() > self.config.max_body => {
                Failed {
                    fault: fault.without_details(),
                    executed,
                }
            }
            Err(failed) => failed,
        };
        count(&self.counters.faults);
        Reply::fault(id, fault, executed)
    }
}

/// Why there is no answer.
struct Failed {
    fault: Fault,
    executed: Executed,
}

impl Failed {
    /// What is refused without a handler was not executed, if no other server had it before.
    fn refused(fault: Fault, attempt: u32) -> Self {
        let executed = match attempt {
            1 => Executed::No,
            _ => Executed::Maybe,
        };
        Self { fault, executed }
    }

    /// What a handler was started for, and did not do.
    fn executed(fault: Fault) -> Self {
        Self {
            fault,
            executed: Executed::Yes,
        }
    }
}

/// How a handler's run ended.
enum Supervised {
    Ended(Handled),
    /// Cancelled, and not ended within the grace.
    Overdue(Why),
    Killed,
}

/// Why a handler was cancelled.
enum Why {
    /// Its deadline has passed, or its lease is lost.
    Deadline,
    /// Its caller has given up, or is gone.
    GivenUp,
}

/// Polls a future that is polled again, if it is not ready: this poll wakes nobody.
pub(super) fn poll_once<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    Pin::new(future).poll(&mut task::Context::from_waker(Waker::noop()))
}

/// A request that nobody else has. Counting first costs next to nothing, and `get_mut` takes a locked instruction even to refuse.
fn own(request: &mut Arc<Request>) -> Option<&mut Request> {
    match Arc::strong_count(request) {
        1 => Arc::get_mut(request),
        _ => None,
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(message), _) => message,
        (None, Some(message)) => message,
        (None, None) => "(no message)",
    }
}

//! What becomes of one request in a server's hands.

mod wanted;

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::task::{self, Poll, Waker};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::wanted::Wanted;
use crate::client::Client;
use crate::config::{self, ServerConfig};
use crate::context::{self, Context};
use crate::envelope::{CorrelationId, Outcome, Reply};
use crate::error::{Error, ErrorKind, Executed};
use crate::fault::{Code, Fault};
use crate::handler::{AnyHandler, Failure, Response};
use crate::name::{Method, Node, ReplyAddress, ServiceName};
use crate::server::{Counters, KeptTo, Outbox, Running, count};
use crate::signal::{Signal, Signals};
use crate::transport::{Delivery, Outbound};

/// After so long, what was delivered together is served by tasks, so that timers and others get their turn.
const IN_PLACE_MAX: Duration = Duration::from_micros(200);

/// One service of one server.
pub(crate) struct Service {
    pub(crate) name: ServiceName,
    pub(crate) node: Node,
    pub(crate) handlers: BTreeMap<Option<Method>, Arc<dyn AnyHandler>>,
    pub(crate) config: ServerConfig,
    pub(crate) counters: Arc<Counters>,
    pub(crate) client: Client,
    pub(crate) running: Arc<Running>,
    pub(crate) outbox: Arc<Outbox>,
    /// Fires when the server stops waiting for its handlers.
    pub(crate) kill: CancellationToken,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Service {
    pub(crate) fn name(&self) -> &ServiceName {
        &self.name
    }

    /// Serves deliveries, each in a task of its own; those of `own` are among `all`.
    ///
    /// On a runtime of one thread those that end at their first poll, as most do whose handlers wait for nothing, cost no
    /// task. There they hold up nobody who could have run beside them; on several threads they might.
    pub(crate) fn start(
        self: &Arc<Self>,
        deliveries: Vec<Delivery>,
        all: &TaskTracker,
        own: Option<&TaskTracker>,
    ) {
        let started = Instant::now();
        let mut in_place = Handle::current().runtime_flavor() == RuntimeFlavor::CurrentThread;
        for delivery in deliveries {
            // Boxed, since a task moves its future about.
            let mut serving = Box::pin(Arc::clone(self).serve(delivery));
            if in_place {
                // Not woken by this poll: if it is not the last, the task polls again at once.
                let mut context = task::Context::from_waker(Waker::noop());
                if serving.as_mut().poll(&mut context).is_ready() {
                    in_place = started.elapsed() < IN_PLACE_MAX;
                    continue;
                }
            }
            match own {
                None => all.spawn(serving),
                Some(own) => all.spawn(own.track_future(serving)),
            };
        }
    }

    /// Takes one delivery to its end.
    pub(crate) async fn serve(self: Arc<Self>, delivery: Delivery) {
        if self.is_plain(&delivery) {
            self.execute(delivery).await;
        } else {
            // Apart, so that the many requests that do not come here carry no place for it.
            Box::pin(self.examine(delivery)).await;
        }
    }

    /// True if there is nothing to know of a request before it is executed.
    fn is_plain(&self, delivery: &Delivery) -> bool {
        delivery.attempt == 1
            && !delivery.waited
            && delivery.request.signals != Signals::Offer
            && self.outbox.count() == 0
            && !self.running.remembers_any()
    }

    /// Executes a request, unless it was delivered too often, is done already, or is not wanted any more.
    async fn examine(&self, delivery: Delivery) {
        let (id, reply_to) = (&delivery.request.id, delivery.request.reply_to.as_ref());
        if delivery.attempt > 1 {
            count(&self.counters.redelivered);
        }
        // It was finished when the broker was away.
        if let (Some(reply), Some(to)) = (self.outbox.find(id, reply_to), reply_to) {
            let (id, to) = (id.clone(), to.clone());
            match self.settled(delivery.reply_shared(Some(reply))).await {
                Some(Ok(())) => self.outbox.forget(&id, &to),
                Some(Err(error)) => self.unsettled(&error),
                None => {}
            }
            return;
        }
        if delivery.attempt > self.config.max_deliveries {
            count(&self.counters.dead_lettered);
            let reason = format!("delivered {} times and never settled", delivery.attempt - 1);
            let fault = Fault::new(Code::Aborted, &reason);
            let reply = reply_to.map(|_| Reply::fault(id.clone(), fault, Executed::Maybe));
            return self.settle(delivery.dead_letter(reason, reply)).await;
        }
        match self.is_wanted(&delivery).await {
            Wanted::Yes => self.execute(delivery).await,
            Wanted::No => {
                count(&self.counters.cancelled);
                self.settle(delivery.reply(None)).await;
            }
            Wanted::Unheard => self.settle(delivery.release()).await,
            Wanted::NotOurs => {} // Dropped unsettled, as when the server is killed.
        }
    }

    /// Has a request refused or handled, and settles it.
    async fn execute(&self, delivery: Delivery) {
        let Some(outcome) = self.outcome(&delivery).await else {
            return; // Dropped unsettled: the server is being killed, and the request goes to another one.
        };
        if delivery.request.reply_to.is_some() {
            let reply = self.reply(delivery.request.id.clone(), outcome);
            self.send_reply(delivery, Arc::new(reply)).await;
        } else {
            Box::pin(self.end_one_way(delivery, outcome)).await;
        }
    }

    async fn end_one_way(&self, delivery: Delivery, outcome: Result<Response, Failed>) {
        match outcome {
            // Nobody would hear of the refusal, and an accepted request is never silently gone.
            Err(Failed { fault, executed })
                if executed != Executed::Yes && fault.code() != Code::DeadlineExceeded =>
            {
                count(&self.counters.dead_lettered);
                self.settle(delivery.dead_letter(fault.to_string(), None))
                    .await;
            }
            outcome => {
                if let Err(Failed { fault, .. }) = outcome {
                    tracing::warn!(service = %self.name, %fault, "a one-way request failed");
                }
                self.settle(delivery.reply(None)).await;
            }
        }
    }

    /// Says something about a request to its caller. False if it is known to be gone.
    async fn say(&self, delivery: &Delivery, to: &ReplyAddress, signal: Signal) -> bool {
        let message = Outbound::Reply {
            to: to.clone(),
            reply: Arc::new(Reply::signal(delivery.request.id.clone(), signal)),
        };
        match self.client.transport().send(message).await {
            Err(error) => error.kind() != ErrorKind::NoResponder,
            Ok(()) => true,
        }
    }

    /// Replies and settles. A reply that the connection was lost under is kept until it is back.
    async fn send_reply(&self, delivery: Delivery, reply: Arc<Reply>) {
        let expires = delivery.expires;
        let unsent = delivery
            .request
            .reply_to
            .clone()
            .map(|to| (to, Arc::clone(&reply)));
        let settling = self.settled(delivery.reply_shared(Some(reply)));
        let (settled, kept) = match &unsent {
            Some(unsent) if self.outbox.is_durable() => {
                Box::pin(self.settled_or_kept(settling, unsent, expires)).await
            }
            _ => (settling.await, false),
        };
        let Some(Err(error)) = settled else {
            return;
        };
        let kept = match (unsent, error.kind()) {
            (Some(unsent), ErrorKind::ConnectionLost) => {
                self.keep(unsent, expires, KeptTo::Send).await
            }
            // Not ours to send any more; but should the request come here again, it need not run again.
            (Some(unsent), ErrorKind::LostLease) if !kept => {
                self.keep(unsent, expires, KeptTo::Answer).await;
                false
            }
            _ => false,
        };
        if kept {
            tracing::info!(service = %self.name, %error, "a reply is kept until the broker is back");
        } else {
            self.unsettled(&error);
        }
    }

    /// Waits for a settlement, and keeps the reply as soon as the connection is away: some transports settle only when it is
    /// back or the lease is over, and the process may not live as long. True if it is kept.
    async fn settled_or_kept(
        &self,
        settling: impl Future<Output = Option<Result<(), Error>>> + Send,
        unsent: &(ReplyAddress, Arc<Reply>),
        expires: Option<Instant>,
    ) -> (Option<Result<(), Error>>, bool) {
        let mut settling = pin!(settling);
        tokio::select! {
            biased;
            settled = &mut settling => return (settled, false),
            () = self.outbox.away() => {}
        }
        let kept = self.keep(unsent.clone(), expires, KeptTo::Answer).await;
        let settled = settling.await;
        if kept && matches!(settled, Some(Ok(()))) {
            self.outbox.forget(&unsent.1.id, &unsent.0);
        }
        (settled, kept)
    }

    /// Keeps a reply until its deadline. False if that is not possible.
    async fn keep(
        &self,
        (to, reply): (ReplyAddress, Arc<Reply>),
        expires: Option<Instant>,
        kept_to: KeptTo,
    ) -> bool {
        let expires = expires.unwrap_or_else(|| Instant::now() + self.config.default_timeout);
        let kept = Box::pin(self.outbox.keep(&to, reply, expires, kept_to)).await;
        if !kept {
            count(&self.counters.not_kept);
        }
        kept
    }

    /// Waits for a settlement, unless the server is killed meanwhile: once polled, it happens.
    async fn settle(&self, settling: impl Future<Output = Result<(), Error>> + Send) {
        if let Some(Err(error)) = self.settled(settling).await {
            self.unsettled(&error);
        }
    }

    /// How a settlement ended; none if the server was killed meanwhile.
    async fn settled(
        &self,
        settling: impl Future<Output = Result<(), Error>> + Send,
    ) -> Option<Result<(), Error>> {
        let mut settling = pin!(settling);
        match poll_once(settling.as_mut()).await {
            Poll::Ready(settled) => Some(settled),
            Poll::Pending => Box::pin(self.kill.run_until_cancelled(settling)).await,
        }
    }

    fn unsettled(&self, error: &Error) {
        match error.kind() {
            ErrorKind::LostLease => count(&self.counters.lost_leases),
            _ => count(&self.counters.unsettled),
        }
        tracing::warn!(service = %self.name, %error, "a request was not settled");
    }

    /// The handler's answer, or why there is none; `None` if the request is no longer ours to start or to settle.
    async fn outcome(&self, delivery: &Delivery) -> Option<Result<Response, Failed>> {
        let now = Instant::now();
        let deadline = delivery
            .expires
            .unwrap_or_else(|| now + self.config.default_timeout);
        let handler = match self.admit(delivery, deadline <= now) {
            Ok(handler) => handler,
            Err(fault) => return Some(Err(Failed::refused(fault, delivery.attempt))),
        };
        // This task may come to run long after the delivery was taken.
        if self.kill.is_cancelled() || delivery.lease.is_cancelled() {
            return None;
        }
        let context = self.context(delivery, deadline);
        let cancelled = Arc::clone(&context.inner);
        let running =
            AssertUnwindSafe(handler.handle(delivery.request.body.clone(), context)).catch_unwind();
        let supervised = self.supervise(running, delivery, &cancelled).await;
        self.counters.took(now.elapsed());
        let ended = match supervised {
            Supervised::Ended(Ok(Err(Failure::Undecodable(reason)))) => {
                let fault = Fault::new(Code::InvalidArgument, reason);
                return Some(Err(Failed::refused(fault, delivery.attempt)));
            }
            Supervised::Ended(Ok(Ok(response))) => Ok(response),
            Supervised::Ended(Ok(Err(Failure::Fault(fault)))) => Err(fault),
            Supervised::Ended(Err(panic)) => {
                let message = panic_message(&*panic);
                tracing::error!(service = %self.name, message, "a handler panicked");
                Err(Fault::new(
                    Code::Internal,
                    format!("the handler panicked: {message}"),
                ))
            }
            Supervised::Overdue(why) => {
                tracing::warn!(service = %self.name, "a handler did not end after its cancellation and was dropped");
                Err(match why {
                    Why::Deadline => Fault::new(
                        Code::DeadlineExceeded,
                        "the handler did not end by the deadline",
                    ),
                    Why::GivenUp => Fault::new(Code::Cancelled, "the caller gave the call up"),
                })
            }
            Supervised::Killed => return None,
        };
        count(&self.counters.handled);
        Some(ended.map_err(|fault| Failed {
            fault,
            executed: Executed::Yes,
        }))
    }

    /// The handler that may start on a request, or why none may.
    fn admit(&self, delivery: &Delivery, expired: bool) -> Result<&dyn AnyHandler, Fault> {
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
        self.handlers
            .get(&request.method)
            .map(|handler| &**handler)
            .ok_or_else(|| {
                let message = match &request.method {
                    Some(method) => format!("{} has no method {method}", self.name),
                    None => format!("{} wants a method", self.name),
                };
                Fault::new(Code::Unimplemented, message)
            })
    }

    /// Runs a handler, firing its cancellation at the deadline, when its lease is lost, and when its caller has given up or is
    /// gone; and says meanwhile that it runs. A handler that is ready at its first poll costs none of that.
    async fn supervise<T>(
        &self,
        running: impl Future<Output = T> + Send,
        delivery: &Delivery,
        context: &context::Inner,
    ) -> Supervised<T> {
        let mut running = pin!(running);
        match poll_once(running.as_mut()).await {
            Poll::Ready(ended) => Supervised::Ended(ended),
            // Kept apart, so that the many requests that do not come here carry no place for it.
            Poll::Pending => Box::pin(self.supervise_long(running, delivery, context)).await,
        }
    }

    async fn supervise_long<T>(
        &self,
        mut running: Pin<&mut (impl Future<Output = T> + Send)>,
        delivery: &Delivery,
        context: &context::Inner,
    ) -> Supervised<T> {
        let given_up = CancellationToken::new();
        let _entered = self.running.enter(&delivery.request.id, given_up.clone());
        let why = tokio::select! {
            biased;
            ended = &mut running => return Supervised::Ended(ended),
            () = sleep_until(context.deadline) => Why::Deadline,
            () = delivery.lease.cancelled() => Why::Deadline,
            () = given_up.cancelled() => Why::GivenUp,
            () = self.heartbeats(delivery) => Why::GivenUp,
            () = self.kill.cancelled() => {
                context.cancellation().cancel();
                return Supervised::Killed;
            }
        };
        context.cancellation().cancel();
        tokio::select! {
            biased;
            ended = &mut running => Supervised::Ended(ended),
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
            let signal = Signal::Running {
                node: self.node.clone(),
                every,
            };
            if !self.say(delivery, to, signal).await {
                return;
            }
            next = (next + every).max(Instant::now());
        }
    }

    fn context(&self, delivery: &Delivery, deadline: Instant) -> Context {
        let inner = context::Inner {
            request: Arc::clone(&delivery.request),
            attempt: delivery.attempt,
            deadline,
            cancellation: OnceLock::new(),
            client: self.client.clone(),
            node: self.node.clone(),
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
}

/// How a handler's run ended.
enum Supervised<T> {
    Ended(T),
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

async fn poll_once<T>(mut future: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
    poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(message), _) => message,
        (None, Some(message)) => message,
        (None, None) => "(no message)",
    }
}

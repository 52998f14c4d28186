//! What becomes of one request in a server's hands.

use std::any::Any;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{self, Poll, Waker};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::client::LazyClient;
use crate::config::{self, ServerConfig};
use crate::context::{self, Context};
use crate::envelope::{CorrelationId, Outcome, Reply};
use crate::error::{Error, ErrorKind, Executed};
use crate::fault::{Code, Fault};
use crate::handler::{AnyHandler, Failure, Response};
use crate::name::{Method, ServiceName};
use crate::transport::Delivery;

/// What a server has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerStats {
    /// Requests that were given to a handler.
    pub handled: u64,
    /// Faults that were answered, whoever raised them.
    pub faults: u64,
    /// Requests that had expired when they were taken. Not started.
    pub expired: u64,
    /// Requests that were dead-lettered, having been delivered too often.
    pub dead_lettered: u64,
    /// Requests whose lease was lost before they were settled.
    pub lost_leases: u64,
    /// Requests that could not be settled for another reason; the broker delivers them again.
    pub unsettled: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    handled: AtomicU64,
    faults: AtomicU64,
    expired: AtomicU64,
    dead_lettered: AtomicU64,
    lost_leases: AtomicU64,
    unsettled: AtomicU64,
}

impl Counters {
    pub(crate) fn stats(&self) -> ServerStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ServerStats {
            handled: read(&self.handled),
            faults: read(&self.faults),
            expired: read(&self.expired),
            dead_lettered: read(&self.dead_lettered),
            lost_leases: read(&self.lost_leases),
            unsettled: read(&self.unsettled),
        }
    }
}

/// After so long, what was delivered together is served by tasks, so that timers and others get their turn.
const IN_PLACE_MAX: Duration = Duration::from_micros(200);

/// One service of one server.
pub(crate) struct Service {
    name: ServiceName,
    handlers: BTreeMap<Option<Method>, Arc<dyn AnyHandler>>,
    config: ServerConfig,
    counters: Arc<Counters>,
    client: Arc<LazyClient>,
    /// Fires when the server stops waiting for its handlers.
    kill: CancellationToken,
}

impl Service {
    pub(crate) fn new(
        name: ServiceName,
        handlers: BTreeMap<Option<Method>, Arc<dyn AnyHandler>>,
        config: ServerConfig,
        counters: Arc<Counters>,
        client: Arc<LazyClient>,
        kill: CancellationToken,
    ) -> Self {
        Self {
            name,
            handlers,
            config,
            counters,
            client,
            kill,
        }
    }

    pub(crate) fn name(&self) -> &ServiceName {
        &self.name
    }

    /// Serves deliveries, each in a task of its own.
    ///
    /// On a runtime of one thread those that end at their first poll, as most do whose handlers wait for nothing, cost no
    /// task. There they hold up nobody who could have run beside them; on several threads they might.
    pub(crate) fn start(self: &Arc<Self>, deliveries: Vec<Delivery>, tasks: &TaskTracker) {
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
            tasks.spawn(serving);
        }
    }

    /// Takes one delivery to its end: dead letters, a refusal, or a handler's answer.
    async fn serve(self: Arc<Self>, delivery: Delivery) {
        let (id, wants_reply) = (
            delivery.request.id.clone(),
            delivery.request.reply_to.is_some(),
        );
        if delivery.attempt > self.config.max_deliveries {
            count(&self.counters.dead_lettered);
            let reason = format!("delivered {} times and never settled", delivery.attempt - 1);
            let fault = Fault::new(Code::Aborted, &reason);
            let reply = wants_reply.then(|| Reply::fault(id, fault, Executed::Maybe));
            return self.settle(delivery.dead_letter(reason, reply)).await;
        }
        let Some(outcome) = self.outcome(&delivery).await else {
            return; // Dropped unsettled: the server is being killed, and the request goes to another one.
        };
        if wants_reply {
            let reply = self.reply(id, outcome);
            return self.settle(delivery.reply(Some(reply))).await;
        }
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

    /// Waits for a settlement, unless the server is killed meanwhile: once polled, it happens.
    async fn settle(&self, settling: impl Future<Output = Result<(), Error>> + Send) {
        let mut settling = pin!(settling);
        let settled = match poll_once(settling.as_mut()).await {
            Poll::Ready(settled) => Some(settled),
            Poll::Pending => Box::pin(self.kill.run_until_cancelled(settling)).await,
        };
        let Some(settled) = settled else {
            return;
        };
        if let Err(error) = settled {
            match error.kind() {
                ErrorKind::LostLease => count(&self.counters.lost_leases),
                _ => count(&self.counters.unsettled),
            }
            tracing::warn!(service = %self.name, %error, "a request was not settled");
        }
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
        let ended = match self.supervise(running, &delivery.lease, &cancelled).await {
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
            Supervised::Overdue => {
                tracing::warn!(service = %self.name, "a handler did not end after its cancellation and was dropped");
                Err(Fault::new(
                    Code::DeadlineExceeded,
                    "the handler did not end by the deadline",
                ))
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

    /// Runs a handler, firing its cancellation at the deadline or when its lease is lost. A handler that is ready at
    /// its first poll costs no timer.
    async fn supervise<T>(
        &self,
        running: impl Future<Output = T> + Send,
        lease: &CancellationToken,
        context: &context::Inner,
    ) -> Supervised<T> {
        let mut running = pin!(running);
        match poll_once(running.as_mut()).await {
            Poll::Ready(ended) => Supervised::Ended(ended),
            // Kept apart, so that the many requests that do not come here carry no place for it.
            Poll::Pending => Box::pin(self.supervise_long(running, lease, context)).await,
        }
    }

    async fn supervise_long<T>(
        &self,
        mut running: Pin<&mut (impl Future<Output = T> + Send)>,
        lease: &CancellationToken,
        context: &context::Inner,
    ) -> Supervised<T> {
        tokio::select! {
            biased;
            ended = &mut running => return Supervised::Ended(ended),
            () = sleep_until(context.deadline) => {}
            () = lease.cancelled() => {}
            () = self.kill.cancelled() => {
                context.cancellation().cancel();
                return Supervised::Killed;
            }
        }
        context.cancellation().cancel();
        tokio::select! {
            biased;
            ended = &mut running => Supervised::Ended(ended),
            () = sleep_until(Instant::now() + self.config.grace) => Supervised::Overdue,
            () = self.kill.cancelled() => Supervised::Killed,
        }
    }

    fn context(&self, delivery: &Delivery, deadline: Instant) -> Context {
        let request = &delivery.request;
        let inner = context::Inner {
            id: request.id.clone(),
            reply_to: request.reply_to.clone(),
            method: request.method.clone(),
            headers: request.headers.clone(),
            content_type: request.content_type.clone(),
            attempt: delivery.attempt,
            deadline,
            cancellation: OnceLock::new(),
            client: Arc::clone(&self.client),
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
    Overdue,
    Killed,
}

async fn poll_once<T>(mut future: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
    poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(message), _) => message,
        (None, Some(message)) => message,
        (None, None) => "(no message)",
    }
}

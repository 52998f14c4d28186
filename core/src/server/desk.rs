//! What a server does about what is said to every server of a service: it is asked, told to give up, or to hand over.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::counters::Counters;
use super::outbox::Outbox;
use super::running::Running;
use crate::config::{Ownership, ServerConfig};
use crate::control::{self, NodeInfo};
use crate::envelope::{CorrelationId, Reply, Request};
use crate::error::Executed;
use crate::fault::{Code, Fault};
use crate::name::{Method, Node, ReplyAddress, ServiceName};
use crate::service::Service;
use crate::signal::{Signal, Signals};
use crate::transport::{
    Delivery, FlaggedToken, Later, Outbound, Settle, Settlement, Transport, Unsettled,
};

/// How many words may wait to be dealt with; what comes on top is dropped, as if it had not arrived.
pub(crate) const BACKLOG_MAX: usize = 1024;

/// One for each running server.
#[derive(Debug)]
pub(crate) struct Desk {
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) config: ServerConfig,
    pub(crate) node: Node,
    pub(crate) services: HashMap<ServiceName, Served>,
    pub(crate) running: Arc<Running>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) handlers: TaskTracker,
    pub(crate) started: Instant,
}

/// One service, as the desk sees it.
#[derive(Clone, Debug)]
pub(crate) struct Served {
    pub(crate) service: Arc<Service>,
    /// The handlers of this service.
    pub(crate) own: TaskTracker,
    /// What is owned may be asked for.
    pub(crate) owned: Owned,
}

/// The present ownership of a service, if there is one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Owned(Arc<Mutex<Option<HandOver>>>);

/// A way to end one ownership for a newcomer's sake.
#[derive(Clone, Debug, Default)]
pub(crate) struct HandOver {
    /// Fires when a newcomer wants the service.
    pub(crate) asked: CancellationToken,
    /// Fires when it is free, for whatever reason.
    pub(crate) done: CancellationToken,
}

impl Owned {
    pub(crate) fn begin(&self) -> HandOver {
        let hand_over = HandOver::default();
        *self.lock() = Some(hand_over.clone());
        hand_over
    }

    pub(crate) fn end(&self) {
        if let Some(hand_over) = self.lock().take() {
            hand_over.done.cancel();
        }
    }

    fn present(&self) -> Option<HandOver> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<HandOver>> {
        // No code of a user runs under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Desk {
    /// Deals with what is said until `kill`; from `stop` on, only with what is given up.
    pub(crate) async fn run(
        self,
        mut words: mpsc::Receiver<(ServiceName, Arc<Request>)>,
        stop: CancellationToken,
        kill: CancellationToken,
    ) {
        // Asked requests are not taken from the queue, so the prefetch of the subscription does not bound them.
        let places = self.config.prefetch.min(Semaphore::MAX_PERMITS);
        let places = Arc::new(Semaphore::new(places));
        loop {
            let word = tokio::select! {
                biased;
                () = kill.cancelled() => return,
                word = words.recv() => word,
            };
            let Some((service, request)) = word else {
                return;
            };
            let is_cancel = request.method.as_ref().map(Method::as_str) == Some(control::CANCEL);
            if is_cancel || !stop.is_cancelled() {
                self.hear(service, request, &places);
            }
        }
    }

    fn hear(&self, service: ServiceName, request: Arc<Request>, places: &Arc<Semaphore>) {
        match request.method.as_ref().map(Method::as_str) {
            Some(control::CANCEL) => self.cancel(&request),
            Some(control::PING) => self.answer(&request, Bytes::new()),
            Some(control::INFO) => {
                let info = self.info();
                self.answer_json(&request, &info);
            }
            Some(control::STATS) => {
                let stats = self.counters.node_stats(&self.running, &self.outbox);
                self.answer_json(&request, &stats);
            }
            Some(control::HAND_OVER) => self.hand_over(&service, &request),
            // It serves it no more, and stands by, or has handed it over: the present owner hears it too.
            _ if !self.serves(&service) => {}
            _ => self.ask(&service, request, places),
        }
    }

    fn cancel(&self, request: &Request) {
        let lasts = request
            .deadline
            .map_or(self.config.default_timeout, |deadline| deadline.budget);
        for id in String::from_utf8_lossy(&request.body).lines() {
            if let Ok(id) = CorrelationId::parse(id) {
                self.running.give_up(&id, lasts);
            }
        }
    }

    fn info(&self) -> NodeInfo {
        let mut services: Vec<_> = self.services.keys().map(ServiceName::to_string).collect();
        services.sort_unstable();
        NodeInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            services,
            prefetch: self.config.prefetch,
            uptime: self.started.elapsed(),
        }
    }

    /// Runs the service's own handler, and replies by name.
    fn ask(&self, service: &ServiceName, request: Arc<Request>, places: &Arc<Semaphore>) {
        let Some(Served { service, own, .. }) = self.services.get(service) else {
            return;
        };
        let Ok(place) = Arc::clone(places).try_acquire_owned() else {
            let fault = Fault::new(Code::ResourceExhausted, "the server is busy").retryable();
            let reply = Reply::fault(request.id.clone(), fault, Executed::No);
            return self.send(&request, reply);
        };
        // So that the caller knows who is to answer, and can name who does not. Sent before the answer, and so there before.
        let word = Signal::Running {
            node: self.node.clone(),
            every: self.config.heartbeat,
        };
        let word = (request.signals != Signals::None)
            .then(|| self.saying(&request, Reply::signal(request.id.clone(), word)));
        let settlement = ByName {
            transport: Arc::clone(&self.transport),
            to: request.reply_to.clone(),
            node: self.node.clone(),
            kill: service.kill.token(),
            place,
            lease: FlaggedToken::new(),
        };
        let expires = request
            .deadline
            .map(|deadline| Instant::now() + deadline.budget);
        let mut delivery = Delivery::new(request, 1, expires, Box::new(settlement));
        delivery.asked = true;
        let serve = Arc::clone(service).serve(delivery);
        let serve = async move {
            if let Some(Some(word)) = word {
                word.await;
            }
            serve.await;
        };
        self.handlers.spawn(own.track_future(serve));
    }

    fn serves(&self, service: &ServiceName) -> bool {
        let served = self.services.get(service);
        let present = served.and_then(|served| served.owned.present());
        present.is_some_and(|hand_over| !hand_over.asked.is_cancelled())
    }

    fn hand_over(&self, service: &ServiceName, request: &Request) {
        // What others serve too is nobody's to hand over.
        if self.config.ownership == Ownership::Shared {
            return;
        }
        let served = self.services.get(service);
        let Some(hand_over) = served.and_then(|served| served.owned.present()) else {
            return;
        };
        let reply = Reply::value(request.id.clone(), Bytes::new());
        let saying = self.saying(request, reply);
        // Not one of the handlers: those are waited for before it is free.
        tokio::spawn(async move {
            hand_over.asked.cancel();
            hand_over.done.cancelled().await;
            if let Some(saying) = saying {
                saying.await;
            }
        });
    }

    fn answer_json(&self, request: &Request, value: &impl Serialize) {
        let body = serde_json::to_vec(value).unwrap_or_default();
        self.answer(request, body.into());
    }

    fn answer(&self, request: &Request, body: Bytes) {
        let reply = Reply::value(request.id.clone(), body);
        self.send(request, reply);
    }

    fn send(&self, request: &Request, reply: Reply) {
        if let Some(saying) = self.saying(request, reply) {
            // Not one of the handlers, which a shutdown waits for.
            tokio::spawn(saying);
        }
    }

    /// Says something to who asked, while it waits for it.
    fn saying(
        &self,
        request: &Request,
        mut reply: Reply,
    ) -> Option<impl Future<Output = ()> + Send + 'static> {
        let to = request.reply_to.clone()?;
        reply.node = Some(self.node.clone());
        let transport = Arc::clone(&self.transport);
        let waits = request
            .deadline
            .map_or(self.config.default_timeout, |deadline| deadline.budget);
        // From when it is asked: what it is to say may not be true before long.
        let ends = Instant::now().checked_add(waits);
        Some(async move {
            let saying = send(&*transport, to, reply);
            match ends {
                // Late, nobody waits for it.
                Some(ends) if ends <= Instant::now() => {}
                Some(ends) => {
                    let _ = timeout_at(ends, saying).await;
                }
                None => saying.await,
            }
        })
    }
}

async fn send(transport: &dyn Transport, to: ReplyAddress, reply: Reply) {
    let reply = Arc::new(reply);
    if let Err(error) = transport.send(Outbound::Reply { to, reply }).await {
        tracing::debug!(%error, "who asked did not get the answer");
    }
}

/// Settles a request that nobody queued: by a reply to its caller, from this server by name.
#[derive(Debug)]
struct ByName {
    transport: Arc<dyn Transport>,
    to: Option<ReplyAddress>,
    node: Node,
    kill: CancellationToken,
    /// Of those that this server answers at once; free when the reply is sent.
    place: OwnedSemaphorePermit,
    /// Never lost. Each server has a copy of its own: nobody else executes this one.
    lease: FlaggedToken,
}

impl Settlement for ByName {
    fn settle(self: Box<Self>, settle: Settle, later: Later<'_>) -> Poll<Result<(), Unsettled>> {
        let Self {
            transport,
            to,
            node,
            kill,
            place,
            ..
        } = *self;
        let (Some(to), Some(reply)) = (to, settle.reply().cloned()) else {
            return Poll::Ready(Ok(()));
        };
        let settled = later.settled(&settle);
        // Else it were copied.
        drop(settle);
        let reply = Arc::new(Reply {
            node: Some(node),
            ..Arc::unwrap_or_clone(reply)
        });
        // Only handlers settle what was asked, and they run on a runtime.
        tokio::spawn(async move {
            let sending = transport.send(Outbound::Reply { to, reply });
            if let Some(sent) = kill.run_until_cancelled(sending).await {
                settled.tell(sent);
            }
            drop(place);
        });
        Poll::Pending
    }

    fn lease(&self) -> &FlaggedToken {
        &self.lease
    }
}

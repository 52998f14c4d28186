//! The server's builder and its life: start, run, drain.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::client::{IntoServiceName, LazyClient};
use crate::config::{self, ClientConfig, ServerConfig};
use crate::error::{Error, ErrorKind};
use crate::handler::{AnyHandler, Raw, RawHandler};
use crate::name::{Method, ServiceName};
use crate::service::{Counters, ServerStats, Service};
use crate::transport::{SubscribeOptions, Subscription, SubscriptionEvent, Transport};

/// Serves requests: a builder, until it is started.
///
/// A name that is not valid, or a method that is handled twice, is told by [`start`](Self::start), before any I/O.
#[must_use = "a server serves when it is started or run"]
pub struct Server {
    transport: Arc<dyn Transport>,
    config: ServerConfig,
    services: Result<BTreeMap<ServiceName, Handlers>, Error>,
}

/// How long what was told to end at once may take.
const DROP_TIMEOUT: Duration = Duration::from_secs(1);

type Handlers = BTreeMap<Option<Method>, Arc<dyn AnyHandler>>;

impl Server {
    /// A server with no handlers yet.
    pub fn new(transport: Arc<dyn Transport>) -> Self {
        Self {
            transport,
            config: ServerConfig::default(),
            services: Ok(BTreeMap::new()),
        }
    }

    /// Serves a service with a typed function: `async fn(In) -> Result<Out, Fault>`, optionally with a
    /// [`Context`](crate::Context) behind the input. Bodies are JSON.
    ///
    /// It gets the requests that name no method.
    #[cfg(feature = "json")]
    pub fn handle<Args: 'static>(
        self,
        service: impl IntoServiceName,
        handler: impl crate::Handler<Args>,
    ) -> Self {
        self.with(
            service.into_service_name(),
            Ok(None),
            Arc::new(crate::handler::Json(handler, PhantomData)),
        )
    }

    /// Serves a service with a function of bytes: `async fn(Bytes) -> Result<impl Into<Response>, Fault>`, optionally with
    /// a [`Context`](crate::Context).
    ///
    /// It gets the requests that name no method.
    pub fn handle_raw<Args: 'static>(
        self,
        service: impl IntoServiceName,
        handler: impl RawHandler<Args>,
    ) -> Self {
        self.with(
            service.into_service_name(),
            Ok(None),
            Arc::new(Raw(handler, PhantomData)),
        )
    }

    /// Serves one method of a service, as [`handle`](Self::handle).
    #[cfg(feature = "json")]
    pub fn method<Args: 'static>(
        self,
        service: impl IntoServiceName,
        method: &str,
        handler: impl crate::Handler<Args>,
    ) -> Self {
        let handler = Arc::new(crate::handler::Json(handler, PhantomData));
        self.with(
            service.into_service_name(),
            Method::new(method).map(Some),
            handler,
        )
    }

    /// Serves one method of a service, as [`handle_raw`](Self::handle_raw).
    pub fn method_raw<Args: 'static>(
        self,
        service: impl IntoServiceName,
        method: &str,
        handler: impl RawHandler<Args>,
    ) -> Self {
        self.with(
            service.into_service_name(),
            Method::new(method).map(Some),
            Arc::new(Raw(handler, PhantomData)),
        )
    }

    /// How many handlers of each service run at once; nothing is held beyond it. Default: 128. For work that keeps a
    /// core busy, take as many as there are cores; 1 gives the fairest spread over servers. At least 1.
    pub fn prefetch(mut self, handlers: usize) -> Self {
        self.config.prefetch = handlers.max(1);
        self
    }

    /// Serves its services alone: [`start`](Self::start) fails as `AlreadyOwned` while another one lives.
    pub fn exclusive(mut self) -> Self {
        self.config.exclusive = true;
        self
    }

    /// How many servers may take the same request, dying with it, before it is dead-lettered. Default: 5. At least 1.
    pub fn max_deliveries(mut self, attempts: u32) -> Self {
        self.config.max_deliveries = attempts.max(1);
        self
    }

    /// The largest body of a request or reply, in bytes, inclusive. Default: 4 MiB.
    pub fn max_body(mut self, bytes: usize) -> Self {
        self.config.max_body = bytes;
        self
    }

    /// The time that a request may take whose caller, a plain peer of the broker, set no deadline. Default: 30 s; at most 30 days.
    pub fn default_timeout(mut self, timeout: Duration) -> Self {
        self.config.default_timeout = timeout.min(config::TIMEOUT_MAX);
        self
    }

    /// The time that a handler has to end by itself once its cancellation has fired, before it is dropped and its
    /// request settled as `deadline_exceeded`. Default: 1 s; at most 30 days.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.config.grace = grace.min(config::TIMEOUT_MAX);
        self
    }

    /// How long a shutdown waits for the handlers that run. Default: 30 s. What still runs then is dropped, and its
    /// requests go to another server.
    pub fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.config.drain_timeout = timeout;
        self
    }

    /// Subscribes to all its services.
    ///
    /// **Resolves when** all of them are live. Its tasks run on the present Tokio runtime.
    ///
    /// # Errors
    /// `Invalid` for a bad name, a method that is handled twice, or no handler at all, before any I/O; `Connect` if the connection is
    /// lost and not back within 10 s; `AlreadyOwned` and others as of [`Transport::subscribe`]. If one service fails, none is served.
    pub async fn start(self) -> Result<RunningServer, Error> {
        let services = self.services?;
        if services.is_empty() {
            return Err(Error::not_executed(
                ErrorKind::Invalid,
                "a server without handlers",
            ));
        }
        let options = match self.config.exclusive {
            true => SubscribeOptions::exclusive(self.config.prefetch),
            false => SubscribeOptions::shared(self.config.prefetch),
        };
        let subscribe = async {
            let mut subscriptions = Vec::with_capacity(services.len());
            for (name, handlers) in services {
                let subscription = self.transport.subscribe(&name, options).await?;
                subscriptions.push((subscription, name, handlers));
            }
            Ok(subscriptions)
        };
        let subscriptions = config::bounded("subscribe", subscribe).await?;

        let (stop, kill) = (CancellationToken::new(), CancellationToken::new());
        let counters = Arc::new(Counters::default());
        let client = Arc::new(LazyClient::new(
            Arc::clone(&self.transport),
            ClientConfig::default().max_body(self.config.max_body),
        ));
        let (handlers_running, mut loops) = (TaskTracker::new(), JoinSet::new());
        for (subscription, name, handlers) in subscriptions {
            let service = Service::new(
                name,
                handlers,
                self.config,
                Arc::clone(&counters),
                Arc::clone(&client),
                kill.clone(),
            );
            loops.spawn(serve(
                subscription,
                Arc::new(service),
                handlers_running.clone(),
                stop.clone(),
            ));
        }
        let drain_timeout = self.config.drain_timeout;
        Ok(RunningServer {
            stop: stop.drop_guard(),
            kill: kill.drop_guard(),
            loops,
            handlers: handlers_running,
            counters,
            client,
            drain_timeout,
        })
    }

    /// Serves until it is over: the transport was closed, or an exclusive server lost its service.
    ///
    /// # Errors
    /// As of [`start`](Self::start), and the reason why it is over.
    pub async fn run(self) -> Result<(), Error> {
        self.run_until(std::future::pending::<()>()).await
    }

    /// Serves until `shutdown` is done, then drains as [`RunningServer::shutdown`].
    ///
    /// # Errors
    /// As of [`run`](Self::run); none after a clean shutdown.
    pub async fn run_until(self, shutdown: impl Future) -> Result<(), Error> {
        let mut running = self.start().await?;
        tokio::select! {
            _ = shutdown => running.shutdown().await,
            error = running.over() => {
                let drained = running.shutdown().await;
                Err(drained.err().unwrap_or(error))
            }
        }
    }

    fn with(
        mut self,
        service: Result<ServiceName, Error>,
        method: Result<Option<Method>, Error>,
        handler: Arc<dyn AnyHandler>,
    ) -> Self {
        self.services = self.services.and_then(|mut services| {
            let (service, method) = (service?, method?);
            match services.entry(service.clone()).or_default().entry(method) {
                Entry::Vacant(place) => place.insert(handler),
                Entry::Occupied(place) => {
                    let method = place
                        .key()
                        .as_ref()
                        .map_or(String::new(), |method| format!(" method {method}"));
                    let message = format!("{service}{method} is handled twice");
                    return Err(Error::not_executed(ErrorKind::Invalid, message));
                }
            };
            Ok(services)
        });
        self
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let services = self
            .services
            .as_ref()
            .map(|services| services.keys().collect::<Vec<_>>());
        f.debug_struct("Server")
            .field("config", &self.config)
            .field("services", &services)
            .finish_non_exhaustive()
    }
}

/// A server that serves. Dropping it stops it at once: its handlers are dropped, and their requests go to another server;
/// [`shutdown`](Self::shutdown) is the gentle way.
#[derive(Debug)]
pub struct RunningServer {
    stop: DropGuard,
    kill: DropGuard,
    loops: JoinSet<Error>,
    handlers: TaskTracker,
    counters: Arc<Counters>,
    client: Arc<LazyClient>,
    drain_timeout: Duration,
}

impl RunningServer {
    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> ServerStats {
        self.counters.stats()
    }

    /// Waits until one of its services is no longer served without having been shut down, and says why.
    ///
    /// **Cancel safety**: dropping the future loses nothing.
    pub async fn over(&mut self) -> Error {
        match self.loops.join_next().await {
            Some(Ok(error)) => error,
            Some(Err(panic)) => Error::not_executed(
                ErrorKind::Closed,
                format!("the server's loop failed: {panic}"),
            ),
            None => Error::not_executed(ErrorKind::Closed, "the server is over"),
        }
    }

    /// Drains: stops taking requests, gives back what was not started, waits for the handlers that run, with the calls that they
    /// make, and then closes their reply path. The transport stays open.
    ///
    /// **Cancel safety**: dropping the future stops the server at once.
    ///
    /// # Errors
    /// `DeadlineExceeded` if handlers still ran at the end of the drain timeout; they were dropped, and their requests go to
    /// another server.
    pub async fn shutdown(mut self) -> Result<(), Error> {
        self.stop.disarm().cancel();
        let drain = async {
            while self.loops.join_next().await.is_some() {}
            self.handlers.close();
            self.handlers.wait().await;
        };
        let drained = tokio::time::timeout(self.drain_timeout, drain).await;
        if drained.is_err() {
            drop(self.kill);
            self.loops.abort_all();
            self.handlers.close();
            // Those that block their thread cannot be dropped; nobody waits for them.
            let _ = tokio::time::timeout(DROP_TIMEOUT, self.handlers.wait()).await;
        }
        let closed = tokio::time::timeout(DROP_TIMEOUT, self.client.close()).await;
        drained.and(closed).map_err(|_| {
            let message = format!(
                "handlers still ran {:?} after the shutdown began",
                self.drain_timeout
            );
            Error::maybe_executed(ErrorKind::DeadlineExceeded, message)
        })
    }
}

/// Takes deliveries of one service and has them served, until it is told to stop.
async fn serve(
    mut subscription: Box<dyn Subscription>,
    service: Arc<Service>,
    handlers: TaskTracker,
    stop: CancellationToken,
) -> Error {
    loop {
        let event = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            event = subscription.recv() => event,
        };
        match event {
            SubscriptionEvent::Deliveries(deliveries) => {
                service.start(deliveries, &handlers);
            }
            SubscriptionEvent::Closed(error) => {
                tracing::warn!(service = %service.name(), %error, "no longer served");
                return error;
            }
        }
    }
    subscription.stop().await;
    Error::not_executed(ErrorKind::Closed, "the server was stopped")
}

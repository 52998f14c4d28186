//! The server's builder and its life: start, run, drain.

mod clutch;
mod counters;
mod desk;
mod outbox;
mod ownership;
mod running;
mod running_server;
mod serving;
mod starting;

pub use self::clutch::{Engagement, WhenDisengaged};
pub use self::counters::ServerStats;
pub(crate) use self::counters::{Counters, count};
pub(crate) use self::outbox::{Keeping, KeptTo, Outbox};
pub(crate) use self::running::Running;
pub use self::running_server::RunningServer;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use self::outbox::OutboxBounds;
use self::running_server::DROP_TIMEOUT;
use self::starting::Starting;
use crate::client::IntoServiceName;
use crate::config::{self, Ownership, ServerConfig};
use crate::error::{Error, ErrorKind};
use crate::handler::{AnyHandler, Raw, RawHandler};
use crate::name::{IntoNode, Method, Node, ServiceName};
use crate::outbox_store::OutboxStore;
use crate::transport::{FlaggedToken, Transport};

/// Serves requests: a builder, until it is started.
///
/// A name that is not valid, or a method that is handled twice, is told by [`start`](Self::start), before any I/O.
#[must_use = "a server serves when it is started or run"]
pub struct Server {
    transport: Arc<dyn Transport>,
    config: ServerConfig,
    node: Option<Node>,
    outbox_store: Option<Arc<dyn OutboxStore>>,
    services: Result<BTreeMap<ServiceName, Handlers>, Error>,
}

type Handlers = BTreeMap<Option<Method>, Arc<dyn AnyHandler>>;

impl Server {
    /// A server with no handlers yet.
    pub fn new(transport: Arc<dyn Transport>) -> Self {
        Self {
            transport,
            config: ServerConfig::default(),
            node: None,
            outbox_store: None,
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
        self.config.ownership = Ownership::Exclusive;
        self
    }

    /// Serves its services alone, and [`start`](Self::start) waits while another one lives: it resolves when this one has
    /// taken over, at the latest a quarter of a second after the other's ownership has ended.
    pub fn standby(mut self) -> Self {
        self.config.ownership = Ownership::Standby;
        self
    }

    /// Serves its services alone, and asks who does so to hand over: that one takes no more requests, waits one
    /// [`grace`](Self::grace) for the handlers that run, drops the others, whose requests go to this one, and ends as
    /// `AlreadyOwned`. One that has not done so 2 s after this server's grace is fenced off, where the transport can
    /// ([`Capabilities::take_over`](crate::transport::Capabilities)), and else loses its ownership as after a kill.
    pub fn take_over(mut self) -> Self {
        self.config.ownership = Ownership::TakeOver;
        self
    }

    /// The server's name among those of its services, which it then serves by that name as well:
    /// `fib` and `fib@node-7`. Several servers may have one name, and share its requests. Default: a random name, by which
    /// nobody can call it.
    pub fn node(mut self, name: impl IntoNode) -> Self {
        match name.into_node() {
            Ok(node) => self.node = Some(node),
            Err(error) => self.services = self.services.and(Err(error)),
        }
        self
    }

    /// After how long, and then how often, a caller is told that its handler still runs. Default: 5 s; at least 100 ms. A
    /// caller that hears nothing for three times as long takes the server for lost.
    pub fn heartbeat(mut self, every: Duration) -> Self {
        self.config.heartbeat = every.clamp(Duration::from_millis(100), config::TIMEOUT_MAX);
        self
    }

    /// What to do when the broker is away. Default: to wait for it.
    pub fn when_disengaged(mut self, policy: WhenDisengaged) -> Self {
        self.config.when_disengaged = policy;
        self
    }

    /// How many replies that were finished while the broker was away are kept until it is back, or until their deadlines.
    /// Default: 1024, and at most 64 MiB of bodies. What does not fit is dropped, and its request runs again.
    pub fn outbox(mut self, replies: usize) -> Self {
        self.config.outbox_replies = replies;
        self
    }

    /// Where kept replies survive the end of this process, such as the crate `antiphon-outbox` on disk. A store belongs to one
    /// server. Default: none; they are kept in memory.
    pub fn outbox_store(mut self, store: impl OutboxStore) -> Self {
        self.outbox_store = Some(Arc::new(store));
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
    /// lost and not back within 10 s; `Outbox` if its store cannot be used; `AlreadyOwned` and others as of [`Transport::subscribe`]. If one service fails, none is served.
    pub async fn start(self) -> Result<RunningServer, Error> {
        let mut services = self.services?;
        if services.is_empty() {
            return Err(Error::not_executed(
                ErrorKind::Invalid,
                "a server without handlers",
            ));
        }
        if let Some(node) = &self.node {
            let at_node: Vec<_> = services
                .iter()
                .filter(|(name, _)| name.node().is_none())
                .map(|(name, handlers)| Ok((name.at(node)?, handlers.clone())))
                .collect::<Result<_, Error>>()?;
            services.extend(at_node);
        }
        let node = self.node.unwrap_or_else(Node::random);
        let bounds = OutboxBounds {
            replies: self.config.outbox_replies,
            bytes: OUTBOX_BYTES,
        };
        let transport = Arc::clone(&self.transport);
        let outbox = Outbox::open(transport, bounds, self.outbox_store).await?;
        let kill = Arc::new(FlaggedToken::new());
        // It need not serve to send what was kept, and may have to stand by for long.
        tokio::spawn(Arc::clone(&outbox).run(kill.token()));
        let starting = Starting {
            transport: self.transport,
            config: self.config,
            services,
            node,
            outbox: Arc::clone(&outbox),
            kill,
        };
        let started = starting.start().await;
        if started.is_err() {
            // Whoever starts the next server on its store does so after this.
            let _ = timeout(DROP_TIMEOUT, outbox.close()).await;
        }
        started
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
        let mut shutdown = pin!(shutdown);
        let mut running = tokio::select! {
            running = self.start() => running?,
            // It may have stood by.
            _ = &mut shutdown => return Ok(()),
        };
        tokio::select! {
            _ = shutdown => running.shutdown().await,
            error = running.over() => {
                if let Err(drained) = running.shutdown().await {
                    tracing::warn!(error = %drained, "a server that was over was not drained");
                }
                Err(error)
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

/// The most bytes of replies that are kept while the broker is away.
const OUTBOX_BYTES: usize = 64 * 1024 * 1024;

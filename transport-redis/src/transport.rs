//! The transport: what it is made of, and how it ends.

use std::sync::Arc;
use std::time::Duration;

use antiphon_core::transport::{
    Capabilities, ConnectionState, Inbox, Outbound, SubscribeOptions, Subscription, Transport,
};
use antiphon_core::{CorrelationId, Error, ErrorKind, Request, ServiceName, Ticket};
use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::clock::Clock;
use crate::command::Pipeline;
use crate::completer::Completer;
use crate::config::RedisConfig;
use crate::connection::{self, Connector, Link};
use crate::inbox::RedisInbox;
use crate::lease::{Leases, LeasesGuard};
use crate::lobby::{self, Lobby};
use crate::monitor::{self, Monitor};
use crate::naming::{InboxKeys, Process};
use crate::sender::Sender;
use crate::settle_batch;
use crate::subscription::RedisSubscription;
use crate::{audience, error, server_check, withdrawal};

/// The most time for closing, and for each step of it.
const CLOSE_MAX: Duration = Duration::from_secs(5);
const CLOSE_STEP: Duration = Duration::from_millis(1500);

/// A connection to a Redis server, 7.0 or newer, or Valkey.
#[derive(Debug)]
pub struct RedisTransport {
    shared: Arc<Shared>,
}

/// What the tasks of a transport share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: Arc<RedisConfig>,
    pub(crate) connector: Arc<Connector>,
    pub(crate) link: Link,
    pub(crate) clock: Arc<Clock>,
    pub(crate) sender: Arc<Sender>,
    pub(crate) completer: Arc<Completer>,
    pub(crate) process: Process,
    pub(crate) leases: Arc<Leases>,
    pub(crate) lobby: Lobby,
    pub(crate) monitor: Monitor,
    /// The tasks of inboxes and subscriptions, and the sender.
    pub(crate) workers: TaskTracker,
    /// Cancelled at close or drop.
    pub(crate) ending: CancellationToken,
    /// Cancelled when all is over.
    ended: CancellationToken,
    state: Arc<watch::Sender<ConnectionState>>,
}

impl RedisTransport {
    /// Connects.
    ///
    /// # Errors
    /// [`ErrorKind::Connect`], at the latest after [`RedisConfig::connect_timeout`], in which the files are read too, and at once if
    /// the server refuses the connection or the credentials, or no file says whom to trust and the platform does not either; [`ErrorKind::Broker`] if the server is too old or may evict keys;
    /// [`ErrorKind::Invalid`] for a configuration that cannot work.
    pub async fn connect(config: RedisConfig) -> Result<Self, Error> {
        config.check()?;
        let clock = Arc::new(Clock::default());
        let checked = async {
            let connector = Arc::new(Connector::new(&config).await?);
            let live = connection::connect(&connector, &config, &clock).await?;
            server_check::check(&live, &config).await?;
            Ok::<_, Error>((connector, live))
        };
        let (connector, live) = timeout(config.connect_timeout, checked)
            .await
            .unwrap_or_else(|_| {
                let message = format!(
                    "cannot connect to Redis within {:?}",
                    config.connect_timeout
                );
                Err(Error::not_executed(ErrorKind::Connect, message))
            })?;
        let (relink, link) = connection::link(live.clone());
        let process = Process::default();
        let shared = Arc::new(Shared {
            config: Arc::new(config),
            connector,
            link,
            clock,
            sender: Arc::default(),
            completer: Arc::default(),
            leases: Arc::new(Leases::new(process.sign_of_life())),
            process,
            lobby: Lobby::default(),
            monitor: Monitor::default(),
            workers: TaskTracker::new(),
            ending: CancellationToken::new(),
            ended: CancellationToken::new(),
            state: Arc::new(watch::Sender::new(ConnectionState::Connected)),
        });
        let Shared {
            config,
            connector,
            link,
            clock,
            sender,
            completer,
            workers,
            ending,
            state,
            ..
        } = &*shared;
        workers.spawn(Arc::clone(sender).run(
            link.clone(),
            Arc::clone(clock),
            Arc::clone(config),
            ending.clone(),
        ));
        workers.spawn(lobby::run(Arc::clone(&shared)));
        workers.spawn(monitor::run(Arc::clone(&shared)));
        let settling_ends = CancellationToken::new();
        let settling =
            Arc::clone(completer).run(link.clone(), Arc::clone(config), settling_ends.clone());
        let settling = tokio::spawn(settling);
        tokio::spawn(connection::supervise(
            Arc::clone(connector),
            Arc::clone(clock),
            live,
            relink,
            Arc::clone(state),
            shared.ended.clone(),
        ));
        let leases = LeasesGuard(Arc::clone(&shared.leases));
        tokio::spawn(end(Arc::clone(&shared), leases, settling, settling_ends));
        Ok(Self { shared })
    }
}

/// Waits for the end, and sees to it that all is over in order: first what takes and sends, then what was settled
/// before, then the sessions, which returns what is still held.
async fn end(
    shared: Arc<Shared>,
    leases: LeasesGuard,
    settling: tokio::task::JoinHandle<()>,
    settling_ends: CancellationToken,
) {
    shared.ending.cancelled().await;
    shared.state.send_replace(ConnectionState::Closed);
    shared.workers.close();
    // A step that takes too long is left to the leases.
    let _ = timeout(CLOSE_STEP, shared.workers.wait()).await;
    settling_ends.cancel();
    let _ = timeout(CLOSE_STEP, settling).await;
    let mut pipeline = Pipeline::new();
    for session in leases.0.sessions() {
        pipeline.add_command(settle_batch::leave(&session));
    }
    // Last: what could not be taken off the registries is taken for dead from now on. One that only calls never showed that
    // it lives, and may have no right to.
    if leases.0.are_kept() {
        let last_signs = [shared.process.sign_of_life(), shared.process.bell()];
        pipeline.cmd("UNLINK").arg(&last_signs);
    }
    drop(leases);
    if !pipeline.is_empty() {
        let _ = timeout(CLOSE_STEP, shared.link.try_execute(&pipeline)).await;
    }
    shared.ended.cancel();
}

impl Drop for RedisTransport {
    fn drop(&mut self) {
        self.shared.ending.cancel();
    }
}

#[async_trait]
impl Transport for RedisTransport {
    fn capabilities(&self) -> Capabilities {
        Capabilities::none()
            .with_fenced_replies()
            .with_withdrawal()
            .with_take_over()
    }

    async fn send(&self, message: Outbound) -> Result<(), Error> {
        match message {
            Outbound::Request {
                service,
                request,
                expect_responder,
                ticket,
            } => {
                self.shared
                    .sender
                    .request(service, request, expect_responder, ticket)
                    .await
            }
            Outbound::Reply { to, reply } => {
                let Some(inbox) = InboxKeys::parse(&to) else {
                    let message = "the reply address is not one of this transport";
                    return Err(Error::not_executed(ErrorKind::Invalid, message));
                };
                self.shared.sender.reply(inbox, reply).await
            }
        }
    }

    fn post(
        &self,
        service: &ServiceName,
        request: &Arc<Request>,
        expect_responder: bool,
        ticket: &Ticket,
    ) -> bool {
        let sender = &self.shared.sender;
        sender.post(service, request, expect_responder, ticket)
    }

    async fn broadcast(
        &self,
        service: &ServiceName,
        request: Request,
    ) -> Result<Option<usize>, Error> {
        let reached = audience::broadcast(&self.shared, service, request).await?;
        Ok(Some(reached))
    }

    async fn withdraw(&self, service: &ServiceName, id: &CorrelationId) -> Result<bool, Error> {
        withdrawal::withdraw(&self.shared, service, id).await
    }

    async fn open_inbox(&self) -> Result<Box<dyn Inbox>, Error> {
        if self.shared.ending.is_cancelled() {
            return Err(error::closed());
        }
        // In a task of its own, so that it is undone if this future is dropped: then nobody takes the inbox, which ends it.
        let shared = Arc::clone(&self.shared);
        let opening = async move { RedisInbox::open(&shared).await };
        let inbox = self.shared.workers.spawn(opening).await;
        Ok(Box::new(inbox.unwrap_or_else(|_| Err(error::closed()))?))
    }

    async fn subscribe(
        &self,
        service: &ServiceName,
        options: SubscribeOptions,
    ) -> Result<Box<dyn Subscription>, Error> {
        if self.shared.ending.is_cancelled() {
            return Err(error::closed());
        }
        // In a task of its own, as an inbox is.
        let (shared, service) = (Arc::clone(&self.shared), service.clone());
        let opening = async move { RedisSubscription::open(&shared, &service, options).await };
        let subscription = self.shared.workers.spawn(opening).await;
        Ok(Box::new(
            subscription.unwrap_or_else(|_| Err(error::closed()))?,
        ))
    }

    fn state(&self) -> watch::Receiver<ConnectionState> {
        self.shared.state.subscribe()
    }

    async fn close(&self) {
        self.shared.ending.cancel();
        // At the latest then the leases see to the rest.
        let _ = timeout(CLOSE_MAX, self.shared.ended.cancelled()).await;
    }
}

//! The transport: one connection to a broker in this process.

use std::sync::Arc;
use std::time::Duration;

use antiphon_core::transport::{Capabilities, Inbox, Outbound, SubscribeOptions, Subscription};
use antiphon_core::{
    ConnectionState, CorrelationId, Error, ErrorKind, Request, ServiceName, Ticket, Transport,
};
use async_trait::async_trait;
use tokio::sync::watch;
use tokio::task::coop;
use tokio::time::Instant;

use crate::broker::{HubHandle, MemoryBroker};
use crate::config::MemoryConfig;
use crate::connection::{BLOCKED, CUT, Connection, PAUSED};
use crate::hub::take_off;
use crate::inbox::MemoryInbox;
use crate::subscription::MemorySubscription;

/// A connection to a [`MemoryBroker`].
///
/// Clones are the same connection. It is closed when the last of them is dropped, as if its process had died.
#[derive(Clone, Debug)]
pub struct MemoryTransport(Arc<Handle>);

/// What all clones share.
#[derive(Debug)]
struct Handle {
    connection: Arc<Connection>,
    broker: Arc<HubHandle>,
}

impl MemoryTransport {
    /// Connects to the broker that the configuration names, making it if there is none. A broker lives as long as any
    /// connection to it or [`MemoryBroker`] of it.
    ///
    /// # Errors
    /// None at present: a broker in this process is always there.
    pub async fn connect(config: MemoryConfig) -> Result<Self, Error> {
        Ok(MemoryBroker::open(config).connect())
    }

    pub(crate) fn new(broker: Arc<HubHandle>) -> Self {
        Self(Arc::new(Handle {
            connection: broker.hub().connect(),
            broker,
        }))
    }

    /// The broker that it is connected to.
    #[must_use]
    pub fn broker(&self) -> MemoryBroker {
        MemoryBroker::from_handle(Arc::clone(&self.0.broker))
    }

    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.0.connection
    }
}

#[async_trait]
impl Transport for MemoryTransport {
    fn capabilities(&self) -> Capabilities {
        Capabilities::none()
            .with_fenced_replies()
            .with_withdrawal()
            .with_take_over()
    }

    async fn send(&self, message: Outbound) -> Result<(), Error> {
        let entered = Instant::now();
        // A message is handed over at the first poll; without this, a loop of sends would never let a server run.
        coop::consume_budget().await;
        let connection = self.connection();
        match message {
            Outbound::Request {
                service,
                mut request,
                expect_responder,
                ticket,
            } => {
                let waited = match connection.pass(CUT | PAUSED | BLOCKED).await? {
                    true => entered.elapsed(),
                    false => Duration::ZERO,
                };
                let expires = in_time(&mut request, entered, waited)?;
                let commit = || ticket.commit();
                connection
                    .hub()
                    .request(&service, request, expires, expect_responder, commit)
            }
            Outbound::Reply { to, reply } => {
                connection.pass(CUT | PAUSED).await?;
                if connection.hub().reply(&to, reply) {
                    Ok(())
                } else {
                    let message = "the inbox is gone";
                    Err(Error::not_executed(ErrorKind::NoResponder, message))
                }
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
        let connection = self.connection();
        let Some(expires) = ticket.deadline() else {
            return false;
        };
        if !connection.is_open(CUT | PAUSED | BLOCKED) {
            return false;
        }
        let (hub, request) = (connection.hub(), Arc::clone(request));
        // What is refused goes through `send` to be refused there: a loop of such calls would let nobody else run.
        let commit = || ticket.commit_in_post();
        hub.request(service, request, Some(expires), expect_responder, commit)
            .is_ok()
    }

    async fn broadcast(
        &self,
        service: &ServiceName,
        request: Request,
    ) -> Result<Option<usize>, Error> {
        let entered = Instant::now();
        let connection = self.connection();
        connection.pass(CUT | PAUSED | BLOCKED).await?;
        let mut request = Arc::new(request);
        take_off(&mut request, entered.elapsed());
        Ok(Some(connection.hub().broadcast(service, &request)))
    }

    async fn withdraw(&self, service: &ServiceName, id: &CorrelationId) -> Result<bool, Error> {
        let connection = self.connection();
        connection.pass(CUT | PAUSED).await?;
        Ok(connection.hub().withdraw(service, id))
    }

    async fn open_inbox(&self) -> Result<Box<dyn Inbox>, Error> {
        let connection = self.connection();
        let letters = connection
            .open(|| Ok(connection.hub().open_inbox(connection.id())))
            .await?;
        Ok(Box::new(MemoryInbox::new(Arc::clone(connection), letters)))
    }

    async fn subscribe(
        &self,
        service: &ServiceName,
        options: SubscribeOptions,
    ) -> Result<Box<dyn Subscription>, Error> {
        let connection = self.connection();
        let (queue, session) = connection
            .open(|| {
                connection
                    .hub()
                    .subscribe(service, connection.id(), options)
            })
            .await?;
        Ok(Box::new(MemorySubscription::new(
            Arc::clone(connection),
            queue,
            session,
        )))
    }

    fn state(&self) -> watch::Receiver<ConnectionState> {
        self.connection().state()
    }

    async fn close(&self) {
        self.connection().close();
    }
}

/// When a request expires that entered then and has waited for so long, if any time is left of its budget.
fn in_time(
    request: &mut Arc<Request>,
    entered: Instant,
    waited: Duration,
) -> Result<Option<Instant>, Error> {
    let Some(deadline) = request.deadline else {
        return Ok(None);
    };
    if deadline.budget <= waited {
        return Err(Error::not_executed(
            ErrorKind::DeadlineExceeded,
            "no time was left when it could be sent",
        ));
    }
    if !waited.is_zero() {
        take_off(request, waited);
    }
    Ok(entered.checked_add(deadline.budget))
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.connection.close();
    }
}

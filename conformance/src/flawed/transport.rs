//! A transport that hands everything on to a sound one, but for its flaw.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use antiphon_core::transport::{
    Capabilities, Inbox, Outbound, SubscribeMode, SubscribeOptions, Subscription,
};
use antiphon_core::{
    Code, ConnectionState, CorrelationId, Deadline, Error, ErrorKind, Executed, Fault, Headers,
    Method, Outcome, Reply, ReplyAddress, Request, ServiceName, Ticket, Transport,
};
use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Flaw;
use super::harness::World;
use super::inbox::FlawedInbox;
use super::subscription::FlawedSubscription;

/// The size from which a body is long.
pub(super) const LONG: usize = 64 * 1024;

/// A sound transport, spoilt.
#[derive(Debug)]
pub(super) struct Flawed {
    line: Arc<Line>,
}

/// One connection, as all its parts see it.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) sound: Arc<dyn Transport>,
    pub(super) world: Arc<World>,
    /// Fires at the first cut.
    pub(super) cut: CancellationToken,
    closed: AtomicBool,
    /// Never written to.
    always_connected: watch::Sender<ConnectionState>,
}

impl Flawed {
    pub(super) fn new(
        sound: Arc<dyn Transport>,
        world: Arc<World>,
        cut: CancellationToken,
    ) -> Self {
        let always_connected = watch::Sender::new(ConnectionState::Connected);
        Self {
            line: Arc::new(Line {
                sound,
                world,
                cut,
                closed: AtomicBool::new(false),
                always_connected,
            }),
        }
    }
}

impl Line {
    pub(super) fn has(&self, flaw: Flaw) -> bool {
        self.world.flaw == flaw
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    async fn send_request(
        &self,
        service: ServiceName,
        mut request: Request,
        expect_responder: bool,
        ticket: Ticket,
    ) -> Result<(), Error> {
        let mut message = Message {
            service,
            expect_responder,
            ticket,
        };
        if let Some(deadline) = &mut request.deadline {
            deadline.budget = self.budget(*deadline)?;
        }
        request.body = self.body(request.body);
        request.id = self.id(request.id)?;
        match self.world.flaw {
            Flaw::LosesMethods => request.method = None,
            Flaw::LosesHeaders => request.headers = Headers::new(),
            Flaw::LosesContentTypes => request.content_type = None,
            Flaw::MixesServices => {
                if let Some(service) = self.world.memory().last_subscribed.clone() {
                    message.service = service;
                }
            }
            Flaw::InventsSignals => {
                if let Some(to) = request.reply_to.clone() {
                    let node = antiphon_core::Node::new("planted")?;
                    let every = Duration::from_secs(5);
                    let signal = antiphon_core::Signal::Running { node, every };
                    let reply = Arc::new(Reply::signal(request.id.clone(), signal));
                    self.sound.send(Outbound::Reply { to, reply }).await?;
                }
            }
            Flaw::ForgetsSignals => request.signals = antiphon_core::Signals::None,
            Flaw::IgnoresNodes => message.service = without_node(&message.service)?,
            Flaw::NeverCommits => message.ticket = Ticket::new(),
            Flaw::AlwaysExpectsResponder => message.expect_responder = true,
            Flaw::NeverSaysNoResponder => message.expect_responder = false,
            Flaw::RemembersResponders if self.world.memory().served.contains(&message.service) => {
                message.expect_responder = false;
            }
            Flaw::SeesNoResponder if expect_responder => {
                return Err(Error::not_executed(ErrorKind::NoResponder, "planted"));
            }
            Flaw::DuplicatesRequests => {
                let copy = Message {
                    ticket: Ticket::new(),
                    ..message.clone()
                };
                self.sound.send(copy.with(request.clone())).await?;
            }
            Flaw::EnqueuesRefused if expect_responder => {
                let late = Message {
                    ticket: Ticket::new(),
                    expect_responder: false,
                    ..message.clone()
                };
                let copy = request.clone();
                let sent = self.sound.send(message.with(request)).await;
                if sent.is_err() {
                    self.sound.send(late.with(copy)).await?;
                }
                return sent;
            }
            Flaw::Reorders => {
                let overtaken = self.world.memory().overtaken.take();
                let Some(overtaken) = overtaken else {
                    self.world.memory().overtaken = Some(message.with(request));
                    return Ok(());
                };
                self.sound.send(message.with(request)).await?;
                return self.sound.send(overtaken).await;
            }
            Flaw::ForgetsTheWait => {
                let connected = |state: &ConnectionState| *state == ConnectionState::Connected;
                // An error would mean that it is closed, which the sound transport tells.
                let _ = self.sound.state().wait_for(connected).await;
            }
            Flaw::SendsWithdrawn => {
                message.ticket = Ticket::new();
                // And late: what it waited is forgotten.
                if let Some(deadline) = &mut request.deadline {
                    deadline.budget += Duration::from_secs(10);
                }
                let sound = Arc::clone(&self.sound);
                let sent = tokio::spawn(async move { sound.send(message.with(request)).await });
                return sent.await.unwrap_or(Ok(()));
            }
            _ => {}
        }
        self.sound.send(message.with(request)).await
    }

    async fn send_reply(&self, to: ReplyAddress, reply: &Reply) -> Result<(), Error> {
        if self.has(Flaw::LosesBareReplies) {
            return Ok(());
        }
        let mut reply = self.reply(reply)?;
        match self.world.flaw {
            Flaw::LosesReplyNodes => reply.node = None,
            Flaw::LosesSignals if is_signal(&reply) => return Ok(()),
            Flaw::TakesSignalsForReplies if is_signal(&reply) => reply.outcome = Outcome::Value,
            _ => {}
        }
        let reply = Arc::new(reply);
        let sent = self.sound.send(Outbound::Reply { to, reply }).await;
        match sent {
            Err(error)
                if self.has(Flaw::HidesGoneInboxes) && error.kind() == ErrorKind::NoResponder =>
            {
                Ok(())
            }
            sent => sent,
        }
    }

    /// What becomes of a reply on its way.
    pub(super) fn reply(&self, reply: &Reply) -> Result<Reply, Error> {
        let mut reply = reply.clone();
        reply.body = self.body(reply.body);
        reply.id = self.id(reply.id)?;
        if let Outcome::Fault { fault, executed } = &mut reply.outcome {
            match self.world.flaw {
                Flaw::LosesDetails => *fault = Fault::new(fault.code(), fault.message()),
                Flaw::BlursFaults => *fault = Fault::new(Code::Unknown, fault.message()),
                Flaw::SaysMaybe => *executed = Executed::Maybe,
                _ => {}
            }
        }
        match self.world.flaw {
            Flaw::LosesHeaders => reply.headers = Headers::new(),
            Flaw::LosesContentTypes => reply.content_type = None,
            _ => {}
        }
        Ok(reply)
    }

    fn budget(&self, deadline: Deadline) -> Result<Duration, Error> {
        Ok(match self.world.flaw {
            Flaw::StretchesBudgets => deadline.budget * 100,
            Flaw::HalvesBudgets => deadline.budget / 2,
            Flaw::JudgesByWallClock => deadline
                .at
                .duration_since(SystemTime::now())
                .unwrap_or_default(),
            Flaw::RefusesShortBudgets if deadline.budget < Duration::from_millis(2) => {
                return Err(Error::not_executed(ErrorKind::Broker, "planted"));
            }
            _ => deadline.budget,
        })
    }

    fn body(&self, body: Bytes) -> Bytes {
        match self.world.flaw {
            Flaw::DropsTheLastByte => body.slice(..body.len().saturating_sub(1)),
            Flaw::CutsLongBodies => body.slice(..body.len().min(LONG)),
            Flaw::PadsEmptyBodies if body.is_empty() => Bytes::from_static(b"null"),
            Flaw::WantsText => String::from_utf8_lossy(&body).into_owned().into(),
            _ => body,
        }
    }

    fn id(&self, id: CorrelationId) -> Result<CorrelationId, Error> {
        match self.world.flaw {
            Flaw::FoldsIds => CorrelationId::parse(&id.to_string().to_lowercase()),
            _ => Ok(id),
        }
    }
}

/// A request's envelope.
#[derive(Clone)]
struct Message {
    service: ServiceName,
    expect_responder: bool,
    ticket: Ticket,
}

impl Message {
    fn with(self, request: Request) -> Outbound {
        let Self {
            service,
            expect_responder,
            ticket,
        } = self;
        Outbound::Request {
            service,
            request: Arc::new(request),
            expect_responder,
            ticket,
        }
    }
}

fn without_node(service: &ServiceName) -> Result<ServiceName, Error> {
    ServiceName::new(service.service())
}

#[async_trait]
impl Transport for Flawed {
    fn capabilities(&self) -> Capabilities {
        self.line.sound.capabilities()
    }

    async fn send(&self, message: Outbound) -> Result<(), Error> {
        let line = &self.line;
        if line.is_closed() && line.has(Flaw::SendsAfterClose) {
            return Ok(());
        }
        if line.cut.is_cancelled() && line.has(Flaw::StaysDown) {
            std::future::pending().await
        }
        match message {
            Outbound::Request {
                service,
                request,
                expect_responder,
                ticket,
            } => {
                let request = Arc::unwrap_or_clone(request);
                line.send_request(service, request, expect_responder, ticket)
                    .await
            }
            Outbound::Reply { to, reply } => line.send_reply(to, &reply).await,
        }
    }

    /// Left out, but where the flaw is in it.
    fn post(
        &self,
        service: &ServiceName,
        request: &Arc<Request>,
        expect_responder: bool,
        ticket: &Ticket,
    ) -> bool {
        let (committed, failed) = match self.line.world.flaw {
            Flaw::PostsWithdrawn => (Ticket::new(), ticket.clone()),
            Flaw::HidesFailedPosts => (ticket.clone(), Ticket::new()),
            _ => return false,
        };
        let message = Outbound::Request {
            service: service.clone(),
            request: Arc::clone(request),
            expect_responder,
            ticket: committed,
        };
        let sound = Arc::clone(&self.line.sound);
        tokio::spawn(async move {
            if let Err(error) = sound.send(message).await {
                failed.fail(error);
            }
        });
        true
    }

    async fn broadcast(
        &self,
        service: &ServiceName,
        request: Request,
    ) -> Result<Option<usize>, Error> {
        if self.line.has(Flaw::BroadcastsToNobody) {
            return Ok(Some(0));
        }
        let method = request.method.as_ref().map(Method::as_str);
        if self.line.has(Flaw::LosesGivingUp) && method == Some("antiphon.cancel") {
            return Ok(Some(1));
        }
        let reached = self.line.sound.broadcast(service, request).await?;
        let miscounted = usize::from(self.line.has(Flaw::MiscountsBroadcasts));
        Ok(reached.map(|reached| reached + miscounted))
    }

    async fn withdraw(&self, service: &ServiceName, id: &CorrelationId) -> Result<bool, Error> {
        if self.line.has(Flaw::WithdrawsNothing) {
            return Ok(true);
        }
        self.line.sound.withdraw(service, id).await
    }

    async fn open_inbox(&self) -> Result<Box<dyn Inbox>, Error> {
        let sound = self.line.sound.open_inbox().await?;
        let first = self
            .line
            .world
            .memory()
            .first_address
            .get_or_insert_with(|| sound.address())
            .clone();
        Ok(Box::new(FlawedInbox::new(
            Arc::clone(&self.line),
            sound,
            first,
        )))
    }

    async fn subscribe(
        &self,
        service: &ServiceName,
        mut options: SubscribeOptions,
    ) -> Result<Box<dyn Subscription>, Error> {
        let line = &self.line;
        let mut service = service.clone();
        let exclusive = options.mode.is_exclusive();
        let had_an_owner = exclusive && !line.world.memory().owned.insert(service.clone());
        match line.world.flaw {
            Flaw::IgnoresNodes => service = without_node(&service)?,
            Flaw::CapsPrefetch => options.prefetch = options.prefetch.min(100),
            Flaw::IgnoresPrefetch => options.prefetch = 10_000,
            Flaw::SharesExclusives => options.mode = SubscribeMode::Shared,
            Flaw::FencesOffNobody if exclusive => options.mode = SubscribeMode::Exclusive,
            Flaw::OwnsForEver if had_an_owner => {
                return Err(Error::not_executed(ErrorKind::AlreadyOwned, "planted"));
            }
            _ => {}
        }
        let sound = line.sound.subscribe(&service, options).await?;
        let first = {
            let mut memory = line.world.memory();
            memory.last_subscribed = Some(service.clone());
            memory.served.insert(service)
        };
        Ok(Box::new(FlawedSubscription::new(
            Arc::clone(line),
            sound,
            first,
        )))
    }

    fn state(&self) -> watch::Receiver<ConnectionState> {
        if self.line.has(Flaw::HidesItsState) {
            return self.line.always_connected.subscribe();
        }
        self.line.sound.state()
    }

    async fn close(&self) {
        let line = &self.line;
        if line.closed.swap(true, Ordering::SeqCst) && line.has(Flaw::HangsOnSecondClose) {
            std::future::pending().await
        }
        line.sound.close().await;
    }
}

fn is_signal(reply: &Reply) -> bool {
    matches!(reply.outcome, Outcome::Signal(_))
}

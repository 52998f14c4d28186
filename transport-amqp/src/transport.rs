//! The transport: two connections, and what lives on them.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use antiphon_core::transport::{
    Capabilities, Done, Inbox, Outbound, SubscribeMode, SubscribeOptions, Subscription, Transport,
};
use antiphon_core::{
    ConnectionState, CorrelationId, Error, ErrorKind, Request, ServiceName, Ticket,
};
use async_trait::async_trait;
use lapin::types::ShortString;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::broadcast::broadcast;
use crate::config::AmqpConfig;
use crate::courier::{Courier, Route};
use crate::dial::Dialler;
use crate::error::{Failure, closed};
use crate::inbox::AmqpInbox;
use crate::intake::{Intake, Plan};
use crate::link::{Link, Session};
use crate::naming::{self, QueueNames};
use crate::press::Press;
use crate::prober::Prober;
use crate::publisher::{Job, OutgoingRequest, Publisher, What};
use crate::recovery::{Members, Role, keep_state};
use crate::refused::Refused;
use crate::subscription::{AmqpSubscription, Handover};
use crate::topology::Claims;

/// How long the tasks have to come to an end before the connections are closed under them.
const TASKS_TIMEOUT: Duration = Duration::from_secs(3);

/// How long the connections have to close.
const LINKS_TIMEOUT: Duration = Duration::from_secs(2);

/// A connection to a RabbitMQ broker.
///
/// It consists of two connections, one to publish and one to consume, so that a broker that blocks publishers still delivers
/// replies and takes acknowledgements. Dropping it ends everything that was opened on it.
pub struct AmqpTransport {
    config: AmqpConfig,
    runtime: Handle,
    publish: Link<Press>,
    consume: Link,
    members: Arc<Members>,
    claims: Arc<Claims>,
    refused: Arc<Refused>,
    prober: Arc<Prober>,
    /// Open while inboxes are live.
    gate: watch::Receiver<bool>,
    jobs: mpsc::UnboundedSender<Job>,
    /// What is for every server of a service, from the first on: who may not say it loses the channel, with all that it waits for there.
    broadcasts: OnceLock<mpsc::UnboundedSender<Job>>,
    state: watch::Receiver<ConnectionState>,
    undeliverable: Arc<AtomicU64>,
    shutdown: Shutdown,
}

impl AmqpTransport {
    /// Connects. Its tasks run on the present Tokio runtime.
    ///
    /// **Cancel safety**: dropping the future closes what was opened.
    ///
    /// # Errors
    /// `Invalid` if the fields of the config contradict each other, or its files are of no use; `Connect` if the broker is not there, refuses the user, or does not answer within
    /// [`AmqpConfig::connect_timeout`], in which the files are read too, and if the platform trusts nobody and no `ca_file` says whom to trust.
    pub async fn connect(config: AmqpConfig) -> Result<Self, Error> {
        config.check()?;
        let shutdown = Shutdown::default();
        let closed = &shutdown.links;
        let connect = async {
            let dialler = Dialler::new(&config).await?;
            let links = tokio::try_join!(
                Link::<Press>::connect(&config, &dialler, "publish", closed.clone()),
                Link::<Session>::connect(&config, &dialler, "consume", closed.clone()),
            );
            links.map_err(|failure| failure.into_connect_error(&config.address()))
        };
        let connected = timeout(config.connect_timeout, connect).await;
        let ((publish, keep_publish), (consume, keep_consume)) = connected
            .map_err(|_| Failure::TimedOut("connecting").into_connect_error(&config.address()))??;
        shutdown.link_tasks.spawn(keep_publish);
        shutdown.link_tasks.spawn(keep_consume);

        let members = Members::new();
        let (state, state_receiver) = watch::channel(ConnectionState::Connected);
        let (gate, gate_receiver) = watch::channel(true);
        shutdown.link_tasks.spawn(keep_state(
            publish.clone(),
            consume.clone(),
            Arc::clone(&members),
            state,
            gate,
        ));
        let prober = Arc::new(Prober::new(consume.clone()));
        let (jobs, job_receiver) = mpsc::unbounded_channel();
        let publisher = Publisher::new(
            publish.clone(),
            gate_receiver.clone(),
            job_receiver,
            Arc::clone(&prober),
            shutdown.tasks_token.clone(),
        );
        shutdown.tasks.spawn(publisher.run());
        Ok(Self {
            gate: gate_receiver,
            broadcasts: OnceLock::new(),
            runtime: Handle::current(),
            prober,
            publish,
            consume,
            members,
            claims: Arc::default(),
            refused: Arc::default(),
            jobs,
            state: state_receiver,
            undeliverable: Arc::default(),
            shutdown,
            config,
        })
    }

    /// How many replies of this transport's servers found no inbox: their callers had gone.
    #[must_use]
    pub fn undeliverable_replies(&self) -> u64 {
        self.undeliverable.load(Ordering::Relaxed)
    }

    fn check_open(&self) -> Result<(), Error> {
        match self.shutdown.tasks_token.is_cancelled() {
            true => Err(closed()),
            false => Ok(()),
        }
    }

    fn job(
        &self,
        queue: ShortString,
        request: Arc<Request>,
        expect_responder: bool,
        deadline: Option<Instant>,
        done: Done,
    ) -> Job {
        Job {
            what: What::Request(Box::new(OutgoingRequest {
                exchange: ShortString::default(),
                queue,
                request,
                deadline,
                persistent: self.config.durable,
                expect_responder,
                came_back: false,
                refusals: 0,
            })),
            done,
        }
    }

    /// Hands a request to the publisher, if somebody consumes from its queue.
    fn probe(&self, queue: ShortString, mut job: Job) {
        let deadline = job.deadline();
        let (prober, jobs) = (Arc::clone(&self.prober), self.jobs.clone());
        let probe = async move {
            // Who dropped the call needs no answer, and after the deadline the publisher says what there is to say.
            let answer = tokio::select! {
                answer = prober.expect_consumer(&queue) => answer,
                () = job.done.future_dropped() => return,
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => Ok(()),
            };
            match answer {
                Ok(()) => {
                    // If it fails, the job is dropped, and its sender learns that the transport is closed.
                    let _ = jobs.send(job);
                }
                Err(error) => {
                    job.done.tell(Err(error));
                }
            }
        };
        let closing = self.shutdown.tasks_token.clone();
        self.spawn(async move {
            closing.run_until_cancelled(probe).await;
        });
    }

    fn submit(&self, job: Job) {
        if let Err(mpsc::error::SendError(job)) = self.jobs.send(job) {
            job.done.tell(Err(closed()));
        }
    }

    fn broadcasts(&self) -> &mpsc::UnboundedSender<Job> {
        self.broadcasts.get_or_init(|| {
            let (jobs, receiver) = mpsc::unbounded_channel();
            let publisher = Publisher::new(
                self.publish.clone(),
                self.gate.clone(),
                receiver,
                Arc::clone(&self.prober),
                self.shutdown.tasks_token.clone(),
            );
            self.spawn(publisher.run());
            jobs
        })
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.shutdown.tasks.spawn_on(task, &self.runtime);
    }
}

#[async_trait]
impl Transport for AmqpTransport {
    fn capabilities(&self) -> Capabilities {
        Capabilities::none()
    }

    async fn send(&self, message: Outbound) -> Result<(), Error> {
        self.check_open()?;
        let told = match message {
            Outbound::Reply { to, reply } => {
                let (done, told) = Done::of_reply();
                let what = What::Reply { to, reply };
                self.submit(Job { what, done });
                told
            }
            Outbound::Request {
                service,
                request,
                expect_responder,
                ticket,
            } => {
                let queue = naming::main_queue(&service)?;
                let deadline = request
                    .deadline
                    .and_then(|deadline| Instant::now().checked_add(deadline.budget));
                let (done, told) = Done::of_request(ticket);
                let job = self.job(queue.clone(), request, expect_responder, deadline, done);
                match expect_responder {
                    true => self.probe(queue, job),
                    false => self.submit(job),
                }
                told
            }
        };
        told.await
    }

    fn post(
        &self,
        service: &ServiceName,
        request: &Arc<Request>,
        expect_responder: bool,
        ticket: &Ticket,
    ) -> bool {
        // Whether somebody serves it takes a question first.
        if expect_responder || self.check_open().is_err() {
            return false;
        }
        let Ok(queue) = naming::main_queue(service) else {
            return false;
        };
        let Some(deadline) = ticket.deadline() else {
            return false;
        };
        let done = Done::of_call(ticket.clone());
        self.submit(self.job(queue, Arc::clone(request), false, Some(deadline), done));
        true
    }

    async fn broadcast(
        &self,
        service: &ServiceName,
        request: Request,
    ) -> Result<Option<usize>, Error> {
        self.check_open()?;
        broadcast(&self.prober, self.broadcasts(), service, request).await
    }

    async fn withdraw(&self, _service: &ServiceName, _id: &CorrelationId) -> Result<bool, Error> {
        // Nobody but a consumer can take a message out of its queue.
        self.check_open().map(|()| false)
    }

    async fn open_inbox(&self) -> Result<Box<dyn Inbox>, Error> {
        self.check_open()?;
        let (link, members) = (self.consume.clone(), Arc::clone(&self.members));
        let closing = self.shutdown.tasks_token.clone();
        let (opened, inbox) = oneshot::channel();
        // In a task of its own, so that nothing is left half made on the broker if nobody waits for it any more.
        self.spawn(async move {
            let open = AmqpInbox::open(link, &members, closing.clone());
            match closing.run_until_cancelled(open).await {
                Some(Ok((inbox, keeper))) => {
                    let _ = opened.send(Ok(inbox));
                    keeper.await;
                }
                Some(Err(error)) => drop(opened.send(Err(error))),
                None => {}
            }
        });
        Ok(Box::new(inbox.await.unwrap_or_else(|_| Err(closed()))?))
    }

    async fn subscribe(
        &self,
        service: &ServiceName,
        options: SubscribeOptions,
    ) -> Result<Box<dyn Subscription>, Error> {
        self.check_open()?;
        let exclusive = match options.mode {
            SubscribeMode::Shared => false,
            // The broker gives no right over an owner that lives; one that hangs it ends itself, by its heartbeats.
            SubscribeMode::Exclusive | SubscribeMode::TakeOver => true,
            other => {
                let message = format!("subscribing as {other:?} on RabbitMQ");
                return Err(Error::not_executed(ErrorKind::Unsupported, message));
            }
        };
        let plan = Arc::new(Plan {
            config: self.config.clone(),
            names: QueueNames::new(service)?,
            prefetch: options.prefetch.clamp(1, usize::from(u16::MAX)),
            exclusive,
            marker: naming::random_marker(),
        });
        let claim = self.claims.claim(service, exclusive)?;
        let (refused, service) = (Arc::clone(&self.refused), service.clone());
        let lingering = refused.lingering(&service);
        let (consume, publish) = (self.consume.clone(), self.publish.clone());
        let (members, undeliverable) = (Arc::clone(&self.members), Arc::clone(&self.undeliverable));
        let closing = self.shutdown.tasks_token.clone();
        let (opened, subscription) = oneshot::channel();
        // In a task of its own, so that nobody owns a service for somebody who waits for it no more.
        self.spawn(async move {
            let open = Intake::open(consume.clone(), Arc::clone(&plan), lingering);
            let intake = match closing.run_until_cancelled(open).await {
                Some(Ok(intake)) => intake,
                Some(Err(failure)) => {
                    let error = failure.into_error(&format!("serving {}", plan.names.main));
                    refused.note(&service, Some(&error));
                    return drop(opened.send(Err(error)));
                }
                None => return,
            };
            refused.note(&service, None);
            let route = Route {
                member: members.enter(Role::Subscription, intake.session.number),
                plan,
                consume,
                publish,
                _claim: claim,
                closing,
                undeliverable,
            };
            let (deliveries, receiver) = mpsc::unbounded_channel();
            let handover = Handover::new(receiver);
            let commands = mpsc::unbounded_channel();
            let over = Arc::new(OnceLock::new());
            let subscription =
                AmqpSubscription::new(handover.clone(), commands.0.clone(), Arc::clone(&over));
            // Dropped if nobody waits for it, which stops it.
            let _ = opened.send(Ok(subscription));
            Courier::new(route, intake, (deliveries, handover), commands, over)
                .run()
                .await;
        });
        let subscription = subscription.await.unwrap_or_else(|_| Err(closed()))?;
        Ok(Box::new(subscription))
    }

    fn state(&self) -> watch::Receiver<ConnectionState> {
        self.state.clone()
    }

    async fn close(&self) {
        self.shutdown.clone().run().await;
    }
}

impl fmt::Debug for AmqpTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AmqpTransport")
            .field("config", &self.config)
            .field("state", &*self.state.borrow())
            .finish_non_exhaustive()
    }
}

impl Drop for AmqpTransport {
    fn drop(&mut self) {
        self.runtime.spawn(self.shutdown.clone().run());
    }
}

/// Ends the tasks first, and then the connections that they use.
#[derive(Clone, Default)]
struct Shutdown {
    tasks: TaskTracker,
    tasks_token: CancellationToken,
    link_tasks: TaskTracker,
    links: CancellationToken,
}

impl Shutdown {
    async fn run(self) {
        self.tasks_token.cancel();
        self.tasks.close();
        let _ = timeout(TASKS_TIMEOUT, self.tasks.wait()).await;
        self.links.cancel();
        self.link_tasks.close();
        let _ = timeout(LINKS_TIMEOUT, self.link_tasks.wait()).await;
    }
}

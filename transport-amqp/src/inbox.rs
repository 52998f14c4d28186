//! A private reply address: an exclusive queue, consumed without acknowledgement.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use antiphon_core::transport::{Inbox, InboxEvent, Incoming};
use antiphon_core::{Error, ErrorKind, ReplyAddress, ServiceName};
use async_trait::async_trait;
use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{BasicConsumeOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Consumer};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::error::{Failure, RESOURCE_LOCKED, closed};
use crate::joined::{self, Joined};
use crate::link::{Link, LinkState, Session, backoff, bounded};
use crate::message;
use crate::naming::{self, TO_ALL};
use crate::recovery::{Member, Members, Role};

/// The most replies that are handed over at once.
const BATCH: usize = 256;

/// How long the broker may take to let go of the name of an inbox whose connection is lost. If that connection only looks
/// dead, the name stays locked until its heartbeats run out, and a new one is taken.
const RELEASE_TIMEOUT: Duration = Duration::from_millis(250);
const RELEASE_RETRY: Duration = Duration::from_millis(10);

/// How long a dropped inbox tries to remove its queue; it goes with the connection in any case.
const DELETE_TIMEOUT: Duration = Duration::from_secs(1);

/// A life of the connection that there is not.
const NEVER: u64 = 0;

/// A private reply address on RabbitMQ.
pub(crate) struct AmqpInbox {
    address: ReplyAddress,
    consumer: Option<Consumer>,
    session: Arc<Session>,
    joined: Joined,
    member: Member,
    /// Tells the keeper that the consumer of this session ended.
    ended: mpsc::UnboundedSender<u64>,
    restored: mpsc::UnboundedReceiver<Restored>,
    /// The consumer ended, which the keeper and the owner are still to be told.
    ended_here: bool,
    /// Replies were lost, and the keeper told, which the owner is still to be.
    untold: bool,
    /// The last event told of a new consumer, which the owner has worked off when it asks for the next one.
    announced: bool,
}

/// A live inbox, from the keeper.
struct Restored {
    address: ReplyAddress,
    consumer: Consumer,
    session: Arc<Session>,
}

impl AmqpInbox {
    /// Opens an inbox, and gives the task that keeps it alive.
    pub(crate) async fn open(
        mut link: Link,
        members: &Arc<Members>,
        closing: CancellationToken,
    ) -> Result<(Self, impl Future<Output = ()> + Send + use<>), Error> {
        let mut name = naming::random_inbox();
        let joined = Joined::default();
        let (session, open) = loop {
            let Some(session) = link.next_session().await else {
                return Err(closed());
            };
            match declare(&session, &mut name, &joined).await {
                Ok(open) => break (session, open),
                Err(failure) if failure.is_final() => {
                    return Err(failure.into_error("opening an inbox"));
                }
                Err(_) => sleep(backoff(0)).await,
            }
        };
        let (ended, ended_receiver) = mpsc::unbounded_channel();
        let (restored_sender, restored) = mpsc::unbounded_channel();
        let (channel, consumer) = open;
        let inbox = Self {
            address: ReplyAddress::new(&name)?,
            consumer: Some(consumer),
            joined: joined.clone(),
            member: members.enter(Role::Inbox, session.number),
            ended,
            restored,
            ended_here: false,
            untold: false,
            announced: false,
            session: Arc::clone(&session),
        };
        let keeper = Keeper {
            link,
            name,
            channel,
            session: session.number,
            joined,
            ended: ended_receiver,
            restored: restored_sender,
            closing,
        };
        Ok((inbox, keeper.run()))
    }

    /// Takes over what the keeper restored. True if its address is another one.
    fn restore(&mut self, restored: Restored) -> bool {
        let moved = self.address != restored.address;
        self.address = restored.address;
        self.consumer = Some(restored.consumer);
        self.session = restored.session;
        moved
    }

    /// Tells the keeper that the consumer ended, and the owner that replies were lost; or that it is over.
    fn end(&mut self) -> InboxEvent {
        self.member.ready(NEVER);
        match self.ended.send(self.session.number) {
            Ok(()) => lost(),
            Err(_) => InboxEvent::Closed(closed()),
        }
    }
}

/// The broker removed the queue with all that was in it, so of no reply that was on its way can it be said whether it was lost.
fn lost() -> InboxEvent {
    let message = "the connection was lost, and with it the replies in the inbox";
    InboxEvent::Lost(Error::maybe_executed(ErrorKind::ConnectionLost, message))
}

#[async_trait]
impl Inbox for AmqpInbox {
    fn address(&self) -> ReplyAddress {
        self.address.clone()
    }

    async fn join(&mut self, service: &ServiceName) -> Result<(), Error> {
        let key = naming::all_of(service);
        self.joined.enter(&key);
        loop {
            let queue = ShortString::from(self.address.as_str());
            match joined::bind_live(&self.session, &queue, &key).await {
                Ok(()) => return Ok(()),
                Err(failure) if failure.is_final() => {
                    self.joined.leave(&key);
                    return Err(failure.into_error("joining a service"));
                }
                Err(failure) => tracing::debug!(%failure, %service, "not yet joined"),
            }
            // The queue is gone, or its connection. The keeper, if it does not know yet, declares it anew.
            self.consumer = None;
            self.untold = true;
            if let InboxEvent::Closed(error) = self.end() {
                return Err(error);
            }
            let Some(restored) = self.restored.recv().await else {
                return Err(closed());
            };
            self.restore(restored);
        }
    }

    async fn recv(&mut self) -> InboxEvent {
        if std::mem::take(&mut self.announced) {
            // Requests flow again only now: those that were held back have heard of the new address.
            self.member.ready(self.session.number);
        }
        if std::mem::take(&mut self.untold) {
            self.announced = self.consumer.is_some();
            return lost();
        }
        loop {
            if std::mem::take(&mut self.ended_here) {
                return self.end();
            }
            let Some(consumer) = &mut self.consumer else {
                // Requests wait meanwhile.
                let Some(restored) = self.restored.recv().await else {
                    return InboxEvent::Closed(closed());
                };
                if self.restore(restored) {
                    self.announced = true;
                    return lost();
                }
                self.member.ready(self.session.number);
                continue;
            };
            let mut next = tokio::select! {
                biased;
                delivery = consumer.next() => Some(delivery),
                restored = self.restored.recv() => match restored {
                    Some(restored) => {
                        self.restore(restored);
                        self.announced = true;
                        return lost();
                    }
                    None => return InboxEvent::Closed(closed()),
                },
            };
            let mut replies = Vec::new();
            while let Some(delivery) = next {
                let Some(Ok(delivery)) = delivery else {
                    // Ended by a lost connection, a channel error, or somebody who removed the queue.
                    self.consumer = None;
                    self.ended_here = true;
                    break;
                };
                replies.extend(decode(delivery));
                next = match &mut self.consumer {
                    Some(consumer) if replies.len() < BATCH => consumer.next().now_or_never(),
                    _ => None,
                };
            }
            if !replies.is_empty() {
                return InboxEvent::Replies(replies);
            }
        }
    }
}

impl fmt::Debug for AmqpInbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AmqpInbox")
            .field("address", &self.address)
            .field("session", &self.session.number)
            .finish_non_exhaustive()
    }
}

/// What arrived, if it is for us.
fn decode(delivery: Delivery) -> Option<Incoming> {
    if delivery.exchange.as_str() == TO_ALL
        && let Some(service) = naming::service_of_all(delivery.routing_key.as_str())
    {
        let request = message::decode_broadcast(service, &delivery.properties, delivery.data);
        return Some(request);
    }
    message::decode_reply(&delivery.properties, delivery.data)
}

/// Restores the inbox on the next connection, and removes its queue in the end.
struct Keeper {
    link: Link,
    name: String,
    channel: Channel,
    session: u64,
    joined: Joined,
    ended: mpsc::UnboundedReceiver<u64>,
    restored: mpsc::UnboundedSender<Restored>,
    closing: CancellationToken,
}

impl Keeper {
    async fn run(mut self) {
        let closing = self.closing.clone();
        loop {
            tokio::select! {
                () = closing.cancelled() => return,
                ended = self.ended.recv() => match ended {
                    // Told late: another one is there already.
                    Some(session) if session < self.session => continue,
                    Some(_) => {}
                    None => return self.delete().await,
                },
                () = session_over(&mut self.link, self.session) => {}
            }
            let owner = self.restored.clone();
            let restored = tokio::select! {
                () = closing.cancelled() => return,
                () = owner.closed() => return self.delete().await,
                restored = self.restore() => restored,
            };
            let Some(restored) = restored else {
                return;
            };
            if self.restored.send(restored).is_err() {
                return self.delete().await;
            }
        }
    }

    async fn restore(&mut self) -> Option<Restored> {
        let mut attempt = 0;
        loop {
            let session = self.link.next_session().await?;
            match declare(&session, &mut self.name, &self.joined).await {
                Ok((channel, consumer)) => {
                    self.channel = channel;
                    self.session = session.number;
                    return Some(Restored {
                        address: ReplyAddress::new(&self.name).ok()?,
                        consumer,
                        session,
                    });
                }
                Err(failure) => {
                    tracing::debug!(%failure, "the inbox is not yet back");
                    if matches!(failure, Failure::TimedOut(_)) {
                        session.suspect();
                    }
                }
            }
            sleep(backoff(attempt)).await;
            attempt = attempt.saturating_add(1);
        }
    }

    async fn delete(self) {
        let name = ShortString::from(self.name);
        let delete = self
            .channel
            .queue_delete(name, QueueDeleteOptions::default());
        let _ = timeout(DELETE_TIMEOUT, delete).await;
    }
}

/// Waits until the connection is another one than the given.
async fn session_over(link: &mut Link, session: u64) {
    let changed = link.state.wait_for(|state| match state {
        LinkState::Up(current) => current.number != session,
        LinkState::Down(_) | LinkState::Closed => true,
    });
    let _ = changed.await;
}

/// Declares the inbox, joins it again, and consumes from it. Takes another name if the broker does not let go of this one.
async fn declare(
    session: &Session,
    name: &mut String,
    joined: &Joined,
) -> Result<(Channel, Consumer), Failure> {
    let patience = Instant::now() + RELEASE_TIMEOUT;
    loop {
        let channel = session.channel().await?;
        let queue = ShortString::from(name.as_str());
        let mut arguments = FieldTable::default();
        // Whatever the virtual host's default may be: only a classic queue can be exclusive.
        arguments.insert(
            "x-queue-type".into(),
            AMQPValue::LongString("classic".into()),
        );
        let declare =
            channel.queue_declare(queue.clone(), QueueDeclareOptions::exclusive(), arguments);
        match bounded("queue.declare", declare).await {
            Ok(_) => {}
            Err(failure) if failure.is(RESOURCE_LOCKED) => {
                if Instant::now() >= patience {
                    *name = naming::random_inbox();
                } else {
                    sleep(RELEASE_RETRY).await;
                }
                continue;
            }
            Err(failure) => return Err(failure),
        }
        joined.bind_all(&channel, &queue).await?;
        let options = BasicConsumeOptions {
            no_ack: true,
            ..BasicConsumeOptions::default()
        };
        let consume = channel.basic_consume(
            queue,
            naming::CONSUMER.into(),
            options,
            FieldTable::default(),
        );
        let consumer = bounded("basic.consume", consume).await?;
        return Ok((channel, consumer));
    }
}

//! What is declared on the broker, and who owns it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use antiphon_core::{Error, ErrorKind, ServiceName};
use lapin::Queue;
use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use tokio::time::{Instant, sleep};

use crate::config::AmqpConfig;
use crate::error::{Failure, NOT_FOUND, PRECONDITION_FAILED, RESOURCE_LOCKED};
use crate::link::{Session, bounded};
use crate::naming::QueueNames;

/// How long what went with a connection may still be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lingering {
    /// Consumers that are counted.
    consumers: Duration,
    /// The owner's queue.
    owner: Duration,
}

impl Lingering {
    /// Of others, who went or did not.
    pub(crate) const OTHERS: Self = Self {
        consumers: Duration::from_millis(300),
        owner: Duration::from_millis(250),
    };

    /// Of others, who were there a moment ago.
    pub(crate) const AGAIN: Self = Self {
        owner: Duration::ZERO,
        ..Self::OTHERS
    };

    /// Our own, whose connection was lost just now: it is ours to wait for.
    pub(crate) const OURS: Self = Self {
        consumers: Duration::from_secs(3),
        owner: Duration::from_secs(3),
    };
}

const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Sees to it that a queue is there. One that is there is used as it is.
pub(crate) async fn ensure(
    session: &Session,
    config: &AmqpConfig,
    names: &QueueNames,
    queue: &ShortString,
) -> Result<(), Failure> {
    match look(session, queue).await {
        Ok(_) => return Ok(()),
        Err(failure) if failure.is(NOT_FOUND) => {}
        Err(failure) => return Err(failure),
    }
    let mut arguments = FieldTable::default();
    let queue_type = AMQPValue::LongString(config.queue_type.as_str().into());
    arguments.insert("x-queue-type".into(), queue_type);
    // Dead letters wait for somebody to read them.
    if names.is_node && *queue != names.dead {
        let millis = config.node_queue_expires.as_millis().max(1);
        let millis = i64::try_from(millis).unwrap_or(i64::MAX);
        arguments.insert("x-expires".into(), AMQPValue::LongLongInt(millis));
    }
    let options = QueueDeclareOptions {
        durable: config.durable || *queue == names.dead,
        ..QueueDeclareOptions::default()
    };
    let declared = session.declare(queue, options, arguments).await;
    let refusal = match declared {
        Err(failure) if failure.is(PRECONDITION_FAILED) => failure,
        other => return other.map(drop),
    };
    match look(session, queue).await {
        // Somebody else declared it in between, in another way.
        Ok(_) => Ok(()),
        // The same is refused whenever it is tried again, such as a queue type that the broker does not know.
        Err(failure) if failure.is(NOT_FOUND) => {
            let message = format!("declaring {queue}: {refusal}");
            Err(Failure::Final(Error::not_executed(
                ErrorKind::Broker,
                message,
            )))
        }
        Err(failure) => Err(failure),
    }
}

/// What the broker says of a queue.
pub(crate) async fn look(session: &Session, queue: &ShortString) -> Result<Queue, Failure> {
    let options = QueueDeclareOptions::durable().passive();
    session.declare(queue, options, FieldTable::default()).await
}

/// Becomes the owner of a service.
///
/// `marker` is a queue that the subscription holds beside the owner's: while the broker still has it, a former connection of this very
/// subscription is not buried yet, and the service may still be its own.
pub(crate) async fn own(
    session: &Session,
    config: &AmqpConfig,
    names: &QueueNames,
    marker: &ShortString,
    lingering: Lingering,
) -> Result<(), Failure> {
    let started = Instant::now();
    // When the ghost was last seen: what is its own goes soon after its marker, but not with it.
    let mut since = started;
    while let Err(failure) = declare_exclusive(session, &names.owner).await {
        if !failure.is(RESOURCE_LOCKED) {
            return Err(failure);
        }
        // It only looked dead: the broker buries it when its heartbeats run out.
        if matches!(look(session, marker).await, Err(failure) if failure.is(RESOURCE_LOCKED)) {
            since = Instant::now();
        }
        if since.elapsed() >= lingering.owner || started.elapsed() >= config.heartbeat * 3 {
            return Err(already_owned(names, "another exclusive subscriber owns it"));
        }
        sleep(LOOK_AGAIN).await;
    }
    declare_exclusive(session, marker).await?;
    let end = Instant::now() + lingering.consumers;
    loop {
        let others = look(session, &names.main).await?;
        if others.consumer_count() == 0 {
            return Ok(());
        }
        if Instant::now() >= end {
            disown(session, names, marker).await;
            return Err(already_owned(names, "shared subscribers serve it"));
        }
        sleep(LOOK_AGAIN).await;
    }
}

/// Waits until a queue has another number of consumers than now, or none, but not for long.
pub(crate) async fn consumers_change(session: &Session, queue: &ShortString, limit: Duration) {
    let end = Instant::now() + limit;
    let mut first = None;
    while let Ok(found) = look(session, queue).await {
        let now = found.consumer_count();
        if now == 0 || *first.get_or_insert(now) != now || Instant::now() >= end {
            return;
        }
        sleep(LOOK_AGAIN).await;
    }
}

/// Gives a service up.
pub(crate) async fn disown(session: &Session, names: &QueueNames, marker: &ShortString) {
    let Ok(channel) = session.channel().await else {
        // It went with the connection.
        return;
    };
    for queue in [&names.owner, marker] {
        let delete = channel.queue_delete(queue.clone(), QueueDeleteOptions::default());
        if let Err(failure) = bounded("queue.delete", delete).await {
            tracing::debug!(%failure, %queue, "not removed");
        }
    }
}

/// Declares a queue that lives as long as this connection.
async fn declare_exclusive(session: &Session, queue: &ShortString) -> Result<(), Failure> {
    let mut arguments = FieldTable::default();
    // Whatever the virtual host's default may be: only a classic queue can be exclusive.
    arguments.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("classic".into()),
    );
    let options = QueueDeclareOptions::exclusive();
    session.declare(queue, options, arguments).await.map(drop)
}

/// # Errors
/// `AlreadyOwned` if an exclusive subscriber owns the service.
pub(crate) async fn refuse_owned(session: &Session, names: &QueueNames) -> Result<(), Failure> {
    match look(session, &names.owner).await {
        Err(failure) if failure.is(NOT_FOUND) => Ok(()),
        Err(failure) if failure.is(RESOURCE_LOCKED) => {
            Err(already_owned(names, "an exclusive subscriber owns it"))
        }
        // Ours, by another subscription of this transport that is just going away.
        Ok(_) => Err(already_owned(names, "an exclusive subscriber owns it")),
        Err(failure) => Err(failure),
    }
}

fn already_owned(names: &QueueNames, why: &str) -> Failure {
    let message = format!("{}: {why}", names.main);
    Failure::Final(Error::not_executed(ErrorKind::AlreadyOwned, message))
}

/// The subscriptions of one transport. The broker cannot tell them apart, since they share a connection.
#[derive(Debug, Default)]
pub(crate) struct Claims(Mutex<HashMap<ServiceName, Claimed>>);

/// How many subscriptions serve a service, and whether it is but an exclusive one.
#[derive(Debug)]
struct Claimed {
    exclusive: bool,
    count: usize,
}

/// One subscription's place among them.
#[derive(Debug)]
pub(crate) struct Claim {
    claims: Arc<Claims>,
    service: ServiceName,
}

impl Claims {
    /// # Errors
    /// `AlreadyOwned` if this subscription and those there are cannot be together.
    pub(crate) fn claim(
        self: &Arc<Self>,
        service: &ServiceName,
        exclusive: bool,
    ) -> Result<Claim, Error> {
        let mut claims = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match claims.entry(service.clone()) {
            Entry::Vacant(place) => {
                place.insert(Claimed {
                    exclusive,
                    count: 1,
                });
            }
            Entry::Occupied(mut place) => {
                let claimed = place.get_mut();
                if claimed.exclusive || exclusive {
                    let message = format!("{service}: this transport serves it already");
                    return Err(Error::not_executed(ErrorKind::AlreadyOwned, message));
                }
                claimed.count += 1;
            }
        }
        Ok(Claim {
            claims: Arc::clone(self),
            service: service.clone(),
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claims = self.claims.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Occupied(mut place) = claims.entry(self.service.clone()) {
            place.get_mut().count -= 1;
            if place.get().count == 0 {
                place.remove();
            }
        }
    }
}

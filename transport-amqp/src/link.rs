//! One connection to the broker, made again whenever it is lost.
//!
//! Nothing of the broker's client recovers by itself: whoever uses a connection watches it, and sets up its own channels
//! on the next one.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use lapin::options::{ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Connection, Event, Queue};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::AmqpConfig;
use crate::dial::{Grip, dial};
use crate::error::Failure;

/// No single operation on a live connection takes longer; one that does counts as a lost connection.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(5);

/// A try to connect again that takes longer is given up for the next one.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Tries to connect again lie at most so far apart.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
const BACKOFF_MIN: Duration = Duration::from_millis(40);

/// How long a connection is closed politely.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// How often the state of the connection is looked at, should no event have told of its loss.
const STATUS_CHECK: Duration = Duration::from_millis(200);

/// A connection that is there most of the time.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    /// The present state.
    pub(crate) state: watch::Receiver<LinkState>,
    /// Why the broker takes nothing from us for now.
    pub(crate) blocked: watch::Receiver<Option<Arc<str>>>,
}

#[derive(Clone, Debug)]
pub(crate) enum LinkState {
    Up(Arc<Session>),
    Down(Arc<str>),
    Closed,
}

/// One life of a connection.
#[derive(Debug)]
pub(crate) struct Session {
    /// 1 for the first one, and so on.
    pub(crate) number: u64,
    connection: Held,
    grip: Grip,
    blocked: watch::Receiver<Option<Arc<str>>>,
}

/// A channel on its way; `None` if it did not come, and another may be tried.
pub(crate) type Opening = BoxFuture<'static, Option<Channel>>;

struct Held(Connection);

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self.0.status(), f)
    }
}

impl Link {
    /// Connects, once, and stays connected until `closed` is cancelled.
    pub(crate) async fn connect(
        config: &AmqpConfig,
        name: &'static str,
        closed: CancellationToken,
    ) -> Result<(Self, impl Future<Output = ()> + Send + use<>), Failure> {
        let dialled = dial(config, name, config.connect_timeout).await?;
        let (blocked, blocked_receiver) = watch::channel(None);
        let session = Session::new(1, dialled, blocked_receiver.clone());
        let (state, receiver) = watch::channel(LinkState::Up(Arc::clone(&session)));
        let supervisor = Supervisor {
            config: config.clone(),
            name,
            state,
            blocked,
            closed,
        };
        let link = Self {
            state: receiver,
            blocked: blocked_receiver,
        };
        Ok((link, supervisor.run(session)))
    }

    /// The present connection, if there is one.
    pub(crate) fn session(&self) -> Option<Arc<Session>> {
        self.state.borrow().session()
    }

    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked.borrow().is_some()
    }

    /// Waits for a connection; `None` once the link is closed.
    pub(crate) async fn next_session(&mut self) -> Option<Arc<Session>> {
        let state = self
            .state
            .wait_for(|state| !matches!(state, LinkState::Down(_)))
            .await;
        match state.as_deref() {
            Ok(LinkState::Up(session)) => Some(Arc::clone(session)),
            _ => None,
        }
    }
}

impl LinkState {
    pub(crate) fn session(&self) -> Option<Arc<Session>> {
        match self {
            Self::Up(session) => Some(Arc::clone(session)),
            Self::Down(_) | Self::Closed => None,
        }
    }
}

impl Session {
    fn new(
        number: u64,
        (connection, grip): (Connection, Grip),
        blocked: watch::Receiver<Option<Arc<str>>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            number,
            connection: Held(connection),
            grip,
            blocked,
        })
    }

    /// Opens a channel.
    pub(crate) async fn channel(&self) -> Result<Channel, Failure> {
        let opened = bounded("channel.open", self.connection.0.create_channel()).await;
        self.suspect_late(opened)
    }

    /// Opens a channel on which the broker confirms what is published.
    async fn confirm_channel(&self) -> Result<Channel, Failure> {
        let channel = self.channel().await?;
        let select = channel.confirm_select(ConfirmSelectOptions::default());
        self.suspect_late(bounded("confirm.select", select).await)?;
        Ok(channel)
    }

    /// A channel to publish on.
    pub(crate) fn open_publishing(self: Arc<Self>) -> Opening {
        async move {
            match self.confirm_channel().await {
                Ok(channel) => Some(channel),
                Err(failure) => {
                    tracing::debug!(%failure, "no channel to publish on");
                    // A connection that is just going down says so at once, again and again.
                    sleep(backoff(0)).await;
                    None
                }
            }
        }
        .boxed()
    }

    /// Nothing but the broker stands behind the answer to such a question: none means that the connection is dead. While the broker
    /// blocks us it answers nothing, and the connection is well.
    fn suspect_late<T>(&self, answer: Result<T, Failure>) -> Result<T, Failure> {
        if matches!(answer, Err(Failure::TimedOut(_))) && self.blocked.borrow().is_none() {
            self.suspect();
        }
        answer
    }

    /// Declares a queue on a channel of its own, because a refusal costs the channel its life.
    pub(crate) async fn declare(
        &self,
        queue: &ShortString,
        options: QueueDeclareOptions,
        arguments: FieldTable,
    ) -> Result<Queue, Failure> {
        let channel = self.channel().await?;
        let declare = channel.queue_declare(queue.clone(), options, arguments);
        bounded("queue.declare", declare).await
    }

    /// Tells that an operation did not end: the connection is given up and made again. Whoever uses it learns that at once.
    pub(crate) fn suspect(&self) {
        self.grip.cut();
    }

    pub(crate) fn is_alive(&self) -> bool {
        !self.grip.is_cut() && self.connection.0.status().connected()
    }

    async fn close(&self) {
        let close = self.connection.0.close(200, "OK".into());
        let _ = timeout(CLOSE_TIMEOUT, close).await;
        self.grip.cut();
    }
}

/// Resolves when the channel is there, or will not be; never while none is on its way.
pub(crate) async fn opened(opening: &mut Option<Opening>) -> Option<Channel> {
    match opening {
        Some(opening) => opening.await,
        None => std::future::pending().await,
    }
}

/// Waits for the broker's answer, but not for ever: while it blocks us, it answers nothing.
pub(crate) async fn bounded<T>(
    doing: &'static str,
    operation: impl Future<Output = lapin::Result<T>>,
) -> Result<T, Failure> {
    match timeout(OPERATION_TIMEOUT, operation).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Failure::TimedOut(doing)),
    }
}

/// Time to wait before try number `attempt`: full jitter, so that many clients do not come back as one.
pub(crate) fn backoff(attempt: u32) -> Duration {
    let ceiling = BACKOFF_MIN
        .saturating_mul(1 << attempt.min(10))
        .min(BACKOFF_MAX);
    jitter(ceiling)
}

/// A random time of at most `ceiling`.
pub(crate) fn jitter(ceiling: Duration) -> Duration {
    let (random, _) = Uuid::new_v4().as_u64_pair();
    // Bits 12 to 15 of the upper half are the version; the 32 above them are random.
    ceiling.mul_f64(f64::from((random >> 32) as u32) / f64::from(u32::MAX))
}

struct Supervisor {
    config: AmqpConfig,
    name: &'static str,
    state: watch::Sender<LinkState>,
    blocked: watch::Sender<Option<Arc<str>>>,
    closed: CancellationToken,
}

impl Supervisor {
    async fn run(self, mut session: Arc<Session>) {
        loop {
            let reason: Arc<str> = tokio::select! {
                () = self.closed.cancelled() => {
                    self.state.send_replace(LinkState::Closed);
                    return session.close().await;
                }
                reason = self.watch(&session) => reason.into(),
            };
            tracing::warn!(connection = self.name, %reason, "the connection was lost");
            self.state.send_replace(LinkState::Down(reason));
            self.blocked.send_replace(None);
            session.grip.cut();
            let number = session.number + 1;
            drop(session);
            tokio::select! {
                () = self.closed.cancelled() => {
                    self.state.send_replace(LinkState::Closed);
                    return;
                }
                dialled = self.reconnect() => {
                    session = Session::new(number, dialled, self.blocked.subscribe());
                }
            }
            tracing::info!(connection = self.name, number, "connected again");
            self.state.send_replace(LinkState::Up(Arc::clone(&session)));
        }
    }

    /// Watches a connection until it is lost, and says why.
    async fn watch(&self, session: &Session) -> String {
        let connection = &session.connection.0;
        let mut events = std::pin::pin!(connection.events_listener());
        let mut reason = String::from("the connection was closed");
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = session.grip.cut_off() => return "the broker does not answer".to_owned(),
                () = sleep(STATUS_CHECK) => None,
            };
            match event {
                Some(Event::ConnectionBlocked(why)) => {
                    tracing::warn!(connection = self.name, why, "the broker blocks");
                    self.blocked.send_replace(Some(why.into()));
                }
                Some(Event::ConnectionUnblocked) => {
                    self.blocked.send_replace(None);
                }
                // Errors of single channels come here too; only the status tells whether all is lost.
                Some(Event::Error(error)) => reason = error.to_string(),
                _ => {}
            }
            if !session.is_alive() {
                return reason;
            }
        }
    }

    async fn reconnect(&self) -> (Connection, Grip) {
        let limit = RECONNECT_TIMEOUT.min(self.config.connect_timeout);
        let mut attempt = 0;
        loop {
            match dial(&self.config, self.name, limit).await {
                Ok(dialled) => return dialled,
                Err(failure) => {
                    tracing::debug!(connection = self.name, %failure, attempt, "not yet connected")
                }
            }
            sleep(backoff(attempt)).await;
            attempt = attempt.saturating_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_is_bounded_and_spread() {
        assert!((0..200).all(|attempt| backoff(attempt) <= BACKOFF_MAX));
        let long = (0..200).filter(|_| backoff(20) > BACKOFF_MAX / 2).count();
        assert!((40..160).contains(&long), "{long} of 200 in the upper half");
    }
}

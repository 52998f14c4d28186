//! One connection to the broker, made again whenever it is lost.
//!
//! Nothing of the broker's client recovers by itself: whoever uses a connection watches it, and sets up its own channels
//! on the next one.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Connection, ConnectionProperties, Event, Queue};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::AmqpConfig;
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
    suspect: Notify,
}

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
        let connection = dial(config, name, config.connect_timeout).await?;
        let session = Session::new(1, connection);
        let (state, receiver) = watch::channel(LinkState::Up(Arc::clone(&session)));
        let (blocked, blocked_receiver) = watch::channel(None);
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
        match &*self.state.borrow() {
            LinkState::Up(session) => Some(Arc::clone(session)),
            LinkState::Down(_) | LinkState::Closed => None,
        }
    }

    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked.borrow().is_some()
    }

    /// A channel to publish on did not come. While the broker blocks us it answers nothing, and the connection is well.
    pub(crate) fn suspect(&self, session: &Session) {
        if session.is_alive() && !self.is_blocked() {
            session.suspect();
        }
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

impl Session {
    fn new(number: u64, connection: Connection) -> Arc<Self> {
        Arc::new(Self {
            number,
            connection: Held(connection),
            suspect: Notify::new(),
        })
    }

    /// Opens a channel.
    pub(crate) async fn channel(&self) -> Result<Channel, Failure> {
        bounded("channel.open", self.connection.0.create_channel()).await
    }

    /// Opens a channel on which the broker confirms what is published.
    pub(crate) async fn confirm_channel(&self) -> Result<Channel, Failure> {
        let channel = self.channel().await?;
        let select = channel.confirm_select(ConfirmSelectOptions::default());
        bounded("confirm.select", select).await?;
        Ok(channel)
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

    /// Tells that an operation did not end: the connection is given up and made again.
    pub(crate) fn suspect(&self) {
        self.suspect.notify_one();
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.connection.0.status().connected()
    }

    async fn close(&self) {
        let close = self.connection.0.close(200, "OK".into());
        let _ = timeout(CLOSE_TIMEOUT, close).await;
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

async fn dial(config: &AmqpConfig, name: &str, limit: Duration) -> Result<Connection, Failure> {
    let properties =
        ConnectionProperties::default().with_connection_name(format!("antiphon {name}").into());
    match timeout(limit, Connection::connect_uri(config.uri(), properties)).await {
        Ok(connection) => Ok(connection?),
        Err(_) => Err(Failure::TimedOut("connecting")),
    }
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
            let number = session.number + 1;
            drop(session);
            tokio::select! {
                () = self.closed.cancelled() => {
                    self.state.send_replace(LinkState::Closed);
                    return;
                }
                connection = self.reconnect() => session = Session::new(number, connection),
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
                () = session.suspect.notified() => return "the broker does not answer".to_owned(),
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

    async fn reconnect(&self) -> Connection {
        let limit = RECONNECT_TIMEOUT.min(self.config.connect_timeout);
        let mut attempt = 0;
        loop {
            match dial(&self.config, self.name, limit).await {
                Ok(connection) => return connection,
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

//! One connection to the broker, made again whenever it is lost.
//!
//! Nothing of the broker's client recovers by itself: whoever uses a connection watches it, and sets up its own channels
//! on the next one.

use std::sync::Arc;
use std::time::Duration;

use antiphon_core::Error;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use lapin::options::QueueDeclareOptions;
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Connection, Event, Queue};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::AmqpConfig;
use crate::dial::{Dialler, Grip, dial};
use crate::error::Failure;
use crate::press::{Press, PressChannel};
use crate::pulse::Pulse;

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
#[derive(Debug)]
pub(crate) struct Link<S = Session> {
    /// The present state.
    pub(crate) state: watch::Receiver<LinkState<S>>,
    /// Why the broker takes nothing from us for now.
    pub(crate) blocked: watch::Receiver<Option<Arc<str>>>,
}

#[derive(Debug)]
pub(crate) enum LinkState<S = Session> {
    Up(Arc<S>),
    Down(Arc<str>),
    Closed,
}

/// Where it is told whether the broker takes anything from us, and if not, why.
pub(crate) type Blocked = watch::Sender<Option<Arc<str>>>;

/// One life of a connection, from its handshake to its loss.
pub(crate) trait Life: Send + Sync + Sized + 'static {
    /// Connects. **Cancel safety**: dropping the future ends whatever was begun.
    fn begin(
        dialler: &Dialler,
        name: &'static str,
        number: u64,
        blocked: Blocked,
    ) -> impl Future<Output = Result<Self, Failure>> + Send;

    /// 1 for the first one, and so on.
    fn number(&self) -> u64;

    /// Resolves when it is lost, and says why.
    fn over(&self) -> impl Future<Output = String> + Send;

    /// Ends it at once, whatever the peer does: all who use it are told.
    fn cut(&self);

    /// Ends it politely, if the peer answers soon.
    fn close(&self) -> impl Future<Output = ()> + Send;
}

/// One life of a connection of the client library's.
#[derive(Debug)]
pub(crate) struct Session {
    /// 1 for the first one, and so on.
    pub(crate) number: u64,
    pub(crate) pulse: Pulse,
    name: &'static str,
    connection: Held,
    grip: Grip,
    blocked: Blocked,
}

/// A channel to publish on, on its way; `None` if it did not come, and another may be tried.
pub(crate) type Opening = BoxFuture<'static, Option<PressChannel>>;

struct Held(Connection);

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self.0.status(), f)
    }
}

impl<S: Life> Link<S> {
    /// Connects, once, and stays connected until `closed` is cancelled: by the files as they are each time, as certificates are renewed.
    pub(crate) async fn connect(
        config: &AmqpConfig,
        dialler: &Dialler,
        name: &'static str,
        closed: CancellationToken,
    ) -> Result<(Self, impl Future<Output = ()> + Send + use<S>), Failure> {
        let (blocked, blocked_receiver) = watch::channel(None);
        let session = Arc::new(S::begin(dialler, name, 1, blocked.clone()).await?);
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
    pub(crate) fn session(&self) -> Option<Arc<S>> {
        self.state.borrow().session()
    }

    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked.borrow().is_some()
    }

    /// Waits for a connection; `None` once the link is closed.
    pub(crate) async fn next_session(&mut self) -> Option<Arc<S>> {
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

impl<S> Clone for Link<S> {
    fn clone(&self) -> Self {
        Self {
            state: self.state.clone(),
            blocked: self.blocked.clone(),
        }
    }
}

impl<S> LinkState<S> {
    pub(crate) fn session(&self) -> Option<Arc<S>> {
        match self {
            Self::Up(session) => Some(Arc::clone(session)),
            Self::Down(_) | Self::Closed => None,
        }
    }
}

impl<S> Clone for LinkState<S> {
    fn clone(&self) -> Self {
        match self {
            Self::Up(session) => Self::Up(Arc::clone(session)),
            Self::Down(reason) => Self::Down(Arc::clone(reason)),
            Self::Closed => Self::Closed,
        }
    }
}

impl Life for Session {
    async fn begin(
        dialler: &Dialler,
        name: &'static str,
        number: u64,
        blocked: Blocked,
    ) -> Result<Self, Failure> {
        let (connection, grip) = dial(dialler, name).await?;
        let agreed = match connection.configuration().heartbeat() {
            0 => dialler.uri().query.heartbeat.unwrap_or_default(),
            agreed => agreed,
        };
        Ok(Self {
            number,
            pulse: Pulse::new(Duration::from_secs(agreed.into())),
            name,
            connection: Held(connection),
            grip,
            blocked,
        })
    }

    fn number(&self) -> u64 {
        self.number
    }

    async fn over(&self) -> String {
        let connection = &self.connection.0;
        let mut events = std::pin::pin!(connection.events_listener());
        let mut reason = String::from("the connection was closed");
        loop {
            self.pulse.beat();
            let event = tokio::select! {
                event = events.next() => event,
                () = self.grip.cut_off() => return "the broker does not answer".to_owned(),
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
            if !self.is_alive() {
                return reason;
            }
        }
    }

    fn cut(&self) {
        self.grip.cut();
    }

    async fn close(&self) {
        let close = self.connection.0.close(200, "OK".into());
        let _ = timeout(CLOSE_TIMEOUT, close).await;
        self.grip.cut();
    }
}

impl Session {
    /// Opens a channel.
    pub(crate) async fn channel(&self) -> Result<Channel, Failure> {
        let opened = bounded("channel.open", self.connection.0.create_channel()).await;
        // Nothing but the broker stands behind the answer: none means that the connection is dead. While the broker blocks us it
        // answers nothing, and the connection is well.
        if matches!(opened, Err(Failure::TimedOut(_))) && self.blocked.borrow().is_none() {
            self.suspect();
        }
        opened
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
}

/// A channel to publish on.
pub(crate) fn open_publishing(press: Arc<Press>) -> Opening {
    async move {
        match press.channel().await {
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

/// Resolves when the channel is there, or will not be; never while none is on its way.
pub(crate) async fn opened(opening: &mut Option<Opening>) -> Option<PressChannel> {
    match opening {
        Some(opening) => opening.await,
        None => std::future::pending().await,
    }
}

/// Waits for the broker's answer, but not for ever: while it blocks us, it answers nothing.
pub(crate) async fn bounded<T, E>(
    doing: &'static str,
    operation: impl Future<Output = Result<T, E>>,
) -> Result<T, Failure>
where
    Failure: From<E>,
{
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

struct Supervisor<S> {
    config: AmqpConfig,
    name: &'static str,
    state: watch::Sender<LinkState<S>>,
    blocked: Blocked,
    closed: CancellationToken,
}

impl<S: Life> Supervisor<S> {
    async fn run(self, mut session: Arc<S>) {
        loop {
            let reason: Arc<str> = tokio::select! {
                () = self.closed.cancelled() => {
                    self.state.send_replace(LinkState::Closed);
                    return session.close().await;
                }
                reason = session.over() => reason.into(),
            };
            tracing::warn!(connection = self.name, %reason, "the connection was lost");
            self.state.send_replace(LinkState::Down(reason));
            self.blocked.send_replace(None);
            session.cut();
            let number = session.number() + 1;
            drop(session);
            tokio::select! {
                () = self.closed.cancelled() => {
                    self.state.send_replace(LinkState::Closed);
                    return;
                }
                begun = self.reconnect(number) => session = Arc::new(begun),
            }
            tracing::info!(connection = self.name, number, "connected again");
            self.state.send_replace(LinkState::Up(Arc::clone(&session)));
        }
    }

    async fn reconnect(&self, number: u64) -> S {
        let limit = RECONNECT_TIMEOUT.min(self.config.connect_timeout);
        let mut attempt = 0;
        // Outlives its try: a file that does not end is read once, not once more each time.
        let mut reading = None;
        loop {
            let begun = timeout(limit, self.begin(&mut reading, number)).await;
            let failure = match begun {
                Ok(Ok(begun)) => return begun,
                Ok(Err(failure)) => failure,
                Err(_) if reading.is_some() => Failure::TimedOut("reading the files for TLS"),
                Err(_) => Failure::TimedOut("connecting"),
            };
            self.still_down(&failure, attempt);
            sleep(backoff(attempt)).await;
            attempt = attempt.saturating_add(1);
        }
    }

    async fn begin<'a>(
        &'a self,
        reading: &mut Option<BoxFuture<'a, Result<Dialler, Error>>>,
        number: u64,
    ) -> Result<S, Failure> {
        let read = reading.get_or_insert_with(|| Dialler::new(&self.config).boxed());
        let dialler = read.await;
        *reading = None;
        let dialler = dialler.map_err(Failure::Final)?;
        S::begin(&dialler, self.name, number, self.blocked.clone()).await
    }

    /// Tells why, whenever that is another reason than before.
    fn still_down(&self, failure: &Failure, attempt: u32) {
        let reason: Arc<str> = failure.to_string().into();
        let is_news = self.state.send_if_modified(|state| match state {
            LinkState::Down(known) if *known == reason => false,
            _ => {
                *state = LinkState::Down(Arc::clone(&reason));
                true
            }
        });
        match is_news {
            true => tracing::warn!(connection = self.name, %reason, "not connected"),
            false => tracing::debug!(connection = self.name, %reason, attempt, "not connected"),
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

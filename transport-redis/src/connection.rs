//! Connections to Redis, and the shared one that is made again when it breaks.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use antiphon_core::{ConnectionState, Error, ErrorKind};
use redis::{RedisError, RedisResult, ServerErrorKind};
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::clock::Clock;
use crate::command::Pipeline;
use crate::config::RedisConfig;
use crate::dial::Dialler;
use crate::socket::Socket;
use crate::value::Value;
use crate::{dial, error, scripts};

/// The most time for one attempt to connect, greeting and all.
const ATTEMPT: Duration = Duration::from_secs(2);

/// The most time for an answer to anything that does not block, from when a byte was last moved; then the socket is given up.
pub(crate) const ANSWER: Duration = Duration::from_secs(5);

/// The most time for the first connection, whatever is configured: what is longer than this is for ever.
const CONNECT_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// The longest pause between two attempts to connect.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Makes connections.
#[derive(Debug)]
pub(crate) struct Connector {
    dialler: Dialler,
    /// For the connection of a thread outside of the runtime.
    client: redis::Client,
}

impl Connector {
    pub(crate) async fn new(config: &RedisConfig) -> Result<Self, Error> {
        let dialler = Dialler::new(config).await?;
        let client = redis::Client::open(dialler.info().clone()).map_err(|_| {
            Error::not_executed(
                ErrorKind::Invalid,
                "the redis crate does not take the address",
            )
        })?;
        Ok(Self { dialler, client })
    }

    /// A connection, its time of answering bounded, and a token that is cancelled when it breaks.
    pub(crate) async fn open(&self, answer: Duration) -> RedisResult<Live> {
        let stream = timeout(ATTEMPT, self.dialler.dial())
            .await
            .map_err(|_| timed_out())??;
        let broken = CancellationToken::new();
        Ok(Live {
            socket: Arc::new(Socket::new(stream, broken.clone())),
            answer,
            broken,
        })
    }

    /// A connection for a thread outside of the runtime.
    pub(crate) fn open_for_thread(&self, answer: Duration) -> RedisResult<redis::Connection> {
        let connection = self
            .client
            .get_connection_with_timeout(ATTEMPT.min(answer))
            .map_err(dial::without_arguments)?;
        connection.set_read_timeout(Some(answer))?;
        connection.set_write_timeout(Some(answer))?;
        Ok(connection)
    }

    /// Connects, trying until it succeeds; `None` once `ending`.
    pub(crate) async fn open_patiently(
        &self,
        answer: Duration,
        ending: &CancellationToken,
    ) -> Option<Live> {
        let mut backoff = Backoff::default();
        loop {
            let opened = ending.run_until_cancelled(self.open(answer)).await?;
            match opened {
                Ok(live) => return Some(live),
                Err(error) => tracing::debug!(%error, "cannot connect to Redis"),
            }
            ending.run_until_cancelled(backoff.pause()).await?;
        }
    }
}

/// A connection that may break.
#[derive(Clone)]
pub(crate) struct Live {
    socket: Arc<Socket>,
    /// The most time for an answer in which no byte moves.
    answer: Duration,
    pub(crate) broken: CancellationToken,
}

impl Live {
    /// Runs commands in one trip, and gives each one's answer, errors of the server among them. Scripts that are missing are
    /// loaded, and run after the rest. A connection on which it fails is given up, and one to a server that takes no
    /// writes for now.
    pub(crate) async fn execute(&self, pipeline: &Pipeline) -> RedisResult<Vec<Value>> {
        let answers = self.execute_and_load(pipeline).await;
        self.judge(answers)
    }

    /// The same, with missing scripts left missing: for commands whose order matters.
    pub(crate) async fn execute_as_is(&self, pipeline: &Pipeline) -> RedisResult<Vec<Value>> {
        let answers = self.trip(pipeline).await;
        self.judge(answers)
    }

    async fn trip(&self, pipeline: &Pipeline) -> RedisResult<Vec<Value>> {
        let mut trip = pin!(self.socket.execute(pipeline));
        let mut patience = Instant::now() + self.answer;
        loop {
            match timeout_at(patience, &mut trip).await {
                Ok(answers) => return Ok(answers?),
                // Large bodies on a slow link: while bytes move, the answer is on its way.
                Err(_) if self.socket.moved() + self.answer > patience => {
                    patience = self.socket.moved() + self.answer;
                }
                Err(_) => return Err(timed_out()),
            }
        }
    }

    async fn execute_and_load(&self, pipeline: &Pipeline) -> RedisResult<Vec<Value>> {
        let mut answers = self.trip(pipeline).await?;
        if answers.iter().any(is_missing_script) {
            // The server was restarted, or its scripts were flushed. A missing script did nothing, so it is called again;
            // all else in the pipeline was done.
            scripts::load(self).await?;
            let mut again = Pipeline::new();
            for (command, answer) in pipeline.commands().zip(&answers) {
                if is_missing_script(answer) {
                    again.add_command(command.clone());
                }
            }
            let mut repeated = self.trip(&again).await?.into_iter();
            for answer in answers
                .iter_mut()
                .filter(|answer| is_missing_script(answer))
            {
                *answer = repeated.next().unwrap_or_default();
            }
        }
        Ok(answers)
    }

    fn judge(&self, answers: RedisResult<Vec<Value>>) -> RedisResult<Vec<Value>> {
        let given_up = match &answers {
            Ok(answers) => error::first_refusal(answers).is_some_and(error::is_elsewhere),
            Err(_) => true,
        };
        if given_up {
            self.broken.cancel();
        }
        answers
    }
}

pub(crate) fn is_missing_script(value: &Value) -> bool {
    matches!(value, Value::ServerError(error) if error.kind() == Some(ServerErrorKind::NoScript))
}

fn timed_out() -> RedisError {
    RedisError::from(std::io::Error::from(std::io::ErrorKind::TimedOut))
}

/// The shared connection: of the sends, the settlements and the housekeeping.
#[derive(Clone, Debug)]
pub(crate) struct Link(watch::Receiver<Option<Live>>);

impl Link {
    /// The connection, when there is one; `None` once `ending`.
    pub(crate) async fn ready(&mut self, ending: &CancellationToken) -> Option<Live> {
        let live = ending
            .run_until_cancelled(self.0.wait_for(Option::is_some))
            .await?
            .ok()?;
        live.clone()
    }

    /// The connection, if there is one now.
    pub(crate) fn now(&self) -> Option<Live> {
        self.0.borrow().clone()
    }

    /// Runs commands on the connection, if there is one now; for housekeeping, which the next one may do as well.
    pub(crate) async fn try_execute(&self, pipeline: &Pipeline) -> Option<Vec<Value>> {
        self.now()?.execute(pipeline).await.ok()
    }
}

/// The first connection, within the configured time: checked to be of use, with the scripts loaded.
pub(crate) async fn connect(
    connector: &Connector,
    config: &RedisConfig,
    clock: &Clock,
) -> Result<Live, Error> {
    let end = Instant::now() + config.connect_timeout.min(CONNECT_MAX);
    let late = || {
        let message = format!(
            "cannot connect to Redis within {:?}",
            config.connect_timeout
        );
        Error::not_executed(ErrorKind::Connect, message)
    };
    let mut backoff = Backoff::default();
    loop {
        let attempt = async {
            let live = connector.open(ANSWER).await?;
            prepare(&live, clock).await?;
            Ok::<_, RedisError>(live)
        };
        match timeout_at(end, attempt).await.map_err(|_| late())? {
            Ok(live) => return Ok(live),
            // A server that is loading its data, or an attempt that was too slow, may do better next time.
            Err(error)
                if !error::is_refused(&error)
                    && (error.code() == Some("LOADING") || error.is_timeout()) =>
            {
                timeout_at(end, backoff.pause()).await.map_err(|_| late())?;
            }
            Err(error) => return Err(error::connect(&error)),
        }
    }
}

/// Loads the scripts and reads the clock.
async fn prepare(live: &Live, clock: &Clock) -> RedisResult<()> {
    scripts::load(live).await?;
    let mut pipeline = Pipeline::new();
    pipeline.cmd("TIME");
    let asked = Instant::now();
    let answers = live.execute(&pipeline).await?;
    clock.reset();
    if let Some(micros) = answers.first().and_then(time_of) {
        clock.observe(asked, Instant::now(), micros);
    }
    Ok(())
}

/// Keeps the shared connection alive until `ending`, and tells its state.
pub(crate) async fn supervise(
    connector: Arc<Connector>,
    clock: Arc<Clock>,
    first: Live,
    link: watch::Sender<Option<Live>>,
    state: Arc<watch::Sender<ConnectionState>>,
    ending: CancellationToken,
) {
    let mut live = first;
    let mut backoff = Backoff::default();
    loop {
        let since = Instant::now();
        if ending
            .run_until_cancelled(live.broken.cancelled())
            .await
            .is_none()
        {
            return;
        }
        link.send_replace(None);
        // Who still waits for an answer on it keeps it; but a server that is full of connections gets this one back.
        drop(live);
        announce(
            &state,
            ConnectionState::Disconnected {
                reason: "the connection to Redis was lost".into(),
            },
        );
        tracing::info!("the connection to Redis was lost");
        if since.elapsed() > PAUSE_MAX {
            backoff = Backoff::default();
        } else if ending.run_until_cancelled(backoff.pause()).await.is_none() {
            // A server that takes connections and refuses all else, such as a replica, is not asked without a pause.
            return;
        }
        live = loop {
            let Some(opened) = connector.open_patiently(ANSWER, &ending).await else {
                return;
            };
            match prepare(&opened, &clock).await {
                Ok(()) => break opened,
                Err(error) => tracing::debug!(%error, "Redis is not ready"),
            }
            if ending.run_until_cancelled(backoff.pause()).await.is_none() {
                return;
            }
        };
        link.send_replace(Some(live.clone()));
        announce(&state, ConnectionState::Connected);
        tracing::info!("connected to Redis again");
    }
}

/// Sets the state, unless it is closed, which it stays.
fn announce(state: &watch::Sender<ConnectionState>, new: ConnectionState) {
    state.send_if_modified(|state| {
        let changes = *state != ConnectionState::Closed && *state != new;
        if changes {
            *state = new;
        }
        changes
    });
}

pub(crate) fn link(first: Live) -> (watch::Sender<Option<Live>>, Link) {
    let (sender, receiver) = watch::channel(Some(first));
    (sender, Link(receiver))
}

/// The microseconds since the epoch in an answer to TIME.
pub(crate) fn time_of(value: &Value) -> Option<u64> {
    let Value::Array(parts) = value else {
        return None;
    };
    let number = |value: &Value| match value {
        Value::BulkString(digits) => std::str::from_utf8(digits).ok()?.parse::<u64>().ok(),
        _ => None,
    };
    match parts.as_slice() {
        [seconds, micros] => number(seconds)?
            .checked_mul(1_000_000)?
            .checked_add(number(micros)?),
        _ => None,
    }
}

/// Pauses between attempts: a random part of a span that doubles from 50 ms to 1 s, so that many clients do not come back
/// at once.
#[derive(Debug, Default)]
pub(crate) struct Backoff(u32);

impl Backoff {
    pub(crate) async fn pause(&mut self) {
        tokio::time::sleep(self.next()).await;
    }

    pub(crate) fn next(&mut self) -> Duration {
        let span = PAUSE_MAX.min(Duration::from_millis(50) * (1 << self.0.min(8)));
        self.0 = self.0.saturating_add(1);
        random_part(span)
    }
}

/// A random duration below `span`.
pub(crate) fn random_part(span: Duration) -> Duration {
    let nanos = span.as_nanos().max(1);
    Duration::from_nanos(u64::try_from(Uuid::new_v4().as_u128() % nanos).unwrap_or(0))
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Live")
            .field("broken", &self.broken.is_cancelled())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::time::sleep;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_answer_may_take_long_while_its_bytes_move() {
        let (near, mut far) = duplex(1 << 16);
        let broken = CancellationToken::new();
        let live = Live {
            socket: Arc::new(Socket::new(Box::new(near), broken.clone())),
            answer: Duration::from_secs(1),
            broken,
        };
        let mut pipeline = Pipeline::new();
        pipeline.cmd("GET").arg("key");
        let server = async {
            for byte in b"$12\r\nslow, steady\r\n" {
                sleep(Duration::from_millis(900)).await;
                far.write_all(&[*byte]).await.unwrap();
            }
        };
        let (answers, ()) = tokio::join!(live.execute(&pipeline), server);
        assert_eq!(answers.unwrap(), [Value::BulkString("slow, steady".into())]);

        let begun = Instant::now();
        let silence = live.execute(&pipeline).await.unwrap_err();
        assert!(silence.is_timeout(), "{silence:?}");
        assert_eq!(begun.elapsed().as_secs(), 1);
        assert!(live.broken.is_cancelled());
        drop(live);
        far.read_to_end(&mut Vec::new()).await.unwrap();
    }
}

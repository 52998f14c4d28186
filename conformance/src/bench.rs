//! What cases are written with: fresh names, connections, bounded waits, and checks that say what they checked.

use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use antiphon_core::{
    Client, ClientConfig, ConnectionState, Error, ErrorKind, Executed, RunningServer, Server,
    ServiceName, Transport,
};
use bytes::Bytes;
use tokio::time::{Instant, sleep, timeout};

use crate::case::{Stop, Verdict};
use crate::harness::{Bounds, Connected, Harness, Link};

/// The bound of a step that a healthy transport does at once.
pub(crate) const PROMPT: Duration = Duration::from_secs(5);

/// How much later than its deadline a call may end.
pub(crate) const LATE: Duration = Duration::from_millis(250);

/// The bound within which a handler learns that its caller has given up: far below the heartbeats by which it learns that its
/// caller is gone.
pub(crate) const TOLD: Duration = Duration::from_secs(1);

/// For how long a case watches for what must not happen.
pub(crate) const QUIET: Duration = Duration::from_millis(300);

/// The place where one case runs.
#[derive(Debug)]
pub(crate) struct Bench {
    harness: Arc<dyn Harness>,
    /// Kept until the case ends, for the link may be what carries the connection, such as a proxy.
    links: Mutex<Vec<Arc<dyn Link>>>,
}

impl Bench {
    pub(crate) fn new(harness: Arc<dyn Harness>) -> Self {
        Self {
            harness,
            links: Mutex::default(),
        }
    }

    pub(crate) fn harness(&self) -> &dyn Harness {
        &*self.harness
    }

    pub(crate) fn bounds(&self) -> Bounds {
        self.harness.bounds()
    }

    /// A service that nobody else knows.
    pub(crate) fn service(&self, label: &str) -> Verdict<ServiceName> {
        let id = uuid::Uuid::new_v4().simple().to_string();
        named(&format!("conform.{label}.{}", &id[..12]))
    }

    /// A new connection.
    pub(crate) async fn connect(&self) -> Verdict<Connected> {
        let connected = ok_within("connect", 2 * PROMPT, self.harness.connect()).await?;
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        links.push(Arc::clone(&connected.link));
        Ok(connected)
    }

    /// A client on a connection of its own.
    pub(crate) async fn client(&self) -> Verdict<Client> {
        let connected = self.connect().await?;
        client_on(&connected.transport, ClientConfig::default()).await
    }

    /// A server, to be started, on a connection of its own.
    pub(crate) async fn server(&self) -> Verdict<Server> {
        Ok(Server::new(self.connect().await?.transport))
    }
}

/// A service name from text.
pub(crate) fn named(name: &str) -> Verdict<ServiceName> {
    ServiceName::new(name).map_err(|error| Stop::error("make a name", &error))
}

pub(crate) async fn client_on(
    transport: &Arc<dyn Transport>,
    config: ClientConfig,
) -> Verdict<Client> {
    ok("open a client", Client::open(Arc::clone(transport), config)).await
}

/// Starts a server; it lives as long as what is returned.
pub(crate) async fn start(server: Server) -> Verdict<RunningServer> {
    ok("start a server", server.start()).await
}

/// Ends when the future does, or fails the case.
pub(crate) async fn within<T>(
    step: &str,
    limit: Duration,
    future: impl Future<Output = T>,
) -> Verdict<T> {
    timeout(limit, future)
        .await
        .map_err(|_| Stop::failed(step, format!("it ends within {limit:?}")))
}

/// Ends with the future's value, or fails the case: it ends within [`PROMPT`], well.
pub(crate) async fn ok<T>(
    step: &str,
    future: impl IntoFuture<Output = Result<T, Error>>,
) -> Verdict<T> {
    ok_within(step, PROMPT, future).await
}

/// The same with another bound.
pub(crate) async fn ok_within<T>(
    step: &str,
    limit: Duration,
    future: impl IntoFuture<Output = Result<T, Error>>,
) -> Verdict<T> {
    within(step, limit, future.into_future())
        .await?
        .map_err(|error| Stop::error(step, &error))
}

/// Ends with the error that the future must end with, within [`PROMPT`].
pub(crate) async fn refused<T: fmt::Debug>(
    step: &str,
    future: impl IntoFuture<Output = Result<T, Error>>,
    kind: ErrorKind,
    executed: Executed,
) -> Verdict<Error> {
    let result = within(step, PROMPT, future.into_future()).await?;
    is_error(step, result, kind, executed)
}

/// Checks that a result is this error.
pub(crate) fn is_error<T: fmt::Debug>(
    step: &str,
    result: Result<T, Error>,
    kind: ErrorKind,
    executed: Executed,
) -> Verdict<Error> {
    match result {
        Err(error) if error.kind() == kind && error.executed() == executed => Ok(error),
        Err(error) => Err(Stop::failed(
            step,
            format!("it ends as {kind}, executed {executed}, not as: {error}"),
        )),
        Ok(value) => Err(Stop::failed(
            step,
            format!("it ends as {kind}, but it succeeded: {}", shortly(&value)),
        )),
    }
}

/// Checks a rule.
pub(crate) fn ensure(step: &str, holds: bool, rule: impl Into<String>) -> Verdict {
    if holds {
        Ok(())
    } else {
        Err(Stop::failed(step, rule))
    }
}

/// Checks that two things are equal.
pub(crate) fn same<T: PartialEq + fmt::Debug>(step: &str, found: T, expected: T) -> Verdict {
    let holds = found == expected;
    ensure(
        step,
        holds,
        format!("it is {}, not {}", shortly(&expected), shortly(&found)),
    )
}

/// Checks a body.
pub(crate) fn body_is(step: &str, found: &[u8], expected: impl AsRef<[u8]>) -> Verdict {
    let (found, expected) = (
        Bytes::copy_from_slice(found),
        Bytes::copy_from_slice(expected.as_ref()),
    );
    same(step, found, expected)
}

fn shortly(value: &impl fmt::Debug) -> String {
    let text = format!("{value:?}");
    match text.char_indices().nth(200) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// Waits until a condition holds.
pub(crate) async fn eventually(
    step: &str,
    limit: Duration,
    rule: impl Into<String>,
    holds: impl FnMut() -> bool,
) -> Verdict {
    let mut holds = holds;
    let end = Instant::now() + limit;
    while !holds() {
        if Instant::now() >= end {
            return Err(Stop::failed(
                step,
                format!("{} (within {limit:?})", rule.into()),
            ));
        }
        sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// Runs something that has a deadline and checks that it ends in time, as this machine keeps time: a plain timer that is
/// as long runs beside it, so that a busy machine is not blamed on the transport.
pub(crate) async fn by_deadline<T>(
    step: &str,
    deadline: Duration,
    future: impl IntoFuture<Output = T>,
) -> Verdict<T> {
    let started = Instant::now();
    let timer = async {
        sleep(deadline).await;
        started.elapsed()
    };
    let timed = async {
        let value = future.into_future().await;
        (value, started.elapsed())
    };
    let (timer, (value, took)) = within(step, deadline + 2 * PROMPT, async {
        tokio::join!(timer, timed)
    })
    .await?;
    let rule = format!("it ends by its deadline, {deadline:?}, and {LATE:?}, not after {took:?}");
    ensure(step, took <= timer + LATE, rule)?;
    Ok(value)
}

/// Waits for a state of the connection.
pub(crate) async fn until_state(
    step: &str,
    transport: &Arc<dyn Transport>,
    wanted: impl Fn(&ConnectionState) -> bool,
) -> Verdict {
    let mut state = transport.state();
    let found = within(step, PROMPT, state.wait_for(|state| wanted(state))).await?;
    ensure(
        step,
        found.is_ok(),
        "the watch of the state lives as long as its transport",
    )
}

/// The value of a call that runs in a task of its own; it ends well within [`PROMPT`].
pub(crate) async fn joined<T>(
    step: &str,
    task: tokio::task::JoinHandle<Result<T, Error>>,
) -> Verdict<T> {
    ended(step, PROMPT, task)
        .await?
        .map_err(|error| Stop::error(step, &error))
}

/// The result of a call that runs in a task of its own.
pub(crate) async fn ended<T>(
    step: &str,
    limit: Duration,
    task: tokio::task::JoinHandle<Result<T, Error>>,
) -> Verdict<Result<T, Error>> {
    within(step, limit, task)
        .await?
        .map_err(|error| Stop::failed(step, format!("it does not panic, but: {error}")))
}

/// Waits until a transport has noticed that its connection is lost.
pub(crate) async fn until_disconnected(transport: &Arc<dyn Transport>) -> Verdict {
    let lost = |state: &ConnectionState| !matches!(state, ConnectionState::Connected);
    until_state(
        "the transport says that its connection is lost",
        transport,
        lost,
    )
    .await
}

/// Waits until a transport is connected.
pub(crate) async fn until_connected(transport: &Arc<dyn Transport>) -> Verdict {
    let found = |state: &ConnectionState| matches!(state, ConnectionState::Connected);
    until_state(
        "the transport says that it is connected again",
        transport,
        found,
    )
    .await
}

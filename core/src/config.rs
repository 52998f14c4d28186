//! What a client and a server may be told.

use std::time::Duration;

use crate::error::{Error, ErrorKind};
use crate::server::WhenDisengaged;

/// The longest timeout that a call may have: 30 days, within what every broker's expiry can hold.
pub(crate) const TIMEOUT_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// The largest body by default, in bytes: 4 MiB, below the limit of every broker.
const MAX_BODY: usize = 4 * 1024 * 1024;

/// The time that a request may take if nobody says how long.
const TIMEOUT: Duration = Duration::from_secs(30);

/// How often a server says that a handler still runs.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// The settings of a [`Client`](crate::Client).
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ClientConfig {
    /// The timeout of calls that set none. Default: 30 s. At most 30 days.
    pub timeout: Duration,
    /// The largest body of a request or reply, in bytes, inclusive. Default: 4 MiB. A server with a smaller limit
    /// refuses what is over its own.
    pub max_body: usize,
    /// The most calls that wait at once; one more fails as `Overloaded`. Default: 131,072, some 40 MiB of small calls.
    pub max_pending: usize,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            timeout: TIMEOUT,
            max_body: MAX_BODY,
            max_pending: 131_072,
        }
    }
}

impl ClientConfig {
    /// Sets [`timeout`](Self::timeout).
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets [`max_body`](Self::max_body).
    #[must_use]
    pub fn max_body(mut self, bytes: usize) -> Self {
        self.max_body = bytes;
        self
    }

    /// Sets [`max_pending`](Self::max_pending).
    #[must_use]
    pub fn max_pending(mut self, calls: usize) -> Self {
        self.max_pending = calls;
        self
    }
}

/// The settings of a [`Server`](crate::Server), set through its builder.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ServerConfig {
    pub(crate) prefetch: usize,
    pub(crate) ownership: Ownership,
    pub(crate) max_deliveries: u32,
    pub(crate) max_body: usize,
    pub(crate) default_timeout: Duration,
    pub(crate) grace: Duration,
    pub(crate) drain_timeout: Duration,
    pub(crate) heartbeat: Duration,
    pub(crate) when_disengaged: WhenDisengaged,
    pub(crate) outbox_replies: usize,
}

/// Who else may serve what a server serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ownership {
    /// Anybody who shares too.
    Shared,
    /// Nobody; it fails if somebody does.
    Exclusive,
    /// Nobody; it waits while somebody does.
    Standby,
    /// Nobody; whoever does is asked to hand over.
    TakeOver,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            prefetch: 128,
            ownership: Ownership::Shared,
            max_deliveries: 5,
            max_body: MAX_BODY,
            default_timeout: TIMEOUT,
            grace: Duration::from_secs(1),
            drain_timeout: TIMEOUT,
            heartbeat: HEARTBEAT,
            when_disengaged: WhenDisengaged::Reconnect,
            outbox_replies: 1024,
        }
    }
}

pub(crate) fn check_timeout(timeout: Duration) -> Result<(), Error> {
    if timeout > TIMEOUT_MAX {
        return Err(Error::not_executed(
            ErrorKind::Invalid,
            "a timeout above 30 days",
        ));
    }
    Ok(())
}

pub(crate) fn check_size(size: usize, max_body: usize) -> Result<(), Error> {
    if size > max_body {
        let message = format!("a body of {} bytes is over the limit of {max_body}", size);
        return Err(Error::not_executed(ErrorKind::TooLarge, message));
    }
    Ok(())
}

/// How long opening something waits for a connection that is lost.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) async fn bounded<T>(
    what: &str,
    opening: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::time::timeout(OPEN_TIMEOUT, opening)
        .await
        .unwrap_or_else(|_| {
            let message = format!("no connection to {what} within {OPEN_TIMEOUT:?}");
            Err(Error::not_executed(ErrorKind::Connect, message))
        })
}

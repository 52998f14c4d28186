//! What the suite needs of a transport's author.

use std::fmt::{self, Debug};
use std::sync::Arc;
use std::time::Duration;

use antiphon_core::{Error, ReplyAddress, ServiceName, Transport};
use async_trait::async_trait;

use crate::proxy::Proxy;

/// A transport under test, on a running broker.
///
/// The suite makes its own names, fresh in every run, so several runs may share one broker. What a harness cannot do it
/// refuses with [`HookError::Unsupported`]: the cases that need it are then reported as unsupported, with the reason.
#[async_trait]
pub trait Harness: Debug + Send + Sync + 'static {
    /// What is tested, for the report: the broker and its version, such as `redis 7.0.15`.
    fn name(&self) -> String;

    /// Makes a connection that is as independent of every other one as if another process had made it.
    async fn connect(&self) -> Result<Connected, Error>;

    /// The times within which this transport keeps its promises, in the configuration that [`connect`](Self::connect)
    /// uses.
    fn bounds(&self) -> Bounds;

    /// Stops the broker as hard as a crash would, starts it again with what it keeps on disk, and resolves when it takes
    /// connections. The suite runs nothing beside it.
    async fn restart_broker(&self) -> Result<(), HookError>;

    /// The names of all objects (queues, keys) that exist on the broker for these inboxes and for this service,
    /// but for the service's own queue and dead letters.
    async fn leftovers(
        &self,
        service: &ServiceName,
        inboxes: &[ReplyAddress],
    ) -> Result<Vec<String>, HookError>;

    /// How many dead letters the service has.
    async fn dead_letters(&self, service: &ServiceName) -> Result<u64, HookError>;
}

/// One connection, and power over its wire.
#[derive(Clone, Debug)]
pub struct Connected {
    /// The transport.
    pub transport: Arc<dyn Transport>,
    /// What lies between it and the broker. The suite keeps it until the case ends, longer than the transport, so it may
    /// own what carries the connection, such as a proxy; but it must not keep the transport itself alive, whose drop is
    /// the end of its process.
    pub link: Arc<dyn Link>,
}

/// The wire between one transport and its broker.
///
/// To the broker a severed link looks like a process that was killed; to the transport, like a broker that was.
#[async_trait]
pub trait Link: Debug + Send + Sync + 'static {
    /// Loses the connection now. The transport may connect again at once.
    async fn cut(&self) -> Result<(), HookError>;

    /// Loses the connection now, and every new one until [`restore`](Self::restore).
    async fn sever(&self) -> Result<(), HookError>;

    /// Ends a [`sever`](Self::sever).
    async fn restore(&self) -> Result<(), HookError>;
}

/// The wire of a transport that connects through a proxy.
#[async_trait]
impl Link for Proxy {
    async fn cut(&self) -> Result<(), HookError> {
        Self::cut(self).await;
        Ok(())
    }

    async fn sever(&self) -> Result<(), HookError> {
        self.refuse().await;
        Ok(())
    }

    async fn restore(&self) -> Result<(), HookError> {
        Self::restore(self).await.map_err(HookError::failed)
    }
}

/// The times within which a transport keeps its promises.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// After an exclusive owner was killed, the next one gets in. Default: 2 s.
    pub take_over: Duration,
    /// After a server was killed, another one has its requests. Default: 2 s.
    pub redelivery: Duration,
    /// After a call's deadline, nothing of it is left on the broker. The contract says 60 s; a harness shortens it by
    /// configuration, so that the suite need not wait so long. Default: 10 s.
    pub leak: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            take_over: Duration::from_secs(2),
            redelivery: Duration::from_secs(2),
            leak: Duration::from_secs(10),
        }
    }
}

/// Why a harness did not do what it was asked.
#[derive(Clone, Debug)]
pub enum HookError {
    /// It cannot, and says why. The case is reported as unsupported.
    Unsupported(String),
    /// It should, and failed. The case fails.
    Failed(String),
}

impl HookError {
    /// This harness cannot do that, because ...
    pub fn unsupported(reason: impl Into<String>) -> Self {
        Self::Unsupported(reason.into())
    }

    /// This harness tried, and failed because ...
    pub fn failed(reason: impl fmt::Display) -> Self {
        Self::Failed(reason.to_string())
    }
}

impl fmt::Display for HookError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported(reason) => write!(f, "unsupported: {reason}"),
            Self::Failed(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for HookError {}

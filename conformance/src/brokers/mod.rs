//! A broker for tests: one that is given by URL, one in a container, or a private process, whichever there is.
//!
//! ```no_run
//! use antiphon_conformance::brokers::{self, BrokerKind, BrokerOptions, Stop};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! match brokers::start(BrokerOptions::new(BrokerKind::Redis)).await {
//!     Ok(broker) => {
//!         println!("{} at {}", broker.name(), broker.url());
//!         broker.restart(Stop::Kill).await?;
//!     }
//!     Err(missing) if missing.is_failure() => return Err(missing.into()),
//!     Err(missing) => println!("not run: {missing}"),
//! }
//! # Ok(())
//! # }
//! ```
//!
//! These are tried in this order; `ANTIPHON_BROKERS` = `url`, `containers`, `processes` or `none` leaves only one:
//!
//! 1. a URL: `ANTIPHON_REDIS_URL`, `ANTIPHON_VALKEY_URL`, `ANTIPHON_AMQP_URL`. Such a broker is never stopped;
//! 2. a container, with the feature `containers`: of the image named by `ANTIPHON_REDIS_IMAGE` (default `redis:8`),
//!    `ANTIPHON_VALKEY_IMAGE` (`valkey/valkey:8`) or `ANTIPHON_RABBITMQ_IMAGE` (`rabbitmq:4`). An image that is there
//!    is not pulled;
//! 3. a private process on free loopback ports, with its data in a temporary directory: `redis-server`,
//!    `valkey-server` or `rabbitmq-server`.
//!
//! Nothing outlives the test process, however that ends: a process is killed by a watchdog, a container is removed by
//! one if the command `docker` is there.

mod certificates;
#[cfg(feature = "containers")]
mod container;
mod environment;
mod ports;
mod probe;
mod process;
mod rabbitmq;
mod redis;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::PathBuf;

pub use certificates::Certificates;
pub use environment::required;
pub(crate) use ports::free_port;

use environment::Source;

/// Which broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BrokerKind {
    /// Redis.
    Redis,
    /// Valkey.
    Valkey,
    /// RabbitMQ.
    RabbitMq,
}

impl BrokerKind {
    /// `"redis"`, `"valkey"` or `"rabbitmq"`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Valkey => "valkey",
            Self::RabbitMq => "rabbitmq",
        }
    }

    fn default_port(self) -> u16 {
        match self {
            Self::Redis | Self::Valkey => 6379,
            Self::RabbitMq => 5672,
        }
    }
}

impl fmt::Display for BrokerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a test needs of its broker.
#[derive(Clone, Debug)]
pub struct BrokerOptions {
    kind: BrokerKind,
    durability: Durability,
    settings: Vec<(String, String)>,
    tls: Option<Certificates>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Durability {
    Memory,
    Disk,
}

impl BrokerOptions {
    /// A broker as it is by default: RabbitMQ keeps on disk what is durable; Redis and Valkey keep nothing.
    #[must_use]
    pub fn new(kind: BrokerKind) -> Self {
        Self {
            kind,
            durability: Durability::Memory,
            settings: Vec::new(),
            tls: None,
        }
    }

    /// Redis and Valkey: writes every command to disk before it is answered, so that nothing is lost by a kill.
    #[must_use]
    pub fn durable(mut self) -> Self {
        self.durability = Durability::Disk;
        self
    }

    /// A setting in the broker's own words: of `redis.conf` (`maxmemory`, `10mb`) or of `rabbitmq.conf`
    /// (`vm_memory_high_watermark.absolute`, `64MB`). A broker that is given by URL cannot have any.
    #[must_use]
    pub fn setting(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.push((name.into(), value.into()));
        self
    }

    /// It takes connections over TLS as well: see [`Broker::tls_url`]. A certificate of the client's is checked if there is one; a
    /// setting can demand it. A broker that is given by URL cannot be told to.
    #[must_use]
    pub fn tls(mut self, certificates: &Certificates) -> Self {
        self.tls = Some(certificates.clone());
        self
    }

    /// The broker's own words for TLS, with its files where `file` says that they are.
    fn tls_settings(&self, port: u16, file: impl Fn(PathBuf) -> String) -> Vec<(String, String)> {
        let Some(tls) = &self.tls else {
            return Vec::new();
        };
        let ca = file(tls.ca_file());
        let certificate = file(tls.server_certificate_file());
        let key = file(tls.server_key_file());
        let settings = match self.kind {
            BrokerKind::Redis | BrokerKind::Valkey => vec![
                ("tls-port", port.to_string()),
                ("tls-ca-cert-file", ca),
                ("tls-cert-file", certificate),
                ("tls-key-file", key),
                ("tls-auth-clients", "optional".to_owned()),
            ],
            BrokerKind::RabbitMq => vec![
                ("ssl_options.cacertfile", ca),
                ("ssl_options.certfile", certificate),
                ("ssl_options.keyfile", key),
                ("ssl_options.verify", "verify_peer".to_owned()),
                ("ssl_options.fail_if_no_peer_cert", "false".to_owned()),
            ],
        };
        let named = settings.into_iter();
        named
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }
}

/// How a broker is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It is asked to end (SIGTERM), and may say goodbye to its clients. After 30 s it is killed.
    Graceful,
    /// It is killed (SIGKILL), as by a crash.
    Kill,
}

/// There is no broker for a test.
#[derive(Clone, Debug)]
pub struct Unavailable {
    kind: BrokerKind,
    reason: String,
    failure: bool,
}

impl Unavailable {
    /// What was tried, and why it did not work.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// True if the tests that need the broker must fail, not be shown as not run: [`required`] says so, or a broker
    /// was asked for by URL and does not answer.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        self.failure
    }
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no {}: {}", self.kind, self.reason)
    }
}

impl std::error::Error for Unavailable {}

/// Provides a broker that takes connections.
///
/// **Resolves** within 3 minutes, and mostly within 1 s for Redis and 15 s for RabbitMQ. An image that has to be
/// pulled may take longer.
///
/// # Errors
/// If there is none; with the end of its log if one was started in vain.
pub async fn start(options: BrokerOptions) -> Result<Broker, Unavailable> {
    let kind = options.kind;
    let unavailable = |reason: String, asked: bool| Unavailable {
        kind,
        reason,
        failure: asked || environment::is_required(kind),
    };
    let sources = environment::sources(kind).map_err(|reason| unavailable(reason, true))?;
    let mut reasons = Vec::new();
    for source in sources {
        let asked = matches!(source, Source::Url(_));
        match Broker::start(&options, source).await {
            Ok(broker) => return Ok(broker),
            // Whoever names a broker means that one: to go on with another would test something else unnoticed. What it cannot do
            // is no failure.
            Err(error) if asked => {
                return Err(Unavailable {
                    kind,
                    reason: error.to_string(),
                    failure: error.kind() != io::ErrorKind::Unsupported,
                });
            }
            Err(error) => reasons.push(error.to_string()),
        }
    }
    if reasons.is_empty() {
        reasons.push("ANTIPHON_BROKERS leaves none".to_owned());
    }
    Err(unavailable(reasons.join("; "), false))
}

/// A broker that runs. Dropping it stops and removes what was started for it; a container must be dropped within a Tokio
/// runtime.
#[derive(Debug)]
pub struct Broker {
    kind: BrokerKind,
    version: Option<String>,
    url: String,
    runtime: Runtime,
}

#[derive(Debug)]
enum Runtime {
    Url,
    Redis(redis::RedisProcess),
    RabbitMq(Box<rabbitmq::RabbitMqProcess>),
    #[cfg(feature = "containers")]
    Container(Box<container::Container>),
}

impl Broker {
    async fn start(options: &BrokerOptions, source: Source) -> io::Result<Self> {
        let (runtime, url) = match source {
            Source::Url(url) => {
                if !options.settings.is_empty() || options.tls.is_some() {
                    return Err(unsupported(
                        "a broker that is given by URL cannot be configured",
                    ));
                }
                (Runtime::Url, url)
            }
            #[cfg(feature = "containers")]
            Source::Container(image) => {
                let container = container::Container::start(options, &image).await?;
                let url = url_of(options.kind, container.authority());
                (Runtime::Container(Box::new(container)), url)
            }
            #[cfg(not(feature = "containers"))]
            Source::Container(_) => {
                return Err(unsupported(
                    "containers need the feature `containers`, which is not enabled",
                ));
            }
            Source::Process if options.kind == BrokerKind::RabbitMq => {
                let process = rabbitmq::RabbitMqProcess::start(options).await?;
                let url = url_of(options.kind, &process.authority());
                (Runtime::RabbitMq(Box::new(process)), url)
            }
            Source::Process => {
                let process = redis::RedisProcess::start(options).await?;
                let url = url_of(options.kind, &process.authority());
                (Runtime::Redis(process), url)
            }
        };
        Self::identified(options.kind, url, runtime).await
    }

    /// A broker that runs already. It can be neither stopped nor configured from here.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn at(kind: BrokerKind, url: impl Into<String>) -> io::Result<Self> {
        Self::identified(kind, url.into(), Runtime::Url).await
    }

    async fn identified(kind: BrokerKind, url: String, runtime: Runtime) -> io::Result<Self> {
        let identity = probe::identify(kind, &url).await?;
        Ok(Self {
            kind: identity.kind.unwrap_or(kind),
            version: identity.version,
            url,
            runtime,
        })
    }

    /// What it is; for a broker that is given by URL, what it says that it is.
    #[must_use]
    pub fn kind(&self) -> BrokerKind {
        self.kind
    }

    /// Its version, such as `7.0.15`; none if it does not tell without a password or TLS.
    #[must_use]
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// Kind, version and where it runs, such as `redis 7.0.15 (process)`.
    #[must_use]
    pub fn name(&self) -> String {
        let runs = match self.runtime {
            Runtime::Url => "url",
            Runtime::Redis(_) | Runtime::RabbitMq(_) => "process",
            #[cfg(feature = "containers")]
            Runtime::Container(_) => "container",
        };
        match &self.version {
            Some(version) => format!("{} {version} ({runs})", self.kind),
            None => format!("{} ({runs})", self.kind),
        }
    }

    /// Where clients connect. It stays the same over a restart.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Where clients connect over TLS, if it was started with [`BrokerOptions::tls`]. It stays the same over a restart.
    #[must_use]
    pub fn tls_url(&self) -> Option<String> {
        let url = url_of(self.kind, &self.tls_authority()?);
        let (scheme, rest) = url.split_once(':')?;
        Some(format!("{scheme}s:{rest}"))
    }

    /// Host and port of [`tls_url`](Self::tls_url).
    #[must_use]
    pub fn tls_authority(&self) -> Option<String> {
        match &self.runtime {
            Runtime::Url => None,
            Runtime::Redis(process) => process.tls_authority(),
            Runtime::RabbitMq(process) => process.tls_authority(),
            #[cfg(feature = "containers")]
            Runtime::Container(container) => container.tls_authority(),
        }
    }

    /// Host and port of [`url`](Self::url), for a [`Proxy`](crate::proxy::Proxy).
    #[must_use]
    pub fn authority(&self) -> String {
        probe::authority(self.kind, &self.url).unwrap_or_default()
    }

    /// The process id of a private process that runs; none otherwise.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        match &self.runtime {
            Runtime::Redis(process) => process.pid(),
            Runtime::RabbitMq(process) => process.pid(),
            _ => None,
        }
    }

    /// Stops the broker. **Resolves when** nobody listens any more. Does nothing if it is stopped.
    ///
    /// # Errors
    /// `Unsupported` for a broker that is given by URL.
    pub async fn stop(&self, how: Stop) -> io::Result<()> {
        match &self.runtime {
            Runtime::Url => Err(not_ours()),
            Runtime::Redis(process) => process.stop(how).await,
            Runtime::RabbitMq(process) => process.stop(how).await,
            #[cfg(feature = "containers")]
            Runtime::Container(container) => container.stop(how).await,
        }
    }

    /// Kills the broker: [`stop`](Self::stop) with [`Stop::Kill`].
    ///
    /// # Errors
    /// As of [`stop`](Self::stop).
    pub async fn kill(&self) -> io::Result<()> {
        self.stop(Stop::Kill).await
    }

    /// Starts a stopped broker again, on the same port and with what it has on disk. **Resolves when** it takes
    /// connections.
    ///
    /// # Errors
    /// `Unsupported` for a broker that is given by URL; else with the end of its log.
    pub async fn resume(&self) -> io::Result<()> {
        match &self.runtime {
            Runtime::Url => Err(not_ours()),
            Runtime::Redis(process) => process.resume().await,
            Runtime::RabbitMq(process) => process.resume().await,
            #[cfg(feature = "containers")]
            Runtime::Container(container) => container.resume().await,
        }
    }

    /// [`stop`](Self::stop), then [`resume`](Self::resume).
    ///
    /// RabbitMQ first writes its tables to disk. It does so by itself within half a second; but killed before that,
    /// RabbitMQ 4.0 forgets that it had a new quorum queue's log, and the queue refuses every message for ever after.
    ///
    /// # Errors
    /// As of those.
    pub async fn restart(&self, how: Stop) -> io::Result<()> {
        if self.kind == BrokerKind::RabbitMq && how == Stop::Kill {
            // A node that does not answer, such as one that was stopped before, has nothing new to write.
            let _ = self
                .ctl(&["eval", "[ok = dets:sync(T) || T <- dets:all()]."])
                .await;
        }
        self.stop(how).await?;
        self.resume().await
    }

    /// Stops the broker's clock, as if its machine hung: its sockets stay open, and nothing is answered.
    ///
    /// # Errors
    /// `Unsupported` for a broker that is given by URL; `NotFound` if it does not run.
    pub async fn freeze(&self) -> io::Result<()> {
        match &self.runtime {
            #[cfg(feature = "containers")]
            Runtime::Container(container) => container.freeze().await,
            _ => process::signal(self.running_pid()?, "STOP").await,
        }
    }

    /// Ends a [`freeze`](Self::freeze).
    ///
    /// # Errors
    /// As of [`freeze`](Self::freeze).
    pub async fn thaw(&self) -> io::Result<()> {
        match &self.runtime {
            #[cfg(feature = "containers")]
            Runtime::Container(container) => container.thaw().await,
            _ => process::signal(self.running_pid()?, "CONT").await,
        }
    }

    /// Runs `rabbitmqctl` with these arguments on a RabbitMQ of ours, and gives what it prints. It takes up to 60 s.
    ///
    /// # Errors
    /// `Unsupported` for other brokers and one that is given by URL; else if it fails, with what it printed.
    pub async fn ctl(&self, arguments: &[&str]) -> io::Result<String> {
        match &self.runtime {
            Runtime::RabbitMq(process) => process.ctl(arguments).await,
            #[cfg(feature = "containers")]
            Runtime::Container(container) if self.kind == BrokerKind::RabbitMq => {
                container.ctl(arguments).await
            }
            Runtime::Url => Err(not_ours()),
            _ => Err(unsupported("only RabbitMQ has rabbitmqctl")),
        }
    }

    /// The last lines of its log; empty for one that is given by URL.
    pub async fn log_tail(&self) -> String {
        match &self.runtime {
            Runtime::Url => String::new(),
            Runtime::Redis(process) => process.log_tail(),
            Runtime::RabbitMq(process) => process.log_tail(),
            #[cfg(feature = "containers")]
            Runtime::Container(container) => container.log_tail().await,
        }
    }

    fn running_pid(&self) -> io::Result<u32> {
        match &self.runtime {
            Runtime::Url => Err(not_ours()),
            _ => self
                .pid()
                .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the broker does not run")),
        }
    }
}

fn url_of(kind: BrokerKind, authority: &str) -> String {
    match kind {
        BrokerKind::Redis | BrokerKind::Valkey => format!("redis://{authority}"),
        BrokerKind::RabbitMq => format!("amqp://guest:guest@{authority}"),
    }
}

fn not_ours() -> io::Error {
    unsupported("the broker was given by URL, and is not ours to control")
}

fn unsupported(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, reason)
}

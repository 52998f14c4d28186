//! The brokers of a run: private processes on free loopback ports.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::process::Stdio;
use std::time::{Duration, Instant};

use antiphon_conformance::brokers::{self, Broker, BrokerKind, BrokerOptions};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdin, Command};

use crate::Failure;
use crate::contenders::{Contender, Needs};
use crate::cpu;

const NATS_START: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);

/// Becomes nats-server, and leaves a watchdog in its process group which ends it when its owner is gone, however that ended.
const GUARDED: &str = r#"
exec 3<&0
(read -r line <&3; kill -KILL 0) &
exec nats-server --addr 127.0.0.1 --port "$0" </dev/null 3<&-
"#;

/// The brokers that a group of contenders needs. Dropping it ends them.
#[derive(Debug)]
pub(crate) struct Brokers(BTreeMap<Needs, Running>);

impl Brokers {
    pub(crate) async fn start(contenders: &[Contender]) -> Result<Self, Failure> {
        let mut brokers = BTreeMap::new();
        for contender in contenders {
            if let Entry::Vacant(entry) = brokers.entry(contender.needs()) {
                entry.insert(Running::start(contender.needs()).await?);
            }
        }
        Ok(Self(brokers))
    }

    /// What runs, with versions.
    pub(crate) fn names(&self) -> impl Iterator<Item = String> {
        self.0.values().filter_map(Running::name)
    }

    /// Where it is; empty for nothing.
    pub(crate) fn url(&self, needs: Needs) -> String {
        self.0.get(&needs).map(Running::url).unwrap_or_default()
    }

    /// Its processes.
    pub(crate) fn processes(&self, needs: Needs) -> Vec<u32> {
        let processes = self.0.get(&needs).map(Running::processes);
        processes.unwrap_or_default()
    }
}

/// One broker that runs. Dropping it ends it.
#[derive(Debug)]
enum Running {
    Nothing,
    Ours(Box<Broker>),
    Nats(Box<NatsServer>),
}

/// A private NATS server.
#[derive(Debug)]
struct NatsServer {
    child: Child,
    // Its end tells the watchdog.
    _input: ChildStdin,
    port: u16,
    version: String,
}

impl Running {
    /// Starts what a contender needs.
    async fn start(needs: Needs) -> Result<Self, Failure> {
        let kind = match needs {
            Needs::Nothing => return Ok(Self::Nothing),
            Needs::Nats => return Ok(Self::Nats(Box::new(NatsServer::start().await?))),
            Needs::Redis => BrokerKind::Redis,
            Needs::RabbitMq => BrokerKind::RabbitMq,
        };
        let broker = brokers::start(BrokerOptions::new(kind)).await?;
        Ok(Self::Ours(Box::new(broker)))
    }

    fn url(&self) -> String {
        match self {
            Self::Nothing => String::new(),
            Self::Ours(broker) => broker.url().to_owned(),
            Self::Nats(server) => format!("nats://127.0.0.1:{}", server.port),
        }
    }

    /// Its processes.
    fn processes(&self) -> Vec<u32> {
        let root = match self {
            Self::Nothing => None,
            Self::Ours(broker) => broker.pid(),
            Self::Nats(server) => server.child.id(),
        };
        root.map(cpu::family).unwrap_or_default()
    }

    /// What it is, with its version.
    fn name(&self) -> Option<String> {
        match self {
            Self::Nothing => None,
            Self::Ours(broker) => Some(broker.name()),
            Self::Nats(server) => Some(format!("nats-server {} (process)", server.version)),
        }
    }
}

impl NatsServer {
    async fn start() -> Result<Self, Failure> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
            .local_addr()?
            .port();
        let mut child = Command::new("sh")
            .args(["-c", GUARDED, &port.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let input = child.stdin.take().ok_or("no input")?;
        let end = Instant::now() + NATS_START;
        let version = loop {
            match version(port).await {
                Ok(version) => break version,
                Err(error) if Instant::now() > end || child.try_wait()?.is_some() => {
                    return Err(format!("nats-server does not answer: {error}").into());
                }
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        };
        Ok(Self {
            child,
            _input: input,
            port,
            version,
        })
    }
}

/// It speaks first.
async fn version(port: u16) -> io::Result<String> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).await?;
    let info: serde_json::Value = serde_json::from_str(line.trim_start_matches("INFO "))?;
    Ok(info["version"].as_str().unwrap_or("?").to_owned())
}

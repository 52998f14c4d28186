//! Who is measured: floors, peers and ours, one file each.

mod amqp;
mod extra;
mod memory;
mod nats;
mod ours;
mod redis_batched;
mod redis_frame;
mod redis_single;
mod tarpc;

use std::fmt;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;

use crate::Failure;
use crate::load::Caller;

pub(crate) use amqp::QueueKind;
pub(crate) use extra::Extra;
pub(crate) use ours::Body;
pub(crate) use redis_single::Replies;

/// What carries the messages, and so what is compared with what.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    clap::ValueEnum,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Group {
    Memory,
    Redis,
    Rabbitmq,
}

impl Group {
    pub(crate) const ALL: [Self; 3] = [Self::Memory, Self::Redis, Self::Rabbitmq];

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Redis => "Redis",
            Self::Rabbitmq => "RabbitMQ",
        }
    }
}

/// What a contender is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Floor,
    Peer,
    Ours,
}

/// A broker that a contender needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Needs {
    Nothing,
    Redis,
    RabbitMq,
    Nats,
}

/// A program that calls and one that answers.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    clap::ValueEnum,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Contender {
    /// A channel, a oneshot for the reply, and a task per request
    Spawn,
    /// tarpc in one process
    Tarpc,
    /// Ours in memory, bytes
    Memory,
    /// Ours in memory, typed, JSON
    MemoryJson,
    /// Batched reliable lists over Redis
    Crel,
    /// Reliable lists over Redis, one at a time
    B,
    /// The same, a task per reply
    BSpawned,
    /// async-nats over a NATS server
    Nats,
    /// Ours over Redis, bytes
    Redis,
    /// Ours over Redis, typed, JSON
    RedisJson,
    /// lapin, confirms both ways, ack after the reply's, on a transient classic queue
    C,
    /// The same on a quorum queue
    Cq,
    /// Moleculer over RabbitMQ, on Node
    Moleculer,
    /// NestJS over RabbitMQ, on Node
    Nest,
    /// Ours over RabbitMQ on a transient classic queue, bytes
    Amqp,
    /// Ours over RabbitMQ on a quorum queue, as by default, bytes
    AmqpQuorum,
    /// Ours over RabbitMQ on a quorum queue, typed, JSON
    AmqpQuorumJson,
}

/// Where a contender meets its other half.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// The broker's; empty without one.
    pub(crate) url: String,
    /// A name that nobody else uses.
    pub(crate) service: String,
    /// How many requests the server works on at once.
    pub(crate) prefetch: u16,
    /// How many servers; this and what follows is for ours alone.
    pub(crate) servers: usize,
    /// How many services each of them has.
    pub(crate) services: usize,
    /// How many clients there are, of which one calls.
    pub(crate) clients: usize,
    /// How many of its calls wait for a server that is not there.
    pub(crate) pending: usize,
    /// What is asked for besides.
    pub(crate) extra: Extra,
}

const ON_NODE: &str = "its halves are processes of Node";

/// What a server does until its process ends.
pub(crate) type Serving = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send>>;

impl Contender {
    pub(crate) const ALL: [Self; 17] = [
        Self::Spawn,
        Self::Tarpc,
        Self::Memory,
        Self::MemoryJson,
        Self::Crel,
        Self::B,
        Self::BSpawned,
        Self::Nats,
        Self::Redis,
        Self::RedisJson,
        Self::C,
        Self::Cq,
        Self::Moleculer,
        Self::Nest,
        Self::Amqp,
        Self::AmqpQuorum,
        Self::AmqpQuorumJson,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Spawn => "spawn",
            Self::Tarpc => "tarpc",
            Self::Memory => "memory",
            Self::MemoryJson => "memory-json",
            Self::Crel => "crel",
            Self::B => "b",
            Self::BSpawned => "b-spawned",
            Self::Nats => "nats",
            Self::Redis => "redis",
            Self::RedisJson => "redis-json",
            Self::C => "c",
            Self::Cq => "cq",
            Self::Moleculer => "moleculer",
            Self::Nest => "nest",
            Self::Amqp => "amqp",
            Self::AmqpQuorum => "amqp-quorum",
            Self::AmqpQuorumJson => "amqp-quorum-json",
        }
    }

    pub(crate) fn group(self) -> Group {
        match self {
            Self::Spawn | Self::Tarpc | Self::Memory | Self::MemoryJson => Group::Memory,
            Self::Crel | Self::B | Self::BSpawned | Self::Nats | Self::Redis | Self::RedisJson => {
                Group::Redis
            }
            Self::C
            | Self::Cq
            | Self::Moleculer
            | Self::Nest
            | Self::Amqp
            | Self::AmqpQuorum
            | Self::AmqpQuorumJson => Group::Rabbitmq,
        }
    }

    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::Spawn | Self::Crel | Self::B | Self::BSpawned | Self::C | Self::Cq => Kind::Floor,
            Self::Tarpc | Self::Nats | Self::Moleculer | Self::Nest => Kind::Peer,
            _ => Kind::Ours,
        }
    }

    pub(crate) fn needs(self) -> Needs {
        match (self, self.group()) {
            (Self::Nats, _) => Needs::Nats,
            (_, Group::Memory) => Needs::Nothing,
            (_, Group::Redis) => Needs::Redis,
            (_, Group::Rabbitmq) => Needs::RabbitMq,
        }
    }

    /// The floors of the same guarantee; where there are several, the fastest one counts.
    pub(crate) fn floors(self, concurrency: usize, size: usize) -> &'static [Self] {
        match self.group() {
            Group::Memory => &[Self::Spawn],
            // A large element is dear to remove by value from a list, and there is nothing to batch for a single caller.
            Group::Redis if size >= 64 * 1024 => &[Self::Crel, Self::B, Self::BSpawned],
            Group::Redis if concurrency == 1 => &[Self::B],
            Group::Redis => &[Self::Crel],
            Group::Rabbitmq => match self {
                Self::Cq | Self::AmqpQuorum | Self::AmqpQuorumJson => &[Self::Cq],
                _ => &[Self::C],
            },
        }
    }

    /// The peers that it is compared with; where there are several, the fastest one counts.
    pub(crate) fn peers(self) -> &'static [Self] {
        match self.group() {
            Group::Memory => &[Self::Tarpc],
            Group::Redis => &[Self::Nats],
            // They keep nothing, so there is nothing of theirs to compare a quorum queue with.
            Group::Rabbitmq if self == Self::Amqp => &[Self::Moleculer, Self::Nest],
            Group::Rabbitmq => &[],
        }
    }

    /// The script that is both of its halves, if it runs on Node.
    pub(crate) fn script(self) -> Option<&'static Path> {
        matches!(self, Self::Moleculer | Self::Nest).then(|| Path::new("bench/peers/half.js"))
    }

    /// If what it needs besides a broker is installed.
    pub(crate) fn is_installed(self) -> bool {
        let libraries = self
            .script()
            .map(|script| script.with_file_name("node_modules"));
        libraries.is_none_or(|libraries| libraries.is_dir())
    }

    /// Starts the answering half, in a process of its own; `None` for those that live in the client's.
    pub(crate) async fn serve(self, place: &Place) -> Result<Option<Serving>, Failure> {
        Ok(Some(match self {
            Self::Spawn | Self::Tarpc | Self::Memory | Self::MemoryJson => return Ok(None),
            Self::Crel => redis_batched::serve(place).await?,
            Self::B => redis_single::serve(place, Replies::Inline).await?,
            Self::BSpawned => redis_single::serve(place, Replies::Spawned).await?,
            Self::Nats => nats::serve(place).await?,
            Self::Redis | Self::AmqpQuorum => ours::serve(place, Body::Bytes).await?,
            Self::RedisJson | Self::AmqpQuorumJson => ours::serve(place, Body::Json).await?,
            Self::C => amqp::serve(place, QueueKind::TransientClassic).await?,
            Self::Cq => amqp::serve(place, QueueKind::Quorum).await?,
            Self::Moleculer | Self::Nest => return Err(ON_NODE.into()),
            Self::Amqp => {
                amqp::declare(place, QueueKind::TransientClassic).await?;
                ours::serve(place, Body::Bytes).await?
            }
        }))
    }

    /// Starts the calling half, and gives it to whoever measures.
    pub(crate) async fn call<M: Measure>(
        self,
        place: &Place,
        measure: M,
    ) -> Result<M::Output, Failure> {
        match self {
            Self::Spawn => measure.with(memory::Spawning::start()).await,
            Self::Tarpc => measure.with(tarpc::Tarpc::start()).await,
            Self::Memory => {
                measure
                    .with(ours::in_memory(place, Body::Bytes).await?)
                    .await
            }
            Self::MemoryJson => {
                measure
                    .with(ours::in_memory(place, Body::Json).await?)
                    .await
            }
            Self::Crel => {
                measure
                    .with(redis_batched::Batched::connect(place).await?)
                    .await
            }
            Self::B | Self::BSpawned => {
                measure
                    .with(redis_single::Single::connect(place).await?)
                    .await
            }
            Self::Nats => measure.with(nats::Nats::connect(place).await?).await,
            Self::Redis | Self::Amqp | Self::AmqpQuorum => {
                measure.with(ours::client(place, Body::Bytes).await?).await
            }
            Self::RedisJson | Self::AmqpQuorumJson => {
                measure.with(ours::client(place, Body::Json).await?).await
            }
            Self::C | Self::Cq => measure.with(amqp::Confirmed::connect(place).await?).await,
            Self::Moleculer | Self::Nest => Err(ON_NODE.into()),
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What is done with a caller, whichever it is.
pub(crate) trait Measure {
    type Output;

    fn with(self, caller: impl Caller) -> impl Future<Output = Result<Self::Output, Failure>>;
}

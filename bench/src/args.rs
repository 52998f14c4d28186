//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::contenders::{Contender, Extra, Group, Place};

/// Measures floors, peers and ours, interleaved, on brokers of its own; prints figures and their ratios
///
/// Ratios are taken inside a round, and then the median of the rounds.
#[derive(Debug, Parser)]
#[command(name = "antiphon-bench", subcommand_precedence_over_arg = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) rounds: Rounds,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// What an idle client and an idle server with many services cost: commands, processor time, memory
    Idle(Idle),
    /// How the cost of a call over Redis grows with what else there is, each as a ratio to a plain one
    Flat(Flat),
    /// What a call pays for options beside it: nodes, cancellation, standby, the clutch, the outbox; each as a ratio to a plain one
    ///
    /// Options are measured in turns with calls without them. In memory, instructions are counted as well, by valgrind; over
    /// Redis, the commands of a call.
    Features(Features),
    /// Latency at a part of the peak, without coordinated omission
    OpenLoop(OpenLoop),
    /// Instructions and allocations of a call in memory, by valgrind, as ratios to what is recorded
    Instructions(Instructions),
    /// One contender's server, for the process that measures
    #[command(hide = true)]
    Serve(Role),
    /// One contender's client, for the process that measures
    #[command(hide = true)]
    Call(Role),
    /// Calls of which the instructions are counted
    #[command(hide = true)]
    HotPath(HotPath),
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Idle {
    /// How many services the server has
    #[arg(long, default_value_t = 100)]
    pub(crate) services: usize,
    /// How long both are watched, after they have settled for 10 s
    #[arg(long, default_value_t = 20.0)]
    pub(crate) seconds: f64,
    /// Where the figures go
    #[arg(long, value_name = "FILE", default_value = "target/bench/idle.json")]
    pub(crate) json: PathBuf,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Flat {
    /// How many requests wait in the queue
    #[arg(long, default_value_t = 1_000_000)]
    pub(crate) backlog: usize,
    /// How many services one server has
    #[arg(long, default_value_t = 1_000)]
    pub(crate) services: usize,
    /// How many clients there are on the broker
    #[arg(long, default_value_t = 1_000)]
    pub(crate) inboxes: usize,
    /// How many calls of the client wait for a server that is not there
    #[arg(long, default_value_t = 100_000)]
    pub(crate) pending: usize,
    /// How many servers share the service
    #[arg(long, default_value_t = 64)]
    pub(crate) servers: usize,
    /// How often each is measured
    #[arg(long, default_value_t = 3)]
    pub(crate) rounds: usize,
    /// How long each point is measured
    #[arg(long, default_value_t = 1.0)]
    pub(crate) seconds: f64,
    /// Where the figures go
    #[arg(long, value_name = "FILE", default_value = "target/bench/flat.json")]
    pub(crate) json: PathBuf,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Features {
    /// Only these transports
    #[arg(long, value_delimiter = ',', value_name = "TRANSPORT")]
    pub(crate) only: Vec<Group>,
    /// How many calls wait at once
    #[arg(long, default_value_t = 64)]
    pub(crate) concurrency: usize,
    /// How often each is measured
    #[arg(long, default_value_t = 5)]
    pub(crate) rounds: usize,
    /// How long each point is measured
    #[arg(long, default_value_t = 0.5)]
    pub(crate) seconds: f64,
    /// Where the figures go
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/bench/features.json"
    )]
    pub(crate) json: PathBuf,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct OpenLoop {
    /// Whom to measure
    #[arg(long, value_delimiter = ',', default_values = ["spawn", "memory", "crel", "redis", "c", "amqp", "cq", "amqp-quorum"])]
    pub(crate) contender: Vec<Contender>,
    /// Parts of the peak, which is measured first, with 256 calls at once
    #[arg(long, value_delimiter = ',', default_values_t = [0.5, 0.9])]
    pub(crate) load: Vec<f64>,
    /// How often each is measured
    #[arg(long, default_value_t = 3)]
    pub(crate) rounds: usize,
    /// How long each point is measured
    #[arg(long, default_value_t = 2.0)]
    pub(crate) seconds: f64,
    /// Of a body, in bytes
    #[arg(long, default_value_t = 64)]
    pub(crate) size: usize,
    /// Threads of client and server: 1 is Tokio's current-thread runtime
    #[arg(long, default_value_t = 1)]
    pub(crate) workers: usize,
    /// Where the figures go
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/bench/open-loop.json"
    )]
    pub(crate) json: PathBuf,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Instructions {
    /// What was counted before
    #[arg(long, value_name = "FILE", default_value = "bench/instructions.json")]
    pub(crate) baseline: PathBuf,
    /// Record the counts in the baseline
    #[arg(long)]
    pub(crate) record: bool,
    /// Fail if a count is above so many times what was recorded
    #[arg(long, value_name = "RATIO")]
    pub(crate) limit: Option<f64>,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct HotPath {
    #[arg(long)]
    pub(crate) contender: Contender,
    #[arg(long)]
    pub(crate) concurrency: usize,
    /// Of each caller
    #[arg(long)]
    pub(crate) calls: usize,
    /// Of a body, in bytes
    #[arg(long, default_value_t = 64)]
    pub(crate) size: usize,
    /// Of ours: what is asked for besides
    #[arg(long, default_value_t)]
    pub(crate) extra: Extra,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Rounds {
    /// Only these transports
    #[arg(long, value_delimiter = ',', value_name = "TRANSPORT")]
    pub(crate) only: Vec<Group>,
    /// Only these contenders; floors and peers that they are compared with are added
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub(crate) contender: Vec<Contender>,
    /// How many calls wait at once
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 64, 256])]
    pub(crate) concurrency: Vec<usize>,
    /// Sizes of bodies, in bytes
    #[arg(long, value_delimiter = ',', default_values_t = [64, 1024, 65536])]
    pub(crate) size: Vec<usize>,
    /// How often everything is measured
    #[arg(long, default_value_t = 3)]
    pub(crate) rounds: usize,
    /// How long each point is measured, after a warm-up of a third of it
    #[arg(long, default_value_t = 1.0)]
    pub(crate) seconds: f64,
    /// How often a point is measured again while other programs take over a quarter of a core; the quietest counts
    #[arg(long, default_value_t = 2)]
    pub(crate) repeat: usize,
    /// Threads of client and server: 1 is Tokio's current-thread runtime
    #[arg(long, default_value_t = 1)]
    pub(crate) workers: usize,
    /// How many requests a server works on at once, where it has such a limit
    #[arg(long, default_value_t = 256)]
    pub(crate) prefetch: u16,
    /// Where all figures go
    #[arg(long, value_name = "FILE", default_value = "target/bench/bench.json")]
    pub(crate) json: PathBuf,
    /// Where the tables go, which are printed as well
    #[arg(long, value_name = "FILE", default_value = "target/bench/bench.md")]
    pub(crate) markdown: PathBuf,
    /// Where the plot goes
    #[arg(long, value_name = "FILE", default_value = "target/bench/bench.svg")]
    pub(crate) svg: PathBuf,
}

impl Rounds {
    /// The contenders of a transport that are to run.
    pub(crate) fn contenders(&self, group: Group) -> Vec<Contender> {
        let asked = |contender: Contender| {
            self.contender.is_empty()
                || self.contender.contains(&contender)
                || self
                    .contender
                    .iter()
                    .any(|&asked| self.is_beside(asked, contender))
        };
        Contender::ALL
            .into_iter()
            .filter(|contender| contender.group() == group && asked(*contender))
            .filter(|contender| contender.is_installed())
            .collect()
    }

    /// The transports that are to run.
    pub(crate) fn groups(&self) -> impl Iterator<Item = Group> {
        let groups = Group::ALL.into_iter();
        groups.filter(|group| self.only.is_empty() || self.only.contains(group))
    }

    fn is_beside(&self, contender: Contender, other: Contender) -> bool {
        let mut points = self
            .concurrency
            .iter()
            .flat_map(|concurrency| self.size.iter().map(move |size| (*concurrency, *size)));
        contender.peers().contains(&other)
            || points
                .any(|(concurrency, size)| contender.floors(concurrency, size).contains(&other))
    }
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Role {
    #[arg(long)]
    pub(crate) contender: Contender,
    #[arg(long, default_value = "")]
    pub(crate) url: String,
    #[arg(long)]
    pub(crate) service: String,
    #[arg(long)]
    pub(crate) workers: usize,
    #[arg(long)]
    pub(crate) prefetch: u16,
    /// Of ours: how many servers, each on a connection of its own
    #[arg(long, default_value_t = 1)]
    pub(crate) servers: usize,
    /// Of ours: how many services each server has
    #[arg(long, default_value_t = 1)]
    pub(crate) services: usize,
    /// Of ours: how many clients, of which one calls
    #[arg(long, default_value_t = 1)]
    pub(crate) clients: usize,
    /// Of ours: how many calls wait for a server that is not there
    #[arg(long, default_value_t = 0)]
    pub(crate) pending: usize,
    /// Of ours: what is asked for besides
    #[arg(long, default_value_t)]
    pub(crate) extra: Extra,
}

impl Role {
    /// A contender by itself.
    pub(crate) fn plain(
        contender: Contender,
        url: String,
        service: String,
        workers: usize,
        prefetch: u16,
    ) -> Self {
        Self {
            contender,
            url,
            service,
            workers,
            prefetch,
            servers: 1,
            services: 1,
            clients: 1,
            pending: 0,
            extra: Extra::None,
        }
    }

    /// The arguments that say the same.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let values = [
            ("contender", self.contender.to_string()),
            ("url", self.url.clone()),
            ("service", self.service.clone()),
            ("workers", self.workers.to_string()),
            ("prefetch", self.prefetch.to_string()),
            ("servers", self.servers.to_string()),
            ("services", self.services.to_string()),
            ("clients", self.clients.to_string()),
            ("pending", self.pending.to_string()),
            ("extra", self.extra.to_string()),
        ];
        values
            .into_iter()
            .map(|(name, value)| format!("--{name}={value}"))
            .collect()
    }

    pub(crate) fn place(&self) -> Place {
        Place {
            url: self.url.clone(),
            service: self.service.clone(),
            prefetch: self.prefetch,
            servers: self.servers,
            services: self.services,
            clients: self.clients,
            pending: self.pending,
            extra: self.extra,
        }
    }
}

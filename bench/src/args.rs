//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::contenders::{Contender, Group, Place};

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
    /// One contender's server, for the process that measures
    #[command(hide = true)]
    Serve(Role),
    /// One contender's client, for the process that measures
    #[command(hide = true)]
    Call(Role),
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
}

impl Role {
    pub(crate) fn place(&self) -> Place {
        Place {
            url: self.url.clone(),
            service: self.service.clone(),
            prefetch: self.prefetch,
        }
    }
}

//! What it costs a plain call that something besides was asked for, each as a ratio to a call without it.

use std::fs;

use serde::Serialize;

use crate::Failure;
use crate::args::{Features, Role};
use crate::brokers::Brokers;
use crate::contenders::{Contender, Extra, Group};
use crate::load::{Arrivals, Figures};
use crate::pair::{Pair, unique_service};
use crate::report::{self, median};
use crate::roles::{self, Often};
use crate::{idle, instructions};

const SIZE: usize = 64;

/// One option over one transport.
#[derive(Debug, Serialize)]
struct Cost {
    extra: Extra,
    transport: Group,
    /// Counted instructions of a call with it, and its ratio to one without; in memory.
    instructions: Option<[f64; 2]>,
    /// Processor time of client, server and broker for a call, with it by without: in each round, then the median.
    cpu: f64,
    /// The same of the time that passes for a call.
    time: f64,
    /// What Redis executes for one call at a time, without and with it.
    commands: Option<[f64; 2]>,
}

pub(crate) async fn run(features: &Features) -> Result<(), Failure> {
    let mut costs = Vec::new();
    for group in Group::ALL {
        if features.only.is_empty() || features.only.contains(&group) {
            measure_all(features, group, &mut costs).await?;
        }
    }
    print(&costs);
    report::save(&features.json, &serde_json::to_string_pretty(&costs)?)
}

async fn measure_all(
    features: &Features,
    group: Group,
    costs: &mut Vec<Cost>,
) -> Result<(), Failure> {
    let contender = match group {
        Group::Memory => Contender::Memory,
        Group::Redis => Contender::Redis,
        Group::Rabbitmq => Contender::AmqpQuorum,
    };
    let brokers = Brokers::start(&[contender]).await?;
    let count = |extra| match group {
        Group::Memory => instructions::of_call(contender, extra, features.concurrency).map(Some),
        Group::Redis | Group::Rabbitmq => Ok(None),
    };
    let plain = count(Extra::None)?;
    for extra in Extra::ALL {
        eprintln!("{}, {extra}", group.title());
        let instructions = count(extra)?.zip(plain);
        let role = |extra| {
            let url = brokers.url(contender.needs());
            let plain = Role::plain(contender, url, unique_service(contender), 1, 256);
            Role { extra, ..plain }
        };
        let roles = [role(Extra::None), role(extra)];
        let [plain, with] = roles.clone();
        let mut pairs = [
            Pair::start(plain, &brokers).await?,
            Pair::start(with, &brokers).await?,
        ];
        let figures = in_turns(features, &mut pairs).await?;
        let commands = match group {
            Group::Redis => {
                let url = brokers.url(contender.needs());
                let [plain, with] = &roles;
                Some([commands(plain, &url).await?, commands(with, &url).await?])
            }
            Group::Memory | Group::Rabbitmq => None,
        };
        for pair in pairs {
            pair.stop().await;
        }
        for role in &roles {
            // Most have none.
            let _ = fs::remove_file(Extra::outbox(&role.service));
        }
        let ratio = |of: fn(&Figures) -> f64| {
            median(figures.iter().map(|[plain, with]| of(with) / of(plain)))
        };
        costs.push(Cost {
            extra,
            transport: group,
            instructions: instructions.map(|(with, plain)| [with, with / plain]),
            cpu: ratio(|figures| figures.cpu_per_1000 + figures.broker_cpu_per_1000),
            time: ratio(|figures| 1.0 / figures.calls_per_second),
            commands,
        });
    }
    Ok(())
}

async fn in_turns(
    features: &Features,
    [plain, with]: &mut [Pair; 2],
) -> Result<Vec<[Figures; 2]>, Failure> {
    let mut figures = Vec::new();
    let (concurrency, seconds) = (features.concurrency, features.seconds);
    for _ in 0..features.rounds {
        figures.push([
            plain
                .measure(concurrency, SIZE, seconds, Arrivals::Closed)
                .await?,
            with.measure(concurrency, SIZE, seconds, Arrivals::Closed)
                .await?,
        ]);
    }
    Ok(figures)
}

/// How many commands Redis executes for a call, those within its scripts among them, with one call at a time, so that there are no
/// batches. Two numbers of calls are compared: what connecting costs is in both.
async fn commands(role: &Role, url: &str) -> Result<f64, Failure> {
    const CALLS: [usize; 2] = [100, 1_100];
    let mut counts = [0.0; 2];
    for (calls, count) in CALLS.into_iter().zip(&mut counts) {
        let before = idle::commands(url).await?;
        let often = Often {
            concurrency: 1,
            calls,
            size: SIZE,
        };
        roles::call_often(role, often).await?;
        *count = idle::commands(url).await? - before;
    }
    let [few, many] = counts;
    Ok((many - few) / (CALLS[1] - CALLS[0]) as f64)
}

fn print(costs: &[Cost]) {
    let head = [
        "transport",
        "with",
        "instructions a call",
        "ratio",
        "CPU, ratio",
        "time, ratio",
        "commands a call, without and with",
    ];
    let mut lines = vec![head.map(str::to_owned).to_vec()];
    for cost in costs {
        let [instructions, ratio] = match cost.instructions {
            Some([with, ratio]) => [format!("{with:.0}"), format!("{ratio:.3}")],
            None => [String::new(), String::new()],
        };
        lines.push(vec![
            cost.transport.title().to_owned(),
            cost.extra.to_string(),
            instructions,
            ratio,
            format!("{:.2}", cost.cpu),
            format!("{:.2}", cost.time),
            cost.commands
                .map_or_else(String::new, |[plain, with]| format!("{plain:.1} {with:.1}")),
        ]);
    }
    println!("{}", report::aligned(&lines));
}

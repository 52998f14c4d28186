//! The run: every contender at every point, interleaved, in rounds.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::Failure;
use crate::args::{Role, Rounds};
use crate::brokers::Running;
use crate::contenders::{Contender, Group, Needs};
use crate::cpu::Watched;
use crate::load::Point;
use crate::machine::Machine;
use crate::process::Half;
use crate::report::{Report, Sample, Settings};

/// Measures everything that is asked for, prints it, and writes the files.
pub(crate) async fn run(rounds: &Rounds) -> Result<(), Failure> {
    let mut report = Report::new(Machine::look(), Settings::new(rounds));
    let mut failures = Vec::new();
    for group in rounds.groups() {
        let contenders = rounds.contenders(group);
        if !contenders.is_empty() {
            run_group(rounds, group, &contenders, &mut report, &mut failures).await?;
        }
    }
    report.write(&rounds.json, &rounds.markdown, &rounds.svg)?;
    match failures.is_empty() {
        true => Ok(()),
        false => Err(failures.join("; ").into()),
    }
}

async fn run_group(
    rounds: &Rounds,
    group: Group,
    contenders: &[Contender],
    report: &mut Report,
    failures: &mut Vec<String>,
) -> Result<(), Failure> {
    let mut brokers = BTreeMap::new();
    for needs in contenders.iter().map(|contender| contender.needs()) {
        if let std::collections::btree_map::Entry::Vacant(entry) = brokers.entry(needs) {
            let broker = Running::start(needs).await?;
            report.brokers.extend(broker.name());
            entry.insert(broker);
        }
    }
    let points: Vec<(usize, usize)> = rounds
        .size
        .iter()
        .flat_map(|&size| rounds.concurrency.iter().map(move |&calls| (calls, size)))
        .collect();
    let mut pairs = Vec::new();
    for &contender in contenders {
        pairs.push(Pair::start(rounds, contender, &brokers).await?);
    }
    for round in 0..rounds.rounds {
        for (index, &(concurrency, size)) in points.iter().enumerate() {
            // Whoever is first meets another machine than whoever is last: all take turns.
            let turn = (round + index) % pairs.len().max(1);
            pairs.rotate_left(turn);
            let mut lost = Vec::new();
            for pair in &mut pairs {
                let contender = pair.contender;
                match pair.measure(rounds, concurrency, size).await {
                    Ok(figures) => {
                        eprintln!(
                            "{} round {} {contender:<17} {concurrency:>4} x {size:>5} B: {:>9.0} calls/s, p50 {:.0} µs",
                            group.title(),
                            round + 1,
                            figures.calls_per_second,
                            figures.p50_us,
                        );
                        report.samples.push(Sample {
                            round,
                            contender,
                            concurrency,
                            size,
                            figures,
                        });
                    }
                    Err(error) => {
                        let message = format!("{contender} at {concurrency} x {size} B: {error}");
                        eprintln!("{message}");
                        failures.push(message);
                        lost.push(contender);
                    }
                }
            }
            // What failed may be in any state: the next point begins with a new pair.
            for contender in lost {
                pairs.retain(|pair| pair.contender != contender);
                pairs.push(Pair::start(rounds, contender, &brokers).await?);
            }
        }
    }
    for pair in pairs {
        pair.stop().await;
    }
    Ok(())
}

/// The two halves of a contender.
struct Pair {
    contender: Contender,
    client: Half,
    server: Option<Half>,
    watched: Watched,
}

impl Pair {
    async fn start(
        rounds: &Rounds,
        contender: Contender,
        brokers: &BTreeMap<Needs, Running>,
    ) -> Result<Self, Failure> {
        let broker = brokers.get(&contender.needs());
        let role = Role {
            contender,
            url: broker.map(Running::url).unwrap_or_default(),
            service: format!("bench-{contender}-{:x}", unique()),
            workers: rounds.workers,
            prefetch: rounds.prefetch,
        };
        let server = match contender.group() {
            Group::Memory => None,
            _ => Some(Half::start("serve", &role).await?),
        };
        let client = Half::start("call", &role).await?;
        let ends = server.iter().chain([&client]).map(Half::id).collect();
        let broker = broker.map(Running::processes).unwrap_or_default();
        Ok(Self {
            contender,
            client,
            server,
            watched: Watched { ends, broker },
        })
    }

    async fn measure(
        &mut self,
        rounds: &Rounds,
        concurrency: usize,
        size: usize,
    ) -> Result<crate::load::Figures, Failure> {
        let length = Duration::try_from_secs_f64(rounds.seconds)?;
        let point = Point {
            concurrency,
            size,
            warm_up: length / 3,
            length,
            watched: self.watched.clone(),
        };
        self.client.measure(&point).await
    }

    async fn stop(self) {
        self.client.stop().await;
        if let Some(server) = self.server {
            server.stop().await;
        }
    }
}

/// A number that no other name of this run has.
fn unique() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed) | u64::from(std::process::id()) << 16
}

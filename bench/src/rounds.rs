//! The run: every contender at every point, interleaved, in rounds.

use crate::Failure;
use crate::args::{Role, Rounds};
use crate::brokers::Brokers;
use crate::contenders::{Contender, Group};
use crate::load::{Arrivals, Figures};
use crate::machine::Machine;
use crate::pair::{Pair, unique_service};
use crate::report::{Report, Sample, Settings};

/// With less than so many cores of other load a point is good.
const QUIET: f64 = 0.25;

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
    let brokers = Brokers::start(contenders).await?;
    report.brokers.extend(brokers.names());
    let points: Vec<(usize, usize)> = rounds
        .size
        .iter()
        .flat_map(|&size| rounds.concurrency.iter().map(move |&calls| (calls, size)))
        .collect();
    let mut pairs = Vec::new();
    for &contender in contenders {
        pairs.push(Pair::start(role(rounds, contender, &brokers), &brokers).await?);
    }
    for round in 0..rounds.rounds {
        for (index, &(concurrency, size)) in points.iter().enumerate() {
            // Whoever is first meets another machine than whoever is last: all take turns.
            let turn = (round + index) % pairs.len().max(1);
            pairs.rotate_left(turn);
            let mut lost = Vec::new();
            for pair in &mut pairs {
                let contender = pair.contender();
                match quietest(pair, rounds, concurrency, size).await {
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
                pairs.retain(|pair| pair.contender() != contender);
                pairs.push(Pair::start(role(rounds, contender, &brokers), &brokers).await?);
            }
        }
    }
    for pair in pairs {
        pair.stop().await;
    }
    Ok(())
}

/// Measures a point, again while other programs disturb it, and takes the quietest.
async fn quietest(
    pair: &mut Pair,
    rounds: &Rounds,
    concurrency: usize,
    size: usize,
) -> Result<Figures, Failure> {
    let mut quietest: Option<Figures> = None;
    for _ in 0..=rounds.repeat {
        let figures = pair
            .measure(concurrency, size, rounds.seconds, Arrivals::Closed)
            .await?;
        let quiet = figures.other_load <= QUIET;
        if quietest
            .as_ref()
            .is_none_or(|known| figures.other_load < known.other_load)
        {
            quietest = Some(figures);
        }
        if quiet {
            break;
        }
    }
    quietest.ok_or_else(|| "nothing was measured".into())
}

fn role(rounds: &Rounds, contender: Contender, brokers: &Brokers) -> Role {
    let url = brokers.url(contender.needs());
    let service = unique_service(contender);
    Role::plain(contender, url, service, rounds.workers, rounds.prefetch)
}

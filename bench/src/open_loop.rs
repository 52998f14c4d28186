//! Latency at a part of the peak: calls begin when they are due.

use serde::Serialize;

use crate::Failure;
use crate::args::{OpenLoop, Role};
use crate::brokers::Brokers;
use crate::contenders::{Contender, Group};
use crate::load::{Arrivals, Figures};
use crate::pair::{Pair, unique_service};
use crate::report::{self, median};

/// How many calls at once are taken for the peak.
const PEAK: usize = 256;

/// One contender at one part of its peak in one round.
#[derive(Debug, Serialize)]
struct Sample {
    round: usize,
    contender: Contender,
    load: f64,
    /// The most calls a second of the same loop, with 256 under way, just before.
    peak: f64,
    figures: Figures,
}

pub(crate) async fn run(open: &OpenLoop) -> Result<(), Failure> {
    let mut samples = Vec::new();
    let mut failures = Vec::new();
    for group in Group::ALL {
        let contenders: Vec<Contender> = open
            .contender
            .iter()
            .copied()
            .filter(|contender| contender.group() == group)
            .collect();
        let brokers = Brokers::start(&contenders).await?;
        for round in 0..open.rounds {
            for &contender in &contenders {
                // A pair of its own: what was too much for the last one waits nowhere.
                match measure(open, contender, &brokers, round, &mut samples).await {
                    Ok(()) => eprintln!("round {} {contender}", round + 1),
                    Err(error) => failures.push(format!("{contender}: {error}")),
                }
            }
        }
    }
    print(open, &samples);
    report::save(&open.json, &serde_json::to_string_pretty(&samples)?)?;
    match failures.is_empty() {
        true => Ok(()),
        false => Err(failures.join("; ").into()),
    }
}

async fn measure(
    open: &OpenLoop,
    contender: Contender,
    brokers: &Brokers,
    round: usize,
    samples: &mut Vec<Sample>,
) -> Result<(), Failure> {
    let url = brokers.url(contender.needs());
    let role = Role::plain(contender, url, unique_service(contender), open.workers, 256);
    let mut pair = Pair::start(role, brokers).await?;
    for &load in &open.load {
        let peak = pair
            .measure(PEAK, open.size, open.seconds / 2.0, Arrivals::Saturated)
            .await?;
        let peak = peak.calls_per_second;
        let rate = Arrivals::Open(peak * load);
        let figures = pair.measure(PEAK, open.size, open.seconds, rate).await?;
        samples.push(Sample {
            round,
            contender,
            load,
            peak,
            figures,
        });
    }
    pair.stop().await;
    Ok(())
}

fn print(open: &OpenLoop, samples: &[Sample]) {
    let head = [
        "contender",
        "of its peak",
        "calls/s",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
    ];
    let mut lines = vec![head.map(str::to_owned).to_vec()];
    for &contender in &open.contender {
        for &load in &open.load {
            let figure = |figure: fn(&Figures) -> f64| {
                let own = samples
                    .iter()
                    .filter(|sample| sample.contender == contender && sample.load == load);
                format!("{:.0}", median(own.map(|sample| figure(&sample.figures))))
            };
            lines.push(vec![
                contender.to_string(),
                format!("{:.0} %", load * 100.0),
                figure(|figures| figures.calls_per_second),
                figure(|figures| figures.p50_us),
                figure(|figures| figures.p99_us),
                figure(|figures| figures.p999_us),
            ]);
        }
    }
    println!("{}", report::aligned(&lines));
}

//! Medians of the rounds, and ratios inside each.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::contenders::{Contender, Kind};
use crate::load::Figures;
use crate::report::Sample;

/// One contender at one point: medians of the rounds.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) contender: Contender,
    pub(crate) concurrency: usize,
    pub(crate) size: usize,
    pub(crate) figures: Figures,
    /// To the floor of the same guarantee; where there are several, to the fastest of each round.
    pub(crate) floor: Option<Ratios>,
    /// To the peer.
    pub(crate) peer: Option<Ratios>,
}

/// A contender's figure by another's in the same round; the median of the rounds.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Ratios {
    /// The other one; in the last round, if it changed.
    pub(crate) to: Contender,
    pub(crate) calls_per_second: f64,
    /// The least and the most of `calls_per_second` in any round.
    pub(crate) range: [f64; 2],
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) cpu: f64,
}

type Point = (Contender, usize, usize);

pub(super) fn rows(samples: &[Sample]) -> Vec<Row> {
    let mut points: BTreeMap<Point, Vec<&Sample>> = BTreeMap::new();
    for sample in samples {
        let point = (sample.contender, sample.size, sample.concurrency);
        points.entry(point).or_default().push(sample);
    }
    points
        .into_iter()
        .map(|((contender, size, concurrency), own)| {
            let floors = match contender.kind() {
                Kind::Floor => &[],
                _ => contender.floors(concurrency, size),
            };
            let peers = match contender.kind() {
                Kind::Ours => contender.peers(),
                _ => &[],
            };
            Row {
                contender,
                concurrency,
                size,
                figures: medians(&own),
                floor: ratios(samples, &own, floors),
                peer: ratios(samples, &own, peers),
            }
        })
        .collect()
}

fn medians(samples: &[&Sample]) -> Figures {
    let of = |figure: fn(&Figures) -> f64| median(samples.iter().map(|s| figure(&s.figures)));
    Figures {
        calls_per_second: of(|f| f.calls_per_second),
        p50_us: of(|f| f.p50_us),
        p99_us: of(|f| f.p99_us),
        p999_us: of(|f| f.p999_us),
        cpu_per_1000: of(|f| f.cpu_per_1000),
        broker_cpu_per_1000: of(|f| f.broker_cpu_per_1000),
        other_load: of(|f| f.other_load),
    }
}

fn ratios(all: &[Sample], own: &[&Sample], others: &[Contender]) -> Option<Ratios> {
    let pairs: Vec<(&Sample, &Sample)> = own
        .iter()
        .filter_map(|&sample| Some((sample, fastest(all, sample, others)?)))
        .collect();
    let (_, last) = pairs.last()?;
    let ratios = |figure: fn(&Figures) -> f64| {
        let ratio = move |(a, b): &(&Sample, &Sample)| figure(&a.figures) / figure(&b.figures);
        pairs.iter().map(ratio).collect::<Vec<f64>>()
    };
    let rates = ratios(|f| f.calls_per_second);
    Some(Ratios {
        to: last.contender,
        range: [
            rates.iter().copied().fold(f64::INFINITY, f64::min),
            rates.iter().copied().fold(0.0, f64::max),
        ],
        calls_per_second: median(rates),
        p50: median(ratios(|f| f.p50_us)),
        p99: median(ratios(|f| f.p99_us)),
        cpu: median(ratios(|f| f.cpu_per_1000)),
    })
}

/// The fastest of the others at the same point in the same round.
fn fastest<'a>(all: &'a [Sample], sample: &Sample, others: &[Contender]) -> Option<&'a Sample> {
    all.iter()
        .filter(|other| {
            others.contains(&other.contender)
                && (other.round, other.concurrency, other.size)
                    == (sample.round, sample.concurrency, sample.size)
        })
        .max_by(|a, b| {
            a.figures
                .calls_per_second
                .total_cmp(&b.figures.calls_per_second)
        })
}

/// The middle one; of an even number, the mean of both. Not a number if there is none.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.get(middle), values.len() % 2) {
        (None, _) => f64::NAN,
        (Some(value), 1) => *value,
        (Some(value), _) => (value + values.get(middle - 1).unwrap_or(value)) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(round: usize, contender: Contender, rate: f64) -> Sample {
        let figures = Figures {
            calls_per_second: rate,
            p50_us: 1e6 / rate,
            p99_us: 2e6 / rate,
            p999_us: 3e6 / rate,
            cpu_per_1000: 10.0 / rate,
            broker_cpu_per_1000: 0.0,
            other_load: 0.0,
        };
        Sample {
            round,
            contender,
            concurrency: 64,
            size: 64,
            figures,
        }
    }

    #[test]
    fn a_ratio_is_taken_inside_its_round() {
        // The machine is twice as slow in the second round, and the ratio is not.
        let rates = [(0, 100.0, 90.0), (1, 50.0, 45.0), (2, 100.0, 110.0)];
        let samples: Vec<Sample> = rates
            .into_iter()
            .flat_map(|(round, floor, ours)| {
                [
                    sample(round, Contender::Crel, floor),
                    sample(round, Contender::Redis, ours),
                ]
            })
            .collect();
        let rows = rows(&samples);
        let ours = rows
            .iter()
            .find(|row| row.contender == Contender::Redis)
            .unwrap();
        let floor = ours.floor.as_ref().unwrap();
        assert_eq!(floor.to, Contender::Crel);
        assert!((floor.calls_per_second - 0.9).abs() < 1e-9);
        assert!((floor.range[1] - 1.1).abs() < 1e-9);
        assert!((ours.figures.calls_per_second - 90.0).abs() < 1e-9);
        assert!(ours.peer.is_none());
    }

    #[test]
    fn of_several_floors_the_fastest_counts() {
        let mut samples = vec![
            sample(0, Contender::Crel, 10.0),
            sample(0, Contender::BSpawned, 20.0),
            sample(0, Contender::Redis, 20.0),
        ];
        for sample in &mut samples {
            sample.size = 64 * 1024;
        }
        let rows = rows(&samples);
        let floor = rows.iter().find_map(|row| row.floor.as_ref()).unwrap();
        assert_eq!(floor.to, Contender::BSpawned);
    }

    #[test]
    fn the_median() {
        assert!((median([3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median([4.0, 1.0]) - 2.5).abs() < 1e-9);
        assert!(median([]).is_nan());
    }
}

//! The plot: calls a second over concurrency, one panel for each transport, the smallest bodies, both axes logarithmic.

use std::fmt::Write;

use super::Row;
use crate::contenders::{Contender, Group, Kind};

const WIDTH: f64 = 340.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 52.0;
const TOP: f64 = 34.0;
/// Between two panels: the legend of the left one is in it.
const LEGEND: f64 = 150.0;
const BOTTOM: f64 = 40.0;

/// Dark enough for white paper, and told apart by most eyes.
const COLOURS: [&str; 7] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#555555",
];

pub(super) fn svg(rows: &[Row]) -> String {
    let size = rows.iter().map(|row| row.size).min().unwrap_or_default();
    let groups: Vec<Group> = Group::ALL
        .into_iter()
        .filter(|group| rows.iter().any(|row| row.contender.group() == *group))
        .collect();
    let panel = LEFT + WIDTH + LEGEND;
    let (width, height) = (panel * groups.len() as f64, TOP + HEIGHT + BOTTOM);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    for (index, group) in groups.into_iter().enumerate() {
        let rows: Vec<&Row> = rows
            .iter()
            .filter(|row| row.contender.group() == group && row.size == size)
            .collect();
        let title = format!("{}: calls/s over calls at once, {size} B", group.title());
        let _ = writeln!(
            text,
            "<g transform=\"translate({} {TOP})\">\n<text x=\"0\" y=\"-14\" font-weight=\"bold\">{title}</text>",
            panel * index as f64 + LEFT
        );
        text.push_str(&axes_and_lines(&rows));
        text.push_str("</g>\n");
    }
    text.push_str("</svg>\n");
    text
}

fn axes_and_lines(rows: &[&Row]) -> String {
    let rate = |row: &&Row| row.figures.calls_per_second.max(1.0);
    let lowest = rows.iter().map(rate).fold(f64::INFINITY, f64::min);
    let highest = rows.iter().map(rate).fold(1.0, f64::max);
    let (low, mut high) = (lowest.log10().floor(), highest.log10().ceil());
    if high <= low {
        high = low + 1.0;
    }
    let y = |rate: f64| HEIGHT * (high - rate.log10()) / (high - low);
    let mut columns: Vec<usize> = rows.iter().map(|row| row.concurrency).collect();
    columns.sort_unstable();
    columns.dedup();
    let steps = columns.len().saturating_sub(1).max(1) as f64;
    let x = |concurrency: usize| {
        let column = columns.iter().position(|known| *known == concurrency);
        WIDTH * column.unwrap_or_default() as f64 / steps
    };

    let mut text = String::new();
    let mut power = low;
    while power <= high {
        let (height, label) = (y(10_f64.powf(power)), thousands(10_f64.powf(power)));
        let _ = writeln!(
            text,
            "<path d=\"M0 {height:.1}H{WIDTH}\" stroke=\"#ddd\"/><text x=\"-6\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            height + 4.0
        );
        power += 1.0;
    }
    for &column in &columns {
        let _ = writeln!(
            text,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{column}</text>",
            x(column),
            HEIGHT + 18.0
        );
    }
    let mut contenders: Vec<Contender> = rows.iter().map(|row| row.contender).collect();
    contenders.sort();
    contenders.dedup();
    for (index, &contender) in contenders.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        // Ours are solid and thick.
        let style = match contender.kind() {
            Kind::Ours => "stroke-width=\"2.5\"",
            Kind::Floor => "stroke-width=\"1.5\" stroke-dasharray=\"6 3\"",
            Kind::Peer => "stroke-width=\"1.5\" stroke-dasharray=\"2 3\"",
        };
        let points: Vec<String> = rows
            .iter()
            .filter(|row| row.contender == contender)
            .map(|row| format!("{:.1},{:.1}", x(row.concurrency), y(rate(row))))
            .collect();
        let height = 10.0 + 18.0 * index as f64;
        let _ = writeln!(
            text,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" {style}/>\n\
             <path d=\"M{} {height}h24\" stroke=\"{colour}\" {style}/><text x=\"{}\" y=\"{}\">{contender}</text>",
            points.join(" "),
            WIDTH + 14.0,
            WIDTH + 44.0,
            height + 4.0
        );
    }
    text
}

fn thousands(rate: f64) -> String {
    match rate {
        rate if rate >= 1e6 => format!("{:.0}M", rate / 1e6),
        rate if rate >= 1e3 => format!("{:.0}k", rate / 1e3),
        rate => format!("{rate:.0}"),
    }
}

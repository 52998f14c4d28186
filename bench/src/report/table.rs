//! The tables, as Markdown that is also readable as text.

use std::fmt::Write;

use super::summary::Ratios;
use super::{Report, Row};
use crate::contenders::Group;

const HEAD: [&str; 12] = [
    "contender",
    "calls",
    "calls/s",
    "p50 µs",
    "p99 µs",
    "CPU s/1000",
    "broker",
    "ratio to",
    "calls/s [least-most]",
    "p50",
    "p99",
    "CPU",
];

pub(super) fn markdown(report: &Report, rows: &[Row]) -> String {
    let mut text = preamble(report);
    for group in Group::ALL {
        let mut sizes: Vec<usize> = rows
            .iter()
            .filter(|row| row.contender.group() == group)
            .map(|row| row.size)
            .collect();
        sizes.sort_unstable();
        sizes.dedup();
        for size in sizes {
            let of_table = |row: &&Row| row.contender.group() == group && row.size == size;
            let _ = write!(text, "\n## {}, bodies of {size} bytes\n\n", group.title());
            text.push_str(&grid(rows.iter().filter(of_table)));
        }
    }
    text
}

fn preamble(report: &Report) -> String {
    let (machine, settings) = (&report.machine, &report.settings);
    let load = super::median(
        report
            .samples
            .iter()
            .map(|sample| sample.figures.other_load),
    );
    format!(
        "# Measured\n\n{} cores, {}, {} GiB, {}; {}; {}; {}; revision {}.\n\
         Client and server on Tokio's runtime, {}; {} rounds of {} s a point; prefetch {}; other load on the machine {:.2} cores (median).\n",
        machine.cores,
        machine.processor,
        machine.memory_gib,
        machine.system,
        machine.rust,
        machine.crates.join(", "),
        report.brokers.join(", "),
        machine.revision,
        settings.runtime,
        settings.rounds,
        settings.seconds,
        settings.prefetch,
        load,
    )
}

/// A table whose columns are aligned.
fn grid<'a>(rows: impl Iterator<Item = &'a Row>) -> String {
    let mut lines: Vec<Vec<String>> = vec![HEAD.iter().map(|&head| head.to_owned()).collect()];
    for row in rows {
        lines.push(line(row, row.floor.as_ref()));
        if let Some(peer) = &row.peer {
            let mut second = line(row, Some(peer));
            // The figures are the same as in the line above.
            for cell in second.iter_mut().skip(2).take(5) {
                cell.clear();
            }
            lines.push(second);
        }
    }
    aligned(&lines)
}

/// Lines of cells as a table, its first line the head, the first column left and the others right.
pub(crate) fn aligned(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or_default();
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            let cells = lines.iter().filter_map(|line| line.get(column));
            cells
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(3)
                .max(3)
        })
        .collect();
    let mut text = String::new();
    for (index, line) in lines.iter().enumerate() {
        for (column, (cell, &width)) in line.iter().zip(&widths).enumerate() {
            let _ = match column {
                0 => write!(text, "| {cell:<width$} "),
                _ => write!(text, "| {cell:>width$} "),
            };
        }
        text.push_str("|\n");
        if index == 0 {
            for (column, width) in widths.iter().enumerate() {
                let _ = match column {
                    0 => write!(text, "|{:-<1$}", "", width + 2),
                    _ => write!(text, "|{:-<1$}:", "", width + 1),
                };
            }
            text.push_str("|\n");
        }
    }
    text
}

fn line(row: &Row, ratios: Option<&Ratios>) -> Vec<String> {
    let figures = &row.figures;
    let mut cells = vec![
        row.contender.to_string(),
        row.concurrency.to_string(),
        format!("{:.0}", figures.calls_per_second),
        short(figures.p50_us),
        short(figures.p99_us),
        format!("{:.4}", figures.cpu_per_1000),
        format!("{:.4}", figures.broker_cpu_per_1000),
    ];
    match ratios {
        Some(ratios) => cells.extend([
            ratios.to.to_string(),
            format!(
                "{:.2} [{:.2}-{:.2}]",
                ratios.calls_per_second, ratios.range[0], ratios.range[1]
            ),
            format!("{:.2}", ratios.p50),
            format!("{:.2}", ratios.p99),
            format!("{:.2}", ratios.cpu),
        ]),
        None => cells.extend([const { String::new() }; 5]),
    }
    cells
}

/// Three digits are enough of a latency.
fn short(micros: f64) -> String {
    match micros < 100.0 {
        true => format!("{micros:.1}"),
        false => format!("{micros:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let lines = [["name", "µs"], ["a", "1000"]].map(|line| line.map(str::to_owned).to_vec());
        assert_eq!(
            aligned(&lines),
            "| name |   µs |\n|------|-----:|\n| a    | 1000 |\n"
        );
    }
}

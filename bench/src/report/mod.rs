//! What was measured, as JSON, as tables and as a plot.

mod plot;
mod summary;
mod table;

use std::fs;
use std::path::Path;

use serde::Serialize;

use crate::Failure;
use crate::args::Rounds;
use crate::contenders::Contender;
use crate::load::Figures;
use crate::machine::Machine;

pub(crate) use summary::{Row, median};
pub(crate) use table::aligned;

/// One contender at one point in one round.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Sample {
    pub(crate) round: usize,
    pub(crate) contender: Contender,
    pub(crate) concurrency: usize,
    pub(crate) size: usize,
    pub(crate) figures: Figures,
}

/// How it was measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Settings {
    pub(crate) rounds: usize,
    pub(crate) seconds: f64,
    /// `current-thread`, or how many workers.
    pub(crate) runtime: String,
    pub(crate) prefetch: u16,
}

impl Settings {
    pub(crate) fn new(rounds: &Rounds) -> Self {
        let runtime = match rounds.workers {
            0 | 1 => "current-thread".to_owned(),
            workers => format!("{workers} workers"),
        };
        Self {
            rounds: rounds.rounds,
            seconds: rounds.seconds,
            runtime,
            prefetch: rounds.prefetch,
        }
    }
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) settings: Settings,
    pub(crate) brokers: Vec<String>,
    pub(crate) samples: Vec<Sample>,
}

#[derive(Serialize)]
struct Document<'a> {
    #[serde(flatten)]
    report: &'a Report,
    rows: &'a [Row],
}

impl Report {
    pub(crate) fn new(machine: Machine, settings: Settings) -> Self {
        Self {
            machine,
            settings,
            brokers: Vec::new(),
            samples: Vec::new(),
        }
    }

    /// Prints the tables, and writes the three files.
    pub(crate) fn write(&self, json: &Path, markdown: &Path, svg: &Path) -> Result<(), Failure> {
        let rows = summary::rows(&self.samples);
        let document = Document {
            report: self,
            rows: &rows,
        };
        let table = table::markdown(self, &rows);
        println!("{table}");
        save(json, &serde_json::to_string_pretty(&document)?)?;
        save(markdown, &table)?;
        save(svg, &plot::svg(&rows))?;
        eprintln!(
            "written: {}, {}, {}",
            json.display(),
            markdown.display(),
            svg.display()
        );
        Ok(())
    }
}

/// Writes a file, and makes its directory.
pub(crate) fn save(path: &Path, text: &str) -> Result<(), Failure> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()).into())
}

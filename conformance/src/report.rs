//! What a run says of a transport.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream;
use serde::Serialize;
use tokio::time::Instant;

use crate::case::{Case, Company, Promise, Stop, Verdict};
use crate::cases;
use crate::harness::Harness;

/// How many cases run at once. Most of them wait most of the time.
pub(crate) const CONCURRENCY: usize = 8;

/// The outcome of a whole run.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// What was tested.
    pub transport: String,
    /// How many cases passed.
    pub passed: usize,
    /// How many failed.
    pub failed: usize,
    /// How many need what the transport or the harness does not have.
    pub unsupported: usize,
    /// How many were not run: by the filter, or because there was no broker.
    pub not_run: usize,
    /// Each case, in the suite's order.
    pub cases: Vec<CaseReport>,
}

/// One case of a [`Report`].
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct CaseReport {
    /// `group/case`.
    pub name: &'static str,
    /// The promise that it checks.
    pub promise: Promise,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// How long it took, in seconds.
    pub seconds: f64,
}

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", content = "reason", rename_all = "snake_case")]
pub enum Outcome {
    /// The promise was kept.
    Passed,
    /// It was broken: the step and the rule.
    Failed(String),
    /// The transport or the harness cannot do what the case needs.
    Unsupported(String),
    /// It was not run.
    NotRun(String),
}

impl Outcome {
    fn word(&self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed(_) => "FAILED",
            Self::Unsupported(_) => "unsupported",
            Self::NotRun(_) => "not run",
        }
    }

    fn reason(&self) -> Option<&str> {
        match self {
            Self::Passed => None,
            Self::Failed(reason) | Self::Unsupported(reason) | Self::NotRun(reason) => Some(reason),
        }
    }
}

impl From<Verdict> for Outcome {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Ok(()) => Self::Passed,
            Err(Stop::Failed { step, rule }) => Self::Failed(format!("{step}: {rule}")),
            Err(Stop::Unsupported(reason)) => Self::Unsupported(reason),
        }
    }
}

/// Runs the cases whose name contains `filter` (all, if it is empty), and reports on every case there is.
///
/// Must run within a Tokio runtime with the timer on; with several worker threads it is faster.
pub async fn report(harness: Arc<dyn Harness>, filter: &str) -> Report {
    let all = cases::table();
    let chosen = |company: Company| {
        all.iter()
            .filter(move |case| case.name.contains(filter) && case.company == company)
            .copied()
            .collect::<Vec<_>>()
    };
    let mut reports: Vec<CaseReport> = stream::iter(chosen(Company::Others))
        .map(|case| run_case(case, Arc::clone(&harness)))
        .buffer_unordered(CONCURRENCY)
        .collect()
        .await;
    for case in chosen(Company::Alone) {
        reports.push(run_case(case, Arc::clone(&harness)).await);
    }
    let name = harness.name();
    Report::new(name, |case| {
        let found = reports
            .iter()
            .find(|report| report.name == case.name)
            .cloned();
        found.unwrap_or_else(|| CaseReport::not_run(case, "left out by the filter"))
    })
}

async fn run_case(case: &'static Case, harness: Arc<dyn Harness>) -> CaseReport {
    let started = Instant::now();
    let outcome = Outcome::from(case.execute(harness).await);
    CaseReport {
        name: case.name,
        promise: case.promise,
        outcome,
        seconds: rounded(started.elapsed()),
    }
}

fn rounded(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e3).round() / 1e3
}

impl CaseReport {
    fn not_run(case: &Case, reason: &str) -> Self {
        Self {
            name: case.name,
            promise: case.promise,
            outcome: Outcome::NotRun(reason.to_owned()),
            seconds: 0.0,
        }
    }
}

impl Report {
    /// The report on a transport whose broker is missing: nothing was run.
    #[must_use]
    pub fn not_run(transport: impl Into<String>, reason: &str) -> Self {
        Self::new(transport.into(), |case| CaseReport::not_run(case, reason))
    }

    /// True if something was run, and nothing failed.
    #[must_use]
    pub fn is_success(&self) -> bool {
        self.passed > 0 && self.failed == 0
    }

    /// The report as JSON, indented.
    #[must_use]
    pub fn to_json(&self) -> String {
        // A report is numbers and text; there is nothing in it that has no JSON form.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    fn new(transport: String, of: impl FnMut(&'static Case) -> CaseReport) -> Self {
        let cases: Vec<CaseReport> = cases::table().into_iter().map(of).collect();
        let count = |word: &str| {
            cases
                .iter()
                .filter(|case| case.outcome.word() == word)
                .count()
        };
        Self {
            transport,
            passed: count("passed"),
            failed: count("FAILED"),
            unsupported: count("unsupported"),
            not_run: count("not run"),
            cases,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self
            .cases
            .iter()
            .map(|case| case.name.len())
            .max()
            .unwrap_or(0);
        writeln!(f, "{}", self.transport)?;
        for case in &self.cases {
            let promise = format!("{:?}", case.promise);
            let word = case.outcome.word();
            write!(
                f,
                "  {:width$}  {promise:<3}  {word:<11}  {:>7.3} s",
                case.name, case.seconds
            )?;
            match case.outcome.reason() {
                Some(reason) => writeln!(f, "  {reason}")?,
                None => writeln!(f)?,
            }
        }
        let Self {
            passed,
            failed,
            unsupported,
            not_run,
            ..
        } = self;
        write!(
            f,
            "{passed} passed, {failed} failed, {unsupported} unsupported, {not_run} not run"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_counts_what_it_lists() {
        let mut index = 0;
        let report = Report::new("broker 1.0".to_owned(), |case| {
            index += 1;
            let outcome = match index {
                1 => Outcome::Passed,
                2 => Outcome::Failed("step: rule".to_owned()),
                3 => Outcome::Unsupported("no hook".to_owned()),
                _ => Outcome::NotRun("no broker".to_owned()),
            };
            CaseReport {
                name: case.name,
                promise: case.promise,
                outcome,
                seconds: 0.25,
            }
        });
        let total = report.cases.len();
        assert_eq!(
            (
                report.passed,
                report.failed,
                report.unsupported,
                report.not_run
            ),
            (1, 1, 1, total - 3)
        );
        assert!(!report.is_success());
        let table = report.to_string();
        assert!(
            table.contains("FAILED         0.250 s  step: rule"),
            "{table}"
        );
        assert!(
            table.ends_with(&format!(
                "1 passed, 1 failed, 1 unsupported, {} not run",
                total - 3
            )),
            "{table}"
        );
    }

    #[test]
    fn json_is_for_programs() {
        let json: serde_json::Value =
            serde_json::from_str(&Report::not_run("broker 1.0", "no broker").to_json()).unwrap();
        assert_eq!(json["transport"], "broker 1.0");
        assert_eq!(json["not_run"], json["cases"].as_array().unwrap().len());
        let first = &json["cases"][0];
        assert_eq!(first["name"], "round_trip/typed");
        assert_eq!(first["promise"], "G1");
        assert_eq!(first["outcome"], "not_run");
        assert_eq!(first["reason"], "no broker");
    }

    #[test]
    fn names_are_unique() {
        let names: std::collections::BTreeSet<_> =
            cases::table().iter().map(|case| case.name).collect();
        assert_eq!(names.len(), cases::table().len());
    }
}

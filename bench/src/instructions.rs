//! Instructions and allocations of a call in memory, counted by valgrind: they do not depend on what else the machine does.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::Failure;
use crate::args::Instructions;
use crate::contenders::{Contender, Extra};
use crate::report;

/// Two runs with different numbers of calls: what start and end cost is in both.
const CALLS: [usize; 2] = [2_000, 10_000];

/// What is counted: who, and how many calls wait at once.
const PATHS: [(Contender, usize); 5] = [
    (Contender::Spawn, 64),
    (Contender::Memory, 1),
    (Contender::Memory, 64),
    (Contender::MemoryJson, 1),
    (Contender::MemoryJson, 64),
];

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Counts {
    /// Of one call.
    instructions: f64,
    allocations: f64,
}

type Paths = BTreeMap<String, Counts>;

pub(crate) fn run(options: &Instructions) -> Result<(), Failure> {
    let mut counted = Paths::new();
    for (contender, concurrency) in PATHS {
        let counts = Counts {
            instructions: of_call(contender, Extra::None, concurrency)?,
            allocations: per_call(contender, concurrency, allocations)?,
        };
        counted.insert(format!("{contender}, {concurrency} at once"), counts);
    }
    let recorded: Paths = match fs::read_to_string(&options.baseline) {
        Ok(text) => serde_json::from_str(&text)?,
        Err(_) => Paths::new(),
    };
    let worst = print(&counted, &recorded);
    if options.record {
        let mut text = serde_json::to_string_pretty(&counted)?;
        text.push('\n');
        report::save(&options.baseline, &text)?;
    }
    match options.limit {
        Some(limit) if recorded.is_empty() => {
            Err(format!("nothing is recorded to hold a limit of {limit} against").into())
        }
        Some(limit) if worst > limit => {
            Err(format!("a count is {worst:.2} times what was recorded").into())
        }
        _ => Ok(()),
    }
}

/// Prints the counts, and gives the largest ratio.
fn print(counted: &Paths, recorded: &Paths) -> f64 {
    let head = [
        "a call of",
        "instructions",
        "ratio to recorded",
        "allocations",
        "ratio to recorded",
    ];
    let mut lines = vec![head.map(str::to_owned).to_vec()];
    let mut worst: f64 = 0.0;
    for (path, counts) in counted {
        let mut ratio = |count: fn(&Counts) -> f64| match recorded.get(path) {
            Some(recorded) => {
                let ratio = count(counts) / count(recorded);
                worst = worst.max(ratio);
                format!("{ratio:.3}")
            }
            None => String::new(),
        };
        lines.push(vec![
            path.clone(),
            format!("{:.0}", counts.instructions),
            ratio(|counts| counts.instructions),
            format!("{:.2}", counts.allocations),
            ratio(|counts| counts.allocations),
        ]);
    }
    println!("{}", report::aligned(&lines));
    worst
}

/// Counted instructions of a call.
pub(crate) fn of_call(
    contender: Contender,
    extra: Extra,
    concurrency: usize,
) -> Result<f64, Failure> {
    per_call(contender, concurrency, |contender, concurrency, calls| {
        instructions(contender, extra, concurrency, calls)
    })
}

fn per_call(
    contender: Contender,
    concurrency: usize,
    count: impl Fn(Contender, usize, usize) -> Result<f64, Failure>,
) -> Result<f64, Failure> {
    let [few, many] = CALLS.map(|calls| calls / concurrency);
    let few_counted = count(contender, concurrency, few)?;
    let many_counted = count(contender, concurrency, many)?;
    let calls = (many - few) * concurrency;
    Ok((many_counted - few_counted) / calls as f64)
}

fn instructions(
    contender: Contender,
    extra: Extra,
    concurrency: usize,
    calls: usize,
) -> Result<f64, Failure> {
    let tool = ["--tool=callgrind", "--callgrind-out-file=/dev/null"];
    let said = valgrind(&tool, contender, extra, concurrency, calls)?;
    number_after(&said, "Collected : ")
}

fn allocations(contender: Contender, concurrency: usize, calls: usize) -> Result<f64, Failure> {
    let tool = ["--tool=memcheck", "--undef-value-errors=no"];
    let said = valgrind(&tool, contender, Extra::None, concurrency, calls)?;
    number_after(&said, "total heap usage: ")
}

/// Runs the path, and gives what valgrind says of it.
fn valgrind(
    tool: &[&str],
    contender: Contender,
    extra: Extra,
    concurrency: usize,
    calls: usize,
) -> Result<String, Failure> {
    let output = Command::new("valgrind")
        .args(tool)
        .arg(std::env::current_exe()?)
        .arg("hot-path")
        .args(["--contender", contender.name()])
        .args(["--concurrency", &concurrency.to_string()])
        .args(["--calls", &calls.to_string()])
        .args(["--extra", &extra.to_string()])
        .output()
        .map_err(|error| format!("valgrind: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    match output.status.success() {
        true => Ok(said),
        false => Err(said.into()),
    }
}

/// The number, which may have commas, that follows some words.
fn number_after(text: &str, words: &str) -> Result<f64, Failure> {
    let (_, rest) = text
        .split_once(words)
        .ok_or_else(|| format!("valgrind does not say {words:?}: {text}"))?;
    let digits: String = rest
        .chars()
        .take_while(|c| c.is_ascii_digit() || *c == ',')
        .filter(char::is_ascii_digit)
        .collect();
    Ok(digits.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valgrind_is_understood() {
        let said =
            "==7== Collected : 18302948\n==7==   total heap usage: 1,234 allocs, 1,200 frees";
        assert_eq!(number_after(said, "Collected : ").unwrap(), 18_302_948.0);
        assert_eq!(number_after(said, "total heap usage: ").unwrap(), 1234.0);
        assert!(number_after(said, "I   refs: ").is_err());
    }
}

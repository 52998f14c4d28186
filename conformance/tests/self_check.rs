//! The suite, tested: it passes on a sound transport, and each planted flaw is caught by the cases that are there for it.

use std::collections::BTreeSet;
use std::error::Error;
use std::process::{Command, ExitCode};
use std::sync::Arc;

use antiphon_conformance::flawed::{Flaw, FlawedHarness};
use antiphon_conformance::{Harness, Missing, Outcome, Suite, cases, report};
use antiphon_memory::MemoryHarness;
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::runtime::Runtime;

/// How many trials run at once. Cases that fail mostly wait for what does not come.
const CONCURRENCY: usize = 24;

/// Set in a process that this one starts, which then is a test target without a broker: how the names of its cases begin.
const WITHOUT_BROKER: &str = "ANTIPHON_SELF_CHECK_WITHOUT_BROKER";

fn main() -> Result<ExitCode, Box<dyn Error>> {
    if let Ok(cases) = std::env::var(WITHOUT_BROKER) {
        let missing = || async { Err(Missing::new("no broker for the self-check")) };
        let suite = Suite::new().harness_for("", &[cases.leak()], missing);
        return Ok(suite.run());
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(CONCURRENCY);
    let runtime = Arc::new(Runtime::new()?);
    let mut trials = vec![
        Trial::test("every_case_has_a_flaw", every_case_has_a_flaw),
        Trial::test("missing_broker_is_ignored", missing_broker_is_ignored),
        Trial::test(
            "missing_broker_fails_where_it_is_required",
            missing_broker_fails_where_it_is_required,
        ),
        Trial::test("no_such_case_fails", no_such_case_fails),
    ];
    for &flaw in Flaw::ALL {
        for &case in flaw.caught_by() {
            let runtime = Arc::clone(&runtime);
            let name = format!("{case} catches {flaw:?}");
            trials.push(Trial::test(name, move || {
                runtime.block_on(is_caught(flaw, case))
            }));
        }
    }
    Ok(libtest_mimic::run(&arguments, trials).exit_code())
}

/// A case that cannot fail proves nothing; and a flaw that names a case which is not there proves nothing either.
fn every_case_has_a_flaw() -> Result<(), Failed> {
    let names: BTreeSet<&str> = cases().iter().map(|case| case.name).collect();
    let caught: BTreeSet<&str> = Flaw::ALL
        .iter()
        .flat_map(|flaw| flaw.caught_by())
        .copied()
        .collect();
    let without: Vec<_> = names.difference(&caught).collect();
    let unknown: Vec<_> = caught.difference(&names).collect();
    if without.is_empty() && unknown.is_empty() {
        return Ok(());
    }
    Err(format!("cases without a flaw: {without:?}; flaws that name no case: {unknown:?}").into())
}

/// Nothing that was not run may read as passed.
fn missing_broker_is_ignored() -> Result<(), Failed> {
    let (success, output) = run_without_broker("", "0")?;
    let result = format!("0 passed; 0 failed; {} ignored", cases().len());
    if success
        && output.contains(&result)
        && output.contains("not run: no broker for the self-check")
    {
        return Ok(());
    }
    Err(format!("it does not say that nothing was run, and why:\n{output}").into())
}

fn missing_broker_fails_where_it_is_required() -> Result<(), Failed> {
    let (success, output) = run_without_broker("", "1")?;
    let result = format!("0 passed; {} failed; 0 ignored", cases().len());
    if !success && output.contains(&result) {
        return Ok(());
    }
    Err(format!("it does not fail:\n{output}").into())
}

/// A misspelt group would pass for ever.
fn no_such_case_fails() -> Result<(), Failed> {
    for (cases, succeeds) in [("payload/", true), ("paylaod/", false)] {
        let (success, output) = run_without_broker(cases, "0")?;
        if success != succeeds {
            return Err(format!("{cases:?}: {success}:\n{output}").into());
        }
    }
    Ok(())
}

/// This very program as a test target without a broker: whether it succeeded, and what it said.
fn run_without_broker(cases: &str, required: &str) -> Result<(bool, String), Failed> {
    let program = std::env::current_exe()?;
    let output = Command::new(program)
        .env(WITHOUT_BROKER, cases)
        .env("ANTIPHON_REQUIRE_BROKERS", required)
        .output()?;
    Ok((
        output.status.success(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
    ))
}

async fn is_caught(flaw: Flaw, case: &str) -> Result<(), Failed> {
    let sound: Arc<dyn Harness> = Arc::new(MemoryHarness::new());
    let report = report(Arc::new(FlawedHarness::new(sound, flaw)), case).await;
    match report
        .cases
        .into_iter()
        .find(|found| found.name == case)
        .map(|found| found.outcome)
    {
        Some(Outcome::Failed(_)) => Ok(()),
        other => Err(format!("it was not caught: {other:?}").into()),
    }
}

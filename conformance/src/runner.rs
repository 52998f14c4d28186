//! The suite as a test target: one trial per case, so that names, filters and results read as in every other test.

use std::fmt;
use std::future::Future;
use std::process::ExitCode;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use tokio::runtime::Runtime;
use tokio::sync::{Mutex, OnceCell, Semaphore};

use crate::brokers::{self, Unavailable};
use crate::case::{Case, Company};
use crate::cases;
use crate::harness::Harness;
use crate::report::{CONCURRENCY, Outcome};

/// Why there is no harness: what is missing, and how to provide it.
#[derive(Clone, Debug)]
pub struct Missing {
    reason: String,
    fails: bool,
}

impl Missing {
    /// There is none because ...
    pub fn new(reason: impl fmt::Display) -> Self {
        Self {
            reason: reason.to_string(),
            fails: brokers::required(),
        }
    }
}

/// A broker of [`brokers`] that could not be had. If it was asked for by URL, its cases fail.
impl From<Unavailable> for Missing {
    fn from(unavailable: Unavailable) -> Self {
        Self {
            reason: unavailable.reason().to_owned(),
            fails: unavailable.is_failure(),
        }
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// The main function of a test target with `harness = false` that tests one transport.
///
/// `start` is called at the first case that is run, on a multi-threaded Tokio runtime, and what it returns is dropped
/// after the last one: let it own the broker. If it says that something is [`Missing`], every case is ignored with that
/// reason, or fails if `ANTIPHON_REQUIRE_BROKERS=1`.
pub fn run<F, Fut>(start: F) -> ExitCode
where
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = Result<Arc<dyn Harness>, Missing>> + Send + 'static,
{
    Suite::new().harness("", start).run()
}

/// The suite for one or several harnesses in one test target.
#[derive(Debug)]
pub struct Suite {
    subjects: Vec<Arc<Subject>>,
    /// One for each case that may run at once; a case that must be alone takes all.
    places: Arc<Semaphore>,
}

impl Suite {
    /// A suite with nothing to test.
    #[must_use]
    pub fn new() -> Self {
        Self {
            subjects: Vec::new(),
            places: Arc::new(Semaphore::new(CONCURRENCY)),
        }
    }

    /// Adds a harness; see [`run`]. The label, if there is one, stands in brackets before the names of its cases.
    #[must_use]
    pub fn harness<F, Fut>(self, label: &str, start: F) -> Self
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = Result<Arc<dyn Harness>, Missing>> + Send + 'static,
    {
        // Every name begins with it.
        self.harness_for(label, &[""], start)
    }

    /// Adds a harness for those cases only whose names begin with one of these, such as `"payload/"`. If one of them begins the name
    /// of no case, all fails.
    #[must_use]
    pub fn harness_for<F, Fut>(mut self, label: &str, cases: &[&'static str], start: F) -> Self
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = Result<Arc<dyn Harness>, Missing>> + Send + 'static,
    {
        let start: Start = Box::new(move || start().boxed());
        self.subjects.push(Arc::new(Subject {
            label: label.to_owned(),
            cases: cases.to_vec(),
            start: Mutex::new(Some(start)),
            harness: OnceCell::new(),
            places: Arc::clone(&self.places),
        }));
        self
    }

    /// Runs what the arguments of this process ask for.
    #[must_use]
    pub fn run(self) -> ExitCode {
        let mut arguments = Arguments::from_args();
        // Cases wait more than they work, so there are more of them at once than there are cores.
        arguments.test_threads.get_or_insert(CONCURRENCY);
        if let Some(start) = self.begins_no_case() {
            eprintln!("no case begins with {start:?}");
            return ExitCode::FAILURE;
        }
        let runtime = match Runtime::new() {
            Ok(runtime) => Arc::new(runtime),
            Err(error) => {
                eprintln!("no runtime: {error}");
                return ExitCode::FAILURE;
            }
        };
        let mut trials = Vec::new();
        for subject in &self.subjects {
            for case in cases::table() {
                if !subject
                    .cases
                    .iter()
                    .any(|start| case.name.starts_with(start))
                {
                    continue;
                }
                let (subject, runtime) = (Arc::clone(subject), Arc::clone(&runtime));
                let label = subject.label.clone();
                let run = move || runtime.block_on(subject.run(case));
                trials.push(Trial::ignorable_test(case.name, run).with_kind(label));
            }
        }
        let conclusion = libtest_mimic::run(&arguments, trials);
        // The harness goes while its runtime still runs: it may have connections and a broker to end.
        let _guard = runtime.enter();
        drop(self);
        conclusion.exit_code()
    }

    /// What was asked for and is not there: nothing would be run for it, and that would read as passed.
    fn begins_no_case(&self) -> Option<&'static str> {
        let mut starts = self.subjects.iter().flat_map(|subject| &subject.cases);
        starts
            .find(|start| {
                !cases::table()
                    .iter()
                    .any(|case| case.name.starts_with(**start))
            })
            .copied()
    }
}

impl Default for Suite {
    fn default() -> Self {
        Self::new()
    }
}

type Start = Box<dyn FnOnce() -> BoxFuture<'static, Result<Arc<dyn Harness>, Missing>> + Send>;

/// A harness that is started by the first case that needs it.
struct Subject {
    label: String,
    /// How the names of its cases begin.
    cases: Vec<&'static str>,
    start: Mutex<Option<Start>>,
    harness: OnceCell<Result<Arc<dyn Harness>, Missing>>,
    places: Arc<Semaphore>,
}

impl Subject {
    async fn run(&self, case: &'static Case) -> Result<Completion, Failed> {
        let places = match case.company {
            Company::Others => 1,
            Company::Alone => CONCURRENCY as u32,
        };
        let _place = self
            .places
            .acquire_many(places)
            .await
            .map_err(Failed::from)?;
        match self.harness.get_or_init(|| self.begin()).await {
            Ok(harness) => match Outcome::from(case.execute(Arc::clone(harness)).await) {
                Outcome::Passed => Ok(Completion::Completed),
                Outcome::Failed(reason) => Err(reason.into()),
                Outcome::Unsupported(reason) => {
                    Ok(Completion::ignored_with(format!("unsupported: {reason}")))
                }
                Outcome::NotRun(reason) => {
                    Ok(Completion::ignored_with(format!("not run: {reason}")))
                }
            },
            Err(missing) if missing.fails => Err(format!("not run: {missing}").into()),
            Err(missing) => Ok(Completion::ignored_with(format!("not run: {missing}"))),
        }
    }

    async fn begin(&self) -> Result<Arc<dyn Harness>, Missing> {
        match self.start.lock().await.take() {
            Some(start) => start().await,
            None => Err(Missing::new("the harness was started before and panicked")),
        }
    }
}

impl fmt::Debug for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subject")
            .field("label", &self.label)
            .finish_non_exhaustive()
    }
}

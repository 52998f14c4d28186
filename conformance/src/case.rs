//! One case: its name, its promise, and how it ends.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use antiphon_core::Error;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::{Serialize, Serializer};

use crate::bench::Bench;
use crate::harness::{Harness, HookError};

/// The longest that one case may take; each of its steps has a shorter bound of its own.
const CASE_LIMIT: Duration = Duration::from_secs(120);

/// What every transport promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Promise {
    /// Every call ends exactly once, at the latest at its deadline.
    G1,
    /// An accepted request is executed at least once, or reported expired, or dead-lettered.
    G2,
    /// A call resolves with the first reply of its own; every other reply is discarded and counted.
    G3,
    /// No handler starts on a request that had expired when it was taken.
    G4,
    /// Every error says truthfully whether the handler was executed.
    G5,
    /// The executions of one request are bounded; what exceeds them is dead-lettered.
    G6,
    /// Nothing is left of a call that is over.
    G7,
    /// A server that lost its lease cannot settle.
    G8,
    /// A transport heals itself.
    G9,
    /// An exclusive subscriber is alone.
    G10,
}

impl Promise {
    /// The promise in three words.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::G1 => "one outcome",
            Self::G2 => "at least once",
            Self::G3 => "one reply",
            Self::G4 => "no late start",
            Self::G5 => "errors tell the truth",
            Self::G6 => "bounded repeats",
            Self::G7 => "nothing leaks",
            Self::G8 => "fencing",
            Self::G9 => "heals itself",
            Self::G10 => "exclusive means one",
        }
    }
}

impl fmt::Display for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?} {}", self.title())
    }
}

impl Serialize for Promise {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{self:?}"))
    }
}

/// How a case ends: well, or stopped.
pub(crate) type Verdict<T = ()> = Result<T, Stop>;

/// Why a case stopped before its end.
#[derive(Clone, Debug)]
pub(crate) enum Stop {
    /// A rule was broken, in a step.
    Failed { step: String, rule: String },
    /// The harness or the transport cannot do what the case needs, and says why.
    Unsupported(String),
}

impl Stop {
    pub(crate) fn failed(step: impl Into<String>, rule: impl Into<String>) -> Self {
        Self::Failed {
            step: step.into(),
            rule: rule.into(),
        }
    }

    /// The error that `step` should not have ended with.
    pub(crate) fn error(step: impl Into<String>, error: &Error) -> Self {
        Self::failed(step, format!("it succeeds, but it failed: {error}"))
    }
}

impl From<HookError> for Stop {
    fn from(error: HookError) -> Self {
        match error {
            HookError::Unsupported(reason) => Self::Unsupported(reason),
            HookError::Failed(reason) => Self::failed("ask the harness", reason),
        }
    }
}

/// What may run beside a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Company {
    /// Other cases.
    Others,
    /// Nothing: it measures time finely, or harms every connection of the broker.
    Alone,
}

/// One case of the suite.
pub(crate) struct Case {
    /// `group/case`. Stable: documents and other people's filters name it.
    pub(crate) name: &'static str,
    pub(crate) promise: Promise,
    pub(crate) company: Company,
    pub(crate) run: fn(Bench) -> BoxFuture<'static, Verdict>,
}

impl Case {
    /// Runs the case to its end, which it reaches whatever the transport does.
    pub(crate) async fn execute(&self, harness: Arc<dyn Harness>) -> Verdict {
        let bench = Bench::new(harness);
        // A task of its own, so that a panic in it is a failure of this case only.
        let mut task = tokio::spawn((self.run)(bench).boxed());
        let verdict = match tokio::time::timeout(CASE_LIMIT, &mut task).await {
            Ok(Ok(verdict)) => verdict,
            Ok(Err(error)) => Err(Stop::failed(
                "run the case",
                format!("it does not panic, but: {error}"),
            )),
            Err(_) => {
                task.abort();
                Err(Stop::failed(
                    "run the case",
                    format!("it ends within {CASE_LIMIT:?}"),
                ))
            }
        };
        verdict.map_err(|stop| match stop {
            Stop::Failed { step, rule } => Stop::failed(
                step,
                format!("{rule} [{}, promise {}]", self.name, self.promise),
            ),
            Stop::Unsupported(reason) => Stop::Unsupported(reason),
        })
    }
}

/// Makes a table of cases: `cases!("group": [name: G1, other: G2 alone])` runs `async fn name(bench: Bench) -> Verdict`.
macro_rules! cases {
    ($group:literal: [$($(#[$doc:meta])* $name:ident: $promise:ident $($alone:ident)?),* $(,)?]) => {
        pub(crate) const CASES: &[crate::case::Case] = &[$(crate::case::Case {
            name: concat!($group, "/", stringify!($name)),
            promise: crate::case::Promise::$promise,
            company: crate::case::cases!(@company $($alone)?),
            run: |bench| Box::pin($name(bench)),
        }),*];
    };
    (@company) => { crate::case::Company::Others };
    (@company alone) => { crate::case::Company::Alone };
}
pub(crate) use cases;

#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod bench;
pub mod brokers;
mod case;
mod cases;
pub mod flawed;
mod harness;
mod peers;
pub mod proxy;
mod report;
mod runner;

pub use case::Promise;
pub use cases::{CaseInfo, all as cases};
pub use harness::{Bounds, Connected, Harness, HookError, Link};
pub use report::{CaseReport, Outcome, Report, report};
pub use runner::{Missing, Suite, run};

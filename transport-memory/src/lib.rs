#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod broker;
mod config;
mod connection;
mod faults;
#[cfg(feature = "conformance")]
mod harness;
mod hub;
mod inbox;
mod queue;
mod session;
mod subscription;
mod sweeper;
mod table;
mod transport;

pub use broker::{DeadLetter, MemoryBroker, ServiceStats, Stats};
pub use config::MemoryConfig;
#[cfg(feature = "conformance")]
pub use harness::MemoryHarness;
pub use transport::MemoryTransport;

use std::sync::{Mutex, MutexGuard, PoisonError};

use antiphon_core::{Error, ErrorKind};

/// The most messages that one event carries: its list is then small enough to come from what the allocator has at hand, and
/// another event costs less than a larger one.
const BATCH_MAX: usize = 16;

/// Locks a mutex whose data is whole between any two statements that can panic, so that poison means nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn closed(what: &str) -> Error {
    Error::not_executed(ErrorKind::Closed, format!("the {what} is closed"))
}

#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod audience;
mod claim;
mod clock;
mod command;
mod completer;
mod config;
mod connection;
mod dial;
mod error;
mod frame;
#[cfg(feature = "conformance")]
mod harness;
mod head;
mod inbox;
mod inbox_reader;
mod isolation;
mod lease;
mod lobby;
mod monitor;
mod naming;
mod opening;
mod outgoing;
mod pace;
mod registration;
mod scan;
mod scripts;
mod send_batch;
mod sender;
mod server_check;
mod session;
mod settle_batch;
mod settlement;
mod socket;
mod subscription;
mod taker;
#[cfg(feature = "rustls")]
mod tls;
mod transport;
mod value;
mod wire;
mod withdrawal;

use std::time::Duration;

pub use config::RedisConfig;
#[cfg(feature = "conformance")]
pub use harness::RedisHarness;
pub use transport::RedisTransport;

/// How long one blocking read waits at the broker.
const BLOCK: Duration = Duration::from_secs(5);

/// How long after a lost connection its last blocking read may still be waiting at the broker.
const GHOST: Duration = Duration::from_secs(7);

/// How long work without a deadline, and what nobody came back for, is kept.
const QUEUE_TTL: Duration = Duration::from_secs(24 * 3600);

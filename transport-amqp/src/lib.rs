#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod absent;
mod acker;
mod broadcast;
mod config;
mod courier;
mod dial;
mod error;
mod handshake;
#[cfg(feature = "conformance")]
mod harness;
mod held;
mod inbox;
mod intake;
mod joined;
mod lane;
mod link;
mod message;
mod naming;
mod outlet;
mod press;
mod prober;
mod publisher;
mod pulse;
mod recovery;
mod refused;
mod roller;
mod settle;
mod slip;
mod subscription;
#[cfg(feature = "rustls")]
mod tls;
mod topology;
mod transport;
mod wire;

pub use config::{AmqpConfig, QueueType};
#[cfg(feature = "conformance")]
pub use harness::AmqpHarness;
pub use transport::AmqpTransport;

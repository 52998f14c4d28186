#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod database;
mod disk_outbox;
mod entry;
mod error;
mod file;
mod writer;

pub use disk_outbox::DiskOutbox;
pub use error::OutboxError;

#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod envelope;
mod error;
mod fault;
mod name;
mod ticket;
pub mod transport;

pub use envelope::{CorrelationId, Deadline, Headers, Outcome, Reply, Request};
pub use error::{Error, ErrorKind, Executed};
pub use fault::{Code, Fault};
pub use name::{ContentType, Method, ReplyAddress, ServiceName};
pub use ticket::Ticket;
pub use transport::{ConnectionState, Transport};

#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod call;
mod client;
#[cfg(feature = "json")]
mod codec;
mod config;
mod context;
mod envelope;
mod error;
mod fault;
mod handler;
mod name;
mod pending;
mod server;
mod service;
mod ticket;
pub mod transport;

pub use call::{Call, CallFuture, Notify};
pub use client::{Client, IntoServiceName};
pub use config::ClientConfig;
pub use context::Context;
pub use envelope::{CorrelationId, Deadline, Headers, Outcome, Reply, Request};
pub use error::{Error, ErrorKind, Executed};
pub use fault::{Code, Fault};
#[cfg(feature = "json")]
pub use handler::Handler;
pub use handler::{Failure, RawHandler, Response};
pub use name::{ContentType, Method, ReplyAddress, ServiceName};
pub use pending::ClientStats;
pub use server::{RunningServer, Server};
pub use service::ServerStats;
pub use ticket::Ticket;
pub use transport::{ConnectionState, Transport};

#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod attention;
mod call;
mod channel;
mod client;
#[cfg(feature = "json")]
mod codec;
mod config;
mod context;
mod control;
mod done;
mod envelope;
mod error;
mod exchange;
mod fault;
mod flagged_token;
mod gather;
mod given_up;
mod handler;
mod listeners;
mod many;
mod name;
mod outbox_store;
mod pending;
mod server;
mod service;
mod settled;
mod signal;
mod ticket;
pub mod transport;
mod workers;

pub use call::{Call, CallEvent, CallFuture, Notify};
pub use channel::{ChannelOptions, TaskResult, TaskResults, TaskSender};
pub use client::{Client, IntoServiceName};
pub use config::ClientConfig;
pub use context::Context;
pub use control::{NodeInfo, NodeStats};
pub use envelope::{CorrelationId, Deadline, Headers, Outcome, Reply, Request};
pub use error::{Error, ErrorKind, Executed};
pub use fault::{Code, Fault};
pub use gather::{Answer, AskAll, Gathered};
#[cfg(feature = "json")]
pub use handler::Handler;
pub use handler::{About, Failure, RawHandler, Response};
pub use many::{CallMany, Outputs};
pub use name::{ContentType, IntoNode, Method, Node, ReplyAddress, ServiceName};
pub use outbox_store::{KeptReply, OutboxChange, OutboxKey, OutboxStore, StoreWrite};
pub use pending::ClientStats;
pub use server::{Engagement, RunningServer, Server, ServerStats, WhenDisengaged};
pub use signal::{Signal, Signals};
pub use ticket::Ticket;
pub use transport::{ConnectionState, Transport};
pub use workers::Workers;

// What `Call::cancel_on` takes and `Context::cancellation` gives.
pub use tokio_util::sync::CancellationToken;

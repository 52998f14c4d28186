// The README's programs are typed, and run on memory.
#![cfg_attr(all(feature = "memory", feature = "json"), doc = include_str!("../README.md"))]
#![cfg_attr(
    not(all(feature = "memory", feature = "json")),
    doc = "Request/reply over message brokers."
)]
#![forbid(unsafe_code)]

mod connection;

#[cfg(feature = "json")]
pub use antiphon_core::Handler;
pub use antiphon_core::transport;
pub use antiphon_core::{
    Call, CallFuture, Client, ClientConfig, ClientStats, Code, ConnectionState, ContentType,
    Context, CorrelationId, Deadline, Error, ErrorKind, Executed, Failure, Fault, Headers,
    IntoServiceName, Method, Notify, Outcome, RawHandler, Reply, ReplyAddress, Request, Response,
    RunningServer, Server, ServerStats, ServiceName, Ticket, Transport,
};
pub use connection::{Connection, connect};

#[cfg(feature = "amqp")]
pub use antiphon_amqp as amqp;
#[cfg(feature = "memory")]
pub use antiphon_memory as memory;
#[cfg(feature = "redis")]
pub use antiphon_redis as redis;

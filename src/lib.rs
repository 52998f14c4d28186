#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod connection;

pub use antiphon_core::transport;
pub use antiphon_core::{
    Call, CallFuture, Client, ClientConfig, ClientStats, Code, ConnectionState, ContentType, Context, CorrelationId,
    Deadline, Error, ErrorKind, Executed, Failure, Fault, Headers, IntoServiceName, Method, Notify, Outcome,
    RawHandler, Reply, ReplyAddress, Request, Response, RunningServer, Server, ServerStats, ServiceName, Ticket,
    Transport,
};
#[cfg(feature = "json")]
pub use antiphon_core::Handler;
pub use connection::{Connection, connect};

#[cfg(feature = "amqp")]
pub use antiphon_amqp as amqp;
#[cfg(feature = "memory")]
pub use antiphon_memory as memory;
#[cfg(feature = "redis")]
pub use antiphon_redis as redis;

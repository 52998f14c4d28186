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
    About, Answer, AskAll, Call, CallEvent, CallFuture, CallMany, CancellationToken,
    ChannelOptions, Client, ClientConfig, ClientStats, Code, ConnectionState, ContentType, Context,
    CorrelationId, Deadline, Engagement, Error, ErrorKind, Executed, Failure, Fault, Gathered,
    Headers, IntoNode, IntoServiceName, KeptReply, Method, Node, NodeInfo, NodeStats, Notify,
    OutboxChange, OutboxKey, OutboxStore, Outcome, Outputs, RawHandler, Reply, ReplyAddress,
    Request, Response, RunningServer, Server, ServerStats, ServiceName, Signal, Signals,
    StoreWrite, TaskResult, TaskResults, TaskSender, Ticket, Transport, WhenDisengaged, Workers,
};
pub use connection::{Connection, connect};

#[cfg(feature = "amqp")]
pub use antiphon_amqp as amqp;
#[cfg(feature = "memory")]
pub use antiphon_memory as memory;
#[cfg(feature = "disk-outbox")]
pub use antiphon_outbox::{DiskOutbox, OutboxError};
#[cfg(feature = "redis")]
pub use antiphon_redis as redis;

/// The programs of that page compile.
#[cfg(all(doctest, feature = "memory", feature = "json"))]
#[doc = include_str!("../docs/beyond-a-call.md")]
struct BeyondACall;

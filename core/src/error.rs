//! The one error type. Kinds are what a caller can decide by; causes are in the message and the source.

use std::fmt;
use std::sync::Arc;

use crate::fault::{Code, Fault};

/// Whether the handler was executed. `No` is a promise: a retry is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Executed {
    /// No handler was started on this request, and none will be.
    No,
    /// Nobody on this side can know.
    Maybe,
    /// A handler was started on it.
    Yes,
}

impl Executed {
    /// `"no"`, `"maybe"` or `"yes"`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::Maybe => "maybe",
            Self::Yes => "yes",
        }
    }

    /// The reverse of [`as_str`](Self::as_str); anything else is `Maybe`.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text {
            "no" => Self::No,
            "yes" => Self::Yes,
            _ => Self::Maybe,
        }
    }
}

impl fmt::Display for Executed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What happened, as far as a caller can act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An exclusive subscriber owns the service, or shared ones serve it while an exclusive one asks.
    AlreadyOwned,
    /// A reply came that cannot be decoded or is over the size limit.
    BadReply,
    /// The broker refused or answered something that no retry will mend: a queue of another kind, a missing right.
    Broker,
    /// The call was cancelled before its end.
    Cancelled,
    /// The client, server or transport was closed.
    Closed,
    /// No connection could be made: refused, wrong credentials, or too slow.
    Connect,
    /// The connection was lost while the call was under way.
    ConnectionLost,
    /// No reply came before the deadline.
    DeadlineExceeded,
    /// The handler answered with a fault; see [`Error::fault`].
    Fault,
    /// The caller's own input is not valid. Nothing was sent.
    Invalid,
    /// The lease under which a delivery was held is over: another server may have it.
    LostLease,
    /// Nobody serves the service.
    NoResponder,
    /// The store of a server's outbox cannot be used: another process has it, it is damaged or not one, or its disk fails. The
    /// source says which.
    Outbox,
    /// A local limit (pending calls) or the broker's memory is exhausted. Nothing was sent.
    Overloaded,
    /// No server took the request within its pickup timeout, and none will.
    PickupTimeout,
    /// A server refused the request without or after giving it to a handler, as [`Error::executed`] says;
    /// see [`Error::fault`] for the reason.
    Rejected,
    /// The server that ran the handler has been silent for three heartbeats.
    ServerLost,
    /// The body is over the size limit. Nothing was sent.
    TooLarge,
    /// This transport, or this build, cannot do what was asked.
    Unsupported,
}

impl ErrorKind {
    /// The kind in snake case, as the command line prints it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AlreadyOwned => "already_owned",
            Self::BadReply => "bad_reply",
            Self::Broker => "broker",
            Self::Cancelled => "cancelled",
            Self::Closed => "closed",
            Self::Connect => "connect",
            Self::ConnectionLost => "connection_lost",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::Fault => "fault",
            Self::Invalid => "invalid",
            Self::LostLease => "lost_lease",
            Self::NoResponder => "no_responder",
            Self::Outbox => "outbox",
            Self::Overloaded => "overloaded",
            Self::PickupTimeout => "pickup_timeout",
            Self::Rejected => "rejected",
            Self::ServerLost => "server_lost",
            Self::TooLarge => "too_large",
            Self::Unsupported => "unsupported",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why an operation failed, and whether a handler was executed.
///
/// Cloning is cheap: one lost connection ends many calls.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    executed: Executed,
    message: String,
    fault: Option<Fault>,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of a request that no handler was started on, or of an operation that concerns none.
    #[must_use]
    pub fn not_executed(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self::new(kind, Executed::No, message)
    }

    /// An error of a request that may have been executed.
    #[must_use]
    pub fn maybe_executed(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self::new(kind, Executed::Maybe, message)
    }

    /// An error.
    #[must_use]
    pub fn new(kind: ErrorKind, executed: Executed, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner {
            kind,
            executed,
            message: message.into(),
            fault: None,
            source: None,
        }))
    }

    /// The error that a fault in a reply becomes: [`ErrorKind::Fault`] if a handler raised it, else
    /// [`ErrorKind::Rejected`], or [`ErrorKind::DeadlineExceeded`] if it had expired when a server took it.
    #[must_use]
    pub fn from_fault(fault: Fault, executed: Executed) -> Self {
        let kind = match (executed, fault.code()) {
            (Executed::Yes, _) => ErrorKind::Fault,
            (Executed::No | Executed::Maybe, Code::DeadlineExceeded) => ErrorKind::DeadlineExceeded,
            (Executed::No | Executed::Maybe, _) => ErrorKind::Rejected,
        };
        let message = fault.message().to_owned();
        Self(Arc::new(Inner {
            kind,
            executed,
            message,
            fault: Some(fault),
            source: None,
        }))
    }

    /// The same error with the one that caused it.
    #[must_use]
    pub fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        Arc::make_mut(&mut self.0).source = Some(Arc::new(source));
        self
    }

    /// The same error, knowing better whether the handler was executed.
    #[must_use]
    pub fn with_executed(mut self, executed: Executed) -> Self {
        Arc::make_mut(&mut self.0).executed = executed;
        self
    }

    /// What happened.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Whether the handler was executed.
    #[must_use]
    pub fn executed(&self) -> Executed {
        self.0.executed
    }

    /// The remote error, if a server sent one: always for [`ErrorKind::Fault`] and [`ErrorKind::Rejected`].
    #[must_use]
    pub fn fault(&self) -> Option<&Fault> {
        self.0.fault.as_ref()
    }

    /// The remote error's code, if a server sent one.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        self.fault().map(Fault::code)
    }

    /// What happened in words, for people.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// True if sending the same request again may help: a remote error says so (its handler may then be executed a
    /// second time), or it was never executed, for a reason that passes.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self.kind() {
            ErrorKind::Fault | ErrorKind::Rejected => self.fault().is_some_and(Fault::is_retryable),
            ErrorKind::Connect
            | ErrorKind::ConnectionLost
            | ErrorKind::NoResponder
            | ErrorKind::Overloaded
            | ErrorKind::PickupTimeout
            | ErrorKind::ServerLost => self.executed() == Executed::No,
            _ => false,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind())?;
        if let Some(code) = self.code() {
            write!(f, " {code}")?;
        }
        write!(f, ": {} (executed: {})", self.message(), self.executed())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.0.kind)
            .field("executed", &self.0.executed)
            .field("message", &self.0.message)
            .field("fault", &self.0.fault)
            .field("source", &self.0.source)
            .finish()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|source| &**source as _)
    }
}

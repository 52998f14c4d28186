//! What Redis said, as errors of ours. No message carries a password: none of the texts used here does.

use antiphon_core::{Error, ErrorKind, Executed};
use redis::{RedisError, ServerError, ServerErrorKind};

/// Why no connection could be made.
pub(crate) fn connect(error: &RedisError) -> Error {
    Error::not_executed(
        ErrorKind::Connect,
        format!("cannot connect to Redis: {error}"),
    )
}

/// True if trying again with the same credentials cannot help.
pub(crate) fn is_refused(error: &RedisError) -> bool {
    error.kind() == redis::ErrorKind::AuthenticationFailed
        || matches!(error.code(), Some("WRONGPASS" | "NOAUTH" | "NOPERM"))
}

/// Why Redis refused a command that it did not execute.
pub(crate) fn refused(error: &ServerError) -> Error {
    let kind = match (error.code(), error.kind()) {
        ("OOM", _) => ErrorKind::Overloaded,
        // It goes on elsewhere or soon: the connection is of no use for now.
        (
            _,
            Some(
                ServerErrorKind::ReadOnly
                | ServerErrorKind::BusyLoading
                | ServerErrorKind::MasterDown,
            ),
        ) => ErrorKind::ConnectionLost,
        _ => ErrorKind::Broker,
    };
    Error::not_executed(
        kind,
        format!(
            "Redis refused: {} {}",
            error.code(),
            error.details().unwrap_or_default()
        ),
    )
}

/// The connection failed under a command.
pub(crate) fn lost(executed: Executed, error: &RedisError) -> Error {
    Error::new(
        ErrorKind::ConnectionLost,
        executed,
        format!("connection to Redis lost: {error}"),
    )
}

/// The transport was closed.
pub(crate) fn closed() -> Error {
    Error::not_executed(ErrorKind::Closed, "the transport is closed")
}

/// Another server may have the request.
pub(crate) fn lost_lease() -> Error {
    Error::maybe_executed(
        ErrorKind::LostLease,
        "the lease is over: another server may have the request",
    )
}

/// Redis answered what no version of it answers.
pub(crate) fn unexpected(what: &str, value: &redis::Value) -> Error {
    match value {
        redis::Value::ServerError(error) => refused(error),
        _ => Error::maybe_executed(
            ErrorKind::Broker,
            format!("unexpected answer of Redis to {what}"),
        ),
    }
}

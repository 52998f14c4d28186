//! What Redis said, as errors of ours. No message carries a password: none of the texts used here does.

use antiphon_core::{Error, ErrorKind, Executed};
use redis::{RedisError, ServerError, ServerErrorKind};

use crate::value::Value;

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
    let kind = match error.code() {
        "OOM" => ErrorKind::Overloaded,
        _ if is_elsewhere(error) => ErrorKind::ConnectionLost,
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

/// True if asking again cannot help: the fault is in the command, its keys or its rights. All else, such as a failover, too
/// few replicas, a disk that is full or a script that takes long, passes.
pub(crate) fn is_lasting(error: &ServerError) -> bool {
    matches!(error.code(), "ERR" | "WRONGTYPE" | "NOPERM")
}

/// True if this server is no place to work on for now: another one may be, and a new connection finds it.
pub(crate) fn is_elsewhere(error: &ServerError) -> bool {
    matches!(
        error.kind(),
        Some(
            ServerErrorKind::ReadOnly | ServerErrorKind::BusyLoading | ServerErrorKind::MasterDown
        )
    )
}

/// The first refusal among answers.
pub(crate) fn first_refusal(answers: &[Value]) -> Option<&ServerError> {
    answers.iter().find_map(|answer| match answer {
        Value::ServerError(error) => Some(error),
        _ => None,
    })
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
pub(crate) fn unexpected(what: &str, value: &Value) -> Error {
    match value {
        Value::ServerError(error) => refused(error),
        _ => Error::maybe_executed(
            ErrorKind::Broker,
            format!("unexpected answer of Redis to {what}"),
        ),
    }
}

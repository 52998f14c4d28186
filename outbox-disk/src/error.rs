//! Why an outbox cannot be used.

use std::any::Any;
use std::io;

use antiphon_core::{Error, ErrorKind};

/// Why an outbox cannot be used: the source of an [`ErrorKind::Outbox`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutboxError {
    /// Another running server has it, of this process or another one.
    #[error("another running server has it")]
    InUse,
    /// The file is something else.
    #[error("it is not an outbox")]
    Foreign,
    /// It is an outbox that cannot be read, or could not until just now: what can be mended is by the next time.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// It is of another version of this library.
    #[error("it has the format {0}, which this version does not know")]
    Format(u64),
    /// The disk is full, the right is missing, and so on.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It was closed, or never opened.
    #[error("it is closed")]
    Closed,
}

impl OutboxError {
    pub(crate) fn into_error(self, path: &std::path::Path) -> Error {
        let message = format!("the outbox {}: {self}", path.display());
        Error::not_executed(ErrorKind::Outbox, message).with_source(self)
    }

    /// The same once more, for another one who waits.
    pub(crate) fn again(&self) -> Self {
        match self {
            Self::InUse => Self::InUse,
            Self::Foreign => Self::Foreign,
            Self::Damaged(reason) => Self::Damaged(reason.clone()),
            Self::Format(format) => Self::Format(*format),
            Self::Io(error) => Self::Io(io::Error::new(error.kind(), error.to_string())),
            Self::Closed => Self::Closed,
        }
    }

    /// The store asserts where it finds what it never wrote.
    pub(crate) fn panicked(panic: &(dyn Any + Send)) -> Self {
        let message = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied());
        Self::Damaged(message.unwrap_or("the store failed").to_owned())
    }
}

impl From<redb::StorageError> for OutboxError {
    fn from(error: redb::StorageError) -> Self {
        match error {
            redb::StorageError::Io(error) => Self::Io(error),
            redb::StorageError::Corrupted(reason) => Self::Damaged(reason),
            other => Self::Io(io::Error::other(other)),
        }
    }
}

impl From<redb::DatabaseError> for OutboxError {
    fn from(error: redb::DatabaseError) -> Self {
        match error {
            redb::DatabaseError::DatabaseAlreadyOpen => Self::InUse,
            redb::DatabaseError::Storage(error) => error.into(),
            other => Self::Damaged(other.to_string()),
        }
    }
}

impl From<redb::TableError> for OutboxError {
    fn from(error: redb::TableError) -> Self {
        match error {
            redb::TableError::Storage(error) => error.into(),
            // Missing, or with other types in it.
            _ => Self::Foreign,
        }
    }
}

impl From<redb::TransactionError> for OutboxError {
    fn from(error: redb::TransactionError) -> Self {
        match error {
            redb::TransactionError::Storage(error) => error.into(),
            other => Self::Io(io::Error::other(other)),
        }
    }
}

impl From<redb::CommitError> for OutboxError {
    fn from(error: redb::CommitError) -> Self {
        match error {
            redb::CommitError::Storage(error) => error.into(),
            other => Self::Io(io::Error::other(other)),
        }
    }
}

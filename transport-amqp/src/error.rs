//! What can go wrong between us and the broker, and what it means to a caller.

use std::fmt;

use antiphon_core::{Error, ErrorKind};

/// AMQP reply codes that mean something to us.
pub(crate) const ACCESS_REFUSED: u16 = 403;
pub(crate) const NOT_FOUND: u16 = 404;
pub(crate) const RESOURCE_LOCKED: u16 = 405;
pub(crate) const PRECONDITION_FAILED: u16 = 406;
const NOT_ALLOWED: u16 = 530;
const NOT_IMPLEMENTED: u16 = 540;

/// Why an operation on the broker failed.
#[derive(Clone, Debug)]
pub(crate) enum Failure {
    /// The broker said no, by an AMQP reply code.
    Refused { code: u16, text: String },
    /// The connection or the channel is gone.
    Lost(String),
    /// No answer in time.
    TimedOut(&'static str),
    /// Whatever is tried again will fail again; told to the user as it is.
    Final(Error),
}

impl Failure {
    pub(crate) fn is(&self, expected: u16) -> bool {
        matches!(self, Self::Refused { code, .. } if *code == expected)
    }

    /// True if the broker itself answered and a new connection will not change its mind.
    pub(crate) fn is_final(&self) -> bool {
        match self {
            Self::Refused { code, .. } => {
                matches!(
                    *code,
                    ACCESS_REFUSED
                        | RESOURCE_LOCKED
                        | PRECONDITION_FAILED
                        | NOT_ALLOWED
                        | NOT_IMPLEMENTED
                )
            }
            Self::Final(_) => true,
            Self::Lost(_) | Self::TimedOut(_) => false,
        }
    }

    /// As the error of an operation that concerns no request.
    pub(crate) fn into_error(self, doing: &str) -> Error {
        match self {
            Self::Final(error) => error,
            Self::Refused { .. } => {
                Error::not_executed(ErrorKind::Broker, format!("{doing}: {self}"))
            }
            Self::Lost(_) | Self::TimedOut(_) => {
                Error::not_executed(ErrorKind::ConnectionLost, format!("{doing}: {self}"))
            }
        }
    }

    /// As the error of a connection that could not be made.
    pub(crate) fn into_connect_error(self, address: &str) -> Error {
        Error::not_executed(ErrorKind::Connect, format!("{address}: {self}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { code, text } => write!(f, "the broker refused: {code} {text}"),
            Self::Lost(reason) => f.write_str(reason),
            Self::TimedOut(doing) => write!(f, "no answer in time ({doing})"),
            Self::Final(error) => f.write_str(error.message()),
        }
    }
}

impl From<lapin::Error> for Failure {
    fn from(error: lapin::Error) -> Self {
        match error.kind() {
            lapin::ErrorKind::ProtocolError(refusal) => Self::Refused {
                code: refusal.get_id(),
                text: refusal.get_message().to_string(),
            },
            _ => Self::Lost(error.to_string()),
        }
    }
}

pub(crate) fn closed() -> Error {
    Error::not_executed(ErrorKind::Closed, "the transport was closed")
}

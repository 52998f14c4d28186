//! A remote error as data.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind};

/// The longest fault message on the wire, in bytes; longer ones are cut.
const MESSAGE_MAX: usize = 4096;

/// The canonical codes of gRPC, less `ok`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Code {
    /// The operation was aborted, such as a request that killed its servers too often.
    Aborted,
    /// What the caller wanted to create exists.
    AlreadyExists,
    /// The caller cancelled.
    Cancelled,
    /// Data was lost or is corrupt.
    DataLoss,
    /// The deadline passed.
    DeadlineExceeded,
    /// The system is not in the state that the operation needs.
    FailedPrecondition,
    /// An invariant is broken, such as by a handler that panicked.
    Internal,
    /// The input is not valid whatever the state of the system.
    InvalidArgument,
    /// What the caller named does not exist.
    NotFound,
    /// The input is outside the valid range.
    OutOfRange,
    /// The caller may not do this.
    PermissionDenied,
    /// A quota or a size limit is exhausted.
    ResourceExhausted,
    /// The caller did not prove who it is.
    Unauthenticated,
    /// The service cannot do this now; a retry may help.
    Unavailable,
    /// The service has no such method.
    Unimplemented,
    /// Anything else, and every code that this version does not know.
    #[serde(other)]
    Unknown,
}

impl Code {
    /// The code in snake case, as it is on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Aborted => "aborted",
            Self::AlreadyExists => "already_exists",
            Self::Cancelled => "cancelled",
            Self::DataLoss => "data_loss",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::FailedPrecondition => "failed_precondition",
            Self::Internal => "internal",
            Self::InvalidArgument => "invalid_argument",
            Self::NotFound => "not_found",
            Self::OutOfRange => "out_of_range",
            Self::PermissionDenied => "permission_denied",
            Self::ResourceExhausted => "resource_exhausted",
            Self::Unauthenticated => "unauthenticated",
            Self::Unavailable => "unavailable",
            Self::Unimplemented => "unimplemented",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A remote error as data: what a handler returns as its `Err`, and what its caller receives.
///
/// On the wire it is `{"error":{"code","message","details","retryable"}}`, UTF-8 JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fault {
    code: Code,
    #[serde(default)]
    message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    details: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "is_false")]
    retryable: bool,
}

impl Fault {
    /// A fault. A message above 4,096 bytes is cut.
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > MESSAGE_MAX {
            let end = (0..=MESSAGE_MAX)
                .rev()
                .find(|&end| message.is_char_boundary(end))
                .unwrap_or(0);
            message.truncate(end);
        }
        Self {
            code,
            message,
            details: None,
            retryable: false,
        }
    }

    /// The same fault with data for programs.
    #[must_use]
    pub fn with_details(mut self, details: serde_json::Value) -> Self {
        self.details = Some(details);
        self
    }

    /// The same fault, saying that the same request may succeed if it is sent again.
    #[must_use]
    pub fn retryable(mut self) -> Self {
        self.retryable = true;
        self
    }

    /// The code.
    #[must_use]
    pub fn code(&self) -> Code {
        self.code
    }

    /// What happened, for people.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What happened, for programs.
    #[must_use]
    pub fn details(&self) -> Option<&serde_json::Value> {
        self.details.as_ref()
    }

    /// True if the same request may succeed if it is sent again.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.retryable
    }

    /// The bytes that the details take, as JSON.
    pub(crate) fn details_size(&self) -> usize {
        self.details
            .as_ref()
            .map_or(0, |details| details.to_string().len())
    }

    pub(crate) fn without_details(mut self) -> Self {
        self.details = None;
        self
    }

    /// The fault as the body of a reply.
    #[must_use]
    pub fn to_body(&self) -> bytes::Bytes {
        #[derive(Serialize)]
        struct Body<'a> {
            error: &'a Fault,
        }
        serde_json::to_vec(&Body { error: self })
            .unwrap_or_default()
            .into()
    }

    /// The reverse of [`to_body`](Self::to_body).
    #[must_use]
    pub fn from_body(body: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Body {
            error: Fault,
        }
        serde_json::from_slice::<Body>(body)
            .ok()
            .map(|body| body.error)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

impl std::error::Error for Fault {}

/// For `?` on a call within a handler: a remote fault goes on to the caller as it is, and what else went wrong becomes
/// `deadline_exceeded`, `cancelled`, `unavailable` (worth a retry if nothing was executed) or `internal`.
impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        if let Some(fault) = error.fault() {
            return fault.clone();
        }
        let code = match error.kind() {
            ErrorKind::DeadlineExceeded => Code::DeadlineExceeded,
            ErrorKind::Cancelled | ErrorKind::Closed => Code::Cancelled,
            ErrorKind::Connect
            | ErrorKind::ConnectionLost
            | ErrorKind::NoResponder
            | ErrorKind::Overloaded
            | ErrorKind::PickupTimeout
            | ErrorKind::ServerLost => Code::Unavailable,
            _ => Code::Internal,
        };
        let fault = Self::new(code, error.to_string());
        if error.is_retryable() {
            fault.retryable()
        } else {
            fault
        }
    }
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_false(value: &bool) -> bool {
    !value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_body() {
        let fault = Fault::new(Code::OutOfRange, "n > 93");
        assert_eq!(
            &fault.to_body()[..],
            br#"{"error":{"code":"out_of_range","message":"n > 93"}}"#
        );
        assert_eq!(Fault::from_body(&fault.to_body()), Some(fault));
    }

    #[test]
    fn an_unknown_code_is_unknown() {
        let fault = Fault::from_body(br#"{"error":{"code":"teapot","message":"short"}}"#).unwrap();
        assert_eq!(fault.code(), Code::Unknown);
        assert_eq!(Fault::from_body(b"832040"), None);
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let fault = Fault::new(Code::Internal, "é".repeat(4000));
        assert_eq!(fault.message().len(), 4096);
    }
}

//! From errors to exit codes, and the errors that are this command's own.

use std::fmt::Display;
use std::process::ExitCode;

use antiphon::{ClientConfig, Error, ErrorKind, Executed};

/// How a command ended, for the shell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Success,
    /// A fault, or a refusal by a server; for `bench`, some call failed.
    Remote,
    /// The command line asks for what cannot be.
    Usage,
    /// No handler was executed, for another reason.
    NotExecuted,
    DeadlineExceeded,
    /// A handler may have been executed, and nothing better is known.
    MaybeExecuted,
    Interrupted,
}

impl Exit {
    pub(crate) fn of(error: &Error) -> Self {
        match error.kind() {
            ErrorKind::Fault | ErrorKind::Rejected => Self::Remote,
            ErrorKind::Invalid | ErrorKind::TooLarge | ErrorKind::Unsupported => Self::Usage,
            ErrorKind::DeadlineExceeded => Self::DeadlineExceeded,
            // Here only a signal cancels.
            ErrorKind::Cancelled => Self::Interrupted,
            _ => match error.executed() {
                Executed::No => Self::NotExecuted,
                Executed::Maybe | Executed::Yes => Self::MaybeExecuted,
            },
        }
    }

    fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Remote => 1,
            Self::Usage => 2,
            Self::NotExecuted => 3,
            Self::DeadlineExceeded => 4,
            Self::MaybeExecuted => 5,
            Self::Interrupted => 130,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}

/// The error of a command that was given no broker.
pub(crate) fn no_url() -> Error {
    Error::not_executed(
        ErrorKind::Invalid,
        "no broker: give --url URL or set ANTIPHON_URL",
    )
}

/// The error of a command that was interrupted by a signal.
pub(crate) fn interrupted(executed: Executed) -> Error {
    Error::new(ErrorKind::Cancelled, executed, "interrupted")
}

/// Refuses a body that no call would take.
pub(crate) fn check_size(bytes: usize) -> Result<(), Error> {
    let limit = ClientConfig::default().max_body;
    if bytes > limit {
        let message = format!("a body of more than {limit} bytes");
        return Err(Error::not_executed(ErrorKind::TooLarge, message));
    }
    Ok(())
}

/// The error of something that this process cannot do for itself.
pub(crate) fn local(what: &str, error: &impl Display) -> Error {
    Error::not_executed(ErrorKind::Closed, format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use antiphon::{Code, Fault as Remote};

    use super::*;

    #[test]
    fn each_kind_has_its_exit_code() {
        use ErrorKind::*;
        // Executed: no, maybe, yes.
        for (kind, codes) in [
            (AlreadyOwned, [3, 5, 5]),
            (BadReply, [3, 5, 5]),
            (Broker, [3, 5, 5]),
            (Cancelled, [130, 130, 130]),
            (Closed, [3, 5, 5]),
            (Connect, [3, 5, 5]),
            (ConnectionLost, [3, 5, 5]),
            (DeadlineExceeded, [4, 4, 4]),
            (Fault, [1, 1, 1]),
            (Invalid, [2, 2, 2]),
            (LostLease, [3, 5, 5]),
            (NoResponder, [3, 5, 5]),
            (Overloaded, [3, 5, 5]),
            (PickupTimeout, [3, 5, 5]),
            (Rejected, [1, 1, 1]),
            (ServerLost, [3, 5, 5]),
            (TooLarge, [2, 2, 2]),
            (Unsupported, [2, 2, 2]),
        ] {
            for (executed, code) in [Executed::No, Executed::Maybe, Executed::Yes]
                .into_iter()
                .zip(codes)
            {
                assert_eq!(
                    Exit::of(&Error::new(kind, executed, "")).code(),
                    code,
                    "{kind}, executed {executed}"
                );
            }
        }
    }

    #[test]
    fn a_remote_error_is_1_unless_it_had_expired() {
        for (code, executed, exit) in [
            (Code::OutOfRange, Executed::Yes, 1),
            (Code::DeadlineExceeded, Executed::Yes, 1),
            (Code::Unimplemented, Executed::No, 1),
            (Code::Aborted, Executed::Maybe, 1),
            (Code::DeadlineExceeded, Executed::No, 4),
        ] {
            let error = Error::from_fault(Remote::new(code, ""), executed);
            assert_eq!(Exit::of(&error).code(), exit, "{error}");
        }
        assert_eq!((Exit::Success.code(), Exit::Interrupted.code()), (0, 130));
    }
}

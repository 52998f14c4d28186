//! What `serve` can do with a request.

use std::ffi::OsString;
use std::num::IntErrorKind;
use std::time::Duration;

use antiphon::{Code, ContentType, Context, Fault, Headers, Response};
use bytes::Bytes;

use crate::args::ServeArgs;
use crate::exec;

/// The greatest number whose Fibonacci number fits into 64 bits.
const FIBONACCI_MAX: u64 = 93;

/// The one thing that a server does.
#[derive(Debug)]
pub(crate) enum Handler {
    Echo,
    Fibonacci,
    Sleep(Duration),
    Exec { service: String, command: OsString },
}

impl Handler {
    /// What the arguments ask for; they name exactly one.
    pub(crate) fn of(args: &ServeArgs) -> Self {
        match (args.fib, args.sleep, &args.exec) {
            (true, _, _) => Self::Fibonacci,
            (_, Some(millis), _) => Self::Sleep(Duration::from_millis(millis)),
            (_, _, Some(command)) => Self::Exec {
                service: args.service.clone(),
                command: command.clone(),
            },
            _ => Self::Echo,
        }
    }

    pub(crate) async fn handle(&self, body: Bytes, context: &Context) -> Result<Response, Fault> {
        match self {
            Self::Echo => Ok(echo(body, context)),
            Self::Fibonacci => fibonacci_of(&body).map(|number| answer(number, context)),
            Self::Sleep(duration) => {
                let cancellation = context.cancellation();
                tokio::select! {
                    () = tokio::time::sleep(*duration) => Ok(echo(body, context)),
                    () = cancellation.cancelled() => {
                        Err(Fault::new(Code::DeadlineExceeded, "the deadline passed during the sleep"))
                    }
                }
            }
            Self::Exec { service, command } => exec::run(service, command, body, context)
                .await
                .map(Response::from),
        }
    }
}

fn echo(body: Bytes, context: &Context) -> Response {
    Response {
        body,
        content_type: content_type(context),
        headers: context.headers().clone(),
    }
}

/// A decimal number is text, and JSON as well: the caller may call it what it likes.
fn answer(number: u64, context: &Context) -> Response {
    let content_type = content_type(context).or_else(|| ContentType::new("text/plain").ok());
    Response {
        body: number.to_string().into(),
        content_type,
        headers: Headers::new(),
    }
}

fn content_type(context: &Context) -> Option<ContentType> {
    // It came as one, so it is one.
    context
        .content_type()
        .and_then(|media_type| ContentType::new(media_type).ok())
}

fn fibonacci_of(body: &[u8]) -> Result<u64, Fault> {
    let not_a_number = || Fault::new(Code::InvalidArgument, "the body is not a decimal number");
    let above = || Fault::new(Code::OutOfRange, format!("n is above {FIBONACCI_MAX}"));
    let text = std::str::from_utf8(body)
        .map_err(|_| not_a_number())?
        .trim();
    match text.parse::<u64>() {
        Ok(n) if n <= FIBONACCI_MAX => Ok(fibonacci(n)),
        Ok(_) => Err(above()),
        Err(error) if *error.kind() == IntErrorKind::PosOverflow => Err(above()),
        Err(_) => Err(not_a_number()),
    }
}

/// For `n` up to [`FIBONACCI_MAX`].
fn fibonacci(n: u64) -> u64 {
    let (mut current, mut next) = (0_u64, 1_u64);
    for _ in 0..n {
        // The number behind the last one need not fit: it is never returned.
        (current, next) = (next, current.wrapping_add(next));
    }
    current
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fibonacci_numbers_up_to_the_last_that_fits() {
        for (n, number) in [
            ("0", 0),
            ("1", 1),
            ("2", 1),
            (" 30\n", 832_040),
            ("93", 12_200_160_415_121_876_738),
        ] {
            assert_eq!(fibonacci_of(n.as_bytes()), Ok(number), "{n:?}");
        }
    }

    #[test]
    fn what_is_no_number_and_what_is_too_great_are_told_apart() {
        for bad in ["", "  ", "x", "3.0", "-1", "1 2", "0x10", "é"] {
            assert_eq!(
                fibonacci_of(bad.as_bytes()).unwrap_err().code(),
                Code::InvalidArgument,
                "{bad:?}"
            );
        }
        assert_eq!(
            fibonacci_of(b"\xff").unwrap_err().code(),
            Code::InvalidArgument
        );
        for great in ["94", "18446744073709551616", "99999999999999999999999999"] {
            assert_eq!(
                fibonacci_of(great.as_bytes()).unwrap_err().code(),
                Code::OutOfRange,
                "{great}"
            );
        }
    }
}

//! What the commands print. Standard output is for results; standard error gets one line when a command fails.

use std::fmt::Write as _;
use std::io::{self, Write};

use antiphon::{Error, ErrorKind, Executed};

use crate::exit::{self, Exit};

/// Prints an error, and says how to exit.
pub(crate) fn failed(error: &Error) -> Exit {
    complain(error);
    Exit::of(error)
}

/// Prints an error.
pub(crate) fn complain(error: &Error) {
    // Nobody can be told that standard error is gone.
    let _ = writeln!(io::stderr(), "{}", line(error));
}

/// `KIND [CODE]: message`, on one line whatever the message holds.
fn line(error: &Error) -> String {
    // A request that had expired in the queue has a code that is its kind.
    match error
        .code()
        .filter(|code| code.as_str() != error.kind().as_str())
    {
        Some(code) => format!("{} {code}: {}", error.kind(), one_line(error.message())),
        None => format!("{}: {}", error.kind(), one_line(error.message())),
    }
}

/// Writes a result, all of it.
pub(crate) fn write(result: &[u8]) -> Result<(), Error> {
    let mut output = io::stdout().lock();
    output
        .write_all(result)
        .and_then(|()| output.flush())
        .map_err(|error| exit::local("standard output", &error).with_executed(Executed::Yes))
}

/// Ends a command line that cannot be parsed, or that asks for help.
pub(crate) fn usage(error: &clap::Error) -> Exit {
    if !error.use_stderr() {
        // Help into a closed pipe is nobody's loss.
        let _ = error.print();
        return Exit::Success;
    }
    let text = error.render().to_string();
    // What is wrong is in the first paragraph; hints and the usage follow.
    let what: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.is_empty())
        .collect();
    let what = what.join(" ");
    failed(&Error::not_executed(
        ErrorKind::Invalid,
        what.trim_start_matches("error: "),
    ))
}

fn one_line(message: &str) -> String {
    let mut line = String::with_capacity(message.len());
    for character in message.chars() {
        if character.is_control() {
            // Writing to a string does not fail.
            let _ = write!(line, "{}", character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use antiphon::{Code, Fault};

    use super::*;

    #[test]
    fn an_error_is_one_line() {
        let error = Error::from_fault(Fault::new(Code::OutOfRange, "n is above 93"), Executed::Yes);
        assert_eq!(line(&error), "fault out_of_range: n is above 93");
        let error = Error::from_fault(Fault::new(Code::DeadlineExceeded, "expired"), Executed::No);
        assert_eq!(line(&error), "deadline_exceeded: expired");
        let error = Error::not_executed(ErrorKind::Connect, "first\nsecond\x1b[31m");
        assert_eq!(line(&error), "connect: first\\nsecond\\u{1b}[31m");
    }
}

//! The words of the command line.

use std::ffi::OsString;
use std::time::Duration;

use clap::{ArgGroup, Args, Parser, Subcommand};

/// Request/reply over RabbitMQ, Redis or inside one process.
#[derive(Debug, Parser)]
#[command(name = "antiphon", version, arg_required_else_help = false, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    /// The broker: redis://HOST:PORT, amqp://USER:PASSWORD@HOST:PORT or memory://NAME
    #[arg(
        long,
        global = true,
        env = "ANTIPHON_URL",
        hide_env_values = true,
        value_name = "URL"
    )]
    pub(crate) url: Option<String>,

    /// Log to standard error: -v warnings, -vv what happens, -vvv all (or ANTIPHON_LOG=FILTER)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve a service until SIGTERM or SIGINT, then drain; prints `ready SERVICE` once it is subscribed
    Serve(ServeArgs),
    /// Call a service once, and print the reply's body, raw
    Call(CallArgs),
    /// Ask which servers of a service are alive
    Ping(InquiryArgs),
    /// Ask the live servers of a service what they are
    Info(InquiryArgs),
    /// Ask the live servers of a service what they have done
    Stats(InquiryArgs),
    /// Call a service many times, and measure
    Bench(BenchArgs),
    /// Run the conformance suite against the broker, and print its report
    #[cfg(feature = "conform")]
    Conform(ConformArgs),
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("handler").required(true))]
pub(crate) struct ServeArgs {
    /// The service's name
    pub(crate) service: String,

    /// Return the body byte for byte, with its content type and headers
    #[arg(long, group = "handler")]
    pub(crate) echo: bool,

    /// Return the Fibonacci number of the decimal number in the body
    #[arg(long, group = "handler")]
    pub(crate) fib: bool,

    /// Wait, then return the body
    #[arg(long, group = "handler", value_name = "MS")]
    pub(crate) sleep: Option<u64>,

    /// Run `sh -c CMD` with the body on its standard input, and return its standard output
    ///
    /// A non-zero exit is a fault that carries the end of standard error. The command's process group is killed at the
    /// deadline, and when the shell has ended. The environment says more of the request: ANTIPHON_SERVICE,
    /// ANTIPHON_CORRELATION_ID, ANTIPHON_ATTEMPT, ANTIPHON_REMAINING_MS, ANTIPHON_CONTENT_TYPE and, of a header
    /// trace.id, ANTIPHON_HEADER_TRACE_ID.
    #[arg(long, group = "handler", value_name = "CMD")]
    pub(crate) exec: Option<OsString>,

    /// How many requests are handled at once
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) prefetch: u16,

    /// This server's name: it serves SERVICE@NODE as well
    #[arg(long, value_name = "NODE")]
    pub(crate) node: Option<String>,

    /// Serve alone: refuse to start while another server lives
    #[arg(long, group = "ownership")]
    pub(crate) exclusive: bool,

    /// Serve alone: wait while another server lives
    #[arg(long, group = "ownership")]
    pub(crate) standby: bool,

    /// Serve alone: have the server that does so hand over
    #[arg(long, group = "ownership")]
    pub(crate) take_over: bool,

    /// Keep replies that cannot be sent in this file, where they survive the process
    #[cfg(feature = "disk-outbox")]
    #[arg(long, value_name = "PATH")]
    pub(crate) outbox: Option<std::path::PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct CallArgs {
    /// The service's name
    pub(crate) service: String,

    /// The request's body; `-` reads it from standard input; empty if there is none
    #[arg(allow_negative_numbers = true)]
    pub(crate) body: Option<OsString>,

    /// How long to wait for the reply, connecting included: 5s, 500ms, 2m
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    pub(crate) timeout: Duration,

    /// End at once if nobody serves the service, instead of waiting for a server
    #[arg(long)]
    pub(crate) expect_responder: bool,

    /// Call the service on this node
    #[arg(long, value_name = "NODE", conflicts_with = "all")]
    pub(crate) node: Option<String>,

    /// Ask every live server, and print a line for each: its node, a tab, and its answer
    #[arg(long, conflicts_with = "expect_responder")]
    pub(crate) all: bool,

    /// Set a header; may be repeated
    #[arg(long = "header", value_name = "K=V", value_parser = header)]
    pub(crate) headers: Vec<(String, String)>,

    /// What the body is, such as application/json
    #[arg(long, value_name = "T")]
    pub(crate) content_type: Option<String>,

    /// Print one JSON object, also on failure
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct InquiryArgs {
    /// The service's name
    pub(crate) service: String,

    /// How long to wait for the last answer, connecting included: 5s, 500ms, 2m
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration)]
    pub(crate) timeout: Duration,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// The service's name; on memory:// it is served by this process
    pub(crate) service: String,

    /// How many calls to make [default: 10000]
    #[arg(long, value_name = "N", conflicts_with = "duration", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) calls: Option<u64>,

    /// For how long to start calls, instead of a number; those in flight are waited for
    #[arg(long, value_parser = duration)]
    pub(crate) duration: Option<Duration>,

    /// How many calls wait at once
    #[arg(long, value_name = "C", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) concurrency: u16,

    /// The size of each body
    #[arg(long, value_name = "BYTES", default_value_t = 64)]
    pub(crate) size: usize,

    /// How long each call waits, and connecting too: 5s, 500ms, 2m
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    pub(crate) timeout: Duration,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(feature = "conform")]
#[derive(Debug, Args)]
pub(crate) struct ConformArgs {
    /// Write the report to a file as well, as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<std::path::PathBuf>,
}

const EXIT_CODES: &str = "\
Exit codes: 0 ok; 1 remote fault or rejected; 2 usage, unknown scheme, backend absent, invalid name, too large;
3 surely not executed (no connection, no responder, refused, already owned); 4 deadline exceeded;
5 perhaps executed; 130 interrupted. Standard error gets one line, KIND [CODE]: message.";

/// The longest duration that a call may take.
const DURATION_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// A number and a unit: us, ms, s, m or h. Without a unit it is seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" | "" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err("a duration is a number and us, ms, s, m or h, such as 500ms".to_owned()),
    };
    let seconds = number
        .parse::<f64>()
        .map_err(|_| "a duration begins with a number, such as 500ms".to_owned())?;
    match Duration::try_from_secs_f64(seconds * unit) {
        Ok(duration) if duration.is_zero() => Err("a duration is above zero".to_owned()),
        Ok(duration) if duration <= DURATION_MAX => Ok(duration),
        _ => Err("a duration is at most 30 days".to_owned()),
    }
}

fn header(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
        None => Err("a header is NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations() {
        for (text, millis) in [
            ("5s", 5000),
            ("500ms", 500),
            ("2m", 120_000),
            ("1.5s", 1500),
            ("3", 3000),
            ("1h", 3_600_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        assert_eq!(duration("250us"), Ok(Duration::from_micros(250)));
        for bad in [
            "", "s", "5 s", "-1s", "0s", "5d", "1.2.3s", "1e9s", "31000h", "nan", "inf",
        ] {
            assert!(duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_header_value_may_hold_equals_signs() {
        assert_eq!(header("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert_eq!(header("a="), Ok(("a".to_owned(), String::new())));
        assert!(header("a").is_err());
    }

    #[test]
    fn the_url_stands_before_or_behind_the_command() {
        for line in [
            ["antiphon", "--url", "u", "call", "s"],
            ["antiphon", "call", "s", "--url", "u"],
        ] {
            assert_eq!(Cli::parse_from(line).url.as_deref(), Some("u"));
        }
    }
}

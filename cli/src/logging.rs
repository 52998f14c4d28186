//! What happens inside, on standard error, for who asks.

use tracing_subscriber::EnvFilter;

/// The variable that holds a filter such as `antiphon_redis=debug`.
const VARIABLE: &str = "ANTIPHON_LOG";

/// Queues that are absent and messages that come back are everyday matters, and lapin logs the latter with their bodies.
const QUIET: &str = "lapin::channel=off,lapin::returned_messages=off";

/// Logs by the environment's filter, or else by the number of `-v`; by default nothing.
pub(crate) fn start(verbosity: u8) {
    let level = match verbosity {
        0 => "off",
        1 => "warn",
        2 => "debug",
        _ => "trace",
    };
    let filter = match std::env::var(VARIABLE) {
        Ok(filter) if !filter.is_empty() => EnvFilter::new(filter),
        _ => EnvFilter::new(format!("{level},{QUIET}")),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
}

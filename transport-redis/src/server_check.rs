//! Is this a server that keeps what it accepts?

use antiphon_core::{Error, ErrorKind};

use crate::command::Pipeline;
use crate::config::RedisConfig;
use crate::connection::Live;
use crate::error;
use crate::value::Value;

/// The oldest major version: scripts declare there that they run when memory is full.
const MAJOR_MIN: u32 = 7;

/// Checks version and eviction policy, as far as this user may read them.
pub(crate) async fn check(live: &Live, config: &RedisConfig) -> Result<(), Error> {
    let mut pipeline = Pipeline::new();
    pipeline.cmd("INFO").arg("server");
    pipeline.cmd("INFO").arg("memory");
    let answers = live
        .execute(&pipeline)
        .await
        .map_err(|error| error::connect(&error))?;
    let info: String = answers.iter().filter_map(text).collect();
    if let Some(version) = field(&info, "redis_version") {
        let major = version
            .split('.')
            .next()
            .and_then(|major| major.parse::<u32>().ok());
        if major.is_some_and(|major| major < MAJOR_MIN) {
            let message = format!("Redis {version} is too old: 7.0 or newer is needed");
            return Err(Error::not_executed(ErrorKind::Broker, message));
        }
    }
    match field(&info, "maxmemory_policy") {
        Some(policy) if policy != "noeviction" && !config.allow_eviction => {
            let message = format!(
                "Redis may evict requests: maxmemory-policy is {policy}, and must be noeviction (or set allow_eviction)"
            );
            Err(Error::not_executed(ErrorKind::Broker, message))
        }
        _ => Ok(()),
    }
}

fn text(value: &Value) -> Option<&str> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok(),
        Value::SimpleString(text) => Some(text),
        _ => None,
    }
}

fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_info() {
        let info = "# Server\r\nredis_version:7.0.15\r\nredis_mode:standalone\r\n";
        assert_eq!(field(info, "redis_version"), Some("7.0.15"));
        assert_eq!(field(info, "redis"), None);
    }
}

//! What is said to every server of a service: an ordinary request, by broadcast, that names one of these methods.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Gives up the requests whose ids are the lines of the body. No reply.
pub(crate) const CANCEL: &str = "antiphon.cancel";
/// Replies with an empty body.
pub(crate) const PING: &str = "antiphon.ping";
/// Replies with a [`NodeInfo`].
pub(crate) const INFO: &str = "antiphon.info";
/// Replies with a [`NodeStats`].
pub(crate) const STATS: &str = "antiphon.stats";
/// Hands an exclusive service over to who asks. Replies with an empty body when it is free.
pub(crate) const HAND_OVER: &str = "antiphon.hand-over";

/// What a live server says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NodeInfo {
    /// The version of this library.
    pub version: String,
    /// All that it serves.
    pub services: Vec<String>,
    /// How many handlers of each service run at once.
    pub prefetch: usize,
    /// For how long it has been serving.
    #[serde(rename = "uptime_us", with = "micros")]
    pub uptime: Duration,
}

/// What a live server has done, all its services together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NodeStats {
    /// Requests that were given to a handler and ended.
    pub handled: u64,
    /// Handlers that run now, but for those that end as soon as they begin.
    pub running: usize,
    /// Faults that were answered, whoever raised them.
    pub faults: u64,
    /// Requests that had expired when they were taken.
    pub expired: u64,
    /// Requests that were dead-lettered.
    pub dead_lettered: u64,
    /// Requests that another server had before.
    pub redelivered: u64,
    /// Requests whose callers gave them up before they were started.
    pub cancelled: u64,
    /// What the handlers took in all.
    #[serde(rename = "busy_us", with = "micros")]
    pub busy: Duration,
    /// What the longest of them took.
    #[serde(rename = "longest_us", with = "micros")]
    pub longest: Duration,
    /// Replies that were finished while the broker was away, sent since or not, until their deadlines.
    pub kept_replies: usize,
}

/// Times travel as whole microseconds.
mod micros {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(
        duration: &Duration,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_micros)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_statistics() {
        let stats = NodeStats {
            handled: 2,
            busy: Duration::from_micros(1500),
            ..NodeStats::default()
        };
        let text = r#"{"handled":2,"running":0,"faults":0,"expired":0,"dead_lettered":0,"redelivered":0,"cancelled":0,"busy_us":1500,"longest_us":0,"kept_replies":0}"#;
        assert_eq!(serde_json::to_string(&stats).unwrap(), text);
        assert_eq!(serde_json::from_str::<NodeStats>(text).unwrap(), stats);
    }
}

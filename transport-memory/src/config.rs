//! What a memory broker is told when it is made.

use std::time::Duration;

use antiphon_core::{Error, ErrorKind};

const NAME_MAX: usize = 64;

/// How to reach a memory broker, and its limits.
///
/// The limits are the broker's: of several connections to one name, the first, which makes the broker, decides.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MemoryConfig {
    name: String,
    /// For how long a connection that is [paused](crate::MemoryTransport::pause) keeps its deliveries and its
    /// ownership. A connection that lives renews its lease without being asked. Default: 10 s.
    pub lease: Duration,
    /// The most requests that wait for one service; more are refused as `Overloaded`. Default: 1,000,000.
    pub max_queued: usize,
    /// The most dead letters that are kept for one service; the oldest make way. Default: 10,000.
    pub max_dead: usize,
    /// For how long after its deadline a request that nobody took is kept for a server, which would report it as
    /// expired, before it is forgotten; within half as long again, and 15 s at most, it is. Default: 30 s.
    pub keep_expired: Duration,
}

impl MemoryConfig {
    /// The broker of this name, `[A-Za-z0-9_.-]{1,64}`; an empty name is a new broker that nobody else can reach.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the name is not of the grammar.
    pub fn new(name: &str) -> Result<Self, Error> {
        let valid = name.len() <= NAME_MAX
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'));
        if !valid {
            let shown: String = name.chars().take(80).collect();
            let message =
                format!("the name of a memory broker, {shown:?}, is not [A-Za-z0-9_.-]{{0,64}}");
            return Err(Error::not_executed(ErrorKind::Invalid, message));
        }
        Ok(Self {
            name: name.to_owned(),
            ..Self::default()
        })
    }

    /// Reads `memory://NAME`; see [`new`](Self::new) for the name.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the URL is of another scheme or has more than a name.
    pub fn from_url(url: &str) -> Result<Self, Error> {
        let Some(name) = url.strip_prefix("memory://") else {
            // The URL may be that of another broker, with a password in it.
            return Err(Error::not_executed(
                ErrorKind::Invalid,
                "not a URL of the form memory://NAME",
            ));
        };
        Self::new(name)
    }

    /// The broker's name; empty for a private one.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Default for MemoryConfig {
    /// A private broker.
    fn default() -> Self {
        Self {
            name: String::new(),
            lease: Duration::from_secs(10),
            max_queued: 1_000_000,
            max_dead: 10_000,
            keep_expired: Duration::from_secs(30),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        assert_eq!(
            MemoryConfig::from_url("memory://a.b_c-1").unwrap().name(),
            "a.b_c-1"
        );
        assert_eq!(MemoryConfig::from_url("memory://").unwrap().name(), "");
        for bad in [
            "memory:",
            "memory:///",
            "memory://a/b",
            "memory://a?lease=1",
            "redis://u:secret@h",
            "",
            "memory://é",
        ] {
            let error = MemoryConfig::from_url(bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{bad:?}");
            assert!(!error.message().contains("secret"));
        }
    }
}

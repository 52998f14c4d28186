//! A session: what one connection of one subscription holds, under a lease.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use antiphon_core::transport::FlaggedToken;
use tokio::sync::Notify;

use crate::naming::ServiceKeys;

/// A name under which work is held. It is new after every lost lease and every lost connection, so that what an
/// old one still tries is refused.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) name: String,
    pub(crate) keys: Arc<ServiceKeys>,
    /// The key of what it holds.
    pub(crate) held_key: String,
    /// Cancelled when the lease is lost.
    pub(crate) lease: Arc<FlaggedToken>,
    slots: Arc<Slots>,
    held: AtomicUsize,
    retired: AtomicBool,
    left: AtomicBool,
}

impl Session {
    pub(crate) fn new(name: String, keys: &Arc<ServiceKeys>, slots: &Arc<Slots>) -> Arc<Self> {
        Arc::new(Self {
            held_key: keys.held(&name),
            name,
            keys: Arc::clone(keys),
            lease: Arc::default(),
            slots: Arc::clone(slots),
            held: AtomicUsize::new(0),
            retired: AtomicBool::new(false),
            left: AtomicBool::new(false),
        })
    }

    /// It is off the registry.
    pub(crate) fn leave(&self) {
        self.left.store(true, Ordering::Release);
    }

    pub(crate) fn has_left(&self) -> bool {
        self.left.load(Ordering::Acquire)
    }

    pub(crate) fn is_holding(&self) -> bool {
        self.held.load(Ordering::Acquire) > 0
    }

    /// Counts what was taken.
    pub(crate) fn hold(&self, count: usize) {
        self.held.fetch_add(count, Ordering::AcqRel);
        self.slots.held.fetch_add(count, Ordering::AcqRel);
    }

    /// Counts so many as settled. True if the session is over by that: retired, and nothing in its hands.
    pub(crate) fn let_go(&self, count: usize) -> bool {
        let last = self.held.fetch_sub(count, Ordering::AcqRel) == count;
        self.slots.held.fetch_sub(count, Ordering::AcqRel);
        self.slots.freed.notify_one();
        last && self.retired.load(Ordering::Acquire)
    }

    /// It takes no more. True if it is over by that.
    pub(crate) fn retire(&self) -> bool {
        // Before the count is read: the last one to be let go either sees this, or is seen here. Both may be true, and a
        // session that leaves twice does no harm.
        self.retired.store(true, Ordering::Release);
        self.held.load(Ordering::Acquire) == 0
    }
}

/// How much a subscription holds, under all its sessions.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    held: AtomicUsize,
    pub(crate) freed: Notify,
}

impl Slots {
    pub(crate) fn held(&self) -> usize {
        self.held.load(Ordering::Acquire)
    }
}

/// One request in a session's hands. The attempt is part of the token, so that a monitor need not read the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) number: u64,
    pub(crate) attempt: u32,
}

impl Token {
    /// Reads `17`, or `17.3` for the third attempt.
    pub(crate) fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        let (number, attempt) = text.split_once('.').unwrap_or((text, "1"));
        Some(Self {
            number: number.parse().ok()?,
            attempt: attempt.parse().ok()?,
        })
    }
}

impl redis::ToRedisArgs for Token {
    fn write_redis_args<W: ?Sized + redis::RedisWrite>(&self, out: &mut W) {
        if self.attempt > 1 {
            out.write_arg_fmt(self);
        } else {
            self.number.write_redis_args(out);
        }
    }
}

impl redis::ToSingleRedisArg for Token {}

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.number)?;
        if self.attempt > 1 {
            write!(f, ".{}", self.attempt)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens() {
        for text in ["17", "17.3"] {
            assert_eq!(Token::parse(text.as_bytes()).unwrap().to_string(), text);
        }
        assert!(Token::parse(b"x").is_none() && Token::parse(b"1.").is_none());
    }
}

//! What a server counts.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{Outbox, Running};
use crate::control::NodeStats;

/// What a server has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerStats {
    /// Requests that were given to a handler.
    pub handled: u64,
    /// Faults that were answered, whoever raised them.
    pub faults: u64,
    /// Requests that had expired when they were taken. Not started.
    pub expired: u64,
    /// Requests that were dead-lettered, having been delivered too often.
    pub dead_lettered: u64,
    /// Requests whose lease was lost before they were settled.
    pub lost_leases: u64,
    /// Requests that could not be settled for another reason; the broker delivers them again.
    pub unsettled: u64,
    /// Replies that could not be sent, and not be kept either: no room.
    pub not_kept: u64,
    /// Replies that are kept in memory only, because the store's disk failed or took too long: they die with the process.
    pub not_stored: u64,
    /// Requests that another server had before.
    pub redelivered: u64,
    /// Requests whose callers gave them up, or did not want them any more, before they were started.
    pub cancelled: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) handled: AtomicU64,
    pub(crate) faults: AtomicU64,
    pub(crate) expired: AtomicU64,
    pub(crate) dead_lettered: AtomicU64,
    pub(crate) lost_leases: AtomicU64,
    pub(crate) unsettled: AtomicU64,
    pub(crate) not_kept: AtomicU64,
    pub(crate) not_stored: AtomicU64,
    pub(crate) redelivered: AtomicU64,
    pub(crate) cancelled: AtomicU64,
    busy_us: AtomicU64,
    longest_us: AtomicU64,
}

impl Counters {
    pub(crate) fn node_stats(&self, running: &Running, outbox: &Outbox) -> NodeStats {
        let stats = self.stats();
        let micros = |counter: &AtomicU64| Duration::from_micros(counter.load(Ordering::Relaxed));
        NodeStats {
            handled: stats.handled,
            running: running.count(),
            faults: stats.faults,
            expired: stats.expired,
            dead_lettered: stats.dead_lettered,
            redelivered: stats.redelivered,
            cancelled: stats.cancelled,
            busy: micros(&self.busy_us),
            longest: micros(&self.longest_us),
            kept_replies: outbox.count(),
        }
    }

    pub(crate) fn took(&self, elapsed: Duration) {
        let micros = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        // Most handlers change neither, and to write is what costs.
        if micros > 0 {
            self.busy_us.fetch_add(micros, Ordering::Relaxed);
        }
        if micros > self.longest_us.load(Ordering::Relaxed) {
            self.longest_us.fetch_max(micros, Ordering::Relaxed);
        }
    }

    pub(crate) fn stats(&self) -> ServerStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ServerStats {
            handled: read(&self.handled),
            faults: read(&self.faults),
            expired: read(&self.expired),
            dead_lettered: read(&self.dead_lettered),
            lost_leases: read(&self.lost_leases),
            unsettled: read(&self.unsettled),
            not_kept: read(&self.not_kept),
            not_stored: read(&self.not_stored),
            redelivered: read(&self.redelivered),
            cancelled: read(&self.cancelled),
        }
    }
}

pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

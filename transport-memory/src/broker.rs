//! The user's handle of a broker, and the names under which brokers are found.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, LazyLock, Mutex, Weak};

use antiphon_core::{Request, ServiceName};

use crate::config::MemoryConfig;
use crate::hub::Hub;
use crate::lock;
use crate::transport::MemoryTransport;

/// A broker in this process: makes connections, shows what it holds, and fails as it is told.
///
/// Clones are the same broker. It lives, with all that it holds, as long as any of them or of its
/// [connections](MemoryTransport).
#[derive(Clone, Debug)]
pub struct MemoryBroker(Arc<HubHandle>);

impl MemoryBroker {
    /// A new private broker with the default limits.
    #[must_use]
    pub fn new() -> Self {
        Self::open(MemoryConfig::default())
    }

    /// The broker that the configuration names, made if there is none.
    #[must_use]
    pub fn open(config: MemoryConfig) -> Self {
        if config.name().is_empty() {
            return Self(Arc::new(HubHandle::new(config)));
        }
        let mut names = lock(&NAMES);
        if let Some(handle) = names.get(config.name()).and_then(Weak::upgrade) {
            return Self(handle);
        }
        let name = config.name().to_owned();
        let handle = Arc::new(HubHandle::new(config));
        names.insert(name, Arc::downgrade(&handle));
        Self(handle)
    }

    pub(crate) fn from_handle(handle: Arc<HubHandle>) -> Self {
        Self(handle)
    }

    /// A new connection.
    #[must_use]
    pub fn connect(&self) -> MemoryTransport {
        MemoryTransport::new(Arc::clone(&self.0))
    }

    /// What the broker holds now. Looking forgets nothing.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let hub = self.hub();
        Stats {
            services: hub
                .queues()
                .into_iter()
                .map(|(name, queue)| (name, queue.inspect()))
                .filter(|(_, stats)| stats.is_used())
                .collect(),
            inboxes: hub.inbox_count(),
            undeliverable_replies: hub.undeliverable(),
        }
    }

    /// The dead letters of a service, the oldest first.
    #[must_use]
    pub fn dead_letters(&self, service: &ServiceName) -> Vec<DeadLetter> {
        self.hub()
            .queue(service)
            .map(|queue| queue.dead_letters())
            .unwrap_or_default()
    }

    pub(crate) fn hub(&self) -> &Arc<Hub> {
        self.0.hub()
    }
}

impl Default for MemoryBroker {
    fn default() -> Self {
        Self::new()
    }
}

/// What a broker holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// The services that have a request, a dead letter or a subscriber.
    pub services: BTreeMap<ServiceName, ServiceStats>,
    /// Inboxes that are open.
    pub inboxes: usize,
    /// Replies to no inbox, since the broker was made. They were dropped.
    pub undeliverable_replies: u64,
}

/// What a broker holds for one service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServiceStats {
    /// Requests that wait.
    pub queued: usize,
    /// Requests in servers' hands.
    pub held: usize,
    /// Dead letters.
    pub dead: usize,
    /// Live subscribers.
    pub subscribers: usize,
}

impl ServiceStats {
    fn is_used(&self) -> bool {
        self.queued > 0 || self.held > 0 || self.dead > 0 || self.subscribers > 0
    }
}

/// A request that was given up.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeadLetter {
    /// The request.
    pub request: Request,
    /// The attempt at which it was given up.
    pub attempt: u32,
    /// Why.
    pub reason: String,
}

/// Counts the handles of a broker. Inboxes and subscriptions refer to the broker too, and may outlive all handles; the
/// name is free then all the same.
#[derive(Debug)]
pub(crate) struct HubHandle(Arc<Hub>);

impl HubHandle {
    fn new(config: MemoryConfig) -> Self {
        Self(Hub::new(config))
    }

    pub(crate) fn hub(&self) -> &Arc<Hub> {
        &self.0
    }
}

impl Drop for HubHandle {
    fn drop(&mut self) {
        let name = self.0.config.name();
        let mut names = lock(&NAMES);
        // Another broker may have taken the name since the last handle of this one was dropped.
        if names
            .get(name)
            .is_some_and(|present| present.strong_count() == 0)
        {
            names.remove(name);
        }
    }
}

static NAMES: LazyLock<Mutex<HashMap<String, Weak<HubHandle>>>> = LazyLock::new(Mutex::default);

//! The broker itself: the queues and the inboxes that all its connections share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::Duration;

use antiphon_core::transport::{Incoming, SubscribeOptions};
use antiphon_core::{CorrelationId, Error, Reply, ReplyAddress, Request, ServiceName};
use tokio::time::Instant;

use crate::config::MemoryConfig;
use crate::connection::Connection;
use crate::faults::Faults;
use crate::inbox::Letters;
use crate::lock;
use crate::queue::{Queue, Queued};
use crate::sweeper::Sweeper;
use crate::table::Key;

type Map<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// Locks are taken in this order: a connection's transition, services, inboxes or audiences, one queue, one inbox.
#[derive(Debug)]
pub(crate) struct Hub {
    pub(crate) config: MemoryConfig,
    pub(crate) faults: Faults,
    sweeper: Arc<Sweeper>,
    services: RwLock<Services>,
    inboxes: RwLock<Map<ReplyAddress, Arc<Letters>>>,
    /// Who hears what is broadcast to a service.
    audiences: Mutex<Map<ServiceName, Vec<Weak<Letters>>>>,
    connections: Mutex<Vec<Weak<Connection>>>,
    next_connection: AtomicU64,
    undeliverable: AtomicU64,
}

#[derive(Debug, Default)]
struct Services {
    queues: Map<ServiceName, Arc<Queue>>,
    /// With so many queues the unused ones are removed, lest calls to ever new names fill the memory.
    sweep_at: usize,
}

const SWEEP_AT_LEAST: usize = 256;

impl Hub {
    pub(crate) fn new(config: MemoryConfig) -> Arc<Self> {
        Arc::new_cyclic(|hub| Self {
            sweeper: Sweeper::new(Weak::clone(hub), config.keep_expired),
            config,
            faults: Faults::default(),
            services: RwLock::default(),
            inboxes: RwLock::default(),
            audiences: Mutex::default(),
            connections: Mutex::default(),
            next_connection: AtomicU64::new(0),
            undeliverable: AtomicU64::new(0),
        })
    }

    pub(crate) fn connect(self: &Arc<Self>) -> Arc<Connection> {
        let id = self.next_connection.fetch_add(1, Ordering::Relaxed);
        let mut connections = lock(&self.connections);
        // Under the lock, so that a change for all connections meets this one or finds it made to match.
        let connection = Arc::new(Connection::new(
            id,
            Arc::clone(self),
            self.faults.is_blocked(),
        ));
        connections.retain(|connection| connection.strong_count() > 0);
        connections.push(Arc::downgrade(&connection));
        connection
    }

    /// The connections that there are; `change` happens before any later one is made.
    pub(crate) fn connections(&self, change: impl FnOnce(&Faults)) -> Vec<Arc<Connection>> {
        let connections = lock(&self.connections);
        change(&self.faults);
        connections.iter().filter_map(Weak::upgrade).collect()
    }

    /// Puts a request into its service's queue, if it can be committed.
    pub(crate) fn request(
        &self,
        service: &ServiceName,
        request: Arc<Request>,
        expires: Option<Instant>,
        expect_responder: bool,
        commit: impl FnOnce() -> bool,
    ) -> Result<(), Error> {
        let queued = Queued {
            request,
            attempt: 1,
            expires,
            arrives: self.faults.arrival(),
        };
        let waker = self.with_queue(service, |queue| {
            queue.push(queued, expect_responder, commit, &self.config)
        })?;
        if let Some(waker) = waker {
            waker.wake();
        }
        if let Some(expires) = expires {
            self.sweeper.watch(expires);
        }
        Ok(())
    }

    pub(crate) fn subscribe(
        &self,
        service: &ServiceName,
        connection: u64,
        options: SubscribeOptions,
    ) -> Result<(Arc<Queue>, Key), Error> {
        self.with_queue(service, |queue| {
            Ok((Arc::clone(queue), queue.subscribe(connection, options)?))
        })
    }

    /// Takes a request back that waits in its service's queue.
    pub(crate) fn withdraw(&self, service: &ServiceName, id: &CorrelationId) -> bool {
        self.queue(service).is_some_and(|queue| queue.withdraw(id))
    }

    pub(crate) fn join(&self, service: &ServiceName, letters: &Arc<Letters>) {
        let mut audiences = lock(&self.audiences);
        let audience = audiences.entry(service.clone()).or_default();
        audience
            .retain(|other| other.strong_count() > 0 && !other.ptr_eq(&Arc::downgrade(letters)));
        audience.push(Arc::downgrade(letters));
    }

    /// Delivers a request to the inboxes of all that joined the service, and says how many they are.
    pub(crate) fn broadcast(&self, service: &ServiceName, request: &Arc<Request>) -> usize {
        let audience: Vec<_> = {
            let mut audiences = lock(&self.audiences);
            let Some(audience) = audiences.get_mut(service) else {
                return 0;
            };
            audience.retain(|letters| letters.strong_count() > 0);
            if audience.is_empty() {
                audiences.remove(service);
                return 0;
            }
            audience.iter().filter_map(Weak::upgrade).collect()
        };
        let arrives = self.faults.arrival();
        let mut reached = 0;
        for letters in audience.iter().filter(|letters| !letters.is_closed()) {
            reached += 1;
            let incoming = Incoming::Request {
                service: service.clone(),
                request: Arc::clone(request),
            };
            if let Some(waker) = letters.push(incoming, arrives) {
                waker.wake();
            }
        }
        reached
    }

    /// Delivers a reply to its inbox. One to nowhere is dropped and counted; false then.
    pub(crate) fn reply(&self, to: &ReplyAddress, reply: Arc<Reply>) -> bool {
        let Some(fate) = self.faults.reply_fate() else {
            return self.deliver(to, reply, None);
        };
        for _ in 1..fate.copies {
            self.deliver(to, Arc::clone(&reply), fate.arrives);
        }
        fate.copies == 0 || self.deliver(to, reply, fate.arrives)
    }

    fn deliver(&self, to: &ReplyAddress, reply: Arc<Reply>, arrives: Option<Instant>) -> bool {
        let delivered = {
            let inboxes = self.inboxes.read().unwrap_or_else(PoisonError::into_inner);
            inboxes
                .get(to)
                .map(|letters| letters.push(Incoming::Reply(reply), arrives))
        };
        match delivered {
            Some(waker) => {
                waker.into_iter().for_each(std::task::Waker::wake);
                true
            }
            None => {
                self.undeliverable.fetch_add(1, Ordering::Relaxed);
                false
            }
        }
    }

    pub(crate) fn open_inbox(&self, connection: u64) -> Arc<Letters> {
        let letters = Arc::new(Letters::new(connection));
        let mut inboxes = self.inboxes.write().unwrap_or_else(PoisonError::into_inner);
        inboxes.insert(letters.address(), Arc::clone(&letters));
        letters
    }

    pub(crate) fn remove_inbox(&self, letters: &Letters) {
        let mut inboxes = self.inboxes.write().unwrap_or_else(PoisonError::into_inner);
        // The address is asked for under the lock: it may be changing.
        inboxes.remove(&letters.address());
        drop(inboxes);
        // A queue may know it still.
        letters.close();
    }

    pub(crate) fn inbox(&self, address: &ReplyAddress) -> Option<Arc<Letters>> {
        let inboxes = self.inboxes.read().unwrap_or_else(PoisonError::into_inner);
        inboxes.get(address).cloned()
    }

    pub(crate) fn wake_inboxes(&self, connection: u64) {
        let inboxes = self.inboxes.read().unwrap_or_else(PoisonError::into_inner);
        let own = inboxes
            .values()
            .filter(|letters| letters.connection() == connection);
        let wakers: Vec<_> = own.filter_map(|letters| letters.take_waker()).collect();
        drop(inboxes);
        wakers.into_iter().for_each(std::task::Waker::wake);
    }

    pub(crate) fn close_inboxes(&self, connection: u64) {
        let mut inboxes = self.inboxes.write().unwrap_or_else(PoisonError::into_inner);
        let closed: Vec<_> = inboxes
            .extract_if(|_, letters| letters.connection() == connection)
            .collect();
        drop(inboxes);
        for (_, letters) in closed {
            letters.close();
        }
    }

    /// Forgets all messages and gives every inbox a new address.
    pub(crate) fn clear(&self) {
        self.for_each_queue(Queue::clear);
        let mut inboxes = self.inboxes.write().unwrap_or_else(PoisonError::into_inner);
        let lost: Vec<_> = inboxes.drain().map(|(_, letters)| letters).collect();
        let wakers: Vec<_> = lost.iter().filter_map(|letters| letters.lose()).collect();
        inboxes.extend(lost.into_iter().map(|letters| (letters.address(), letters)));
        drop(inboxes);
        wakers.into_iter().for_each(std::task::Waker::wake);
    }

    pub(crate) fn for_each_queue(&self, mut visit: impl FnMut(&Queue)) {
        for (_, queue) in self.queues() {
            visit(&queue);
        }
    }

    /// All queues, in no order.
    pub(crate) fn queues(&self) -> Vec<(ServiceName, Arc<Queue>)> {
        let services = self.services.read().unwrap_or_else(PoisonError::into_inner);
        services
            .queues
            .iter()
            .map(|(name, queue)| (name.clone(), Arc::clone(queue)))
            .collect()
    }

    pub(crate) fn queue(&self, service: &ServiceName) -> Option<Arc<Queue>> {
        self.services
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .queues
            .get(service)
            .cloned()
    }

    /// Forgets requests that expired long ago, and queues that are not used. Says when the next request expires.
    pub(crate) fn sweep(&self) -> Option<Instant> {
        let queues = self.queues();
        let next = queues
            .iter()
            .filter_map(|(_, queue)| queue.forget_expired(&self.config))
            .min();
        let mut services = self
            .services
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        services.sweep();
        next
    }

    #[cfg(feature = "conformance")]
    pub(crate) fn has_inbox(&self, address: &ReplyAddress) -> bool {
        let inboxes = self.inboxes.read().unwrap_or_else(PoisonError::into_inner);
        inboxes.contains_key(address)
    }

    pub(crate) fn inbox_count(&self) -> usize {
        self.inboxes
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    pub(crate) fn undeliverable(&self) -> u64 {
        self.undeliverable.load(Ordering::Relaxed)
    }

    /// Uses a service's queue, making it if there is none. The map stays locked meanwhile, so that the queue cannot
    /// be removed as unused between being found and being used.
    fn with_queue<T>(&self, service: &ServiceName, use_it: impl FnOnce(&Arc<Queue>) -> T) -> T {
        {
            let services = self.services.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(queue) = services.queues.get(service) {
                return use_it(queue);
            }
        }
        let mut services = self
            .services
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if services.queues.len() >= services.sweep_at.max(SWEEP_AT_LEAST) {
            services.sweep();
            services.sweep_at = 2 * services.queues.len();
        }
        let queue = services
            .queues
            .entry(service.clone())
            .or_insert_with(|| Arc::new(Queue::new(service.clone(), Arc::clone(&self.sweeper))));
        use_it(queue)
    }
}

/// Takes the time that a request has waited off its budget.
pub(crate) fn take_off(request: &mut Arc<Request>, waited: Duration) {
    if let Some(deadline) = &mut Arc::make_mut(request).deadline {
        deadline.budget = deadline.budget.saturating_sub(waited);
    }
}

impl Services {
    fn sweep(&mut self) {
        self.queues.retain(|_, queue| !queue.is_unused());
    }
}

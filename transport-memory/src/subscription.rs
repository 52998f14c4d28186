//! A server's half of a subscription, and of each delivery.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use antiphon_core::transport::{
    Delivery, FlaggedToken, Later, Settle, Settlement, Subscription, SubscriptionEvent, Unsettled,
};
use antiphon_core::{Error, ErrorKind};
use async_trait::async_trait;
use tokio::task::coop;

use crate::closed;
use crate::connection::Connection;
use crate::inbox::Timer;
use crate::queue::{Claim, Queue, Return, Taken};
use crate::table::Key;

#[derive(Debug)]
pub(crate) struct MemorySubscription {
    queue: Arc<Queue>,
    link: Arc<Link>,
    session: Key,
    /// Empty between two calls of `recv`; kept for its memory.
    taken: Vec<Taken>,
}

/// What all deliveries under one lease share, and the way to what they concern.
#[derive(Debug)]
struct Link {
    connection: Arc<Connection>,
    queue: Arc<Queue>,
    lease: Arc<FlaggedToken>,
}

impl MemorySubscription {
    pub(crate) fn new(connection: Arc<Connection>, queue: Arc<Queue>, session: Key) -> Self {
        let link = Link {
            connection,
            queue: Arc::clone(&queue),
            lease: Arc::default(),
        };
        Self {
            queue,
            link: Arc::new(link),
            session,
            taken: Vec::new(),
        }
    }
}

#[async_trait]
impl Subscription for MemorySubscription {
    async fn recv(&mut self) -> SubscriptionEvent {
        coop::consume_budget().await;
        let Self {
            queue,
            link,
            session,
            taken,
        } = self;
        let mut wait = Wait {
            queue,
            session: *session,
            waiting: false,
        };
        let mut timer = Timer::default();
        poll_fn(|cx| {
            loop {
                let claim = queue.claim(*session, cx.waker(), taken);
                wait.waiting = matches!(claim, Claim::Wait(_));
                match claim {
                    Claim::Taken(lease) => {
                        Link::change(link, lease);
                        let deliver = |taken: Taken| {
                            let settlement = MemorySettlement {
                                link: Arc::clone(link),
                                held: Some(taken.key),
                            };
                            Delivery::new(
                                taken.request,
                                taken.attempt,
                                taken.expires,
                                Box::new(settlement),
                            )
                        };
                        return Poll::Ready(SubscriptionEvent::Deliveries(
                            taken.drain(..).map(deliver).collect(),
                        ));
                    }
                    Claim::Over(error) => return Poll::Ready(SubscriptionEvent::Closed(error)),
                    Claim::Wait(next) if timer.is_due(next, cx) => {}
                    Claim::Wait(_) => return Poll::Pending,
                }
            }
        })
        .await
    }

    async fn stop(&mut self) {
        self.queue.stop(self.session);
    }
}

impl Link {
    /// A new one for a new lease, which what was delivered before does not have.
    fn change(link: &mut Arc<Self>, lease: Arc<FlaggedToken>) {
        if !Arc::ptr_eq(&link.lease, &lease) {
            *link = Arc::new(Self {
                connection: Arc::clone(&link.connection),
                queue: Arc::clone(&link.queue),
                lease,
            });
        }
    }
}

impl Drop for MemorySubscription {
    fn drop(&mut self) {
        self.queue.abandon(self.session);
    }
}

/// A waiting `recv`. If its future is dropped, a request that it was woken for must go to somebody else.
struct Wait<'a> {
    queue: &'a Queue,
    session: Key,
    waiting: bool,
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        if self.waiting {
            self.queue.cancel_wait(self.session);
        }
    }
}

#[derive(Debug)]
pub(crate) struct MemorySettlement {
    link: Arc<Link>,
    /// None once it is settled.
    held: Option<Key>,
}

impl Settlement for MemorySettlement {
    fn settle(
        mut self: Box<Self>,
        settle: Settle,
        later: Later<'_>,
    ) -> Poll<Result<(), Unsettled>> {
        if self.link.connection.is_paused() {
            let connection = Arc::clone(&self.link.connection);
            let settled = later.settled(&settle);
            connection.park(*self, settle, settled);
            return Poll::Pending;
        }
        Poll::Ready(self.settle_now(settle))
    }

    fn lease(&self) -> &FlaggedToken {
        &self.link.lease
    }
}

impl MemorySettlement {
    pub(crate) fn settle_now(&mut self, settle: Settle) -> Result<(), Unsettled> {
        let Some(key) = self.held.take() else {
            return Err(Unsettled::new(self.lost(), settle));
        };
        let Link {
            connection, queue, ..
        } = &*self.link;
        // Settling decides who owns the request, so the reply comes after it: the other way round, the reply of a server
        // that has lost its lease would slip out. Nothing can come between the two: a crash takes the broker as well.
        let hub = connection.hub();
        let settled = match settle {
            Settle::Reply(reply) => queue.settle(key, reply, hub).map_err(Settle::Reply),
            Settle::DeadLetter { reason, reply } => {
                match queue.bury(key, reason.clone(), &hub.config) {
                    Some(request) => {
                        if let (Some(to), Some(reply)) = (&request.reply_to, reply) {
                            hub.reply(to, reply);
                        }
                        Ok(())
                    }
                    None => Err(Settle::DeadLetter { reason, reply }),
                }
            }
            Settle::Release => {
                let returned = queue.give_back(key, Return::Uncounted);
                returned.ok_or(Settle::Release)
            }
        };
        settled.map_err(|settle| Unsettled::new(self.lost(), settle))
    }

    fn lost(&self) -> Error {
        if self.link.connection.is_closed() {
            return closed("connection");
        }
        Error::maybe_executed(ErrorKind::LostLease, "another server may have the request")
    }
}

impl Drop for MemorySettlement {
    fn drop(&mut self) {
        if let Some(key) = self.held.take() {
            self.link.queue.give_back(key, Return::Counted);
        }
    }
}

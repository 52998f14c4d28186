//! A server's half of a subscription, and of each delivery.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use antiphon_core::transport::{
    Delivery, Later, Settle, Settlement, Subscription, SubscriptionEvent,
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
    link: Arc<Link>,
    session: Key,
    /// Empty between two calls of `recv`; kept for its memory.
    taken: Vec<Taken>,
}

/// The way from a subscription or a delivery to what it concerns.
#[derive(Debug)]
struct Link {
    connection: Arc<Connection>,
    queue: Arc<Queue>,
}

impl MemorySubscription {
    pub(crate) fn new(connection: Arc<Connection>, queue: Arc<Queue>, session: Key) -> Self {
        Self {
            link: Arc::new(Link { connection, queue }),
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
            link,
            session,
            taken,
        } = self;
        let mut wait = Wait {
            queue: &link.queue,
            session: *session,
            waiting: false,
        };
        let mut timer = Timer::default();
        poll_fn(|cx| {
            loop {
                let claim = link.queue.claim(*session, cx.waker(), taken);
                wait.waiting = matches!(claim, Claim::Wait(_));
                match claim {
                    Claim::Taken(lease) => {
                        let deliver = |taken: Taken| {
                            let settlement = MemorySettlement {
                                link: Arc::clone(link),
                                held: Some(taken.key),
                            };
                            Delivery::new(
                                taken.request,
                                taken.attempt,
                                taken.expires,
                                Arc::clone(&lease),
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
        self.link.queue.stop(self.session);
    }
}

impl Drop for MemorySubscription {
    fn drop(&mut self) {
        self.link.queue.abandon(self.session);
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
    fn settle(mut self: Box<Self>, settle: Settle, later: Later<'_>) -> Poll<Result<(), Error>> {
        if self.link.connection.is_paused() {
            let connection = Arc::clone(&self.link.connection);
            connection.park(*self, settle, later.settled());
            return Poll::Pending;
        }
        Poll::Ready(self.settle_now(settle))
    }
}

impl MemorySettlement {
    pub(crate) fn settle_now(&mut self, settle: Settle) -> Result<(), Error> {
        let Some(key) = self.held.take() else {
            return Err(self.lost());
        };
        let Link { connection, queue } = &*self.link;
        // Settling decides who owns the request, so the reply comes after it: the other way round, the reply of a server
        // that has lost its lease would slip out. Nothing can come between the two: a crash takes the broker as well.
        let (settled, reply) = match settle {
            Settle::Reply(reply) => (queue.settle(key), reply),
            Settle::DeadLetter { reason, reply } => {
                (queue.bury(key, reason, &connection.hub().config), reply)
            }
            Settle::Release => {
                let returned = queue.give_back(key, Return::Uncounted);
                return returned.ok_or_else(|| self.lost());
            }
        };
        let request = settled.ok_or_else(|| self.lost())?;
        if let (Some(to), Some(reply)) = (&request.reply_to, reply) {
            connection.hub().reply(to, reply);
        }
        Ok(())
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

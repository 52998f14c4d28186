//! One service that is served.

use std::future::poll_fn;

use tokio::task::yield_now;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::clutch::LostServices;
use super::desk::{HandOver, Owned, Served};
use super::ownership::Owner;
use super::running_server::DROP_TIMEOUT;
use crate::config::Ownership;
use crate::error::{Error, ErrorKind};
use crate::transport::{Subscription, SubscriptionEvent};

/// One service that is served.
pub(super) struct Serving {
    pub(super) subscription: Box<dyn Subscription>,
    /// The service, its own handlers, and whether it is owned.
    pub(super) served: Served,
    /// The handlers of the whole server.
    pub(super) all: TaskTracker,
    pub(super) stop: CancellationToken,
    pub(super) owner: Owner,
    /// By which it may be asked to hand over.
    pub(super) hand_over: HandOver,
    /// Where it says that it stands by again.
    pub(super) lost: LostServices,
}

impl Serving {
    /// Takes deliveries and has them served; why it is over, unless it was told to stop.
    pub(super) async fn run(mut self) -> Option<Error> {
        let owned = self.served.owned.clone();
        let _free_at_the_end = FreeOnDrop(owned.clone());
        let mut turn = None;
        loop {
            let event = tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                () = self.hand_over.asked.cancelled() => return Some(self.hand_over().await),
                event = recv(&mut *self.subscription, &mut turn) => event,
            };
            match event {
                SubscriptionEvent::Deliveries(deliveries) => {
                    let own = self.is_alone().then_some(&self.served.own);
                    let in_time = self
                        .served
                        .service
                        .start(deliveries, &self.all, own, &mut turn);
                    if !in_time {
                        // There may be more at once, and then others would wait for all of it.
                        yield_now().await;
                        turn = None;
                    }
                }
                SubscriptionEvent::Closed(error) => {
                    owned.end();
                    let name = self.served.service.name();
                    tracing::warn!(service = %name, %error, "no longer served");
                    if self.owner.config.ownership != Ownership::Standby
                        || error.kind() == ErrorKind::Closed
                    {
                        return Some(error);
                    }
                    self.lost.send_modify(|lost| {
                        lost.insert(name.clone(), error.to_string().into());
                    });
                    let again = tokio::select! {
                        again = self.owner.subscribe(std::slice::from_ref(name)) => again,
                        () = self.stop.cancelled() => return None,
                    };
                    match again.map(|mut subscriptions| subscriptions.pop()) {
                        Ok(Some(subscription)) => self.subscription = subscription,
                        Ok(None) => return Some(error),
                        Err(error) => return Some(error),
                    }
                    self.lost.send_modify(|lost| {
                        lost.remove(self.served.service.name());
                    });
                    self.hand_over = owned.begin();
                }
            }
        }
        self.subscription.stop().await;
        None
    }

    fn is_alone(&self) -> bool {
        self.owner.config.ownership != Ownership::Shared
    }

    /// Leaves the service to a newcomer: when nothing of it runs here any more.
    async fn hand_over(mut self) -> Error {
        self.subscription.stop().await;
        let (own, settling) = (&self.served.own, &self.served.service.settling);
        own.close();
        settling.close();
        let ended = async {
            own.wait().await;
            settling.wait().await;
        };
        let grace = self.owner.config.grace;
        if tokio::time::timeout(grace, ended).await.is_err() {
            self.served.service.kill.cancel();
            // Those that block their thread cannot be dropped; nobody waits for them.
            let _ = tokio::time::timeout(DROP_TIMEOUT, own.wait()).await;
        }
        Error::not_executed(ErrorKind::AlreadyOwned, "a newcomer took the service over")
    }
}

/// Receives. If it has to wait, others run meanwhile, and the turn ends.
async fn recv(
    subscription: &mut dyn Subscription,
    turn: &mut Option<Instant>,
) -> SubscriptionEvent {
    let mut receiving = subscription.recv();
    poll_fn(|cx| {
        let received = receiving.as_mut().poll(cx);
        if received.is_pending() {
            *turn = None;
        }
        received
    })
    .await
}

/// Whoever asked for the service learns that it is free, however it ends.
struct FreeOnDrop(Owned);

impl Drop for FreeOnDrop {
    fn drop(&mut self) {
        self.0.end();
    }
}

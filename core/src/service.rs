//! What becomes of one request in a server's hands.

mod execution;
mod under_way;
mod wanted;

pub(crate) use self::under_way::UnderWay;

use std::collections::BTreeMap;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use self::wanted::Wanted;
use crate::client::Client;
use crate::config::ServerConfig;
use crate::envelope::Reply;
use crate::error::{Error, ErrorKind, Executed};
use crate::fault::{Code, Fault};
use crate::handler::AnyHandler;
use crate::name::{Method, Node, ReplyAddress, ServiceName};
use crate::server::{Counters, Outbox, Running, count};
use crate::signal::{Signal, Signals};
use crate::transport::{Delivery, FlaggedToken, Outbound, Settle};

/// After so long, what was delivered together is served by tasks, and others are to have their turn: timers too.
const IN_PLACE_MAX: Duration = Duration::from_micros(200);

type Serving = Pin<Box<dyn Future<Output = ()> + Send>>;

/// One service of one server.
pub(crate) struct Service {
    pub(crate) name: ServiceName,
    pub(crate) node: Node,
    pub(crate) handlers: BTreeMap<Option<Method>, Arc<dyn AnyHandler>>,
    pub(crate) config: ServerConfig,
    pub(crate) counters: Arc<Counters>,
    pub(crate) client: Client,
    pub(crate) running: Arc<Running>,
    pub(crate) outbox: Arc<Outbox>,
    /// Fires when the server stops waiting for its handlers.
    pub(crate) kill: FlaggedToken,
    /// The settlements under way for which no task waits. Only a drain waits for them, not whoever kills.
    pub(crate) settling: TaskTracker,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Service {
    pub(crate) fn name(&self) -> &ServiceName {
        &self.name
    }

    /// Serves deliveries, each in a task of its own; those of `own` are among `all`.
    ///
    /// On a runtime of one thread those that end at their first poll, as most do whose handlers wait for nothing, cost no
    /// task. There they hold up nobody who could have run beside them; on several threads they might.
    ///
    /// `turn` is since when the caller has kept its thread to itself; set if it is none. False if that is so long that others should
    /// have their turn before the next deliveries: many short handlers take as long as one long one.
    #[must_use]
    pub(crate) fn start(
        self: &Arc<Self>,
        deliveries: Vec<Delivery>,
        all: &TaskTracker,
        own: Option<&TaskTracker>,
        turn: &mut Option<Instant>,
    ) -> bool {
        let in_place = Handle::current().runtime_flavor() == RuntimeFlavor::CurrentThread;
        let mut now = Instant::now();
        let until = now + IN_PLACE_MAX;
        let turn_ends = *turn.get_or_insert(now) + IN_PLACE_MAX;
        for delivery in deliveries {
            // Boxed, since a task moves its future about.
            let serving: Serving = if !in_place || now >= until {
                Box::pin(Arc::clone(self).serve(delivery))
            } else if self.is_plain(&delivery, now) {
                match self.begin(delivery, &mut now) {
                    Some(left) => Box::pin(Arc::clone(self).finish(left)),
                    None => continue,
                }
            } else {
                let mut serving = Box::pin(Arc::clone(self).serve(delivery));
                let polled = execution::poll_once(&mut serving);
                now = Instant::now();
                match polled {
                    Poll::Ready(()) => continue,
                    Poll::Pending => serving,
                }
            };
            match own {
                None => all.spawn(serving),
                Some(own) => all.spawn(own.track_future(serving)),
            };
        }
        !in_place || now < turn_ends
    }

    /// Takes one delivery to its end.
    pub(crate) async fn serve(self: Arc<Self>, delivery: Delivery) {
        let now = Instant::now();
        if self.is_plain(&delivery, now) {
            self.execute(delivery, now).await;
        } else {
            // Apart, so that the many requests that do not come here carry no place for it.
            Box::pin(self.examine(delivery)).await;
        }
    }

    /// True if there is nothing to know of a request before it is executed.
    fn is_plain(&self, delivery: &Delivery, now: Instant) -> bool {
        delivery.attempt == 1
            && delivery.is_certain(now)
            && !delivery.waited
            && delivery.request.signals != Signals::Offer
            && self.outbox.count() == 0
            && !self.running.remembers_any()
    }

    /// Executes a request, unless it was delivered too often, is done already, or is not wanted any more.
    async fn examine(self: &Arc<Self>, mut delivery: Delivery) {
        let (id, reply_to) = (&delivery.request.id, delivery.request.reply_to.as_ref());
        if delivery.attempt > 1 {
            count(&self.counters.redelivered);
        }
        // It was finished when the broker was away.
        if let (Some(reply), Some(to)) = (self.outbox.find(id, reply_to), reply_to) {
            let (id, to) = (id.clone(), to.clone());
            match self
                .settled(delivery.settled(Settle::Reply(Some(reply))))
                .await
            {
                Some(Ok(())) => self.outbox.forget(&id, &to),
                Some(Err(error)) => self.unsettled(&error),
                None => {}
            }
            return;
        }
        if delivery.attempt > self.config.max_deliveries {
            count(&self.counters.dead_lettered);
            let reason = format!("delivered {} times and never settled", delivery.attempt - 1);
            let fault = Fault::new(Code::Aborted, &reason);
            let reply = reply_to.map(|_| Reply::fault(id.clone(), fault, Executed::Maybe));
            return self.settle(delivery.dead_letter(reason, reply)).await;
        }
        match self.is_wanted(&delivery).await {
            Wanted::Yes => {
                let ascertained = self.kill.run_until_cancelled(delivery.ascertained());
                // Else dropped unsettled: somebody else has it, or will.
                if let Some(Some(now)) = ascertained.await {
                    self.execute(delivery, now).await;
                }
            }
            Wanted::No => {
                count(&self.counters.cancelled);
                self.settle(delivery.reply(None)).await;
            }
            Wanted::Unheard => self.settle(delivery.release()).await,
            Wanted::NotOurs => {} // Dropped unsettled, as when the server is killed.
        }
    }

    /// Has a request refused or handled, and settles it.
    async fn execute(self: &Arc<Self>, delivery: Delivery, mut now: Instant) {
        if let Some(left) = self.begin(delivery, &mut now) {
            Box::pin(Arc::clone(self).finish(left)).await;
        }
    }

    /// Says something about a request to its caller. False if it is known to be gone.
    async fn say(&self, delivery: &Delivery, to: &ReplyAddress, signal: Signal) -> bool {
        let message = Outbound::Reply {
            to: to.clone(),
            reply: Arc::new(Reply::signal(delivery.request.id.clone(), signal)),
        };
        match self.client.transport().send(message).await {
            Err(error) => error.kind() != ErrorKind::NoResponder,
            Ok(()) => true,
        }
    }

    /// Waits for a settlement, unless the server is killed meanwhile: once polled, it happens all the same.
    async fn settle(&self, settling: impl Future<Output = Result<(), Error>> + Send) {
        if let Some(Err(error)) = self.settled(settling).await {
            self.unsettled(&error);
        }
    }

    /// How a settlement ended; none if the server was killed meanwhile.
    async fn settled(
        &self,
        settling: impl Future<Output = Result<(), Error>> + Send,
    ) -> Option<Result<(), Error>> {
        self.kill.run_until_cancelled(settling).await
    }

    fn unsettled(&self, error: &Error) {
        match error.kind() {
            ErrorKind::LostLease => count(&self.counters.lost_leases),
            _ => count(&self.counters.unsettled),
        }
        tracing::warn!(service = %self.name, %error, "a request was not settled");
    }
}

//! The contract between core and a broker: eight operations that move messages and know nothing of calls, and a short cut of one of them.
//!
//! Correlation, deadlines, duplicates, faults and typed bodies live above it, once. Every promise below names
//! the conformance cases that check it; `docs/writing-a-transport.md` is the guided tour.

use std::fmt::Debug;
use std::sync::Arc;
use std::task::Poll;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::Instant;

pub use crate::done::{Done, Told};
use crate::envelope::{CorrelationId, Reply, Request};
use crate::error::Error;
pub use crate::flagged_token::FlaggedToken;
use crate::name::{ReplyAddress, ServiceName};
use crate::settled::never_told;
pub use crate::settled::{Later, Settled, Unsettled};
use crate::ticket::Ticket;

/// A connection to a broker.
///
/// **Recovery** is the transport's: after a lost connection it connects again by itself (backoff with full jitter,
/// at most 1 s apart), restores its inboxes and subscriptions, and says so by [`state`](Self::state).
/// *Checked by* `reconnect/*`.
///
/// **Runtime**: its tasks live on the runtime that it was connected on, and end at [`close`](Self::close) or drop.
///
/// **Sizes** are checked above it. Names are valid by their types.
#[async_trait]
pub trait Transport: Debug + Send + Sync + 'static {
    /// What this broker can promise beyond the contract. Constant.
    fn capabilities(&self) -> Capabilities;

    /// Sends a request to whoever serves a service, or a reply to an inbox.
    ///
    /// **Resolves when** the broker has accepted it. While disconnected or blocked it waits for the connection; the time
    /// that a request waits here comes off the budget that it travels with, and one that has none left is not sent.
    /// A reply to an inbox that is gone is dropped: `NoResponder` if the broker can tell, else nothing.
    /// **Concurrency**: any number at once; what is pending is moved in batches, never waiting for a batch to fill.
    /// **Cancel safety**: dropping the future does not unsend, and leaks nothing. A request is withdrawn by its
    /// [`Ticket`], which the transport commits right before the first byte may leave.
    /// **After close**: `Closed`.
    /// **Errors**: `Invalid` for a reply address that neither this transport nor a plain peer of its broker could have made;
    /// `NoResponder` if it was asked for and nobody serves; `ConnectionLost` if it was written and not
    /// accepted; `Overloaded` if the broker has no room. Executed is `No` only if that is certain.
    /// *Checked by* `round_trip/*`, `no_responder/*`, `deadlines/waiting_to_be_sent_counts`,
    /// `reconnect/blocked_requests_are_not_sent_late`.
    async fn send(&self, message: Outbound) -> Result<(), Error>;

    /// Takes a call's request without a future: what [`send`](Self::send) would cost most calls for nothing, since the reply proves
    /// that the broker accepted the request.
    ///
    /// **Returns** true if the transport has taken it. All is as of `send` from then on, but for three things: what goes wrong is told by
    /// [`Ticket::fail`], if all goes well nothing is told, and the time that is left is what is left until [`Ticket::deadline`]. False if it
    /// has not, for whatever reason: nothing has happened then, the ticket least of all, and `send` is to send it or to say what is wrong.
    /// **Called** within the poll of a call: it must not block, and nobody withdraws the ticket before it returns.
    /// **By default** false, which is right too.
    /// *Checked by* the cases of `send`.
    fn post(
        &self,
        _service: &ServiceName,
        _request: &Arc<Request>,
        _expect_responder: bool,
        _ticket: &Ticket,
    ) -> bool {
        false
    }

    /// Sends a request to the inbox of every live server that has [joined](Inbox::join) the service. Nobody queues it: who comes
    /// later does not get it.
    ///
    /// **Resolves when** the broker has accepted it, with how many servers are to get it, if the broker can tell.
    /// While disconnected it waits for the connection, but not longer than the request's budget.
    /// **Cancel safety**: dropping the future does not unsend. **After close**: `Closed`.
    /// **Errors**: as of [`send`](Self::send); nobody there is no error, but zero.
    /// *Checked by* `nodes/*`, `cancel/*`.
    async fn broadcast(
        &self,
        service: &ServiceName,
        request: Request,
    ) -> Result<Option<usize>, Error>;

    /// Takes a request back out of its service's queue, if it is still there and the broker allows it.
    ///
    /// **Resolves to** true if it was there and is gone: no server has it or will. False is no promise of anything.
    /// **After close**: `Closed`. **Errors**: as of [`send`](Self::send).
    /// *Checked by* `cancel/*`.
    async fn withdraw(&self, service: &ServiceName, id: &CorrelationId) -> Result<bool, Error>;

    /// Opens a private reply address.
    ///
    /// **Resolves when** it is live: a reply sent to its address from now on arrives.
    /// **After close**: `Closed`. **Cancel safety**: dropping the future leaves nothing on the broker.
    /// **Dropping** the inbox removes it from the broker.
    /// *Checked by* `correlation/*`, `leaks/*`.
    async fn open_inbox(&self) -> Result<Box<dyn Inbox>, Error>;

    /// Subscribes to a service's requests.
    ///
    /// **Resolves when** it is live: a request sent from now on may be delivered to it.
    /// **Cancel safety**: dropping the future leaves nothing, ownership least of all.
    /// **Errors**: `Unsupported` for a mode that it does not know; `AlreadyOwned` within 1 s, if it or the present owner asks for exclusivity
    /// (see [`SubscribeMode`]); `Broker` if the service's queue is of another kind than this transport can use; `Closed` after close.
    /// *Checked by* `competing/*`, `exclusive/*`, `standby/*`.
    async fn subscribe(
        &self,
        service: &ServiceName,
        options: SubscribeOptions,
    ) -> Result<Box<dyn Subscription>, Error>;

    /// The connection's state, now and as it changes.
    fn state(&self) -> watch::Receiver<ConnectionState>;

    /// Closes the connection: pending sends end with `Closed`, inboxes and subscriptions end, deliveries that are
    /// not settled go back. Settle first: a reply after this is not sent.
    ///
    /// **Resolves when** the broker knows, or after 5 s. **Idempotent.** *Checked by* `close/*`.
    async fn close(&self);
}

/// What a broker can promise beyond the contract. Each is defined by the case that it enables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// A server that lost its lease cannot reply. Enables `redelivery/lost_lease_cannot_reply`.
    pub fenced_replies: bool,
    /// A request that nobody has can be taken back. Enables `cancel/given_up_is_withdrawn`.
    pub withdrawal: bool,
    /// An exclusive owner can be fenced off while its process lives. Enables `standby/newcomer_fences_off_a_deaf_owner`.
    pub take_over: bool,
}

impl Capabilities {
    /// Nothing beyond the contract.
    #[must_use]
    pub const fn none() -> Self {
        Self {
            fenced_replies: false,
            withdrawal: false,
            take_over: false,
        }
    }

    /// The same, with fenced replies.
    #[must_use]
    pub const fn with_fenced_replies(mut self) -> Self {
        self.fenced_replies = true;
        self
    }

    /// The same, with withdrawal.
    #[must_use]
    pub const fn with_withdrawal(mut self) -> Self {
        self.withdrawal = true;
        self
    }

    /// The same, with taking over.
    #[must_use]
    pub const fn with_take_over(mut self) -> Self {
        self.take_over = true;
        self
    }
}

/// A message on its way out. Messages are made once and then shared: nothing that carries one moves or copies its parts.
#[derive(Debug)]
pub enum Outbound {
    /// To whoever serves the service.
    Request {
        /// The service.
        service: ServiceName,
        /// The request.
        request: Arc<Request>,
        /// End with `NoResponder` if nobody serves it now, instead of waiting in the queue.
        expect_responder: bool,
        /// To be committed right before the first byte may leave; if that fails, the request is not sent.
        ticket: Ticket,
    },
    /// To one inbox.
    Reply {
        /// The inbox.
        to: ReplyAddress,
        /// The reply.
        reply: Arc<Reply>,
    },
}

/// The state of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectionState {
    /// All is well.
    Connected,
    /// The connection is lost and being made again.
    Disconnected {
        /// Why.
        reason: Arc<str>,
    },
    /// The broker takes no requests for now, such as in a memory alarm.
    Blocked {
        /// Why.
        reason: Arc<str>,
    },
    /// Closed by its user; it stays so.
    Closed,
}

/// A private reply address and what arrives there. It belongs to one client.
#[async_trait]
pub trait Inbox: Debug + Send {
    /// The present address. It changes only with an [`InboxEvent::Lost`].
    fn address(&self) -> ReplyAddress;

    /// From now on what is [broadcast](Transport::broadcast) to a service arrives here too, as [`Incoming::Request`].
    /// An inbox that is restored or gets a new address is joined again.
    ///
    /// **Resolves when** it is live. **Cancel safety**: dropping the future leaves it joined or not.
    /// **Errors**: as of [`Transport::open_inbox`].
    /// *Checked by* `nodes/*`.
    async fn join(&mut self, service: &ServiceName) -> Result<(), Error>;

    /// Waits for the next event, and takes all replies that are there, up to a bound of the transport's.
    ///
    /// **Cancel safety**: a reply is not lost by dropping the future.
    /// **After close**: [`InboxEvent::Closed`], for ever.
    /// *Checked by* `correlation/*`, `payload/*`, `reconnect/*`.
    async fn recv(&mut self) -> InboxEvent;
}

/// What happened at an inbox.
#[derive(Debug)]
pub enum InboxEvent {
    /// Replies, in the order of arrival.
    Replies(Vec<Incoming>),
    /// Replies to requests that were sent before now may never come; told as soon as it is known, so that nobody waits for
    /// them. Later requests carry the address that [`Inbox::address`] now gives, and wait in `send` until it is live.
    /// An inbox that was restored with all that arrived meanwhile says nothing.
    Lost(Error),
    /// It is over.
    Closed(Error),
}

/// What arrived at an inbox: a reply, what was left of one, or what was said to every server of a service.
#[derive(Debug)]
pub enum Incoming {
    /// A reply.
    Reply(Arc<Reply>),
    /// A request to every server of a service that the inbox has joined.
    Request {
        /// The service.
        service: ServiceName,
        /// The request. Its budget is what is left as the broker judges it, or what it was when it was sent.
        request: Arc<Request>,
    },
    /// Something that is not a reply.
    Undecodable {
        /// The id, if that much could be read.
        id: Option<CorrelationId>,
        /// What is wrong with it.
        reason: String,
    },
}

/// How to subscribe.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct SubscribeOptions {
    /// The most deliveries that this subscription holds at once. At least 1.
    pub prefetch: usize,
    /// Who else may subscribe.
    pub mode: SubscribeMode,
}

impl SubscribeOptions {
    /// A shared subscription.
    #[must_use]
    pub fn shared(prefetch: usize) -> Self {
        Self {
            prefetch: prefetch.max(1),
            mode: SubscribeMode::Shared,
        }
    }

    /// An exclusive subscription.
    #[must_use]
    pub fn exclusive(prefetch: usize) -> Self {
        Self {
            prefetch: prefetch.max(1),
            mode: SubscribeMode::Exclusive,
        }
    }

    /// An exclusive subscription that ends the present one.
    #[must_use]
    pub fn take_over(prefetch: usize) -> Self {
        Self {
            prefetch: prefetch.max(1),
            mode: SubscribeMode::TakeOver,
        }
    }
}

/// Who else may subscribe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SubscribeMode {
    /// Anybody who shares too: each request goes to one of them.
    Shared,
    /// Nobody: while this subscription lives, every other one is refused with `AlreadyOwned`, but for one that takes over.
    Exclusive,
    /// The same, and a present exclusive owner is fenced off, whether it hears of it or not: its lease is lost with what it
    /// holds, and its subscription ends as `AlreadyOwned`. A transport that has no such right over an owner
    /// ([`Capabilities::take_over`]) refuses with `AlreadyOwned` for as long as there is one.
    TakeOver,
}

impl SubscribeMode {
    /// True if nobody else may subscribe.
    #[must_use]
    pub fn is_exclusive(self) -> bool {
        match self {
            Self::Shared => false,
            Self::Exclusive | Self::TakeOver => true,
        }
    }
}

/// A stream of deliveries.
///
/// **Dropping** it abandons it: deliveries in hand stay settleable, those not yet received go back.
#[async_trait]
pub trait Subscription: Debug + Send {
    /// Waits for the next deliveries, and takes all that are there; never more than `prefetch` are unsettled.
    ///
    /// A message that cannot be decoded is dead-lettered by the transport, with a fault reply if its reply address is
    /// a valid one (`invalid_argument`; executed `No` on the first attempt, else `Maybe`), and costs its neighbours nothing.
    /// A request whose server died is kept apart from fresh ones and delivered alone, to a subscription that holds nothing
    /// else, as far as the broker allows: a request that kills its servers must not cost its neighbours their attempts.
    /// **Cancel safety**: a delivery is not lost by dropping the future.
    /// **Ends** with [`SubscriptionEvent::Closed`], for ever, after [`stop`](Self::stop), after close, and when an
    /// exclusive subscription lost its ownership.
    /// *Checked by* `competing/*`, `redelivery/*`, `close/*`.
    async fn recv(&mut self) -> SubscriptionEvent;

    /// Stops taking, and gives back what was taken and not yet received, without counting an attempt.
    ///
    /// **Resolves when** nothing more is taken for it. Deliveries in hand stay settleable.
    async fn stop(&mut self);
}

/// What happened at a subscription.
#[derive(Debug)]
pub enum SubscriptionEvent {
    /// Requests, in the order of arrival.
    Deliveries(Vec<Delivery>),
    /// It is over: stopped, closed, or no longer the owner.
    Closed(Error),
}

/// One request in one server's hands. It is settled once, by value; dropped unsettled, it is delivered again with
/// its attempt counted.
#[derive(Debug)]
pub struct Delivery {
    /// The request.
    pub request: Arc<Request>,
    /// Which attempt this is: 1, and one more for each server that died with it.
    pub attempt: u32,
    /// When its caller stops waiting, by this host's monotonic clock: what was left of the budget when it was taken,
    /// as the broker judges it. Never early. None from a plain peer that set no deadline.
    pub expires: Option<Instant>,
    /// It may have been in its queue before this server could be told that it is given up: before the subscription, or its connection's
    /// recovery. Its caller is asked then. False, the default, if what is given up is withdrawn from the queue.
    /// *Checked by* `given_up/*`.
    pub waited: bool,
    /// Until when it is certain that nobody else has it. Who has not started it by then [asks](Settlement::ascertain). None, the
    /// default: as long as its [lease](Self::lease) is not cancelled.
    pub certain_until: Option<Instant>,
    /// It is a copy of this server's own, of what all servers of its service were asked.
    pub(crate) asked: bool,
    settlement: Box<dyn Settlement>,
}

impl Delivery {
    /// Puts a delivery together; for transports.
    #[must_use]
    pub fn new(
        request: impl Into<Arc<Request>>,
        attempt: u32,
        expires: Option<Instant>,
        settlement: Box<dyn Settlement>,
    ) -> Self {
        Self {
            request: request.into(),
            attempt,
            expires,
            waited: false,
            certain_until: None,
            asked: false,
            settlement,
        }
    }

    /// Cancelled when the lease under which it is held is lost.
    #[must_use]
    pub fn lease(&self) -> &FlaggedToken {
        self.settlement.lease()
    }

    /// Sends the reply, then settles the request: one operation, in this order, so that a crash between the two
    /// yields a duplicate reply and never a lost one. `None` settles a one-way request.
    ///
    /// **Resolves when** the broker has accepted both.
    /// **Errors**: `LostLease` if another server may have the request; `ConnectionLost` if it was cut before the broker's
    /// word, after which the request is delivered again; `Closed` after close.
    /// A reply that cannot be delivered (its caller is gone) is not an error.
    /// *Checked by* `round_trip/*`, `redelivery/*`.
    ///
    /// # Errors
    /// As above.
    pub async fn reply(self, reply: Option<Reply>) -> Result<(), Error> {
        self.settled(Settle::Reply(reply.map(Arc::new))).await
    }

    /// Settles it, and waits for the end.
    pub(crate) async fn settled(self, settle: Settle) -> Result<(), Error> {
        let mut told = None;
        let mut later = |_: &Settle| {
            let (settled, waits) = Settled::to_waiter();
            told = Some(waits);
            settled
        };
        match (self.settlement.settle(settle, Later::new(&mut later)), told) {
            (Poll::Pending, Some(told)) => told.await,
            (Poll::Pending, None) => Err(never_told()),
            (Poll::Ready(settled), _) => settled.map_err(|unsettled| unsettled.error),
        }
    }

    /// The request, and what settles it.
    pub(crate) fn into_parts(self) -> (Arc<Request>, Box<dyn Settlement>) {
        (self.request, self.settlement)
    }

    /// Waits until it is certain that nobody else has it, as it mostly is, and gives the time then. None if somebody may: it is not to
    /// be started.
    pub(crate) async fn ascertained(&mut self) -> Option<Instant> {
        loop {
            let now = Instant::now();
            if self.is_certain(now) {
                return Some(now);
            }
            // Looked at again: the answer may have waited for us as well.
            self.certain_until = Some(self.settlement.ascertain().await?);
        }
    }

    pub(crate) fn is_certain(&self, now: Instant) -> bool {
        self.certain_until.is_none_or(|until| now < until)
    }

    /// Moves the request to the service's dead letters, telling the caller, for good.
    ///
    /// *Checked by* `redelivery/poison_is_dead_lettered`.
    ///
    /// # Errors
    /// As of [`reply`](Self::reply).
    pub async fn dead_letter(self, reason: String, reply: Option<Reply>) -> Result<(), Error> {
        let reply = reply.map(Arc::new);
        self.settled(Settle::DeadLetter { reason, reply }).await
    }

    /// Gives the request back, never having started it: it is delivered again, and the attempt is not counted.
    ///
    /// *Checked by* `redelivery/released_is_not_counted`.
    ///
    /// # Errors
    /// As of [`reply`](Self::reply).
    pub async fn release(self) -> Result<(), Error> {
        self.settled(Settle::Release).await
    }
}

/// The transport's half of a [`Delivery`].
///
/// **Dropping** it unsettled returns the request to the service with its attempt counted, as if the server had died.
#[async_trait]
pub trait Settlement: Debug + Send + Sync {
    /// Settles the delivery; see the methods of [`Delivery`]. Once called, it happens; it does not block.
    ///
    /// **Ready** if it is known at once how that ended. Else, and only then, `later` was made a [`Settled`], which is told it, once:
    /// over a network, as soon as the broker has accepted what settles the delivery, or will not.
    /// What is known at once not to be settled is given back: its reply may be kept.
    /// *Checked by* `round_trip/*`, `redelivery/*`, `close/*`.
    fn settle(self: Box<Self>, settle: Settle, later: Later<'_>) -> Poll<Result<(), Unsettled>>;

    /// Cancelled when the lease under which the delivery is held is lost. What is held under one lease shares it.
    fn lease(&self) -> &FlaggedToken;

    /// Makes certain that nobody else has the delivery, and says until when that holds; none if somebody may. Only for one that says
    /// until [when](Delivery::certain_until) it is certain: by default none.
    ///
    /// **Cancel safety**: dropping the future changes nothing.
    async fn ascertain(&self) -> Option<Instant> {
        None
    }
}

/// How a delivery ends.
#[derive(Debug)]
pub enum Settle {
    /// Reply if there is one, then done.
    Reply(Option<Arc<Reply>>),
    /// To the dead letters, and reply.
    DeadLetter {
        /// Why, for the operator.
        reason: String,
        /// For the caller.
        reply: Option<Arc<Reply>>,
    },
    /// Back to the queue, not counted.
    Release,
}

impl Settle {
    pub(crate) fn reply(&self) -> Option<&Arc<Reply>> {
        match self {
            Self::Reply(reply) | Self::DeadLetter { reply, .. } => reply.as_ref(),
            Self::Release => None,
        }
    }
}

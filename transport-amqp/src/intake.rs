//! What a subscription takes from: two queues, on one life of the connection.

use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use antiphon_core::transport::FlaggedToken;
use futures_util::future::{BoxFuture, join_all};
use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::BasicCancelOptions;
use lapin::types::ShortString;
use tokio::time::{Instant, sleep, timeout};

use crate::acker::Acker;
use crate::config::AmqpConfig;
use crate::error::{Failure, closed};
use crate::lane::{Lane, attach, question};
use crate::link::{Link, Session, backoff, bounded};
use crate::naming::QueueNames;
use crate::topology::{self, Lingering};

/// How long a subscription waits for its retry queue before it serves without.
const RETRY_PATIENCE: Duration = Duration::from_millis(400);

/// How long after its queue a server may come to hear what is said to all servers.
const SETTLES: Duration = Duration::from_millis(250);

/// How often a server looks whether what was in its queue before it is still there.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// What a subscription is.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) config: AmqpConfig,
    pub(crate) names: QueueNames,
    /// The most deliveries in hand.
    pub(crate) prefetch: usize,
    /// Nobody else may serve it.
    pub(crate) exclusive: bool,
    /// The queue by which an exclusive subscription knows its own ghost.
    pub(crate) marker: ShortString,
}

/// What came of waiting.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all are deliveries, and a box for each costs more"
)]
pub(crate) enum Arrival {
    Delivery(Origin, Delivery),
    /// After a pause of this process: what arrived until then is ours.
    Certain,
    /// A consumer has ended, for whatever reason.
    Over,
}

/// Which queue a delivery came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    Main,
    Retry,
}

pub(crate) struct Intake {
    pub(crate) session: Arc<Session>,
    /// Cancelled when the channel is lost: what plain peers sent comes back as something new.
    pub(crate) lease: Arc<FlaggedToken>,
    main: Lane,
    retry: Option<Lane>,
    /// The connection was lost to a message that the client library cannot read.
    pub(crate) unreadable: bool,
    pub(crate) opened: Instant,
    /// At most so many requests of the main queue were there before it was consumed, and may still come.
    backlog: u32,
    /// How many are left in the queue: others take them too, or they expire. While it matters.
    looking: Option<BoxFuture<'static, Option<u32>>>,
    queue: ShortString,
    prefetch: u32,
    /// The retry queue, while the broker does not give it to us.
    attaching: Option<BoxFuture<'static, Lane>>,
    /// The pauses of this process after which the broker has said that the connection lives.
    pauses: u64,
    /// The question whether it does, and after how many; none of them if it does not.
    asking: Option<BoxFuture<'static, Option<u64>>>,
    /// What arrived before the answer.
    early: Option<(Origin, Delivery)>,
}

impl Intake {
    /// Subscribes, on the present connection or the next one.
    ///
    /// # Errors
    /// Those that no other connection would mend; a lost one is waited for.
    pub(crate) async fn open(
        mut link: Link,
        plan: Arc<Plan>,
        lingering: Lingering,
    ) -> Result<Self, Failure> {
        let mut attempt = 0;
        loop {
            let Some(session) = link.next_session().await else {
                return Err(Failure::Final(closed()));
            };
            match Self::open_on(session, &plan, lingering).await {
                Ok(intake) => return Ok(intake),
                Err(failure) if failure.is_final() => return Err(failure),
                Err(failure) => {
                    tracing::debug!(%failure, queue = %plan.names.main, "not yet subscribed")
                }
            }
            sleep(backoff(attempt)).await;
            attempt = attempt.saturating_add(1);
        }
    }

    async fn open_on(
        session: Arc<Session>,
        plan: &Plan,
        lingering: Lingering,
    ) -> Result<Self, Failure> {
        let names = &plan.names;
        if lingering == Lingering::AGAIN {
            topology::refuse_owned(&session, names).await?;
        }
        for queue in [&names.main, &names.retry] {
            topology::ensure(&session, &plan.config, names, queue).await?;
        }
        if !plan.exclusive {
            topology::refuse_owned(&session, names).await?;
            let intake = Self::consume(&session, plan).await?;
            // Somebody may have become the owner before our consumers could be seen. Now either sees the other.
            topology::refuse_owned(&session, names).await?;
            return Ok(intake);
        }
        topology::own(&session, &plan.config, names, &plan.marker, lingering).await?;
        match Self::consume(&session, plan).await {
            Ok(intake) => Ok(intake),
            Err(failure) => {
                topology::disown(&session, names, &plan.marker).await;
                Err(failure)
            }
        }
    }

    async fn consume(session: &Arc<Session>, plan: &Plan) -> Result<Self, Failure> {
        let names = &plan.names;
        let pauses = session.pulse.pauses(Instant::now());
        let prefetch = u16::try_from(plan.prefetch).unwrap_or(u16::MAX);
        let backlog = topology::look(session, &names.main).await?;
        let main = Lane::open(session, &names.main, prefetch).await?;
        let mut attaching = attach(Arc::clone(session), plan.clone()).boxed();
        let retry = timeout(RETRY_PATIENCE, &mut attaching).await.ok();
        if retry.is_none() {
            tracing::warn!(queue = %plan.names.retry, "no answer; serving without it for now");
        }
        let mut intake = Self {
            session: Arc::clone(session),
            lease: Arc::default(),
            unreadable: false,
            opened: Instant::now(),
            backlog: backlog.message_count(),
            looking: None,
            queue: names.main.clone(),
            prefetch: prefetch.into(),
            main,
            attaching: retry.is_none().then_some(attaching),
            retry,
            pauses,
            asking: None,
            early: None,
        };
        intake.is_left(None);
        Ok(intake)
    }

    /// Waits for a delivery, or the answer to the question whether they are ours, before which there is none.
    pub(crate) async fn next(&mut self) -> Arrival {
        poll_fn(|cx| {
            if let Some(asking) = &mut self.asking {
                let Poll::Ready(answer) = asking.poll_unpin(cx) else {
                    return Poll::Pending;
                };
                self.asking = None;
                let Some(pauses) = answer else {
                    return Poll::Ready(Arrival::Over);
                };
                self.pauses = pauses;
                return Poll::Ready(Arrival::Certain);
            }
            if let Some((origin, delivery)) = self.early.take() {
                return Poll::Ready(Arrival::Delivery(origin, delivery));
            }
            self.poll_arrival(cx)
        })
        .await
    }

    /// What is there at once.
    pub(crate) fn arrived(&mut self) -> Option<Arrival> {
        poll_fn(|cx| self.poll_arrival(cx)).now_or_never()
    }

    fn poll_arrival(&mut self, cx: &mut Context<'_>) -> Poll<Arrival> {
        if let Some(attaching) = &mut self.attaching
            && let Poll::Ready(lane) = attaching.poll_unpin(cx)
        {
            self.attaching = None;
            self.retry = Some(lane);
        }
        while let Some(looking) = &mut self.looking
            && let Poll::Ready(left) = looking.poll_unpin(cx)
        {
            self.is_left(left);
        }
        let retry = self.retry.iter_mut().map(|lane| (Origin::Retry, lane));
        for (origin, lane) in retry.chain([(Origin::Main, &mut self.main)]) {
            match lane.consumer.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok(delivery))) => {
                    return Poll::Ready(Arrival::Delivery(origin, delivery));
                }
                Poll::Ready(Some(Err(error))) => {
                    let kind = error.kind();
                    self.unreadable = matches!(kind, lapin::ErrorKind::ParsingError(_));
                    return Poll::Ready(Arrival::Over);
                }
                Poll::Ready(None) => return Poll::Ready(Arrival::Over),
                Poll::Pending => {}
            }
        }
        Poll::Pending
    }

    /// True if what has arrived is ours. If this process stood still, the broker may have given it to somebody else and closed the
    /// connection, whose end is behind all deliveries. It is asked then.
    pub(crate) fn is_certain(&mut self, now: Instant) -> bool {
        let pauses = self.session.pulse.pauses(now);
        if pauses == self.pauses {
            return true;
        }
        if self.asking.is_none() {
            let (session, channel) = (Arc::clone(&self.session), self.main.channel.clone());
            let asking = async move {
                match question(channel).await {
                    Ok(()) => Some(pauses),
                    Err(failure) => {
                        tracing::warn!(%failure, "this process stood still, and lost its connection");
                        if matches!(failure, Failure::TimedOut(_)) {
                            session.suspect();
                        }
                        None
                    }
                }
            };
            self.asking = Some(asking.boxed());
        }
        false
    }

    /// True while the broker is asked whether what has arrived is ours.
    pub(crate) fn is_asking(&self) -> bool {
        self.asking.is_some()
    }

    /// Keeps what arrived until that is certain.
    pub(crate) fn keep(&mut self, origin: Origin, delivery: Delivery) {
        self.early = Some((origin, delivery));
    }

    /// True if the request that comes now may have been in the queue when nobody could tell us that it is given up.
    pub(crate) fn waited(&mut self, origin: Origin) -> bool {
        let before = origin == Origin::Retry || self.backlog > 0;
        if origin == Origin::Main {
            self.backlog = self.backlog.saturating_sub(1);
        }
        before || self.opened.elapsed() < SETTLES
    }

    /// Notes how many requests are left in the main queue, if that could be learned, and looks again while old ones may be among
    /// them.
    fn is_left(&mut self, left: Option<u32>) {
        // Those on their way to us are not counted by the broker.
        let left = left.map_or(self.backlog, |left| left.saturating_add(self.prefetch));
        self.backlog = self.backlog.min(left);
        let may_be_old = self.backlog > self.prefetch;
        self.looking = may_be_old.then(|| self.look_later());
    }

    /// How many requests are in the main queue a little later; none if the broker does not say.
    fn look_later(&self) -> BoxFuture<'static, Option<u32>> {
        let (session, queue) = (Arc::clone(&self.session), self.queue.clone());
        Box::pin(async move {
            sleep(LOOK_AGAIN).await;
            let looked = topology::look(&session, &queue).await;
            looked.ok().map(|queue| queue.message_count())
        })
    }

    /// Stops taking, and gives what the broker had sent until then; none if the connection is lost, and all that with it.
    pub(crate) async fn cancel(&mut self) -> Option<Vec<(Origin, Delivery)>> {
        self.attaching = None;
        self.looking = None;
        let mut rest: Vec<_> = self.early.take().into_iter().collect();
        for (origin, lane) in self.lanes() {
            let options = BasicCancelOptions::default();
            let cancel = lane.channel.basic_cancel(lane.consumer.tag(), options);
            if let Err(failure) = bounded("basic.cancel", cancel).await {
                tracing::debug!(%failure, "the consumer was not cancelled");
                if origin == Origin::Main && !matches!(failure, Failure::TimedOut(_)) {
                    return None;
                }
            }
            // What was under way is here before the broker's answer.
            while let Some(Some(Ok(delivery))) = lane.consumer.next().now_or_never() {
                rest.push((origin, delivery));
            }
        }
        Some(rest)
    }

    /// Marks a delivery as done; `key` comes back when it is acknowledged.
    pub(crate) fn done(&mut self, origin: Origin, tag: u64, key: u64) {
        let lane = match origin {
            Origin::Main => Some(&mut self.main),
            Origin::Retry => self.retry.as_mut(),
        };
        if let Some(lane) = lane {
            lane.acker.done(tag, key);
        }
    }

    /// True if something is done and not acknowledged.
    pub(crate) fn is_dirty(&self) -> bool {
        let retry = self.retry.as_ref();
        self.main.acker.is_dirty() || retry.is_some_and(|lane| lane.acker.is_dirty())
    }

    /// Acknowledges all that is done, and gives its keys.
    pub(crate) fn flush(&mut self, keys: &mut Vec<u64>) {
        for (_, lane) in self.lanes() {
            lane.unasked |= lane.acker.is_dirty();
            lane.acker.flush(&lane.channel, keys);
        }
    }

    /// Resolves when the broker has worked off the acknowledgements that it was sent since the last question: true if it has. Only the
    /// lanes that had any are asked: another one may not answer.
    pub(crate) fn ask(&mut self) -> impl Future<Output = bool> + Send + use<> {
        let asked = self
            .lanes()
            .filter_map(|(_, lane)| std::mem::take(&mut lane.unasked).then_some(lane));
        let questions: Vec<_> = asked.map(|lane| question(lane.channel.clone())).collect();
        async {
            join_all(questions)
                .await
                .into_iter()
                .all(|answer| answer.is_ok())
        }
    }

    /// The keys of all that is done; it will never be acknowledged.
    pub(crate) fn abandon(self) -> impl Iterator<Item = u64> {
        let retry = self.retry.map(|lane| lane.acker);
        std::iter::once(self.main.acker)
            .chain(retry)
            .flat_map(Acker::abandon)
    }

    /// The retry queue first: what is in it is older.
    fn lanes(&mut self) -> impl Iterator<Item = (Origin, &mut Lane)> {
        let retry = self.retry.iter_mut().map(|lane| (Origin::Retry, lane));
        retry.chain([(Origin::Main, &mut self.main)])
    }
}

impl fmt::Debug for Intake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Intake")
            .field("session", &self.session.number)
            .field("retry", &self.retry.is_some())
            .finish_non_exhaustive()
    }
}

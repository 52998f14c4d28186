//! The task of one subscription: it takes deliveries, publishes what handlers answer, and acknowledges.
//!
//! A reply is accepted by the broker before its request is acknowledged, so a crash in between costs a second reply,
//! never the only one.

mod arrivals;
mod recent;
mod settling;

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use antiphon_core::transport::{Delivery, FlaggedToken};
use antiphon_core::{Error, ErrorKind};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use self::recent::Recent;
use self::settling::{DEATHS_ALONE, Sent, lost_lease};
use crate::error::{Failure, closed};
use crate::held::Held;
use crate::intake::{Arrival, Intake, Plan};
use crate::link::{Link, Opening, open_publishing, opened};
use crate::outlet::Outlet;
use crate::press::{Press, PressChannel};
use crate::recovery::Member;
use crate::settle::Command;
use crate::subscription::Handover;
use crate::topology::{self, Claim, Lingering};

/// How often confirms are looked at, and acknowledgements sent, when nobody is short of either.
const TICK: Duration = Duration::from_millis(1);

/// Below this prefetch, and when half of it is in hand, confirms wake the task: a tick late would cost a handler its work.
const PROMPT_PREFETCH: usize = 64;

/// What could not be published is tried again after this time.
const RETURNED_RETRY: Duration = Duration::from_millis(20);

/// What was dropped unsettled is moved after this time. Who drops it often goes away with all else in the next moment, and must not
/// take it again then: it would count as one more that died with it.
const DROPPED_WAITS: Duration = Duration::from_millis(50);

/// How long a closing subscription waits for the broker's word on its replies.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// The most deliveries and commands that are taken in one go.
const BATCH: usize = 256;

/// What a courier needs from its transport.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) plan: Arc<Plan>,
    pub(crate) consume: Link,
    pub(crate) publish: Link<Press>,
    pub(crate) member: Member,
    /// Given back when this is dropped.
    pub(crate) _claim: Claim,
    pub(crate) closing: CancellationToken,
    pub(crate) undeliverable: Arc<AtomicU64>,
}

pub(crate) struct Courier {
    route: Route,
    commands: mpsc::UnboundedReceiver<Command>,
    command_sender: mpsc::UnboundedSender<Command>,
    /// None once nothing more is handed over.
    deliveries: Option<mpsc::UnboundedSender<Delivery>>,
    handover: Handover,
    over: Arc<OnceLock<Error>>,
    intake: Option<Intake>,
    opening: Option<BoxFuture<'static, Result<Intake, Failure>>>,
    outlet: Option<Outlet<u64>>,
    /// The outlet's channel, on its way.
    outlet_opening: Option<Opening>,
    held: HashMap<u64, Held, foldhash::fast::RandomState>,
    next_key: u64,
    /// Decoded and not handed over, in order; the ones from the retry queue first.
    waiting: VecDeque<u64>,
    /// How many have a handler's place.
    handed: usize,
    /// What was handed over so long ago that whoever starts it asks whether it is still ours.
    uncertain: Vec<(u64, oneshot::Sender<Option<Instant>>)>,
    /// What is to be published.
    unsent: VecDeque<u64>,
    /// What is to be published later.
    later: Vec<(Instant, u64)>,
    /// What was published on a channel of its own, if anything was.
    alone: Option<u64>,
    sent: Sent,
    recent: Recent,
    /// Of all that peers of ours sent: it survives a lost connection.
    lease: Arc<FlaggedToken>,
    /// How often in a row the connection was lost to an unreadable message soon after the queue was opened.
    unreadable: u32,
    tick: Option<Instant>,
    stopping: bool,
}

impl Courier {
    pub(crate) fn new(
        route: Route,
        intake: Intake,
        (deliveries, handover): (mpsc::UnboundedSender<Delivery>, Handover),
        (command_sender, commands): (
            mpsc::UnboundedSender<Command>,
            mpsc::UnboundedReceiver<Command>,
        ),
        over: Arc<OnceLock<Error>>,
    ) -> Self {
        Self {
            route,
            commands,
            command_sender,
            deliveries: Some(deliveries),
            handover,
            over,
            intake: Some(intake),
            opening: None,
            outlet: None,
            outlet_opening: None,
            held: HashMap::default(),
            next_key: 0,
            waiting: VecDeque::new(),
            handed: 0,
            uncertain: Vec::new(),
            unsent: VecDeque::new(),
            later: Vec::new(),
            alone: None,
            sent: Sent::default(),
            recent: Recent::default(),
            lease: Arc::default(),
            unreadable: 0,
            tick: None,
            stopping: false,
        }
    }

    /// Runs until it was stopped and all in hand is settled, or the transport is closed, or the service is another's.
    pub(crate) async fn run(mut self) {
        let closing = self.route.closing.clone();
        let mut commands = Vec::with_capacity(BATCH);
        while !(self.stopping && self.held.is_empty()) {
            self.prepare();
            self.pump();
            let wake = self.next_wake();
            tokio::select! {
                biased;
                () = closing.cancelled() => return self.close().await,
                _ = self.commands.recv_many(&mut commands, BATCH) => {
                    for command in commands.drain(..) {
                        self.obey(command).await;
                    }
                }
                () = prompt(&mut self.outlet) => self.tick = Some(Instant::now()),
                arrival = next(&mut self.intake) => self.take(arrival),
                accepted = self.sent.answered() => self.answered(accepted),
                opened = open(&mut self.opening) => {
                    self.opening = None;
                    if let Err(error) = self.opened(opened) {
                        return self.end(error).await;
                    }
                }
                channel = opened(&mut self.outlet_opening) => self.publish_on(channel),
                Ok(()) = self.route.publish.state.changed() => {}
                Ok(()) = self.route.publish.blocked.changed() => {}
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
            }
            self.turn(Instant::now());
        }
        self.finish().await;
    }

    /// Sees to it that there is something to take from and something to publish on, as far as the broker allows.
    fn prepare(&mut self) {
        if self.intake.is_none() && self.opening.is_none() && !self.stopping {
            let link = self.route.consume.clone();
            let open = Intake::open(link, Arc::clone(&self.route.plan), Lingering::OURS);
            let pause = self.reopens_after();
            let opening = async move {
                sleep(pause).await;
                open.await
            };
            self.opening = Some(opening.boxed());
        }
        let due = !self.unsent.is_empty() && !self.route.publish.is_blocked();
        if self.outlet.is_none() && self.outlet_opening.is_none() && due {
            let session = self.route.publish.session();
            self.outlet_opening = session.map(open_publishing);
        }
    }

    fn publish_on(&mut self, channel: Option<PressChannel>) {
        self.outlet_opening = None;
        self.outlet = channel.map(Outlet::new);
    }

    /// Publishes what is due.
    fn pump(&mut self) {
        let blocked = self.route.publish.blocked.borrow_and_update().is_some();
        let prompt = self.is_prompt();
        let Some(outlet) = self.outlet.as_mut().filter(|_| !blocked) else {
            return;
        };
        while let Some(key) = self.unsent.pop_front() {
            let Some(held) = self.held.get(&key) else {
                continue;
            };
            // Two channels died with it: it shares the next one with nobody, who would die with it once more.
            let (pending, _) = outlet.pending();
            if pending > 0 && (held.deaths >= DEATHS_ALONE || self.alone.is_some()) {
                self.unsent.push_front(key);
                return;
            }
            let Some(message) = held.message(&self.route.plan.names) else {
                continue;
            };
            self.alone = (held.deaths >= DEATHS_ALONE).then_some(key);
            if outlet.publish(message, prompt, key).is_err() {
                self.unsent.push_front(key);
                return;
            }
        }
    }

    fn is_prompt(&self) -> bool {
        let prefetch = self.route.plan.prefetch;
        prefetch < PROMPT_PREFETCH || self.handed > prefetch / 2
    }

    fn next_wake(&mut self) -> Option<Instant> {
        let pending = self
            .outlet
            .as_ref()
            .is_some_and(|outlet| outlet.pending().0 > 0);
        let dirty = self.intake.as_ref().is_some_and(|intake| intake.is_dirty());
        if !pending && !dirty {
            self.tick = None;
        } else if self.tick.is_none() {
            self.tick = Some(Instant::now() + TICK);
        }
        let later = self.later.iter().map(|(at, _)| *at).min();
        let asking = self
            .intake
            .as_ref()
            .is_some_and(|intake| intake.is_asking());
        let stale = self
            .waiting
            .iter()
            .filter(|_| !asking)
            .filter_map(|key| self.goes_back(key))
            .min();
        // No connection to publish on: its return wakes us, or a look now and then.
        let unsent = (!self.unsent.is_empty()).then(|| Instant::now() + RETURNED_RETRY);
        let ask = self.sent.due();
        let lost = self.copies_until();
        let wakes = [self.tick, later, stale, unsent, ask, lost];
        wakes.into_iter().flatten().min()
    }

    /// What is done after every wake-up.
    fn turn(&mut self, now: Instant) {
        let broken = self.outlet.as_ref().is_some_and(|outlet| !outlet.is_open());
        if broken || self.tick.is_some_and(|tick| tick <= now) {
            self.tick = None;
            let mut fates = Vec::new();
            if let Some(outlet) = &mut self.outlet {
                outlet.sweep(&mut fates);
            }
            if broken && let Some(outlet) = self.outlet.take() {
                outlet.abandon(&mut fates);
            }
            for (key, fate) in fates {
                self.decide(key, fate);
            }
            self.flush();
        }
        self.give_up_stranded();
        self.ask();
        let unsent = &mut self.unsent;
        self.later.retain(|(at, key)| {
            let due = *at <= now;
            if due {
                unsent.push_back(*key);
            }
            !due
        });
        self.hand_over(now);
        self.ascertain(now);
    }

    fn opened(&mut self, opened: Result<Intake, Failure>) -> Result<(), Error> {
        let intake = opened.map_err(|failure| {
            failure.into_error(&format!("serving {}", self.route.plan.names.main))
        })?;
        self.route.member.ready(intake.session.number);
        self.intake = Some(intake);
        Ok(())
    }

    /// The service cannot be served any more: what handlers still run is not theirs.
    async fn end(mut self, error: Error) {
        tracing::warn!(%error, "a subscription is over");
        let _ = self.over.set(error);
        self.deliveries = None;
        self.lease.cancel();
        for (_, mut held) in std::mem::take(&mut self.held) {
            held.resolve(Err(lost_lease()));
        }
        self.finish().await;
    }

    /// The transport is closing: what no handler has goes back as it was, and replies that are under way get their confirms. What is
    /// with handlers goes back with its channel.
    async fn close(mut self) {
        let _ = self.over.set(closed());
        // Told before it was closed.
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command).await;
        }
        let end = Instant::now() + CLOSE_WAIT;
        self.stop().await;
        // Nobody has received these: they go back as they were.
        while let Ok(command) = self.commands.try_recv() {
            if command.is_release() {
                self.obey(command).await;
            }
        }
        loop {
            self.prepare();
            self.pump();
            self.tick = Some(Instant::now());
            self.turn(Instant::now());
            let under_way = self
                .outlet
                .as_ref()
                .is_some_and(|outlet| outlet.pending().0 > 0)
                || !self.unsent.is_empty()
                || !self.sent.is_empty();
            if !under_way || Instant::now() >= end {
                break;
            }
            tokio::select! {
                accepted = self.sent.answered() => self.answered(accepted),
                channel = opened(&mut self.outlet_opening) => self.publish_on(channel),
                () = sleep(TICK) => {}
            }
        }
        self.lease.cancel();
        if let Some(intake) = &self.intake {
            intake.lease.cancel();
        }
        for (_, mut held) in std::mem::take(&mut self.held) {
            let message = "the transport was closed before the broker's word";
            held.resolve(Err(Error::maybe_executed(ErrorKind::Closed, message)));
        }
    }

    async fn finish(mut self) {
        self.flush();
        let plan = &self.route.plan;
        if let Some(intake) = self.intake.take()
            && plan.exclusive
        {
            topology::disown(&intake.session, &plan.names, &plan.marker).await;
        }
    }
}

async fn prompt(outlet: &mut Option<Outlet<u64>>) {
    poll_fn(|cx| match outlet {
        Some(outlet) => outlet.poll_prompt(cx),
        None => Poll::Pending,
    })
    .await
}

async fn next(intake: &mut Option<Intake>) -> Arrival {
    match intake {
        Some(intake) => intake.next().await,
        None => std::future::pending().await,
    }
}

async fn open(
    opening: &mut Option<BoxFuture<'static, Result<Intake, Failure>>>,
) -> Result<Intake, Failure> {
    match opening {
        Some(opening) => opening.await,
        None => std::future::pending().await,
    }
}

//! The task of one subscription: it takes deliveries, publishes what handlers answer, and acknowledges.
//!
//! A reply is accepted by the broker before its request is acknowledged, so a crash in between costs a second reply,
//! never the only one.

use std::collections::{HashMap, HashSet, VecDeque};
use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use antiphon_core::transport::{Delivery, Settle};
use antiphon_core::{Code, Error, ErrorKind, Executed, Fault, Reply};
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::error::{Failure, closed};
use crate::held::{Decoded, Held, Identity, Progress, Work};
use crate::intake::{Intake, Origin, Plan};
use crate::link::Link;
use crate::message;
use crate::outlet::{Fate, Outlet};
use crate::recovery::Member;
use crate::settle::{AmqpSettlement, Command};
use crate::topology::{self, Claim};

/// How often confirms are looked at, and acknowledgements sent, when nobody is short of either.
const TICK: Duration = Duration::from_millis(1);

/// Below this prefetch, and when half of it is in hand, confirms wake the task: a tick late would cost a handler its work.
const PROMPT_PREFETCH: usize = 64;

/// A reply that found no inbox is tried again after this time.
const RETURNED_RETRY: Duration = Duration::from_millis(20);

/// A queue that could not be declared is tried again after this time.
const DECLARE_RETRY: Duration = Duration::from_secs(1);

/// A request from the retry queue that finds all handlers busy so long goes back, for another server to take.
const RETRY_WAITS: Duration = Duration::from_millis(250);

/// So often may the channel die with a message before it is thought to be the reason.
const DEATHS_MAX: u32 = 3;

/// What was answered lately, so that a copy that comes back with a lost connection is not run again.
const RECENT_FOR: Duration = Duration::from_secs(60);
const RECENT_MAX: usize = 65_536;

/// How long a closing subscription waits for the broker's word on its replies.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// The most deliveries and commands that are taken in one go.
const BATCH: usize = 256;

/// What a courier needs from its transport.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) plan: Arc<Plan>,
    pub(crate) consume: Link,
    pub(crate) publish: Link,
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
    over: Arc<OnceLock<Error>>,
    intake: Option<Intake>,
    opening: Option<BoxFuture<'static, Result<Intake, Failure>>>,
    outlet: Option<Outlet<u64>>,
    held: HashMap<u64, Held>,
    next_key: u64,
    /// Decoded and not handed over, in order; the ones from the retry queue first.
    waiting: VecDeque<u64>,
    /// How many are with handlers or being settled for them.
    handed: usize,
    /// What is to be published.
    unsent: VecDeque<u64>,
    /// What is to be published later.
    later: Vec<(Instant, u64)>,
    recent: Recent,
    /// Of all that peers of ours sent: it survives a lost connection.
    lease: CancellationToken,
    tick: Option<Instant>,
    stopping: bool,
}

impl Courier {
    pub(crate) fn new(
        route: Route,
        intake: Intake,
        deliveries: mpsc::UnboundedSender<Delivery>,
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
            over,
            intake: Some(intake),
            opening: None,
            outlet: None,
            held: HashMap::new(),
            next_key: 0,
            waiting: VecDeque::new(),
            handed: 0,
            unsent: VecDeque::new(),
            later: Vec::new(),
            recent: Recent::default(),
            lease: CancellationToken::new(),
            tick: None,
            stopping: false,
        }
    }

    /// Runs until it was stopped and all in hand is settled, or the transport is closed, or the service is another's.
    pub(crate) async fn run(mut self) {
        let closing = self.route.closing.clone();
        let mut commands = Vec::with_capacity(BATCH);
        while !(self.stopping && self.held.is_empty()) {
            self.prepare().await;
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
                taken = next(&mut self.intake) => self.take(taken),
                opened = open(&mut self.opening) => {
                    self.opening = None;
                    if let Err(error) = self.opened(opened) {
                        return self.end(error).await;
                    }
                }
                Ok(()) = self.route.publish.state.changed() => {}
                Ok(()) = self.route.publish.blocked.changed() => {}
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
            }
            self.turn(Instant::now());
        }
        self.finish().await;
    }

    /// Sees to it that there is something to take from and something to publish on, as far as the broker allows.
    async fn prepare(&mut self) {
        if self.intake.is_none() && self.opening.is_none() && !self.stopping {
            let link = self.route.consume.clone();
            let open = Intake::open(link, Arc::clone(&self.route.plan));
            self.opening = Some(open.boxed());
        }
        if self.outlet.is_none() && !self.unsent.is_empty() {
            let Some(session) = self.route.publish.session() else {
                return;
            };
            match session.confirm_channel().await {
                Ok(channel) => self.outlet = Some(Outlet::new(channel)),
                Err(failure) => {
                    tracing::debug!(%failure, "no channel to publish replies on");
                    if session.is_alive() {
                        session.suspect();
                    }
                }
            }
        }
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
            let Some(message) = held.message(&self.route.plan.names) else {
                continue;
            };
            if outlet.publish(message, prompt, key).is_err() {
                self.unsent.push_front(key);
                return;
            }
        }
    }

    fn is_prompt(&self) -> bool {
        let prefetch = self.route.plan.prefetch;
        prefetch < PROMPT_PREFETCH || self.held.len() >= prefetch / 2
    }

    fn next_wake(&mut self) -> Option<Instant> {
        let pending = self
            .outlet
            .as_ref()
            .is_some_and(|outlet| outlet.pending().0 > 0);
        let dirty = self
            .intake
            .as_ref()
            .is_some_and(|intake| intake.acker.is_dirty());
        if !pending && !dirty {
            self.tick = None;
        } else if self.tick.is_none() {
            self.tick = Some(Instant::now() + TICK);
        }
        let later = self.later.iter().map(|(at, _)| *at).min();
        let stale = self.waiting.front().and_then(|key| self.goes_back(key));
        // No connection to publish on: its return wakes us, or a look now and then.
        let unsent = (!self.unsent.is_empty()).then(|| Instant::now() + RETURNED_RETRY);
        let wakes = [self.tick, later, stale, unsent];
        wakes.into_iter().flatten().min()
    }

    /// When a request from the retry queue is given back.
    fn goes_back(&self, key: &u64) -> Option<Instant> {
        let held = self.held.get(key)?;
        (held.origin == Origin::Retry && held.tag.is_some()).then(|| held.taken() + RETRY_WAITS)
    }

    /// Takes what arrived, and what arrived with it. `None` means that the channel or a queue is gone.
    fn take(&mut self, mut taken: Option<(Origin, lapin::message::Delivery)>) {
        for _ in 0..BATCH {
            let Some((origin, delivery)) = taken else {
                return self.lose_intake();
            };
            self.arrive(origin, delivery);
            let Some(intake) = &mut self.intake else {
                return;
            };
            match intake.next().now_or_never() {
                Some(next) => taken = next,
                None => return,
            }
        }
        if let Some((origin, delivery)) = taken {
            self.arrive(origin, delivery);
        }
    }

    fn arrive(&mut self, origin: Origin, delivery: lapin::message::Delivery) {
        let Some(intake) = &mut self.intake else {
            return;
        };
        let tag = delivery.delivery_tag;
        let properties = delivery.properties;
        let body = Bytes::from(delivery.data);
        let key = self.next_key;
        self.next_key += 1;

        if delivery.redelivered {
            if let Some(identity) = Identity::of(&properties) {
                let copy = self
                    .held
                    .values_mut()
                    .find(|held| held.tag.is_none() && held.identity.as_ref() == Some(&identity));
                if let Some(held) = copy {
                    // Its handler still runs: it goes on with the new tag.
                    held.tag = Some(tag);
                    held.origin = origin;
                    return;
                }
                if self.recent.contains(&identity) {
                    intake.acker.done(tag, key);
                    return;
                }
            }
            // Whoever had it died. It must not take its neighbours with it when it runs again.
            let progress = Progress::Publishing(Work::Retry);
            let held = Held::new(origin, tag, properties, body, progress);
            self.held.insert(key, held);
            self.unsent.push_back(key);
            return;
        }

        let lease = match message::is_plain(&properties) {
            true => intake.lease.clone(),
            false => self.lease.clone(),
        };
        let decoded = message::decode_request(&properties, body.clone());
        let mut held = Held::new(origin, tag, properties, body, Progress::InHand);
        match decoded {
            Ok(request) => {
                let expires = request
                    .deadline
                    .and_then(|deadline| Instant::now().checked_add(deadline.budget));
                held.progress = Progress::Waiting(Box::new(Decoded {
                    request,
                    expires,
                    lease,
                }));
                match origin {
                    // It is older than whatever waits from the main queue.
                    Origin::Retry => self.waiting.push_front(key),
                    Origin::Main => self.waiting.push_back(key),
                }
            }
            Err(reason) => {
                let executed = match held.attempt {
                    1 => Executed::No,
                    _ => Executed::Maybe,
                };
                let fault = Fault::new(Code::InvalidArgument, reason.clone());
                let id = antiphon_core::CorrelationId::random();
                let reply = Some(Box::new(Reply::fault(id, fault, executed)));
                held.progress = Progress::Publishing(Work::Bury { reason, reply });
                self.unsent.push_back(key);
            }
        }
        self.held.insert(key, held);
    }

    async fn obey(&mut self, command: Command) {
        match command {
            Command::Settle { key, settle, done } => {
                let Some(held) = self.held.get_mut(&key) else {
                    let _ = done.send(Err(lost_lease()));
                    return;
                };
                held.done = Some(done);
                let work = match *settle {
                    Settle::Reply(Some(reply)) if held.reply_to().is_some() => {
                        Work::Reply(Box::new(reply))
                    }
                    Settle::Reply(_) => return self.complete(key),
                    // The copy in the queue is settled by whoever gets it.
                    Settle::DeadLetter { .. } | Settle::Release if held.tag.is_none() => {
                        return self.forget(key, Err(lost_lease()));
                    }
                    Settle::DeadLetter { reason, reply } => Work::Bury {
                        reason,
                        reply: reply.map(Box::new),
                    },
                    Settle::Release => Work::Release,
                };
                held.progress = Progress::Publishing(work);
                self.unsent.push_back(key);
            }
            Command::Dropped { key } => {
                let Some(held) = self.held.get_mut(&key) else {
                    return;
                };
                if matches!(held.progress, Progress::InHand) {
                    self.handed -= 1;
                }
                if held.tag.is_none() {
                    self.held.remove(&key);
                    return;
                }
                held.progress = Progress::Publishing(Work::Retry);
                self.unsent.push_back(key);
            }
            Command::Again { key } => self.unsent.push_back(key),
            Command::Stop { done } => {
                self.stop().await;
                let _ = done.send(());
            }
        }
    }

    /// Takes nothing more, and gives back what no handler has.
    async fn stop(&mut self) {
        if std::mem::replace(&mut self.stopping, true) {
            return;
        }
        self.deliveries = None;
        self.opening = None;
        let _ = self.over.set(Error::not_executed(
            ErrorKind::Closed,
            "the subscription was stopped",
        ));
        if let Some(intake) = &mut self.intake {
            for (origin, delivery) in intake.cancel().await {
                self.arrive(origin, delivery);
            }
        }
        while let Some(key) = self.waiting.pop_front() {
            self.give_back(key);
        }
    }

    /// Gives a delivery back that no handler has.
    fn give_back(&mut self, key: u64) {
        let Some(held) = self.held.get_mut(&key) else {
            return;
        };
        if held.tag.is_none() {
            // The broker has it back already.
            self.forget(key, Ok(()));
            return;
        }
        held.progress = Progress::Publishing(Work::Release);
        self.unsent.push_back(key);
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
            if broken {
                let rest = self.outlet.take().into_iter().flat_map(Outlet::abandon);
                fates.extend(rest.map(|key| (key, Fate::Lost)));
            }
            for (key, fate) in fates {
                self.decide(key, fate);
            }
            self.flush();
        }
        let unsent = &mut self.unsent;
        self.later.retain(|(at, key)| {
            let due = *at <= now;
            if due {
                unsent.push_back(*key);
            }
            !due
        });
        self.hand_over(now);
    }

    fn decide(&mut self, key: u64, fate: Fate) {
        let Some(held) = self.held.get_mut(&key) else {
            return;
        };
        let Progress::Publishing(work) = &mut held.progress else {
            return;
        };
        match (work, fate) {
            (Work::Bury { reply, .. }, Fate::Accepted) => match reply.take() {
                Some(reply) if held.reply_to().is_some() => {
                    held.progress = Progress::Publishing(Work::Reply(reply));
                    self.unsent.push_back(key);
                }
                _ => self.complete(key),
            },
            (_, Fate::Accepted) => self.complete(key),
            (_, Fate::Lost) => {
                held.deaths += 1;
                if held.deaths >= DEATHS_MAX
                    && matches!(held.progress, Progress::Publishing(Work::Reply(_)))
                {
                    tracing::warn!("a reply that the broker takes from nobody");
                    return self.give_up_reply(key);
                }
                self.unsent.push_back(key);
            }
            (Work::Reply(_), Fate::Returned | Fate::Refused) => {
                let next = Instant::now() + RETURNED_RETRY;
                // Unbounded, retries towards callers that are gone would take all places of this server.
                let full = self.later.len() >= (self.route.plan.prefetch / 4).max(1);
                if full || next >= held.returned_until() {
                    return self.give_up_reply(key);
                }
                self.later.push((next, key));
            }
            (_, Fate::Refused) => self.later.push((Instant::now() + RETURNED_RETRY, key)),
            (_, Fate::Returned) => self.declare_for(key),
        }
    }

    /// Nobody waits for this reply any more.
    fn give_up_reply(&mut self, key: u64) {
        self.route.undeliverable.fetch_add(1, Ordering::Relaxed);
        self.complete(key);
    }

    /// Declares the queue that a delivery should go to, and has it published again.
    fn declare_for(&mut self, key: u64) {
        let Some(message) = self
            .held
            .get(&key)
            .and_then(|held| held.message(&self.route.plan.names))
        else {
            return;
        };
        let (plan, commands) = (Arc::clone(&self.route.plan), self.command_sender.clone());
        let mut link = self.route.consume.clone();
        let closing = self.route.closing.clone();
        tokio::spawn(closing.run_until_cancelled_owned(async move {
            let Some(session) = link.next_session().await else {
                return;
            };
            let ensured =
                topology::ensure(&session, &plan.config, &plan.names, &message.queue).await;
            if let Err(failure) = ensured {
                tracing::error!(%failure, queue = %message.queue, "a request cannot be put aside");
                sleep(DECLARE_RETRY).await;
            }
            let _ = commands.send(Command::Again { key });
        }));
    }

    /// All that was to be published is: what remains is the acknowledgement.
    fn complete(&mut self, key: u64) {
        let Some(held) = self.held.get_mut(&key) else {
            return;
        };
        let answered = !held.goes_round();
        held.progress = Progress::Acking;
        if let Some(identity) = held.identity.clone().filter(|_| answered) {
            self.recent.insert(identity);
        }
        match (held.tag, &mut self.intake) {
            (Some(tag), Some(intake)) => intake.acker.done(tag, key),
            _ => self.forget(key, Err(lost_lease())),
        }
    }

    fn flush(&mut self) {
        let Some(intake) = &mut self.intake else {
            return;
        };
        let mut keys = Vec::new();
        intake.acker.flush(&intake.channel, &mut keys);
        for key in keys {
            self.forget(key, Ok(()));
        }
    }

    fn forget(&mut self, key: u64, result: Result<(), Error>) {
        if let Some(mut held) = self.held.remove(&key) {
            if held.is_handed() {
                self.handed -= 1;
            }
            held.resolve(result);
        }
    }

    /// Hands over what waits, as far as handlers are free.
    fn hand_over(&mut self, now: Instant) {
        while self.handed < self.route.plan.prefetch {
            let Some(key) = self.waiting.pop_front() else {
                return;
            };
            let Some(held) = self.held.get_mut(&key) else {
                continue;
            };
            let Some(decoded) = held.hand() else {
                continue;
            };
            let settlement = AmqpSettlement::new(key, self.command_sender.clone());
            let delivery = Delivery::new(
                decoded.request,
                held.attempt,
                decoded.expires,
                decoded.lease,
                Box::new(settlement),
            );
            self.handed += 1;
            let sender = self.deliveries.as_ref();
            let unsent = match sender.map(|sender| sender.send(delivery)) {
                Some(Ok(())) => continue,
                Some(Err(error)) => Some(error.0),
                None => None,
            };
            // The subscription was dropped, and says so in a moment.
            if let Some(delivery) = unsent {
                let _ = delivery.release().now_or_never();
            }
        }
        while let Some(key) = self.waiting.front().copied()
            && self.goes_back(&key).is_some_and(|at| at <= now)
        {
            self.waiting.pop_front();
            self.give_back(key);
        }
    }

    /// The channel is gone: no tag is good any more, and the broker gives all that was not acknowledged to somebody.
    fn lose_intake(&mut self) {
        let Some(intake) = self.intake.take() else {
            return;
        };
        intake.lease.cancel();
        for held in self.held.values_mut() {
            held.tag = None;
        }
        // Answered, and not acknowledged: when the copy comes, it is.
        let answered: Vec<u64> = intake.acker.abandon().collect();
        for key in answered {
            self.forget(key, Ok(()));
        }
        let held = &mut self.held;
        // What no handler has can wait for its copy, if the copy can be known; else it is that copy that counts.
        self.waiting.retain(|key| {
            let known = held.get(key).is_some_and(|held| held.identity.is_some());
            if !known {
                held.remove(key);
            }
            known
        });
        // What was to go to another queue is in its own again.
        let again: Vec<u64> = held
            .iter()
            .filter(|(_, held)| held.goes_round())
            .map(|(key, _)| *key)
            .collect();
        for key in again {
            self.forget(key, Err(lost_lease()));
        }
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

    /// The transport is closing: replies that are under way get their confirms, everything else goes back.
    async fn close(mut self) {
        let _ = self.over.set(closed());
        self.deliveries = None;
        self.opening = None;
        let end = Instant::now() + CLOSE_WAIT;
        self.pump();
        while self
            .outlet
            .as_ref()
            .is_some_and(|outlet| outlet.pending().0 > 0)
            && Instant::now() < end
        {
            self.tick = Some(Instant::now());
            self.turn(Instant::now());
            sleep(TICK).await;
        }
        self.flush();
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

/// The identities of the requests that were answered lately.
#[derive(Debug, Default)]
struct Recent {
    known: HashSet<Identity>,
    order: VecDeque<(Instant, Identity)>,
}

impl Recent {
    fn insert(&mut self, identity: Identity) {
        let now = Instant::now();
        while let Some((since, _)) = self.order.front()
            && (self.order.len() >= RECENT_MAX || now - *since > RECENT_FOR)
        {
            if let Some((_, old)) = self.order.pop_front() {
                self.known.remove(&old);
            }
        }
        if self.known.insert(identity.clone()) {
            self.order.push_back((now, identity));
        }
    }

    fn contains(&self, identity: &Identity) -> bool {
        self.known.contains(identity)
    }
}

fn lost_lease() -> Error {
    let message = "the connection was lost, and another server may have the request";
    Error::maybe_executed(ErrorKind::LostLease, message)
}

async fn prompt(outlet: &mut Option<Outlet<u64>>) {
    poll_fn(|cx| match outlet {
        Some(outlet) => outlet.poll_prompt(cx),
        None => Poll::Pending,
    })
    .await
}

async fn next(intake: &mut Option<Intake>) -> Option<(Origin, lapin::message::Delivery)> {
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

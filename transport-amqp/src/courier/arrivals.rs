//! Deliveries on their way to handlers, and back to their queues untouched.

use std::time::Duration;

use antiphon_core::transport::Delivery;
use antiphon_core::{Code, CorrelationId, Error, ErrorKind, Executed, Fault, Reply};
use bytes::Bytes;
use futures_util::FutureExt;
use tokio::time::Instant;

use super::settling::lost_lease;
use super::{BATCH, Courier};
use crate::held::{Decoded, Held, Identity, Progress, Work};
use crate::intake::{Arrival, Intake, Origin};
use crate::link::jitter;
use crate::message;
use crate::settle::AmqpSettlement;

/// A request from the retry queue that finds all handlers busy so long goes back, for another server to take.
const RETRY_WAITS: Duration = Duration::from_millis(250);

/// And one from the main queue, whose place one from the retry queue has. It comes to the end of its queue, so not at once.
const MAIN_WAITS: Duration = Duration::from_secs(1);

/// What the broker has back comes again so soon after the queue was opened, if it comes here.
const COPIES_COME: Duration = Duration::from_secs(1);

/// A queue that lasts so long holds no unreadable message.
const UNREADABLE_LASTS: Duration = Duration::from_secs(1);

/// How long a queue that may hold one stays closed: at first, twice as long each time, and at most.
const UNREADABLE_WAITS: Duration = Duration::from_millis(100);
const UNREADABLE_WAITS_MAX: Duration = Duration::from_secs(30);

impl Courier {
    /// Takes what arrived, and what arrived with it, if it is certainly ours.
    pub(super) fn take(&mut self, mut arrival: Arrival) {
        let Some(intake) = &mut self.intake else {
            return;
        };
        if let Arrival::Delivery(origin, delivery) = arrival {
            if !intake.is_certain(Instant::now()) {
                return intake.keep(origin, delivery);
            }
            arrival = Arrival::Delivery(origin, delivery);
        }
        for _ in 0..BATCH {
            match arrival {
                Arrival::Delivery(origin, delivery) => self.arrive(origin, delivery),
                Arrival::Certain => return,
                Arrival::Over => return self.lose_intake(),
            }
            match self.intake.as_mut().and_then(Intake::arrived) {
                Some(next) => arrival = next,
                None => return,
            }
        }
        match arrival {
            Arrival::Delivery(origin, delivery) => self.arrive(origin, delivery),
            Arrival::Certain => {}
            Arrival::Over => self.lose_intake(),
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

        let waited = intake.waited(origin);
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
                    if let Progress::Waiting(decoded) = &mut held.progress {
                        // It was in its queue, and what was said about it meanwhile was not heard.
                        decoded.waited = true;
                    }
                    return;
                }
                if self.recent.contains(&identity) {
                    intake.done(origin, tag, key);
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
                    waited,
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
                let id = CorrelationId::random();
                let reply = Some(Reply::fault(id, fault, executed).into());
                held.progress = Progress::Publishing(Work::Bury { reason, reply });
                self.unsent.push_back(key);
            }
        }
        self.held.insert(key, held);
    }

    /// Hands over what waits, as far as handlers are free.
    pub(super) fn hand_over(&mut self, now: Instant) {
        self.drop_lost(now);
        // It may have waited here while this process stood still.
        if !self.waiting.is_empty() && !self.is_certain(now) {
            return;
        }
        let certain = self
            .intake
            .as_ref()
            .map(|intake| intake.session.pulse.limit());
        let certain_until = certain.map(|certain| now + certain);
        let mut parked = Vec::new();
        while self.handed < self.route.plan.prefetch {
            let Some(key) = self.waiting.pop_front() else {
                break;
            };
            // Its channel was lost, and it is in its queue again: it runs here only if its copy comes here.
            let lost = self.held.get(&key).is_some_and(|held| held.tag.is_none());
            if lost || self.is_parked(key) {
                parked.push(key);
                continue;
            }
            let Some(held) = self.held.get_mut(&key) else {
                continue;
            };
            let Some(decoded) = held.hand() else {
                continue;
            };
            let settlement = AmqpSettlement::new(key, self.command_sender.clone(), decoded.lease);
            let mut delivery = Delivery::new(
                decoded.request,
                held.attempt,
                decoded.expires,
                Box::new(settlement),
            );
            delivery.waited = decoded.waited;
            delivery.certain_until = certain_until;
            held.handed = true;
            self.handed += 1;
            let refused = match &self.deliveries {
                Some(sender) => sender.send(delivery).err().map(|error| error.0),
                None => Some(delivery),
            };
            // The subscription was dropped, and says so in a moment.
            if let Some(delivery) = refused {
                let _ = delivery.release().now_or_never();
            }
        }
        for key in parked.into_iter().rev() {
            self.waiting.push_front(key);
        }
        let due = |key: &u64| self.goes_back(key).is_some_and(|at| at <= now);
        let stale: Vec<u64> = self.waiting.iter().copied().filter(due).collect();
        if !stale.is_empty() {
            self.waiting.retain(|key| !stale.contains(key));
        }
        for key in stale {
            self.give_back(key);
        }
    }

    /// Tells those who ask whether what they are about to start is still ours, once that is certain.
    pub(super) fn ascertain(&mut self, now: Instant) {
        if self.uncertain.is_empty() || !self.is_certain(now) {
            return;
        }
        let intake = self.intake.as_ref();
        let until = intake.map(|intake| now + intake.session.pulse.limit());
        for (key, asks) in self.uncertain.drain(..) {
            // Without a tag it is in its queue again.
            let is_ours = self.held.get(&key).is_some_and(|held| held.tag.is_some());
            let _ = asks.send(until.filter(|_| is_ours));
        }
    }

    /// True if all that has a tag is ours: this process did not stand still, or the broker was asked since.
    fn is_certain(&mut self, now: Instant) -> bool {
        let intake = self.intake.as_mut();
        intake.is_none_or(|intake| intake.is_certain(now))
    }

    /// Forgets what waits and lost its channel, once its copy will hardly come here any more.
    fn drop_lost(&mut self, now: Instant) {
        if self.copies_until().is_none_or(|until| until > now) {
            return;
        }
        let held = &mut self.held;
        self.waiting.retain(|key| {
            let lost = held.get(key).is_none_or(|held| held.tag.is_none());
            if lost {
                held.remove(key);
            }
            !lost
        });
    }

    /// Until when copies of what waits and lost its channel are expected.
    pub(super) fn copies_until(&self) -> Option<Instant> {
        let intake = self.intake.as_ref()?;
        let lost = |key| self.held.get(key).is_some_and(|held| held.tag.is_none());
        self.waiting
            .iter()
            .any(lost)
            .then(|| intake.opened + COPIES_COME)
    }

    /// True of a request from the retry queue while that of which it is the copy is not acknowledged: if it killed this server
    /// now, both would come back, and the count of one would be lost.
    fn is_parked(&self, key: u64) -> bool {
        let Some(copy) = self.held.get(&key) else {
            return false;
        };
        copy.origin == Origin::Retry
            && self.held.iter().any(|(other, held)| {
                // Moved, or just being.
                let source = held.moved || held.goes_round();
                *other != key && source && held.tag.is_some() && held.is_like(copy)
            })
    }

    /// Takes nothing more, and gives back what no handler has.
    pub(super) async fn stop(&mut self) {
        if std::mem::replace(&mut self.stopping, true) {
            return;
        }
        self.deliveries = None;
        self.handover.give_back();
        self.opening = None;
        let message = "the subscription was stopped";
        let _ = self
            .over
            .set(Error::not_executed(ErrorKind::Closed, message));
        if let Some(intake) = &mut self.intake {
            match intake.cancel().await {
                Some(rest) => {
                    for (origin, delivery) in rest {
                        self.arrive(origin, delivery);
                    }
                }
                None => self.lose_intake(),
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

    /// When a request that waits for a handler is given back.
    pub(super) fn goes_back(&self, key: &u64) -> Option<Instant> {
        let held = self.held.get(key)?;
        let patience = match held.origin {
            Origin::Main => MAIN_WAITS,
            Origin::Retry => RETRY_WAITS,
        };
        let busy = self.handed >= self.route.plan.prefetch;
        (busy && held.tag.is_some()).then(|| held.taken() + patience)
    }

    /// A message that the client library cannot read costs all subscriptions of the transport their connection. Nobody can say whose
    /// it was, but its queue is one that was opened just before. Such queues are opened again later and later, so that
    /// the others are served in between; these are soon told apart, because they last.
    fn blame(&mut self, intake: &Intake) {
        if !intake.unreadable || intake.opened.elapsed() >= UNREADABLE_LASTS {
            self.unreadable = 0;
            return;
        }
        self.unreadable = self.unreadable.saturating_add(1);
        let (queue, times) = (&self.route.plan.names.main, self.unreadable);
        tracing::error!(%queue, times, "the connection was lost to an unreadable message, perhaps from this queue");
    }

    /// How long to wait before the queue is opened again.
    pub(super) fn reopens_after(&self) -> Duration {
        match self.unreadable {
            0 => Duration::ZERO,
            times => {
                let ceiling = UNREADABLE_WAITS.saturating_mul(1 << times.min(10));
                let ceiling = ceiling.min(UNREADABLE_WAITS_MAX);
                // Not at once with the others: who comes back alone is told apart.
                ceiling / 2 + jitter(ceiling / 2)
            }
        }
    }

    /// The channel is gone: no tag is good any more, and the broker gives all that was not acknowledged to somebody.
    pub(super) fn lose_intake(&mut self) {
        let Some(intake) = self.intake.take() else {
            return;
        };
        self.blame(&intake);
        intake.lease.cancel();
        for held in self.held.values_mut() {
            held.tag = None;
        }
        // Answered, and perhaps not acknowledged: if a copy comes, it will be.
        for key in intake.abandon().chain(self.sent.abandon()) {
            self.forget(key, Err(lost_lease()));
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
}

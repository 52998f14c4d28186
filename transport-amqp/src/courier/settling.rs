//! Deliveries on their way from handlers to their acknowledgement.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use antiphon_core::transport::Settle;
use antiphon_core::{Code, Error, ErrorKind, Executed, Fault, Reply};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::time::{Instant, sleep};

use super::{Courier, DROPPED_WAITS, PROMPT_PREFETCH, RETURNED_RETRY};
use crate::held::{Held, Progress, Work};
use crate::outlet::Fate;
use crate::settle::Command;
use crate::topology;

/// What the broker did not take is tried again after this time: at first, twice as long each time, and at most.
const REFUSED_RETRY: Duration = Duration::from_millis(50);
const REFUSED_RETRY_MAX: Duration = Duration::from_secs(60);

/// How long a queue must have been there. What is published to one that is just being declared may be lost or refused.
const SETTLED: Duration = Duration::from_millis(100);

/// What died with so many channels is published alone, so that the next one tells whether it was the reason.
pub(super) const DEATHS_ALONE: u32 = 2;

/// How often at most the broker is asked whether it has read the acknowledgements, when no handler waits for that.
const ASK_EVERY: Duration = Duration::from_millis(5);

/// How long a consumer that was cancelled with deliveries in hand may still be counted once these are settled.
const CONSUMER_LINGERS: Duration = Duration::from_millis(200);

/// The acknowledgements that the broker was sent, and those among them that it is being asked about.
#[derive(Default)]
pub(super) struct Sent {
    asking: Option<BoxFuture<'static, bool>>,
    asked: Vec<u64>,
    next: Vec<u64>,
    /// When the broker may be asked again.
    not_before: Option<Instant>,
}

impl Sent {
    /// Resolves when the broker has answered.
    pub(super) async fn answered(&mut self) -> bool {
        match &mut self.asking {
            Some(asking) => asking.await,
            None => std::future::pending().await,
        }
    }

    /// When the next question is due, if one waits.
    pub(super) fn due(&self) -> Option<Instant> {
        let waits = self.asking.is_none() && !self.next.is_empty();
        self.not_before.filter(|_| waits)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.asked.is_empty() && self.next.is_empty()
    }

    /// The channel is lost: what was sent may not have arrived.
    pub(super) fn abandon(&mut self) -> impl Iterator<Item = u64> + use<> {
        let Self { asked, next, .. } = std::mem::take(self);
        asked.into_iter().chain(next)
    }
}

impl Courier {
    pub(super) async fn obey(&mut self, command: Command) {
        match command {
            Command::Settle {
                key,
                settle,
                settled,
            } => {
                let Some(held) = self.held.get_mut(&key) else {
                    return settled.tell(Err(lost_lease()));
                };
                held.settled = Some(settled);
                held.progress = Progress::Acking;
                let work = match settle {
                    Settle::Reply(Some(reply)) if held.reply_to().is_some() => Work::Reply(reply),
                    Settle::Reply(_) => {
                        let prefetch = self.route.plan.prefetch;
                        if prefetch < PROMPT_PREFETCH && self.handed >= prefetch {
                            // The broker sends nothing before it is acknowledged.
                            self.tick = Some(Instant::now());
                        }
                        return self.complete(key);
                    }
                    // The copy in the queue is settled by whoever gets it.
                    Settle::DeadLetter { .. } | Settle::Release if held.tag.is_none() => {
                        return self.forget(key, Err(lost_lease()));
                    }
                    Settle::DeadLetter { reason, reply } => Work::Bury { reason, reply },
                    Settle::Release => Work::Release,
                };
                held.progress = Progress::Publishing(work);
                self.unsent.push_back(key);
            }
            Command::Dropped { key } => {
                let Some(held) = self.held.get_mut(&key) else {
                    return;
                };
                if held.tag.is_none() {
                    return self.forget(key, Ok(()));
                }
                held.progress = Progress::Publishing(Work::Retry);
                self.later.push((Instant::now() + DROPPED_WAITS, key));
            }
            Command::Again { key } => self.unsent.push_back(key),
            Command::PutOff { key } => self.put_off(key),
            Command::Ascertain { key, until } => self.uncertain.push((key, until)),
            Command::Stop { done } => {
                self.stop().await;
                let _ = done.send(());
            }
        }
    }

    pub(super) fn decide(&mut self, key: u64, fate: Fate) {
        let Some(held) = self.held.get_mut(&key) else {
            return;
        };
        let Progress::Publishing(work) = &mut held.progress else {
            return;
        };
        let alone = self.alone == Some(key);
        if alone {
            self.alone = None;
        }
        match (work, fate) {
            (Work::Bury { reply, .. }, Fate::Accepted) => match reply.take() {
                Some(reply) if held.reply_to().is_some() => {
                    held.progress = Progress::Publishing(Work::Reply(reply));
                    self.unsent.push_back(key);
                }
                _ => self.complete(key),
            },
            (_, Fate::Accepted) => self.complete(key),
            // It is the connection that was lost, which is nobody's fault.
            (_, Fate::Lost { refused: None }) => self.unsent.push_back(key),
            (Work::Reply(reply), fate @ (Fate::Lost { refused: Some(_) } | Fate::Unwritable)) => {
                held.deaths += 1;
                if !alone && fate != Fate::Unwritable {
                    return self.unsent.push_back(key);
                }
                tracing::error!(queue = %self.route.plan.names.main, "a reply that the broker does not take");
                if std::mem::replace(&mut held.replaced, true) {
                    return self.give_up_reply(key);
                }
                // Its caller is told at least.
                let fault = Fault::new(Code::Internal, "the broker did not take the reply");
                *reply = Reply::fault(reply.id.clone(), fault, Executed::Yes).into();
                self.unsent.push_back(key);
            }
            (_, fate @ (Fate::Lost { refused: Some(_) } | Fate::Unwritable)) => {
                held.deaths += 1;
                // After the first time it goes without headers of others.
                let again = match fate {
                    Fate::Unwritable => held.deaths <= 2,
                    _ => !alone,
                };
                match again {
                    true => self.unsent.push_back(key),
                    false => self.put_off(key),
                }
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
            (_, Fate::Refused) => self.put_off(key),
            (_, Fate::Returned) => self.declare_for(key),
        }
    }

    /// The broker does not take it: it stays here, and is tried again as long as it matters.
    fn put_off(&mut self, key: u64) {
        let Some(held) = self.held.get_mut(&key) else {
            return;
        };
        if held.goes_round() && held.is_expired() {
            tracing::warn!(queue = %self.route.plan.names.main, "a request that could not be put aside expired");
            return self.complete(key);
        }
        let pause = refused_retry(held.refusals);
        held.refusals = held.refusals.saturating_add(1);
        self.later.push((Instant::now() + pause, key));
    }

    /// No connection is left, so that who replied must see to the reply: its request is in its queue again.
    pub(super) fn give_up_stranded(&mut self) {
        if self.intake.is_some() || self.route.publish.session().is_some() {
            return;
        }
        let stranded = |held: &Held| matches!(held.progress, Progress::Publishing(Work::Reply(_)));
        let keys: Vec<u64> = self
            .held
            .iter()
            .filter(|(_, held)| stranded(held))
            .map(|(key, _)| *key)
            .collect();
        for key in keys {
            let message = "the connection was lost before the broker accepted the reply";
            let error = Error::maybe_executed(ErrorKind::ConnectionLost, message);
            self.forget(key, Err(error));
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
                let _ = commands.send(Command::PutOff { key });
                return;
            }
            sleep(SETTLED).await;
            let _ = commands.send(Command::Again { key });
        }));
    }

    /// All that was to be published is: what remains is the acknowledgement.
    fn complete(&mut self, key: u64) {
        let Some(held) = self.held.get_mut(&key) else {
            return;
        };
        held.moved = held.goes_round();
        let answered = !held.moved;
        held.progress = Progress::Acking;
        // Nothing is compared with it any more: it is acknowledged, or its channel is lost and it is forgotten.
        if answered && let Some(identity) = held.identity.take() {
            self.recent.insert(identity);
        }
        match (held.tag, &mut self.intake) {
            (Some(tag), Some(intake)) => intake.done(held.origin, tag, key),
            _ => self.forget(key, Err(lost_lease())),
        }
    }

    /// Acknowledges what is done.
    pub(super) fn flush(&mut self) {
        let Some(intake) = &mut self.intake else {
            return;
        };
        let mut keys = Vec::new();
        intake.flush(&mut keys);
        for key in keys {
            let Some(held) = self.held.get_mut(&key) else {
                continue;
            };
            // The broker sends the next one as soon as it reads the acknowledgement.
            self.handed -= usize::from(std::mem::take(&mut held.handed));
            match held.settled.is_some() || held.moved {
                true => self.sent.next.push(key),
                false => self.forget(key, Ok(())),
            }
        }
        self.ask();
    }

    /// The broker does not answer acknowledgements. It works them off in order, so the answer to a question behind them is theirs: who
    /// was told that a request is settled can go away, and nobody will get it again.
    pub(super) fn ask(&mut self) {
        if self.sent.asking.is_some() || self.sent.next.is_empty() {
            return;
        }
        let now = Instant::now();
        if self.sent.not_before.is_some_and(|at| now < at) && !self.stopping {
            return;
        }
        let not_before = now + self.asks_after();
        let Some(intake) = &mut self.intake else {
            return;
        };
        self.sent.not_before = Some(not_before);
        self.sent.asked = std::mem::take(&mut self.sent.next);
        let last = self.stopping && self.sent.asked.len() == self.held.len();
        let (session, plan) = (Arc::clone(&intake.session), Arc::clone(&self.route.plan));
        let answer = intake.ask();
        let asking = async move {
            let answered = answer.await;
            if answered && last {
                // A quorum queue counts a cancelled consumer until all that it held is settled.
                topology::consumers_change(&session, &plan.names.main, CONSUMER_LINGERS).await;
            }
            answered
        };
        self.sent.asking = Some(asking.boxed());
    }

    /// How long to gather acknowledgements for one question. They hold nobody up but who waits for a shutdown; only a server that
    /// does one thing at a time goes on when it knows.
    fn asks_after(&self) -> Duration {
        match self.is_prompt() {
            true => Duration::ZERO,
            false => ASK_EVERY,
        }
    }

    /// The broker answered, or will not: on with the next.
    pub(super) fn answered(&mut self, accepted: bool) {
        self.sent.asking = None;
        for key in std::mem::take(&mut self.sent.asked) {
            let result = match accepted {
                true => Ok(()),
                false => Err(lost_lease()),
            };
            self.forget(key, result);
        }
        self.ask();
    }

    pub(super) fn forget(&mut self, key: u64, result: Result<(), Error>) {
        if let Some(mut held) = self.held.remove(&key) {
            self.handed -= usize::from(held.handed);
            held.resolve(result);
        }
    }
}

/// How long to wait after so many refusals.
fn refused_retry(refusals: u32) -> Duration {
    let pause = REFUSED_RETRY.saturating_mul(1 << refusals.min(20));
    pause.min(REFUSED_RETRY_MAX)
}

pub(super) fn lost_lease() -> Error {
    let message = "the connection was lost, and another server may have the request";
    Error::maybe_executed(ErrorKind::LostLease, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_is_tried_less_and_less() {
        let hour: Duration = (0..80).map(refused_retry).sum();
        assert_eq!(refused_retry(0), REFUSED_RETRY);
        assert_eq!(refused_retry(u32::MAX), REFUSED_RETRY_MAX);
        assert!(hour > Duration::from_secs(3600), "{hour:?} for 80 tries");
    }
}

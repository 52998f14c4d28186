//! Whether a request is to be started: some callers want to be asked, and of some requests only the caller knows.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::Service;
use crate::envelope::{CorrelationId, Outcome};
use crate::name::ReplyAddress;
use crate::pending::{Ended, Slot};
use crate::signal::{Signal, Signals};
use crate::transport::Delivery;

/// How long an offer waits for its answer.
const OFFER_LASTS: Duration = Duration::from_secs(10);

/// How long a request waits for its caller's word that it is still wanted.
const QUESTION_LASTS: Duration = Duration::from_secs(2);

/// Whether a request is to be started.
pub(super) enum Wanted {
    Yes,
    /// Its caller does not wait for it any more.
    No,
    /// Its caller could not be asked in time.
    Unheard,
    /// It is another server's now.
    NotOurs,
}

/// What a caller said to an offer.
enum Answer {
    Start,
    Leave,
    /// There is no inbox any more.
    Gone,
    Unheard,
    /// Nobody waits for it any more: the request is another server's.
    NotOurs,
}

impl Service {
    /// Whether the caller gave the request up; asks it, if it wants to be, or may have done so before this server could
    /// be told.
    pub(super) async fn is_wanted(&self, delivery: &Delivery) -> Wanted {
        let request = &delivery.request;
        if self.running.was_given_up(&request.id) {
            return Wanted::No;
        }
        let Some(to) = &request.reply_to else {
            return Wanted::Yes;
        };
        let was_before_us = delivery.waited || delivery.attempt > 1;
        match request.signals {
            // All are asked at once, and nobody else starts on this one.
            _ if delivery.asked => Wanted::Yes,
            Signals::Offer => match Box::pin(self.offer(delivery, to, OFFER_LASTS)).await {
                Answer::Start => Wanted::Yes,
                Answer::Leave | Answer::Gone => Wanted::No,
                // Somebody else may be heard.
                Answer::Unheard => Wanted::Unheard,
                Answer::NotOurs => Wanted::NotOurs,
            },
            Signals::Running if was_before_us => {
                match Box::pin(self.offer(delivery, to, QUESTION_LASTS)).await {
                    // Who does not answer has not given it up.
                    Answer::Start | Answer::Gone | Answer::Unheard => Wanted::Yes,
                    Answer::Leave => Wanted::No,
                    Answer::NotOurs => Wanted::NotOurs,
                }
            }
            Signals::Running | Signals::None => Wanted::Yes,
        }
    }

    /// Offers to start on a request, and waits for its caller's word.
    async fn offer(&self, delivery: &Delivery, to: &ReplyAddress, patience: Duration) -> Answer {
        let id = CorrelationId::random();
        let now = Instant::now();
        let expires = delivery.expires.unwrap_or(now + patience);
        let (Some(number), true) = (id.as_u128(), expires > now) else {
            // That it has expired is said as always.
            return Answer::Start;
        };
        let given_up = CancellationToken::new();
        let _entered = self.running.enter(&delivery.request.id, given_up.clone());
        let deadline = expires.min(now + patience);
        let pending = self.client.pending();
        let Ok(entered) = pending.enter(number, now, deadline, None) else {
            return Answer::Unheard;
        };
        let (place, address) = (entered.place, entered.address);
        let mut slot = Slot { pending, place };
        let offer = Signal::Offer {
            node: self.node.clone(),
            to: address,
            id,
        };
        let answer = async {
            if !self.say(delivery, to, offer).await {
                return Answer::Gone;
            }
            match slot.ended().await {
                Ended::Reply(reply) if matches!(reply.outcome, Outcome::Fault { .. }) => {
                    Answer::Leave
                }
                Ended::Reply(_) => Answer::Start,
                _ if expires <= Instant::now() => Answer::Leave,
                _ => Answer::Unheard,
            }
        };
        tokio::select! {
            biased;
            answer = answer => answer,
            () = given_up.cancelled() => Answer::Leave,
            () = sleep_until(deadline) => Answer::Unheard,
            () = delivery.lease().cancelled() => Answer::NotOurs,
            () = self.kill.cancelled() => Answer::NotOurs,
        }
    }
}

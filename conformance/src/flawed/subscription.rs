//! A subscription and its deliveries, passed on but for their flaw.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use antiphon_core::transport::{
    Delivery, FlaggedToken, Later, Outbound, Settle, Settlement, Subscription, SubscriptionEvent,
    Unsettled,
};
use antiphon_core::{CorrelationId, Error, ErrorKind, Outcome, Reply, ReplyAddress};
use async_trait::async_trait;

use super::Flaw;
use super::transport::Line;

#[derive(Debug)]
pub(super) struct FlawedSubscription {
    line: Arc<Line>,
    sound: Box<dyn Subscription>,
    /// It is the first that its service ever had.
    first: bool,
}

impl FlawedSubscription {
    pub(super) fn new(line: Arc<Line>, sound: Box<dyn Subscription>, first: bool) -> Self {
        Self { line, sound, first }
    }

    async fn spoil(&mut self, delivery: Delivery) -> Delivery {
        let (request, expires) = (delivery.request.clone(), delivery.expires);
        let attempt = if self.line.has(Flaw::ForgetsAttempts) {
            1
        } else {
            delivery.attempt
        };
        self.line
            .world
            .memory()
            .unanswered
            .push_back(request.id.clone());
        let mut settlement = FlawedSettlement {
            line: Arc::clone(&self.line),
            sound: None,
            to: request.reply_to.clone(),
            lease: FlaggedToken::new(),
        };
        if self.line.has(Flaw::SettlesEarly) {
            // A failure would mean that it goes back, which the flaw is about.
            let _ = delivery.reply(None).await;
        } else {
            settlement.sound = Some(delivery);
        }
        Delivery::new(request, attempt, expires, Box::new(settlement))
    }
}

#[async_trait]
impl Subscription for FlawedSubscription {
    async fn recv(&mut self) -> SubscriptionEvent {
        if self.line.has(Flaw::FavoursTheFirst) && !self.first {
            std::future::pending().await
        }
        let event = tokio::select! {
            () = self.line.cut.cancelled(), if self.line.has(Flaw::GivesUp) => {
                return SubscriptionEvent::Closed(Error::not_executed(ErrorKind::ConnectionLost, "planted"));
            }
            event = self.sound.recv() => event,
        };
        match event {
            SubscriptionEvent::Deliveries(deliveries) => {
                let mut spoilt = Vec::with_capacity(deliveries.len());
                for delivery in deliveries {
                    spoilt.push(self.spoil(delivery).await);
                }
                SubscriptionEvent::Deliveries(spoilt)
            }
            SubscriptionEvent::Closed(_)
                if self.line.has(Flaw::HangsAfterClose) && self.line.is_closed() =>
            {
                std::future::pending().await
            }
            event => event,
        }
    }

    async fn stop(&mut self) {
        match self.line.world.flaw {
            Flaw::StopLosesRequests => {
                let pause = Duration::from_millis(50);
                while let Ok(SubscriptionEvent::Deliveries(taken)) =
                    tokio::time::timeout(pause, self.sound.recv()).await
                {
                    for delivery in taken {
                        let _ = delivery.reply(None).await;
                    }
                }
            }
            Flaw::StopCloses => self.line.sound.close().await,
            _ => {}
        }
        self.sound.stop().await;
    }
}

#[derive(Debug)]
struct FlawedSettlement {
    line: Arc<Line>,
    /// None if it was settled early.
    sound: Option<Delivery>,
    to: Option<ReplyAddress>,
    /// That of what was settled early.
    lease: FlaggedToken,
}

impl FlawedSettlement {
    /// Sends a reply, and settles nothing.
    async fn reply_only(&self, reply: Option<Reply>) -> Result<(), Error> {
        match (self.to.clone(), reply) {
            (Some(to), Some(reply)) => {
                let reply = Arc::new(reply);
                self.line.sound.send(Outbound::Reply { to, reply }).await
            }
            _ => Ok(()),
        }
    }

    fn leak(&self, sound: Delivery) -> Result<(), Error> {
        self.line.world.memory().leaked_deliveries.push(sound);
        Ok(())
    }

    /// The id of the request that has waited longest for a reply.
    fn oldest_unanswered(&self) -> Option<CorrelationId> {
        self.line.world.memory().unanswered.pop_front()
    }
}

impl Settlement for FlawedSettlement {
    fn settle(self: Box<Self>, settle: Settle, later: Later<'_>) -> Poll<Result<(), Unsettled>> {
        let settled = later.settled(&settle);
        // Flawed, but so is it over a network: whoever settles waits for nothing.
        tokio::spawn(async move { settled.tell(self.flawed(settle).await) });
        Poll::Pending
    }

    fn lease(&self) -> &FlaggedToken {
        self.sound.as_ref().map_or(&self.lease, Delivery::lease)
    }
}

impl FlawedSettlement {
    async fn flawed(mut self: Box<Self>, settle: Settle) -> Result<(), Error> {
        let Some(sound) = self.sound.take() else {
            return match settle {
                Settle::Reply(reply) | Settle::DeadLetter { reply, .. } => {
                    self.reply_only(reply.map(Arc::unwrap_or_clone)).await
                }
                Settle::Release => Ok(()),
            };
        };
        match settle {
            Settle::Reply(reply) => {
                let mut reply = reply.map(|reply| self.line.reply(&reply)).transpose()?;
                let is_fault = matches!(&reply, Some(reply) if reply.outcome != Outcome::Value);
                match (self.line.world.flaw, &mut reply) {
                    (Flaw::AnswersInOrder, Some(reply)) => {
                        if let Some(id) = self.oldest_unanswered() {
                            reply.id = id;
                        }
                    }
                    (Flaw::LeaksSlots, _) if is_fault => {
                        self.reply_only(reply).await?;
                        return self.leak(sound);
                    }
                    (Flaw::NeverSettles, _) => {
                        self.reply_only(reply).await?;
                        return self.leak(sound);
                    }
                    (Flaw::RepliesUnfenced, _) => {
                        self.reply_only(reply).await?;
                        return sound.reply(None).await;
                    }
                    _ => {}
                }
                sound.reply(reply).await
            }
            Settle::DeadLetter { reply, .. } if self.line.has(Flaw::BuriesNothing) => {
                sound.reply(reply.map(Arc::unwrap_or_clone)).await
            }
            Settle::DeadLetter { reason, reply } => {
                let reply = reply.map(|reply| self.line.reply(&reply)).transpose()?;
                sound.dead_letter(reason, reply).await
            }
            Settle::Release if self.line.has(Flaw::CountsReleases) => {
                drop(sound);
                Ok(())
            }
            Settle::Release => sound.release().await,
        }
    }
}

impl Drop for FlawedSettlement {
    fn drop(&mut self) {
        if let Some(sound) = self.sound.take()
            && self.line.has(Flaw::SettlesOnDrop)
        {
            // Or its connection might end first, which gives back what is not settled.
            let line = Arc::clone(&self.line);
            tokio::spawn(async move {
                let _ = sound.reply(None).await;
                drop(line);
            });
        }
    }
}

//! What a subscription takes from: a channel with two consumers, on one life of the connection.

use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use futures_util::{FutureExt, Stream, StreamExt};
use lapin::message::Delivery;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Consumer};
use std::pin::Pin;
use tokio_util::sync::CancellationToken;

use crate::acker::Acker;
use crate::config::AmqpConfig;
use crate::error::Failure;
use crate::link::{Link, Session, bounded};
use crate::naming::QueueNames;
use crate::topology;

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

/// Which queue a delivery came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    Main,
    Retry,
}

pub(crate) struct Intake {
    pub(crate) session: Arc<Session>,
    pub(crate) channel: Channel,
    pub(crate) acker: Acker,
    /// Cancelled when the channel is lost: what plain peers sent comes back as something new.
    pub(crate) lease: CancellationToken,
    main: Consumer,
    retry: Consumer,
}

impl Intake {
    /// Subscribes, on the present connection or the next one.
    ///
    /// # Errors
    /// Those that no other connection would mend; a lost one is waited for.
    pub(crate) async fn open(mut link: Link, plan: Arc<Plan>) -> Result<Self, Failure> {
        let mut attempt = 0;
        loop {
            let Some(session) = link.next_session().await else {
                return Err(Failure::Final(crate::error::closed()));
            };
            match Self::open_on(session, &plan).await {
                Ok(intake) => return Ok(intake),
                Err(failure) if failure.is_final() => return Err(failure),
                Err(failure) => {
                    tracing::debug!(%failure, queue = %plan.names.main, "not yet subscribed")
                }
            }
            tokio::time::sleep(crate::link::backoff(attempt)).await;
            attempt = attempt.saturating_add(1);
        }
    }

    async fn open_on(session: Arc<Session>, plan: &Plan) -> Result<Self, Failure> {
        let names = &plan.names;
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
        topology::own(&session, &plan.config, names, &plan.marker).await?;
        match Self::consume(&session, plan).await {
            Ok(intake) => Ok(intake),
            Err(failure) => {
                topology::disown(&session, names, &plan.marker).await;
                Err(failure)
            }
        }
    }

    async fn consume(session: &Arc<Session>, plan: &Plan) -> Result<Self, Failure> {
        let channel = session.channel().await?;
        let prefetch = u16::try_from(plan.prefetch).unwrap_or(u16::MAX);
        // A limit holds for the consumers that are started after it, for each of them.
        let main = consume(&channel, &plan.names.main, prefetch).await?;
        let retry = consume(&channel, &plan.names.retry, 1).await?;
        Ok(Self {
            session: Arc::clone(session),
            channel,
            acker: Acker::new(),
            lease: CancellationToken::new(),
            main,
            retry,
        })
    }

    /// The next delivery; `None` once a consumer has ended, for whatever reason.
    pub(crate) async fn next(&mut self) -> Option<(Origin, Delivery)> {
        poll_fn(|cx| {
            for (origin, consumer) in [
                (Origin::Retry, &mut self.retry),
                (Origin::Main, &mut self.main),
            ] {
                match Pin::new(consumer).poll_next(cx) {
                    Poll::Ready(Some(Ok(delivery))) => {
                        return Poll::Ready(Some((origin, delivery)));
                    }
                    Poll::Ready(Some(Err(_)) | None) => return Poll::Ready(None),
                    Poll::Pending => {}
                }
            }
            Poll::Pending
        })
        .await
    }

    /// Stops taking, and gives what the broker had sent until then.
    pub(crate) async fn cancel(&mut self) -> Vec<(Origin, Delivery)> {
        let mut rest = Vec::new();
        for (origin, consumer) in [
            (Origin::Retry, &mut self.retry),
            (Origin::Main, &mut self.main),
        ] {
            let options = BasicCancelOptions::default();
            let cancel = self.channel.basic_cancel(consumer.tag(), options);
            if let Err(failure) = bounded("basic.cancel", cancel).await {
                tracing::debug!(%failure, "the consumer was not cancelled");
            }
            // What was under way is here before the broker's answer.
            while let Some(Some(Ok(delivery))) = consumer.next().now_or_never() {
                rest.push((origin, delivery));
            }
        }
        rest
    }
}

impl fmt::Debug for Intake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Intake")
            .field("session", &self.session.number)
            .field("channel", &self.channel.id())
            .finish_non_exhaustive()
    }
}

async fn consume(
    channel: &Channel,
    queue: &ShortString,
    prefetch: u16,
) -> Result<Consumer, Failure> {
    let qos = channel.basic_qos(prefetch, BasicQosOptions::default());
    bounded("basic.qos", qos).await?;
    let consume = channel.basic_consume(
        queue.clone(),
        ShortString::default(),
        BasicConsumeOptions::default(),
        FieldTable::default(),
    );
    bounded("basic.consume", consume).await
}

//! One of the queues that a subscription takes from.

use std::sync::Arc;

use lapin::options::{BasicConsumeOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Consumer};
use tokio::time::sleep;

use crate::acker::Acker;
use crate::error::{Failure, NOT_FOUND};
use crate::intake::Plan;
use crate::link::{Session, backoff, bounded};
use crate::naming;
use crate::topology;

/// One queue, on a channel of its own: a broker that lost a queue's leader stops answering on the channel that asked for it.
pub(crate) struct Lane {
    pub(crate) channel: Channel,
    pub(crate) consumer: Consumer,
    pub(crate) acker: Acker,
    /// Something was acknowledged, and the broker not asked since.
    pub(crate) unasked: bool,
}

impl Lane {
    pub(crate) async fn open(
        session: &Session,
        queue: &ShortString,
        prefetch: u16,
    ) -> Result<Self, Failure> {
        let channel = session.channel().await?;
        let qos = channel.basic_qos(prefetch, BasicQosOptions::default());
        bounded("basic.qos", qos).await?;
        let consume = channel.basic_consume(
            queue.clone(),
            naming::CONSUMER.into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        let consumer = bounded("basic.consume", consume).await?;
        Ok(Self {
            channel,
            consumer,
            acker: Acker::new(),
            unasked: false,
        })
    }
}

/// Tries until the broker gives us the retry queue. If the connection is lost meanwhile, the main queue's consumer tells.
pub(crate) async fn attach(session: Arc<Session>, plan: Plan) -> Lane {
    let queue = &plan.names.retry;
    let mut attempt = 0;
    loop {
        let failure = match Lane::open(&session, queue, 1).await {
            Ok(lane) => return lane,
            // Removed since it was seen.
            Err(failure) if failure.is(NOT_FOUND) => {
                let ensured = topology::ensure(&session, &plan.config, &plan.names, queue).await;
                ensured.err().unwrap_or(failure)
            }
            Err(failure) => failure,
        };
        tracing::warn!(%failure, %queue, "not yet consumed");
        sleep(backoff(attempt)).await;
        attempt = attempt.saturating_add(1);
    }
}

/// Asks something that changes nothing: a limit for consumers to come, of which there are none.
pub(crate) async fn question(channel: Channel) -> Result<(), Failure> {
    let qos = channel.basic_qos(1, BasicQosOptions::default());
    bounded("basic.qos", qos).await
}

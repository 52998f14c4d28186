//! Asks the broker whether anybody serves a service, for callers that do not want to wait for one.

use antiphon_core::{Error, ErrorKind};
use lapin::Channel;
use lapin::options::QueueDeclareOptions;
use lapin::types::{FieldTable, ShortString};
use tokio::sync::Mutex;

use crate::error::{Failure, NOT_FOUND, closed};
use crate::link::{Link, bounded};

/// A spare channel for questions. A queue that is not there costs the channel its life; the next question opens another.
#[derive(Debug)]
pub(crate) struct Prober {
    link: Link,
    channel: Mutex<Option<Channel>>,
}

impl Prober {
    pub(crate) fn new(link: Link) -> Self {
        Self {
            link,
            channel: Mutex::new(None),
        }
    }

    /// Resolves once somebody is known to consume from the queue.
    ///
    /// # Errors
    /// `NoResponder` if nobody does; `Closed`. A lost connection is waited for.
    pub(crate) async fn expect_consumer(&self, queue: &ShortString) -> Result<(), Error> {
        loop {
            match self.consumers(queue).await {
                Ok(0) => return Err(no_responder(queue)),
                Ok(_) => return Ok(()),
                Err(failure) if failure.is(NOT_FOUND) => return Err(no_responder(queue)),
                Err(failure) if failure.is_final() => {
                    return Err(failure.into_error("asking who serves"));
                }
                // Lost: the next round waits for the next connection.
                Err(failure) => tracing::debug!(%failure, "asking who serves"),
            }
        }
    }

    /// How many consume from the queue.
    pub(crate) async fn consumers(&self, queue: &ShortString) -> Result<u32, Failure> {
        let mut spare = self.channel.lock().await;
        let channel = match spare.take().filter(|channel| channel.status().connected()) {
            Some(channel) => channel,
            None => {
                let Some(session) = self.link.clone().next_session().await else {
                    return Err(Failure::Final(closed()));
                };
                // A connection that is just going down answers at once that it is not connected.
                if !session.is_alive() {
                    tokio::time::sleep(crate::link::backoff(0)).await;
                }
                session.channel().await?
            }
        };
        let options = QueueDeclareOptions::durable().passive();
        let declare = channel.queue_declare(queue.clone(), options, FieldTable::default());
        let found = bounded("queue.declare", declare).await?;
        *spare = Some(channel);
        Ok(found.consumer_count())
    }
}

pub(crate) fn no_responder(queue: &ShortString) -> Error {
    Error::not_executed(ErrorKind::NoResponder, format!("nobody serves {queue}"))
}

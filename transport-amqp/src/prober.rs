//! Asks the broker whether anybody serves a service, for callers that do not want to wait for one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use antiphon_core::{Error, ErrorKind};
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared, WeakShared};
use lapin::Channel;
use lapin::options::QueueDeclareOptions;
use lapin::types::{FieldTable, ShortString};

use crate::error::{Failure, NOT_FOUND, closed};
use crate::link::{Link, bounded};

/// Asks the broker about queues, one after the other. Who asks for the same queue before the question is sent shares the answer.
#[derive(Debug)]
pub(crate) struct Prober {
    questions: Arc<Questions>,
}

#[derive(Debug)]
struct Questions {
    link: Link,
    /// A queue that is not there costs the channel its life; the next question opens another.
    channel: tokio::sync::Mutex<Option<Channel>>,
    /// Not sent yet. They live as long as somebody waits for them.
    waiting: Mutex<HashMap<ShortString, WeakShared<Question>>>,
}

type Question = BoxFuture<'static, Result<u32, Failure>>;

impl Prober {
    pub(crate) fn new(link: Link) -> Self {
        Self {
            questions: Arc::new(Questions {
                link,
                channel: tokio::sync::Mutex::default(),
                waiting: Mutex::default(),
            }),
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

    /// How many consume from the queue, at some moment from now on.
    pub(crate) async fn consumers(&self, queue: &ShortString) -> Result<u32, Failure> {
        self.question(queue).await
    }

    fn question(&self, queue: &ShortString) -> Shared<Question> {
        let questions = &self.questions;
        let mut waiting = questions.waiting();
        if let Some(asked) = waiting.get(queue).and_then(WeakShared::upgrade) {
            return asked;
        }
        let question = Arc::clone(questions).ask(queue.clone()).boxed().shared();
        if let Some(shared) = question.downgrade() {
            waiting.insert(queue.clone(), shared);
        }
        question
    }
}

impl Questions {
    async fn ask(self: Arc<Self>, queue: ShortString) -> Result<u32, Failure> {
        let mut spare = self.channel.lock().await;
        // Whoever comes later must not be told what was true before.
        self.forget(&queue);
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
        let declare = channel.queue_declare(queue, options, FieldTable::default());
        let found = bounded("queue.declare", declare).await?;
        *spare = Some(channel);
        Ok(found.consumer_count())
    }

    /// And all that nobody waits for any more.
    fn forget(&self, queue: &ShortString) {
        self.waiting()
            .retain(|other, question| other != queue && question.upgrade().is_some());
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<ShortString, WeakShared<Question>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) fn no_responder(queue: &ShortString) -> Error {
    Error::not_executed(ErrorKind::NoResponder, format!("nobody serves {queue}"))
}

//! The settling half of a delivery: it tells the subscription's task, and waits for its word.

use antiphon_core::transport::{Settle, Settlement};
use antiphon_core::{Error, ErrorKind};
use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// What the task of a subscription is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// Settle a delivery, and say when it is.
    Settle {
        key: u64,
        settle: Box<Settle>,
        done: oneshot::Sender<Result<(), Error>>,
    },
    /// A delivery was dropped unsettled.
    Dropped { key: u64 },
    /// Publish again what a delivery needs; its queue was not there, and is now.
    Again { key: u64 },
    /// The same, but there is no queue for it, and none can be made for now.
    PutOff { key: u64 },
    /// Say until when it is certain that nobody else has a delivery; none if somebody may.
    Ascertain {
        key: u64,
        until: oneshot::Sender<Option<Instant>>,
    },
    /// Take nothing more.
    Stop { done: oneshot::Sender<()> },
}

impl Command {
    /// True if it gives a delivery back that was not started.
    pub(crate) fn is_release(&self) -> bool {
        matches!(self, Self::Settle { settle, .. } if matches!(**settle, Settle::Release))
    }
}

#[derive(Debug)]
pub(crate) struct AmqpSettlement {
    key: u64,
    commands: Option<mpsc::UnboundedSender<Command>>,
}

impl AmqpSettlement {
    pub(crate) fn new(key: u64, commands: mpsc::UnboundedSender<Command>) -> Self {
        Self {
            key,
            commands: Some(commands),
        }
    }
}

#[async_trait]
impl Settlement for AmqpSettlement {
    async fn ascertain(&self) -> Option<Instant> {
        let (until, answer) = oneshot::channel();
        let key = self.key;
        let commands = self.commands.as_ref()?;
        commands.send(Command::Ascertain { key, until }).ok()?;
        answer.await.ok().flatten()
    }

    async fn settle(mut self: Box<Self>, settle: Settle) -> Result<(), Error> {
        let (done, settled) = oneshot::channel();
        // Taken, so that dropping this future no longer counts as dropping the delivery.
        if let Some(commands) = self.commands.take() {
            let (key, settle) = (self.key, Box::new(settle));
            let _ = commands.send(Command::Settle { key, settle, done });
        }
        settled.await.unwrap_or_else(|_| {
            let message = "the transport was closed before the broker's word";
            Err(Error::maybe_executed(ErrorKind::Closed, message))
        })
    }
}

impl Drop for AmqpSettlement {
    fn drop(&mut self) {
        if let Some(commands) = self.commands.take() {
            // If the task has gone, the delivery went back with its channel.
            let _ = commands.send(Command::Dropped { key: self.key });
        }
    }
}

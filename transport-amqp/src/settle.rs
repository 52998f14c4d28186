//! The settling half of a delivery: it tells the subscription's task, which tells how that ended.

use std::sync::Arc;
use std::task::Poll;

use antiphon_core::transport::{FlaggedToken, Later, Settle, Settled, Settlement, Unsettled};
use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// What the task of a subscription is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// Settle a delivery, and say when it is.
    Settle {
        key: u64,
        settle: Settle,
        settled: Settled,
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
        matches!(
            self,
            Self::Settle {
                settle: Settle::Release,
                ..
            }
        )
    }
}

#[derive(Debug)]
pub(crate) struct AmqpSettlement {
    key: u64,
    commands: Option<mpsc::UnboundedSender<Command>>,
    lease: Arc<FlaggedToken>,
}

impl AmqpSettlement {
    pub(crate) fn new(
        key: u64,
        commands: mpsc::UnboundedSender<Command>,
        lease: Arc<FlaggedToken>,
    ) -> Self {
        Self {
            key,
            commands: Some(commands),
            lease,
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

    fn settle(
        mut self: Box<Self>,
        settle: Settle,
        later: Later<'_>,
    ) -> Poll<Result<(), Unsettled>> {
        let settled = later.settled(&settle);
        // Taken, so that it is not given back as well. If the task has gone, this drops what was to be told, which tells just that.
        if let Some(commands) = self.commands.take() {
            let key = self.key;
            let _ = commands.send(Command::Settle {
                key,
                settle,
                settled,
            });
        }
        Poll::Pending
    }

    fn lease(&self) -> &FlaggedToken {
        &self.lease
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

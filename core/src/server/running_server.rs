//! A server that serves, until it is shut down.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::DropGuard;
use tokio_util::task::TaskTracker;

use super::{Counters, Engagement, Outbox, ServerStats};
use crate::client::Client;
use crate::error::{Error, ErrorKind};
use crate::flagged_token::CancelOnDrop;
use crate::name::Node;

/// How long what was told to end at once may take.
pub(super) const DROP_TIMEOUT: Duration = Duration::from_secs(1);

/// A server that serves. Dropping it stops it at once: its handlers are dropped, and their requests go to another server;
/// [`shutdown`](Self::shutdown) is the gentle way.
#[derive(Debug)]
pub struct RunningServer {
    pub(super) stop: DropGuard,
    pub(super) kill: CancelOnDrop,
    pub(super) loops: JoinSet<Option<Error>>,
    pub(super) handlers: TaskTracker,
    /// Of each service, what has left its handlers and waits for the broker's word.
    pub(super) settling: Vec<TaskTracker>,
    pub(super) counters: Arc<Counters>,
    pub(super) client: Client,
    pub(super) outbox: Arc<Outbox>,
    pub(super) node: Node,
    pub(super) engagement: watch::Receiver<Engagement>,
    pub(super) drain_timeout: Duration,
}

impl RunningServer {
    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> ServerStats {
        self.counters.stats()
    }

    /// Its name among those of its services.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Whether it is engaged with its broker, now and as it changes.
    #[must_use]
    pub fn engagement(&self) -> watch::Receiver<Engagement> {
        self.engagement.clone()
    }

    /// Waits until one of its services is no longer served without having been shut down, and says why.
    ///
    /// **Cancel safety**: dropping the future loses nothing.
    pub async fn over(&mut self) -> Error {
        loop {
            let message = match self.loops.join_next().await {
                Some(Ok(Some(error))) => return error,
                // Stopped, because of another one.
                Some(Ok(None)) => continue,
                Some(Err(panic)) => format!("the server's loop failed: {panic}"),
                None => "the server is over".to_owned(),
            };
            return Error::not_executed(ErrorKind::Closed, message);
        }
    }

    /// Drains: stops taking requests, gives back what was not started, waits for the handlers that run, with the calls that they
    /// make, sends the replies that were kept if the broker is there, and then closes the reply path. The transport stays open.
    ///
    /// **Cancel safety**: dropping the future stops the server at once.
    ///
    /// # Errors
    /// `DeadlineExceeded` if handlers still ran at the end of the drain timeout, or the broker had not accepted what they did; those
    /// that ran were dropped, and their requests go to another server.
    pub async fn shutdown(mut self) -> Result<(), Error> {
        self.stop.disarm().cancel();
        let drain = async {
            while self.loops.join_next().await.is_some() {}
            self.handlers.close();
            self.handlers.wait().await;
            for settling in &self.settling {
                settling.close();
                settling.wait().await;
            }
            self.outbox.flushed().await;
        };
        let drained = tokio::time::timeout(self.drain_timeout, drain).await;
        if drained.is_err() {
            drop(self.kill);
            self.loops.abort_all();
            self.handlers.close();
            // Those that block their thread cannot be dropped; nobody waits for them.
            let _ = tokio::time::timeout(DROP_TIMEOUT, self.handlers.wait()).await;
        }
        let closed = tokio::time::timeout(DROP_TIMEOUT, self.client.close()).await;
        // Whoever starts the next server on its store does so after this.
        let _ = tokio::time::timeout(DROP_TIMEOUT, self.outbox.close()).await;
        drained.and(closed).map_err(|_| {
            let message = format!(
                "handlers still ran, or were not settled, {:?} after the shutdown began",
                self.drain_timeout
            );
            Error::maybe_executed(ErrorKind::DeadlineExceeded, message)
        })
    }
}

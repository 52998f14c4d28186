//! Several servers in one process, as a pool.

use std::sync::Arc;

use futures_util::future::join_all;

use crate::error::Error;
use crate::server::{RunningServer, Server, ServerStats};
use crate::transport::Transport;

/// A pool of servers in this process, each with a prefetch of 1: the code of a fleet, on one machine.
#[derive(Debug)]
pub struct Workers(Vec<RunningServer>);

impl Workers {
    /// Starts so many servers on one connection. `build` adds the handlers to each, and is told its number, from 0.
    ///
    /// # Errors
    /// As of [`Server::start`]; if one fails, none serves.
    pub async fn start(
        transport: &Arc<dyn Transport>,
        workers: usize,
        mut build: impl FnMut(usize, Server) -> Server,
    ) -> Result<Self, Error> {
        let mut running = Vec::with_capacity(workers);
        for worker in 0..workers {
            let server = Server::new(Arc::clone(transport)).prefetch(1);
            running.push(build(worker, server).start().await?);
        }
        Ok(Self(running))
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// What each has done so far.
    #[must_use]
    pub fn stats(&self) -> Vec<ServerStats> {
        self.0.iter().map(RunningServer::stats).collect()
    }

    /// Drains all of them at once, as [`RunningServer::shutdown`].
    ///
    /// # Errors
    /// The first that occurs; all are shut down all the same.
    pub async fn shutdown(self) -> Result<(), Error> {
        let ended = join_all(self.0.into_iter().map(RunningServer::shutdown)).await;
        ended.into_iter().collect()
    }
}

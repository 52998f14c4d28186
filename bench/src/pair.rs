//! The two halves of a contender, each in a process of its own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::Failure;
use crate::args::Role;
use crate::brokers::Brokers;
use crate::contenders::{Contender, Group};
use crate::cpu::Watched;
use crate::load::{Arrivals, Figures, Point};
use crate::process::Half;

/// A client, and the server that it calls; in memory both are one process.
#[derive(Debug)]
pub(crate) struct Pair {
    role: Role,
    client: Half,
    server: Option<Half>,
    watched: Watched,
}

impl Pair {
    /// Starts both.
    pub(crate) async fn start(role: Role, brokers: &Brokers) -> Result<Self, Failure> {
        let server = match role.contender.group() {
            Group::Memory => None,
            _ => Some(Half::start("serve", &role).await?),
        };
        let client = Half::start("call", &role).await?;
        let ends = server.iter().chain([&client]).map(Half::id).collect();
        let broker = brokers.processes(role.contender.needs());
        Ok(Self {
            role,
            client,
            server,
            watched: Watched { ends, broker },
        })
    }

    pub(crate) fn contender(&self) -> Contender {
        self.role.contender
    }

    /// The client's process, and the server's if it has one.
    pub(crate) fn processes(&self) -> (u32, Option<u32>) {
        (self.client.id(), self.server.as_ref().map(Half::id))
    }

    /// The processes whose time is counted.
    pub(crate) fn watched(&self) -> &Watched {
        &self.watched
    }

    /// Measures a point.
    pub(crate) async fn measure(
        &mut self,
        concurrency: usize,
        size: usize,
        seconds: f64,
        arrivals: Arrivals,
    ) -> Result<Figures, Failure> {
        let length = Duration::try_from_secs_f64(seconds)?;
        let point = Point {
            concurrency,
            size,
            warm_up: length / 3,
            length,
            arrivals,
            watched: self.watched.clone(),
        };
        self.client.measure(&point).await
    }

    pub(crate) async fn stop(self) {
        self.client.stop().await;
        if let Some(server) = self.server {
            server.stop().await;
        }
    }
}

/// A service's name that nobody else uses.
pub(crate) fn unique_service(contender: Contender) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("bench-{contender}-{}-{number}", std::process::id())
}

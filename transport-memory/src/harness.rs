//! The memory transport under the conformance suite.

use std::sync::Arc;
use std::time::Duration;

use antiphon_conformance::{Bounds, Connected, Harness, HookError, Link};
use antiphon_core::{Error, ReplyAddress, ServiceName};
use async_trait::async_trait;
use tokio::time::sleep;

use crate::broker::MemoryBroker;
use crate::config::MemoryConfig;
use crate::connection::Connection;

/// How long a connection that was cut is away.
const OUTAGE: Duration = Duration::from_millis(20);

/// A private memory broker for the conformance suite, with times that a test can wait for.
#[derive(Debug)]
pub struct MemoryHarness {
    broker: MemoryBroker,
}

impl MemoryHarness {
    /// A harness with a broker of its own.
    #[must_use]
    pub fn new() -> Self {
        let mut config = MemoryConfig::default();
        config.keep_expired = Duration::from_millis(500);
        Self {
            broker: MemoryBroker::open(config),
        }
    }
}

impl Default for MemoryHarness {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Harness for MemoryHarness {
    fn name(&self) -> String {
        "memory".to_owned()
    }

    async fn connect(&self) -> Result<Connected, Error> {
        let transport = self.broker.connect();
        // Not the transport itself: dropping that must end the connection, whoever holds its link.
        let link = MemoryLink(Arc::clone(transport.connection()));
        Ok(Connected {
            transport: Arc::new(transport),
            link: Arc::new(link),
        })
    }

    fn bounds(&self) -> Bounds {
        Bounds {
            take_over: Duration::from_millis(100),
            redelivery: Duration::from_millis(500),
            leak: Duration::from_secs(2),
        }
    }

    async fn restart_broker(&self) -> Result<(), HookError> {
        self.broker.cut_all();
        self.broker.lose_everything();
        sleep(OUTAGE).await;
        self.broker.restore_all();
        Ok(())
    }

    async fn leftovers(
        &self,
        service: &ServiceName,
        inboxes: &[ReplyAddress],
    ) -> Result<Vec<String>, HookError> {
        let open = inboxes
            .iter()
            .filter(|address| self.broker.hub().has_inbox(address));
        let mut left: Vec<String> = open
            .map(|address| format!("inbox {}", address.as_str()))
            .collect();
        if let Some(stats) = self.broker.stats().services.get(service) {
            if stats.queued > 0 {
                left.push(format!("{} requests of {service} that wait", stats.queued));
            }
            if stats.held > 0 {
                left.push(format!("{} requests of {service} in hand", stats.held));
            }
        }
        Ok(left)
    }

    async fn dead_letters(&self, service: &ServiceName) -> Result<u64, HookError> {
        Ok(self.broker.dead_letters(service).len() as u64)
    }
}

#[derive(Debug)]
struct MemoryLink(Arc<Connection>);

#[async_trait]
impl Link for MemoryLink {
    async fn cut(&self) -> Result<(), HookError> {
        self.0.cut();
        sleep(OUTAGE).await;
        self.0.restore();
        Ok(())
    }

    async fn sever(&self) -> Result<(), HookError> {
        self.0.cut();
        Ok(())
    }

    async fn restore(&self) -> Result<(), HookError> {
        self.0.restore();
        Ok(())
    }
}

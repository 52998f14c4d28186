//! The RabbitMQ transport under the conformance suite.

use std::sync::Arc;
use std::time::Duration;

use antiphon_conformance::brokers::{Broker, Certificates, Stop};
use antiphon_conformance::proxy::{Proxy, replace_authority};
use antiphon_conformance::{Bounds, Connected, Harness, HookError, Link};
use antiphon_core::{Error, ErrorKind, ReplyAddress, ServiceName};
use async_trait::async_trait;
use lapin::Queue;
use lapin::types::ShortString;
use tokio_util::sync::CancellationToken;

use crate::config::{AmqpConfig, QueueType};
use crate::dial::Dialler;
use crate::error::{NOT_FOUND, RESOURCE_LOCKED};
use crate::naming::QueueNames;
use crate::topology;
use crate::transport::AmqpTransport;

/// A RabbitMQ broker for the conformance suite. Every connection goes through a proxy of its own, which can cut it.
#[derive(Debug)]
pub struct AmqpHarness {
    broker: Arc<Broker>,
    queue_type: QueueType,
    tls: Option<Certificates>,
}

impl AmqpHarness {
    /// A harness on this broker, whose service queues are declared as `queue_type`.
    #[must_use]
    pub fn new(broker: Arc<Broker>, queue_type: QueueType) -> Self {
        Self {
            broker,
            queue_type,
            tls: None,
        }
    }

    /// The same over TLS, to a broker that was started with these.
    #[must_use]
    pub fn over_tls(mut self, certificates: Certificates) -> Self {
        self.tls = Some(certificates);
        self
    }

    /// Where to connect, and its host and port.
    fn address(&self) -> Option<(String, String)> {
        match &self.tls {
            Some(_) => self.broker.tls_url().zip(self.broker.tls_authority()),
            None => Some((self.broker.url().to_owned(), self.broker.authority())),
        }
    }

    fn config(&self, url: &str) -> Result<AmqpConfig, Error> {
        let mut config = AmqpConfig::from_url(url)?;
        config.queue_type = self.queue_type;
        config.heartbeat = Duration::from_secs(2);
        Ok(config)
    }

    /// What the broker says of some queues: `None` of one that is not there, and nothing of one that is somebody's own.
    async fn look(&self, queues: Vec<ShortString>) -> Result<Vec<Option<Found>>, HookError> {
        let config = self.config(self.broker.url()).map_err(HookError::failed)?;
        let closed = CancellationToken::new();
        let _closing = closed.clone().drop_guard();
        let dialler = Dialler::new(&config).await.map_err(HookError::failed)?;
        let (link, keep) = crate::link::Link::connect(&config, &dialler, "conformance", closed)
            .await
            .map_err(HookError::failed)?;
        tokio::spawn(keep);
        let Some(session) = link.session() else {
            return Err(HookError::failed("the connection was lost at once"));
        };
        let mut found = Vec::new();
        for queue in queues {
            found.push(match topology::look(&session, &queue).await {
                Ok(queue) => Some(Found::Open(queue)),
                Err(failure) if failure.is(NOT_FOUND) => None,
                Err(failure) if failure.is(RESOURCE_LOCKED) => Some(Found::Locked),
                Err(failure) => return Err(HookError::failed(failure)),
            });
        }
        Ok(found)
    }
}

enum Found {
    Open(Queue),
    Locked,
}

impl Found {
    fn messages(&self) -> u32 {
        match self {
            Self::Open(queue) => queue.message_count(),
            Self::Locked => 0,
        }
    }
}

#[async_trait]
impl Harness for AmqpHarness {
    fn name(&self) -> String {
        format!(
            "{}, {} queues",
            self.broker.name(),
            self.queue_type.as_str()
        )
    }

    async fn connect(&self) -> Result<Connected, Error> {
        let broken = |error: std::io::Error| {
            Error::not_executed(ErrorKind::Connect, format!("no proxy: {error}"))
        };
        let (url, authority) = self
            .address()
            .ok_or_else(|| Error::not_executed(ErrorKind::Unsupported, "the broker has no TLS"))?;
        let proxy = Proxy::start(authority).await.map_err(broken)?;
        let mut config = self.config(&replace_authority(&url, proxy.addr()))?;
        config.ca_file = self.tls.as_ref().map(Certificates::ca_file);
        let transport = AmqpTransport::connect(config).await?;
        Ok(Connected {
            transport: Arc::new(transport),
            link: Arc::new(ProxyLink(proxy)),
        })
    }

    fn bounds(&self) -> Bounds {
        Bounds::default()
    }

    async fn restart_broker(&self) -> Result<(), HookError> {
        let restarted = self.broker.restart(Stop::Kill).await;
        restarted.map_err(|error| match error.kind() {
            std::io::ErrorKind::Unsupported => HookError::unsupported(error.to_string()),
            _ => HookError::failed(error),
        })
    }

    async fn leftovers(
        &self,
        service: &ServiceName,
        inboxes: &[ReplyAddress],
    ) -> Result<Vec<String>, HookError> {
        let names = QueueNames::new(service).map_err(HookError::failed)?;
        let mut queues = vec![names.main, names.retry, names.owner];
        let own = queues.len() - 1;
        queues.extend(inboxes.iter().map(|inbox| inbox.as_str().into()));
        let found = self.look(queues.clone()).await?;
        let mut left = Vec::new();
        for (index, (queue, found)) in queues.iter().zip(found).enumerate() {
            match found {
                Some(found) if index < own && found.messages() == 0 => {}
                Some(found) if index < own => {
                    left.push(format!("{} requests in {queue}", found.messages()));
                }
                Some(_) => left.push(format!("the queue {queue}")),
                None => {}
            }
        }
        Ok(left)
    }

    async fn dead_letters(&self, service: &ServiceName) -> Result<u64, HookError> {
        let names = QueueNames::new(service).map_err(HookError::failed)?;
        let found = self.look(vec![names.dead]).await?;
        Ok(found
            .into_iter()
            .flatten()
            .map(|found| u64::from(found.messages()))
            .sum())
    }
}

#[derive(Debug)]
struct ProxyLink(Proxy);

#[async_trait]
impl Link for ProxyLink {
    async fn cut(&self) -> Result<(), HookError> {
        self.0.cut().await;
        Ok(())
    }

    async fn sever(&self) -> Result<(), HookError> {
        self.0.refuse().await;
        Ok(())
    }

    async fn restore(&self) -> Result<(), HookError> {
        self.0.restore().await.map_err(HookError::failed)
    }
}

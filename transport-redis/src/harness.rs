//! The Redis transport under the conformance suite.

use std::sync::Arc;
use std::time::Duration;

use antiphon_conformance::brokers::{Broker, Certificates, Stop};
use antiphon_conformance::proxy::{Proxy, replace_authority};
use antiphon_conformance::{Bounds, Connected, Harness, HookError};
use antiphon_core::{Error, ErrorKind, ReplyAddress, ServiceName};
use async_trait::async_trait;
use redis::aio::MultiplexedConnection;
use redis::{AsyncCommands, RedisResult};

use crate::config::RedisConfig;
use crate::naming::{InboxKeys, ServiceKeys};
use crate::transport::RedisTransport;

/// Shorter than in use, so that the suite need not wait 10 s for each server that it kills.
const LEASE: Duration = Duration::from_secs(2);

/// Shorter than in use, so that the suite need not wait 60 s for what expires.
const INBOX_TTL: Duration = Duration::from_secs(4);

/// A Redis or Valkey server for the conformance suite. Every connection goes through a proxy of its own, which can cut it.
#[derive(Debug)]
pub struct RedisHarness {
    broker: Arc<Broker>,
    tls: Option<Certificates>,
}

impl RedisHarness {
    /// A harness on this broker, with a lease of 2 s and inboxes that live for 4 s.
    #[must_use]
    pub fn new(broker: Arc<Broker>) -> Self {
        Self { broker, tls: None }
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

    async fn admin(&self) -> Result<MultiplexedConnection, HookError> {
        let client = redis::Client::open(self.broker.url()).map_err(HookError::failed)?;
        let connection = client.get_multiplexed_async_connection().await;
        connection.map_err(HookError::failed)
    }
}

#[async_trait]
impl Harness for RedisHarness {
    fn name(&self) -> String {
        self.broker.name()
    }

    async fn connect(&self) -> Result<Connected, Error> {
        let broken = |error: std::io::Error| {
            Error::not_executed(ErrorKind::Connect, format!("no proxy: {error}"))
        };
        let (url, authority) = self
            .address()
            .ok_or_else(|| Error::not_executed(ErrorKind::Unsupported, "the broker has no TLS"))?;
        let proxy = Proxy::start(authority).await.map_err(broken)?;
        let mut config = RedisConfig::from_url(&replace_authority(&url, proxy.addr()))?;
        config.ca_file = self.tls.as_ref().map(Certificates::ca_file);
        config.lease = LEASE;
        config.inbox_ttl = INBOX_TTL;
        Ok(Connected {
            transport: Arc::new(RedisTransport::connect(config).await?),
            link: Arc::new(proxy),
        })
    }

    fn bounds(&self) -> Bounds {
        Bounds {
            take_over: LEASE + Duration::from_secs(1),
            redelivery: LEASE + Duration::from_secs(1),
            // What is left lives for the rest of its call, and then as long as an inbox.
            leak: INBOX_TTL + Duration::from_secs(6),
        }
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
        let mut admin = self.admin().await?;
        let keys = ServiceKeys::new(service);
        let mut left = keys_like(&mut admin, &format!("{{{service}}}:*")).await?;
        // The queue itself, and what says who serves it, belong to the service.
        left.retain(|key| {
            ![
                &keys.bell,
                &keys.sessions,
                &keys.live,
                &keys.owner,
                &keys.dead,
                &keys.audience,
            ]
            .contains(&key)
        });
        for inbox in inboxes {
            let Some(inbox) = InboxKeys::parse(inbox) else {
                return Err(HookError::failed("an inbox that is not ours"));
            };
            left.extend(keys_like(&mut admin, &format!("{}*", inbox.list())).await?);
        }
        Ok(left)
    }

    async fn dead_letters(&self, service: &ServiceName) -> Result<u64, HookError> {
        let dead: RedisResult<u64> = self
            .admin()
            .await?
            .llen(ServiceKeys::new(service).dead)
            .await;
        dead.map_err(HookError::failed)
    }
}

async fn keys_like(
    admin: &mut MultiplexedConnection,
    pattern: &str,
) -> Result<Vec<String>, HookError> {
    let mut keys = Vec::new();
    let mut found = admin.scan_match(pattern).await.map_err(HookError::failed)?;
    while let Some(key) = found.next_item().await {
        keys.push(key.map_err(HookError::failed)?);
    }
    Ok(keys)
}

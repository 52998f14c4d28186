//! The conformance suite on Redis and on Valkey, and some of it over TLS.

use std::process::ExitCode;
use std::sync::Arc;

use antiphon_conformance::brokers::{self, BrokerKind, BrokerOptions};
use antiphon_conformance::{Harness, Missing, Suite};
use antiphon_redis::RedisHarness;

fn main() -> ExitCode {
    let suite = Suite::new()
        .harness("redis", || start(BrokerKind::Redis))
        .harness("valkey", || start(BrokerKind::Valkey));
    #[cfg(feature = "rustls")]
    let suite = suite.harness_for("rediss", OVER_TLS, start_with_tls);
    suite.run()
}

/// Those in which connections are made, lost and filled.
#[cfg(feature = "rustls")]
const OVER_TLS: &[&str] = &["round_trip/", "payload/", "close/", "reconnect/"];

async fn start(kind: BrokerKind) -> Result<Arc<dyn Harness>, Missing> {
    let broker = brokers::start(BrokerOptions::new(kind).durable()).await?;
    Ok(Arc::new(RedisHarness::new(Arc::new(broker))))
}

#[cfg(feature = "rustls")]
async fn start_with_tls() -> Result<Arc<dyn Harness>, Missing> {
    let certificates = brokers::Certificates::create().map_err(Missing::new)?;
    let options = BrokerOptions::new(BrokerKind::Redis)
        .durable()
        .tls(&certificates);
    let broker = Arc::new(brokers::start(options).await?);
    Ok(Arc::new(RedisHarness::new(broker).over_tls(certificates)))
}

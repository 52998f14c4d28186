//! The conformance suite on Redis and on Valkey.

use std::process::ExitCode;
use std::sync::Arc;

use antiphon_conformance::brokers::{self, BrokerKind, BrokerOptions};
use antiphon_conformance::{Harness, Missing, Suite};
use antiphon_redis::RedisHarness;

fn main() -> ExitCode {
    Suite::new()
        .harness("redis", || start(BrokerKind::Redis))
        .harness("valkey", || start(BrokerKind::Valkey))
        .run()
}

async fn start(kind: BrokerKind) -> Result<Arc<dyn Harness>, Missing> {
    let broker = brokers::start(BrokerOptions::new(kind).durable()).await?;
    Ok(Arc::new(RedisHarness::new(Arc::new(broker))))
}

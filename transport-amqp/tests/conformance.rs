//! The conformance suite on RabbitMQ, with quorum and with classic queues, and some of it over TLS.

use std::process::ExitCode;
use std::sync::Arc;

use antiphon_amqp::{AmqpHarness, QueueType};
use antiphon_conformance::brokers::{self, Broker, BrokerKind, BrokerOptions};
use antiphon_conformance::{Harness, Missing, Suite};
use tokio::sync::OnceCell;

type Shared = Arc<OnceCell<Arc<Broker>>>;

fn main() -> ExitCode {
    let broker = Shared::default();
    let (quorum, classic) = (Arc::clone(&broker), broker);
    let suite = Suite::new()
        .harness("quorum", || start(quorum, QueueType::Quorum))
        .harness("classic", || start(classic, QueueType::Classic));
    #[cfg(feature = "rustls")]
    let suite = suite.harness_for("amqps", OVER_TLS, start_with_tls);
    suite.run()
}

/// Those in which connections are made, lost and filled.
#[cfg(feature = "rustls")]
const OVER_TLS: &[&str] = &["round_trip/", "payload/", "close/", "reconnect/"];

async fn start(broker: Shared, queue_type: QueueType) -> Result<Arc<dyn Harness>, Missing> {
    let start = || async {
        let options = BrokerOptions::new(BrokerKind::RabbitMq).durable();
        brokers::start(options).await.map(Arc::new)
    };
    let broker = broker.get_or_try_init(start).await?;
    Ok(Arc::new(AmqpHarness::new(Arc::clone(broker), queue_type)))
}

#[cfg(feature = "rustls")]
async fn start_with_tls() -> Result<Arc<dyn Harness>, Missing> {
    let certificates = brokers::Certificates::create().map_err(Missing::new)?;
    let options = BrokerOptions::new(BrokerKind::RabbitMq).tls(&certificates);
    let broker = Arc::new(brokers::start(options).await?);
    let harness = AmqpHarness::new(broker, QueueType::Classic);
    Ok(Arc::new(harness.over_tls(certificates)))
}

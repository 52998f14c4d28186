//! The conformance suite on RabbitMQ, with quorum and with classic queues.

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
    Suite::new()
        .harness("quorum", || start(quorum, QueueType::Quorum))
        .harness("classic", || start(classic, QueueType::Classic))
        .run()
}

async fn start(broker: Shared, queue_type: QueueType) -> Result<Arc<dyn Harness>, Missing> {
    let start = || async {
        let options = BrokerOptions::new(BrokerKind::RabbitMq).durable();
        brokers::start(options).await.map(Arc::new)
    };
    let broker = broker.get_or_try_init(start).await?;
    Ok(Arc::new(AmqpHarness::new(Arc::clone(broker), queue_type)))
}

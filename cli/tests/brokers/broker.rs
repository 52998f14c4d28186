//! The brokers of this test process, each started when the first case needs it.

use std::sync::OnceLock;

use antiphon_conformance::brokers::{self, Broker, BrokerKind, BrokerOptions, Unavailable};
use tokio::runtime::Runtime;

/// A broker, or why there is none, and the runtime that its keeper needs.
pub(crate) struct Provided {
    broker: Result<Broker, Unavailable>,
    _runtime: Runtime,
}

impl Provided {
    #[track_caller]
    pub(crate) fn redis(case: fn(&str)) {
        static REDIS: OnceLock<Provided> = OnceLock::new();
        REDIS
            .get_or_init(|| Self::start(BrokerKind::Redis))
            .run(case);
    }

    #[track_caller]
    pub(crate) fn amqp(case: fn(&str)) {
        static RABBITMQ: OnceLock<Provided> = OnceLock::new();
        RABBITMQ
            .get_or_init(|| Self::start(BrokerKind::RabbitMq))
            .run(case);
    }

    fn start(kind: BrokerKind) -> Self {
        let runtime = Runtime::new().unwrap();
        let broker = runtime.block_on(brokers::start(BrokerOptions::new(kind)));
        Self {
            broker,
            _runtime: runtime,
        }
    }

    #[track_caller]
    fn run(&self, case: fn(&str)) {
        match &self.broker {
            Ok(broker) => case(broker.url()),
            Err(missing) if missing.is_failure() => panic!("{missing}"),
            Err(missing) => println!("not run: {missing}"),
        }
    }
}

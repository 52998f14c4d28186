//! What the cases share.

use std::sync::Arc;
use std::time::Duration;

use antiphon_amqp::{AmqpConfig, AmqpTransport};
use antiphon_conformance::brokers::{Broker, Certificates};
use antiphon_core::{Client, ClientConfig, Fault, RunningServer, Server, Transport};
use bytes::Bytes;
use lapin::message::Delivery;
use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer, Queue};
use uuid::Uuid;

use crate::NotRun;

pub(crate) const PROMPT: Duration = Duration::from_secs(5);

/// What the broker takes by itself, in bytes.
pub(crate) const MESSAGE_MAX: u32 = 134_217_728;

#[derive(Clone)]
pub(crate) struct Bench {
    pub(crate) broker: Arc<Broker>,
    /// Of its TLS, if it has any.
    #[cfg_attr(not(feature = "rustls"), expect(dead_code, reason = "no TLS"))]
    pub(crate) certificates: Option<Certificates>,
}

impl Bench {
    pub(crate) fn new(broker: Arc<Broker>, certificates: Option<Certificates>) -> Self {
        Self {
            broker,
            certificates,
        }
    }

    pub(crate) fn config(&self) -> AmqpConfig {
        AmqpConfig::from_url(self.broker.url()).expect("the broker's URL")
    }

    pub(crate) async fn connect(&self) -> Arc<AmqpTransport> {
        let transport = AmqpTransport::connect(self.config()).await;
        Arc::new(transport.expect("connect"))
    }

    pub(crate) async fn client(&self) -> Client {
        let transport = self.connect().await;
        Client::open(transport, ClientConfig::default())
            .await
            .expect("a client")
    }

    /// A server that answers as the tutorial's: the number of Fibonacci.
    pub(crate) async fn fib(&self, service: &str) -> RunningServer {
        let server = Server::new(self.connect().await).handle_raw(service, fib);
        server.start().await.expect("a server")
    }

    /// A connection of a plain AMQP client, which knows nothing of us.
    pub(crate) async fn plain(&self) -> Plain {
        let url = self.broker.url();
        let connection = Connection::connect(url, ConnectionProperties::default()).await;
        let connection = connection.expect("a plain connection");
        let channel = connection.create_channel().await.expect("a channel");
        let confirms = channel.confirm_select(ConfirmSelectOptions::default());
        confirms.await.expect("confirms");
        Plain {
            connection,
            channel,
        }
    }

    /// Has the broker do something by `rabbitmqctl`, if it is ours to command.
    pub(crate) async fn ctl(&self, arguments: &[&str]) -> Result<String, NotRun> {
        match self.broker.ctl(arguments).await {
            Ok(printed) => Ok(printed),
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {
                Err(NotRun(error.to_string()))
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Has the broker refuse messages of more bytes.
    pub(crate) async fn limit_messages(&self, bytes: u32) -> Result<(), NotRun> {
        // Newer brokers read the setting once, and keep it elsewhere.
        let set = format!(
            "application:set_env(rabbit, max_message_size, {bytes}), \
             persistent_term:put(max_message_size, {bytes})."
        );
        self.ctl(&["eval", &set]).await.map(drop)
    }

    /// Waits until the queue has as many messages.
    pub(crate) async fn messages(&self, queue: &str, count: u32) {
        let plain = self.plain().await;
        eventually(&format!("{queue} has {count} messages"), async || {
            matches!(plain.look(queue).await, Some(found) if found.message_count() == count)
        })
        .await;
    }
}

pub(crate) struct Plain {
    pub(crate) connection: Connection,
    pub(crate) channel: Channel,
}

impl Plain {
    pub(crate) async fn publish(&self, queue: &str, properties: BasicProperties, body: &[u8]) {
        let options = BasicPublishOptions::default();
        let sent = self
            .channel
            .basic_publish("".into(), queue.into(), options, body, properties);
        let confirm = sent.await.expect("publish").await.expect("confirm");
        assert!(confirm.is_ack());
    }

    pub(crate) async fn consume(&self, queue: &str, no_ack: bool) -> Consumer {
        let options = BasicConsumeOptions {
            no_ack,
            ..BasicConsumeOptions::default()
        };
        let consumer =
            self.channel
                .basic_consume(queue.into(), "".into(), options, FieldTable::default());
        consumer.await.expect("consume")
    }

    /// What the broker says of a queue, if it is there.
    pub(crate) async fn look(&self, queue: &str) -> Option<Queue> {
        let spare = self.connection.create_channel().await.expect("a channel");
        let options = QueueDeclareOptions::durable().passive();
        let declare = spare.queue_declare(queue.into(), options, FieldTable::default());
        declare.await.ok()
    }
}

async fn fib(body: Bytes) -> Result<String, Fault> {
    let text = std::str::from_utf8(&body).unwrap_or_default();
    let n: u32 = text
        .parse()
        .map_err(|_| Fault::new(antiphon_core::Code::InvalidArgument, "not a number"))?;
    let (mut a, mut b) = (0_u64, 1);
    for _ in 0..n {
        (a, b) = (b, a + b);
    }
    Ok(a.to_string())
}

pub(crate) fn fresh(name: &str) -> String {
    format!("{name}-{}", Uuid::new_v4().simple())
}

pub(crate) async fn next(consumer: &mut Consumer) -> Delivery {
    let next = futures_util::StreamExt::next(consumer);
    let delivery = tokio::time::timeout(PROMPT, next).await;
    delivery
        .expect("a message in time")
        .expect("a consumer that goes on")
        .expect("a delivery")
}

pub(crate) async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let end = tokio::time::Instant::now() + PROMPT;
    while !is_so().await {
        assert!(
            tokio::time::Instant::now() < end,
            "within {PROMPT:?}: {what}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) async fn close(transport: &dyn Transport) {
    transport.close().await;
}

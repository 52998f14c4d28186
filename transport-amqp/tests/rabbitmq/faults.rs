//! What goes wrong on the way to RabbitMQ.

use std::sync::Arc;
use std::time::Duration;

use antiphon_amqp::{AmqpConfig, AmqpTransport};
use antiphon_conformance::proxy::Proxy;
use antiphon_core::transport::SubscribeOptions;
use antiphon_core::{ConnectionState, ErrorKind, Executed, Fault, Server, ServiceName, Transport};
use bytes::Bytes;
use tokio::time::Instant;

use crate::bench::{Bench, PROMPT, fresh};

async fn echo(body: Bytes) -> Result<Bytes, Fault> {
    Ok(body)
}

pub(crate) async fn wrong_credentials_are_refused_at_once(bench: Bench) {
    let url = format!("amqp://guest:s3cret@{}", bench.broker.authority());
    let started = Instant::now();
    let error = AmqpTransport::connect(AmqpConfig::from_url(&url).unwrap())
        .await
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.executed()),
        (ErrorKind::Connect, Executed::No)
    );
    assert!(error.message().contains("403"), "{error}");
    assert!(!format!("{error:?}").contains("s3cret"), "{error:?}");
    assert!(started.elapsed() < PROMPT);
}

pub(crate) async fn an_address_that_does_not_answer_is_given_up(_: Bench) {
    // It takes connections, and never says a word.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("amqp://{}", silent.local_addr().unwrap());
    let mut config = AmqpConfig::from_url(&url).unwrap();
    config.connect_timeout = Duration::from_millis(300);
    let started = Instant::now();
    let error = AmqpTransport::connect(config).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.executed()),
        (ErrorKind::Connect, Executed::No)
    );
    assert!(started.elapsed() < Duration::from_secs(2));
}

pub(crate) async fn an_owner_takes_its_service_back_from_its_ghost(bench: Bench) {
    let service = ServiceName::new(&fresh("ghost")).unwrap();
    let proxy = Proxy::start(bench.broker.authority()).await.unwrap();
    let url = bench
        .broker
        .url()
        .replace(&bench.broker.authority(), &proxy.addr().to_string());
    let mut config = AmqpConfig::from_url(&url).unwrap();
    config.heartbeat = Duration::from_secs(1);
    let transport: Arc<dyn Transport> = Arc::new(AmqpTransport::connect(config).await.unwrap());
    let server = Server::new(Arc::clone(&transport))
        .exclusive()
        .handle_raw(&service, echo);
    let mut running = server.start().await.unwrap();
    // The server gives its connection up before the broker does, which holds the owner's queue for its ghost.
    proxy.blackhole();
    let mut state = transport.state();
    let lost = state.wait_for(|state| matches!(state, ConnectionState::Disconnected { .. }));
    tokio::time::timeout(PROMPT, lost).await.unwrap().unwrap();
    proxy.restore().await.unwrap();
    let client = bench.client().await;
    let call = client.call_raw(&service, "body").timeout(2 * PROMPT);
    assert_eq!(&call.await.unwrap().body[..], b"body");
    let over = tokio::time::timeout(Duration::from_millis(300), running.over());
    assert!(over.await.is_err(), "it is still the owner");
    let other = bench.connect().await;
    let second = other
        .subscribe(&service, SubscribeOptions::exclusive(1))
        .await;
    assert_eq!(second.unwrap_err().kind(), ErrorKind::AlreadyOwned);
}

//! What goes wrong on the way to RabbitMQ.

use std::sync::Arc;
use std::time::Duration;

use antiphon_amqp::{AmqpConfig, AmqpTransport};
use antiphon_conformance::proxy::Proxy;
use antiphon_core::transport::SubscribeOptions;
use antiphon_core::{ConnectionState, ErrorKind, Executed, Fault, Server, ServiceName, Transport};
use bytes::Bytes;
use tokio::io::AsyncReadExt;
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
    // Neither the socket nor the thread that reads it is kept: the listener sees the end of each.
    let over = async {
        for _ in 0..2 {
            let (mut connection, _) = silent.accept().await.unwrap();
            let mut sent = Vec::new();
            connection.read_to_end(&mut sent).await.unwrap();
            assert!(sent.starts_with(b"AMQP"), "{sent:?}");
        }
    };
    let over = tokio::time::timeout(PROMPT, over).await;
    over.expect("the connections are closed");
}

/// Its heartbeats would tell after two minutes. Whoever asks and gets no answer tells all others.
pub(crate) async fn everybody_leaves_a_connection_that_does_not_answer(bench: Bench) {
    let service = fresh("half-open");
    let proxy = Proxy::start(bench.broker.authority()).await.unwrap();
    let url = bench
        .broker
        .url()
        .replace(&bench.broker.authority(), &proxy.addr().to_string());
    let mut config = AmqpConfig::from_url(&url).unwrap();
    config.heartbeat = Duration::from_secs(60);
    let transport: Arc<dyn Transport> = Arc::new(AmqpTransport::connect(config).await.unwrap());
    let server = Server::new(Arc::clone(&transport)).handle_raw(service.as_str(), echo);
    let _server = server.start().await.unwrap();
    let client = bench.client().await;
    client.call_raw(service.as_str(), "").await.unwrap();
    proxy.blackhole();
    let asked = Arc::clone(&transport);
    let asking = tokio::spawn(async move { asked.open_inbox().await.map(drop) });
    let mut state = transport.state();
    let lost = state.wait_for(|state| matches!(state, ConnectionState::Disconnected { .. }));
    let lost = tokio::time::timeout(2 * PROMPT, lost).await;
    lost.expect("it is given up").unwrap();
    proxy.restore().await.unwrap();
    // The server was told by nobody else. What the broker gave its ghost comes back when that is buried.
    let back = state.wait_for(|state| *state == ConnectionState::Connected);
    let back = tokio::time::timeout(PROMPT, back).await;
    back.expect("it is back").unwrap();
    asking.await.unwrap().unwrap();
    let plain = bench.plain().await;
    let found = plain.look(&service).await.unwrap();
    assert!(found.consumer_count() >= 1, "served again");
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

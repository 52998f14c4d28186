//! Plain AMQP clients and servers, as in the tutorial of RabbitMQ in any language.

use antiphon_core::{Code, Fault, Server};
use bytes::Bytes;
use futures_util::StreamExt;
use lapin::BasicProperties;
use lapin::options::{BasicAckOptions, BasicPublishOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use tokio::sync::mpsc;

use crate::bench::{Bench, fresh, next};

fn request(reply_to: &str, id: &str) -> BasicProperties {
    BasicProperties::default()
        .with_reply_to(reply_to.into())
        .with_correlation_id(id.into())
}

fn correlation_id(properties: &BasicProperties) -> Option<&str> {
    properties.correlation_id().as_ref().map(|id| id.as_str())
}

pub(crate) async fn tutorial_client_gets_its_answer(bench: Bench) {
    let service = fresh("rpc_queue");
    let _server = bench.fib(&service).await;
    let plain = bench.plain().await;
    let declare = plain.channel.queue_declare(
        "".into(),
        QueueDeclareOptions::exclusive(),
        FieldTable::default(),
    );
    let inbox = declare.await.unwrap();
    let mut replies = plain.consume(inbox.name().as_str(), true).await;
    for (id, n, answer) in [
        ("1", "30", "832040"),
        ("F47AC10B-58CC-4372-A567-0E02B2C3D479", "10", "55"),
        ("1", "6", "8"),
    ] {
        let properties = request(inbox.name().as_str(), id);
        plain.publish(&service, properties, n.as_bytes()).await;
        let reply = next(&mut replies).await;
        assert_eq!(correlation_id(&reply.properties), Some(id));
        assert_eq!(reply.data, answer.as_bytes());
        assert_eq!(
            reply.properties.headers(),
            &None,
            "a value needs no headers"
        );
    }
}

pub(crate) async fn direct_reply_to_works(bench: Bench) {
    let service = fresh("rpc_queue");
    let _server = bench.fib(&service).await;
    let plain = bench.plain().await;
    let mut replies = plain.consume("amq.rabbitmq.reply-to", true).await;
    let properties = request("amq.rabbitmq.reply-to", "7");
    plain.publish(&service, properties, b"30").await;
    let reply = next(&mut replies).await;
    assert_eq!(correlation_id(&reply.properties), Some("7"));
    assert_eq!(reply.data, b"832040");
    // Exactly one: the broker calls such an address unroutable, although it delivers.
    plain
        .publish(&service, request("amq.rabbitmq.reply-to", "8"), b"10")
        .await;
    let reply = next(&mut replies).await;
    assert_eq!(
        (correlation_id(&reply.properties), &reply.data[..]),
        (Some("8"), &b"55"[..])
    );
}

pub(crate) async fn tutorial_server_answers_us(bench: Bench) {
    let service = fresh("rpc_queue");
    let plain = bench.plain().await;
    let declare = plain.channel.queue_declare(
        service.as_str().into(),
        QueueDeclareOptions::durable(),
        FieldTable::default(),
    );
    declare.await.unwrap();
    let mut requests = plain.consume(&service, false).await;
    let channel = plain.channel.clone();
    let server = tokio::spawn(async move {
        while let Some(Ok(delivery)) = requests.next().await {
            let reply_to = delivery.properties.reply_to().clone().unwrap();
            let id = delivery.properties.correlation_id().clone().unwrap();
            let body = format!("echo {}", String::from_utf8_lossy(&delivery.data));
            // Nothing but the correlation id comes back.
            let properties = BasicProperties::default().with_correlation_id(id);
            let options = BasicPublishOptions::default();
            let sent =
                channel.basic_publish("".into(), reply_to, options, body.as_bytes(), properties);
            sent.await.unwrap().await.unwrap();
            let _ = delivery.ack(BasicAckOptions::default()).await;
        }
    });
    let client = bench.client().await;
    for n in 0..3 {
        let call = client.call_raw(service.as_str(), n.to_string());
        let reply = call.expect_responder().await.unwrap();
        assert_eq!(&reply.body[..], format!("echo {n}").as_bytes());
    }
    server.abort();
}

pub(crate) async fn a_fault_for_a_plain_peer_is_json(bench: Bench) {
    let service = fresh("rpc_queue");
    let _server = bench.fib(&service).await;
    let plain = bench.plain().await;
    let mut replies = plain.consume("amq.rabbitmq.reply-to", true).await;
    plain
        .publish(&service, request("amq.rabbitmq.reply-to", "1"), b"many")
        .await;
    let reply = next(&mut replies).await;
    assert_eq!(
        String::from_utf8_lossy(&reply.data),
        r#"{"error":{"code":"invalid_argument","message":"not a number"}}"#
    );
    let content_type = reply.properties.content_type().as_ref().unwrap();
    assert_eq!(content_type.as_str(), "application/json");
    assert_eq!(reply.properties.headers(), &None);
}

pub(crate) async fn a_request_without_reply_to_is_run(bench: Bench) {
    let service = fresh("one-way");
    let (told, mut hears) = mpsc::unbounded_channel();
    let listen = move |body: Bytes, context: antiphon_core::Context| {
        let _ = told.send((
            body.clone(),
            context.headers().find("color").map(str::to_owned),
        ));
        async move { Ok::<_, Fault>(body) }
    };
    let server = Server::new(bench.connect().await).handle_raw(service.as_str(), listen);
    let running = server.start().await.unwrap();
    let plain = bench.plain().await;
    let mut headers = FieldTable::default();
    headers.insert(
        "color".into(),
        lapin::types::AMQPValue::LongString("red".into()),
    );
    headers.insert("Number".into(), lapin::types::AMQPValue::LongInt(1));
    let properties = BasicProperties::default().with_headers(headers);
    plain.publish(&service, properties, b"hello").await;
    let heard = hears.recv().await.unwrap();
    assert_eq!(heard, (Bytes::from("hello"), Some("red".to_owned())));
    running.shutdown().await.unwrap();
    bench.messages(&service, 0).await;
}

pub(crate) async fn what_is_no_request_is_buried(bench: Bench) {
    let service = fresh("undecodable");
    let _server = bench.fib(&service).await;
    let plain = bench.plain().await;
    let mut replies = plain.consume("amq.rabbitmq.reply-to", true).await;
    let bad = request("amq.rabbitmq.reply-to", "caf\u{e9}");
    plain.publish(&service, bad, b"30").await;
    let reply = next(&mut replies).await;
    assert_eq!(correlation_id(&reply.properties), Some("caf\u{e9}"));
    let fault = Fault::from_body(&reply.data).unwrap();
    assert_eq!(fault.code(), Code::InvalidArgument);
    bench.messages(&format!("{service}.dead"), 1).await;
    // Its neighbours are none the worse.
    plain
        .publish(&service, request("amq.rabbitmq.reply-to", "2"), b"30")
        .await;
    assert_eq!(next(&mut replies).await.data, b"832040");
}

/// As large as the broker lets other clients send them; it splits them for nobody.
pub(crate) async fn large_headers_cost_nobody_the_connection(bench: Bench) {
    let service = fresh("headers");
    let transport = bench.connect().await;
    let echo = |body: Bytes| async move { Ok::<_, Fault>(body) };
    let server = Server::new(transport.clone()).handle_raw(service.as_str(), echo);
    let _server = server.start().await.unwrap();
    let mut state = antiphon_core::Transport::state(&*transport);
    state.mark_unchanged();
    let plain = bench.plain().await;
    let mut replies = plain.consume("amq.rabbitmq.reply-to", true).await;
    let mut headers = FieldTable::default();
    let large = lapin::types::AMQPValue::LongString("x".repeat(100 * 1024).into());
    headers.insert("large".into(), large);
    let properties = request("amq.rabbitmq.reply-to", "1").with_headers(headers);
    plain.publish(&service, properties, b"hello").await;
    assert_eq!(next(&mut replies).await.data, b"hello");
    assert!(!state.has_changed().unwrap(), "{:?}", *state.borrow());
}

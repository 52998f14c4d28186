//! Queues: who declares them, as what, and what happens when one is gone.

use std::sync::Arc;
use std::time::Duration;

use antiphon_amqp::AmqpTransport;
use antiphon_amqp::QueueType;
use antiphon_core::transport::SubscriptionEvent;
use antiphon_core::{ErrorKind, Executed, Fault, Server};
use bytes::Bytes;
use futures_util::future::join_all;
use lapin::BasicProperties;
use lapin::options::{QueueDeclareOptions, QueueDeleteOptions, QueuePurgeOptions};
use lapin::types::{AMQPValue, FieldTable};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};

use crate::Verdict;
use crate::bench::{Bench, Plain, close, eventually, fresh, next};

async fn echo(body: Bytes) -> Result<Bytes, Fault> {
    Ok(body)
}

/// True if the queue was declared with these arguments; the broker refuses all others.
async fn is_declared_as(plain: &Plain, queue: &str, arguments: FieldTable) -> bool {
    let spare = plain.connection.create_channel().await.unwrap();
    let options = QueueDeclareOptions::durable();
    let declared = spare.queue_declare(queue.into(), options, arguments).await;
    declared.is_ok()
}

fn of_type(queue_type: &str) -> FieldTable {
    let mut arguments = FieldTable::default();
    let value = AMQPValue::LongString(queue_type.into());
    arguments.insert("x-queue-type".into(), value);
    arguments
}

pub(crate) async fn a_service_queue_is_declared_once_and_used_as_it_is(bench: Bench) {
    let plain = bench.plain().await;
    let service = fresh("quorum");
    let server = Server::new(bench.connect().await).handle_raw(service.as_str(), echo);
    let _server = server.start().await.unwrap();
    for queue in [service.clone(), format!("{service}.retry")] {
        assert!(
            is_declared_as(&plain, &queue, of_type("quorum")).await,
            "{queue}"
        );
    }
    assert!(plain.look(&format!("{service}.dead")).await.is_none());

    // There already, of another kind, with arguments of its own.
    let service = fresh("theirs");
    let mut arguments = of_type("classic");
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1000));
    assert!(is_declared_as(&plain, &service, arguments.clone()).await);
    let server = Server::new(bench.connect().await).handle_raw(service.as_str(), echo);
    let _server = server.start().await.unwrap();
    let client = bench.client().await;
    client.call_raw(service.as_str(), "").await.unwrap();
    assert!(is_declared_as(&plain, &service, arguments).await);

    let service = format!("{}@node-1", fresh("node"));
    let mut config = bench.config();
    config.queue_type = QueueType::Classic;
    config.node_queue_expires = Duration::from_millis(700);
    let transport = Arc::new(AmqpTransport::connect(config).await.unwrap());
    let server = Server::new(transport.clone()).handle_raw(service.as_str(), echo);
    let running = server.start().await.unwrap();
    client.call_raw(service.as_str(), "").await.unwrap();
    let mut arguments = of_type("classic");
    arguments.insert("x-expires".into(), AMQPValue::LongLongInt(700));
    assert!(is_declared_as(&plain, &service, arguments).await);
    running.shutdown().await.unwrap();
    // Looking at it counts as using it, so not too often.
    let mut looks = 0;
    while plain.look(&service).await.is_some() {
        looks += 1;
        assert!(looks < 5, "the queue of a node that is gone expires");
        sleep(Duration::from_millis(1500)).await;
    }
}

pub(crate) async fn transient_queues_are_declared_so(bench: Bench) {
    let service = fresh("transient");
    let mut config = bench.config();
    config.durable = false;
    let refused = AmqpTransport::connect(config.clone()).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    config.queue_type = QueueType::Classic;
    let transport = Arc::new(AmqpTransport::connect(config).await.unwrap());
    let kept = |_: Bytes| async move { Ok::<_, Fault>(Bytes::new()) };
    let server = Server::new(transport.clone()).handle_raw(service.as_str(), kept);
    let running = server.start().await.unwrap();
    let client = antiphon_core::Client::open(transport, Default::default());
    let client = client.await.unwrap();
    client.call_raw(service.as_str(), "").await.unwrap();
    let plain = bench.plain().await;
    for queue in [service.clone(), format!("{service}.retry")] {
        let declared = plain.connection.create_channel().await.unwrap();
        let options = QueueDeclareOptions::default();
        let same = declared.queue_declare(queue.as_str().into(), options, of_type("classic"));
        same.await.unwrap();
    }
    running.shutdown().await.unwrap();
    // And so is what is sent to them.
    let mut consumer = plain.consume(&service, true).await;
    client.notify_raw(service.as_str(), "").await.unwrap();
    let request = next(&mut consumer).await;
    assert_eq!(*request.properties.delivery_mode(), Some(1));
}

pub(crate) async fn an_inbox_is_removed_with_its_owner(bench: Bench) {
    let transport = bench.connect().await;
    let client = antiphon_core::Client::open(transport.clone(), Default::default())
        .await
        .unwrap();
    let inbox = client.inbox().as_str().to_owned();
    let plain = bench.plain().await;
    let declared = async || is_declared_as(&plain, &inbox, of_type("classic")).await;
    assert!(!declared().await, "the inbox is its client's own");
    client.close().await;
    eventually("the name of the inbox is free", declared).await;
    close(&*transport).await;
}

pub(crate) async fn names_of_other_queues_are_refused(bench: Bench) {
    let client = bench.client().await;
    for suffix in ["retry", "dead", "owner"] {
        let service = format!("fib.{suffix}");
        let error = client.call_raw(service.as_str(), "").await.unwrap_err();
        assert_eq!(
            (error.kind(), error.executed()),
            (ErrorKind::Invalid, Executed::No)
        );
        let server = Server::new(bench.connect().await).handle_raw(service.as_str(), echo);
        assert_eq!(server.start().await.unwrap_err().kind(), ErrorKind::Invalid);
    }
}

pub(crate) async fn a_queue_that_is_full_is_not_said_to_be_safe(bench: Bench) {
    let plain = bench.plain().await;
    let service = fresh("full");
    let mut arguments = of_type("classic");
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
    let overflow = AMQPValue::LongString("reject-publish".into());
    arguments.insert("x-overflow".into(), overflow);
    assert!(is_declared_as(&plain, &service, arguments).await);
    let client = bench.client().await;
    client.notify_raw(service.as_str(), "").await.unwrap();
    bench.messages(&service, 1).await;
    // A broker that did not take a request may have given it to somebody all the same.
    let error = client.call_raw(service.as_str(), "").await.unwrap_err();
    assert_eq!(
        (error.kind(), error.executed()),
        (ErrorKind::Overloaded, Executed::Maybe),
        "{error}"
    );
    // There is room again.
    let mut consumer = plain.consume(&service, true).await;
    next(&mut consumer).await;
    client.notify_raw(service.as_str(), "again").await.unwrap();
    assert_eq!(next(&mut consumer).await.data, b"again");
}

pub(crate) async fn a_deleted_service_queue_comes_back(bench: Bench) {
    let service = fresh("deleted");
    let server = Server::new(bench.connect().await).handle_raw(service.as_str(), echo);
    let _server = server.start().await.unwrap();
    let client = bench.client().await;
    client.call_raw(service.as_str(), "").await.unwrap();
    let plain = bench.plain().await;
    for queue in [service.clone(), format!("{service}.retry")] {
        let options = QueueDeleteOptions::default();
        plain
            .channel
            .queue_delete(queue.as_str().into(), options)
            .await
            .unwrap();
        let deleted = Instant::now();
        client.call_raw(service.as_str(), "").await.unwrap();
        let took = deleted.elapsed();
        assert!(
            took < Duration::from_secs(1),
            "{queue}: served again after {took:?}"
        );
        eventually("both are there", async || {
            plain
                .look(&queue)
                .await
                .is_some_and(|queue| queue.consumer_count() == 1)
        })
        .await;
    }
}

pub(crate) async fn a_deleted_inbox_is_told_and_comes_back(bench: Bench) -> Verdict {
    let service = fresh("slow");
    let gate = Arc::new(Semaphore::new(0));
    let door = Arc::clone(&gate);
    let slow = move |body: Bytes| {
        let door = Arc::clone(&door);
        async move {
            let _ = door.acquire().await;
            Ok::<_, Fault>(body)
        }
    };
    let server = Server::new(bench.connect().await).handle_raw(service.as_str(), slow);
    let _server = server.start().await.unwrap();
    let client = bench.client().await;
    let call = tokio::spawn(client.call_raw(service.as_str(), "").into_future());
    sleep(Duration::from_millis(300)).await;
    bench
        .ctl(&["delete_queue", client.inbox().as_str()])
        .await?;
    gate.add_permits(2);
    let error = call.await.unwrap().unwrap_err();
    assert_eq!(
        (error.kind(), error.executed()),
        (ErrorKind::ConnectionLost, Executed::Maybe)
    );
    client.call_raw(service.as_str(), "").await.unwrap();
    Ok(())
}

pub(crate) async fn returned_messages_find_their_callers(bench: Bench) {
    let (served, absent) = (fresh("served"), fresh("absent"));
    let server = Server::new(bench.connect().await).handle_raw(served.as_str(), echo);
    let _server = server.start().await.unwrap();
    let client = bench.client().await;
    let calls = (0..600).map(|n| {
        let (client, service) = match n % 2 {
            0 => (client.clone(), served.clone()),
            // Names that differ, so that each is sent and comes back.
            _ => (client.clone(), format!("{absent}-{n}")),
        };
        async move {
            let call = client.call_raw(service.as_str(), n.to_string());
            (n, call.timeout(Duration::from_secs(3)).await)
        }
    });
    for (n, result) in join_all(calls).await {
        match (n % 2, result) {
            (0, Ok(reply)) => assert_eq!(&reply.body[..], n.to_string().as_bytes()),
            (1, Err(error)) => {
                assert_eq!(error.kind(), ErrorKind::DeadlineExceeded, "{n}: {error}");
                assert_eq!(error.executed(), Executed::No, "{n}: {error}");
            }
            (_, other) => panic!("{n}: {other:?}"),
        }
    }
}

pub(crate) async fn a_reply_for_nobody_is_counted(bench: Bench) {
    let service = fresh("nobody");
    let transport = bench.connect().await;
    let server = Server::new(transport.clone()).handle_raw(service.as_str(), echo);
    let _server = server.start().await.unwrap();
    let plain = bench.plain().await;
    let properties = BasicProperties::default()
        .with_reply_to("nobody.here".into())
        .with_correlation_id("1".into());
    plain.publish(&service, properties, b"").await;
    eventually("the reply is given up", async || {
        transport.undeliverable_replies() == 1
    })
    .await;
    close(&*transport).await;
    bench.messages(&service, 0).await;
}

/// What is published to a quorum queue while it is being declared is sometimes neither confirmed nor returned.
pub(crate) async fn a_call_while_its_queue_is_declared_is_answered(bench: Bench) {
    const SERVICES: u64 = 40;
    let client = bench.client().await;
    let transport = bench.connect().await;
    let rounds = (0..SERVICES).map(|n| {
        let (client, transport) = (client.clone(), transport.clone());
        async move {
            let service = fresh("declared");
            let server = Server::new(transport).handle_raw(service.as_str(), echo);
            let start = tokio::spawn(server.start());
            // Before, while and after the queue is declared.
            sleep(Duration::from_millis(n * 2)).await;
            let call = client.call_raw(service.as_str(), "body");
            let answer = call.timeout(Duration::from_secs(8)).await;
            let _server = start.await.unwrap().unwrap();
            assert_eq!(&answer.unwrap().body[..], b"body");
        }
    });
    futures_util::StreamExt::for_each_concurrent(futures_util::stream::iter(rounds), 8, |round| {
        round
    })
    .await;
}

/// Only what somebody received may have been started: the rest goes back as it was when the transport is closed.
pub(crate) async fn what_nobody_received_is_not_counted(bench: Bench) {
    let service = fresh("unreceived");
    let name = antiphon_core::ServiceName::new(&service).unwrap();
    let transport = bench.connect().await;
    let options = antiphon_core::transport::SubscribeOptions::shared(8);
    let subscription = antiphon_core::Transport::subscribe(&*transport, &name, options)
        .await
        .unwrap();
    let client = bench.client().await;
    let calls: Vec<_> = (0..4)
        .map(|_| tokio::spawn(client.call_raw(service.as_str(), "").into_future()))
        .collect();
    // All are with the subscription, which nobody asks for them.
    sleep(Duration::from_millis(500)).await;
    bench.messages(&service, 0).await;
    close(&*transport).await;
    drop(subscription);
    let attempt = |_: Bytes, context: antiphon_core::Context| async move {
        Ok::<_, Fault>(context.attempt().to_string())
    };
    let server = Server::new(bench.connect().await).handle_raw(service.as_str(), attempt);
    let _server = server.start().await.unwrap();
    for call in calls {
        assert_eq!(&call.await.unwrap().unwrap().body[..], b"1");
    }
}

/// A request that waits for a busy server's handler is another server's after a moment.
pub(crate) async fn a_busy_server_gives_back_what_it_cannot_start(bench: Bench) {
    let service = fresh("busy");
    let name = antiphon_core::ServiceName::new(&service).unwrap();
    let transport = bench.connect().await;
    let options = antiphon_core::transport::SubscribeOptions::shared(1);
    let mut busy = antiphon_core::Transport::subscribe(&*transport, &name, options)
        .await
        .unwrap();
    let client = bench.client().await;
    let _slow = tokio::spawn(client.call_raw(service.as_str(), "slow").into_future());
    let mut next = async || match busy.recv().await {
        SubscriptionEvent::Deliveries(mut deliveries) => deliveries.pop().unwrap(),
        SubscriptionEvent::Closed(error) => panic!("{error}"),
    };
    drop(next().await);
    // It comes from the retry queue now, so that one from the main queue can come beside it.
    let again = next().await;
    assert_eq!(again.attempt, 2);
    let server = Server::new(bench.connect().await)
        .prefetch(1)
        .handle_raw(service.as_str(), echo);
    let _server = server.start().await.unwrap();
    let calls = (0..2).map(|_| {
        let call = client.call_raw(service.as_str(), "body");
        call.timeout(Duration::from_secs(4)).into_future()
    });
    for answer in join_all(calls).await {
        assert_eq!(&answer.unwrap().body[..], b"body");
    }
    again.reply(None).await.unwrap();
}

/// What was in the queue before the server, and went without it, makes nothing that comes later look old.
pub(crate) async fn a_backlog_that_went_elsewhere_is_forgotten(bench: Bench) {
    const BEFORE: usize = 200;
    const LATER: usize = 40;
    let service = fresh("backlog");
    let name = antiphon_core::ServiceName::new(&service).unwrap();
    let transport = bench.connect().await;
    let subscribe = async || {
        let options = antiphon_core::transport::SubscribeOptions::shared(1);
        let subscribed = antiphon_core::Transport::subscribe(&*transport, &name, options);
        subscribed.await.unwrap()
    };
    subscribe().await.stop().await;
    let plain = bench.plain().await;
    for _ in 0..BEFORE {
        plain
            .publish(&service, BasicProperties::default(), b"")
            .await;
    }
    let mut subscription = subscribe().await;
    let mut next = async || match subscription.recv().await {
        SubscriptionEvent::Deliveries(mut deliveries) => deliveries.pop().unwrap(),
        SubscriptionEvent::Closed(error) => panic!("{error}"),
    };
    let old = next().await;
    assert!(old.waited);
    let purge = QueuePurgeOptions::default();
    plain
        .channel
        .queue_purge(service.as_str().into(), purge)
        .await
        .unwrap();
    old.reply(None).await.unwrap();
    for _ in 0..LATER {
        plain
            .publish(&service, BasicProperties::default(), b"")
            .await;
        let fresh = next().await;
        let waited = fresh.waited;
        fresh.reply(None).await.unwrap();
        if !waited {
            return;
        }
        sleep(Duration::from_millis(100)).await;
    }
    panic!("{LATER} requests count as old that are not");
}

/// It loses its consumers with its queue, but not its service.
pub(crate) async fn an_owner_whose_queue_is_deleted_stays_the_owner(bench: Bench) {
    let service = fresh("owned");
    let name = antiphon_core::ServiceName::new(&service).unwrap();
    let server = Server::new(bench.connect().await)
        .exclusive()
        .handle_raw(service.as_str(), echo);
    let mut running = server.start().await.unwrap();
    let (client, other) = (bench.client().await, bench.connect().await);
    let plain = bench.plain().await;
    for queue in [service.clone(), format!("{service}.retry")] {
        plain
            .channel
            .queue_delete(queue.as_str().into(), QueueDeleteOptions::default())
            .await
            .unwrap();
        client.call_raw(service.as_str(), "").await.unwrap();
        let options = antiphon_core::transport::SubscribeOptions::exclusive(1);
        let second = antiphon_core::Transport::subscribe(&*other, &name, options).await;
        let refused = second.unwrap_err().kind();
        assert_eq!(refused, ErrorKind::AlreadyOwned, "{queue}");
    }
    let over = tokio::time::timeout(Duration::from_millis(500), running.over());
    assert!(over.await.is_err(), "it is still the owner");
}

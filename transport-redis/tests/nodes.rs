//! What is said to every server, requests that are taken back, and inboxes that are gone.

mod support;

use std::sync::Arc;
use std::time::Duration;

use antiphon_core::transport::{Inbox, InboxEvent, Incoming, Outbound, SubscribeOptions};
use antiphon_core::{
    CorrelationId, Error, ErrorKind, Executed, Reply, ReplyAddress, Request, Transport,
};
use antiphon_redis::RedisTransport;
use redis::AsyncCommands;

use support::{BUDGET, Broker, PATIENCE, delivery, fresh_service, request, send, within};

fn address(text: &str) -> ReplyAddress {
    ReplyAddress::new(text).unwrap()
}

/// The next thing said, which is alone.
async fn said(inbox: &mut dyn Inbox) -> (String, Arc<Request>) {
    match within("a word", inbox.recv()).await {
        InboxEvent::Replies(mut incoming) if incoming.len() == 1 => match incoming.remove(0) {
            Incoming::Request { service, request } => (service.to_string(), request),
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn every_server_hears_it_and_what_is_gone_is_not_counted() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let (one, two, client) = (
        broker.connect().await,
        broker.connect().await,
        broker.connect().await,
    );
    let service = fresh_service();
    let mut inboxes = [
        one.open_inbox().await.unwrap(),
        two.open_inbox().await.unwrap(),
    ];
    for inbox in &mut inboxes {
        inbox.join(&service).await.unwrap();
        inbox.join(&service).await.unwrap();
    }
    // One whose time is over, one whose process is gone, and what is none.
    let (audience, nobody) = (format!("{{{service}}}:a"), format!("{}.1", "0".repeat(32)));
    let mut plain = broker.plain().await;
    let none = [
        ("{over}:i", 1),
        (&format!("{{{nobody}}}:i"), i64::MAX >> 11),
        ("{x}:q", i64::MAX >> 11),
    ];
    for (member, until) in none {
        let _: u64 = plain.zadd(&audience, member, until).await.unwrap();
    }
    let from = address("{someone}:i");
    for size in [10, 100_000] {
        let request = request(&from, BUDGET, vec![7; size]);
        let reached = within("a broadcast", client.broadcast(&service, request.clone())).await;
        assert_eq!(reached.unwrap(), Some(2));
        for inbox in &mut inboxes {
            let (name, heard) = said(&mut **inbox).await;
            assert_eq!(
                (name, heard.id.clone()),
                (service.to_string(), request.id.clone())
            );
            assert_eq!(
                (heard.reply_to.clone(), heard.body.clone()),
                (Some(from.clone()), request.body.clone())
            );
            let left = heard.deadline.unwrap().budget;
            assert!(
                left > BUDGET / 2 && left <= BUDGET + Duration::from_millis(2),
                "{left:?}"
            );
        }
    }
    let [gone, mut stays] = inboxes;
    let gone_address = gone.address();
    drop(gone);
    within("the inbox leaves", async {
        while plain
            .zscore::<_, _, Option<f64>>(&audience, gone_address.as_str())
            .await
            .unwrap()
            .is_some()
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let last = client.broadcast(&service, request(&from, BUDGET, "last"));
    assert_eq!(within("a broadcast", last).await.unwrap(), Some(1));
    assert_eq!(said(&mut *stays).await.1.body, "last");
    let late = client.broadcast(&service, request(&from, Duration::ZERO, "late"));
    let late = within("a late broadcast", late).await.unwrap_err();
    assert_eq!(
        (late.kind(), late.executed()),
        (ErrorKind::DeadlineExceeded, Executed::No)
    );
}

#[tokio::test]
async fn an_inbox_joins_again_what_the_broker_forgot() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let (server, client) = (broker.connect().await, broker.connect().await);
    let service = fresh_service();
    let mut inbox = server.open_inbox().await.unwrap();
    inbox.join(&service).await.unwrap();
    let mut plain = broker.plain().await;
    let _: () = redis::cmd("FLUSHALL")
        .query_async(&mut plain)
        .await
        .unwrap();
    let lost = within("the inbox tells", inbox.recv()).await;
    assert!(matches!(lost, InboxEvent::Lost(_)), "{lost:?}");
    let word = client.broadcast(&service, request(&address("{a}:i"), BUDGET, "x"));
    assert_eq!(within("a broadcast", word).await.unwrap(), Some(1));
    said(&mut *inbox).await;
}

#[tokio::test]
async fn an_inbox_stays_in_its_audience_for_many_times_its_time_to_live() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let mut config = broker.config();
    config.inbox_ttl = Duration::from_millis(800);
    let server = RedisTransport::connect(config).await.unwrap();
    let service = fresh_service();
    let mut inbox = server.open_inbox().await.unwrap();
    inbox.join(&service).await.unwrap();
    for round in 0_u8..20 {
        tokio::time::sleep(Duration::from_millis(170)).await;
        let word = server.broadcast(&service, request(&address("{a}:i"), BUDGET, vec![round]));
        assert_eq!(
            within("a broadcast", word).await.unwrap(),
            Some(1),
            "{round}"
        );
        said(&mut *inbox).await;
    }
    let mut plain = broker.plain().await;
    let audience = format!("{{{service}}}:a");
    let left: i64 = plain.pttl(&audience).await.unwrap();
    assert!(left > 3_600_000, "{left}");
}

/// Replies to an inbox, and says what came of it.
async fn reply_to(transport: &RedisTransport, to: &ReplyAddress) -> Result<(), Error> {
    let (to, reply) = (
        to.clone(),
        Reply::value(CorrelationId::random(), "x").into(),
    );
    within("a reply", transport.send(Outbound::Reply { to, reply })).await
}

#[tokio::test]
async fn a_reply_to_an_inbox_that_is_gone_says_so() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let (server, client) = (broker.connect().await, broker.connect().await);
    let inbox = client.open_inbox().await.unwrap();
    let to = inbox.address();
    reply_to(&server, &to).await.unwrap();
    drop(inbox);
    within("the inbox goes", async {
        while reply_to(&server, &to).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert_eq!(
        reply_to(&server, &to).await.unwrap_err().kind(),
        ErrorKind::NoResponder
    );
    // Of a plain peer that waits nothing is known.
    let plain = address(&format!("{{{}}}:i", fresh_service()));
    reply_to(&server, &plain).await.unwrap();
    let mut redis = broker.plain().await;
    assert_eq!(redis.del::<_, u64>(plain.as_str()).await.unwrap(), 1);
}

#[tokio::test]
async fn a_request_that_nobody_holds_is_taken_back_with_its_body() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let (server, client) = (broker.connect().await, broker.connect().await);
    let service = fresh_service();
    let to = address("{me}:i");
    let mut sent = Vec::new();
    // More than one page of what is looked through.
    for size in [10, 100_000, 10].into_iter().chain([10; 100]) {
        let mut request = request(&to, BUDGET, vec![7; size]);
        // Its value is another one's id, in the same spelling.
        let other = sent
            .last()
            .map_or_else(String::new, CorrelationId::to_string);
        request.headers.insert("id", &other).unwrap();
        sent.push(request.id.clone());
        send(&client, &service, request).await.unwrap();
    }
    let mut plain = broker.plain().await;
    let bodies = format!("{{{service}}}:b:*");
    assert_eq!(
        plain.keys::<_, Vec<String>>(&bodies).await.unwrap().len(),
        1
    );
    let withdraw = |id: CorrelationId| {
        let (client, service) = (&client, &service);
        async move {
            within("withdraw", client.withdraw(service, &id))
                .await
                .unwrap()
        }
    };
    for id in &sent[1..] {
        assert!(withdraw(id.clone()).await);
        assert!(!withdraw(id.clone()).await);
    }
    assert!(
        plain
            .keys::<_, Vec<String>>(&bodies)
            .await
            .unwrap()
            .is_empty()
    );
    assert!(!withdraw(CorrelationId::parse("1").unwrap()).await);
    // The first is left, and once it is in a server's hands it stays there.
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(4))
        .await
        .unwrap();
    let delivery = delivery(&mut *subscription).await;
    assert_eq!(delivery.request.id, sent[0]);
    assert!(!withdraw(sent[0].clone()).await);
    within("settle", delivery.reply(None)).await.unwrap();
}

#[tokio::test]
async fn work_that_came_back_is_taken_back_with_its_attempt() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let client = broker.connect().await;
    let service = fresh_service();
    let returned = format!("{{{service}}}:r");
    let frame = |id: &str| format!("{{\"v\":1,\"id\":\"{id}\"}}\nx");
    let mut plain = broker.plain().await;
    for (attempt, id) in [(2, "a"), (3, "b"), (2, "c")] {
        let pair = [attempt.to_string(), frame(id)];
        let _: u64 = plain.rpush(&returned, &pair).await.unwrap();
    }
    let id = CorrelationId::parse("b").unwrap();
    assert!(
        within("withdraw", client.withdraw(&service, &id))
            .await
            .unwrap()
    );
    let left: Vec<String> = plain.lrange(&returned, 0, -1).await.unwrap();
    assert_eq!(left, ["2", &frame("a"), "2", &frame("c")]);
    let _: u64 = plain.del(&returned).await.unwrap();
    within("close", client.close()).await;
    let closed = tokio::time::timeout(PATIENCE, client.withdraw(&service, &id)).await;
    assert_eq!(closed.unwrap().unwrap_err().kind(), ErrorKind::Closed);
}

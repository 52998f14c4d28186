//! Who writes to our lists without our code, and what we make of it.

mod support;

use antiphon_core::transport::{InboxEvent, Incoming, SubscribeOptions};
use antiphon_core::{Code, Executed, Outcome, Reply, Transport};
use redis::AsyncCommands;

use support::{BUDGET, Broker, delivery, fresh_service, reply, request, send, within};

#[tokio::test]
async fn a_foreign_producer_needs_no_bell_and_no_deadline() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let server = broker.connect().await;
    let service = fresh_service();
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(2))
        .await
        .unwrap();
    let mut plain = broker.plain().await;
    let inbox = format!("{{{service}-client}}:i");
    let frame = format!("{{\"id\":\"7\",\"to\":\"{inbox}\"}}\n30");
    let _: () = plain
        .rpush(format!("{{{service}}}:q"), frame)
        .await
        .unwrap();
    let delivery = delivery(&mut *subscription).await;
    assert!(delivery.expires.is_none() && delivery.request.deadline.is_none());
    let id = delivery.request.id.clone();
    within(
        "reply",
        delivery.reply(Some(Reply::value(id, &b"832040"[..]))),
    )
    .await
    .unwrap();
    let replies: Vec<String> = plain.lrange(&inbox, 0, -1).await.unwrap();
    assert_eq!(replies, ["{\"v\":1,\"id\":\"7\"}\n832040"]);
    let left: i64 = plain.pttl(&inbox).await.unwrap();
    assert!((1..=60_000).contains(&left), "{left}");
}

#[tokio::test]
async fn what_cannot_be_decoded_is_buried_and_costs_its_neighbours_nothing() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let (server, client) = (broker.connect().await, broker.connect().await);
    let service = fresh_service();
    let mut inbox = client.open_inbox().await.unwrap();
    let mut plain = broker.plain().await;
    let queue = format!("{{{service}}}:q");
    let newer = format!(
        "{{\"v\":2,\"id\":\"n\",\"to\":\"{}\"}}\n",
        inbox.address().as_str()
    );
    let stray = "{\"id\":\"s\",\"to\":\"{x}:q\"}\n".to_owned();
    let _: () = plain
        .rpush(&queue, &["junk".to_owned(), newer.clone(), stray])
        .await
        .unwrap();
    send(
        &client,
        &service,
        request(&inbox.address(), BUDGET, &b"good"[..]),
    )
    .await
    .unwrap();
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(10))
        .await
        .unwrap();
    let delivery = delivery(&mut *subscription).await;
    assert_eq!(&delivery.request.body[..], b"good");
    let told = reply(&mut *inbox).await;
    assert_eq!(told.id.to_string(), "n");
    let Outcome::Fault { fault, executed } = told.outcome else {
        panic!("{told:?}")
    };
    assert_eq!(
        (fault.code(), executed),
        (Code::InvalidArgument, Executed::No)
    );
    let dead: Vec<String> = plain
        .lrange(format!("{{{service}}}:dead"), 0, -1)
        .await
        .unwrap();
    assert_eq!(dead.len(), 3);
    assert!(
        dead[1].starts_with("{\"v\":1,\"attempt\":1,\"at\":")
            && dead[1].ends_with(&format!("\n{newer}")),
        "{dead:?}"
    );
    let touched: bool = plain.exists("{x}:q").await.unwrap();
    assert!(!touched, "a reply address named another key");

    let list = inbox.address().as_str().to_owned();
    let _: () = plain.rpush(&list, "not a reply").await.unwrap();
    let _: () = plain.zadd(format!("{list}:w"), "1", 0).await.unwrap();
    let event = within("the undecodable reply", inbox.recv()).await;
    assert!(
        matches!(&event, InboxEvent::Replies(r) if matches!(r[..], [Incoming::Undecodable { id: None, .. }])),
        "{event:?}"
    );
}

//! The way of a request, and of its reply.

mod support;

use antiphon_core::transport::SubscribeOptions;
use antiphon_core::{Outcome, Reply, Transport};

use support::{BUDGET, Broker, deliveries, delivery, fresh_service, reply, request, send, within};

#[tokio::test]
async fn round_trip_of_every_size() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let (server, client) = (broker.connect().await, broker.connect().await);
    let service = fresh_service();
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(4))
        .await
        .unwrap();
    let mut inbox = client.open_inbox().await.unwrap();
    for size in [0, 1, 100, 16 * 1024, 16 * 1024 + 1, 1 << 20] {
        let body: Vec<u8> = (0..size).map(|index| (index * 7 % 256) as u8).collect();
        let request = request(&inbox.address(), BUDGET, body.clone());
        let id = request.id.clone();
        send(&client, &service, request).await.unwrap();
        let delivery = delivery(&mut *subscription).await;
        assert_eq!((delivery.attempt, &delivery.request.id), (1, &id));
        assert_eq!(delivery.request.body, body);
        let answer = Reply::value(id.clone(), delivery.request.body.clone());
        within("reply", delivery.reply(Some(answer))).await.unwrap();
        let reply = reply(&mut *inbox).await;
        assert_eq!((&reply.id, &reply.outcome), (&id, &Outcome::Value));
        assert_eq!(reply.body, body);
    }
    within("close", client.close()).await;
    within("close", server.close()).await;
}

#[tokio::test]
async fn many_at_once() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let (server, client) = (broker.connect().await, broker.connect().await);
    let service = fresh_service();
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(64))
        .await
        .unwrap();
    let mut inbox = client.open_inbox().await.unwrap();
    for _ in 0..2000 {
        send(
            &client,
            &service,
            request(&inbox.address(), BUDGET, &b"x"[..]),
        )
        .await
        .unwrap();
    }
    let serving = tokio::spawn(async move {
        let mut left = 2000;
        while left > 0 {
            let deliveries = deliveries(&mut *subscription).await;
            left -= deliveries.len();
            let settled = deliveries.into_iter().map(|delivery| {
                let answer =
                    Reply::value(delivery.request.id.clone(), delivery.request.body.clone());
                delivery.reply(Some(answer))
            });
            for result in futures_util::future::join_all(settled).await {
                result.unwrap();
            }
        }
    });
    let mut got = 0;
    while got < 2000 {
        match within("replies", inbox.recv()).await {
            antiphon_core::transport::InboxEvent::Replies(replies) => got += replies.len(),
            other => panic!("{other:?}"),
        }
    }
    within("serving", serving).await.unwrap();
}

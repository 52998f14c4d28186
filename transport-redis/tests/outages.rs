//! Connections that are cut, and brokers that restart or stand still.

mod support;

use std::time::{Duration, Instant};

use antiphon_core::transport::{ConnectionState, InboxEvent, Incoming, Outbound, SubscribeOptions};
use antiphon_core::{ErrorKind, Executed, Reply, Ticket, Transport};
use redis::AsyncCommands;

use support::{BUDGET, Broker, connect, delivery, fresh_service, reply, request, send, within};

#[tokio::test]
async fn cut_connections_lose_no_request_and_no_reply() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let (server, client) = (connect(&broker).await, connect(&broker).await);
    let service = fresh_service();
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(4))
        .await
        .unwrap();
    let mut inbox = client.open_inbox().await.unwrap();
    let cut = || async {
        let mut plain = broker.plain().await;
        let _: usize = redis::cmd("CLIENT")
            .arg("KILL")
            .arg("TYPE")
            .arg("normal")
            .query_async(&mut plain)
            .await
            .unwrap();
    };
    for round in 0..5 {
        send(
            &client,
            &service,
            request(&inbox.address(), BUDGET, vec![round]),
        )
        .await
        .unwrap();
        let held = delivery(&mut *subscription).await;
        assert_eq!((held.attempt, &held.request.body[..]), (1, &[round][..]));
        cut().await;
        let answer = Reply::value(held.request.id.clone(), vec![round]);
        within("reply", held.reply(Some(answer))).await.unwrap();
        cut().await;
        // What was not acknowledged is read again; it is the client that discards it.
        within("the reply", async {
            loop {
                let InboxEvent::Replies(replies) = inbox.recv().await else { panic!("the inbox was lost") };
                let is_new = |reply: &Incoming| matches!(reply, Incoming::Reply(reply) if reply.body[..] == [round]);
                if replies.iter().any(is_new) {
                    return;
                }
            }
        })
        .await;
        let mut state = client.state();
        within(
            "connected",
            state.wait_for(|state| *state == ConnectionState::Connected),
        )
        .await
        .unwrap();
    }
    let mut plain = broker.plain().await;
    let owned: bool = plain.exists(format!("{{{service}}}:r")).await.unwrap();
    assert!(!owned);
}

#[tokio::test]
async fn after_a_restart_that_lost_all_the_client_is_told_and_calls_go_on() {
    let Some(mut broker) = Broker::private(&[]).await else {
        return;
    };
    let (server, client) = (connect(&broker).await, connect(&broker).await);
    let service = fresh_service();
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::exclusive(4))
        .await
        .unwrap();
    let mut inbox = client.open_inbox().await.unwrap();
    send(
        &client,
        &service,
        request(&inbox.address(), BUDGET, &b"lost"[..]),
    )
    .await
    .unwrap();
    let held = delivery(&mut *subscription).await;
    let mut state = client.state();
    broker.restart(Duration::from_millis(1500)).await;
    let back = Instant::now();
    let event = within("the inbox tells", inbox.recv()).await;
    assert!(matches!(event, InboxEvent::Lost(_)), "{event:?}");
    within("the lease is lost", held.lease().cancelled()).await;
    within(
        "connected",
        state.wait_for(|state| *state == ConnectionState::Connected),
    )
    .await
    .unwrap();
    send(
        &client,
        &service,
        request(&inbox.address(), BUDGET, &b"next"[..]),
    )
    .await
    .unwrap();
    let next = delivery(&mut *subscription).await;
    assert_eq!(&next.request.body[..], b"next");
    within(
        "reply",
        next.reply(Some(Reply::value(held.request.id.clone(), &b"y"[..]))),
    )
    .await
    .unwrap();
    assert_eq!(&reply(&mut *inbox).await.body[..], b"y");
    assert!(
        back.elapsed() < Duration::from_secs(5),
        "{:?}",
        back.elapsed()
    );
}

#[tokio::test]
async fn a_broker_that_stood_still_is_found_out_and_loses_nothing() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let (server, client) = (broker.connect().await, broker.connect().await);
    let service = fresh_service();
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(4))
        .await
        .unwrap();
    let mut inbox = client.open_inbox().await.unwrap();
    send(&client, &service, request(&inbox.address(), BUDGET, "held"))
        .await
        .unwrap();
    let held = delivery(&mut *subscription).await;
    broker.signal("-STOP");
    let answer = Reply::value(held.request.id.clone(), "held");
    let settling = tokio::spawn(held.reply(Some(answer)));
    // It is written, and then nothing comes: that is all that can be said of it.
    let error = send(
        &client,
        &service,
        request(&inbox.address(), BUDGET, "unknown"),
    )
    .await
    .unwrap_err();
    assert_eq!(
        (error.kind(), error.executed()),
        (ErrorKind::ConnectionLost, Executed::Maybe),
        "{error}"
    );
    let mut state = client.state();
    within(
        "disconnected",
        state.wait_for(|state| *state != ConnectionState::Connected),
    )
    .await
    .unwrap();
    broker.signal("-CONT");
    let back = Instant::now();
    within("settled", settling).await.unwrap().unwrap();
    send(&client, &service, request(&inbox.address(), BUDGET, "next"))
        .await
        .unwrap();
    let mut bodies = Vec::new();
    while bodies.last().is_none_or(|last| last != "next") {
        for delivery in support::deliveries(&mut *subscription).await {
            assert_eq!(delivery.attempt, 1);
            bodies.push(delivery.request.body.clone());
            let answer = Reply::value(delivery.request.id.clone(), delivery.request.body.clone());
            within("reply", delivery.reply(Some(answer))).await.unwrap();
        }
    }
    // What was written before it stood still may or may not have been executed by it.
    assert!(
        bodies == ["unknown", "next"] || bodies == ["next"],
        "{bodies:?}"
    );
    let mut replies = Vec::new();
    while replies.len() < bodies.len() + 1 {
        let InboxEvent::Replies(page) = within("replies", inbox.recv()).await else {
            panic!("the inbox was lost")
        };
        for incoming in page {
            let Incoming::Reply(reply) = incoming else {
                panic!("{incoming:?}")
            };
            if !replies.contains(&reply.body) {
                replies.push(reply.body.clone());
            }
        }
    }
    assert!(
        ["held", "next"]
            .iter()
            .all(|body| replies.iter().any(|reply| reply == body)),
        "{replies:?}"
    );
    assert!(
        back.elapsed() < Duration::from_secs(5),
        "{:?}",
        back.elapsed()
    );
}

#[tokio::test]
async fn withdrawn_while_the_broker_was_away_is_never_sent() {
    let Some(mut broker) = Broker::private(&[]).await else {
        return;
    };
    let client = connect(&broker).await;
    let service = fresh_service();
    let inbox = client.open_inbox().await.unwrap();
    let mut state = client.state();
    broker
        .restart_with(async {
            within(
                "disconnected",
                state.wait_for(|state| *state != ConnectionState::Connected),
            )
            .await
            .unwrap();
            let (withdrawn, kept) = (Ticket::new(), Ticket::new());
            let outbound = |ticket: &Ticket, body: &'static [u8]| Outbound::Request {
                service: service.clone(),
                request: request(&inbox.address(), BUDGET, body).into(),
                expect_responder: false,
                ticket: ticket.clone(),
            };
            // Both are queued by their first poll; the second one's caller stays.
            let first = tokio::time::timeout(
                Duration::from_millis(50),
                client.send(outbound(&withdrawn, b"withdrawn")),
            );
            assert!(first.await.is_err());
            assert!(withdrawn.withdraw());
            let second = tokio::time::timeout(
                Duration::from_millis(50),
                client.send(outbound(&kept, b"kept")),
            );
            assert!(second.await.is_err());
        })
        .await;
    let mut plain = broker.plain().await;
    let queue = format!("{{{service}}}:q");
    let frames: Vec<String> = within("the request is sent", async {
        loop {
            let frames: Vec<String> = plain.lrange(&queue, 0, -1).await.unwrap();
            if !frames.is_empty() {
                return frames;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert!(
        matches!(&frames[..], [only] if only.ends_with("\nkept")),
        "{frames:?}"
    );
}

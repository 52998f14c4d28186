//! What servers hold, what becomes of it without them, and who may serve.

mod support;

use std::time::{Duration, Instant};

use antiphon_core::transport::{Outbound, SubscribeOptions, SubscriptionEvent};
use antiphon_core::{ErrorKind, Executed, Reply, Ticket, Transport};
use redis::{AsyncCommands, Script};

use support::{
    BUDGET, Broker, LEASE, connect, delivery, fresh_service, reply, request, send, within,
};

#[tokio::test]
async fn dropped_work_goes_back_counted_and_released_work_uncounted() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let (server, client) = (broker.connect().await, broker.connect().await);
    let service = fresh_service();
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(4))
        .await
        .unwrap();
    let inbox = client.open_inbox().await.unwrap();
    send(
        &client,
        &service,
        request(&inbox.address(), BUDGET, &b"x"[..]),
    )
    .await
    .unwrap();
    let first = delivery(&mut *subscription).await;
    assert_eq!(first.attempt, 1);
    within("release", first.release()).await.unwrap();
    let again = delivery(&mut *subscription).await;
    assert_eq!(again.attempt, 1);
    drop(again);
    let second = delivery(&mut *subscription).await;
    assert_eq!(second.attempt, 2);
    within("release", second.release()).await.unwrap();
    let still = delivery(&mut *subscription).await;
    assert_eq!(still.attempt, 2);
    within("bury", still.dead_letter("enough".to_owned(), None))
        .await
        .unwrap();
    let mut plain = broker.plain().await;
    let dead: Vec<String> = plain
        .lrange(format!("{{{service}}}:dead"), 0, -1)
        .await
        .unwrap();
    assert!(
        matches!(&dead[..], [only] if only.contains("\"attempt\":2") && only.contains("\"enough\"")),
        "{dead:?}"
    );
}

#[tokio::test]
async fn a_server_that_lost_its_lease_cannot_reply() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let (server, other, client) = (
        connect(&broker).await,
        connect(&broker).await,
        broker.connect().await,
    );
    let service = fresh_service();
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(1))
        .await
        .unwrap();
    let mut inbox = client.open_inbox().await.unwrap();
    send(
        &client,
        &service,
        request(&inbox.address(), BUDGET, &b"x"[..]),
    )
    .await
    .unwrap();
    let held = delivery(&mut *subscription).await;
    let mut second = other
        .subscribe(&service, SubscribeOptions::shared(1))
        .await
        .unwrap();
    // As after a pause longer than its lease: a monitor returned what it held.
    let mut plain = broker.plain().await;
    let key = |suffix: &str| format!("{{{service}}}:{suffix}");
    let sessions: Vec<String> = plain.smembers(key("s")).await.unwrap();
    // Found before it is ended: what it held goes to the other one at once.
    let mut holders = Vec::new();
    for session in sessions {
        let held = key(&format!("p:{session}"));
        if plain.exists(&held).await.unwrap() {
            holders.push((session, held));
        }
    }
    let [(session, held_key)] = &holders[..] else {
        panic!("{holders:?}")
    };
    let script = Script::new(include_str!("../src/lua/reclaim.lua"));
    let mut reclaim = script.prepare_invoke();
    let process = session.split('.').next().unwrap();
    for key in [
        key("s"),
        key("l"),
        key("h"),
        key("x"),
        held_key.clone(),
        key("r"),
        key("bell"),
        format!("{{{process}}}:alive"),
    ] {
        reclaim.key(key);
    }
    let count: i64 = reclaim
        .arg(session)
        .arg(1)
        .arg(60_000)
        .arg(60_000)
        .invoke_async(&mut plain)
        .await
        .unwrap();
    assert_eq!(count, 1);
    let stolen = tokio::select! {
        stolen = delivery(&mut *second) => stolen,
        stolen = delivery(&mut *subscription) => stolen,
    };
    assert_eq!(stolen.attempt, 2);
    within("the lease is cancelled", held.lease().cancelled()).await;
    let id = held.request.id.clone();
    let error = within(
        "settle",
        held.reply(Some(Reply::value(id.clone(), &b"late"[..]))),
    )
    .await
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LostLease);
    within("reply", stolen.reply(Some(Reply::value(id, &b"good"[..]))))
        .await
        .unwrap();
    assert_eq!(&reply(&mut *inbox).await.body[..], b"good");
}

#[tokio::test]
async fn the_work_of_a_dead_server_comes_back_after_its_lease() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let (server, client) = (connect(&broker).await, broker.connect().await);
    let service = fresh_service();
    let inbox = client.open_inbox().await.unwrap();
    for body in ["one", "two", "three"] {
        send(&client, &service, request(&inbox.address(), BUDGET, body))
            .await
            .unwrap();
    }
    // A server that takes two and is never heard of again.
    let mut plain = broker.plain().await;
    let key = |suffix: &str| format!("{{{service}}}:{suffix}");
    let join = Script::new(include_str!("../src/lua/join.lua"));
    let mut join = join.prepare_invoke();
    let dead = format!("{service}-dead");
    join.key(key("s")).key(key("l")).key(key("x"));
    join.key(format!("{{{dead}}}:alive"));
    join.arg(&dead)
        .arg("shared")
        .arg("")
        .arg("")
        .arg(60_000)
        .arg(LEASE.as_millis() as u64)
        .arg(9_000_000_000_000_u64);
    let _: i64 = join.invoke_async(&mut plain).await.unwrap();
    let claim = Script::new(include_str!("../src/lua/claim.lua"));
    let mut claim = claim.prepare_invoke();
    claim
        .key(key("l"))
        .key(key("q"))
        .key(key("r"))
        .key(key(&format!("p:{dead}")))
        .key(key("bell"))
        .key(key("h"));
    let taken: Vec<redis::Value> = claim
        .arg(&dead)
        .arg(2)
        .arg(0)
        .arg(1)
        .arg(60_000)
        .arg(1)
        .invoke_async(&mut plain)
        .await
        .unwrap();
    let frames = taken.last().and_then(redis::Value::as_sequence);
    assert_eq!(frames.map(<[_]>::len), Some(2));
    let died = Instant::now();
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(8))
        .await
        .unwrap();
    let fresh = delivery(&mut *subscription).await;
    assert_eq!((fresh.attempt, &fresh.request.body[..]), (1, &b"three"[..]));
    within("done", fresh.reply(None)).await.unwrap();
    // One at a time, with nothing beside it.
    for body in ["one", "two"] {
        let back = delivery(&mut *subscription).await;
        assert_eq!((back.attempt, &back.request.body[..]), (2, body.as_bytes()));
        assert!(
            died.elapsed() < LEASE + Duration::from_secs(1),
            "{:?}",
            died.elapsed()
        );
        within("done", back.reply(None)).await.unwrap();
    }
}

#[tokio::test]
async fn nobody_serves_as_soon_as_the_last_server_stopped() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let (server, client) = (broker.connect().await, broker.connect().await);
    let service = fresh_service();
    let inbox = client.open_inbox().await.unwrap();
    let ask = || async {
        let (service, ticket) = (service.clone(), Ticket::new());
        let request = request(&inbox.address(), BUDGET, &b"x"[..]).into();
        within(
            "send",
            client.send(Outbound::Request {
                service,
                request,
                expect_responder: true,
                ticket,
            }),
        )
        .await
    };
    let error = ask().await.unwrap_err();
    assert_eq!(
        (error.kind(), error.executed()),
        (ErrorKind::NoResponder, Executed::No)
    );
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(1))
        .await
        .unwrap();
    ask().await.unwrap();
    within("stop", subscription.stop()).await;
    assert!(matches!(
        subscription.recv().await,
        SubscriptionEvent::Closed(_)
    ));
    assert_eq!(ask().await.unwrap_err().kind(), ErrorKind::NoResponder);
    let mut plain = broker.plain().await;
    let queued: usize = plain.llen(format!("{{{service}}}:q")).await.unwrap();
    assert_eq!(queued, 1, "what was taken and not received went back");
}

#[tokio::test]
async fn one_owner_and_the_next_one_at_once_after_it_stopped() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let (one, two) = (connect(&broker).await, connect(&broker).await);
    let service = fresh_service();
    let mut owner = one
        .subscribe(&service, SubscribeOptions::exclusive(1))
        .await
        .unwrap();
    for options in [SubscribeOptions::exclusive(1), SubscribeOptions::shared(1)] {
        let error = within("refused", two.subscribe(&service, options))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyOwned);
    }
    tokio::time::sleep(LEASE * 2).await;
    assert_eq!(
        two.subscribe(&service, SubscribeOptions::exclusive(1))
            .await
            .unwrap_err()
            .kind(),
        ErrorKind::AlreadyOwned
    );
    within("stop", owner.stop()).await;
    let _next = two
        .subscribe(&service, SubscribeOptions::exclusive(1))
        .await
        .unwrap();
    let error = one
        .subscribe(&service, SubscribeOptions::exclusive(1))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyOwned);
    within("close", two.close()).await;
    one.subscribe(&service, SubscribeOptions::shared(1))
        .await
        .unwrap();
}

//! Brokers that are unfit, full or forgetful, and what is left on them.

mod support;

use std::time::{Duration, Instant};

use antiphon_core::transport::SubscribeOptions;
use antiphon_core::{ErrorKind, Executed, Reply, ReplyAddress, Transport};
use antiphon_redis::{RedisConfig, RedisTransport};
use redis::AsyncCommands;

use support::{
    BUDGET, Broker, LEASE, connect, delivery, fresh_service, reply, request, send, within,
};

#[tokio::test]
async fn a_broker_that_may_evict_is_refused_unless_that_is_accepted() {
    let Some(broker) = Broker::private(&["--maxmemory-policy", "allkeys-lru"]).await else {
        return;
    };
    let error = RedisTransport::connect(broker.config()).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.executed()),
        (ErrorKind::Broker, Executed::No)
    );
    assert!(error.message().contains("allkeys-lru"), "{error}");
    let mut config = broker.config();
    config.allow_eviction = true;
    RedisTransport::connect(config).await.unwrap();
}

#[tokio::test]
async fn wrong_credentials_fail_at_once_and_are_not_shown() {
    let Some(broker) = Broker::private(&["--requirepass", "right"]).await else {
        return;
    };
    for place in ["wr0ng@", "ann:wr0ng@", ""] {
        let place = if place.starts_with('w') {
            format!(":{place}")
        } else {
            place.to_owned()
        };
        let url = broker.url.replace("redis://", &format!("redis://{place}"));
        let started = Instant::now();
        let error = RedisTransport::connect(RedisConfig::from_url(&url).unwrap())
            .await
            .unwrap_err();
        assert_eq!(
            (error.kind(), error.executed()),
            (ErrorKind::Connect, Executed::No),
            "{error}"
        );
        assert!(!format!("{error:?}").contains("wr0ng"), "{error:?}");
        assert!(started.elapsed() < Duration::from_secs(1));
    }
}

#[tokio::test]
async fn a_full_broker_refuses_requests_and_drains() {
    let Some(broker) = Broker::private(&["--maxmemory", "64mb"]).await else {
        return;
    };
    let (server, client) = (connect(&broker).await, broker.connect().await);
    let service = fresh_service();
    let mut inbox = client.open_inbox().await.unwrap();
    send(
        &client,
        &service,
        request(&inbox.address(), BUDGET, &b"small"[..]),
    )
    .await
    .unwrap();
    send(
        &client,
        &service,
        request(&inbox.address(), BUDGET, vec![7; 100_000]),
    )
    .await
    .unwrap();
    let mut plain = broker.plain().await;
    let _: () = redis::cmd("CONFIG")
        .arg("SET")
        .arg("maxmemory")
        .arg(1)
        .query_async(&mut plain)
        .await
        .unwrap();
    for size in [10, 100_000] {
        let error = send(
            &client,
            &service,
            request(&inbox.address(), BUDGET, vec![0; size]),
        )
        .await
        .unwrap_err();
        assert_eq!(
            (error.kind(), error.executed()),
            (ErrorKind::Overloaded, Executed::No),
            "{error}"
        );
    }
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(1))
        .await
        .unwrap();
    for size in [5, 100_000] {
        let delivery = delivery(&mut *subscription).await;
        assert_eq!(delivery.request.body.len(), size);
        tokio::time::sleep(LEASE * 2).await;
        let answer = Reply::value(delivery.request.id.clone(), vec![9; size]);
        within("reply", delivery.reply(Some(answer))).await.unwrap();
        assert_eq!(reply(&mut *inbox).await.body.len(), size);
    }
}

#[tokio::test]
async fn scripts_that_were_flushed_are_loaded_again() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let (server, client) = (connect(&broker).await, broker.connect().await);
    let service = fresh_service();
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(4))
        .await
        .unwrap();
    let mut inbox = client.open_inbox().await.unwrap();
    let mut plain = broker.plain().await;
    for _ in 0..3 {
        let _: () = redis::cmd("SCRIPT")
            .arg("FLUSH")
            .query_async(&mut plain)
            .await
            .unwrap();
        send(
            &client,
            &service,
            request(&inbox.address(), BUDGET, &b"x"[..]),
        )
        .await
        .unwrap();
        let delivery = delivery(&mut *subscription).await;
        assert_eq!(delivery.attempt, 1);
        let _: () = redis::cmd("SCRIPT")
            .arg("FLUSH")
            .query_async(&mut plain)
            .await
            .unwrap();
        // Long enough for the lease to be renewed by a script that is gone.
        tokio::time::sleep(LEASE + LEASE / 2).await;
        assert!(!delivery.lease().is_cancelled());
        let answer = Reply::value(delivery.request.id.clone(), &b"y"[..]);
        within("reply", delivery.reply(Some(answer))).await.unwrap();
        assert_eq!(&reply(&mut *inbox).await.body[..], b"y");
    }
}

#[tokio::test]
async fn nothing_is_left_on_the_broker() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let mut config = broker.config();
    config.inbox_ttl = Duration::from_millis(500);
    let client = RedisTransport::connect(config).await.unwrap();
    let inbox = client.open_inbox().await.unwrap();
    for size in [10, 100_000] {
        send(
            &client,
            &fresh_service(),
            request(&inbox.address(), Duration::from_millis(300), vec![0; size]),
        )
        .await
        .unwrap();
    }
    let mut plain = broker.plain().await;
    // While it is used it stays, for many times its time to live.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let keys: Vec<String> = plain.keys("*").await.unwrap();
    assert_eq!(keys, [format!("{}:e", inbox.address().as_str())]);
    drop(inbox);
    within("the inbox goes", async {
        while !plain.keys::<_, Vec<String>>("*").await.unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    within("close", client.close()).await;
    let late = request(&ReplyAddress::new("{a}:i").unwrap(), BUDGET, "x");
    assert_eq!(
        send(&client, &fresh_service(), late)
            .await
            .unwrap_err()
            .kind(),
        ErrorKind::Closed
    );
}

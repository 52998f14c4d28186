//! What is left of those who go without a word, and what stays for those who come back.

mod support;

use std::time::{Duration, Instant};

use antiphon_core::transport::{Outbound, SubscribeOptions, SubscriptionEvent};
use antiphon_core::{Deadline, ErrorKind, Executed, Request, Ticket, Transport};
use antiphon_redis::RedisTransport;
use redis::AsyncCommands;

use support::{BUDGET, Broker, LEASE, delivery, fresh_service, request, send, within};

async fn connect(broker: &Broker, lease: Duration) -> RedisTransport {
    let mut config = broker.config();
    config.lease = lease;
    RedisTransport::connect(config).await.unwrap()
}

#[tokio::test]
async fn an_owner_whose_runtime_is_gone_loses_its_lease() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let service = fresh_service();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let config = {
        let mut config = broker.config();
        config.lease = LEASE;
        config
    };
    let name = service.clone();
    let opening = runtime.spawn(async move {
        let server = RedisTransport::connect(config).await.unwrap();
        let owner = server
            .subscribe(&name, SubscribeOptions::exclusive(1))
            .await;
        (server, owner.unwrap())
    });
    let abandoned = within("subscribed", opening).await.unwrap();
    runtime.shutdown_background();
    let next = connect(&broker, LEASE).await;
    let gone = Instant::now();
    let _owner = within("the next owner", async {
        loop {
            match next
                .subscribe(&service, SubscribeOptions::exclusive(1))
                .await
            {
                Ok(owner) => return owner,
                Err(error) => assert_eq!(error.kind(), ErrorKind::AlreadyOwned),
            }
            assert!(gone.elapsed() < LEASE * 4, "the lease is still renewed");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    drop(abandoned);
}

#[tokio::test]
async fn a_subscription_that_nobody_waits_for_owns_nothing() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let one = connect(&broker, Duration::from_secs(10)).await;
    let two = connect(&broker, Duration::from_secs(10)).await;
    let mut plain = broker.plain().await;
    for _ in 0..5 {
        let service = fresh_service();
        // It is asked for, and the answer takes longer than the caller's patience.
        let _: () = redis::cmd("CLIENT")
            .arg("PAUSE")
            .arg(200)
            .arg("WRITE")
            .query_async(&mut plain)
            .await
            .unwrap();
        let subscribing = one.subscribe(&service, SubscribeOptions::exclusive(1));
        let inbox = one.open_inbox();
        let both = futures_util::future::join(subscribing, inbox);
        let given_up = tokio::time::timeout(Duration::from_millis(50), both).await;
        assert!(given_up.is_err(), "the broker stood still");
        let started = Instant::now();
        within("the service is free", async {
            while let Err(error) = two
                .subscribe(&service, SubscribeOptions::exclusive(1))
                .await
            {
                assert_eq!(error.kind(), ErrorKind::AlreadyOwned);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        assert!(
            started.elapsed() < Duration::from_secs(3),
            "{:?}",
            started.elapsed()
        );
    }
    within("no inbox is left", async {
        while !plain
            .keys::<_, Vec<String>>("*:i:e")
            .await
            .unwrap()
            .is_empty()
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_queue_lives_as_long_as_its_longest_request_from_its_first_push_on() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let client = broker.connect().await;
    let inbox = client.open_inbox().await.unwrap();
    let service = fresh_service();
    let mut plain = broker.plain().await;
    let queue = format!("{{{service}}}:q");
    let left = |mut plain: redis::aio::MultiplexedConnection| {
        let queue = queue.clone();
        async move { plain.pttl::<_, i64>(queue).await.unwrap() }
    };
    send(&client, &service, request(&inbox.address(), BUDGET, "x"))
        .await
        .unwrap();
    let short = left(plain.clone()).await;
    assert!(
        (1..=BUDGET.as_millis() as i64 + 62_000).contains(&short),
        "{short}"
    );
    let day = Duration::from_secs(24 * 3600).as_millis() as i64;
    let hours = Request::new(Deadline::after(Duration::from_secs(7200)), "longer");
    send(&client, &service, hours).await.unwrap();
    let long = left(plain.clone()).await;
    assert!((7_000_000..=7_300_000).contains(&long), "{long}");
    // Whatever the queue's time to live, it stays while somebody serves.
    let server = connect(&broker, LEASE).await;
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(1))
        .await
        .unwrap();
    let held = delivery(&mut *subscription).await;
    let _: () = plain.pexpire(&queue, 800).await.unwrap();
    within("protected", async {
        while left(plain.clone()).await < day - 60_000 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    within("done", held.reply(None)).await.unwrap();
    assert_eq!(
        &delivery(&mut *subscription).await.request.body[..],
        b"longer"
    );
}

#[tokio::test]
async fn what_was_written_and_not_answered_at_close_may_have_been_executed() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let client = broker.connect().await;
    let inbox = client.open_inbox().await.unwrap();
    let service = fresh_service();
    broker.signal("-STOP");
    let ticket = Ticket::new();
    let sending = client.send(Outbound::Request {
        service,
        request: request(&inbox.address(), BUDGET, "x").into(),
        expect_responder: false,
        ticket: ticket.clone(),
    });
    let closing = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!ticket.withdraw(), "it was written");
        client.close().await;
    };
    let started = Instant::now();
    let (sent, ()) = within("closed", async {
        tokio::join!(
            async {
                let sent = sending.await;
                assert!(started.elapsed() < Duration::from_secs(3));
                sent
            },
            closing
        )
    })
    .await;
    let error = sent.unwrap_err();
    assert_eq!(
        (error.kind(), error.executed()),
        (ErrorKind::Closed, Executed::Maybe),
        "{error}"
    );
    broker.signal("-CONT");
}

#[tokio::test]
async fn a_body_that_cannot_be_fetched_does_not_hold_up_the_end() {
    let Some(mut broker) = Broker::private(&[]).await else {
        return;
    };
    let (server, client) = (connect(&broker, LEASE).await, connect(&broker, LEASE).await);
    let service = fresh_service();
    let mut plain = broker.plain().await;
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(1))
        .await
        .unwrap();
    let inbox = client.open_inbox().await.unwrap();
    // The body is read by a command of its own, which is refused for now.
    let acl = |rule: &'static str| {
        let mut command = redis::cmd("ACL");
        command.arg("SETUSER").arg("default").arg(rule);
        command
    };
    let _: () = acl("-get").query_async(&mut plain).await.unwrap();
    send(
        &client,
        &service,
        request(&inbox.address(), BUDGET, vec![0; 100_000]),
    )
    .await
    .unwrap();
    broker
        .restart_with(async {
            within("stop", subscription.stop()).await;
        })
        .await;
    assert!(matches!(
        subscription.recv().await,
        SubscriptionEvent::Closed(_)
    ));
}

#[tokio::test]
async fn the_body_of_a_dead_letter_goes_with_it() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let mut config = broker.config();
    config.dead_letters = 1;
    let server = RedisTransport::connect(config).await.unwrap();
    let client = broker.connect().await;
    let service = fresh_service();
    let mut plain = broker.plain().await;
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(1))
        .await
        .unwrap();
    let inbox = client.open_inbox().await.unwrap();
    for byte in [b'a', b'b', b'c'] {
        let body = vec![byte; 100_000];
        send(
            &client,
            &service,
            request(&inbox.address(), BUDGET, body.clone()),
        )
        .await
        .unwrap();
        let delivery = delivery(&mut *subscription).await;
        within("bury", delivery.dead_letter("why".to_owned(), None))
            .await
            .unwrap();
        let bodies: Vec<String> = plain.keys(format!("{{{service}}}:b:*")).await.unwrap();
        let [only] = &bodies[..] else {
            panic!("{bodies:?}")
        };
        assert_eq!(plain.get::<_, Vec<u8>>(only).await.unwrap(), body);
    }
}

/// The key by which the only process that serves shows that it lives.
async fn only_sign_of_life(plain: &mut redis::aio::MultiplexedConnection) -> String {
    let mut signs: Vec<String> = plain.keys("*:alive").await.unwrap();
    assert_eq!(signs.len(), 1, "{signs:?}");
    signs.remove(0)
}

#[tokio::test]
async fn a_process_that_was_taken_for_dead_is_there_again_unless_somebody_acted_on_it() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let (server, client) = (connect(&broker, LEASE).await, connect(&broker, LEASE).await);
    let (kept, ended) = (fresh_service(), fresh_service());
    let mut hears = server.open_inbox().await.unwrap();
    let mut subscriptions = Vec::new();
    for service in [&kept, &ended] {
        hears.join(service).await.unwrap();
        let options = SubscribeOptions::exclusive(1);
        subscriptions.push(server.subscribe(service, options).await.unwrap());
    }
    let mut plain = broker.plain().await;
    let sign = only_sign_of_life(&mut plain).await;
    // Past the first renewals.
    within("steady", async {
        while plain.get::<_, String>(&sign).await.unwrap() != "1" {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    tokio::time::sleep(LEASE).await;
    // It hung for long enough, and somebody found that out: at once, for it signs again soon.
    let sessions = format!("{{{ended}}}:s");
    let (heard, inbox) = (format!("{{{kept}}}:a"), hears.address());
    let (): () = redis::pipe()
        .atomic()
        .del(&[&sign, &sessions])
        .ignore()
        .zrem(heard, inbox.as_str())
        .ignore()
        .query_async(&mut plain)
        .await
        .unwrap();
    within("the session is replaced", async {
        while !plain.exists::<_, bool>(&sessions).await.unwrap() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let number: u64 = plain.hget(format!("{{{kept}}}:x"), "number").await.unwrap();
    assert_eq!(number, 1, "the other one kept its session");
    within("it is heard again", async {
        loop {
            let word = request(&hears.address(), Duration::from_secs(1), "heard");
            if client.broadcast(&kept, word).await.unwrap() == Some(1) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    let asked = request(&hears.address(), BUDGET, "x");
    send(&client, &ended, asked).await.unwrap();
    let next = delivery(&mut *subscriptions[1]).await;
    within("done", next.reply(None)).await.unwrap();
}

#[tokio::test]
async fn a_process_that_is_gone_serves_nothing_and_hears_nothing_after_its_lease() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let client = connect(&broker, LEASE).await;
    let inbox = client.open_inbox().await.unwrap();
    let service = fresh_service();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (config, name) = (
        {
            let mut config = broker.config();
            config.lease = LEASE;
            config
        },
        service.clone(),
    );
    let opening = runtime.spawn(async move {
        let server = RedisTransport::connect(config).await.unwrap();
        let mut inbox = server.open_inbox().await.unwrap();
        inbox.join(&name).await.unwrap();
        let options = SubscribeOptions::shared(1);
        let subscription = server.subscribe(&name, options).await.unwrap();
        (server, inbox, subscription)
    });
    let abandoned = within("serving", opening).await.unwrap();
    let ask = || async {
        let (service, ticket) = (service.clone(), Ticket::new());
        let request = request(&inbox.address(), BUDGET, "x");
        client
            .send(Outbound::Request {
                service,
                request: request.into(),
                expect_responder: true,
                ticket,
            })
            .await
    };
    let say = || client.broadcast(&service, request(&inbox.address(), BUDGET, "word"));
    within("served", ask()).await.unwrap();
    assert_eq!(within("heard", say()).await.unwrap(), Some(1));
    runtime.shutdown_background();
    let gone = Instant::now();
    within("nobody hears it", async {
        while say().await.unwrap() == Some(1) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert!(gone.elapsed() < LEASE + Duration::from_secs(1));
    let error = within("nobody serves", ask()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoResponder);
    drop(abandoned);
}

#[tokio::test]
async fn idle_sessions_of_the_dead_are_cleared_away() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let server = connect(&broker, LEASE).await;
    let service = fresh_service();
    let mut plain = broker.plain().await;
    let sessions = format!("{{{service}}}:s");
    let _: () = plain.sadd(&sessions, &["gone.1", "gone.2"]).await.unwrap();
    let _subscription = server
        .subscribe(&service, SubscribeOptions::shared(1))
        .await
        .unwrap();
    within("one session is left", async {
        while plain.scard::<_, usize>(&sessions).await.unwrap() != 1 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn an_owner_that_lives_keeps_its_number_and_a_dead_one_leaves_none() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let server = connect(&broker, LEASE).await;
    let service = fresh_service();
    let mut plain = broker.plain().await;
    let _owner = server
        .subscribe(&service, SubscribeOptions::exclusive(1))
        .await
        .unwrap();
    let key = format!("{{{service}}}:x");
    let left: i64 = plain.pttl(&key).await.unwrap();
    assert!(left > 0, "{left}");
    let _: () = plain.pexpire(&key, 20_000).await.unwrap();
    within("a renewal", async {
        while plain.pttl::<_, i64>(&key).await.unwrap() <= 20_000 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

/// Many idle services of one server: they are seen to one at a time as long as nothing is the matter.
async fn many(
    server: &RedisTransport,
    options: SubscribeOptions,
) -> Vec<(
    antiphon_core::ServiceName,
    Box<dyn antiphon_core::transport::Subscription>,
)> {
    let mut all = Vec::new();
    for _ in 0..30 {
        let service = fresh_service();
        let subscription = server.subscribe(&service, options).await.unwrap();
        all.push((service, subscription));
    }
    all
}

#[tokio::test]
async fn sessions_that_redis_lost_are_there_again_soon_whatever_the_sign_of_life_says() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let lease = Duration::from_secs(3);
    let server = connect(&broker, lease).await;
    let services = many(&server, SubscribeOptions::shared(1)).await;
    let keys: Vec<_> = services
        .iter()
        .map(|(service, _)| format!("{{{service}}}:s"))
        .collect();
    let mut plain = broker.plain().await;
    let sign = only_sign_of_life(&mut plain).await;
    let mut hears = server.open_inbox().await.unwrap();
    let all_are_back = async |plain: &mut redis::aio::MultiplexedConnection| {
        let lost = Instant::now();
        within("all are registered again", async {
            while plain.exists::<_, usize>(&keys).await.unwrap() < keys.len() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
        assert!(lost.elapsed() < lease, "{:?}", lost.elapsed());
    };
    // Before it was ever renewed; an inbox that joins makes the sign of life again.
    let _: () = redis::cmd("FLUSHALL")
        .query_async(&mut plain)
        .await
        .unwrap();
    hears.join(&services[0].0).await.unwrap();
    all_are_back(&mut plain).await;
    within("steady", async {
        while plain
            .get::<_, Option<String>>(&sign)
            .await
            .unwrap()
            .as_deref()
            != Some("1")
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    // As if a renewal had been executed whose answer was lost.
    let mut lost = redis::pipe();
    lost.atomic().cmd("FLUSHALL").ignore();
    lost.cmd("SET").arg(&sign).arg("1").ignore();
    lost.cmd("PEXPIRE").arg(&sign).arg(3000).ignore();
    let _: () = lost.query_async(&mut plain).await.unwrap();
    let _: usize = redis::cmd("CLIENT")
        .arg("KILL")
        .arg("TYPE")
        .arg("normal")
        .query_async(&mut plain)
        .await
        .unwrap();
    all_are_back(&mut plain).await;
}

#[tokio::test]
async fn an_idle_owner_hears_within_a_third_of_its_lease_that_it_was_fenced_off() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let lease = Duration::from_secs(3);
    let (server, newcomer) = (connect(&broker, lease).await, connect(&broker, lease).await);
    let mut owned = many(&server, SubscribeOptions::exclusive(1)).await;
    let mut plain = broker.plain().await;
    let sign = only_sign_of_life(&mut plain).await;
    within("steady", async {
        while plain
            .get::<_, Option<String>>(&sign)
            .await
            .unwrap()
            .as_deref()
            != Some("1")
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let mut taken = Vec::new();
    for (service, _) in owned.iter().take(10) {
        let options = SubscribeOptions::take_over(1);
        taken.push(
            within("taken", newcomer.subscribe(service, options))
                .await
                .unwrap(),
        );
    }
    let since = Instant::now();
    for (_, subscription) in owned.iter_mut().take(10) {
        let SubscriptionEvent::Closed(error) = within("the end", subscription.recv()).await else {
            panic!("a delivery")
        };
        assert_eq!(error.kind(), ErrorKind::AlreadyOwned);
    }
    assert!(since.elapsed() < lease * 2 / 3, "{:?}", since.elapsed());
}

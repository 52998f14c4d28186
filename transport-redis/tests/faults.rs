//! What goes wrong, and what becomes of the requests.

mod support;

use std::time::{Duration, Instant};

use antiphon_core::transport::{
    ConnectionState, InboxEvent, Incoming, Outbound, SubscribeOptions, SubscriptionEvent,
};
use antiphon_core::{Code, ErrorKind, Executed, Outcome, Reply, ReplyAddress, Ticket, Transport};
use antiphon_redis::{RedisConfig, RedisTransport};
use redis::{AsyncCommands, Script};

use support::{Broker, delivery, fresh_service, reply, request, send, within};

const BUDGET: Duration = Duration::from_secs(20);
const LEASE: Duration = Duration::from_millis(600);

async fn connect(broker: &Broker) -> RedisTransport {
    let mut config = broker.config();
    config.lease = LEASE;
    RedisTransport::connect(config).await.unwrap()
}

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

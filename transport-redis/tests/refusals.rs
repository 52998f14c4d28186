//! What Redis refuses, for a while or for good, and what becomes of the requests.

mod support;

use std::time::{Duration, Instant};

use antiphon_core::transport::{InboxEvent, Incoming, SubscribeOptions};
use antiphon_core::{Reply, Transport};
use antiphon_redis::RedisTransport;
use redis::AsyncCommands;
use redis::aio::MultiplexedConnection;

use support::{
    BUDGET, Broker, LEASE, deliveries, delivery, fresh_service, reply, request, send, within,
};

async fn configure(plain: &mut MultiplexedConnection, name: &str, value: &str) {
    let _: () = redis::cmd("CONFIG")
        .arg("SET")
        .arg(name)
        .arg(value)
        .query_async(plain)
        .await
        .unwrap();
}

async fn error_replies(plain: &mut MultiplexedConnection) -> u64 {
    let info: String = redis::cmd("INFO")
        .arg("stats")
        .query_async(plain)
        .await
        .unwrap();
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("total_error_replies:"));
    line.unwrap().trim().parse().unwrap()
}

#[tokio::test]
async fn writes_that_are_refused_for_a_while_cost_nothing() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let (server, client) = (broker.connect().await, broker.connect().await);
    let service = fresh_service();
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::exclusive(8))
        .await
        .unwrap();
    let mut inbox = client.open_inbox().await.unwrap();
    let mut held = Vec::new();
    for body in ["a", "b", "c", "d"] {
        send(&client, &service, request(&inbox.address(), BUDGET, body))
            .await
            .unwrap();
        held.push(delivery(&mut *subscription).await);
    }
    let mut plain = broker.plain().await;
    configure(&mut plain, "min-replicas-to-write", "1").await;
    let before = error_replies(&mut plain).await;
    let settling: Vec<_> = held
        .into_iter()
        .map(|held| {
            let answer = Reply::value(held.request.id.clone(), held.request.body.clone());
            tokio::spawn(held.reply(Some(answer)))
        })
        .collect();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let refused = error_replies(&mut plain).await - before;
    assert!(
        (1..150).contains(&refused),
        "{refused} refusals in two seconds"
    );
    configure(&mut plain, "min-replicas-to-write", "0").await;
    for settling in settling {
        within("settled", settling).await.unwrap().unwrap();
    }
    let mut replies = 0;
    while replies < 4 {
        let InboxEvent::Replies(page) = within("replies", inbox.recv()).await else {
            panic!("the inbox was lost")
        };
        replies += page.len();
    }
    let left: Vec<String> = plain.keys("*:p:*").await.unwrap();
    assert!(left.is_empty(), "{left:?}");
    send(&client, &service, request(&inbox.address(), BUDGET, "next"))
        .await
        .unwrap();
    let next = delivery(&mut *subscription).await;
    let answer = Reply::value(next.request.id.clone(), "next");
    within("reply", next.reply(Some(answer))).await.unwrap();
    assert_eq!(&reply(&mut *inbox).await.body[..], b"next");
}

#[tokio::test]
async fn what_can_never_be_settled_goes_back_counted() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let (server, client) = (broker.connect().await, broker.connect().await);
    let service = fresh_service();
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(8))
        .await
        .unwrap();
    let inbox = client.open_inbox().await.unwrap();
    let mut plain = broker.plain().await;
    let dead = format!("{{{service}}}:dead");
    let _: () = plain.set(&dead, "not a list").await.unwrap();
    send(&client, &service, request(&inbox.address(), BUDGET, "x"))
        .await
        .unwrap();
    let first = delivery(&mut *subscription).await;
    within("bury", first.dead_letter("why".to_owned(), None))
        .await
        .unwrap_err();
    let second = delivery(&mut *subscription).await;
    assert_eq!(second.attempt, 2);
    // Neither settled nor given back: only the end of the session helps.
    let acl = |rule: &'static str| {
        let mut command = redis::cmd("ACL");
        command.arg("SETUSER").arg("default").arg(rule);
        command
    };
    let _: () = acl("-hdel").query_async(&mut plain).await.unwrap();
    within("reply", second.reply(None)).await.unwrap_err();
    let third = delivery(&mut *subscription).await;
    assert_eq!(third.attempt, 3);
    let _: () = acl("+hdel").query_async(&mut plain).await.unwrap();
    within("reply", third.reply(None)).await.unwrap();
    let left: Vec<String> = plain.keys("*:p:*").await.unwrap();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn one_reply_that_cannot_be_settled_costs_its_batch_nothing() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let (server, client) = (broker.connect().await, broker.connect().await);
    let service = fresh_service();
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(8))
        .await
        .unwrap();
    let inbox = client.open_inbox().await.unwrap();
    let mut plain = broker.plain().await;
    // Replies to this one need a right that is taken away.
    let secret = antiphon_core::ReplyAddress::new("{secret}:i").unwrap();
    for to in [&secret, &inbox.address()] {
        send(&client, &service, request(to, BUDGET, "x"))
            .await
            .unwrap();
    }
    let mut held = Vec::new();
    while held.len() < 2 {
        held.extend(deliveries(&mut *subscription).await);
    }
    let _: () = redis::cmd("ACL")
        .arg("SETUSER")
        .arg("default")
        .arg("resetkeys")
        .arg(format!("~{{{service}}}:*"))
        .arg(format!("~{}*", inbox.address().as_str()))
        .query_async(&mut plain)
        .await
        .unwrap();
    let settle = held.into_iter().map(|held| {
        let answer = Reply::value(held.request.id.clone(), "y");
        let is_secret = held.request.reply_to.as_ref() == Some(&secret);
        async move { (is_secret, held.reply(Some(answer)).await) }
    });
    for (is_secret, result) in within("settled", futures_util::future::join_all(settle)).await {
        assert_eq!(result.is_err(), is_secret, "{result:?}");
    }
    assert_eq!(delivery(&mut *subscription).await.attempt, 2);
}

#[tokio::test]
async fn scripts_that_are_flushed_cost_no_reply_of_a_plain_responder() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let mut config = broker.config();
    // It acknowledges several times a second.
    config.inbox_ttl = Duration::from_millis(400);
    let client = RedisTransport::connect(config).await.unwrap();
    let mut inbox = client.open_inbox().await.unwrap();
    let list = inbox.address().as_str().to_owned();
    let mut plain = broker.plain().await;
    let writing = tokio::spawn(async move {
        for number in 0..200 {
            let mut pipeline = redis::pipe();
            if number % 3 == 0 {
                pipeline.cmd("SCRIPT").arg("FLUSH").ignore();
            }
            let frame = format!("{{\"v\":1,\"id\":\"{number}\"}}\n");
            pipeline.rpush(&list, frame).ignore();
            pipeline.zadd(format!("{list}:w"), "1", 0).ignore();
            let _: () = pipeline.query_async(&mut plain).await.unwrap();
            tokio::time::sleep(Duration::from_millis(7)).await;
        }
    });
    let mut missing: std::collections::BTreeSet<String> =
        (0..200).map(|number| number.to_string()).collect();
    let all = async {
        while !missing.is_empty() {
            let InboxEvent::Replies(page) = inbox.recv().await else {
                panic!("the inbox was lost")
            };
            for incoming in page {
                let Incoming::Reply(reply) = incoming else {
                    panic!("{incoming:?}")
                };
                missing.remove(&reply.id.to_string());
            }
        }
    };
    let done = tokio::time::timeout(Duration::from_secs(6), all).await;
    assert!(done.is_ok(), "never came: {missing:?}");
    writing.await.unwrap();
}

#[tokio::test]
async fn an_owner_whose_broker_stood_still_longer_than_its_lease_serves_again() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let mut config = broker.config();
    config.lease = LEASE;
    let server = RedisTransport::connect(config).await.unwrap();
    let client = broker.connect().await;
    for options in [SubscribeOptions::exclusive(4), SubscribeOptions::shared(4)] {
        let service = fresh_service();
        let mut subscription = server.subscribe(&service, options).await.unwrap();
        let inbox = client.open_inbox().await.unwrap();
        send(&client, &service, request(&inbox.address(), BUDGET, "held"))
            .await
            .unwrap();
        let held = delivery(&mut *subscription).await;
        broker.signal("-STOP");
        within("the lease is lost", held.lease().cancelled()).await;
        tokio::time::sleep(LEASE).await;
        broker.signal("-CONT");
        let back = delivery(&mut *subscription).await;
        assert_eq!((back.attempt, &back.request.body[..]), (2, &b"held"[..]));
        within("reply", back.reply(None)).await.unwrap();
        send(&client, &service, request(&inbox.address(), BUDGET, "next"))
            .await
            .unwrap();
        let next = delivery(&mut *subscription).await;
        within("reply", next.reply(None)).await.unwrap();
        within("stop", subscription.stop()).await;
    }
}

#[tokio::test]
async fn a_client_that_connects_again_while_memory_is_full_gets_its_replies() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let client = broker.connect().await;
    let mut inbox = client.open_inbox().await.unwrap();
    let mut plain = broker.plain().await;
    let list = inbox.address().as_str().to_owned();
    within("the reader waits", async {
        loop {
            let clients: String = redis::cmd("CLIENT")
                .arg("LIST")
                .query_async(&mut plain)
                .await
                .unwrap();
            if clients.contains("cmd=bzpopmin") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    // Without the bell, only a new connection finds it soon.
    let _: () = plain.rpush(&list, "{\"id\":\"7\"}\nfull").await.unwrap();
    configure(&mut plain, "maxmemory", "1").await;
    let started = Instant::now();
    let _: usize = redis::cmd("CLIENT")
        .arg("KILL")
        .arg("TYPE")
        .arg("normal")
        .query_async(&mut plain)
        .await
        .unwrap();
    assert_eq!(&reply(&mut *inbox).await.body[..], b"full");
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "{:?}",
        started.elapsed()
    );
}

/// The inboxes, bells and signs of life, whose names nobody knows in advance, and these services.
fn only_keys_of(services: &[&antiphon_core::ServiceName]) -> redis::Cmd {
    let mut command = redis::cmd("ACL");
    command.arg("SETUSER").arg("default").arg("resetkeys");
    command.arg("~{[0-9a-f]*}:*");
    for service in services {
        command.arg(format!("~{{{service}}}:*"));
    }
    command
}

#[tokio::test]
async fn a_service_that_is_refused_costs_the_others_no_lease() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let mut config = broker.config();
    config.lease = LEASE;
    let (server, client) = (
        RedisTransport::connect(config).await.unwrap(),
        broker.connect().await,
    );
    let (good, spoilt, secret) = (fresh_service(), fresh_service(), fresh_service());
    let options = SubscribeOptions::shared(1);
    let mut subscription = server.subscribe(&good, options).await.unwrap();
    let mut other = server.subscribe(&spoilt, options).await.unwrap();
    let inbox = client.open_inbox().await.unwrap();
    for (service, subscription) in [(&good, &mut subscription), (&spoilt, &mut other)] {
        send(&client, service, request(&inbox.address(), BUDGET, "x"))
            .await
            .unwrap();
        let first = delivery(&mut **subscription).await;
        within("done", first.reply(None)).await.unwrap();
    }
    send(&client, &good, request(&inbox.address(), BUDGET, "held"))
        .await
        .unwrap();
    let held = delivery(&mut *subscription).await;
    let mut plain = broker.plain().await;
    let _: () = only_keys_of(&[&good, &spoilt])
        .query_async(&mut plain)
        .await
        .unwrap();
    within("refused", server.subscribe(&secret, options))
        .await
        .unwrap_err();
    let _: () = plain
        .set(format!("{{{spoilt}}}:s"), "not a set")
        .await
        .unwrap();
    tokio::select! {
        () = held.lease().cancelled() => panic!("the lease is lost"),
        () = tokio::time::sleep(4 * LEASE) => {}
    }
    within("reply", held.reply(None)).await.unwrap();
}

/// How many clients Redis has, with the ids of those that wait for a bell.
async fn clients(plain: &mut MultiplexedConnection) -> (usize, Vec<String>) {
    let list: String = redis::cmd("CLIENT")
        .arg("LIST")
        .query_async(plain)
        .await
        .unwrap();
    let waiting = list.lines().filter(|line| line.contains("cmd=bzpopmin"));
    let id = |line: &str| Some(line.strip_prefix("id=")?.split_once(' ')?.0.to_owned());
    (list.lines().count(), waiting.filter_map(id).collect())
}

#[tokio::test]
async fn a_server_that_gets_no_more_connections_serves_on_those_it_has() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let (server, client) = (broker.connect().await, broker.connect().await);
    let (service, quiet) = (fresh_service(), fresh_service());
    let options = SubscribeOptions::shared(1);
    let mut subscription = server.subscribe(&service, options).await.unwrap();
    let mut idle = server.subscribe(&quiet, options).await.unwrap();
    let mut plain = broker.plain().await;
    within("the lobby waits", async {
        while clients(&mut plain).await.1.len() != 1 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let inbox = client.open_inbox().await.unwrap();
    let (_, lobby) = clients(&mut plain).await;
    // Nobody else gets in.
    configure(&mut plain, "maxclients", "1").await;
    let started = Instant::now();
    for _ in 0..20 {
        send(&client, &service, request(&inbox.address(), BUDGET, "x"))
            .await
            .unwrap();
        let next = delivery(&mut *subscription).await;
        within("done", next.reply(None)).await.unwrap();
    }
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "{:?}",
        started.elapsed()
    );
    // Not even the one for all.
    let _: usize = redis::cmd("CLIENT")
        .arg("KILL")
        .arg("ID")
        .arg(&lobby[0])
        .query_async(&mut plain)
        .await
        .unwrap();
    for (service, subscription) in [(&quiet, &mut idle), (&service, &mut subscription)] {
        send(&client, service, request(&inbox.address(), BUDGET, "x"))
            .await
            .unwrap();
        let next = delivery(&mut **subscription).await;
        within("done", next.reply(None)).await.unwrap();
    }
    configure(&mut plain, "maxclients", "1000").await;
}

/// How often a command was executed or refused.
async fn executed(plain: &mut MultiplexedConnection, command: &str) -> u64 {
    let info: String = redis::cmd("INFO")
        .arg("commandstats")
        .query_async(plain)
        .await
        .unwrap();
    let counts = info
        .lines()
        .find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")));
    let count = counts.and_then(|counts| counts.split(',').next());
    count.map_or(0, |count| count.parse().unwrap())
}

/// How often waiting for bells was refused.
async fn refused_waits(plain: &mut MultiplexedConnection) -> u64 {
    let info: String = redis::cmd("INFO")
        .arg("commandstats")
        .query_async(plain)
        .await
        .unwrap();
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("cmdstat_bzpopmin:"));
    // None if nobody has waited yet.
    let counts = line
        .unwrap_or_default()
        .trim()
        .split(',')
        .filter_map(|part| {
            let (name, count) = part.split_once('=')?;
            matches!(name, "rejected_calls" | "failed_calls").then(|| count.parse::<u64>().unwrap())
        });
    counts.sum()
}

#[tokio::test]
async fn a_bell_that_is_none_costs_the_others_nothing() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let (server, client) = (broker.connect().await, broker.connect().await);
    let (good, spoilt, secret) = (fresh_service(), fresh_service(), fresh_service());
    let options = SubscribeOptions::shared(1);
    let mut subscription = server.subscribe(&good, options).await.unwrap();
    let mut other = server.subscribe(&spoilt, options).await.unwrap();
    let _third = server.subscribe(&secret, options).await.unwrap();
    let inbox = client.open_inbox().await.unwrap();
    let mut plain = broker.plain().await;
    let _: () = plain
        .set(format!("{{{spoilt}}}:bell"), "not a bell")
        .await
        .unwrap();
    let _: () = only_keys_of(&[&good, &spoilt])
        .query_async(&mut plain)
        .await
        .unwrap();
    within("a refusal", async {
        while refused_waits(&mut plain).await == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    // It is found out which ones, and then nothing is refused for longer than one waits.
    within("three seconds without a refusal", async {
        let (mut refused, mut since) = (0, Instant::now());
        while since.elapsed() < Duration::from_secs(3) {
            let now = refused_waits(&mut plain).await;
            if now != refused {
                (refused, since) = (now, Instant::now());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    send(&client, &good, request(&inbox.address(), BUDGET, "x"))
        .await
        .unwrap();
    let next = delivery(&mut *subscription).await;
    within("done", next.reply(None)).await.unwrap();
    // It is served, if not at once.
    let queue = format!("{{{spoilt}}}:q");
    let _: () = plain.rpush(queue, "{\"id\":\"7\"}\nx").await.unwrap();
    let next = delivery(&mut *other).await;
    within("done", next.reply(None)).await.unwrap();
}

/// The rights in docs/operations.md, of a client and of a server: lines of keys and of commands.
fn rights(of: &str) -> Vec<String> {
    let text = include_str!("../../docs/operations.md");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(&format!("ACL SETUSER {of} on >PASSWORD ")));
    let rules = line.unwrap().split_whitespace();
    rules.map(str::to_owned).collect()
}

#[tokio::test]
async fn users_with_the_documented_rights_can_call_and_serve() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let mut plain = broker.plain().await;
    let service = fresh_service();
    let connect = async |name: &str, plain: &mut MultiplexedConnection| {
        let mut user = redis::cmd("ACL");
        user.arg("SETUSER").arg(name).arg("on").arg(">secret");
        for rule in rights(name) {
            user.arg(rule.replace("SERVICE", service.as_str()));
        }
        let _: () = user.query_async(plain).await.unwrap();
        let url = broker
            .url
            .replace("redis://", &format!("redis://{name}:secret@"));
        let mut config = antiphon_redis::RedisConfig::from_url(&url).unwrap();
        config.lease = LEASE;
        config.inline_body = 100;
        RedisTransport::connect(config).await.unwrap()
    };
    let client = connect("client", &mut plain).await;
    let server = connect("server", &mut plain).await;
    let mut hears = server.open_inbox().await.unwrap();
    hears.join(&service).await.unwrap();
    // Left by one that is gone.
    let key = |suffix: &str| format!("{{{service}}}:{suffix}");
    let gone = "gone.1";
    for registry in ["s", "l", "h"] {
        let _: () = plain.sadd(key(registry), gone).await.unwrap();
    }
    let left = "{\"id\":\"7\"}\nleft";
    let _: () = plain
        .hset(key(&format!("p:{gone}")), "1", left)
        .await
        .unwrap();
    let mut subscription = server
        .subscribe(&service, SubscribeOptions::shared(1))
        .await
        .unwrap();
    let back = delivery(&mut *subscription).await;
    assert_eq!(back.attempt, 2);
    within("done", back.reply(None)).await.unwrap();
    let mut inbox = client.open_inbox().await.unwrap();
    let address = inbox.address();
    let ask = async |body: &str| {
        let asked = request(&address, BUDGET, body.to_owned());
        let (id, ticket) = (asked.id.clone(), antiphon_core::Ticket::new());
        let message = antiphon_core::transport::Outbound::Request {
            service: service.clone(),
            request: asked.into(),
            expect_responder: true,
            ticket,
        };
        within("send", client.send(message)).await.unwrap();
        id
    };
    let large = "x".repeat(1000);
    ask(&large).await;
    let asked = delivery(&mut *subscription).await;
    let answer = Reply::value(asked.request.id.clone(), large.clone());
    // Taken back while another one is in hand.
    let id = ask(&large).await;
    let taken_back = within("withdraw", client.withdraw(&service, &id)).await;
    assert!(taken_back.unwrap());
    within("reply", asked.reply(Some(answer))).await.unwrap();
    assert_eq!(reply(&mut *inbox).await.body.len(), 1000);
    ask("dead").await;
    let asked = delivery(&mut *subscription).await;
    let fault = Reply::value(asked.request.id.clone(), "why");
    within("bury", asked.dead_letter("why".to_owned(), Some(fault)))
        .await
        .unwrap();
    assert_eq!(&reply(&mut *inbox).await.body[..], b"why");
    ask("dropped").await;
    drop(delivery(&mut *subscription).await);
    let back = delivery(&mut *subscription).await;
    assert_eq!(back.attempt, 2);
    within("done", back.reply(None)).await.unwrap();
    for body in [&large[..], "small"] {
        let word = request(&address, BUDGET, body.to_owned());
        let reached = within("a broadcast", client.broadcast(&service, word)).await;
        assert_eq!(reached.unwrap(), Some(1));
        let InboxEvent::Replies(heard) = within("heard", hears.recv()).await else {
            panic!("the inbox was lost")
        };
        assert!(
            matches!(&heard[..], [Incoming::Request { .. }]),
            "{heard:?}"
        );
    }
    within("stop", subscription.stop()).await;
    let owner = server
        .subscribe(&service, SubscribeOptions::exclusive(1))
        .await
        .unwrap();
    let other = connect("server", &mut plain).await;
    let _taken = other
        .subscribe(&service, SubscribeOptions::take_over(1))
        .await
        .unwrap();
    // Some renewals, and looks at all there is, of which only the monitors ask.
    let looks = executed(&mut plain, "srandmember").await + 30;
    within("some looks", async {
        while executed(&mut plain, "srandmember").await < looks {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    drop(owner);
    for transport in [&client, &server, &other] {
        within("close", transport.close()).await;
    }
    let refused: Vec<redis::Value> = redis::cmd("ACL")
        .arg("LOG")
        .query_async(&mut plain)
        .await
        .unwrap();
    assert!(refused.is_empty(), "{refused:?}");
}

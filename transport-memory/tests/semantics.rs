//! What the broker promises while nothing fails, seen through the transport alone.

mod support;

use std::time::Duration;

use antiphon_core::transport::{InboxEvent, Outbound, SubscribeOptions};
use antiphon_core::{
    Deadline, ErrorKind, Executed, Reply, ReplyAddress, Request, Ticket, Transport,
};
use antiphon_memory::{MemoryBroker, MemoryConfig, MemoryTransport};
use futures_util::FutureExt;
use support::*;
use tokio::time::{Instant, advance, sleep, sleep_until};

#[tokio::test(start_paused = true)]
async fn a_request_and_its_reply() {
    let broker = MemoryBroker::new();
    let (client, server) = (broker.connect(), broker.connect());
    let mut subscription = shared(&server, "fib", 4).await;
    let mut inbox = client.open_inbox().await.unwrap();
    send(&client, "fib", request_to(&*inbox, "30")).await;
    let delivery = delivery(&mut subscription).await;
    assert_eq!(
        (text(&delivery.request.body).as_str(), delivery.attempt),
        ("30", 1)
    );
    assert_eq!(counts(&broker, "fib"), (0, 1, 0));
    let reply = Reply::value(delivery.request.id.clone(), "832040");
    delivery.reply(Some(reply)).await.unwrap();
    assert_eq!(replies(&mut inbox).await, ["832040"]);
    assert_eq!(counts(&broker, "fib"), (0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_request_waits_for_a_server_and_a_server_for_a_request() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    send(&transport, "s", request("before")).await;
    let mut subscription = shared(&transport, "s", 1).await;
    echo(delivery(&mut subscription).await).await.unwrap();
    let later = {
        let transport = transport.clone();
        tokio::spawn(async move {
            sleep(Duration::from_secs(5)).await;
            send(&transport, "s", request("after")).await;
        })
    };
    assert_eq!(
        text(&delivery(&mut subscription).await.request.body),
        "after"
    );
    later.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn prefetch_is_taken_at_once_and_never_exceeded() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let mut subscription = shared(&transport, "s", 3).await;
    for body in ["1", "2", "3", "4", "5"] {
        send(&transport, "s", request(body)).await;
    }
    let mut held = deliveries(&mut subscription).await;
    assert_eq!(bodies(&held), ["1", "2", "3"]);
    assert!(is_quiet(&mut subscription));
    // A free hand wakes a server that waits with full ones.
    let settled = held.remove(1);
    let (more, ()) = tokio::join!(deliveries(&mut subscription), async {
        echo(settled).await.unwrap()
    });
    assert_eq!(bodies(&more), ["4"]);
    assert!(is_quiet(&mut subscription));
    assert_eq!(counts(&broker, "s"), (1, 3, 0));
}

#[tokio::test(start_paused = true)]
async fn a_server_whose_full_hands_are_freed_waits_for_new_requests() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let mut subscription = shared(&transport, "s", 1).await;
    send(&transport, "s", request("1")).await;
    let first = delivery(&mut subscription).await;
    let (second, ()) = tokio::join!(delivery(&mut subscription), async {
        echo(first).await.unwrap();
        send(&transport, "s", request("2")).await;
    });
    assert_eq!(text(&second.request.body), "2");
}

#[tokio::test(start_paused = true)]
async fn competing_servers_share_fairly() {
    let broker = MemoryBroker::new();
    let client = broker.connect();
    let mut workers = Vec::new();
    for _ in 0..2 {
        let server = broker.connect();
        workers.push(tokio::spawn(async move {
            let mut subscription = shared(&server, "s", 1).await;
            let mut served = 0;
            // It ends once it has waited in vain for a minute.
            while let Ok(delivery) =
                tokio::time::timeout(Duration::from_secs(60), delivery(&mut subscription)).await
            {
                sleep(Duration::from_millis(10)).await;
                echo(delivery).await.unwrap();
                served += 1;
            }
            served
        }));
    }
    for _ in 0..100 {
        send(&client, "s", request("")).await;
    }
    let (first, second) = (
        workers.remove(0).await.unwrap(),
        workers.remove(0).await.unwrap(),
    );
    assert_eq!(first + second, 100);
    assert!((35..=65).contains(&first), "{first} and {second}");
}

#[tokio::test(start_paused = true)]
async fn a_receive_that_is_dropped_hands_its_wake_up_on() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let (mut first, mut second) = (
        shared(&transport, "s", 1).await,
        shared(&transport, "s", 1).await,
    );
    let mut woken = Box::pin(first.recv());
    assert!(woken.as_mut().now_or_never().is_none());
    let (taken, ()) = tokio::join!(delivery(&mut second), async {
        send(&transport, "s", request("1")).await;
        drop(woken);
    });
    assert_eq!(text(&taken.request.body), "1");
}

#[tokio::test(start_paused = true)]
async fn a_dropped_delivery_is_counted_and_a_released_one_is_not() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let mut subscription = shared(&transport, "s", 1).await;
    send(&transport, "s", request("1")).await;
    send(&transport, "s", request("2")).await;
    drop(delivery(&mut subscription).await);
    let again = delivery(&mut subscription).await;
    assert_eq!(
        (text(&again.request.body).as_str(), again.attempt),
        ("1", 2)
    );
    again.release().await.unwrap();
    let again = delivery(&mut subscription).await;
    assert_eq!(
        (text(&again.request.body).as_str(), again.attempt),
        ("1", 2)
    );
    echo(again).await.unwrap();
    assert_eq!(text(&delivery(&mut subscription).await.request.body), "2");
}

#[tokio::test(start_paused = true)]
async fn dead_letters_are_kept_up_to_the_cap_and_their_callers_told() {
    let mut config = MemoryConfig::default();
    config.max_dead = 2;
    let broker = MemoryBroker::open(config);
    let transport = broker.connect();
    let mut inbox = transport.open_inbox().await.unwrap();
    let mut subscription = shared(&transport, "s", 1).await;
    for body in ["1", "2", "3"] {
        send(&transport, "s", request_to(&*inbox, body)).await;
        drop(delivery(&mut subscription).await);
        let poison = delivery(&mut subscription).await;
        let reply = Reply::value(poison.request.id.clone(), "dead");
        poison
            .dead_letter(format!("poison {body}"), Some(reply))
            .await
            .unwrap();
        assert_eq!(replies(&mut inbox).await, ["dead"]);
    }
    assert_eq!(counts(&broker, "s"), (0, 0, 2));
    let dead = broker.dead_letters(&service("s"));
    let dead: Vec<_> = dead
        .iter()
        .map(|letter| (letter.reason.as_str(), letter.attempt))
        .collect();
    assert_eq!(dead, [("poison 2", 2), ("poison 3", 2)]);
}

#[tokio::test(start_paused = true)]
async fn a_stopped_or_dropped_subscription_leaves_its_deliveries_settleable() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let mut inbox = transport.open_inbox().await.unwrap();
    let mut subscription = shared(&transport, "s", 2).await;
    for body in ["1", "2", "3"] {
        send(&transport, "s", request_to(&*inbox, body)).await;
    }
    let mut held = deliveries(&mut subscription).await;
    within(subscription.stop()).await;
    assert_eq!(over(&mut subscription).await.kind(), ErrorKind::Closed);
    echo(held.remove(0)).await.unwrap();
    assert_eq!(over(&mut subscription).await.kind(), ErrorKind::Closed);
    drop(subscription);
    let last = held.remove(0);
    assert!(!last.lease().is_cancelled());
    echo(last).await.unwrap();
    assert_eq!(replies(&mut inbox).await, ["1", "2"]);
    // What it had not received goes to the next one, uncounted.
    let mut next = shared(&transport, "s", 2).await;
    let third = delivery(&mut next).await;
    assert_eq!(
        (text(&third.request.body).as_str(), third.attempt),
        ("3", 1)
    );
    drop(next);
    drop(third);
    assert_eq!(counts(&broker, "s"), (1, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn exclusive_means_one() {
    let broker = MemoryBroker::new();
    let (first, second) = (broker.connect(), broker.connect());
    let exclusive = SubscribeOptions::exclusive(1);
    let owner = subscribe(&first, "s", exclusive).await.unwrap();
    for options in [exclusive, SubscribeOptions::shared(1)] {
        for transport in [&first, &second] {
            let error = subscribe(transport, "s", options).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::AlreadyOwned);
        }
    }
    assert!(subscribe(&second, "other", exclusive).await.is_ok());
    drop(owner);
    let shared = shared(&first, "s", 1).await;
    assert_eq!(
        subscribe(&second, "s", exclusive).await.unwrap_err().kind(),
        ErrorKind::AlreadyOwned
    );
    drop(shared);
    let mut stopped = subscribe(&first, "s", exclusive).await.unwrap();
    within(stopped.stop()).await;
    let closed = subscribe(&first, "s", exclusive).await.unwrap();
    first.close().await;
    let owner = subscribe(&second, "s", exclusive).await.unwrap();
    drop((stopped, closed));
    assert_eq!(
        subscribe(&broker.connect(), "s", exclusive)
            .await
            .unwrap_err()
            .kind(),
        ErrorKind::AlreadyOwned
    );
    drop(owner);
}

#[tokio::test(start_paused = true)]
async fn a_responder_that_is_expected_must_live() {
    let broker = MemoryBroker::new();
    let (client, server) = (broker.connect(), broker.connect());
    let nobody = async || {
        let error = send_expecting(&client, "s", request("")).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.executed()),
            (ErrorKind::NoResponder, Executed::No)
        );
    };
    nobody().await;
    let mut subscription = shared(&server, "s", 1).await;
    send_expecting(&client, "s", request("")).await.unwrap();
    let held = delivery(&mut subscription).await;
    within(subscription.stop()).await;
    nobody().await;
    let subscription = shared(&server, "s", 1).await;
    send_expecting(&client, "s", request("")).await.unwrap();
    drop(subscription);
    nobody().await;
    drop(held);
    assert_eq!(counts(&broker, "s"), (2, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_reply_to_nowhere_is_counted_and_an_inbox_ends_with_its_drop() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let nowhere = ReplyAddress::new("nowhere").unwrap();
    let reply = Reply::value(request("").id, "");
    send_to_nowhere(&transport, &nowhere, reply.clone()).await;
    assert_eq!(broker.stats().undeliverable_replies, 1);
    let mut inbox = transport.open_inbox().await.unwrap();
    let address = inbox.address();
    send_reply(&transport, &address, Reply::value(request("").id, "here")).await;
    assert_eq!(replies(&mut inbox).await, ["here"]);
    assert_eq!(broker.stats().inboxes, 1);
    drop(inbox);
    assert_eq!(broker.stats().inboxes, 0);
    send_to_nowhere(&transport, &address, reply).await;
    assert_eq!(broker.stats().undeliverable_replies, 2);
}

#[tokio::test(start_paused = true)]
async fn replies_come_in_batches_and_in_order() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let mut inbox = transport.open_inbox().await.unwrap();
    let address = inbox.address();
    let (mut come, ()) = tokio::join!(replies(&mut inbox), async {
        for number in 0..100 {
            send_reply(
                &transport,
                &address,
                Reply::value(request("").id, number.to_string()),
            )
            .await;
        }
    });
    assert!(come.len() > 1, "one event for each reply");
    while come.len() < 100 {
        come.extend(replies(&mut inbox).await);
    }
    assert_eq!(
        come,
        (0..100)
            .map(|number| number.to_string())
            .collect::<Vec<_>>()
    );
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_refuses() {
    let mut config = MemoryConfig::default();
    config.max_queued = 2;
    let broker = MemoryBroker::open(config);
    let transport = broker.connect();
    for _ in 0..2 {
        send(&transport, "s", request("")).await;
    }
    let ticket = Ticket::new();
    let error = within(transport.send(outbound("s", request(""), &ticket)))
        .await
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.executed()),
        (ErrorKind::Overloaded, Executed::No)
    );
    assert!(ticket.withdraw(), "nothing was sent");
    send(&transport, "other", request("")).await;
    let mut subscription = shared(&transport, "s", 1).await;
    let _held = delivery(&mut subscription).await;
    send(&transport, "s", request("")).await;
}

#[tokio::test(start_paused = true)]
async fn waiting_counts_against_the_budget_and_the_wall_clock_does_not() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let sent = Instant::now();
    let mut skewed = request("skewed");
    if let Some(deadline) = &mut skewed.deadline {
        deadline.at -= Duration::from_secs(600);
    }
    send(&transport, "s", skewed).await;
    let plain = Request {
        deadline: None,
        ..request("plain")
    };
    send(&transport, "s", plain).await;
    let endless = Request::new(Deadline::after(Duration::MAX), "endless");
    send(&transport, "s", endless).await;
    advance(Duration::from_secs(40)).await;
    let mut subscription = shared(&transport, "s", 3).await;
    let held = deliveries(&mut subscription).await;
    let expires: Vec<_> = held.iter().map(|delivery| delivery.expires).collect();
    assert_eq!(expires, [Some(sent + Duration::from_secs(30)), None, None]);
}

#[tokio::test(start_paused = true)]
async fn requests_that_expired_long_ago_are_forgotten() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    for number in 0..1000 {
        send(&transport, &format!("s@{number}"), request("")).await;
    }
    assert_eq!(broker.stats().services.len(), 1000);
    sleep(Duration::from_millis(59_999)).await;
    assert_eq!(broker.stats().services.len(), 1000);
    sleep(Duration::from_millis(2)).await;
    assert_eq!(broker.stats(), MemoryBroker::new().stats());
    assert_eq!(alive_tasks(), 0, "there is nothing to forget");
}

#[tokio::test(start_paused = true)]
async fn one_timer_forgets_requests_that_expire_at_any_time() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let start = Instant::now();
    let expiring = |seconds| Request::new(Deadline::after(Duration::from_secs(seconds)), "");
    // Ever sooner and ever later ones.
    for seconds in [500, 300, 100, 1, 400, 600] {
        send(&transport, "s", expiring(seconds)).await;
    }
    let plain = Request {
        deadline: None,
        ..request("")
    };
    send(&transport, "s", plain).await;
    let mut left = 7;
    for seconds in [1, 100, 300, 400, 500, 600] {
        let expires = start + Duration::from_secs(seconds);
        sleep_until(expires + Duration::from_millis(29_999)).await;
        assert_eq!(counts(&broker, "s"), (left, 0, 0), "{seconds} s, kept");
        assert_eq!(alive_tasks(), 1);
        left -= 1;
        sleep_until(expires + Duration::from_millis(45_001)).await;
        assert_eq!(counts(&broker, "s"), (left, 0, 0), "{seconds} s, forgotten");
    }
    assert_eq!(alive_tasks(), 0, "what is left never expires");
    send(&transport, "s", request("")).await;
    assert_eq!(alive_tasks(), 1);
    drop((broker, transport));
    tokio::task::yield_now().await;
    assert_eq!(alive_tasks(), 0, "the timer goes with the broker");
}

#[tokio::test(start_paused = true)]
async fn a_request_that_comes_back_expired_is_forgotten() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let mut subscription = shared(&transport, "s", 1).await;
    send(&transport, "s", request("")).await;
    let held = delivery(&mut subscription).await;
    drop(subscription);
    sleep(Duration::from_secs(600)).await;
    assert_eq!(alive_tasks(), 0, "what is held is not forgotten");
    drop(held);
    assert_eq!(counts(&broker, "s"), (1, 0, 0));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(counts(&broker, "s"), (0, 0, 0));
}

#[test]
fn the_timer_does_not_depend_on_the_runtime_of_the_first_sender() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    paused_runtime().block_on(send(&transport, "s", request("")));
    assert_eq!(counts(&broker, "s"), (1, 0, 0));
    paused_runtime().block_on(async {
        send(&transport, "s", request("")).await;
        sleep(Duration::from_secs(61)).await;
    });
    assert_eq!(counts(&broker, "s"), (0, 0, 0));
}

fn paused_runtime() -> tokio::runtime::Runtime {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_time().start_paused(true).build().unwrap()
}

fn alive_tasks() -> usize {
    tokio::runtime::Handle::current()
        .metrics()
        .num_alive_tasks()
}

#[tokio::test(start_paused = true)]
async fn a_withdrawn_request_is_not_sent() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let ticket = Ticket::new();
    assert!(ticket.withdraw());
    let error = within(transport.send(outbound("s", request(""), &ticket)))
        .await
        .unwrap_err();
    assert_eq!(error.executed(), Executed::No);
    assert_eq!(counts(&broker, "s"), (0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn after_close_all_is_closed() {
    let broker = MemoryBroker::new();
    let (transport, other) = (broker.connect(), broker.connect());
    let mut subscription = shared(&transport, "s", 1).await;
    let mut inbox = transport.open_inbox().await.unwrap();
    send(
        &transport,
        "s",
        request_to(&*other.open_inbox().await.unwrap(), "1"),
    )
    .await;
    send(&transport, "s", request("2")).await;
    let held = delivery(&mut subscription).await;
    transport.block();
    let ticket = Ticket::new();
    let (pending, (), event) = tokio::join!(
        within(transport.send(outbound("s", request(""), &ticket))),
        async {
            tokio::task::yield_now().await;
            transport.close().await;
            transport.close().await;
        },
        within(inbox.recv()),
    );
    let error = pending.unwrap_err();
    assert_eq!(
        (error.kind(), error.executed()),
        (ErrorKind::Closed, Executed::No)
    );
    assert!(ticket.withdraw());
    assert!(matches!(event, InboxEvent::Closed(_)));
    assert!(matches!(within(inbox.recv()).await, InboxEvent::Closed(_)));
    for _ in 0..2 {
        assert_eq!(over(&mut subscription).await.kind(), ErrorKind::Closed);
    }
    assert_eq!(
        *transport.state().borrow(),
        antiphon_core::ConnectionState::Closed
    );
    assert!(held.lease().is_cancelled());
    assert_eq!(echo(held).await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(
        transport.open_inbox().await.unwrap_err().kind(),
        ErrorKind::Closed
    );
    let options = SubscribeOptions::shared(1);
    assert_eq!(
        subscribe(&transport, "s", options)
            .await
            .unwrap_err()
            .kind(),
        ErrorKind::Closed
    );
    let reply = Outbound::Reply {
        to: inbox.address(),
        reply: Reply::value(request("").id, "").into(),
    };
    assert_eq!(
        transport.send(reply).await.unwrap_err().kind(),
        ErrorKind::Closed
    );
    // What it held is with the others, the attempt counted.
    let mut next = shared(&other, "s", 2).await;
    for (body, attempt) in [("1", 2), ("2", 1)] {
        let again = delivery(&mut next).await;
        assert_eq!(
            (text(&again.request.body).as_str(), again.attempt),
            (body, attempt)
        );
        echo(again).await.unwrap();
    }
    assert_eq!(broker.stats().inboxes, 0);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_transport_has_died() {
    let broker = MemoryBroker::new();
    let (server, other) = (broker.connect(), broker.connect());
    let clone = server.clone();
    let mut inbox = other.open_inbox().await.unwrap();
    let mut subscription = shared(&server, "s", 1).await;
    send(&other, "s", request_to(&*inbox, "1")).await;
    let held = delivery(&mut subscription).await;
    drop(server);
    assert!(!held.lease().is_cancelled());
    drop(clone);
    assert!(held.lease().is_cancelled());
    assert!(echo(held).await.is_err());
    assert!(is_silent(&mut inbox));
    let mut next = shared(&other, "s", 1).await;
    assert_eq!(delivery(&mut next).await.attempt, 2);
}

#[tokio::test(start_paused = true)]
async fn a_name_finds_a_broker_for_as_long_as_it_has_a_handle() {
    let config = || MemoryConfig::from_url("memory://found-by-name").unwrap();
    let first = MemoryTransport::connect(config()).await.unwrap();
    let second = MemoryTransport::connect(config()).await.unwrap();
    send(&first, "s", request("1")).await;
    let mut subscription = shared(&second, "s", 1).await;
    let held = delivery(&mut subscription).await;
    drop(first);
    assert_eq!(counts(&MemoryBroker::open(config()), "s"), (0, 1, 0));
    drop(second);
    // The subscription and the delivery still refer to the old broker, and do not keep its name.
    assert_eq!(MemoryBroker::open(config()).stats().services.len(), 0);
    drop((subscription, held));
    let private = async || {
        MemoryTransport::connect(MemoryConfig::from_url("memory://").unwrap())
            .await
            .unwrap()
    };
    let (first, second) = (private().await, private().await);
    send(&first, "s", request("1")).await;
    assert_eq!(counts(&second.broker(), "s"), (0, 0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_request_is_answered_among_servers_that_drop_release_and_die() {
    const CLIENTS: usize = 4;
    const REQUESTS: usize = 2_000;
    let broker = MemoryBroker::new();
    let work = async {
        let mut servers = tokio::task::JoinSet::new();
        for seed in 0..4_usize {
            let broker = broker.clone();
            servers.spawn(async move {
                for life in 0.. {
                    let transport = broker.connect();
                    let mut subscription = shared(&transport, "s", 8).await;
                    let (mut turn, is_last) = (seed + life, life > 5);
                    let mut orphans = Vec::new();
                    while turn < 500 || is_last {
                        // The others may have taken all that was left, and wait for what this one holds.
                        let patience = Duration::from_millis(if is_last { 60_000 } else { 20 });
                        let next = tokio::time::timeout(patience, deliveries(&mut subscription));
                        let Ok(deliveries) = next.await else { break };
                        for delivery in deliveries {
                            turn += 1;
                            match turn % 7 {
                                0 => drop(delivery),
                                1 => delivery.release().await.unwrap(),
                                2 => {
                                    tokio::task::yield_now().await;
                                    echo(delivery).await.unwrap();
                                }
                                3 if !is_last && orphans.len() < 7 => orphans.push(delivery),
                                _ => echo(delivery).await.unwrap(),
                            }
                        }
                    }
                    // It dies with some in its hands, which it can answer no more.
                    drop(transport);
                    for orphan in orphans {
                        assert!(echo(orphan).await.is_err());
                    }
                }
            });
        }
        let mut clients = tokio::task::JoinSet::new();
        for client in 0..CLIENTS {
            let transport = broker.connect();
            clients.spawn(async move {
                let mut inbox = transport.open_inbox().await.unwrap();
                for number in 0..REQUESTS {
                    send(
                        &transport,
                        "s",
                        request_to(&*inbox, &format!("{client}/{number}")),
                    )
                    .await;
                }
                let mut answers = Vec::new();
                while answers.len() < REQUESTS {
                    answers.extend(replies(&mut inbox).await);
                }
                answers.sort_unstable();
                answers.dedup();
                assert_eq!(answers.len(), REQUESTS);
                assert!(
                    answers
                        .iter()
                        .all(|answer| answer.starts_with(&format!("{client}/")))
                );
            });
        }
        while let Some(ended) = clients.join_next().await {
            ended.unwrap();
        }
        servers.abort_all();
        while let Some(ended) = servers.join_next().await {
            assert!(ended.unwrap_err().is_cancelled(), "a server failed");
        }
    };
    tokio::time::timeout(Duration::from_secs(60), work)
        .await
        .expect("a request was lost");
    assert_eq!(broker.stats(), MemoryBroker::new().stats());
}

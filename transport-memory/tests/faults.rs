//! What the broker promises when it fails as it is told.

mod support;

use std::time::Duration;

use antiphon_core::transport::{
    Inbox, InboxEvent, SubscribeOptions, Subscription, SubscriptionEvent,
};
use antiphon_core::{ConnectionState, Deadline, ErrorKind, Executed, Reply, Ticket, Transport};
use antiphon_memory::{MemoryBroker, MemoryConfig, MemoryTransport};
use futures_util::FutureExt;
use support::*;
use tokio::time::{Instant, advance, sleep};

#[tokio::test(start_paused = true)]
async fn a_cut_server_is_fenced_and_subscribes_again() {
    let broker = MemoryBroker::new();
    let (client, server, other) = (broker.connect(), broker.connect(), broker.connect());
    let mut inbox = client.open_inbox().await.unwrap();
    let mut subscription = shared(&server, "s", 2).await;
    send(&client, "s", request_to(&*inbox, "1")).await;
    send(&client, "s", request_to(&*inbox, "2")).await;
    let held = deliveries(&mut subscription).await;
    let mut state = server.state();
    server.cut();
    assert!(matches!(
        *state.borrow_and_update(),
        ConnectionState::Disconnected { .. }
    ));
    for delivery in held {
        assert!(delivery.lease().is_cancelled());
        let error = echo(delivery).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.executed()),
            (ErrorKind::LostLease, Executed::Maybe)
        );
    }
    assert!(is_silent(&mut inbox), "a fenced server replied");
    assert!(is_quiet(&mut subscription));
    let error = send_expecting(&client, "s", request("")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoResponder);
    let mut next = shared(&other, "s", 2).await;
    for body in ["1", "2"] {
        let again = delivery(&mut next).await;
        assert_eq!(
            (text(&again.request.body).as_str(), again.attempt),
            (body, 2)
        );
        assert!(!again.lease().is_cancelled());
        echo(again).await.unwrap();
    }
    assert_eq!(replies(&mut inbox).await, ["1", "2"]);
    drop(next);
    server.restore();
    assert_eq!(*state.borrow_and_update(), ConnectionState::Connected);
    send_expecting(&client, "s", request("3")).await.unwrap();
    let third = delivery(&mut subscription).await;
    assert!(!third.lease().is_cancelled());
    echo(third).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_waiting_receive_survives_a_cut() {
    let broker = MemoryBroker::new();
    let (client, server) = (broker.connect(), broker.connect());
    let mut subscription = shared(&server, "s", 1).await;
    let waits = tokio::spawn(async move { delivery(&mut subscription).await });
    tokio::task::yield_now().await;
    server.cut();
    send(&client, "s", request("1")).await;
    tokio::task::yield_now().await;
    assert_eq!(counts(&broker, "s"), (1, 0, 0));
    server.restore();
    assert_eq!(within(waits).await.unwrap().attempt, 1);
}

#[tokio::test(start_paused = true)]
async fn an_inbox_keeps_what_arrives_during_a_cut() {
    let broker = MemoryBroker::new();
    let (client, server) = (broker.connect(), broker.connect());
    let mut inbox = client.open_inbox().await.unwrap();
    let address = inbox.address();
    let (arrived, ()) = tokio::join!(replies(&mut inbox), async {
        client.cut();
        send_reply(&server, &address, Reply::value(request("").id, "meanwhile")).await;
        sleep(Duration::from_secs(100)).await;
        client.restore();
    });
    assert_eq!(arrived, ["meanwhile"]);
    assert_eq!(inbox.address(), address);
}

#[tokio::test(start_paused = true)]
async fn sends_wait_for_the_connection_unless_they_are_withdrawn() {
    let broker = MemoryBroker::new();
    let client = broker.connect();
    type Act = fn(&MemoryTransport);
    let faults: [(Act, Act); 5] = [
        (MemoryTransport::cut, MemoryTransport::restore),
        (MemoryTransport::block, MemoryTransport::unblock),
        (MemoryTransport::pause, MemoryTransport::resume),
        (
            |client| client.broker().block(),
            |client| client.broker().unblock(),
        ),
        (
            |client| client.broker().cut_all(),
            |client| client.broker().restore_all(),
        ),
    ];
    for (hinder, help) in faults {
        hinder(&client);
        let (sent, withdrawn, dropped) = (Ticket::new(), Ticket::new(), Ticket::new());
        assert!(
            client
                .send(outbound("s", request("dropped"), &dropped))
                .now_or_never()
                .is_none()
        );
        let (first, second, ()) = tokio::join!(
            within(client.send(outbound("s", request("sent"), &sent))),
            within(client.send(outbound("s", request("withdrawn"), &withdrawn))),
            async {
                sleep(Duration::from_secs(20)).await;
                assert!(withdrawn.withdraw());
                help(&client);
            }
        );
        first.unwrap();
        assert_eq!(second.unwrap_err().executed(), Executed::No);
        assert!(!sent.withdraw() && dropped.withdraw());
        let mut subscription = shared(&client, "s", 3).await;
        let taken = deliveries(&mut subscription).await;
        assert_eq!(bodies(&taken), ["sent"]);
        for delivery in taken {
            echo(delivery).await.unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_blocked_broker_still_lets_servers_finish() {
    let broker = MemoryBroker::new();
    let client = broker.connect();
    let mut inbox = client.open_inbox().await.unwrap();
    let mut subscription = shared(&client, "s", 1).await;
    send(&client, "s", request_to(&*inbox, "1")).await;
    broker.block();
    assert!(matches!(
        *client.state().borrow(),
        ConnectionState::Blocked { .. }
    ));
    assert!(matches!(
        *broker.connect().state().borrow(),
        ConnectionState::Blocked { .. }
    ));
    echo(delivery(&mut subscription).await).await.unwrap();
    assert_eq!(replies(&mut inbox).await, ["1"]);
    broker.unblock();
    assert_eq!(*client.state().borrow(), ConnectionState::Connected);
}

#[tokio::test(start_paused = true)]
async fn waiting_to_be_sent_comes_off_the_budget() {
    type Obstacle = fn(&MemoryTransport);
    let obstacles: [(Obstacle, Obstacle); 3] = [
        (MemoryTransport::cut, MemoryTransport::restore),
        (MemoryTransport::pause, MemoryTransport::resume),
        (MemoryTransport::block, MemoryTransport::unblock),
    ];
    for (obstruct, clear) in obstacles {
        let broker = MemoryBroker::new();
        let (client, server) = (broker.connect(), broker.connect());
        let mut subscription = shared(&server, "s", 2).await;
        obstruct(&client);
        let entered = Instant::now();
        let waiting = [29_999, 30_000, 30_001].map(|wait| {
            let (client, ticket) = (client.clone(), Ticket::new());
            let mut request = request("");
            request.deadline = Some(Deadline::after(Duration::from_millis(wait)));
            let message = outbound("s", request, &ticket);
            (
                ticket,
                tokio::spawn(async move { client.send(message).await }),
            )
        });
        sleep(Duration::from_secs(30)).await;
        clear(&client);
        let [(short, sent), (exact, also_sent), (_, last)] = waiting;
        for (ticket, sent) in [(short, sent), (exact, also_sent)] {
            let error = within(sent).await.unwrap().unwrap_err();
            assert_eq!(
                (error.kind(), error.executed()),
                (ErrorKind::DeadlineExceeded, Executed::No)
            );
            assert!(ticket.withdraw(), "it was not sent");
        }
        within(last).await.unwrap().unwrap();
        let delivery = delivery(&mut subscription).await;
        let expires = entered + Duration::from_millis(30_001);
        assert_eq!(delivery.expires, Some(expires));
        let budget = delivery.request.deadline.map(|deadline| deadline.budget);
        assert_eq!(budget, Some(Duration::from_millis(1)));
        echo(delivery).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_cut_owner_loses_its_ownership_at_once() {
    let broker = MemoryBroker::new();
    let (first, second) = (broker.connect(), broker.connect());
    let exclusive = SubscribeOptions::exclusive(1);
    let mut owner = subscribe(&first, "s", exclusive).await.unwrap();
    first.cut();
    let heir = subscribe(&second, "s", exclusive).await.unwrap();
    first.restore();
    assert_eq!(over(&mut owner).await.kind(), ErrorKind::AlreadyOwned);
    drop(heir);
    assert_eq!(over(&mut owner).await.kind(), ErrorKind::AlreadyOwned);
    // With nobody in the way it comes back as the owner.
    let mut owner = subscribe(&second, "s", exclusive).await.unwrap();
    second.cut();
    second.restore();
    assert_eq!(
        subscribe(&first, "s", exclusive).await.unwrap_err().kind(),
        ErrorKind::AlreadyOwned
    );
    send(&first, "s", request("")).await;
    delivery(&mut owner).await;
}

#[tokio::test(start_paused = true)]
async fn a_paused_server_loses_its_lease_in_time_and_not_before() {
    let mut config = MemoryConfig::default();
    config.lease = Duration::from_secs(4);
    let broker = MemoryBroker::open(config);
    let (client, server, other) = (broker.connect(), broker.connect(), broker.connect());
    let mut inbox = client.open_inbox().await.unwrap();
    let mut subscription = shared(&server, "s", 1).await;
    send(&client, "s", request_to(&*inbox, "1")).await;
    let held = delivery(&mut subscription).await;
    // Shorter than the lease: nothing is lost.
    server.pause();
    assert_eq!(*server.state().borrow(), ConnectionState::Connected);
    advance(Duration::from_millis(3_999)).await;
    server.resume();
    assert!(!held.lease().is_cancelled());
    // Longer: who waits gets it when the lease ends.
    server.pause();
    let paused = Instant::now();
    let mut next = shared(&other, "s", 1).await;
    let again = delivery(&mut next).await;
    assert_eq!(paused.elapsed().as_secs(), 4);
    assert_eq!(again.attempt, 2);
    let fenced = tokio::spawn(echo(held));
    tokio::task::yield_now().await;
    assert!(!fenced.is_finished(), "nothing leaves a paused connection");
    server.resume();
    assert_eq!(
        within(fenced).await.unwrap().unwrap_err().kind(),
        ErrorKind::LostLease
    );
    assert!(is_silent(&mut inbox));
    echo(again).await.unwrap();
    assert_eq!(replies(&mut inbox).await, ["1"]);
    // It serves again.
    drop(next);
    send_expecting(&client, "s", request("2")).await.unwrap();
    echo(delivery(&mut subscription).await).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_pause_wakes_those_who_wait_to_watch_the_lease() {
    let broker = MemoryBroker::new();
    let (client, server, other) = (broker.connect(), broker.connect(), broker.connect());
    let mut subscription = shared(&server, "s", 1).await;
    send(&client, "s", request("1")).await;
    let held = delivery(&mut subscription).await;
    let mut next = shared(&other, "s", 1).await;
    let start = Instant::now();
    let (again, ()) = tokio::join!(delivery(&mut next), async { server.pause() });
    assert_eq!((again.attempt, start.elapsed().as_secs()), (2, 10));
    assert!(held.lease().is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn a_paused_owner_keeps_its_ownership_for_the_lease() {
    let broker = MemoryBroker::new();
    let (first, second) = (broker.connect(), broker.connect());
    let exclusive = SubscribeOptions::exclusive(1);
    let mut owner = subscribe(&first, "s", exclusive).await.unwrap();
    first.pause();
    advance(Duration::from_millis(9_999)).await;
    assert_eq!(
        subscribe(&second, "s", exclusive).await.unwrap_err().kind(),
        ErrorKind::AlreadyOwned
    );
    send_expecting(&second, "s", request("")).await.unwrap();
    advance(Duration::from_millis(1)).await;
    let error = send_expecting(&second, "s", request("")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoResponder);
    let _heir = subscribe(&second, "s", exclusive).await.unwrap();
    first.resume();
    assert_eq!(over(&mut owner).await.kind(), ErrorKind::AlreadyOwned);
}

#[tokio::test(start_paused = true)]
async fn what_was_settled_during_a_pause_happens_though_nobody_waits() {
    let broker = MemoryBroker::new();
    let (client, server) = (broker.connect(), broker.connect());
    let mut inbox = client.open_inbox().await.unwrap();
    let mut subscription = shared(&server, "s", 1).await;
    send(&client, "s", request_to(&*inbox, "1")).await;
    let held = delivery(&mut subscription).await;
    server.pause();
    assert!(echo(held).now_or_never().is_none());
    assert_eq!(counts(&broker, "s"), (0, 1, 0));
    server.resume();
    assert_eq!(replies(&mut inbox).await, ["1"]);
    assert_eq!(counts(&broker, "s"), (0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_request_goes_past_a_paused_server() {
    let broker = MemoryBroker::new();
    let (client, server, other) = (broker.connect(), broker.connect(), broker.connect());
    let (mut first, mut second) = (shared(&server, "s", 1).await, shared(&other, "s", 1).await);
    let mut stalled = Box::pin(first.recv());
    assert!(stalled.as_mut().now_or_never().is_none());
    let (taken, ()) = tokio::join!(delivery(&mut second), async {
        send(&client, "s", request("1")).await;
        // It was the one to be woken.
        server.pause();
    });
    assert_eq!(
        (text(&taken.request.body).as_str(), taken.attempt),
        ("1", 1)
    );
    assert!(stalled.as_mut().now_or_never().is_none());
}

#[tokio::test(start_paused = true)]
async fn leases_expire_on_request() {
    let broker = MemoryBroker::new();
    let (client, server) = (broker.connect(), broker.connect());
    let mut inbox = client.open_inbox().await.unwrap();
    let mut subscription = shared(&server, "s", 1).await;
    send(&client, "s", request_to(&*inbox, "1")).await;
    for (attempt, expire) in [
        (1, Box::new(|| broker.expire_leases()) as Box<dyn Fn()>),
        (2, Box::new(|| server.expire_leases())),
        (3, Box::new(|| server.cut())),
    ] {
        let held = delivery(&mut subscription).await;
        assert_eq!(held.attempt, attempt);
        client.expire_leases();
        assert!(!held.lease().is_cancelled());
        expire();
        assert!(held.lease().is_cancelled());
        assert_eq!(echo(held).await.unwrap_err().kind(), ErrorKind::LostLease);
    }
    assert!(is_silent(&mut inbox));
    server.restore();
    // A fenced delivery that is dropped returns nothing a second time.
    let held = delivery(&mut subscription).await;
    broker.expire_leases();
    drop(held);
    assert_eq!(counts(&broker, "s"), (1, 0, 0));
    assert_eq!(delivery(&mut subscription).await.attempt, 5);
}

#[tokio::test(start_paused = true)]
async fn a_lease_lost_after_the_subscription_was_dropped_returns_its_deliveries() {
    let broker = MemoryBroker::new();
    let (server, other) = (broker.connect(), broker.connect());
    let mut subscription = shared(&server, "s", 1).await;
    send(&server, "s", request("1")).await;
    let held = delivery(&mut subscription).await;
    drop(subscription);
    let mut next = shared(&other, "s", 1).await;
    let (again, ()) = tokio::join!(delivery(&mut next), async {
        tokio::task::yield_now().await;
        server.cut();
    });
    assert_eq!(again.attempt, 2);
    assert!(held.lease().is_cancelled());
    assert_eq!(echo(held).await.unwrap_err().kind(), ErrorKind::LostLease);
}

#[tokio::test(start_paused = true)]
async fn what_came_back_is_run_alone() {
    let broker = MemoryBroker::new();
    let (client, server, other) = (broker.connect(), broker.connect(), broker.connect());
    let mut subscription = shared(&server, "s", 3).await;
    for body in ["poison", "1", "2", "3", "4"] {
        send(&client, "s", request(body)).await;
    }
    let mut held = deliveries(&mut subscription).await;
    assert_eq!(bodies(&held), ["poison", "1", "2"]);
    // Busy hands are emptied for it, and take nothing meanwhile.
    drop(held.remove(0));
    assert!(is_quiet(&mut subscription));
    echo(held.remove(0)).await.unwrap();
    assert!(is_quiet(&mut subscription));
    let last = held.remove(0);
    let (alone, ()) = tokio::join!(deliveries(&mut subscription), async {
        echo(last).await.unwrap()
    });
    assert_eq!(
        (bodies(&alone), alone[0].attempt),
        (vec!["poison".to_owned()], 2)
    );
    assert!(is_quiet(&mut subscription));
    // Idle hands take it at once, and those that were being emptied take others again.
    drop(alone);
    let suspect = delivery(&mut subscription).await;
    suspect.release().await.unwrap();
    let suspect = delivery(&mut subscription).await;
    assert_eq!(suspect.attempt, 3);
    echo(suspect).await.unwrap();
    let mut held = deliveries(&mut subscription).await;
    assert_eq!(bodies(&held), ["3", "4"]);
    drop(held.remove(0));
    let mut idle = shared(&other, "s", 3).await;
    let (suspect, fresh) = tokio::join!(
        async {
            tokio::task::yield_now().await;
            delivery(&mut idle).await
        },
        async {
            send(&client, "s", request("5")).await;
            delivery(&mut subscription).await
        }
    );
    assert_eq!(
        (text(&suspect.request.body).as_str(), suspect.attempt),
        ("3", 2)
    );
    assert_eq!(text(&fresh.request.body), "5");
}

#[tokio::test(start_paused = true)]
async fn what_a_server_leaves_while_it_empties_its_hands_goes_to_others() {
    let broker = MemoryBroker::new();
    let (client, server, other) = (broker.connect(), broker.connect(), broker.connect());
    let mut busy = shared(&server, "s", 3).await;
    send(&client, "s", request("1")).await;
    send(&client, "s", request("2")).await;
    let mut held = deliveries(&mut busy).await;
    drop(held.remove(0));
    let mut waits = Box::pin(busy.recv());
    assert!(waits.as_mut().now_or_never().is_none());
    let mut idle = shared(&other, "s", 3).await;
    let suspect = delivery(&mut idle).await;
    assert_eq!(suspect.attempt, 2);
    send(&client, "s", request("3")).await;
    let SubscriptionEvent::Deliveries(fresh) = within(waits).await else {
        panic!("it is over")
    };
    assert_eq!(bodies(&fresh), ["3"]);
}

#[tokio::test(start_paused = true)]
async fn a_broker_that_loses_everything_says_so() {
    let broker = MemoryBroker::new();
    let (client, server) = (broker.connect(), broker.connect());
    let mut inbox = client.open_inbox().await.unwrap();
    let old = inbox.address();
    let mut subscription = shared(&server, "s", 1).await;
    send(&client, "s", request_to(&*inbox, "1")).await;
    send(&client, "s", request_to(&*inbox, "2")).await;
    let held = delivery(&mut subscription).await;
    send_reply(&server, &old, Reply::value(request("").id, "unread")).await;
    broker.lose_everything();
    assert_eq!(counts(&broker, "s"), (0, 0, 0));
    let InboxEvent::Lost(error) = within(inbox.recv()).await else {
        panic!("it is not lost")
    };
    assert_eq!(error.executed(), Executed::Maybe);
    assert_ne!(inbox.address(), old);
    assert!(held.lease().is_cancelled());
    assert_eq!(echo(held).await.unwrap_err().kind(), ErrorKind::LostLease);
    send_to_nowhere(&server, &old, Reply::value(request("").id, "late")).await;
    assert_eq!(broker.stats().undeliverable_replies, 1);
    // All goes on, at the new address.
    send(&client, "s", request_to(&*inbox, "3")).await;
    echo(delivery(&mut subscription).await).await.unwrap();
    assert_eq!(replies(&mut inbox).await, ["3"]);
    drop(inbox);
    assert_eq!(broker.stats().inboxes, 0);
}

#[tokio::test(start_paused = true)]
async fn replies_are_dropped_and_duplicated_as_often_as_asked() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let mut inbox = transport.open_inbox().await.unwrap();
    let mut subscription = shared(&transport, "s", 5).await;
    broker.drop_next_replies(1);
    broker.duplicate_next_replies(2);
    for body in ["1", "2", "3", "4"] {
        send(&transport, "s", request_to(&*inbox, body)).await;
    }
    for delivery in deliveries(&mut subscription).await {
        echo(delivery).await.unwrap();
    }
    assert_eq!(replies(&mut inbox).await, ["2", "2", "3", "3", "4"]);
    assert_eq!(counts(&broker, "s"), (0, 0, 0));
    assert_eq!(broker.stats().undeliverable_replies, 0);
}

#[tokio::test(start_paused = true)]
async fn a_delay_is_a_latency_of_every_hop() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let mut inbox = transport.open_inbox().await.unwrap();
    let mut subscription = shared(&transport, "s", 2).await;
    let start = Instant::now();
    broker.delay(Duration::from_millis(200));
    send(&transport, "s", request_to(&*inbox, "1")).await;
    advance(Duration::from_millis(50)).await;
    send(&transport, "s", request_to(&*inbox, "2")).await;
    // Sent later, and without a delay, it still keeps its place.
    broker.delay(Duration::ZERO);
    send(&transport, "s", request_to(&*inbox, "3")).await;
    let first = delivery(&mut subscription).await;
    assert_eq!(
        (
            text(&first.request.body).as_str(),
            start.elapsed().as_millis()
        ),
        ("1", 200)
    );
    let second = delivery(&mut subscription).await;
    assert_eq!(
        (
            text(&second.request.body).as_str(),
            start.elapsed().as_millis()
        ),
        ("2", 250)
    );
    broker.delay(Duration::from_millis(200));
    echo(first).await.unwrap();
    let third = delivery(&mut subscription).await;
    assert_eq!(
        (
            text(&third.request.body).as_str(),
            start.elapsed().as_millis()
        ),
        ("3", 250)
    );
    broker.delay(Duration::ZERO);
    echo(second).await.unwrap();
    assert_eq!(replies(&mut inbox).await, ["1", "2"]);
    assert_eq!(start.elapsed().as_millis(), 450);
}

#[tokio::test(start_paused = true)]
async fn one_who_sleeps_until_a_request_arrives_may_be_dropped() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let (mut first, mut second) = (
        shared(&transport, "s", 1).await,
        shared(&transport, "s", 1).await,
    );
    broker.delay(Duration::from_millis(200));
    send(&transport, "s", request("1")).await;
    assert!(is_quiet(&mut second));
    let (taken, ()) = tokio::join!(delivery(&mut second), async {
        let sleeps = tokio::time::timeout(Duration::from_millis(100), first.recv()).await;
        assert!(sleeps.is_err());
        drop(first);
    });
    assert_eq!(text(&taken.request.body), "1");
}

#[tokio::test(start_paused = true)]
async fn a_reply_to_an_inbox_that_is_gone_is_counted_though_the_queue_knows_it() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let (inbox, mut subscription) = known_inbox(&transport).await;
    send(&transport, "s", request_to(&*inbox, "3")).await;
    let held = delivery(&mut subscription).await;
    drop(inbox);
    echo(held).await.unwrap();
    assert_eq!(broker.stats().undeliverable_replies, 1);
}

#[tokio::test(start_paused = true)]
async fn a_reply_does_not_overtake_one_that_travels() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let mut inbox = transport.open_inbox().await.unwrap();
    let mut subscription = shared(&transport, "s", 5).await;
    for body in ["0", "1", "2"] {
        send(&transport, "s", request_to(&*inbox, body)).await;
    }
    let mut held = deliveries(&mut subscription).await.into_iter();
    echo(held.next().unwrap()).await.unwrap();
    broker.delay(Duration::from_millis(200));
    echo(held.next().unwrap()).await.unwrap();
    broker.delay(Duration::ZERO);
    echo(held.next().unwrap()).await.unwrap();
    assert_eq!(replies(&mut inbox).await, ["0"]);
    advance(Duration::from_millis(250)).await;
    assert_eq!(replies(&mut inbox).await, ["1", "2"]);
}

#[tokio::test(start_paused = true)]
async fn a_reply_to_an_inbox_that_has_moved_is_counted_though_the_queue_knows_it() {
    let broker = MemoryBroker::new();
    let transport = broker.connect();
    let (mut inbox, mut subscription) = known_inbox(&transport).await;
    let old = request_to(&*inbox, "3");
    broker.lose_everything();
    assert!(matches!(inbox.recv().await, InboxEvent::Lost(_)));
    send(&transport, "s", old).await;
    echo(delivery(&mut subscription).await).await.unwrap();
    assert_eq!(broker.stats().undeliverable_replies, 1);
    assert!(is_silent(&mut inbox));
}

/// An inbox that the queue of `s` knows, having replied to it twice.
async fn known_inbox(transport: &MemoryTransport) -> (Box<dyn Inbox>, Box<dyn Subscription>) {
    let mut inbox = transport.open_inbox().await.unwrap();
    let mut subscription = shared(transport, "s", 5).await;
    for body in ["1", "2"] {
        send(transport, "s", request_to(&*inbox, body)).await;
        echo(delivery(&mut subscription).await).await.unwrap();
    }
    assert_eq!(replies(&mut inbox).await, ["1", "2"]);
    (inbox, subscription)
}

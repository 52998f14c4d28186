//! What an idle client and an idle server with many services cost.

mod support;

use std::time::Duration;

use antiphon_core::Transport;
use antiphon_core::transport::{Inbox, SubscribeOptions, Subscription, SubscriptionEvent};
use redis::AsyncCommands;
use redis::aio::MultiplexedConnection;

use support::{BUDGET, Broker, deliveries, fresh_service, request, send, within};

const SERVICES: usize = 100;
const WATCHED: Duration = Duration::from_secs(6);

/// What Redis says of itself under that name.
async fn info(redis: &mut MultiplexedConnection, section: &str, name: &str) -> u64 {
    let text: String = redis::cmd("INFO")
        .arg(section)
        .query_async(redis)
        .await
        .unwrap();
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.unwrap().trim().parse().unwrap()
}

/// Commands in the time that is watched, those of scripts included, without those of whoever looks.
async fn commands(redis: &mut MultiplexedConnection) -> u64 {
    let before = info(redis, "stats", "total_commands_processed").await;
    tokio::time::sleep(WATCHED).await;
    info(redis, "stats", "total_commands_processed").await - before - 1
}

#[tokio::test]
async fn an_idle_server_of_many_services_costs_next_to_nothing() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let (server, client) = (broker.connect().await, broker.connect().await);
    let services: Vec<_> = (0..SERVICES).map(|_| fresh_service()).collect();
    let mut hears = server.open_inbox().await.unwrap();
    let mut subscriptions = Vec::new();
    for service in &services {
        hears.join(service).await.unwrap();
        let options = SubscribeOptions::shared(4);
        subscriptions.push(server.subscribe(service, options).await.unwrap());
    }
    let inbox = client.open_inbox().await.unwrap();
    let mut plain = broker.plain().await;
    is_quiet(&mut plain).await;
    for (service, subscription) in services.iter().zip(&mut subscriptions) {
        answer(&client, service, &*inbox, &mut **subscription).await;
    }
    is_quiet(&mut plain).await;
    // One that is busy has a connection of its own, until it is not.
    for _ in 0..50 {
        answer(&client, &services[7], &*inbox, &mut *subscriptions[7]).await;
    }
    // Watching one of them closely does not mean all.
    let count = commands(&mut plain).await;
    assert!(count < SERVICES as u64, "{count} commands");
    drop(subscriptions);
    within("close", server.close()).await;
}

/// Waits until nothing but waiting is done.
async fn is_quiet(plain: &mut MultiplexedConnection) {
    within("all is quiet", async {
        while commands(plain).await > 10 * WATCHED.as_secs() {}
    })
    .await;
    let connections = info(plain, "clients", "connected_clients").await;
    assert!(connections <= 8, "{connections} connections");
}

async fn answer(
    client: &antiphon_redis::RedisTransport,
    service: &antiphon_core::ServiceName,
    inbox: &dyn Inbox,
    subscription: &mut dyn Subscription,
) {
    let asked = request(&inbox.address(), BUDGET, "x");
    send(client, service, asked).await.unwrap();
    for delivery in deliveries(subscription).await {
        assert_eq!(delivery.attempt, 1);
        within("done", delivery.reply(None)).await.unwrap();
    }
}

/// A subscription without a free slot hears no bell, and one that ends hears none: nobody else would.
#[tokio::test]
async fn work_is_never_rung_for_in_vain() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let (one, two, client) = (
        broker.connect().await,
        broker.connect().await,
        broker.connect().await,
    );
    let inbox = client.open_inbox().await.unwrap();
    for round in 0..20 {
        let service = fresh_service();
        let options = SubscribeOptions::shared(1);
        let mut full = one.subscribe(&service, options).await.unwrap();
        let asked = request(&inbox.address(), BUDGET, "held");
        send(&client, &service, asked).await.unwrap();
        let held = deliveries(&mut *full).await;
        let mut free = two.subscribe(&service, options).await.unwrap();
        let mut ending = one.subscribe(&service, options).await.unwrap();
        let asked = request(&inbox.address(), BUDGET, "next");
        // At any moment of its end.
        let stop = async {
            tokio::time::sleep(Duration::from_micros(200 * round)).await;
            ending.stop().await;
        };
        let ((), sent) = within("send", async {
            tokio::join!(stop, send(&client, &service, asked))
        })
        .await;
        sent.unwrap();
        let since = std::time::Instant::now();
        let next = deliveries(&mut *free).await;
        assert_eq!(next[0].request.body, "next");
        // A ring that nobody hears is made up for after 5 s.
        assert!(
            since.elapsed() < Duration::from_secs(2),
            "{:?}",
            since.elapsed()
        );
        for delivery in held.into_iter().chain(next) {
            within("done", delivery.reply(None)).await.unwrap();
        }
        assert!(matches!(ending.recv().await, SubscriptionEvent::Closed(_)));
    }
}

/// Others may be rung for all the time: what nobody told of is found as soon.
#[tokio::test]
async fn work_of_which_nobody_told_is_found_while_others_are_rung_for() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let server = broker.connect().await;
    let (loud, silent) = (fresh_service(), fresh_service());
    let options = SubscribeOptions::shared(1);
    let _loud = server.subscribe(&loud, options).await.unwrap();
    let mut subscription = server.subscribe(&silent, options).await.unwrap();
    let (mut plain, mut other) = (broker.plain().await, broker.plain().await);
    // Past the first look.
    is_quiet(&mut plain).await;
    let (rung, ring) = tokio::sync::oneshot::channel();
    let ringing = tokio::spawn(async move {
        let mut rung = Some(rung);
        loop {
            let bell = format!("{{{loud}}}:bell");
            let _: () = other.zadd(bell, "1", 0).await.unwrap();
            if let Some(rung) = rung.take() {
                rung.send(()).unwrap();
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
    within("a ring", ring).await.unwrap();
    let since = std::time::Instant::now();
    let queue = format!("{{{silent}}}:q");
    let _: () = plain.rpush(queue, "{\"id\":\"7\"}\nx").await.unwrap();
    for delivery in deliveries(&mut *subscription).await {
        within("done", delivery.reply(None)).await.unwrap();
    }
    assert!(
        since.elapsed() < Duration::from_secs(4),
        "{:?}",
        since.elapsed()
    );
    ringing.abort();
}

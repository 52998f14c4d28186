//! Short words for what every test does. The time is paused, so that waiting costs none.
#![allow(dead_code, reason = "each test target uses some of it")]

use std::future::Future;
use std::time::Duration;

use antiphon_core::transport::{
    Delivery, Inbox, InboxEvent, Incoming, Outbound, SubscribeOptions, Subscription,
    SubscriptionEvent,
};
use antiphon_core::{
    Deadline, Error, ErrorKind, Reply, ReplyAddress, Request, ServiceName, Ticket, Transport,
};
use antiphon_memory::{MemoryBroker, MemoryTransport};
use futures_util::FutureExt;
use tokio::time::{Instant, timeout};

pub(crate) fn service(name: &str) -> ServiceName {
    ServiceName::new(name).unwrap()
}

/// A request with a deadline of 30 s.
pub(crate) fn request(body: &str) -> Request {
    Request::new(Deadline::after(Duration::from_secs(30)), body.to_owned())
}

pub(crate) fn request_to(inbox: &dyn Inbox, body: &str) -> Request {
    Request {
        reply_to: Some(inbox.address()),
        ..request(body)
    }
}

pub(crate) fn outbound(to: &str, request: Request, ticket: &Ticket) -> Outbound {
    Outbound::Request {
        service: service(to),
        request: request.into(),
        expect_responder: false,
        ticket: ticket.clone(),
    }
}

pub(crate) async fn send(transport: &MemoryTransport, to: &str, request: Request) {
    within(transport.send(outbound(to, request, &Ticket::new())))
        .await
        .unwrap();
}

pub(crate) async fn send_expecting(
    transport: &MemoryTransport,
    to: &str,
    request: Request,
) -> Result<(), Error> {
    let ticket = Ticket::new();
    let message = Outbound::Request {
        service: service(to),
        request: request.into(),
        expect_responder: true,
        ticket,
    };
    within(transport.send(message)).await
}

pub(crate) async fn send_reply(transport: &MemoryTransport, to: &ReplyAddress, reply: Reply) {
    within(transport.send(Outbound::Reply {
        to: to.clone(),
        reply: reply.into(),
    }))
    .await
    .unwrap();
}

/// A reply to an inbox that is gone.
pub(crate) async fn send_to_nowhere(transport: &MemoryTransport, to: &ReplyAddress, reply: Reply) {
    let (to, reply) = (to.clone(), reply.into());
    let sent = within(transport.send(Outbound::Reply { to, reply })).await;
    assert_eq!(sent.unwrap_err().kind(), ErrorKind::NoResponder);
}

pub(crate) async fn subscribe(
    transport: &MemoryTransport,
    to: &str,
    options: SubscribeOptions,
) -> Result<Box<dyn Subscription>, Error> {
    within(transport.subscribe(&service(to), options)).await
}

pub(crate) async fn shared(
    transport: &MemoryTransport,
    to: &str,
    prefetch: usize,
) -> Box<dyn Subscription> {
    subscribe(transport, to, SubscribeOptions::shared(prefetch))
        .await
        .unwrap()
}

/// Bounds every wait, far beyond what any test waits for.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    const BOUND: Duration = Duration::from_secs(3600);
    let start = Instant::now();
    let result = timeout(BOUND, future).await.expect("it never happens");
    // The end of the bound looks at the future once more, and finds what nobody had woken it for.
    assert!(start.elapsed() < BOUND, "a wake-up was lost");
    result
}

pub(crate) async fn deliveries(subscription: &mut Box<dyn Subscription>) -> Vec<Delivery> {
    match within(subscription.recv()).await {
        SubscriptionEvent::Deliveries(deliveries) => deliveries,
        SubscriptionEvent::Closed(error) => panic!("closed: {error}"),
    }
}

/// The only delivery that there is.
pub(crate) async fn delivery(subscription: &mut Box<dyn Subscription>) -> Delivery {
    let mut deliveries = deliveries(subscription).await;
    assert_eq!(deliveries.len(), 1);
    deliveries.remove(0)
}

/// The error with which the subscription is over.
pub(crate) async fn over(subscription: &mut Box<dyn Subscription>) -> Error {
    match within(subscription.recv()).await {
        SubscriptionEvent::Deliveries(deliveries) => panic!("not over: {deliveries:?}"),
        SubscriptionEvent::Closed(error) => error,
    }
}

/// True if there is nothing to receive at this moment.
pub(crate) fn is_quiet(subscription: &mut Box<dyn Subscription>) -> bool {
    subscription.recv().now_or_never().is_none()
}

pub(crate) fn is_silent(inbox: &mut Box<dyn Inbox>) -> bool {
    inbox.recv().now_or_never().is_none()
}

/// The bodies of the replies that are there.
pub(crate) async fn replies(inbox: &mut Box<dyn Inbox>) -> Vec<String> {
    match within(inbox.recv()).await {
        InboxEvent::Replies(replies) => replies.iter().map(body_of).collect(),
        event => panic!("no replies: {event:?}"),
    }
}

fn body_of(incoming: &Incoming) -> String {
    match incoming {
        Incoming::Reply(reply) => text(&reply.body),
        undecodable => panic!("not a reply: {undecodable:?}"),
    }
}

pub(crate) fn text(body: &[u8]) -> String {
    String::from_utf8(body.to_vec()).unwrap()
}

pub(crate) fn bodies(deliveries: &[Delivery]) -> Vec<String> {
    deliveries
        .iter()
        .map(|delivery| text(&delivery.request.body))
        .collect()
}

/// Replies with the body of the request.
pub(crate) async fn echo(delivery: Delivery) -> Result<(), Error> {
    let reply = Reply::value(delivery.request.id.clone(), delivery.request.body.clone());
    within(delivery.reply(Some(reply))).await
}

/// How many requests of a service are queued, held and dead.
pub(crate) fn counts(broker: &MemoryBroker, name: &str) -> (usize, usize, usize) {
    let stats = broker
        .stats()
        .services
        .get(&service(name))
        .copied()
        .unwrap_or_default();
    (stats.queued, stats.held, stats.dead)
}

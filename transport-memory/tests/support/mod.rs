//! Short words for what every test does.

use std::future::Future;
use std::time::Duration;

use antiphon_core::transport::{Delivery, Outbound, Subscription, SubscriptionEvent};
use antiphon_core::{Deadline, Error, Request, ServiceName, Ticket, Transport};
use antiphon_memory::{MemoryBroker, MemoryTransport};
use futures_util::FutureExt;

pub(crate) fn service(name: &str) -> ServiceName {
    ServiceName::new(name).unwrap()
}

/// A request with a deadline of 30 s.
pub(crate) fn request(body: &str) -> Request {
    Request::new(Deadline::after(Duration::from_secs(30)), body.to_owned())
}

pub(crate) async fn send(transport: &MemoryTransport, to: &str, request: Request) -> Result<(), Error> {
    transport.send(outbound(to, request, &Ticket::new())).await
}

pub(crate) fn outbound(to: &str, request: Request, ticket: &Ticket) -> Outbound {
    Outbound::Request {
        service: service(to),
        request,
        expect_responder: false,
        ticket: ticket.clone(),
    }
}

/// Bounds every wait; the time is paused, so it costs none.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(3600), future)
        .await
        .expect("it never happens")
}

pub(crate) async fn deliveries(subscription: &mut dyn Subscription) -> Vec<Delivery> {
    match within(subscription.recv()).await {
        SubscriptionEvent::Deliveries(deliveries) => deliveries,
        SubscriptionEvent::Closed(error) => panic!("closed: {error}"),
    }
}

pub(crate) fn one(mut deliveries: Vec<Delivery>) -> Delivery {
    assert_eq!(deliveries.len(), 1);
    deliveries.remove(0)
}

/// True if there is nothing to receive at this moment.
pub(crate) fn is_quiet(subscription: &mut dyn Subscription) -> bool {
    subscription.recv().now_or_never().is_none()
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

//! What the broker promises, seen through the transport alone.

mod support;

use antiphon_core::transport::{InboxEvent, Incoming, SubscribeOptions};
use antiphon_core::{Reply, Transport};
use antiphon_memory::MemoryBroker;
use support::*;

#[tokio::test(start_paused = true)]
async fn a_request_and_its_reply() {
    let broker = MemoryBroker::new();
    let (client, server) = (broker.connect(), broker.connect());
    let mut subscription = server
        .subscribe(&service("fib"), SubscribeOptions::shared(4))
        .await
        .unwrap();
    let mut inbox = client.open_inbox().await.unwrap();
    let mut request = request("30");
    request.reply_to = Some(inbox.address());
    let id = request.id.clone();
    send(&client, "fib", request).await.unwrap();
    let delivery = one(deliveries(&mut *subscription).await);
    assert_eq!(
        (&delivery.request.body[..], delivery.attempt),
        (&b"30"[..], 1)
    );
    delivery
        .reply(Some(Reply::value(id.clone(), "832040")))
        .await
        .unwrap();
    let InboxEvent::Replies(mut replies) = within(inbox.recv()).await else {
        panic!("no reply")
    };
    let Some(Incoming::Reply(reply)) = replies.pop() else {
        panic!("not a reply")
    };
    assert_eq!((reply.id, &reply.body[..]), (id, &b"832040"[..]));
    assert_eq!(counts(&broker, "fib"), (0, 0, 0));
}

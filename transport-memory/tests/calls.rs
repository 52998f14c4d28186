//! A call as a future: what its polls send, and whom they let run.

use std::future::{Future, IntoFuture, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use antiphon_core::transport::{
    Delivery, InboxEvent, Incoming, Outbound, SubscribeOptions, Subscription, SubscriptionEvent,
};
use antiphon_core::{
    Client, ClientConfig, Code, CorrelationId, ErrorKind, Executed, Node, Outcome, Reply, Server,
    ServiceName, Signal, Transport,
};
use antiphon_memory::{MemoryBroker, MemoryConfig};
use bytes::Bytes;
use tokio::task::{coop, yield_now};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How long a loop of calls may take to let others run.
const TURN: Duration = Duration::from_secs(20);

async fn client(transport: &Arc<dyn Transport>) -> Client {
    Client::open(Arc::clone(transport), ClientConfig::default())
        .await
        .unwrap()
}

fn server(transport: &Arc<dyn Transport>) -> Server {
    Server::new(Arc::clone(transport)).handle_raw("s", |body: Bytes| async move { Ok(body) })
}

/// True if the poll panics.
fn is_over<F: Future>(mut future: Pin<&mut F>) -> bool {
    let mut context = Context::from_waker(Waker::noop());
    let polled = AssertUnwindSafe(|| matches!(future.as_mut().poll(&mut context), Poll::Ready(_)));
    catch_unwind(polled).is_err()
}

#[tokio::test]
async fn a_call_that_has_ended_is_not_sent_again() {
    let broker = MemoryBroker::new();
    let transport: Arc<dyn Transport> = Arc::new(broker.connect());
    let client = client(&transport).await;

    let mut refused = pin!(client.call_raw("s", "").expect_responder().into_future());
    let error = refused.as_mut().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoResponder);
    let mut invalid = pin!(client.call_raw("no name", "").into_future());
    let error = invalid.as_mut().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);

    let running = server(&transport).start().await.unwrap();
    let mut answered = pin!(client.call_raw("s", "once").into_future());
    assert_eq!(*answered.as_mut().await.unwrap().body, *b"once");
    assert!(is_over(refused) && is_over(invalid) && is_over(answered));

    // It comes after whatever was sent before it.
    client.call_raw("s", "last").await.unwrap();
    assert_eq!(running.stats().handled, 2);
    running.shutdown().await.unwrap();
}

/// Runs it on a runtime of one thread; fails if it has not ended in time, and tells it to.
fn ends_on_one_thread<F>(calls: impl FnOnce(Arc<AtomicBool>) -> F + Send + 'static)
where
    F: Future<Output = ()>,
{
    let (ended, end) = std::sync::mpsc::channel();
    let stop = Arc::new(AtomicBool::new(false));
    let calls = {
        let stop = Arc::clone(&stop);
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(calls(stop));
            let _ = ended.send(());
        }
    };
    let thread = std::thread::spawn(calls);
    let in_time = end.recv_timeout(TURN).is_ok();
    stop.store(true, Ordering::Relaxed);
    thread.join().unwrap();
    assert!(in_time, "others had no turn within {TURN:?}");
}

#[test]
fn calls_that_nobody_serves_let_a_server_start() {
    ends_on_one_thread(|stop| async move {
        let transport: Arc<dyn Transport> = Arc::new(MemoryBroker::new().connect());
        let client = client(&transport).await;
        let starting = tokio::spawn(server(&transport).start());
        while !stop.load(Ordering::Relaxed)
            && client.call_raw("s", "").expect_responder().await.is_err()
        {}
        starting.abort();
    });
}

#[test]
fn calls_to_a_full_queue_let_a_server_empty_it() {
    ends_on_one_thread(|stop| async move {
        let mut config = MemoryConfig::new("calls-to-a-full-queue").unwrap();
        config.max_queued = 1;
        let transport: Arc<dyn Transport> = Arc::new(MemoryBroker::open(config).connect());
        let client = client(&transport).await;
        client.notify_raw("s", "").await.unwrap();
        let starting = tokio::spawn(server(&transport).start());
        while !stop.load(Ordering::Relaxed) && client.call_raw("s", "").await.is_err() {}
        starting.abort();
    });
}

/// Polled for the first time by a task that has used its turn up, so that what it is made of may not begin, it has entered and was not sent.
#[tokio::test]
async fn a_call_without_a_turn_ends_with_its_client() {
    let transport: Arc<dyn Transport> = Arc::new(MemoryBroker::new().connect());
    let client = client(&transport).await;
    let call = client.call_raw("s", "").timeout(TURN);
    let mut call = pin!(call.cancel_on(CancellationToken::new()).into_future());
    let has_entered = poll_fn(|cx| {
        let mut left = 10_000;
        while left > 0 && pin!(coop::consume_budget()).poll(cx).is_ready() {
            left -= 1;
        }
        Poll::Ready(left > 0 && call.as_mut().poll(cx).is_pending())
    });
    assert!(has_entered.await);
    client.close().await;
    let error = timeout(TURN, call).await.unwrap().unwrap_err();
    assert_eq!(
        (error.kind(), error.executed()),
        (ErrorKind::Closed, Executed::No)
    );
}

/// A panic outside of the future is the handler's fault all the same, and the service lives on.
#[tokio::test]
async fn a_handler_may_panic_before_it_gives_a_future() {
    let transport: Arc<dyn Transport> = Arc::new(MemoryBroker::new().connect());
    let client = client(&transport).await;
    let handler = |body: Bytes| {
        assert!(body != "panic", "as it was told");
        async move { Ok(body) }
    };
    let server = Server::new(Arc::clone(&transport)).handle_raw("s", handler);
    let running = server.start().await.unwrap();
    let error = client.call_raw("s", "panic").await.unwrap_err();
    assert_eq!(error.executed(), Executed::Yes);
    assert_eq!(error.fault().unwrap().code(), Code::Internal);
    assert!(error.message().contains("as it was told"), "{error}");
    assert_eq!(*client.call_raw("s", "echo").await.unwrap().body, *b"echo");
    assert_eq!(running.stats().handled, 2);
    running.shutdown().await.unwrap();
}

/// An offer that arrives in one batch with the reply, behind it, is of a call that has ended.
#[tokio::test]
async fn what_arrives_behind_the_reply_finds_no_call() {
    let transport: Arc<dyn Transport> = Arc::new(MemoryBroker::new().connect());
    let client = client(&transport).await;
    let mut inbox = transport.open_inbox().await.unwrap();
    let mut call = pin!(client.call_raw("s", "").into_future());
    assert!(poll_once(call.as_mut()).is_pending());
    let mut subscription = subscribe(&transport).await;
    let id = next(&mut *subscription).await.request.id.clone();
    let offer = Signal::Offer {
        node: Node::new("n").unwrap(),
        to: inbox.address(),
        id: CorrelationId::random(),
    };
    for reply in [Reply::value(id.clone(), "answer"), Reply::signal(id, offer)] {
        let message = Outbound::Reply {
            to: client.inbox(),
            reply: Arc::new(reply),
        };
        // They are there at the first poll, and the client has no turn between them.
        assert!(poll_once(pin!(transport.send(message))).is_ready());
    }
    let answered = timeout(TURN, inbox.recv()).await.unwrap();
    let InboxEvent::Replies(replies) = answered else {
        panic!("{answered:?}");
    };
    let [Incoming::Reply(reply)] = &replies[..] else {
        panic!("{replies:?}");
    };
    assert!(matches!(reply.outcome, Outcome::Fault { .. }), "{reply:?}");
    assert_eq!(*call.await.unwrap().body, *b"answer");
}

/// What is sent again because the inbox was lost has what is left of the time, and not all of it again.
#[tokio::test(start_paused = true)]
async fn what_is_sent_again_has_the_time_that_is_left() {
    let broker = MemoryBroker::new();
    let transport: Arc<dyn Transport> = Arc::new(broker.connect());
    let client = client(&transport).await;
    broker.block();
    let timeout = Duration::from_secs(30);
    let mut call = pin!(client.call_raw("s", "").timeout(timeout).into_future());
    assert!(poll_once(call.as_mut()).is_pending());
    tokio::time::advance(Duration::from_secs(10)).await;
    broker.lose_everything();
    // The client hears of it.
    while client.stats().pending > 0 {
        yield_now().await;
    }
    assert!(poll_once(call.as_mut()).is_pending());
    broker.unblock();
    assert!(poll_once(call.as_mut()).is_pending());
    let mut subscription = subscribe(&transport).await;
    let delivery = next(&mut *subscription).await;
    let left = delivery.request.deadline.unwrap().budget;
    assert_eq!(left, Duration::from_secs(20));
}

/// Whoever is woken by a request may panic, and so may any transport.
#[tokio::test]
async fn a_call_whose_sending_panics_leaves_nothing_behind() {
    struct Panics;

    impl Wake for Panics {
        fn wake(self: Arc<Self>) {
            panic!("as it was told");
        }
    }

    let transport: Arc<dyn Transport> = Arc::new(MemoryBroker::new().connect());
    let client = client(&transport).await;
    let mut subscription = subscribe(&transport).await;
    let mut receiving = subscription.recv();
    let waker = Waker::from(Arc::new(Panics));
    let received = receiving.as_mut().poll(&mut Context::from_waker(&waker));
    assert!(received.is_pending());
    let mut call = Box::pin(client.call_raw("s", "").into_future());
    assert!(is_over(call.as_mut()));
    drop(call);
    assert_eq!(client.stats().pending, 0);
}

fn poll_once<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

async fn subscribe(transport: &Arc<dyn Transport>) -> Box<dyn Subscription> {
    let service = ServiceName::new("s").unwrap();
    let options = SubscribeOptions::shared(1);
    transport.subscribe(&service, options).await.unwrap()
}

async fn next(subscription: &mut dyn Subscription) -> Delivery {
    match timeout(TURN, subscription.recv()).await.unwrap() {
        SubscriptionEvent::Deliveries(mut deliveries) => deliveries.remove(0),
        SubscriptionEvent::Closed(error) => panic!("{error}"),
    }
}

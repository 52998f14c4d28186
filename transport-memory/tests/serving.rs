//! A server on a runtime of one thread, where a request whose handler ends at its first poll gets no task.

use std::sync::Arc;
use std::time::Duration;

use antiphon_core::{Client, ClientConfig, Context, ErrorKind, Fault, RunningServer, Server};
use antiphon_memory::MemoryBroker;
use futures_util::future::join_all;
use tokio::sync::{Barrier, mpsc};

const AT_ONCE: usize = 8;

#[tokio::test(start_paused = true)]
async fn handlers_that_wait_run_at_once_beside_those_that_do_not() {
    let met = Arc::new(Barrier::new(AT_ONCE));
    let (client, server) = serve(move |server| {
        server
            .method_raw("s", "meet", move |body: bytes::Bytes| {
                let met = Arc::clone(&met);
                async move {
                    met.wait().await;
                    Ok(body)
                }
            })
            .method_raw("s", "echo", |body: bytes::Bytes| async move { Ok(body) })
    })
    .await;
    let calls = (0..2 * AT_ONCE).map(|number| {
        let method = if number % 2 == 0 { "meet" } else { "echo" };
        client.call_raw("s", vec![number as u8]).method(method)
    });
    let replies = join_all(calls.map(IntoFuture::into_future)).await;
    for (number, reply) in replies.into_iter().enumerate() {
        assert_eq!(*reply.unwrap().body, [number as u8]);
    }
    assert_eq!(server.stats().handled, 2 * AT_ONCE as u64);
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn who_waits_has_a_turn_between_requests_that_take_long() {
    const REQUESTS: u64 = 50;
    let (client, server) = serve(|server| {
        server
            .prefetch(1)
            .handle_raw("s", |body: bytes::Bytes| async move {
                // Longer than requests are polled in place one after the other.
                std::thread::sleep(Duration::from_millis(1));
                Ok(body)
            })
    })
    .await;
    // No request is taken before this task waits for something.
    let calls: Vec<_> = (0..REQUESTS)
        .map(|_| tokio::spawn(client.call_raw("s", "").into_future()))
        .collect();
    let mut turns = 0;
    while server.stats().handled < REQUESTS {
        tokio::task::yield_now().await;
        turns += 1;
    }
    assert!(
        turns >= REQUESTS,
        "{turns} turns between {REQUESTS} requests"
    );
    for call in calls {
        call.await.unwrap().unwrap();
    }
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn who_waits_has_a_turn_between_many_requests_that_take_little() {
    const REQUESTS: u64 = 2_000;
    /// The first 200 µs, and what may have been received with the last of them.
    const A_TURN: u64 = 50 + 15;
    let (client, server) = serve(|server| {
        server.handle_raw("s", |body: bytes::Bytes| async move {
            let begun = std::time::Instant::now();
            while begun.elapsed() < Duration::from_micros(4) {
                std::hint::spin_loop();
            }
            Ok(body)
        })
    })
    .await;
    // They are all there before the server has its first one.
    tokio::task::unconstrained(async {
        for _ in 0..REQUESTS {
            client.notify_raw("s", "").await.unwrap();
        }
    })
    .await;
    assert_eq!(server.stats().handled, 0);
    let mut turns = 0;
    while server.stats().handled < REQUESTS {
        tokio::task::yield_now().await;
        turns += 1;
    }
    assert!(
        turns >= REQUESTS / A_TURN,
        "{turns} turns between {REQUESTS} requests"
    );
    server.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_panic_costs_only_its_own_call() {
    let (client, server) = serve(|server| {
        server.handle_raw("s", |body: bytes::Bytes| async move {
            assert!(!body.is_empty(), "an empty body");
            Ok(body)
        })
    })
    .await;
    let calls = ["a", "", "b"].map(|body| client.call_raw("s", body).into_future());
    let [first, panicked, last] = <[_; 3]>::try_from(join_all(calls).await).unwrap();
    assert_eq!(panicked.unwrap_err().kind(), ErrorKind::Fault);
    assert_eq!(
        (&*first.unwrap().body, &*last.unwrap().body),
        (&b"a"[..], &b"b"[..])
    );
    server.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_asks_late_finds_its_cancellation_fired() {
    let (told, mut hear) = mpsc::unbounded_channel();
    let (client, server) = serve(move |server| {
        server.handle_raw("s", move |body: bytes::Bytes, context: Context| {
            let told = told.clone();
            async move {
                tokio::time::sleep(Duration::from_millis(300)).await;
                context.cancellation().cancelled().await;
                let _ = told.send(context.remaining());
                Ok::<_, Fault>(body)
            }
        })
    })
    .await;
    let call = client.call_raw("s", "").timeout(Duration::from_millis(200));
    assert_eq!(call.await.unwrap_err().kind(), ErrorKind::DeadlineExceeded);
    assert_eq!(hear.recv().await, Some(Duration::ZERO));
    server.shutdown().await.unwrap();
}

async fn serve(handlers: impl FnOnce(Server) -> Server) -> (Client, RunningServer) {
    let transport = Arc::new(MemoryBroker::new().connect());
    let server = handlers(Server::new(transport.clone()))
        .start()
        .await
        .unwrap();
    let client = Client::open(transport, ClientConfig::default())
        .await
        .unwrap();
    (client, server)
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_token_has_fired_is_not_sent() {
    let (client, server) =
        serve(|server| server.handle_raw("s", |body: bytes::Bytes| async move { Ok(body) })).await;
    let token = tokio_util::sync::CancellationToken::new();
    token.cancel();
    let error = client.call_raw("s", "").cancel_on(token).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.executed()),
        (ErrorKind::Cancelled, antiphon_core::Executed::No)
    );
    assert_eq!(server.stats().handled, 0);
    server.shutdown().await.unwrap();
}

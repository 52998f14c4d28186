//! Calls, whose requests are sent without a future: what goes wrong is told all the same, and nothing is sent in vain.

mod support;

use std::future::{Future, IntoFuture};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use antiphon_core::{Client, ClientConfig, ConnectionState, ErrorKind, Executed, Transport};
use redis::AsyncCommands;

use support::{Broker, fresh_service, within};

/// Longer than a test may take: no call ends by its deadline.
const LONG: Duration = Duration::from_secs(120);

async fn client(broker: &Broker) -> (Arc<dyn Transport>, Client) {
    let transport: Arc<dyn Transport> = Arc::new(broker.connect().await);
    let client = Client::open(Arc::clone(&transport), ClientConfig::default()).await;
    (transport, client.unwrap())
}

#[tokio::test]
async fn a_call_is_told_that_the_broker_has_no_room() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let (_transport, client) = client(&broker).await;
    let mut plain = broker.plain().await;
    let _: () = redis::cmd("CONFIG")
        .arg(&["SET", "maxmemory", "1"])
        .query_async(&mut plain)
        .await
        .unwrap();
    for size in [10, 100_000] {
        let call = client
            .call_raw(fresh_service(), vec![0; size])
            .timeout(LONG);
        let error = within("the refusal", call.into_future()).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.executed()),
            (ErrorKind::Overloaded, Executed::No),
            "{error}"
        );
    }
    assert_eq!(client.stats().pending, 0);
}

#[tokio::test]
async fn a_call_is_told_that_its_connection_was_lost() {
    let Some(broker) = Broker::private(&[]).await else {
        return;
    };
    let (_transport, client) = client(&broker).await;
    broker.signal("-STOP");
    // It is written, and then nothing comes: that is all that can be said of it.
    let call = client.call_raw(fresh_service(), "x").timeout(LONG);
    let error = within("the loss", call.into_future()).await.unwrap_err();
    broker.signal("-CONT");
    assert_eq!(
        (error.kind(), error.executed()),
        (ErrorKind::ConnectionLost, Executed::Maybe),
        "{error}"
    );
    assert_eq!(client.stats().pending, 0);
}

#[tokio::test]
async fn what_nobody_wants_any_more_is_not_sent() {
    let Some(mut broker) = Broker::private(&[]).await else {
        return;
    };
    let (transport, client) = client(&broker).await;
    let service = fresh_service();
    let call = |body: &'static str| client.call_raw(service.clone(), body).timeout(LONG);
    let mut kept = pin!(call("kept").into_future());
    let mut state = transport.state();
    broker
        .restart_with(async {
            let disconnected = state.wait_for(|state| *state != ConnectionState::Connected);
            within("disconnected", disconnected).await.unwrap();
            let mut cx = Context::from_waker(Waker::noop());
            let mut dropped = Box::pin(call("dropped").into_future());
            assert!(dropped.as_mut().poll(&mut cx).is_pending());
            assert!(kept.as_mut().poll(&mut cx).is_pending());
            drop(dropped);
            let late = call("late").timeout(Duration::from_millis(50));
            let error = within("the deadline", late.into_future()).await;
            let error = error.unwrap_err();
            assert_eq!(
                (error.kind(), error.executed()),
                (ErrorKind::DeadlineExceeded, Executed::No),
                "{error}"
            );
        })
        .await;
    let mut plain = broker.plain().await;
    let queue = format!("{{{service}}}:q");
    let sent = async {
        loop {
            let frames: Vec<String> = plain.lrange(&queue, 0, -1).await.unwrap();
            if !frames.is_empty() {
                return frames;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let frames = within("the request is sent", sent).await;
    assert!(
        matches!(&frames[..], [only] if only.ends_with("\nkept")),
        "{frames:?}"
    );
    within("close", transport.close()).await;
    // By the close, or by the inbox that the broker had lost: it was sent.
    let error = within("the end", kept).await.unwrap_err();
    assert_eq!(error.executed(), Executed::Maybe, "{error}");
}

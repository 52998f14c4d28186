//! Calls, whose requests are sent without a future: what goes wrong is told all the same, and nothing is sent in vain.

use std::future::{Future, IntoFuture};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use antiphon_amqp::{AmqpConfig, AmqpTransport};
use antiphon_conformance::proxy::{Proxy, replace_authority};
use antiphon_core::{Client, ClientConfig, ErrorKind, Executed, Fault, Server, Transport};
use bytes::Bytes;
use lapin::options::QueueDeclareOptions;
use lapin::types::{AMQPValue, FieldTable};
use tokio::time::timeout;

use crate::Verdict;
use crate::bench::{Bench, MESSAGE_MAX, PROMPT, Plain, fresh, next};

/// Longer than a case may take: no call ends by its deadline.
const LONG: Duration = Duration::from_secs(120);

async fn client(bench: &Bench) -> (Arc<AmqpTransport>, Client) {
    let transport = bench.connect().await;
    let client = Client::open(transport.clone(), ClientConfig::default()).await;
    (transport, client.unwrap())
}

/// Declares a service's queue, of which nobody takes anything.
async fn declare(plain: &Plain, service: &str, arguments: &[(&str, AMQPValue)]) {
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        table.insert((*name).into(), value.clone());
    }
    let options = QueueDeclareOptions::durable();
    let declared = plain.channel.queue_declare(service.into(), options, table);
    declared.await.unwrap();
}

/// Has the call's request posted, and leaves the call.
fn poll_once(call: Pin<&mut impl Future>) {
    let mut cx = Context::from_waker(Waker::noop());
    assert!(call.poll(&mut cx).is_pending());
}

pub(crate) async fn a_call_is_answered(bench: Bench) {
    let (service, (_transport, client)) = (fresh("answered"), client(&bench).await);
    let echo = |body: Bytes| async move { Ok::<_, Fault>(body) };
    let server = Server::new(bench.connect().await).handle_raw(service.as_str(), echo);
    let _server = server.start().await.unwrap();
    let call = client.call_raw(service.as_str(), "body").timeout(LONG);
    let answer = timeout(PROMPT, call.into_future()).await;
    assert_eq!(&answer.expect("the answer").unwrap().body[..], b"body");
    assert_eq!(client.stats().pending, 0);
}

pub(crate) async fn a_call_is_told_that_the_broker_has_no_room(bench: Bench) {
    let (service, (_transport, client)) = (fresh("full"), client(&bench).await);
    let full = [
        ("x-max-length", AMQPValue::LongInt(1)),
        ("x-overflow", AMQPValue::LongString("reject-publish".into())),
    ];
    declare(&bench.plain().await, &service, &full).await;
    client.notify_raw(service.as_str(), "").await.unwrap();
    let call = client.call_raw(service.as_str(), "x").timeout(LONG);
    let error = timeout(PROMPT, call.into_future()).await;
    let error = error.expect("the refusal").unwrap_err();
    // A broker that did not take a request may have given it to somebody all the same.
    assert_eq!(
        (error.kind(), error.executed()),
        (ErrorKind::Overloaded, Executed::Maybe),
        "{error}"
    );
    assert_eq!(client.stats().pending, 0);
}

/// By its ticket or by its inbox, which is lost as well.
pub(crate) async fn a_call_is_told_that_its_connection_was_lost(bench: Bench) {
    let service = fresh("lost");
    declare(&bench.plain().await, &service, &[]).await;
    let proxy = Proxy::start(bench.broker.authority()).await.unwrap();
    let url = replace_authority(bench.broker.url(), proxy.addr());
    let mut config = AmqpConfig::from_url(&url).unwrap();
    config.heartbeat = Duration::from_secs(1);
    let transport = Arc::new(AmqpTransport::connect(config).await.unwrap());
    let client = Client::open(transport, ClientConfig::default()).await;
    let client = client.unwrap();
    // The queue is known to be there, so that nothing is asked of the broker before the call.
    client.notify_raw(service.as_str(), "").await.unwrap();
    proxy.blackhole();
    // It is written, and then nothing comes: that is all that can be said of it.
    let call = client.call_raw(service.as_str(), "x").timeout(LONG);
    let error = timeout(2 * PROMPT, call.into_future()).await;
    let error = error.expect("the loss").unwrap_err();
    assert_eq!(
        (error.kind(), error.executed()),
        (ErrorKind::ConnectionLost, Executed::Maybe),
        "{error}"
    );
    assert_eq!(client.stats().pending, 0);
}

/// Its inbox is well: nobody else could tell it.
pub(crate) async fn a_call_is_told_that_its_channel_was_closed(bench: Bench) -> Verdict {
    let (service, plain) = (fresh("closed"), bench.plain().await);
    declare(&plain, &service, &[]).await;
    // It holds for channels that are opened from now on.
    bench.limit_messages(20_000).await?;
    let (_transport, client) = client(&bench).await;
    let call = client.call_raw(service.as_str(), vec![0; 30_000]);
    let told = timeout(PROMPT, call.timeout(LONG).into_future()).await;
    bench.limit_messages(MESSAGE_MAX).await?;
    let error = told.expect("the end of the channel").unwrap_err();
    assert_eq!(
        (error.kind(), error.executed()),
        (ErrorKind::ConnectionLost, Executed::Maybe),
        "{error}"
    );
    assert_eq!(client.stats().pending, 0);
    // The next one has another channel.
    let mut taken = plain.consume(&service, true).await;
    let mut kept = pin!(client.call_raw(service.as_str(), "kept").into_future());
    poll_once(kept.as_mut());
    assert_eq!(next(&mut taken).await.data, b"kept");
    Ok(())
}

pub(crate) async fn what_nobody_wants_any_more_is_not_sent(bench: Bench) {
    let (service, (transport, client)) = (fresh("unwanted"), client(&bench).await);
    let call = |body: &'static str| client.call_raw(service.as_str(), body).timeout(LONG);
    // All wait for the service's queue.
    let mut dropped = Box::pin(call("dropped").into_future());
    poll_once(dropped.as_mut());
    let mut kept = pin!(call("kept").into_future());
    poll_once(kept.as_mut());
    drop(dropped);
    let late = call("late").timeout(Duration::from_millis(50));
    let error = timeout(PROMPT, late.into_future()).await;
    let error = error.expect("the deadline").unwrap_err();
    assert_eq!(
        (error.kind(), error.executed()),
        (ErrorKind::DeadlineExceeded, Executed::No),
        "{error}"
    );
    let mut last = pin!(call("last").into_future());
    poll_once(last.as_mut());
    let plain = bench.plain().await;
    declare(&plain, &service, &[]).await;
    let mut taken = plain.consume(&service, true).await;
    for body in ["kept", "last"] {
        let request = next(&mut taken).await;
        assert_eq!(String::from_utf8_lossy(&request.data), body);
    }
    timeout(PROMPT, transport.close()).await.expect("close");
    // It was sent.
    let error = timeout(PROMPT, kept).await;
    let error = error.expect("the end").unwrap_err();
    assert_eq!(error.executed(), Executed::Maybe, "{error}");
}

/// By its ticket or by its inbox, which is closed as well.
pub(crate) async fn a_call_that_was_not_sent_is_told_of_the_close(bench: Bench) {
    let (service, (transport, client)) = (fresh("unsent"), client(&bench).await);
    // It waits for the service's queue.
    let mut call = pin!(
        client
            .call_raw(service.as_str(), "x")
            .timeout(LONG)
            .into_future()
    );
    poll_once(call.as_mut());
    timeout(PROMPT, transport.close()).await.expect("close");
    let error = timeout(PROMPT, call).await;
    let error = error.expect("the end").unwrap_err();
    assert_eq!(
        (error.kind(), error.executed()),
        (ErrorKind::Closed, Executed::No),
        "{error}"
    );
    assert_eq!(client.stats().pending, 0);
}

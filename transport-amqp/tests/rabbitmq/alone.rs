//! What disturbs everybody on the broker.

use std::sync::Arc;
use std::time::Duration;

use antiphon_core::{
    Client, ClientConfig, Code, ConnectionState, ErrorKind, Executed, Fault, Server, Transport,
};
use bytes::Bytes;
use tokio::time::sleep;

use crate::Verdict;
use crate::bench::{Bench, MESSAGE_MAX, eventually, fresh};

async fn echo(body: Bytes) -> Result<Bytes, Fault> {
    Ok(body)
}

/// Closes the connections that publish, and leaves the others.
pub(crate) async fn losing_the_publisher_costs_no_call(bench: Bench) -> Verdict {
    let service = fresh("publisher");
    let slow = |body: Bytes| async move {
        sleep(Duration::from_secs(4)).await;
        Ok::<_, Fault>(body)
    };
    let server = Server::new(bench.connect().await).handle_raw(service.as_str(), slow);
    let _server = server.start().await.unwrap();
    let client = bench.client().await;
    let call = tokio::spawn(client.call_raw(service.as_str(), "body").into_future());
    sleep(Duration::from_millis(300)).await;
    let list = ["list_connections", "--silent", "pid", "client_properties"];
    let connections = bench.ctl(&list).await?;
    let publishers = connections
        .lines()
        .filter(|line| line.contains("antiphon publish"))
        .filter_map(|line| line.split_whitespace().next());
    let mut closed = 0;
    for pid in publishers {
        bench.ctl(&["close_connection", pid, "test"]).await?;
        closed += 1;
    }
    assert!(closed >= 2, "{connections}");
    // The request was accepted and its inbox is untouched, so the reply comes by the server's next connection.
    assert_eq!(&call.await.unwrap().unwrap().body[..], b"body");
    Ok(())
}

pub(crate) async fn blocked_requests_wait_and_are_withdrawn(bench: Bench) -> Verdict {
    let service = fresh("blocked");
    let server = Server::new(bench.connect().await).handle_raw(service.as_str(), echo);
    let _server = server.start().await.unwrap();
    let transport: Arc<dyn Transport> = bench.connect().await;
    let client = Client::open(Arc::clone(&transport), ClientConfig::default())
        .await
        .unwrap();
    client.call_raw(service.as_str(), "").await.unwrap();
    let alarm = ["set_vm_memory_high_watermark", "0.00001"];
    bench.ctl(&alarm).await?;
    // The broker says so only to who publishes: the first call finds out, and may have been executed.
    let first = client.call_raw(service.as_str(), "first");
    let first = first.timeout(Duration::from_millis(700)).await.unwrap_err();
    assert_eq!(
        (first.kind(), first.executed()),
        (ErrorKind::DeadlineExceeded, Executed::Maybe)
    );
    let is_blocked = || {
        matches!(
            &*transport.state().borrow(),
            ConnectionState::Blocked { .. }
        )
    };
    eventually("the state tells", async || is_blocked()).await;
    let second = client.call_raw(service.as_str(), "second");
    let second = second
        .timeout(Duration::from_millis(300))
        .await
        .unwrap_err();
    assert_eq!(
        (second.kind(), second.executed()),
        (ErrorKind::DeadlineExceeded, Executed::No)
    );
    let third = tokio::spawn(client.call_raw(service.as_str(), "third").into_future());
    let clear = ["set_vm_memory_high_watermark", "0.4"];
    bench.ctl(&clear).await?;
    assert_eq!(&third.await.unwrap().unwrap().body[..], b"third");
    assert_eq!(*transport.state().borrow(), ConnectionState::Connected);
    Ok(())
}

/// A connection that is blocked before a server had a channel for its replies is well, however long that takes.
pub(crate) async fn a_reply_waits_for_the_alarm_to_end(bench: Bench) -> Verdict {
    let service = fresh("blocked-reply");
    let transport: Arc<dyn Transport> = bench.connect().await;
    let slow = |body: Bytes| async move {
        sleep(Duration::from_secs(2)).await;
        Ok::<_, Fault>(body)
    };
    let server = Server::new(Arc::clone(&transport)).handle_raw(service.as_str(), slow);
    let _server = server.start().await.unwrap();
    let other = bench.client().await;
    let call = other.call_raw(service.as_str(), "body");
    let call = tokio::spawn(call.timeout(Duration::from_secs(30)).into_future());
    sleep(Duration::from_millis(300)).await;
    bench
        .ctl(&["set_vm_memory_high_watermark", "0.00001"])
        .await?;
    // Who publishes is told that it is blocked.
    let client = Client::open(Arc::clone(&transport), ClientConfig::default())
        .await
        .unwrap();
    let blocked = client.call_raw(fresh("nobody"), "");
    let blocked = blocked.timeout(Duration::from_millis(300)).await;
    assert!(blocked.is_err());
    let mut state = transport.state();
    let lost = state.wait_for(|state| matches!(state, ConnectionState::Disconnected { .. }));
    let lost = tokio::time::timeout(Duration::from_secs(8), lost).await;
    bench.ctl(&["set_vm_memory_high_watermark", "0.4"]).await?;
    assert!(lost.is_err(), "the connection was given up");
    assert_eq!(&call.await.unwrap().unwrap().body[..], b"body");
    Ok(())
}

/// A message that is too large costs the channel, and whatever waits on it for the broker's word.
pub(crate) async fn a_reply_that_the_broker_refuses_costs_no_neighbour(bench: Bench) -> Verdict {
    let service = fresh("refused");
    bench.limit_messages(20_000).await?;
    let answer = |body: Bytes| async move {
        sleep(Duration::from_millis(100)).await;
        Ok::<_, Fault>(match &body[..] {
            b"large" => Bytes::from(vec![0; 30_000]),
            _ => body,
        })
    };
    let server = Server::new(bench.connect().await).handle_raw(service.as_str(), answer);
    let _server = server.start().await.unwrap();
    let client = bench.client().await;
    let calls = ["a", "b", "large", "c", "d"].map(|body| {
        let call = client.call_raw(service.as_str(), body);
        call.timeout(Duration::from_secs(10)).into_future()
    });
    let results = futures_util::future::join_all(calls).await;
    bench.limit_messages(MESSAGE_MAX).await?;
    for (index, result) in results.into_iter().enumerate() {
        match (index, result) {
            (2, Err(error)) => {
                let code = error.fault().map(Fault::code);
                assert_eq!(code, Some(Code::Internal), "{error}");
                assert_eq!(error.executed(), Executed::Yes);
            }
            (2, Ok(_)) => panic!("the broker takes it"),
            (_, result) => drop(result.unwrap()),
        }
    }
    Ok(())
}

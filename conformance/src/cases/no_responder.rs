//! A service that nobody serves: a call waits for a server, or learns at once that there is none, as it asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use antiphon_core::{ErrorKind, Executed, Fault};
use bytes::Bytes;
use tokio::time::{Instant, sleep};

use crate::bench::*;
use crate::case::{Stop, Verdict, cases};

cases!("no_responder": [
    late_server_serves_the_call: G1,
    call_waits_until_its_deadline: G1,
    expect_responder_fails_fast: G5,
    expect_responder_leaves_no_request: G5,
    expect_responder_is_served: G5,
    stopped_server_is_none: G5,
]);

async fn echo(body: Bytes) -> Result<Bytes, Fault> {
    Ok(body)
}

async fn late_server_serves_the_call(bench: Bench) -> Verdict {
    let service = bench.service("late-server")?;
    let client = bench.client().await?;
    let call = tokio::spawn(
        client
            .call_raw(&service, "body")
            .timeout(3 * PROMPT)
            .into_future(),
    );
    sleep(2 * QUIET).await;
    ensure(
        "a call that nobody serves yet",
        !call.is_finished(),
        "it waits",
    )?;
    let _server = start(bench.server().await?.handle_raw(&service, echo)).await?;
    body_is("the reply", &joined("the call", call).await?.body, b"body")
}

async fn call_waits_until_its_deadline(bench: Bench) -> Verdict {
    let service = bench.service("nobody")?;
    let client = bench.client().await?;
    let timeout = Duration::from_millis(600);
    let started = Instant::now();
    let result = by_deadline(
        "a call",
        timeout,
        client.call_raw(&service, "").timeout(timeout),
    )
    .await?;
    ensure(
        "a call that nobody serves",
        started.elapsed() >= timeout,
        "it waits until its deadline",
    )?;
    match result {
        // "No" from a transport that kept the request back, since there is no queue yet.
        Err(error)
            if error.kind() == ErrorKind::DeadlineExceeded && error.executed() != Executed::Yes =>
        {
            Ok(())
        }
        other => Err(Stop::failed(
            "a call that nobody serves",
            format!("it ends as deadline_exceeded, not: {other:?}"),
        )),
    }
}

async fn expect_responder_fails_fast(bench: Bench) -> Verdict {
    let client = bench.client().await?;
    for _ in 0..3 {
        let service = bench.service("nobody")?;
        let started = Instant::now();
        let call = client
            .call_raw(&service, "")
            .timeout(4 * PROMPT)
            .expect_responder();
        refused(
            "expect a responder",
            call,
            ErrorKind::NoResponder,
            Executed::No,
        )
        .await?;
        let took = started.elapsed();
        ensure(
            "expect a responder",
            took < Duration::from_secs(1),
            format!("it fails at once, not in {took:?}"),
        )?;
    }
    same("pending calls", client.stats().pending, 0)
}

async fn expect_responder_leaves_no_request(bench: Bench) -> Verdict {
    let service = bench.service("no-request")?;
    let runs = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&runs);
    let count = move |body: Bytes| {
        counter.fetch_add(1, Ordering::SeqCst);
        async move { Ok::<_, Fault>(body) }
    };
    let client = bench.client().await?;
    for _ in 0..3 {
        let call = client
            .call_raw(&service, "")
            .timeout(4 * PROMPT)
            .expect_responder();
        refused(
            "expect a responder",
            call,
            ErrorKind::NoResponder,
            Executed::No,
        )
        .await?;
    }
    let _server = start(bench.server().await?.handle_raw(&service, count)).await?;
    ok("call the server that came", client.call_raw(&service, "")).await?;
    sleep(QUIET).await;
    same(
        "handlers started, of three refused calls and one served",
        runs.load(Ordering::SeqCst),
        1,
    )
}

async fn expect_responder_is_served(bench: Bench) -> Verdict {
    let service = bench.service("served")?;
    let _server = start(bench.server().await?.handle_raw(&service, echo)).await?;
    let client = bench.client().await?;
    for _ in 0..5 {
        let reply = ok(
            "expect a responder",
            client.call_raw(&service, "body").expect_responder(),
        )
        .await?;
        body_is("the reply", &reply.body, b"body")?;
    }
    Ok(())
}

async fn stopped_server_is_none(bench: Bench) -> Verdict {
    let service = bench.service("stopped")?;
    let connected = bench.connect().await?;
    let server =
        antiphon_core::Server::new(Arc::clone(&connected.transport)).handle_raw(&service, echo);
    let running = start(server).await?;
    let client = bench.client().await?;
    ok(
        "call the server",
        client.call_raw(&service, "").expect_responder(),
    )
    .await?;
    ok("shut down the server", running.shutdown()).await?;
    let call = client
        .call_raw(&service, "")
        .timeout(4 * PROMPT)
        .expect_responder();
    refused(
        "call the server that was shut down",
        call,
        ErrorKind::NoResponder,
        Executed::No,
    )
    .await?;
    let running = start(bench.server().await?.handle_raw(&service, echo)).await?;
    ok(
        "call the server that came",
        client.call_raw(&service, "").expect_responder(),
    )
    .await?;
    drop(running);
    Ok(())
}

//! An end is an end: prompt, said plainly, and nothing in hand is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use antiphon_core::transport::SubscribeOptions;
use antiphon_core::{ClientConfig, ConnectionState, Context, ErrorKind, Executed, Fault};
use bytes::Bytes;
use futures_util::future::join_all;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;

use crate::bench::*;
use crate::case::{Stop, Verdict, cases};
use crate::peers::*;

cases!("close": [
    closed_client_refuses_calls: G5,
    closed_transport_refuses_everything: G5,
    pending_calls_end_with_the_client: G1,
    pending_calls_end_with_the_transport: G1,
    close_is_idempotent: G1,
    unsettled_goes_back: G2,
    stop_gives_back_uncounted: G6,
    drain_finishes_handlers_that_call: G2,
    run_until_waits_for_what_runs: G2,
    nothing_is_lost_around_a_shutdown: G2,
    shutdown_is_bounded: G2,
]);

async fn echo(body: Bytes) -> Result<Bytes, Fault> {
    Ok(body)
}

async fn closed_client_refuses_calls(bench: Bench) -> Verdict {
    let service = bench.service("closed")?;
    let _server = start(bench.server().await?.handle_raw(&service, echo)).await?;
    let transport = bench.connect().await?.transport;
    let client = client_on(&transport, ClientConfig::default()).await?;
    let neighbour = client_on(&transport, ClientConfig::default()).await?;
    ok("a call before", client.call_raw(&service, "")).await?;
    within("close the client", PROMPT, client.close()).await?;
    within("close it again", PROMPT, client.clone().close()).await?;
    let call = client.call_raw(&service, "").timeout(4 * PROMPT);
    refused(
        "a call of a closed client",
        call,
        ErrorKind::Closed,
        Executed::No,
    )
    .await?;
    // The transport is another matter.
    ok(
        "a call of another client on its transport",
        neighbour.call_raw(&service, ""),
    )
    .await
    .map(drop)
}

async fn closed_transport_refuses_everything(bench: Bench) -> Verdict {
    let service = bench.service("closed")?;
    let transport = bench.connect().await?.transport;
    let client = client_on(&transport, ClientConfig::default()).await?;
    within("close", 2 * PROMPT, transport.close()).await?;
    let sent = transport.send(outbound(&service, request(PROMPT, "", None)));
    refused("send after close", sent, ErrorKind::Closed, Executed::No).await?;
    refused(
        "open an inbox after close",
        transport.open_inbox(),
        ErrorKind::Closed,
        Executed::No,
    )
    .await?;
    let subscribed = transport.subscribe(&service, SubscribeOptions::shared(1));
    refused(
        "subscribe after close",
        subscribed,
        ErrorKind::Closed,
        Executed::No,
    )
    .await?;
    let call = client.call_raw(&service, "").timeout(4 * PROMPT);
    refused("call after close", call, ErrorKind::Closed, Executed::No).await?;
    let notify = client.notify_raw(&service, "").timeout(4 * PROMPT);
    refused(
        "notify after close",
        notify,
        ErrorKind::Closed,
        Executed::No,
    )
    .await?;
    ensure(
        "the state after close",
        *transport.state().borrow() == ConnectionState::Closed,
        "it is closed",
    )
}

async fn pending_calls_end_with_the_client(bench: Bench) -> Verdict {
    let service = bench.service("pending")?;
    let server = bench.connect().await?.transport;
    let mut requests = Requests::shared(&server, &service, 4).await?;
    let client = bench.client().await?;
    let calls: Vec<_> = (0..4)
        .map(|_| {
            tokio::spawn(
                client
                    .call_raw(&service, "")
                    .timeout(4 * PROMPT)
                    .into_future(),
            )
        })
        .collect();
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(requests.next("take the requests").await?);
    }
    within("close the client", PROMPT, client.close()).await?;
    for call in calls {
        let result = ended("a call that waits", PROMPT, call).await?;
        is_error(
            "a call that waits",
            result,
            ErrorKind::Closed,
            Executed::Maybe,
        )?;
    }
    same("pending calls", client.stats().pending, 0)?;
    drop(held);
    Ok(())
}

async fn pending_calls_end_with_the_transport(bench: Bench) -> Verdict {
    let service = bench.service("pending")?;
    let server = bench.connect().await?.transport;
    let mut requests = Requests::shared(&server, &service, 1).await?;
    let transport = bench.connect().await?.transport;
    let client = client_on(&transport, ClientConfig::default()).await?;
    let call = tokio::spawn(
        client
            .call_raw(&service, "")
            .timeout(4 * PROMPT)
            .into_future(),
    );
    let delivery = requests.next("take the request").await?;
    within("close the transport", 2 * PROMPT, transport.close()).await?;
    let result = ended("a call that waits", PROMPT, call).await?;
    is_error(
        "a call that waits",
        result,
        ErrorKind::Closed,
        Executed::Maybe,
    )?;
    drop(delivery);
    Ok(())
}

async fn close_is_idempotent(bench: Bench) -> Verdict {
    let service = bench.service("idempotent")?;
    let transport = bench.connect().await?.transport;
    let mut requests = Requests::shared(&transport, &service, 1).await?;
    let limit = Duration::from_secs(6);
    let both = async { tokio::join!(transport.close(), transport.close()) };
    within("close twice at once", limit, both).await?;
    within("close once more", limit, transport.close()).await?;
    for _ in 0..2 {
        let ended = within("receive after close", PROMPT, requests.receive()).await?;
        ensure(
            "receive after close",
            ended.is_err(),
            "a subscription of a closed transport is over, for ever",
        )?;
    }
    let cut_off = bench.connect().await?;
    cut_off.link.sever().await?;
    within(
        "close without a connection",
        limit,
        cut_off.transport.close(),
    )
    .await?;
    cut_off.link.restore().await?;
    ensure(
        "the state after close",
        *cut_off.transport.state().borrow() == ConnectionState::Closed,
        "it stays closed",
    )
}

async fn unsettled_goes_back(bench: Bench) -> Verdict {
    let service = bench.service("unsettled")?;
    let first = bench.connect().await?.transport;
    let mut requests = Requests::shared(&first, &service, 2).await?;
    let client = bench.client().await?;
    let calls = ["a", "b"].map(|body| {
        tokio::spawn(
            client
                .call_raw(&service, body)
                .timeout(12 * PROMPT)
                .into_future(),
        )
    });
    let held = [
        requests.next("take the requests").await?,
        requests.next("take the requests").await?,
    ];
    within("close with deliveries in hand", 2 * PROMPT, first.close()).await?;
    let [settled, kept] = held;
    let reply = antiphon_core::Reply::value(settled.request.id.clone(), "too late");
    let result = within("reply after close", PROMPT, settled.reply(Some(reply))).await?;
    ensure(
        "reply after close",
        result.is_err(),
        "it fails, but it succeeded",
    )?;
    let _server = start(bench.server().await?.handle_raw(&service, echo)).await?;
    for (call, body) in calls.into_iter().zip(["a", "b"]) {
        let result = ended(
            "a call that was in hand",
            bench.bounds().redelivery + PROMPT,
            call,
        )
        .await?;
        let reply = result.map_err(|error| Stop::error("a call that was in hand", &error))?;
        body_is("its reply", &reply.body, body.as_bytes())?;
    }
    drop(kept);
    Ok(())
}

async fn stop_gives_back_uncounted(bench: Bench) -> Verdict {
    let service = bench.service("stopped")?;
    let first = bench.connect().await?.transport;
    let mut requests = Requests::shared(&first, &service, 6).await?;
    let client = bench.connect().await?.transport;
    let mut inbox = Inbox::open(&client).await?;
    let address = inbox.address();
    let addressed = || request(12 * PROMPT, "", Some(address.clone()));
    send(&client, &service, addressed()).await?;
    let held = requests.next("take one request").await?;
    // These may reach the subscription, but it never receives them.
    for _ in 0..5 {
        send(&client, &service, addressed()).await?;
    }
    sleep(QUIET).await;
    requests.stop().await?;
    requests.none_for("after a stop", QUIET).await?;
    let second = bench.connect().await?.transport;
    let mut others = Requests::shared(&second, &service, 1).await?;
    for _ in 0..5 {
        let delivery = others
            .next("another server takes what was not started")
            .await?;
        same("its attempt", delivery.attempt, 1)?;
        answer(delivery, "other").await?;
    }
    // What is in hand stays settleable.
    answer(held, "first").await?;
    let mut bodies = Vec::new();
    for _ in 0..6 {
        bodies.push(inbox.next("read the replies").await?.body);
    }
    same(
        "replies by the stopped server",
        bodies.iter().filter(|body| &body[..] == b"first").count(),
        1,
    )?;
    others.none_for("after all are settled", QUIET).await
}

async fn drain_finishes_handlers_that_call(bench: Bench) -> Verdict {
    let (outer, inner) = (bench.service("outer")?, bench.service("inner")?);
    let server = bench.connect().await?.transport;
    let mut requests = Requests::shared(&server, &inner, 1).await?;
    let name = inner.clone();
    let (enter, mut entered) = mpsc::unbounded_channel();
    let (open, gate) = tokio::sync::watch::channel(false);
    let nest = move |body: Bytes, context: Context| {
        let (name, enter, mut gate) = (name.clone(), enter.clone(), gate.clone());
        async move {
            let _ = enter.send(());
            let _ = gate.wait_for(|open| *open).await;
            // The call is made when the shutdown has begun.
            let reply = context.call_raw(&name, body).await;
            reply
                .map(|reply| reply.body)
                .map_err(|error| Fault::new(antiphon_core::Code::Unavailable, error.to_string()))
        }
    };
    let running = start(bench.server().await?.handle_raw(&outer, nest)).await?;
    let client = bench.client().await?;
    let call = tokio::spawn(
        client
            .call_raw(&outer, "body")
            .timeout(2 * PROMPT)
            .into_future(),
    );
    within("the handler starts", PROMPT, entered.recv()).await?;
    let shutdown = tokio::spawn(running.shutdown());
    sleep(QUIET).await;
    ensure(
        "a shutdown while a handler runs",
        !shutdown.is_finished(),
        "it waits for it",
    )?;
    let _ = open.send(true);
    let delivery = requests.next("take the nested request").await?;
    ensure(
        "a shutdown while a handler calls",
        !shutdown.is_finished(),
        "it waits for it",
    )?;
    answer(delivery, "nested").await?;
    body_is(
        "the reply",
        &joined("the call", call).await?.body,
        b"nested",
    )?;
    joined("the shutdown", shutdown).await
}

async fn run_until_waits_for_what_runs(bench: Bench) -> Verdict {
    let service = bench.service("run-until")?;
    let ends = Arc::new(AtomicUsize::new(0));
    let (enter, mut entered) = mpsc::unbounded_channel();
    let counter = Arc::clone(&ends);
    let work = move |body: Bytes| {
        let (counter, enter) = (Arc::clone(&counter), enter.clone());
        async move {
            let _ = enter.send(());
            sleep(2 * QUIET).await;
            counter.fetch_add(1, Ordering::SeqCst);
            Ok::<_, Fault>(body)
        }
    };
    let (stop, stopped) = oneshot::channel::<()>();
    let server = bench.server().await?.prefetch(3).handle_raw(&service, work);
    let running = tokio::spawn(server.run_until(stopped));
    let client = bench.client().await?;
    let first = async {
        // Nothing tells when `run_until` has subscribed.
        loop {
            match client.call_raw(&service, "").expect_responder().await {
                Err(error) if error.kind() == ErrorKind::NoResponder => sleep(QUIET / 10).await,
                served => return served,
            }
        }
    };
    ok("the first call", first).await?;
    let calls: Vec<_> = (0..3)
        .map(|_| tokio::spawn(client.call_raw(&service, "").into_future()))
        .collect();
    for _ in 0..4 {
        within("the handlers start", PROMPT, entered.recv()).await?;
    }
    let _ = stop.send(());
    joined("the server", running).await?;
    same(
        "handlers that had ended when the server did",
        ends.load(Ordering::SeqCst),
        4,
    )?;
    for call in calls {
        joined("a call that was under way", call).await?;
    }
    let call = client
        .call_raw(&service, "")
        .timeout(PROMPT)
        .expect_responder();
    refused(
        "a call after it",
        call,
        ErrorKind::NoResponder,
        Executed::No,
    )
    .await
    .map(drop)
}

async fn nothing_is_lost_around_a_shutdown(bench: Bench) -> Verdict {
    const CALLS: usize = 150;
    let service = bench.service("around")?;
    let runs = Arc::new(AtomicUsize::new(0));
    let mut servers = Vec::new();
    for _ in 0..2 {
        let counter = Arc::clone(&runs);
        let work = move |n: usize| {
            counter.fetch_add(1, Ordering::SeqCst);
            async move {
                sleep(Duration::from_millis(10)).await;
                Ok::<_, Fault>(n)
            }
        };
        servers.push(start(bench.server().await?.prefetch(4).handle(&service, work)).await?);
    }
    let client = bench.client().await?;
    let calls = (0..CALLS).map(|n| {
        let call = client.call::<usize>(&service, &n).timeout(4 * PROMPT);
        async move {
            same(
                "the reply",
                ok_within("a call around a shutdown", 5 * PROMPT, call).await?,
                n,
            )
        }
    });
    let shut_down = async {
        let counter = Arc::clone(&runs);
        let underway = move || counter.load(Ordering::SeqCst) > CALLS / 4;
        eventually(
            "calls are under way",
            2 * PROMPT,
            "a quarter of them has started",
            underway,
        )
        .await?;
        let Some(first) = servers.pop() else {
            return Ok(());
        };
        ok_within("shut down one of two servers", 2 * PROMPT, first.shutdown()).await
    };
    let (verdicts, shut_down) = tokio::join!(join_all(calls), shut_down);
    shut_down?;
    verdicts.into_iter().collect::<Verdict<()>>()?;
    same(
        "executions: a clean shutdown repeats none",
        runs.load(Ordering::SeqCst),
        CALLS,
    )
}

async fn shutdown_is_bounded(bench: Bench) -> Verdict {
    let service = bench.service("bounded")?;
    let (enter, mut entered) = mpsc::unbounded_channel();
    let endless = move |_: Bytes| {
        let _ = enter.send(());
        // Deaf to its cancellation.
        std::future::pending::<Result<Bytes, Fault>>()
    };
    let server = bench
        .server()
        .await?
        .drain_timeout(Duration::from_millis(300));
    let stuck = start(server.handle_raw(&service, endless)).await?;
    let client = bench.client().await?;
    let call = tokio::spawn(
        client
            .call_raw(&service, "")
            .timeout(12 * PROMPT)
            .into_future(),
    );
    within("the handler starts", PROMPT, entered.recv()).await?;
    let attempt =
        |_: Bytes, context: Context| async move { Ok::<_, Fault>(context.attempt().to_string()) };
    let _other = start(bench.server().await?.handle_raw(&service, attempt)).await?;
    let limit = Duration::from_secs(2);
    let result = within("shut down a server that is stuck", limit, stuck.shutdown()).await?;
    is_error(
        "shut down a server that is stuck",
        result,
        ErrorKind::DeadlineExceeded,
        Executed::Maybe,
    )?;
    let limit = bench.bounds().redelivery + PROMPT;
    let result = ended("the call that was stuck", limit, call).await?;
    let reply = result.map_err(|error| Stop::error("the call that was stuck", &error))?;
    body_is("the attempt that answered", &reply.body, b"2")
}

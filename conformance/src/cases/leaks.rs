//! Nothing is left of a call that is over: at once in the client, and after a while on the broker.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use antiphon_core::{ErrorKind, Executed, Fault, ReplyAddress, ServiceName};
use bytes::Bytes;
use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::bench::*;
use crate::case::{Stop, Verdict, cases};
use crate::harness::Connected;
use crate::peers::*;

cases!("leaks": [
    timed_out_calls_leave_nothing: G7,
    dropped_calls_leave_nothing: G7,
    answered_calls_leave_nothing: G7,
    dropped_inbox_is_removed: G7,
    killed_client_leaves_nothing: G7,
    vanished_caller_costs_nothing: G7,
    dropped_call_is_not_sent_later: G7,
    unserved_requests_go_by_themselves: G7,
]);

const CALLS: usize = 40;

async fn echo(body: Bytes) -> Result<Bytes, Fault> {
    Ok(body)
}

/// Waits until nothing of these inboxes is left on the broker.
async fn nothing_is_left(
    bench: &Bench,
    service: &ServiceName,
    inboxes: &[ReplyAddress],
) -> Verdict {
    let limit = bench.bounds().leak + LATE;
    let end = Instant::now() + limit;
    loop {
        let left = bench.harness().leftovers(service, inboxes).await?;
        if left.is_empty() {
            return Ok(());
        }
        let rule = format!("nothing is left on the broker after {limit:?}, but there is {left:?}");
        ensure("look at the broker", Instant::now() < end, rule)?;
        sleep(Duration::from_millis(100)).await;
    }
}

async fn timed_out_calls_leave_nothing(bench: Bench) -> Verdict {
    let service = bench.service("timed-out")?;
    let runs = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&runs);
    let count = move |body: Bytes| {
        counter.fetch_add(1, Ordering::SeqCst);
        async move { Ok::<_, Fault>(body) }
    };
    // There is a queue, and nobody takes from it.
    let running = start(bench.server().await?.handle_raw(&service, echo)).await?;
    ok("shut down", running.shutdown()).await?;
    let client = bench.client().await?;
    let inbox = client.inbox();
    let timeout = Duration::from_millis(400);
    let calls = (0..CALLS).map(|n| {
        client
            .call_raw(&service, vec![7; 500 * n])
            .timeout(timeout)
            .into_future()
    });
    for result in by_deadline("calls that nobody serves", timeout, join_all(calls)).await? {
        match result {
            Err(error) if error.kind() == ErrorKind::DeadlineExceeded => {}
            other => {
                return Err(Stop::failed(
                    "calls that nobody serves",
                    format!("they time out, not: {other:?}"),
                ));
            }
        }
    }
    same("pending calls, at once", client.stats().pending, 0)?;
    within("close the client", PROMPT, client.close()).await?;
    // Where the broker judges, a request expires later than its caller by the way that it took to the queue.
    sleep(QUIET).await;
    let running = start(bench.server().await?.handle_raw(&service, count)).await?;
    ok(
        "a call after them",
        bench.client().await?.call_raw(&service, ""),
    )
    .await?;
    ok("shut down", running.shutdown()).await?;
    same(
        "handlers started, of the expired requests and one call after them",
        runs.load(Ordering::SeqCst),
        1,
    )?;
    nothing_is_left(&bench, &service, &[inbox]).await
}

async fn dropped_calls_leave_nothing(bench: Bench) -> Verdict {
    let service = bench.service("dropped")?;
    let (open, gate) = watch::channel(false);
    let (started, seen) = watch::channel(0);
    let wait = move |body: Bytes| {
        let mut gate = gate.clone();
        started.send_modify(|count| *count += 1);
        async move {
            let _ = gate.wait_for(|open| *open).await;
            Ok::<_, Fault>(body)
        }
    };
    let running = start(
        bench
            .server()
            .await?
            .prefetch(CALLS)
            .handle_raw(&service, wait),
    )
    .await?;
    let client = bench.client().await?;
    let inbox = client.inbox();
    let calls: Vec<_> = (0..CALLS)
        .map(|_| {
            tokio::spawn(
                client
                    .call_raw(&service, "body")
                    .timeout(4 * PROMPT)
                    .into_future(),
            )
        })
        .collect();
    let mut seen = seen;
    let all = seen.wait_for(|count| *count == CALLS);
    let all_started = within("all handlers start", PROMPT, all).await?.is_ok();
    ensure("all handlers start", all_started, "the server lives")?;
    same("pending calls, before", client.stats().pending, CALLS)?;
    for call in calls {
        call.abort();
        // Once its task has ended, its future is dropped.
        let _ = within("drop a call", PROMPT, call).await?;
    }
    same("pending calls, at once", client.stats().pending, 0)?;
    let _ = open.send(true);
    let late = || client.stats().late;
    eventually(
        "after the replies",
        PROMPT,
        "each is counted as late",
        || late() == CALLS as u64,
    )
    .await?;
    ok("shut down", running.shutdown()).await?;
    within("close the client", PROMPT, client.close()).await?;
    nothing_is_left(&bench, &service, &[inbox]).await
}

async fn answered_calls_leave_nothing(bench: Bench) -> Verdict {
    let service = bench.service("answered")?;
    let running = start(bench.server().await?.handle_raw(&service, echo)).await?;
    let client = bench.client().await?;
    let inbox = client.inbox();
    // Some with bodies that a transport may keep apart.
    let calls = (0..CALLS).map(|n| ok("call", client.call_raw(&service, vec![7; 1000 * n])));
    join_all(calls)
        .await
        .into_iter()
        .collect::<Verdict<Vec<_>>>()?;
    same("pending calls", client.stats().pending, 0)?;
    drop(client);
    ok("shut down", running.shutdown()).await?;
    nothing_is_left(&bench, &service, &[inbox]).await
}

async fn dropped_inbox_is_removed(bench: Bench) -> Verdict {
    let service = bench.service("inbox")?;
    let transport = bench.connect().await?.transport;
    let inboxes = [
        Inbox::open(&transport).await?,
        Inbox::open(&transport).await?,
    ];
    let addresses = inboxes.each_ref().map(Inbox::address);
    drop(inboxes);
    nothing_is_left(&bench, &service, &addresses).await
}

async fn killed_client_leaves_nothing(bench: Bench) -> Verdict {
    let service = bench.service("killed-client")?;
    let Connected { transport, link } = bench.connect().await?;
    let inbox = Inbox::open(&transport).await?;
    let server = bench.connect().await?.transport;
    let mut requests = Requests::shared(&server, &service, 1).await?;
    let address = inbox.address();
    send(
        &transport,
        &service,
        request(
            Duration::from_secs(1),
            vec![7; 50_000],
            Some(address.clone()),
        ),
    )
    .await?;
    let delivery = requests.next("take the request").await?;
    link.sever().await?;
    drop((inbox, transport));
    // The reply goes to nobody.
    answer(delivery, vec![7; 50_000]).await?;
    requests.stop().await?;
    nothing_is_left(&bench, &service, &[address]).await
}

async fn vanished_caller_costs_nothing(bench: Bench) -> Verdict {
    let service = bench.service("vanished")?;
    let running = start(bench.server().await?.prefetch(4).handle_raw(&service, echo)).await?;
    let transport = bench.connect().await?.transport;
    let inbox = Inbox::open(&transport).await?;
    let address = inbox.address();
    drop(inbox);
    for _ in 0..CALLS {
        send(
            &transport,
            &service,
            request(4 * PROMPT, "", Some(address.clone())),
        )
        .await?;
    }
    let client = bench.client().await?;
    let started = Instant::now();
    ok(
        "a live call among those of vanished callers",
        client.call_raw(&service, ""),
    )
    .await?;
    let took = started.elapsed();
    let rule = format!("it is served within 2 s, not {took:?}");
    ensure(
        "a live call among those of vanished callers",
        took < Duration::from_secs(2),
        rule,
    )?;
    eventually(
        "the requests of vanished callers",
        2 * PROMPT,
        "each is handled",
        || running.stats().handled == CALLS as u64 + 1,
    )
    .await?;
    ok_within("shut down", 3 * PROMPT, running.shutdown()).await?;
    nothing_is_left(&bench, &service, &[address]).await
}

async fn dropped_call_is_not_sent_later(bench: Bench) -> Verdict {
    let service = bench.service("withdrawn")?;
    let server = bench.connect().await?.transport;
    let mut requests = Requests::shared(&server, &service, 4).await?;
    let Connected { transport, link } = bench.connect().await?;
    let client = client_on(&transport, antiphon_core::ClientConfig::default()).await?;
    link.sever().await?;
    until_disconnected(&transport).await?;
    let calls: Vec<_> = (0..3)
        .map(|_| {
            tokio::spawn(
                client
                    .call_raw(&service, "dropped")
                    .timeout(4 * PROMPT)
                    .into_future(),
            )
        })
        .collect();
    // They are on their way to the connection that is not there.
    eventually("calls without a connection", PROMPT, "they wait", || {
        client.stats().pending == 3
    })
    .await?;
    for call in calls {
        call.abort();
        let _ = within("drop a call", PROMPT, call).await?;
    }
    same("pending calls, at once", client.stats().pending, 0)?;
    link.restore().await?;
    let call = tokio::spawn(
        client
            .call_raw(&service, "live")
            .timeout(4 * PROMPT)
            .into_future(),
    );
    let delivery = requests
        .next_within("take the first request", 2 * PROMPT)
        .await?;
    body_is("the request that arrives", &delivery.request.body, b"live")?;
    answer(delivery, "").await?;
    joined("the call after them", call).await?;
    requests.none_for("after it", QUIET).await
}

async fn unserved_requests_go_by_themselves(bench: Bench) -> Verdict {
    let service = bench.service("unserved")?;
    // There is a queue, and nobody ever takes from it.
    let running = start(bench.server().await?.handle_raw(&service, echo)).await?;
    ok("shut down", running.shutdown()).await?;
    let client = bench.client().await?;
    let inbox = client.inbox();
    let timeout = Duration::from_millis(400);
    let calls = (0..CALLS).map(|n| {
        client
            .call_raw(&service, vec![7; 500 * n])
            .timeout(timeout)
            .into_future()
    });
    for result in by_deadline("calls that nobody serves", timeout, join_all(calls)).await? {
        is_error(
            "a call that nobody serves",
            result,
            ErrorKind::DeadlineExceeded,
            Executed::Maybe,
        )?;
    }
    within("close the client", PROMPT, client.close()).await?;
    // One look, at the end: it must not be the look that tidies up.
    sleep(bench.bounds().leak + LATE).await;
    let left = bench.harness().leftovers(&service, &[inbox]).await?;
    let rule = format!("nothing is left of what nobody took, but there is {left:?}");
    ensure("look at the broker, once", left.is_empty(), rule)
}

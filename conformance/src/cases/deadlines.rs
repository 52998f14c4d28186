//! A call ends at its deadline, and nobody starts on it afterwards, whatever the hosts' clocks say.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use antiphon_core::{Context, Deadline, ErrorKind, Executed, Fault};
use bytes::Bytes;
use futures_util::FutureExt;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, sleep_until};

use crate::bench::*;
use crate::case::{Stop, Verdict, cases};
use crate::harness::Connected;
use crate::peers::*;

cases!("deadlines": [
    timeout_is_kept: G1,
    tiny_timeout_is_kept: G1,
    expired_request_never_starts: G4,
    clock_ahead_changes_nothing: G4,
    clock_behind_changes_nothing: G4,
    deadline_is_never_early: G4,
    clock_starts_at_first_poll: G1,
    nested_call_inherits_what_is_left: G4,
    handler_is_cancelled_at_the_deadline: G4,
    waiting_to_be_sent_counts: G4,
]);

/// How much the clocks of two hosts may differ.
const SHIFT: Duration = Duration::from_secs(600);

/// By how much a deadline may be wrong: a transport that estimates the broker's clock errs by a round trip.
const CLOCK_ERROR: Duration = Duration::from_millis(50);

/// For how long a connection is away in front of which requests wait.
const OUTAGE: Duration = Duration::from_secs(2);

async fn timeout_is_kept(bench: Bench) -> Verdict {
    let service = bench.service("timeout")?;
    let server = bench.connect().await?.transport;
    let mut requests = Requests::shared(&server, &service, 2).await?;
    let client = bench.client().await?;
    for timeout in [Duration::from_millis(400), Duration::from_millis(700)] {
        let call = client.call_raw(&service, "").timeout(timeout);
        let result = by_deadline("a call that nobody answers", timeout, call).await?;
        is_error(
            "a call that nobody answers",
            result,
            ErrorKind::DeadlineExceeded,
            Executed::Maybe,
        )?;
        // A server had it: "maybe" was the truth.
        let delivery = requests.next("take the request").await?;
        answer(delivery, "late").await?;
    }
    same("pending calls", client.stats().pending, 0)
}

async fn tiny_timeout_is_kept(bench: Bench) -> Verdict {
    let service = bench.service("tiny")?;
    let echo = |body: Bytes| async move {
        sleep(Duration::from_millis(50)).await;
        Ok::<_, Fault>(body)
    };
    let _server = start(bench.server().await?.handle_raw(&service, echo)).await?;
    let client = bench.client().await?;
    for timeout in [0, 1, 300, 1_000, 1_500, 2_000].map(Duration::from_micros) {
        let call = client.call_raw(&service, "").timeout(timeout);
        match by_deadline("a call with next to no time", timeout, call).await? {
            Err(error) if error.kind() == ErrorKind::DeadlineExceeded => {}
            // The request reached a server with nothing left.
            Err(error) if error.kind() == ErrorKind::Rejected => {}
            other => {
                return Err(Stop::failed(
                    "a call with next to no time",
                    format!("it times out, not: {other:?}"),
                ));
            }
        }
    }
    ok("the next call", client.call_raw(&service, ""))
        .await
        .map(drop)
}

async fn expired_request_never_starts(bench: Bench) -> Verdict {
    let service = bench.service("expired")?;
    let runs = Arc::new(AtomicUsize::new(0));
    let (entered, entering) = oneshot::channel::<()>();
    let (leave, leaving) = oneshot::channel::<()>();
    let gate = std::sync::Mutex::new(Some((entered, leaving)));
    let counter = Arc::clone(&runs);
    // The first request holds the only place until the others have expired.
    let handler = move |body: Bytes| {
        counter.fetch_add(1, Ordering::SeqCst);
        let gate = gate.lock().ok().and_then(|mut gate| gate.take());
        async move {
            if let Some((entered, leaving)) = gate {
                let _ = entered.send(());
                let _ = leaving.await;
            }
            Ok::<_, Fault>(body)
        }
    };
    let _server = start(
        bench
            .server()
            .await?
            .prefetch(1)
            .handle_raw(&service, handler),
    )
    .await?;
    let client = bench.client().await?;
    let first = tokio::spawn(client.call_raw(&service, "first").into_future());
    within("the first handler starts", PROMPT, entering.map(drop)).await?;
    let budget = Duration::from_millis(300);
    let transport = bench.connect().await?.transport;
    for n in 0..5 {
        send(
            &transport,
            &service,
            request(budget, format!("expired {n}"), None),
        )
        .await?;
    }
    let result = by_deadline(
        "wait behind it",
        budget,
        client.call_raw(&service, "expired").timeout(budget),
    )
    .await?;
    is_error(
        "a call that waits behind it",
        result,
        ErrorKind::DeadlineExceeded,
        Executed::Maybe,
    )?;
    sleep(QUIET).await;
    let _ = leave.send(());
    joined("the first call", first).await?;
    ok(
        "a call after the expired ones",
        client.call_raw(&service, "live"),
    )
    .await?;
    same(
        "handlers started, of one call before, the expired ones, and one after",
        runs.load(Ordering::SeqCst),
        2,
    )
}

async fn clock_ahead_changes_nothing(bench: Bench) -> Verdict {
    shifted(bench, |at| at + SHIFT).await
}

async fn clock_behind_changes_nothing(bench: Bench) -> Verdict {
    shifted(bench, |at| at - SHIFT).await
}

/// A client whose wall clock is wrong: its requests are run while their budget lasts, and not after.
async fn shifted(bench: Bench, clock: fn(SystemTime) -> SystemTime) -> Verdict {
    let service = bench.service("shifted")?;
    let runs = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&runs);
    let left = move |_: Bytes, context: Context| {
        counter.fetch_add(1, Ordering::SeqCst);
        async move { Ok::<_, Fault>(context.remaining().as_millis().to_string()) }
    };
    // The server subscribes and goes, so that the queue is there and nobody takes from it.
    start(
        bench
            .server()
            .await?
            .handle_raw(&service, |body: Bytes| async move { Ok::<_, Fault>(body) }),
    )
    .await?
    .shutdown()
    .await
    .map_err(|error| Stop::error("shut down", &error))?;
    let transport = bench.connect().await?.transport;
    let mut inbox = Inbox::open(&transport).await?;
    let (short, long) = (Duration::from_millis(300), Duration::from_secs(20));
    for budget in [short, long] {
        let mut request = request(budget, "", Some(inbox.address()));
        request.deadline = Some(Deadline {
            at: clock(SystemTime::now() + budget),
            budget,
        });
        send(&transport, &service, request).await?;
    }
    let sent = Instant::now();
    sleep_until(sent + short + QUIET).await;
    let _server = start(bench.server().await?.handle_raw(&service, left)).await?;
    let reply = loop {
        let reply = inbox
            .next("wait for the reply to the request that has time left")
            .await?;
        // The other one may be reported as expired.
        if reply.outcome == antiphon_core::Outcome::Value {
            break reply;
        }
    };
    let found = String::from_utf8_lossy(&reply.body)
        .parse()
        .map(Duration::from_millis)
        .unwrap_or_default();
    let least = long.saturating_sub(sent.elapsed() + CLOCK_ERROR);
    let rule =
        format!("the handler has what is left of its {long:?}, at least {least:?}, not {found:?}");
    ensure(
        "read the handler's remaining time",
        least <= found && found <= long + LATE,
        rule,
    )?;
    sleep(QUIET).await;
    same(
        "handlers started, of one live and one expired request",
        runs.load(Ordering::SeqCst),
        1,
    )
}

async fn deadline_is_never_early(bench: Bench) -> Verdict {
    let service = bench.service("never-early")?;
    let server = bench.connect().await?.transport;
    let mut requests = Requests::shared(&server, &service, 1).await?;
    let client = bench.connect().await?.transport;
    let budget = Duration::from_secs(10);
    for _ in 0..5 {
        let sent = Instant::now();
        send(&client, &service, request(budget, "", None)).await?;
        let delivery = requests.next("take the request").await?;
        let Some(expires) = delivery.expires else {
            return Err(Stop::failed(
                "take the request",
                "a delivery with a deadline expires",
            ));
        };
        let early = (sent + budget).saturating_duration_since(expires);
        let rule = format!("the deadline is not early, but it is by {early:?}");
        ensure("take the request", early <= CLOCK_ERROR, rule)?;
        let late = expires.saturating_duration_since(Instant::now() + budget);
        ensure(
            "take the request",
            late <= CLOCK_ERROR,
            format!("no more than the budget is left, but {late:?} more is"),
        )?;
        answer(delivery, "").await?;
    }
    Ok(())
}

async fn clock_starts_at_first_poll(bench: Bench) -> Verdict {
    let service = bench.service("first-poll")?;
    let server = bench.connect().await?.transport;
    let mut requests = Requests::shared(&server, &service, 1).await?;
    let client = bench.client().await?;
    let timeout = Duration::from_secs(2);
    let call = client.call_raw(&service, "").timeout(timeout);
    let future = call.into_future();
    requests
        .none_for("a call that was never polled", 2 * QUIET)
        .await?;
    let task = tokio::spawn(future);
    let delivery = requests.next("take the request").await?;
    let budget = delivery
        .request
        .deadline
        .map(|deadline| deadline.budget)
        .unwrap_or_default();
    let rule =
        format!("the whole timeout of {timeout:?} is left at the first poll, not {budget:?}");
    ensure("read the request's budget", budget + LATE >= timeout, rule)?;
    answer(delivery, "").await?;
    joined("the call", task).await.map(drop)
}

async fn nested_call_inherits_what_is_left(bench: Bench) -> Verdict {
    let (outer, inner) = (bench.service("outer")?, bench.service("inner")?);
    let left = |_: (), context: Context| async move {
        Ok::<_, Fault>(context.remaining().as_millis() as u64)
    };
    let name = inner.clone();
    let nest = move |wait: u64, context: Context| {
        let name = name.clone();
        async move {
            sleep(Duration::from_millis(wait)).await;
            // Its own timeout is longer than what is left.
            let call = context
                .call::<u64>(&name, &())
                .timeout(Duration::from_secs(600));
            call.await.map_err(|error| {
                Fault::new(antiphon_core::Code::Unavailable, error.kind().as_str())
            })
        }
    };
    let server = bench
        .server()
        .await?
        .handle(&inner, left)
        .handle(&outer, nest);
    let _server = start(server).await?;
    let client = bench.client().await?;
    let timeout = Duration::from_secs(4);
    let call = client.call::<u64>(&outer, &500).timeout(timeout);
    let left = Duration::from_millis(ok("a call that calls", call).await?);
    let most = timeout - Duration::from_millis(500) + LATE;
    let rule = format!(
        "the nested call has at most {most:?}, what is left of the outer one, not {left:?}"
    );
    ensure("read the nested call's remaining time", left <= most, rule)?;
    ensure(
        "read the nested call's remaining time",
        left >= timeout / 4,
        format!("it has time left, not {left:?}"),
    )
}

async fn handler_is_cancelled_at_the_deadline(bench: Bench) -> Verdict {
    let service = bench.service("cancel")?;
    let (tell, told) = oneshot::channel();
    let tell = std::sync::Mutex::new(Some(tell));
    let wait = move |_: Bytes, context: Context| {
        let tell = tell.lock().ok().and_then(|mut tell| tell.take());
        async move {
            let deadline = context.deadline();
            context.cancellation().cancelled().await;
            if let Some(tell) = tell {
                let _ = tell.send((deadline, Instant::now()));
            }
            Ok::<_, Fault>("cancelled")
        }
    };
    let _server = start(bench.server().await?.handle_raw(&service, wait)).await?;
    let client = bench.client().await?;
    let timeout = Duration::from_millis(600);
    let called = Instant::now();
    let call = client.call_raw(&service, "").timeout(timeout);
    let result = by_deadline("a call whose handler waits", timeout, call).await?;
    ensure(
        "a call whose handler waits",
        result.is_err() || called.elapsed() >= timeout,
        "it ends at its deadline",
    )?;
    let Ok((deadline, fired)) = within("the handler's token fires", PROMPT, told).await? else {
        return Err(Stop::failed(
            "the handler's token fires",
            "the handler ends by its token, not before",
        ));
    };
    let seen = deadline.saturating_duration_since(called);
    let rule =
        format!("the handler sees the caller's deadline, {timeout:?} after the call, not {seen:?}");
    ensure(
        "read the handler's deadline",
        seen <= timeout + 2 * LATE && seen + LATE >= timeout,
        rule,
    )?;
    let late = fired.saturating_duration_since(deadline);
    ensure(
        "the handler's token fires",
        late <= 2 * LATE,
        format!("it fires at the deadline, not {late:?} later"),
    )?;
    ensure(
        "the handler's token fires",
        fired + LATE >= deadline,
        "it does not fire before the deadline",
    )
}

async fn waiting_to_be_sent_counts(bench: Bench) -> Verdict {
    let service = bench.service("waiting")?;
    let server = bench.connect().await?.transport;
    let mut requests = Requests::shared(&server, &service, 4).await?;
    let Connected { transport, link } = bench.connect().await?;
    link.sever().await?;
    until_disconnected(&transport).await?;
    // By the bare transport: a client may start a call anew, with what is left, when it hears that its inbox was lost.
    let (short, long) = (Duration::from_millis(300), Duration::from_secs(12));
    let started = Instant::now();
    let [expired, live] = [(short, "expired"), (long, "live")].map(|(budget, body)| {
        let (transport, message) = (
            Arc::clone(&transport),
            outbound(&service, request(budget, body, None)),
        );
        tokio::spawn(async move { transport.send(message).await })
    });
    sleep_until(started + OUTAGE).await;
    link.restore().await?;
    let delivery = requests
        .next_within("take the request that has time left", 2 * PROMPT)
        .await?;
    body_is("the request that arrives", &delivery.request.body, b"live")?;
    let Some(expires) = delivery.expires else {
        return Err(Stop::failed(
            "read the delivery",
            "a delivery with a deadline expires",
        ));
    };
    let caller = started + long;
    let late = expires.saturating_duration_since(caller);
    let rule = format!(
        "the time in front of the lost connection, {OUTAGE:?}, comes off its {long:?}, but its server has {late:?} more than its caller"
    );
    ensure("read the delivery's deadline", late <= OUTAGE / 4, rule)?;
    let early = caller.saturating_duration_since(expires);
    let rule = format!("the deadline is not early, but it is by {early:?}");
    ensure("read the delivery's deadline", early <= CLOCK_ERROR, rule)?;
    answer(delivery, "").await?;
    joined("send the request that has time left", live).await?;
    let result = ended("send a request that has none left", PROMPT, expired).await?;
    is_error(
        "send a request that has none left",
        result,
        ErrorKind::DeadlineExceeded,
        Executed::No,
    )?;
    requests.none_for("after it", QUIET).await
}

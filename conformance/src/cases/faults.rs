//! A failure arrives as what it is: its code, its words, and whether a handler was executed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use antiphon_core::{Code, ErrorKind, Executed, Fault};
use bytes::Bytes;
use futures_util::future::join_all;
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::bench::*;
use crate::case::{Stop, Verdict, cases};
use crate::peers::*;

cases!("faults": [
    handlers_fault_arrives_whole: G5,
    panic_is_internal: G5,
    undecodable_input_is_refused: G5,
    unknown_method_is_refused: G5,
    refusal_of_a_repeat_may_have_run: G5,
    slots_survive_faults: G1,
    refused_notify_is_dead_lettered: G2,
    oversized_fault_details_are_cut: G1,
]);

async fn handlers_fault_arrives_whole(bench: Bench) -> Verdict {
    let service = bench.service("fault")?;
    let fail = |code: Code| async move {
        let fault = Fault::new(code, format!("it is {code}: ä \"€\""))
            .with_details(json!({"n": [1, null, "x"]}));
        Err::<(), _>(if code == Code::Unavailable {
            fault.retryable()
        } else {
            fault
        })
    };
    let _server = start(bench.server().await?.handle(&service, fail)).await?;
    let client = bench.client().await?;
    for code in [
        Code::NotFound,
        Code::Unavailable,
        Code::ResourceExhausted,
        Code::DataLoss,
        Code::DeadlineExceeded,
    ] {
        let call = client.call::<()>(&service, &code);
        let error = refused(
            "a call whose handler fails",
            call,
            ErrorKind::Fault,
            Executed::Yes,
        )
        .await?;
        let Some(fault) = error.fault() else {
            return Err(Stop::failed(
                "read the error",
                "it carries the handler's fault",
            ));
        };
        same("the code", fault.code(), code)?;
        same(
            "the message",
            fault.message(),
            &format!("it is {code}: ä \"€\""),
        )?;
        same(
            "the details",
            fault.details(),
            Some(&json!({"n": [1, null, "x"]})),
        )?;
        same("retryable", error.is_retryable(), code == Code::Unavailable)?;
    }
    let bare = bench.service("bare-fault")?;
    let fail = |_: Bytes| async { Err::<Bytes, _>(Fault::new(Code::Aborted, "")) };
    let _server = start(bench.server().await?.handle_raw(&bare, fail)).await?;
    let error = refused(
        "a call whose handler says little",
        client.call_raw(&bare, ""),
        ErrorKind::Fault,
        Executed::Yes,
    )
    .await?;
    same(
        "the fault",
        error.fault(),
        Some(&Fault::new(Code::Aborted, "")),
    )
}

async fn panic_is_internal(bench: Bench) -> Verdict {
    let service = bench.service("panic")?;
    let _server = start(bench.server().await?.handle_raw(&service, explosive)).await?;
    let client = bench.client().await?;
    let call = client.call_raw(&service, "panic");
    let error = refused(
        "a call whose handler panics",
        call,
        ErrorKind::Fault,
        Executed::Yes,
    )
    .await?;
    same("the code", error.code(), Some(Code::Internal))?;
    ok("the next call", client.call_raw(&service, ""))
        .await
        .map(drop)
}

async fn explosive(body: Bytes) -> Result<Bytes, Fault> {
    match &body[..] {
        // Not by `panic!`: its message would be printed among the results.
        b"panic" => std::panic::resume_unwind(Box::new("planted")),
        b"fault" => Err(Fault::new(Code::Internal, "planted")),
        _ => Ok(body),
    }
}

async fn undecodable_input_is_refused(bench: Bench) -> Verdict {
    let service = bench.service("undecodable")?;
    let runs = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&runs);
    let count = move |n: u64| {
        counter.fetch_add(1, Ordering::SeqCst);
        async move { Ok::<_, Fault>(n) }
    };
    let _server = start(bench.server().await?.handle(&service, count)).await?;
    let client = bench.client().await?;
    for body in [&b"not json"[..], b"", b"\xff\xfe", b"-1"] {
        let call = client.call_raw(&service, body);
        let error = refused(
            "a call with a wrong body",
            call,
            ErrorKind::Rejected,
            Executed::No,
        )
        .await?;
        same("the code", error.code(), Some(Code::InvalidArgument))?;
    }
    same("handlers started", runs.load(Ordering::SeqCst), 0)?;
    same(
        "the next reply",
        ok("the next call", client.call::<u64>(&service, &7)).await?,
        7,
    )
}

async fn unknown_method_is_refused(bench: Bench) -> Verdict {
    let service = bench.service("unknown-method")?;
    let server = bench
        .server()
        .await?
        .method_raw(&service, "known", explosive);
    let _server = start(server).await?;
    let client = bench.client().await?;
    for call in [
        client.call_raw(&service, "").method("unknown"),
        client.call_raw(&service, ""),
    ] {
        let error = refused(
            "a call of a method that is not there",
            call,
            ErrorKind::Rejected,
            Executed::No,
        )
        .await?;
        same("the code", error.code(), Some(Code::Unimplemented))?;
    }
    ok(
        "the next call",
        client.call_raw(&service, "").method("known"),
    )
    .await
    .map(drop)
}

async fn refusal_of_a_repeat_may_have_run(bench: Bench) -> Verdict {
    let service = bench.service("repeat")?;
    let first = bench.connect().await?.transport;
    let mut requests = Requests::shared(&first, &service, 1).await?;
    let client = bench.client().await?;
    let call = tokio::spawn(
        client
            .call_raw(&service, "")
            .method("unknown")
            .timeout(4 * PROMPT)
            .into_future(),
    );
    let delivery = requests.next("take the request").await?;
    requests.stop().await?;
    // As if the server had died in its handler.
    drop(delivery);
    let server = bench
        .server()
        .await?
        .method_raw(&service, "known", explosive);
    let _server = start(server).await?;
    let result = ended("the call", bench.bounds().redelivery + PROMPT, call).await?;
    let error = is_error(
        "a refusal at the second attempt",
        result,
        ErrorKind::Rejected,
        Executed::Maybe,
    )?;
    same("the code", error.code(), Some(Code::Unimplemented))
}

async fn slots_survive_faults(bench: Bench) -> Verdict {
    let service = bench.service("slots")?;
    let _server = start(
        bench
            .server()
            .await?
            .prefetch(1)
            .handle_raw(&service, explosive),
    )
    .await?;
    let client = bench.client().await?;
    for _ in 0..5 {
        for body in ["panic", "fault"] {
            let call = client.call_raw(&service, body).timeout(PROMPT / 2);
            refused(
                "a call whose handler fails",
                call,
                ErrorKind::Fault,
                Executed::Yes,
            )
            .await?;
        }
        let reply = ok(
            "a call between failures",
            client
                .call_raw(&service, "fine")
                .timeout(Duration::from_secs(4)),
        )
        .await?;
        body_is("the reply", &reply.body, b"fine")?;
    }
    same("pending calls", client.stats().pending, 0)
}

async fn refused_notify_is_dead_lettered(bench: Bench) -> Verdict {
    let service = bench.service("refused-notify")?;
    let runs = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&runs);
    let count = move |body: Bytes| {
        counter.fetch_add(1, Ordering::SeqCst);
        async move { Ok::<_, Fault>(body) }
    };
    let server = bench.server().await?.method_raw(&service, "known", count);
    let _server = start(server).await?;
    let client = bench.client().await?;
    let before = bench.harness().dead_letters(&service).await?;
    same("dead letters before", before, 0)?;
    ok(
        "notify of a method that is not there",
        client.notify_raw(&service, "").method("unknown"),
    )
    .await?;
    // The dead letter is the only trace that it leaves.
    let end = Instant::now() + PROMPT;
    while bench.harness().dead_letters(&service).await? == 0 {
        let rule = format!("it is dead-lettered within {PROMPT:?}, but it is gone");
        ensure(
            "a one-way request that is refused",
            Instant::now() < end,
            rule,
        )?;
        sleep(Duration::from_millis(20)).await;
    }
    ok(
        "the next call",
        client.call_raw(&service, "").method("known"),
    )
    .await?;
    same(
        "handlers started, of one refused and one known request",
        runs.load(Ordering::SeqCst),
        1,
    )?;
    let after = bench.harness().dead_letters(&service).await?;
    same("dead letters after", after, 1)
}

async fn oversized_fault_details_are_cut(bench: Bench) -> Verdict {
    const LIMIT: usize = 10_000;
    let service = bench.service("details")?;
    let fail = |size: usize| async move {
        let fault = Fault::new(Code::FailedPrecondition, format!("{size} bytes of details"));
        Err::<(), _>(fault.with_details(json!("x".repeat(size))).retryable())
    };
    let server = bench.server().await?.max_body(LIMIT).handle(&service, fail);
    let _server = start(server).await?;
    let client = bench.client().await?;
    let calls = [10, 20 * LIMIT, 100, 2 * LIMIT, 1000].map(|size| {
        let call = client.call::<()>(&service, &size);
        async move {
            let step = format!("a call whose handler fails with {size} bytes of details");
            let error = refused(&step, call, ErrorKind::Fault, Executed::Yes).await?;
            let Some(fault) = error.fault() else {
                return Err(Stop::failed(step, "it carries the handler's fault"));
            };
            same("the code", fault.code(), Code::FailedPrecondition)?;
            same(
                "the message",
                fault.message(),
                &format!("{size} bytes of details"),
            )?;
            same("retryable", error.is_retryable(), true)?;
            let fits = (size < LIMIT).then(|| json!("x".repeat(size)));
            same(
                "the details, which fit or are left out",
                fault.details(),
                fits.as_ref(),
            )
        }
    });
    join_all(calls).await.into_iter().collect()
}

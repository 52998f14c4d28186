//! A request reaches a handler, and its reply the caller: whole, unchanged, once.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use antiphon_core::{ContentType, Context, CorrelationId, Fault, Headers, Response};
use bytes::Bytes;
use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use crate::bench::*;
use crate::case::{Stop, Verdict, cases};
use crate::peers::*;

cases!("round_trip": [
    typed: G1,
    raw_bytes: G1,
    methods: G1,
    headers_both_ways: G1,
    content_type_both_ways: G1,
    foreign_correlation_id_is_echoed: G3,
    services_do_not_mix: G1,
    node_queues_are_apart: G1,
    thousand_calls_at_once: G1 alone,
    notify_is_executed_once: G2,
]);

async fn typed(bench: Bench) -> Verdict {
    let service = bench.service("typed")?;
    let double = |numbers: Vec<i64>| async move {
        Ok::<_, Fault>(numbers.iter().map(|n| n * 2).collect::<Vec<_>>())
    };
    let _server = start(bench.server().await?.handle(&service, double)).await?;
    let client = bench.client().await?;
    let doubled: Vec<i64> = ok("call", client.call(&service, &[1, -2, 3_000_000_000_i64])).await?;
    same("the reply", doubled, vec![2, -4, 6_000_000_000])?;
    same("pending calls after the reply", client.stats().pending, 0)
}

async fn raw_bytes(bench: Bench) -> Verdict {
    let service = bench.service("raw")?;
    let reverse = |body: Bytes| async move {
        Ok::<_, Fault>(body.iter().rev().copied().collect::<Vec<u8>>())
    };
    let _server = start(bench.server().await?.handle_raw(&service, reverse)).await?;
    let client = bench.client().await?;
    for body in ["one", "two", "three"] {
        let reply = ok("call", client.call_raw(&service, body)).await?;
        body_is(
            "the reply",
            &reply.body,
            body.bytes().rev().collect::<Vec<u8>>().as_slice(),
        )?;
    }
    Ok(())
}

async fn methods(bench: Bench) -> Verdict {
    let service = bench.service("methods")?;
    let server = bench
        .server()
        .await?
        .handle_raw(&service, |_: Bytes| async { Ok::<_, Fault>("none") })
        .method_raw(&service, "add", |_: Bytes| async { Ok::<_, Fault>("add") })
        .method_raw(
            &service,
            "A-b_c.9",
            |_: Bytes, context: Context| async move {
                Ok::<_, Fault>(context.method().unwrap_or_default().to_owned())
            },
        );
    let _server = start(server).await?;
    let client = bench.client().await?;
    for method in ["add", "A-b_c.9"] {
        let reply = ok(
            "call a method",
            client.call_raw(&service, "").method(method),
        )
        .await?;
        body_is("the method that was run", &reply.body, method.as_bytes())?;
    }
    let reply = ok("call without a method", client.call_raw(&service, "")).await?;
    body_is("the method that was run", &reply.body, b"none")
}

async fn headers_both_ways(bench: Bench) -> Verdict {
    let service = bench.service("headers")?;
    let echo = |_: Bytes, context: Context| async move {
        Ok::<_, Fault>(Response {
            headers: context.headers().clone(),
            ..Response::default()
        })
    };
    let _server = start(bench.server().await?.handle_raw(&service, echo)).await?;
    let client = bench.client().await?;
    let mut many: Vec<(String, String)> = (0..60)
        .map(|n| (format!("n.{n}"), "v".repeat(100)))
        .collect();
    many.push(("empty".into(), String::new()));
    many.push(("text".into(), "ä €, \"quoted\"; = \\ {json}".into()));
    for headers in [vec![], vec![("trace.id".to_owned(), "1".to_owned())], many] {
        let mut call = client.call_raw(&service, "");
        for (name, value) in &headers {
            call = call.header(name, value);
        }
        let reply = ok("call", call).await?;
        same(
            "the headers that came back",
            sorted(&reply.headers),
            headers.into_iter().collect(),
        )?;
    }
    Ok(())
}

fn sorted(headers: &Headers) -> BTreeSet<(String, String)> {
    headers
        .iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

async fn content_type_both_ways(bench: Bench) -> Verdict {
    let service = bench.service("content-type")?;
    let swap = |_: Bytes, context: Context| async move {
        let seen = context.content_type().unwrap_or("none").to_owned();
        let content_type = ContentType::new("text/plain; charset=utf-8").ok();
        Ok::<_, Fault>(Response {
            body: seen.into(),
            content_type,
            ..Response::default()
        })
    };
    let _server = start(bench.server().await?.handle_raw(&service, swap)).await?;
    let client = bench.client().await?;
    let reply = ok(
        "call",
        client
            .call_raw(&service, "")
            .content_type("application/cbor"),
    )
    .await?;
    body_is(
        "the content type that the handler saw",
        &reply.body,
        b"application/cbor",
    )?;
    let back = reply.content_type.as_ref().map(ContentType::as_str);
    same(
        "the content type that came back",
        back,
        Some("text/plain; charset=utf-8"),
    )
}

async fn foreign_correlation_id_is_echoed(bench: Bench) -> Verdict {
    let service = bench.service("foreign-id")?;
    let echo = |body: Bytes| async move { Ok::<_, Fault>(body) };
    let _server = start(bench.server().await?.handle_raw(&service, echo)).await?;
    let transport = bench.connect().await?.transport;
    let mut inbox = Inbox::open(&transport).await?;
    let long = "x".repeat(255);
    for id in [
        "1",
        "F47AC10B-58CC-4372-A567-0E02B2C3D479",
        "a b\"c\\{d}",
        &long,
    ] {
        let mut request = request(PROMPT, "body", Some(inbox.address()));
        request.id = CorrelationId::parse(id).map_err(|error| Stop::error("make an id", &error))?;
        send(&transport, &service, request).await?;
        let reply = inbox.next("wait for the reply").await?;
        same(
            "the reply's correlation id",
            reply.id.to_string().as_str(),
            id,
        )?;
    }
    Ok(())
}

async fn services_do_not_mix(bench: Bench) -> Verdict {
    let client = bench.client().await?;
    let names = [
        bench.service("a")?,
        bench.service("b")?,
        named(&format!("{}.more", bench.service("c")?))?,
    ];
    let mut server = bench.server().await?;
    for name in &names {
        let own = name.to_string();
        server = server.handle_raw(name, move |_: Bytes| {
            let own = own.clone();
            async move { Ok::<_, Fault>(own) }
        });
    }
    let _server = start(server).await?;
    let calls = names.iter().cycle().take(60).map(|name| {
        let call = client.call_raw(name, "");
        async move {
            body_is(
                "the service that replied",
                &ok("call", call).await?.body,
                name.as_str().as_bytes(),
            )
        }
    });
    join_all(calls).await.into_iter().collect()
}

async fn node_queues_are_apart(bench: Bench) -> Verdict {
    let service = bench.service("node")?;
    let node = |name: &str| named(&format!("{service}@{name}"));
    let (seven, eight) = (node("node-7")?, node("node-8")?);
    let tell = |text: &'static str| move |_: Bytes| async move { Ok::<_, Fault>(text) };
    let server = bench
        .server()
        .await?
        .handle_raw(&service, tell("any"))
        .handle_raw(&seven, tell("seven"));
    let _first = start(server).await?;
    let _second = start(bench.server().await?.handle_raw(&eight, tell("eight"))).await?;
    let client = bench.client().await?;
    // Not in turn: servers that compete for one queue may well be served in turn.
    let calls = [(&service, "any"), (&seven, "seven"), (&eight, "eight")].map(|call| [call; 4]);
    for (name, expected) in calls.into_iter().flatten() {
        let reply = ok("call", client.call_raw(name, "")).await?;
        body_is("who replied", &reply.body, expected)?;
    }
    Ok(())
}

async fn thousand_calls_at_once(bench: Bench) -> Verdict {
    const CALLS: usize = 1000;
    const WORK: Duration = Duration::from_millis(500);
    let service = bench.service("thousand")?;
    let slow = |n: usize| async move {
        sleep(WORK).await;
        Ok::<_, Fault>(n)
    };
    let _server = start(bench.server().await?.prefetch(CALLS).handle(&service, slow)).await?;
    let client = bench.client().await?;
    ok("warm up", client.call::<usize>(&service, &0)).await?;
    let started = Instant::now();
    let calls = (0..CALLS).map(|n| {
        let call = client.call(&service, &n);
        async move {
            same(
                "the reply of one of many calls",
                ok_within("call", 4 * PROMPT, call).await?,
                n,
            )
        }
    });
    join_all(calls).await.into_iter().collect::<Verdict>()?;
    let took = started.elapsed();
    let rule = format!("they end in about the time of one handler, {WORK:?}, not in {took:?}");
    ensure("1,000 calls at once", took < 5 * WORK, rule)
}

async fn notify_is_executed_once(bench: Bench) -> Verdict {
    let service = bench.service("notify")?;
    let runs = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&runs);
    let count = move |n: usize, context: Context| {
        let counter = Arc::clone(&counter);
        async move {
            if context.reply_to().is_some() {
                return Err(Fault::new(
                    antiphon_core::Code::InvalidArgument,
                    "a notification has no reply address",
                ));
            }
            counter.fetch_add(n, Ordering::SeqCst);
            Ok(())
        }
    };
    let _server = start(bench.server().await?.handle(&service, count)).await?;
    let client = bench.client().await?;
    for _ in 0..10 {
        ok("notify", client.notify(&service, &1)).await?;
    }
    let seen = || runs.load(Ordering::SeqCst);
    eventually("after 10 notifications", PROMPT, "each is executed", || {
        seen() >= 10
    })
    .await?;
    sleep(QUIET).await;
    same("executions of 10 notifications", seen(), 10)?;
    same("pending calls", client.stats().pending, 0)
}

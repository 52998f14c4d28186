//! A coordinated channel: many tasks out, a private stream of results back.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use antiphon_core::{
    Client, ContentType, Context, Fault, Headers, Response, Server, ServiceName, TaskResults,
};
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio::time::sleep;

use crate::bench::*;
use crate::case::{Verdict, cases};

cases!("channels": [
    results_come_with_their_metadata: G1,
    unacknowledged_comes_again: G2,
    closing_ends_the_stream: G1,
    channels_do_not_mix: G3,
    dropped_results_release_everything: G7,
    window_holds_the_sender: G7,
    faults_are_results: G5,
    lost_server_does_not_hang_it: G1,
    many_in_order: G1,
    many_as_completed: G1,
    many_are_no_more_than_wanted: G7,
]);

async fn echo(body: Bytes) -> Result<Bytes, Fault> {
    Ok(body)
}

/// The metadata of all results that still come, each acknowledged.
async fn drain(step: &str, results: &mut TaskResults<u32>) -> Verdict<Vec<u32>> {
    let mut found = Vec::new();
    while let Some(result) = within(step, 2 * PROMPT, results.next()).await? {
        if let Ok(body) = result.body() {
            body_is(step, body, result.metadata().to_string())?;
        }
        found.push(*result.metadata());
        result.ack();
    }
    found.sort_unstable();
    Ok(found)
}

async fn results_come_with_their_metadata(bench: Bench) -> Verdict {
    let service = bench.service("tasks")?;
    let described = |body: Bytes| async move {
        let mut headers = Headers::new();
        headers
            .insert("task", &String::from_utf8_lossy(&body))
            .map_err(|error| Fault::new(antiphon_core::Code::Internal, error.message()))?;
        Ok(Response {
            body,
            content_type: ContentType::new("text/plain").ok(),
            headers,
        })
    };
    let _one = start(bench.server().await?.handle_raw(&service, described)).await?;
    let _two = start(bench.server().await?.handle_raw(&service, described)).await?;
    let client = bench.client().await?;
    let (sender, mut results) = ok("open a channel", client.channel(&service).open()).await?;
    for task in 0..200_u32 {
        ok("send a task", sender.send_raw(task.to_string(), task)).await?;
    }
    sender.close();
    let mut found = Vec::new();
    // As the stream that it is; elsewhere by its own `next`.
    while let Some(result) = within("a result", 2 * PROMPT, StreamExt::next(&mut results)).await? {
        let task = *result.metadata();
        let reply = ok("a reply", async { result.reply().map_err(Clone::clone) }).await?;
        body_is("a reply", &reply.body, task.to_string())?;
        let said = (
            reply.headers.find("task").map(str::to_owned),
            reply.content_type.as_ref().map(ContentType::as_str),
        );
        same(
            "what is said of a reply",
            said,
            (Some(task.to_string()), Some("text/plain")),
        )?;
        found.push(task);
        result.ack();
    }
    found.sort_unstable();
    same("the results", found, (0..200).collect())
}

async fn unacknowledged_comes_again(bench: Bench) -> Verdict {
    let service = bench.service("again")?;
    let _server = start(bench.server().await?.handle_raw(&service, echo)).await?;
    let client = bench.client().await?;
    let (sender, mut results) = ok("open a channel", client.channel(&service).open()).await?;
    ok("send a task", sender.send_raw("7", 7_u32)).await?;
    sender.close();
    for delivery in 1..=3 {
        let result = within("the result", PROMPT, results.next()).await?;
        same(
            "how often it was delivered",
            result.as_ref().map(antiphon_core::TaskResult::deliveries),
            Some(delivery),
        )?;
    }
    same(
        "the last delivery",
        drain("the result", &mut results).await?,
        vec![7],
    )?;
    ensure(
        "the stream",
        within("the end", PROMPT, results.next()).await?.is_none(),
        "it has ended",
    )
}

async fn closing_ends_the_stream(bench: Bench) -> Verdict {
    let service = bench.service("closing")?;
    let slow = |body: Bytes| async move {
        sleep(QUIET).await;
        Ok::<_, Fault>(body)
    };
    let _server = start(bench.server().await?.handle_raw(&service, slow)).await?;
    let client = bench.client().await?;
    let (sender, mut results) = ok("open a channel", client.channel(&service).open()).await?;
    for task in 0..5_u32 {
        ok("send a task", sender.send_raw(task.to_string(), task)).await?;
    }
    // Before any of them has its result.
    drop(sender);
    same(
        "the results",
        drain("the results", &mut results).await?,
        (0..5).collect(),
    )?;
    let (sender, mut results) =
        ok("open a channel", client.channel(&service).open::<u32>()).await?;
    drop(sender);
    same(
        "the results of no task",
        drain("the results", &mut results).await?,
        Vec::new(),
    )
}

async fn channels_do_not_mix(bench: Bench) -> Verdict {
    let service = bench.service("apart")?;
    let _server = start(bench.server().await?.handle_raw(&service, echo)).await?;
    let client = bench.client().await?;
    let (even, mut evens) = ok("open a channel", client.channel(&service).open()).await?;
    let (odd, mut odds) = ok("open a channel", client.channel(&service).open()).await?;
    for task in 0..100_u32 {
        let sender = if task % 2 == 0 { &even } else { &odd };
        ok("send a task", sender.send_raw(task.to_string(), task)).await?;
    }
    drop((even, odd));
    let (evens, odds) = (
        drain("the even results", &mut evens).await?,
        drain("the odd results", &mut odds).await?,
    );
    same("the even results", evens, (0..100).step_by(2).collect())?;
    same("the odd results", odds, (1..100).step_by(2).collect())
}

async fn dropped_results_release_everything(bench: Bench) -> Verdict {
    let service = bench.service("released")?;
    let (sender_of_words, mut words) = mpsc::unbounded_channel();
    let (addresses, mut inbox) = mpsc::unbounded_channel();
    let hang = move |body: Bytes, context: Context| {
        let (words, addresses) = (sender_of_words.clone(), addresses.clone());
        async move {
            // The case may have ended.
            let _ = addresses.send(context.reply_to().cloned());
            context.cancellation().cancelled().await;
            let _ = words.send(());
            Ok::<_, Fault>(body)
        }
    };
    let _server = start(bench.server().await?.handle_raw(&service, hang)).await?;
    let client = bench.client().await?;
    let (sender, results) = ok("open a channel", client.channel(&service).open()).await?;
    ok("send a task", sender.send_raw("0", 0_u32)).await?;
    let address = within("the task is started", PROMPT, inbox.recv())
        .await?
        .flatten();
    drop(results);
    within("the task's handler is cancelled", TOLD + LATE, words.recv()).await?;
    let refused_send = within("send a task to nobody", PROMPT, sender.send_raw("1", 1)).await?;
    is_error(
        "send a task to nobody",
        refused_send,
        antiphon_core::ErrorKind::Closed,
        antiphon_core::Executed::No,
    )?;
    drop(sender);
    let inboxes: Vec<_> = address.into_iter().collect();
    same("how many inboxes the task knew", inboxes.len(), 1)?;
    gone(&bench, &service, &inboxes).await
}

/// Waits until nothing is left of these inboxes.
async fn gone(
    bench: &Bench,
    service: &ServiceName,
    inboxes: &[antiphon_core::ReplyAddress],
) -> Verdict {
    let end = tokio::time::Instant::now() + bench.bounds().leak + PROMPT;
    loop {
        let left = bench.harness().leftovers(service, inboxes).await?;
        let left: Vec<_> = left
            .into_iter()
            .filter(|name| inboxes.iter().any(|inbox| name.contains(inbox.as_str())))
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        ensure(
            "a released channel",
            tokio::time::Instant::now() < end,
            format!("nothing is left of it on the broker, but: {left:?}"),
        )?;
        sleep(Duration::from_millis(50)).await;
    }
}

async fn window_holds_the_sender(bench: Bench) -> Verdict {
    let service = bench.service("window")?;
    let _server = start(bench.server().await?.handle_raw(&service, echo)).await?;
    let client = bench.client().await?;
    let opened = client.channel(&service).window(2).open();
    let (sender, mut results) = ok("open a channel", opened).await?;
    for task in 0..2_u32 {
        ok("send a task", sender.send_raw(task.to_string(), task)).await?;
    }
    let third = tokio::time::timeout(QUIET, sender.send_raw("2", 2)).await;
    ensure(
        "a task over the window",
        third.is_err(),
        "it waits until another is acknowledged",
    )?;
    if let Some(result) = within("a result", PROMPT, results.next()).await? {
        result.ack();
    }
    ok("send a task into a free place", sender.send_raw("3", 3)).await?;
    drop(sender);
    let found = drain("the results", &mut results).await?;
    same("how many results are left", found.len(), 2)
}

async fn faults_are_results(bench: Bench) -> Verdict {
    let service = bench.service("faulty")?;
    let odd_fails = |body: Bytes| async move {
        match &body[..] {
            b"1" => Err(Fault::new(antiphon_core::Code::OutOfRange, "odd")),
            _ => Ok(body),
        }
    };
    let _server = start(bench.server().await?.handle_raw(&service, odd_fails)).await?;
    let client = bench.client().await?;
    let (sender, mut results) = ok("open a channel", client.channel(&service).open()).await?;
    for task in 0..3_u32 {
        ok("send a task", sender.send_raw(task.to_string(), task)).await?;
    }
    drop(sender);
    let mut failed = BTreeSet::new();
    while let Some(result) = within("a result", PROMPT, results.next()).await? {
        if result.body().is_err() {
            failed.insert(*result.metadata());
        }
        result.ack();
    }
    same("which tasks failed", failed, BTreeSet::from([1]))
}

async fn lost_server_does_not_hang_it(bench: Bench) -> Verdict {
    let service = bench.service("lost")?;
    let connected = bench.connect().await?;
    let hangs_but_for_0 = |body: Bytes| async move {
        if &body[..] != b"0" {
            std::future::pending::<()>().await;
        }
        Ok::<_, Fault>(body)
    };
    let lost = Server::new(connected.transport).handle_raw(&service, hangs_but_for_0);
    let lost = start(lost).await?;
    let client: Client = bench.client().await?;
    let opened = client
        .channel(&service)
        .timeout(Duration::from_secs(2))
        .open();
    let (sender, mut results) = ok("open a channel", opened).await?;
    for task in 0..10_u32 {
        ok("send a task", sender.send_raw(task.to_string(), task)).await?;
    }
    drop(sender);
    let first = within("the first result", PROMPT, results.next()).await?;
    let first = first.map(|result| {
        let answered = (*result.metadata(), result.body().is_ok());
        result.ack();
        answered
    });
    same("the first result", first, Some((0, true)))?;
    connected.link.sever().await?;
    let found = drain("the results", &mut results).await?;
    same("the results", found, (1..10).collect())?;
    drop(lost);
    Ok(())
}

async fn many(
    bench: &Bench,
    label: &str,
) -> Verdict<(Client, ServiceName, antiphon_core::RunningServer)> {
    let service = bench.service(label)?;
    let first_is_slow = |body: Bytes| async move {
        if &body[..] == b"0" {
            sleep(QUIET).await;
        }
        Ok::<_, Fault>(body)
    };
    let server = start(bench.server().await?.handle_raw(&service, first_is_slow)).await?;
    Ok((bench.client().await?, service, server))
}

async fn many_in_order(bench: Bench) -> Verdict {
    let (client, service, _server) = many(&bench, "in-order").await?;
    let inputs = (0..100_u32).map(|input| input.to_string());
    let mut outputs = client
        .call_many_raw(&service, inputs)
        .concurrency(10)
        .in_order();
    for expected in 0..100_u32 {
        let output = within("an output", 2 * PROMPT, outputs.next()).await?;
        let reply = ok("an output", async { output.unwrap_or_else(|| Err(none())) }).await?;
        body_is("an output", &reply.body, expected.to_string())?;
    }
    ensure(
        "the outputs",
        within("the end", PROMPT, outputs.next()).await?.is_none(),
        "they have ended",
    )
}

async fn many_as_completed(bench: Bench) -> Verdict {
    let (client, service, _server) = many(&bench, "as-completed").await?;
    let inputs = (0..20_u32).map(|input| input.to_string());
    let mut outputs = client
        .call_many_raw(&service, inputs)
        .concurrency(5)
        .as_completed();
    let mut positions = Vec::new();
    while let Some((position, output)) = within("an output", 2 * PROMPT, outputs.next()).await? {
        let reply = ok("an output", async { output }).await?;
        body_is("an output", &reply.body, position.to_string())?;
        positions.push(position);
    }
    ensure(
        "the outputs",
        positions.first() != Some(&0),
        "the slow one holds up no other",
    )?;
    positions.sort_unstable();
    same("the outputs", positions, (0..20).collect())
}

fn none() -> antiphon_core::Error {
    antiphon_core::Error::not_executed(antiphon_core::ErrorKind::Closed, "there is no output")
}

/// As many inputs are taken and as many handlers run as may be under way; dropped, those are cancelled, and no more are sent.
async fn many_are_no_more_than_wanted(bench: Bench) -> Verdict {
    const AT_ONCE: u32 = 4;
    const ANSWERED: u32 = 20;
    let service = bench.service("wanted")?;
    let (says, mut words) = mpsc::unbounded_channel();
    let hang = move |body: Bytes, context: Context| {
        let says = says.clone();
        async move {
            let input = String::from_utf8_lossy(&body).parse::<u32>();
            if input.is_ok_and(|input| input >= ANSWERED) {
                // The case may have ended.
                let _ = says.send("started");
                context.cancellation().cancelled().await;
                let _ = says.send("cancelled");
            }
            Ok::<_, Fault>(body)
        }
    };
    let _server = start(bench.server().await?.handle_raw(&service, hang)).await?;
    let client = bench.client().await?;
    let taken = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&taken);
    let inputs = (0_u32..).map(move |input| {
        counted.fetch_add(1, Ordering::SeqCst);
        input.to_string()
    });
    let mut outputs = client
        .call_many_raw(&service, inputs)
        .concurrency(AT_ONCE as usize)
        .in_order();
    for expected in 0..ANSWERED {
        let output = within("an output", PROMPT, outputs.next()).await?;
        let reply = ok("an output", async { output.unwrap_or_else(|| Err(none())) }).await?;
        body_is("an output", &reply.body, expected.to_string())?;
    }
    // It works while it is polled. This one never comes.
    let next = tokio::time::timeout(2 * QUIET, outputs.next()).await;
    ensure("the next output", next.is_err(), "its handler hangs")?;
    for _ in 0..AT_ONCE {
        let word = within("a handler starts", PROMPT, words.recv()).await?;
        same("what a handler says", word, Some("started"))?;
    }
    same(
        "how many inputs were taken",
        taken.load(Ordering::SeqCst),
        ANSWERED + AT_ONCE,
    )?;
    drop(outputs);
    for _ in 0..AT_ONCE {
        let word = within("a handler is cancelled", TOLD + LATE, words.recv()).await?;
        same("what a handler says", word, Some("cancelled"))?;
    }
    same(
        "how many inputs were taken in the end",
        taken.load(Ordering::SeqCst),
        ANSWERED + AT_ONCE,
    )
}

//! A call that takes its time: its caller learns where it runs, how far it is, and that its server is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use antiphon_core::{CallEvent, Context, ErrorKind, Executed, Fault};
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use crate::bench::*;
use crate::case::{Stop, Verdict, cases};

cases!("long_calls": [
    running_is_told: G1,
    progress_arrives_in_order: G1,
    progress_of_a_quick_handler_arrives: G1,
    fast_calls_are_told_nothing: G7,
    lost_server_is_told: G1,
    slow_handler_is_not_lost: G1,
    taken_over_is_not_lost: G2,
]);

const BEAT: Duration = Duration::from_millis(500);

/// What a call's observer sees, as text.
fn observer() -> (
    impl FnMut(CallEvent) + Send + 'static,
    mpsc::UnboundedReceiver<String>,
) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let observe = move |event| {
        let text = match event {
            CallEvent::Running { node } => format!("running on {node}"),
            CallEvent::Progress { body, .. } => String::from_utf8_lossy(&body).into_owned(),
            other => format!("{other:?}"),
        };
        // The case may have ended.
        let _ = sender.send(text);
    };
    (observe, receiver)
}

async fn running_is_told(bench: Bench) -> Verdict {
    let service = bench.service("long")?;
    let slow = |body: Bytes| async move {
        sleep(4 * BEAT).await;
        Ok::<_, Fault>(body)
    };
    let server = bench.server().await?.node("here").heartbeat(BEAT);
    let _server = start(server.handle_raw(&service, slow)).await?;
    let client = bench.client().await?;
    let (observe, mut told) = observer();
    let call = tokio::spawn(
        client
            .call_raw(&service, "body")
            .observe(observe)
            .into_future(),
    );
    let word = within("the first word of a long call", BEAT + PROMPT, told.recv()).await?;
    same(
        "the first word of a long call",
        word.as_deref(),
        Some("running on here"),
    )?;
    ensure("a long call", !call.is_finished(), "it goes on")?;
    body_is(
        "the reply",
        &joined("a long call", call).await?.body,
        "body",
    )
}

async fn progress_arrives_in_order(bench: Bench) -> Verdict {
    let service = bench.service("progress")?;
    let steps = |_: Bytes, context: Context| async move {
        for step in 1..=5 {
            context.progress_raw(format!("step {step}")).await?;
        }
        sleep(QUIET).await;
        Ok::<_, Fault>("done")
    };
    let _server = start(bench.server().await?.handle_raw(&service, steps)).await?;
    let client = bench.client().await?;
    let (observe, mut told) = observer();
    let call = client.call_raw(&service, "").observe(observe);
    body_is("the reply", &ok("a call", call).await?.body, "done")?;
    for step in 1..=5 {
        let word = within("the progress", PROMPT, told.recv()).await?;
        same("the progress", word, Some(format!("step {step}")))?;
    }
    Ok(())
}

async fn progress_of_a_quick_handler_arrives(bench: Bench) -> Verdict {
    let service = bench.service("quick")?;
    let step = |_: Bytes, context: Context| async move {
        context.progress_raw("half").await?;
        Ok::<_, Fault>("done")
    };
    let _server = start(bench.server().await?.handle_raw(&service, step)).await?;
    let client = bench.client().await?;
    for _ in 0..20 {
        let (observe, mut told) = observer();
        ok("a call", client.call_raw(&service, "").observe(observe)).await?;
        // Said before the reply, so heard before it.
        same(
            "the progress",
            told.try_recv().ok().as_deref(),
            Some("half"),
        )?;
    }
    Ok(())
}

async fn fast_calls_are_told_nothing(bench: Bench) -> Verdict {
    let service = bench.service("fast")?;
    let echo = |body: Bytes| async move { Ok::<_, Fault>(body) };
    let _server = start(bench.server().await?.handle_raw(&service, echo)).await?;
    let client = bench.client().await?;
    let (observe, mut told) = observer();
    ok("a call", client.call_raw(&service, "").observe(observe)).await?;
    ensure(
        "a fast call",
        told.try_recv().is_err(),
        "its observer hears nothing",
    )
}

async fn lost_server_is_told(bench: Bench) -> Verdict {
    let service = bench.service("lost")?;
    let connected = bench.connect().await?;
    let hang = |_: Bytes| std::future::pending::<Result<Bytes, Fault>>();
    let server = antiphon_core::Server::new(connected.transport).heartbeat(BEAT);
    let server = start(server.handle_raw(&service, hang)).await?;
    let client = bench.client().await?;
    let (observe, mut told) = observer();
    let call = client
        .call_raw(&service, "")
        .timeout(Duration::from_secs(600))
        .observe(observe);
    let call = tokio::spawn(call.into_future());
    within("the first word of a long call", BEAT + PROMPT, told.recv()).await?;
    let lost = Instant::now();
    connected.link.sever().await?;
    let result = ended("the call of a lost server", 3 * BEAT + 2 * PROMPT, call).await?;
    is_error(
        "the call of a lost server",
        result,
        ErrorKind::ServerLost,
        Executed::Maybe,
    )?;
    let took = lost.elapsed();
    ensure(
        "the call of a lost server",
        took <= 4 * BEAT + LATE,
        format!("it ends within three heartbeats of the last one, not after {took:?}"),
    )?;
    drop(server);
    Ok(())
}

async fn slow_handler_is_not_lost(bench: Bench) -> Verdict {
    let service = bench.service("slow")?;
    let slow = |body: Bytes| async move {
        sleep(10 * BEAT).await;
        Ok::<_, Fault>(body)
    };
    let _server = start(
        bench
            .server()
            .await?
            .heartbeat(BEAT)
            .handle_raw(&service, slow),
    )
    .await?;
    let client = bench.client().await?;
    let call = client.call_raw(&service, "body");
    let reply = ok_within("a slow call", 10 * BEAT + PROMPT, call).await?;
    body_is("the reply", &reply.body, "body")
}

async fn taken_over_is_not_lost(bench: Bench) -> Verdict {
    let service = bench.service("taken-over")?;
    let beat = bench.bounds().redelivery.max(BEAT);
    let first = Arc::new(AtomicBool::new(true));
    let handler = move |body: Bytes| {
        let hangs = first.swap(false, Ordering::SeqCst);
        async move {
            if hangs {
                std::future::pending::<()>().await;
            }
            sleep(beat).await;
            Ok::<_, Fault>(body)
        }
    };
    let client = bench.client().await?;
    let doomed = bench.connect().await?;
    let server = antiphon_core::Server::new(Arc::clone(&doomed.transport)).heartbeat(beat);
    let doomed_server = start(server.handle_raw(&service, handler.clone())).await?;
    let (observe, mut told) = observer();
    let call = client
        .call_raw(&service, "body")
        .timeout(Duration::from_secs(100))
        .observe(observe);
    let call = tokio::spawn(call.into_future());
    within("the first word of a long call", beat + PROMPT, told.recv()).await?;
    let server = bench.server().await?.heartbeat(beat);
    let _heir = start(server.handle_raw(&service, handler)).await?;
    doomed.link.sever().await?;
    let result = ended("a call that was taken over", 4 * beat + 2 * PROMPT, call).await?;
    let reply = result.map_err(|error| Stop::error("a call that was taken over", &error))?;
    body_is("the reply", &reply.body, "body")?;
    drop(doomed_server);
    Ok(())
}

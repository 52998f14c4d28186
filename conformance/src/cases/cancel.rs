//! A call that is given up: its request is not started, and a handler that runs is told.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use antiphon_core::{Client, Context, ErrorKind, Executed, Fault, ServiceName, Signals};
use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::bench::*;
use crate::case::{Stop, Verdict, cases};
use crate::peers::*;

cases!("cancel": [
    dropped_call_cancels_its_handler: G7,
    closed_client_cancels_its_handlers: G7,
    cancelled_while_running: G5,
    cancelled_while_queued: G5,
    given_up_is_not_started: G4,
    given_up_is_withdrawn: G7,
    many_are_given_up_at_once: G7,
    vanished_caller_cancels_its_handler: G7,
    pickup_timeout_is_no: G5,
    pickup_is_in_time: G1,
    pickup_times_out_behind_a_busy_server: G5,
]);

/// A request takes its time to its queue, and no transport says when it is there. Given up before, it is not sent at all,
/// which is a lesser test and no failure.
async fn queued() {
    tokio::time::sleep(QUIET).await;
}

/// Waits as long as the servers may take to learn that a call was given up.
async fn told() {
    tokio::time::sleep(TOLD).await;
}

/// A handler that tells when it starts, and when it is cancelled; it ends only then.
fn telling(
    sender: &mpsc::UnboundedSender<&'static str>,
) -> impl Fn(Bytes, Context) -> futures_util::future::BoxFuture<'static, Result<Bytes, Fault>>
+ Send
+ Sync
+ 'static {
    let sender = sender.clone();
    move |body, context| {
        let sender = sender.clone();
        Box::pin(async move {
            // The case may have ended.
            let _ = sender.send("started");
            context.cancellation().cancelled().await;
            let _ = sender.send("cancelled");
            Ok(body)
        })
    }
}

async fn said(
    receiver: &mut mpsc::UnboundedReceiver<&'static str>,
    word: &'static str,
    limit: Duration,
) -> Verdict {
    let said = within(
        &format!("the handler says that it is {word}"),
        limit,
        receiver.recv(),
    )
    .await?;
    same("what the handler says", said, Some(word))
}

async fn dropped_call_cancels_its_handler(bench: Bench) -> Verdict {
    let service = bench.service("dropped")?;
    let (sender, mut receiver) = mpsc::unbounded_channel();
    let _server = start(bench.server().await?.handle_raw(&service, telling(&sender))).await?;
    let client = bench.client().await?;
    let call = tokio::spawn(client.call_raw(&service, "").into_future());
    said(&mut receiver, "started", PROMPT).await?;
    call.abort();
    said(&mut receiver, "cancelled", TOLD + LATE).await?;
    // The handler may hear of it while the call is still being dropped, on another thread.
    let dropped = within("the call is dropped", PROMPT, call).await?;
    ensure("the call", dropped.is_err(), "it was dropped in time")?;
    same("what waits afterwards", client.stats().pending, 0)
}

async fn closed_client_cancels_its_handlers(bench: Bench) -> Verdict {
    let service = bench.service("closed")?;
    let (sender, mut receiver) = mpsc::unbounded_channel();
    let _server = start(bench.server().await?.handle_raw(&service, telling(&sender))).await?;
    let client = bench.client().await?;
    let call = tokio::spawn(client.call_raw(&service, "").into_future());
    let asked = tokio::spawn(client.ask_all_raw(&service, "").into_future());
    said(&mut receiver, "started", PROMPT).await?;
    said(&mut receiver, "started", PROMPT).await?;
    within("the client is closed", PROMPT, client.close()).await?;
    said(&mut receiver, "cancelled", TOLD + LATE).await?;
    said(&mut receiver, "cancelled", TOLD + LATE).await?;
    let result = ended("a call of a closed client", PROMPT, call).await?;
    is_error(
        "a call of a closed client",
        result,
        ErrorKind::Closed,
        Executed::Maybe,
    )?;
    let result = ended("an ask-all of a closed client", PROMPT, asked).await?;
    let kind = result.err().map(|error| error.kind());
    same("how it ends", kind, Some(ErrorKind::Closed))
}

async fn cancelled_while_running(bench: Bench) -> Verdict {
    let service = bench.service("running")?;
    let (sender, mut receiver) = mpsc::unbounded_channel();
    let _server = start(bench.server().await?.handle_raw(&service, telling(&sender))).await?;
    let client = bench.client().await?;
    let token = CancellationToken::new();
    let call = tokio::spawn(
        client
            .call_raw(&service, "")
            .cancel_on(token.clone())
            .into_future(),
    );
    said(&mut receiver, "started", PROMPT).await?;
    token.cancel();
    let result = ended("a cancelled call", PROMPT, call).await?;
    is_error(
        "a cancelled call",
        result,
        ErrorKind::Cancelled,
        Executed::Maybe,
    )?;
    said(&mut receiver, "cancelled", TOLD + LATE).await
}

async fn cancelled_while_queued(bench: Bench) -> Verdict {
    let service = bench.service("queued")?;
    let client = bench.client().await?;
    let token = CancellationToken::new();
    let call = tokio::spawn(
        client
            .call_raw(&service, "")
            .cancel_on(token.clone())
            .into_future(),
    );
    queued().await;
    token.cancel();
    let result = ended("a cancelled call", PROMPT, call).await?;
    match result {
        Err(error) if error.kind() == ErrorKind::Cancelled && error.executed() != Executed::Yes => {
            Ok(())
        }
        other => Err(Stop::failed(
            "a cancelled call",
            format!("it ends as cancelled, not: {other:?}"),
        )),
    }
}

/// A server of one place, held by a call until the gate is opened; and how many others it started.
async fn busy(bench: &Bench, service: &ServiceName, client: &Client) -> Verdict<Busy> {
    let (started, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
    let (holds, mut held) = mpsc::unbounded_channel();
    let (count, door) = (Arc::clone(&started), Arc::clone(&gate));
    let handler = move |body: Bytes| {
        let (count, door, holds) = (Arc::clone(&count), Arc::clone(&door), holds.clone());
        async move {
            if body.is_empty() {
                // The case may have ended.
                let _ = holds.send(());
                let _ = door.acquire().await;
            } else {
                count.fetch_add(1, Ordering::SeqCst);
            }
            Ok::<_, Fault>(body)
        }
    };
    let server = start(
        bench
            .server()
            .await?
            .prefetch(1)
            .handle_raw(service, handler),
    )
    .await?;
    let holder = tokio::spawn(client.call_raw(service, "").into_future());
    within("the only place is taken", PROMPT, held.recv()).await?;
    Ok(Busy {
        started,
        gate,
        holder,
        _server: server,
    })
}

struct Busy {
    started: Arc<AtomicUsize>,
    gate: Arc<Semaphore>,
    holder: tokio::task::JoinHandle<Result<antiphon_core::Reply, antiphon_core::Error>>,
    _server: antiphon_core::RunningServer,
}

impl Busy {
    /// Lets the server go on, and checks that it starts nothing but what comes now.
    async fn starts_only_the_last(self, client: &Client, service: &ServiceName) -> Verdict {
        self.gate.add_permits(1);
        joined("the call that held the place", self.holder).await?;
        ok(
            "a call behind those that were given up",
            client.call_raw(service, "last"),
        )
        .await?;
        same(
            "how many were started",
            self.started.load(Ordering::SeqCst),
            1,
        )
    }
}

async fn given_up_is_not_started(bench: Bench) -> Verdict {
    let service = bench.service("given-up")?;
    let client = bench.client().await?;
    let busy = busy(&bench, &service, &client).await?;
    let call = tokio::spawn(client.call_raw(&service, "given up").into_future());
    queued().await;
    call.abort();
    told().await;
    busy.starts_only_the_last(&client, &service).await
}

async fn given_up_is_withdrawn(bench: Bench) -> Verdict {
    let connected = bench.connect().await?;
    if !connected.transport.capabilities().withdrawal {
        return Err(Stop::Unsupported(
            "requests cannot be withdrawn from this broker".to_owned(),
        ));
    }
    let service = bench.service("withdrawn")?;
    let client = bench.client().await?;
    let call = tokio::spawn(
        client
            .call_raw(&service, "given up")
            .timeout(Duration::from_secs(600))
            .into_future(),
    );
    queued().await;
    call.abort();
    told().await;
    let started = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&started);
    let handler = move |body: Bytes| {
        count.fetch_add(1, Ordering::SeqCst);
        async move { Ok::<_, Fault>(body) }
    };
    let _server = start(bench.server().await?.handle_raw(&service, handler)).await?;
    ok(
        "a call behind one that was given up",
        client.call_raw(&service, "last"),
    )
    .await?;
    // Handlers that were started before need not have come as far.
    tokio::time::sleep(QUIET).await;
    same("how many were started", started.load(Ordering::SeqCst), 1)
}

async fn many_are_given_up_at_once(bench: Bench) -> Verdict {
    let service = bench.service("many")?;
    let client = bench.client().await?;
    let busy = busy(&bench, &service, &client).await?;
    let calls: Vec<_> = (0..200)
        .map(|_| tokio::spawn(client.call_raw(&service, "given up").into_future()))
        .collect();
    queued().await;
    calls.iter().for_each(tokio::task::JoinHandle::abort);
    told().await;
    busy.starts_only_the_last(&client, &service).await?;
    same("what waits afterwards", client.stats().pending, 0)
}

async fn vanished_caller_cancels_its_handler(bench: Bench) -> Verdict {
    let service = bench.service("vanished")?;
    let (sender, mut receiver) = mpsc::unbounded_channel();
    let beat = Duration::from_millis(300);
    let _server = start(
        bench
            .server()
            .await?
            .heartbeat(beat)
            .handle_raw(&service, telling(&sender)),
    )
    .await?;
    // By the bare transport: a client that goes says so, and one whose process dies does not.
    let caller = bench.connect().await?.transport;
    let inbox = Inbox::open(&caller).await?;
    let mut request = request(Duration::from_secs(600), "", Some(inbox.address()));
    request.signals = Signals::Running;
    send(&caller, &service, request).await?;
    said(&mut receiver, "started", PROMPT).await?;
    drop(inbox);
    said(&mut receiver, "cancelled", 3 * beat + PROMPT).await
}

async fn pickup_timeout_is_no(bench: Bench) -> Verdict {
    let service = bench.service("no-pickup")?;
    let client = bench.client().await?;
    let patience = Duration::from_millis(500);
    let started = Instant::now();
    let call = client
        .call_raw(&service, "")
        .pickup_timeout(patience)
        .timeout(2 * PROMPT);
    refused(
        "a call that nobody takes",
        call,
        ErrorKind::PickupTimeout,
        Executed::No,
    )
    .await?;
    let took = started.elapsed();
    ensure(
        "a call that nobody takes",
        took >= patience,
        "it waits as long as it was told",
    )
}

async fn pickup_is_in_time(bench: Bench) -> Verdict {
    let service = bench.service("pickup")?;
    let slow = |body: Bytes| async move {
        tokio::time::sleep(Duration::from_millis(900)).await;
        Ok::<_, Fault>(body)
    };
    let _server = start(bench.server().await?.handle_raw(&service, slow)).await?;
    let client = bench.client().await?;
    let call = client
        .call_raw(&service, "body")
        .pickup_timeout(Duration::from_millis(500));
    body_is(
        "a reply later than the pickup timeout",
        &ok("call", call).await?.body,
        "body",
    )
}

async fn pickup_times_out_behind_a_busy_server(bench: Bench) -> Verdict {
    let service = bench.service("busy")?;
    let client = bench.client().await?;
    let busy = busy(&bench, &service, &client).await?;
    let call = client
        .call_raw(&service, "given up")
        .pickup_timeout(Duration::from_millis(500));
    refused(
        "a call that nobody takes",
        call,
        ErrorKind::PickupTimeout,
        Executed::No,
    )
    .await?;
    busy.starts_only_the_last(&client, &service).await
}

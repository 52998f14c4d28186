//! A server that asks before it starts: who is not heard keeps the request for another try, and only a call that waits accepts.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use antiphon_core::transport::{Inbox, InboxEvent, Incoming, Outbound};
use antiphon_core::{
    Context, CorrelationId, Deadline, ErrorKind, Executed, Fault, Node, Outcome, Reply,
    ReplyAddress, Request, Signal, Signals, Ticket, Transport,
};
use bytes::Bytes;

use crate::bench::*;
use crate::case::{Stop, Verdict, cases};

cases!("offers": [
    unheard_offer_goes_back: G2,
    only_who_waits_accepts: G5,
]);

/// How long a server waits for the answer to an offer.
const OFFER_LASTS: Duration = Duration::from_secs(10);

/// The next reply, or word, at an inbox.
async fn next(inbox: &mut dyn Inbox) -> Verdict<Reply> {
    loop {
        match inbox.recv().await {
            InboxEvent::Replies(replies) => {
                // One is sent at a time here.
                for incoming in replies {
                    if let Incoming::Reply(reply) = incoming {
                        return Ok(Arc::unwrap_or_clone(reply));
                    }
                }
            }
            other => {
                let rule = format!("it says what comes, and not: {other:?}");
                return Err(Stop::failed("an inbox", rule));
            }
        }
    }
}

async fn send(transport: &dyn Transport, to: ReplyAddress, reply: Reply) -> Verdict {
    let message = Outbound::Reply {
        to,
        reply: reply.into(),
    };
    ok_within("send", PROMPT, transport.send(message)).await
}

async fn unheard_offer_goes_back(bench: Bench) -> Verdict {
    let service = bench.service("unheard")?;
    let started = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&started);
    let handler = move |_: Bytes, context: Context| {
        count.fetch_add(1, Ordering::SeqCst);
        async move { Ok::<_, Fault>(context.attempt().to_string()) }
    };
    let _server = start(bench.server().await?.handle_raw(&service, handler)).await?;
    let transport = bench.connect().await?.transport;
    let mut inbox = ok_within("open an inbox", PROMPT, transport.open_inbox()).await?;
    let mut request = Request::new(Deadline::after(6 * OFFER_LASTS), "");
    request.reply_to = Some(inbox.address());
    request.signals = Signals::Offer;
    let message = Outbound::Request {
        service,
        request: request.into(),
        expect_responder: false,
        ticket: Ticket::new(),
    };
    ok_within("send a request", PROMPT, transport.send(message)).await?;
    let first = within("the first offer", PROMPT, next(&mut *inbox)).await??;
    ensure(
        "the first offer",
        matches!(first.outcome, Outcome::Signal(Signal::Offer { .. })),
        "a server asks",
    )?;
    let second = within("the second offer", OFFER_LASTS + PROMPT, next(&mut *inbox));
    let Outcome::Signal(Signal::Offer { to, id, .. }) = second.await??.outcome else {
        return Err(Stop::failed("the second offer", "a server asks again"));
    };
    same(
        "what was started without a word",
        started.load(Ordering::SeqCst),
        0,
    )?;
    send(&*transport, to, Reply::value(id, "")).await?;
    let reply = within("the reply", PROMPT, next(&mut *inbox)).await??;
    body_is(
        "the attempt, of which none was made before",
        &reply.body,
        "1",
    )
}

async fn only_who_waits_accepts(bench: Bench) -> Verdict {
    let service = bench.service("accepts")?;
    let client = bench.client().await?;
    let transport = bench.connect().await?.transport;
    let mut inbox = ok_within("open an inbox", PROMPT, transport.open_inbox()).await?;
    let address = inbox.address();
    let node = ok("a name", async { Node::new("asking") }).await?;
    let mut ask = async |call: CorrelationId| -> Verdict<Outcome> {
        let id = CorrelationId::random();
        let (node, to) = (node.clone(), address.clone());
        let offer = Signal::Offer {
            node,
            to,
            id: id.clone(),
        };
        send(&*transport, client.inbox(), Reply::signal(call, offer)).await?;
        let answer = within("the answer to an offer", PROMPT, next(&mut *inbox)).await??;
        same("the id of the answer", answer.id, id)?;
        Ok(answer.outcome)
    };
    let is_fault = |outcome: &Outcome| matches!(outcome, Outcome::Fault { .. });

    let call = client.call_raw(&service, "");
    let (plain, call) = (
        call.correlation_id().clone(),
        tokio::spawn(call.into_future()),
    );
    let call_with = client.call_raw(&service, "").pickup_timeout(4 * PROMPT);
    let attended = call_with.correlation_id().clone();
    let attended_call = tokio::spawn(call_with.into_future());
    eventually("two calls", PROMPT, "they wait", || {
        client.stats().pending == 2
    })
    .await?;
    for waiting in [&plain, &attended] {
        let answer = ask(waiting.clone()).await?;
        same("the answer of a call that waits", answer, Outcome::Value)?;
    }
    call.abort();
    attended_call.abort();
    eventually("two calls that are dropped", PROMPT, "they end", || {
        client.stats().pending == 0
    })
    .await?;
    let short = client
        .call_raw(&service, "")
        .pickup_timeout(Duration::from_millis(200));
    let stopped = short.correlation_id().clone();
    let kind = ErrorKind::PickupTimeout;
    refused("a call that nobody takes", short, kind, Executed::No).await?;
    for ended in [plain, attended, stopped, CorrelationId::random()] {
        let answer = ask(ended).await?;
        ensure(
            "the answer of a call that has ended",
            is_fault(&answer),
            format!("it tells the server to leave the request, and not: {answer:?}"),
        )?;
    }
    Ok(())
}

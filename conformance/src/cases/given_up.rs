//! A request that was given up while nobody served: a server that starts afterwards does not execute it, and does so with all others.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use antiphon_core::transport::{Inbox, InboxEvent, Incoming, Outbound};
use antiphon_core::{
    Client, Deadline, ErrorKind, Fault, Outcome, Request, RunningServer, Server, ServiceName,
    Ticket, Transport,
};
use bytes::Bytes;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::bench::*;
use crate::case::{Stop, Verdict, cases};

cases!("given_up": [
    dropped_before_a_server_starts: G4,
    cancelled_before_a_server_starts: G5,
    dropped_before_a_node_starts: G4,
    who_waits_is_served: G2,
    silent_caller_is_served: G2,
    vanished_caller_is_served: G2,
]);

/// How long a server may wait for a caller that says nothing.
const SILENCE: Duration = Duration::from_secs(2);

/// The bodies that were handled, in order.
#[derive(Clone, Default)]
struct Handled(Arc<Mutex<Vec<Bytes>>>);

impl Handled {
    fn bodies(&self) -> Vec<Bytes> {
        let handled = self.0.lock();
        handled.unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn serve(&self, bench: &Bench, service: &ServiceName) -> Verdict<RunningServer> {
        start(self.server(bench.server().await?, service)).await
    }

    /// One at a time, so that what is behind a request is handled after it.
    fn server(&self, server: Server, service: &ServiceName) -> Server {
        let handled = self.clone();
        let handler = move |body: Bytes| {
            let handled = handled.clone();
            async move {
                let mut bodies = handled.0.lock().unwrap_or_else(PoisonError::into_inner);
                bodies.push(body.clone());
                drop(bodies);
                Ok::<_, Fault>(body)
            }
        };
        server.prefetch(1).handle_raw(service, handler)
    }
}

/// A service that was served before: its queue is there.
async fn left(bench: &Bench, label: &str) -> Verdict<ServiceName> {
    let service = bench.service(label)?;
    let server = Handled::default().serve(bench, &service).await?;
    ok("stop a server", server.shutdown()).await?;
    Ok(service)
}

/// A request takes its time to its queue, and no transport says when it is there; and servers would need as long to be told.
async fn settled() {
    sleep(2 * QUIET).await;
}

/// A server that starts now handles only what is called from now on.
async fn serves_only_the_last(
    client: &Client,
    service: &ServiceName,
    server: Server,
    handled: &Handled,
) -> Verdict {
    let _server = start(server).await?;
    let last = client.call_raw(service, "last");
    ok("a call behind one that was given up", last).await?;
    same(
        "what was handled",
        handled.bodies(),
        vec![Bytes::from("last")],
    )
}

async fn dropped_before_a_server_starts(bench: Bench) -> Verdict {
    let service = left(&bench, "dropped").await?;
    let client = bench.client().await?;
    let call = tokio::spawn(client.call_raw(&service, "given up").into_future());
    settled().await;
    call.abort();
    settled().await;
    let handled = Handled::default();
    let server = handled.server(bench.server().await?, &service);
    serves_only_the_last(&client, &service, server, &handled).await
}

async fn cancelled_before_a_server_starts(bench: Bench) -> Verdict {
    let service = left(&bench, "cancelled").await?;
    let client = bench.client().await?;
    let token = CancellationToken::new();
    let call = client
        .call_raw(&service, "given up")
        .cancel_on(token.clone());
    let call = tokio::spawn(call.into_future());
    settled().await;
    token.cancel();
    match ended("a cancelled call", PROMPT, call).await? {
        Err(error) if error.kind() == ErrorKind::Cancelled => {}
        other => {
            let rule = format!("it ends as cancelled, not: {other:?}");
            return Err(Stop::failed("a cancelled call", rule));
        }
    }
    settled().await;
    let handled = Handled::default();
    let server = handled.server(bench.server().await?, &service);
    serves_only_the_last(&client, &service, server, &handled).await
}

async fn dropped_before_a_node_starts(bench: Bench) -> Verdict {
    let service = bench.service("node")?;
    let at_node = ok("a node's service", async { service.at("one") }).await?;
    let first = Handled::default().server(bench.server().await?, &service);
    ok("stop a node", start(first.node("one")).await?.shutdown()).await?;
    let client = bench.client().await?;
    let call = tokio::spawn(client.call_raw(&at_node, "given up").into_future());
    settled().await;
    call.abort();
    settled().await;
    let handled = Handled::default();
    let server = handled.server(bench.server().await?, &service).node("one");
    serves_only_the_last(&client, &at_node, server, &handled).await
}

async fn who_waits_is_served(bench: Bench) -> Verdict {
    let service = left(&bench, "waits").await?;
    let client = bench.client().await?;
    let calls: Vec<_> = (0..20u8)
        .map(|number| tokio::spawn(client.call_raw(&service, vec![number]).into_future()))
        .collect();
    settled().await;
    let handled = Handled::default();
    let _server = handled.serve(&bench, &service).await?;
    for (number, call) in (0..20u8).zip(calls) {
        let result = ended("a call that waited", PROMPT, call).await?;
        let reply = ok("a call that waited", async { result }).await?;
        body_is("its reply", &reply.body, [number])?;
    }
    same("how many were handled", handled.bodies().len(), 20)
}

/// Queues a request whose caller is no client of the library, and hears nothing but replies.
async fn queue_by_hand(
    bench: &Bench,
    service: &ServiceName,
) -> Verdict<(Arc<dyn Transport>, Box<dyn Inbox>)> {
    let transport = bench.connect().await?.transport;
    let inbox = ok_within("open an inbox", PROMPT, transport.open_inbox()).await?;
    let mut request = Request::new(Deadline::after(Duration::from_secs(60)), "by hand");
    request.reply_to = Some(inbox.address());
    let message = Outbound::Request {
        service: service.clone(),
        request: request.into(),
        expect_responder: false,
        ticket: Ticket::new(),
    };
    ok_within("queue a request", PROMPT, transport.send(message)).await?;
    Ok((transport, inbox))
}

async fn silent_caller_is_served(bench: Bench) -> Verdict {
    let service = left(&bench, "silent").await?;
    let (_transport, mut inbox) = queue_by_hand(&bench, &service).await?;
    let _server = Handled::default().serve(&bench, &service).await?;
    let reply = async {
        loop {
            match inbox.recv().await {
                InboxEvent::Replies(replies) => {
                    let is_reply = |incoming: &Incoming| match incoming {
                        Incoming::Reply(reply) => {
                            reply.outcome == Outcome::Value && reply.body == "by hand"
                        }
                        _ => false,
                    };
                    if replies.iter().any(is_reply) {
                        return Ok(());
                    }
                }
                other => {
                    let rule = format!("the reply comes, and not: {other:?}");
                    return Err(Stop::failed("the inbox of a silent caller", rule));
                }
            }
        }
    };
    within("the reply to a silent caller", SILENCE + PROMPT, reply).await?
}

async fn vanished_caller_is_served(bench: Bench) -> Verdict {
    let service = left(&bench, "vanished").await?;
    let (_transport, inbox) = queue_by_hand(&bench, &service).await?;
    drop(inbox);
    let handled = Handled::default();
    let _server = handled.serve(&bench, &service).await?;
    eventually(
        "a request whose caller is gone",
        SILENCE + PROMPT,
        "it is executed all the same: nobody gave it up",
        || handled.bodies() == ["by hand"],
    )
    .await
}

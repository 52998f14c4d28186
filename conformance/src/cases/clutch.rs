//! The broker is away: the server goes on with what it has, says so, and sends what it finished when the broker is back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use antiphon_core::{Engagement, ErrorKind, Fault, Server, WhenDisengaged};
use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::time::sleep;

use crate::bench::*;
use crate::case::{Verdict, cases};

cases!("clutch": [
    engagement_is_shown: G9,
    finished_replies_are_sent_later: G2,
    it_gives_up_as_told: G9,
    it_stops_as_told: G9,
]);

async fn echo(body: Bytes) -> Result<Bytes, Fault> {
    Ok(body)
}

async fn engagement_is_shown(bench: Bench) -> Verdict {
    let service = bench.service("shown")?;
    let connected = bench.connect().await?;
    let server = start(Server::new(connected.transport).handle_raw(&service, echo)).await?;
    let mut shown = server.engagement();
    let engaged = |now: &Engagement| *now == Engagement::Engaged;
    let disengaged = |now: &Engagement| matches!(now, Engagement::Disengaged { .. });
    ensure(
        "a started server",
        within("a started server", PROMPT, shown.wait_for(engaged))
            .await?
            .is_ok(),
        "it is engaged",
    )?;
    connected.link.sever().await?;
    ensure(
        "a server without a broker",
        within(
            "a server without a broker",
            PROMPT,
            shown.wait_for(disengaged),
        )
        .await?
        .is_ok(),
        "it is disengaged",
    )?;
    connected.link.restore().await?;
    ensure(
        "a server with its broker back",
        within(
            "a server with its broker back",
            2 * PROMPT,
            shown.wait_for(engaged),
        )
        .await?
        .is_ok(),
        "it is engaged again",
    )
}

async fn finished_replies_are_sent_later(bench: Bench) -> Verdict {
    let service = bench.service("later")?;
    let connected = bench.connect().await?;
    let (started, gate, ended_handlers) = (
        Arc::new(AtomicUsize::new(0)),
        Arc::new(Semaphore::new(0)),
        Arc::new(AtomicUsize::new(0)),
    );
    let (count, door, finished) = (
        Arc::clone(&started),
        Arc::clone(&gate),
        Arc::clone(&ended_handlers),
    );
    let handler = move |body: Bytes| {
        let (count, door, finished) =
            (Arc::clone(&count), Arc::clone(&door), Arc::clone(&finished));
        async move {
            count.fetch_add(1, Ordering::SeqCst);
            let _ = door.acquire().await;
            finished.fetch_add(1, Ordering::SeqCst);
            Ok::<_, Fault>(body)
        }
    };
    let server = Server::new(Arc::clone(&connected.transport));
    let _server = start(server.handle_raw(&service, handler)).await?;
    let client = bench.client().await?;
    let calls: Vec<_> = (0..10)
        .map(|number: u8| {
            let call = client
                .call_raw(&service, vec![number])
                .timeout(Duration::from_secs(60));
            tokio::spawn(call.into_future())
        })
        .collect();
    eventually("the handlers", PROMPT, "all of them start", || {
        started.load(Ordering::SeqCst) == 10
    })
    .await?;
    connected.link.sever().await?;
    until_disconnected(&connected.transport).await?;
    // The handlers end while the broker is away, and nothing but them will say what they found.
    gate.add_permits(1000);
    eventually(
        "the handlers",
        PROMPT,
        "they go on without the broker",
        || ended_handlers.load(Ordering::SeqCst) >= 10,
    )
    .await?;
    sleep(QUIET).await;
    connected.link.restore().await?;
    for (number, call) in calls.into_iter().enumerate() {
        let result = ended(
            "a call across an outage",
            bench.bounds().redelivery + 4 * PROMPT,
            call,
        )
        .await?;
        let reply = ok("a call across an outage", async { result }).await?;
        body_is(
            "a reply across an outage",
            &reply.body,
            [u8::try_from(number).unwrap_or(u8::MAX)],
        )?;
    }
    let executions = started.load(Ordering::SeqCst);
    ensure(
        "the requests",
        executions == 10,
        format!("each is executed once, not {executions} times in all"),
    )
}

async fn it_gives_up_as_told(bench: Bench) -> Verdict {
    let service = bench.service("gives-up")?;
    let connected = bench.connect().await?;
    let patience = Duration::from_millis(500);
    let server = Server::new(Arc::clone(&connected.transport))
        .when_disengaged(WhenDisengaged::GiveUpAfter(patience))
        .handle_raw(&service, echo);
    let mut server = start(server).await?;
    connected.link.cut().await?;
    ensure(
        "a short outage",
        tokio::time::timeout(patience, server.over()).await.is_err(),
        "it is survived",
    )?;
    until_connected(&connected.transport).await?;
    connected.link.sever().await?;
    let error = within("a long outage ends it", 2 * PROMPT, server.over()).await?;
    same("why it is over", error.kind(), ErrorKind::ConnectionLost)
}

async fn it_stops_as_told(bench: Bench) -> Verdict {
    let service = bench.service("stops")?;
    let connected = bench.connect().await?;
    let server = Server::new(connected.transport)
        .when_disengaged(WhenDisengaged::Stop)
        .handle_raw(&service, echo);
    let mut server = start(server).await?;
    connected.link.sever().await?;
    let error = within("an outage ends it", 2 * PROMPT, server.over()).await?;
    same("why it is over", error.kind(), ErrorKind::ConnectionLost)
}

//! The broker is away: the server goes on with what it has, says so, and sends what it finished when the broker is back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use antiphon_core::{Engagement, ErrorKind, Executed, Fault, Server, ServiceName, WhenDisengaged};
use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::time::sleep;

use crate::bench::*;
use crate::case::{Verdict, cases};

cases!("clutch": [
    engagement_is_shown: G9,
    finished_replies_are_sent_later: G2,
    expired_replies_are_not_sent: G1,
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

/// Handlers that wait at a door, and how many have started and ended.
struct Gated {
    door: Arc<Semaphore>,
    started: Arc<AtomicUsize>,
    ended: Arc<AtomicUsize>,
}

impl Gated {
    fn new() -> Self {
        Self {
            door: Arc::new(Semaphore::new(0)),
            started: Arc::default(),
            ended: Arc::default(),
        }
    }

    fn serve(&self, server: Server, service: &ServiceName) -> Server {
        let (door, started, ended) = (
            Arc::clone(&self.door),
            Arc::clone(&self.started),
            Arc::clone(&self.ended),
        );
        server.handle_raw(service, move |body: Bytes| {
            let (door, started, ended) =
                (Arc::clone(&door), Arc::clone(&started), Arc::clone(&ended));
            async move {
                started.fetch_add(1, Ordering::SeqCst);
                let _ = door.acquire().await;
                ended.fetch_add(1, Ordering::SeqCst);
                Ok::<_, Fault>(body)
            }
        })
    }

    async fn have_started(&self, count: usize) -> Verdict {
        eventually("the handlers", PROMPT, "all of them start", || {
            self.started.load(Ordering::SeqCst) == count
        })
        .await
    }

    /// Opens the door for good.
    async fn end(&self, count: usize) -> Verdict {
        self.door.add_permits(1000);
        eventually(
            "the handlers",
            PROMPT,
            "they go on without the broker",
            || self.ended.load(Ordering::SeqCst) >= count,
        )
        .await
    }
}

async fn finished_replies_are_sent_later(bench: Bench) -> Verdict {
    let service = bench.service("later")?;
    let connected = bench.connect().await?;
    let gated = Gated::new();
    let server = Server::new(Arc::clone(&connected.transport));
    let _server = start(gated.serve(server, &service)).await?;
    let client = bench.client().await?;
    let calls: Vec<_> = (0..10)
        .map(|number: u8| {
            let call = client
                .call_raw(&service, vec![number])
                .timeout(Duration::from_secs(60));
            tokio::spawn(call.into_future())
        })
        .collect();
    gated.have_started(10).await?;
    connected.link.sever().await?;
    until_disconnected(&connected.transport).await?;
    // The handlers end while the broker is away, and nothing but them will say what they found.
    gated.end(10).await?;
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
    let executions = gated.started.load(Ordering::SeqCst);
    ensure(
        "the requests",
        executions == 10,
        format!("each is executed once, not {executions} times in all"),
    )
}

async fn expired_replies_are_not_sent(bench: Bench) -> Verdict {
    let service = bench.service("expired")?;
    let connected = bench.connect().await?;
    let gated = Gated::new();
    let server = Server::new(Arc::clone(&connected.transport));
    let server = start(gated.serve(server, &service)).await?;
    let client = bench.client().await?;
    let waits = Duration::from_millis(1000);
    let calls: Vec<_> = (0..5)
        .map(|_| tokio::spawn(client.call_raw(&service, "").timeout(waits).into_future()))
        .collect();
    gated.have_started(5).await?;
    connected.link.sever().await?;
    until_disconnected(&connected.transport).await?;
    gated.end(5).await?;
    for call in calls {
        let result = ended("a call in an outage", waits + PROMPT, call).await?;
        is_error(
            "a call in an outage",
            result,
            ErrorKind::DeadlineExceeded,
            Executed::Maybe,
        )?;
    }
    sleep(QUIET).await;
    connected.link.restore().await?;
    until_connected(&connected.transport).await?;
    // What was kept for it goes out before what it is asked now, or beside it.
    ok_within(
        "a call after the outage",
        bench.bounds().redelivery + PROMPT,
        client.call_raw(&service, ""),
    )
    .await?;
    sleep(QUIET).await;
    // Where the request was delivered again, having expired, that is reported.
    same(
        "how many replies came that nobody waited for, besides those that say so",
        client.stats().late,
        server.stats().expired,
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

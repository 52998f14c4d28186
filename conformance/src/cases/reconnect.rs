//! A connection is lost, and comes back without help; no call waits in silence meanwhile.

use std::sync::Arc;
use std::time::Duration;

use antiphon_core::{
    Client, ClientConfig, ConnectionState, ErrorKind, Executed, Fault, Server, ServiceName,
};
use bytes::Bytes;
use futures_util::future::join_all;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, sleep};

use crate::bench::*;
use crate::case::{Stop, Verdict, cases};
use crate::harness::Connected;
use crate::peers::*;

cases!("reconnect": [
    idle_client_heals: G9,
    pending_calls_end_and_new_ones_succeed: G1,
    reply_finds_the_restored_inbox: G1,
    gathering_is_whole_or_lost: G1,
    calls_wait_for_the_connection: G9,
    blocked_requests_are_not_sent_late: G5,
    severed_calls_keep_their_deadline: G1,
    server_heals: G9,
    server_heals_with_work_in_hand: G2,
    state_tells: G9,
    broker_restart_is_survived: G9 alone,
]);

/// The time within which calls succeed again once the broker can be reached.
const HEALED: Duration = Duration::from_secs(5);

async fn echo(body: Bytes) -> Result<Bytes, Fault> {
    Ok(body)
}

async fn client_with_link(bench: &Bench) -> Verdict<(Client, Connected)> {
    let connected = bench.connect().await?;
    Ok((
        client_on(&connected.transport, ClientConfig::default()).await?,
        connected,
    ))
}

/// A call after a fault: it may be hit by what the fault left, but within [`HEALED`] one succeeds.
async fn heals(step: &str, client: &Client, service: &ServiceName, since: Instant) -> Verdict {
    let end = since + HEALED;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let call = client
            .call_raw(service, "healed")
            .timeout(left.max(Duration::from_millis(1)));
        match within(step, HEALED + PROMPT, call.into_future()).await? {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() >= end => {
                return Err(Stop::failed(
                    step,
                    format!("a call succeeds within {HEALED:?}, but the last one: {error}"),
                ));
            }
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
}

async fn idle_client_heals(bench: Bench) -> Verdict {
    let service = bench.service("idle")?;
    let _server = start(bench.server().await?.handle_raw(&service, echo)).await?;
    let (client, Connected { link, .. }) = client_with_link(&bench).await?;
    for _ in 0..3 {
        ok("a call before", client.call_raw(&service, "")).await?;
        link.cut().await?;
        heals(
            "the next call after a cut",
            &client,
            &service,
            Instant::now(),
        )
        .await?;
    }
    Ok(())
}

async fn pending_calls_end_and_new_ones_succeed(bench: Bench) -> Verdict {
    let service = bench.service("pending")?;
    let slow = |body: Bytes| async move {
        sleep(Duration::from_millis(400)).await;
        Ok::<_, Fault>(body)
    };
    let _server = start(bench.server().await?.handle_raw(&service, slow)).await?;
    let (client, Connected { link, .. }) = client_with_link(&bench).await?;
    ok("a call before", client.call_raw(&service, "")).await?;
    let timeout = Duration::from_secs(20);
    let calls: Vec<_> = (0..20)
        .map(|_| {
            tokio::spawn(
                client
                    .call_raw(&service, "pending")
                    .timeout(timeout)
                    .into_future(),
            )
        })
        .collect();
    sleep(Duration::from_millis(200)).await;
    link.cut().await?;
    let cut = Instant::now();
    heals("a new call after a cut", &client, &service, cut).await?;
    for call in calls {
        // Far within its deadline: a call whose reply is lost is told so, it does not wait for nothing.
        match ended("a call that was under way", 2 * HEALED, call).await? {
            Ok(reply) => body_is("its reply", &reply.body, b"pending")?,
            Err(error) => {
                let truth = error.kind() == ErrorKind::ConnectionLost
                    && error.executed() == Executed::Maybe;
                let rule = format!(
                    "it succeeds or ends as connection_lost, executed maybe, not as: {error}"
                );
                ensure("a call that was under way", truth, rule)?;
            }
        }
    }
    same("pending calls", client.stats().pending, 0)
}

async fn reply_finds_the_restored_inbox(bench: Bench) -> Verdict {
    let service = bench.service("restored")?;
    let server = bench.connect().await?.transport;
    let mut requests = Requests::shared(&server, &service, 4).await?;
    let (client, Connected { transport, link }) = client_with_link(&bench).await?;
    let call = tokio::spawn(
        client
            .call_raw(&service, "")
            .timeout(4 * PROMPT)
            .into_future(),
    );
    let delivery = requests.next("take the request").await?;
    link.sever().await?;
    until_disconnected(&transport).await?;
    link.restore().await?;
    until_connected(&transport).await?;
    answer(delivery, "after").await?;
    // Either the inbox was restored, and the reply arrives, or the call has been told that it may not.
    match ended("a call whose reply comes after a cut", 2 * PROMPT, call).await? {
        Ok(reply) => body_is("its reply", &reply.body, b"after")?,
        Err(error) => {
            let truth =
                error.kind() == ErrorKind::ConnectionLost && error.executed() == Executed::Maybe;
            let rule =
                format!("it succeeds or ends as connection_lost, executed maybe, not as: {error}");
            ensure("a call whose reply comes after a cut", truth, rule)?;
        }
    }
    let call = tokio::spawn(
        client
            .call_raw(&service, "")
            .timeout(4 * PROMPT)
            .into_future(),
    );
    answer(requests.next("take the next request").await?, "next").await?;
    body_is(
        "the next reply",
        &joined("the next call", call).await?.body,
        b"next",
    )
}

async fn gathering_is_whole_or_lost(bench: Bench) -> Verdict {
    let service = bench.service("gathered")?;
    let (took, mut taken) = mpsc::unbounded_channel();
    let gate = Arc::new(Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let wait = move |_: Bytes| {
        let (took, gate) = (took.clone(), Arc::clone(&gate));
        async move {
            let _ = took.send(());
            let _permit = gate.acquire().await;
            Ok::<_, Fault>("whole")
        }
    };
    let _server = start(bench.server().await?.handle_raw(&service, wait)).await?;
    let (client, Connected { transport, link }) = client_with_link(&bench).await?;
    let asked = client.ask_all_raw(&service, "").timeout(4 * PROMPT);
    let asked = tokio::spawn(asked.into_future());
    within("a server takes the request", PROMPT, taken.recv()).await?;
    link.sever().await?;
    until_disconnected(&transport).await?;
    link.restore().await?;
    until_connected(&transport).await?;
    opened.add_permits(1);
    // Either the inbox was restored, and the answer arrives, or who gathers is told that it may not.
    match ended("a gathering across a cut", 4 * PROMPT, asked).await? {
        Ok(gathered) => same("how many answered", gathered.answers.len(), 1),
        Err(error) => {
            let truth =
                error.kind() == ErrorKind::ConnectionLost && error.executed() == Executed::Maybe;
            let rule =
                format!("it succeeds or ends as connection_lost, executed maybe, not as: {error}");
            ensure("a gathering across a cut", truth, rule)
        }
    }
}

async fn calls_wait_for_the_connection(bench: Bench) -> Verdict {
    let service = bench.service("wait")?;
    let _server = start(bench.server().await?.handle_raw(&service, echo)).await?;
    let (client, Connected { transport, link }) = client_with_link(&bench).await?;
    link.sever().await?;
    until_disconnected(&transport).await?;
    let calls: Vec<_> = (0..10)
        .map(|_| {
            tokio::spawn(
                client
                    .call_raw(&service, "")
                    .timeout(4 * PROMPT)
                    .into_future(),
            )
        })
        .collect();
    sleep(2 * QUIET).await;
    let early = calls.iter().filter(|call| call.is_finished()).count();
    same("calls that ended while there was no connection", early, 0)?;
    link.restore().await?;
    for call in calls {
        let result = ended("a call that waited for the connection", HEALED, call).await?;
        result.map_err(|error| Stop::error("a call that waited for the connection", &error))?;
    }
    Ok(())
}

async fn blocked_requests_are_not_sent_late(bench: Bench) -> Verdict {
    let service = bench.service("blocked")?;
    let server = bench.connect().await?.transport;
    let mut requests = Requests::shared(&server, &service, 20).await?;
    let (client, Connected { transport, link }) = client_with_link(&bench).await?;
    link.sever().await?;
    until_disconnected(&transport).await?;
    let timeout = Duration::from_millis(400);
    let calls = (0..10).map(|_| {
        client
            .call_raw(&service, "expired")
            .timeout(timeout)
            .into_future()
    });
    for result in by_deadline("calls without a connection", timeout, join_all(calls)).await? {
        is_error(
            "a call without a connection",
            result,
            ErrorKind::DeadlineExceeded,
            Executed::No,
        )?;
    }
    link.restore().await?;
    let call = tokio::spawn(
        client
            .call_raw(&service, "live")
            .timeout(4 * PROMPT)
            .into_future(),
    );
    let delivery = requests
        .next_within("take the first request", 2 * PROMPT)
        .await?;
    body_is("the request that arrives", &delivery.request.body, b"live")?;
    answer(delivery, "").await?;
    joined("the call after them", call).await?;
    requests.none_for("after it", QUIET).await
}

async fn severed_calls_keep_their_deadline(bench: Bench) -> Verdict {
    let service = bench.service("severed")?;
    let server = bench.connect().await?.transport;
    let mut requests = Requests::shared(&server, &service, 20).await?;
    let (client, Connected { link, .. }) = client_with_link(&bench).await?;
    let timeout = Duration::from_millis(900);
    let calls = (0..10).map(|_| client.call_raw(&service, "").timeout(timeout).into_future());
    let sever = async {
        let mut held = Vec::new();
        for _ in 0..10 {
            held.push(requests.next("take the requests").await?);
        }
        link.sever().await?;
        Ok::<_, Stop>(held)
    };
    let (results, held) = tokio::join!(
        by_deadline("calls cut off", timeout, join_all(calls)),
        sever
    );
    for result in results? {
        match result {
            // They were sent, and a server has them.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::DeadlineExceeded | ErrorKind::ConnectionLost
                ) && error.executed() == Executed::Maybe => {}
            other => {
                let rule = format!(
                    "it ends as connection_lost or deadline_exceeded, executed maybe, not: {other:?}"
                );
                return Err(Stop::failed("a call that was cut off", rule));
            }
        }
    }
    same("pending calls", client.stats().pending, 0)?;
    drop(held?);
    Ok(())
}

async fn server_heals(bench: Bench) -> Verdict {
    let service = bench.service("server")?;
    let Connected { transport, link } = bench.connect().await?;
    let mut running = start(Server::new(transport).handle_raw(&service, echo)).await?;
    let client = bench.client().await?;
    for _ in 0..3 {
        ok("a call before", client.call_raw(&service, "")).await?;
        link.cut().await?;
        heals(
            "a call after the server's cut",
            &client,
            &service,
            Instant::now(),
        )
        .await?;
    }
    link.sever().await?;
    sleep(2 * QUIET).await;
    link.restore().await?;
    heals(
        "a call after the server's outage",
        &client,
        &service,
        Instant::now(),
    )
    .await?;
    let over = tokio::time::timeout(Duration::from_millis(1), running.over()).await;
    ensure("the server after all that", over.is_err(), "it goes on")
}

async fn server_heals_with_work_in_hand(bench: Bench) -> Verdict {
    let service = bench.service("in-hand")?;
    let slow = |body: Bytes| async move {
        sleep(Duration::from_millis(300)).await;
        Ok::<_, Fault>(body)
    };
    let Connected { transport, link } = bench.connect().await?;
    let _server = start(
        Server::new(transport)
            .prefetch(8)
            .handle_raw(&service, slow),
    )
    .await?;
    let client = bench.client().await?;
    let calls: Vec<_> = (0..20)
        .map(|n| {
            tokio::spawn(
                client
                    .call_raw(&service, n.to_string())
                    .timeout(12 * PROMPT)
                    .into_future(),
            )
        })
        .collect();
    sleep(Duration::from_millis(150)).await;
    link.cut().await?;
    // What was in hand is delivered again, and run one at a time if need be.
    let limit = bench.bounds().redelivery + 3 * HEALED;
    for (n, call) in calls.into_iter().enumerate() {
        let result = ended("a call in the hands of a server that is cut", limit, call).await?;
        let reply = result
            .map_err(|error| Stop::error("a call in the hands of a server that is cut", &error))?;
        body_is("its reply", &reply.body, n.to_string().as_bytes())?;
    }
    Ok(())
}

async fn state_tells(bench: Bench) -> Verdict {
    let Connected { transport, link } = bench.connect().await?;
    until_connected(&transport).await?;
    link.sever().await?;
    until_disconnected(&transport).await?;
    let state = transport.state().borrow().clone();
    let told = matches!(&state, ConnectionState::Disconnected { reason } if !reason.is_empty());
    ensure(
        "read the state without a connection",
        told,
        format!("it says why, not {state:?}"),
    )?;
    link.restore().await?;
    until_connected(&transport).await?;
    within("close", 2 * PROMPT, transport.close()).await?;
    ensure(
        "read the state after close",
        *transport.state().borrow() == ConnectionState::Closed,
        "it is closed",
    )
}

async fn broker_restart_is_survived(bench: Bench) -> Verdict {
    let service = bench.service("restart")?;
    let _server = start(bench.server().await?.handle_raw(&service, echo)).await?;
    let (client, _connected) = client_with_link(&bench).await?;
    ok("a call before", client.call_raw(&service, "")).await?;
    let pending: Vec<_> = (0..5)
        .map(|_| {
            tokio::spawn(
                client
                    .call_raw(&service, "")
                    .timeout(12 * PROMPT)
                    .into_future(),
            )
        })
        .collect();
    bench.harness().restart_broker().await?;
    heals(
        "a call after the broker's restart",
        &client,
        &service,
        Instant::now(),
    )
    .await?;
    for call in pending {
        match ended("a call around the restart", 4 * HEALED, call).await? {
            Err(error) if error.executed() == Executed::Yes => {
                return Err(Stop::failed(
                    "a call around the restart",
                    format!("it succeeds or may have run, not: {error}"),
                ));
            }
            Ok(_) | Err(_) => {}
        }
    }
    Ok(())
}

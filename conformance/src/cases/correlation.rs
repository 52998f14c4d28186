//! Each reply finds its own call; every other reply is discarded and counted.

use std::time::Duration;

use antiphon_core::{ClientConfig, Code, CorrelationId, ErrorKind, Executed, Fault, Reply};
use futures_util::future::join_all;

use crate::bench::*;
use crate::case::{Stop, Verdict, cases};
use crate::peers::*;

cases!("correlation": [
    out_of_order_replies: G3,
    duplicate_reply_is_counted: G3,
    late_reply_is_counted: G3,
    unknown_reply_is_counted: G3,
    foreign_reply_resolves_nothing: G3,
    own_and_other_clients_are_apart: G3,
]);

/// A bare server's subscription and transport, and a client beside it.
struct Pair {
    requests: Requests,
    server: std::sync::Arc<dyn antiphon_core::Transport>,
    client: antiphon_core::Client,
    service: antiphon_core::ServiceName,
}

async fn pair(bench: &Bench, label: &str, prefetch: usize) -> Verdict<Pair> {
    let service = bench.service(label)?;
    let server = bench.connect().await?.transport;
    let requests = Requests::shared(&server, &service, prefetch).await?;
    Ok(Pair {
        requests,
        server,
        client: bench.client().await?,
        service,
    })
}

async fn out_of_order_replies(bench: Bench) -> Verdict {
    const CALLS: usize = 40;
    let Pair {
        mut requests,
        server: _server,
        client,
        service,
    } = pair(&bench, "order", CALLS).await?;
    let calls = join_all((0..CALLS).map(|n| {
        let call = client.call_raw(&service, n.to_string());
        async move {
            let reply = ok_within("call", 2 * PROMPT, call).await?;
            same(
                "the reply of its own call",
                String::from_utf8_lossy(&reply.body).into_owned(),
                format!("for {n}"),
            )
        }
    }));
    let serve = async {
        let mut held = Vec::new();
        for _ in 0..CALLS {
            held.push(requests.next("take all requests").await?);
        }
        // Evens forward and odds backward: near and far neighbours change places.
        let (even, odd): (Vec<_>, Vec<_>) = held
            .into_iter()
            .enumerate()
            .partition(|(index, _)| index % 2 == 0);
        for (_, delivery) in odd.into_iter().rev().chain(even) {
            let body = format!("for {}", String::from_utf8_lossy(&delivery.request.body));
            answer(delivery, body).await?;
        }
        Ok::<_, Stop>(())
    };
    let (verdicts, served) = tokio::join!(calls, serve);
    served?;
    verdicts.into_iter().collect()
}

async fn duplicate_reply_is_counted(bench: Bench) -> Verdict {
    let Pair {
        mut requests,
        server,
        client,
        service,
    } = pair(&bench, "duplicate", 1).await?;
    let call = tokio::spawn(client.call_raw(&service, "first").into_future());
    let delivery = requests.next("take the request").await?;
    let (id, to) = (delivery.request.id.clone(), caller(&delivery)?);
    answer(delivery, "original").await?;
    let reply = joined("the call", call).await?;
    body_is("the reply", &reply.body, b"original")?;
    for body in ["second", "third"] {
        send_reply(&server, to.clone(), Reply::value(id.clone(), body)).await?;
    }
    let duplicates = || client.stats().duplicates;
    eventually(
        "after two more replies",
        PROMPT,
        "both are counted as duplicates",
        || duplicates() == 2,
    )
    .await?;
    next_call_gets_its_own(&mut requests, &client, &service).await?;
    let stats = client.stats();
    same(
        "duplicates, late, unknown",
        (stats.duplicates, stats.late, stats.unknown),
        (2, 0, 0),
    )
}

async fn late_reply_is_counted(bench: Bench) -> Verdict {
    let Pair {
        mut requests,
        server,
        client,
        service,
    } = pair(&bench, "late", 1).await?;
    let call = client
        .call_raw(&service, "first")
        .timeout(Duration::from_millis(300));
    let call = tokio::spawn(call.into_future());
    let delivery = requests.next("take the request").await?;
    let (id, to) = (delivery.request.id.clone(), caller(&delivery)?);
    let result = ended("wait for the deadline", PROMPT, call).await?;
    is_error(
        "the call that nobody answered",
        result,
        ErrorKind::DeadlineExceeded,
        Executed::Maybe,
    )?;
    answer(delivery, "late").await?;
    send_reply(&server, to, Reply::value(id, "later")).await?;
    eventually(
        "after two late replies",
        PROMPT,
        "both are counted as late",
        || client.stats().late == 2,
    )
    .await?;
    next_call_gets_its_own(&mut requests, &client, &service).await?;
    let stats = client.stats();
    same(
        "duplicates, late, unknown",
        (stats.duplicates, stats.late, stats.unknown),
        (0, 2, 0),
    )
}

async fn unknown_reply_is_counted(bench: Bench) -> Verdict {
    let Pair {
        mut requests,
        server,
        client,
        service,
    } = pair(&bench, "unknown", 1).await?;
    let reply = Reply::value(CorrelationId::random(), "stray");
    send_reply(&server, client.inbox(), reply).await?;
    let fault = Reply::fault(
        CorrelationId::random(),
        Fault::new(Code::Internal, "stray"),
        Executed::Yes,
    );
    send_reply(&server, client.inbox(), fault).await?;
    eventually(
        "after two stray replies",
        PROMPT,
        "both are counted as unknown",
        || client.stats().unknown == 2,
    )
    .await?;
    next_call_gets_its_own(&mut requests, &client, &service).await?;
    let stats = client.stats();
    same(
        "duplicates, late, unknown",
        (stats.duplicates, stats.late, stats.unknown),
        (0, 0, 2),
    )
}

async fn foreign_reply_resolves_nothing(bench: Bench) -> Verdict {
    let Pair {
        mut requests,
        server,
        client,
        service,
    } = pair(&bench, "foreign", 1).await?;
    let call = tokio::spawn(client.call_raw(&service, "first").into_future());
    let delivery = requests.next("take the request").await?;
    let to = caller(&delivery)?;
    let own = delivery.request.id.to_string();
    // Other ids in the spelling of foreigners: among them the call's own, spelt differently, is another id.
    for id in [
        "1",
        "not-a-uuid",
        &own.to_uppercase(),
        &own.replace('-', ""),
    ] {
        let id = CorrelationId::parse(id).map_err(|error| Stop::error("make an id", &error))?;
        if id != delivery.request.id {
            send_reply(&server, to.clone(), Reply::value(id, "foreign")).await?;
        }
    }
    eventually(
        "after foreign replies",
        PROMPT,
        "they are counted as unknown",
        || client.stats().unknown >= 3,
    )
    .await?;
    same(
        "pending calls after foreign replies",
        client.stats().pending,
        1,
    )?;
    answer(delivery, "own").await?;
    let reply = joined("the call", call).await?;
    body_is("the reply", &reply.body, b"own")
}

async fn own_and_other_clients_are_apart(bench: Bench) -> Verdict {
    let Pair {
        mut requests,
        server,
        client,
        service,
    } = pair(&bench, "apart", 2).await?;
    // One on the same connection as the server, one of its own: each has an inbox of its own.
    let neighbour = client_on(&server, ClientConfig::default()).await?;
    ensure(
        "open two clients",
        neighbour.inbox() != client.inbox(),
        "each has an address of its own",
    )?;
    let calls = [&client, &neighbour]
        .map(|client| tokio::spawn(client.call_raw(&service, "").into_future()));
    for _ in 0..2 {
        let delivery = requests.next("take the requests").await?;
        let body = if caller(&delivery)? == client.inbox() {
            "client"
        } else {
            "neighbour"
        };
        answer(delivery, body).await?;
    }
    for (call, expected) in calls.into_iter().zip(["client", "neighbour"]) {
        body_is(
            "the reply",
            &joined("the call", call).await?.body,
            expected.as_bytes(),
        )?;
    }
    let strays = [client.stats(), neighbour.stats()]
        .map(|stats| stats.duplicates + stats.late + stats.unknown);
    same("replies to nobody", strays, [0, 0])
}

/// After whatever came, the client still works, and hands out no reply of another call.
async fn next_call_gets_its_own(
    requests: &mut Requests,
    client: &antiphon_core::Client,
    service: &antiphon_core::ServiceName,
) -> Verdict {
    let call = tokio::spawn(client.call_raw(service, "next").into_future());
    let delivery = requests.next("take the next request").await?;
    answer(delivery, "own").await?;
    let reply = joined("the next call", call).await?;
    body_is("the reply of the next call", &reply.body, b"own")?;
    same("pending calls", client.stats().pending, 0)
}

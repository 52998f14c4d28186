//! What kills every server that takes it is buried, alone; more of the group `redelivery`.

use std::time::Duration;

use antiphon_core::{Code, ErrorKind, Executed, Fault};
use bytes::Bytes;
use tokio::sync::mpsc;

use crate::bench::*;
use crate::case::{Stop, Verdict, cases};
use crate::peers::*;

cases!("redelivery": [
    poison_is_dead_lettered: G6,
    poison_costs_no_neighbour: G6,
]);

async fn poison_is_dead_lettered(bench: Bench) -> Verdict {
    const MAX_DELIVERIES: u32 = 2;
    let service = bench.service("poison")?;
    let transport = bench.connect().await?.transport;
    let mut requests = Requests::shared(&transport, &service, 1).await?;
    let client = bench.client().await?;
    let poison = tokio::spawn(
        client
            .call_raw(&service, "poison")
            .timeout(12 * PROMPT)
            .into_future(),
    );
    let limit = bench.bounds().redelivery + PROMPT;
    for _ in 0..MAX_DELIVERIES {
        drop(requests.next_within("die with the poison", limit).await?);
    }
    requests.stop().await?;
    let (told, mut hears) = mpsc::unbounded_channel();
    let note = move |body: Bytes| {
        let _ = told.send(body.clone());
        async move { Ok::<_, Fault>(body) }
    };
    let server = bench
        .server()
        .await?
        .max_deliveries(MAX_DELIVERIES)
        .handle_raw(&service, note);
    let server = start(server).await?;
    let good = ok("a neighbour's call", client.call_raw(&service, "good")).await?;
    body_is("its reply", &good.body, b"good")?;
    let result = ended("the poisonous call", limit, poison).await?;
    let error = is_error(
        "the poisonous call",
        result,
        ErrorKind::Rejected,
        Executed::Maybe,
    )?;
    same("the code", error.code(), Some(Code::Aborted))?;
    same(
        "requests dead-lettered by the server",
        server.stats().dead_lettered,
        1,
    )?;
    drop(server);
    while let Ok(body) = hears.try_recv() {
        same("what was executed", &body[..], b"good")?;
    }
    same(
        "dead letters of the service",
        bench.harness().dead_letters(&service).await?,
        1,
    )
}

async fn poison_costs_no_neighbour(bench: Bench) -> Verdict {
    const MAX_DELIVERIES: u32 = 3;
    const NEIGHBOURS: usize = 5;
    let service = bench.service("neighbours")?;
    let client = bench.client().await?;
    let call = |body: String| {
        let call = client.call_raw(&service, body).timeout(20 * PROMPT);
        tokio::spawn(call.into_future())
    };
    let mut requests;
    let mut held;
    let mut links = Vec::new();
    let first = bench.connect().await?;
    requests = Requests::shared(&first.transport, &service, NEIGHBOURS + 1).await?;
    links.push(first);
    let neighbours: Vec<_> = (0..NEIGHBOURS).map(|n| call(n.to_string())).collect();
    let poison = call("poison".to_owned());
    // The first victim has all of them in hand.
    held = Vec::new();
    for _ in 0..=NEIGHBOURS {
        held.push(requests.next("take all requests").await?);
    }
    let limit = bench.bounds().redelivery + PROMPT;
    for _ in 1..MAX_DELIVERIES {
        for connected in &links {
            connected.link.sever().await?;
        }
        let next = bench.connect().await?;
        requests = Requests::shared(&next.transport, &service, NEIGHBOURS + 1).await?;
        links.push(next);
        // It works well, until the poison kills it with whatever it has in hand then.
        held.clear();
        loop {
            let mut taken = vec![
                requests
                    .next_within("take what dead servers held", limit)
                    .await?,
            ];
            while let Ok(Ok(delivery)) =
                tokio::time::timeout(Duration::from_millis(20), requests.receive()).await
            {
                taken.push(delivery);
            }
            if taken
                .iter()
                .any(|delivery| &delivery.request.body[..] == b"poison")
            {
                held = taken;
                break;
            }
            for delivery in taken {
                answer(delivery, "good").await?;
            }
        }
    }
    for connected in &links {
        connected.link.sever().await?;
    }
    let good = |_: Bytes| async { Ok::<_, Fault>("good") };
    let server = bench
        .server()
        .await?
        .max_deliveries(MAX_DELIVERIES)
        .handle_raw(&service, good);
    let server = start(server).await?;
    let limit = bench.bounds().redelivery + 2 * PROMPT;
    for neighbour in neighbours {
        let result = ended("a neighbour's call", limit, neighbour).await?;
        let reply = result.map_err(|error| Stop::error("a neighbour's call", &error))?;
        body_is("its reply", &reply.body, b"good")?;
    }
    let result = ended("the poisonous call", limit, poison).await?;
    let error = is_error(
        "the poisonous call",
        result,
        ErrorKind::Rejected,
        Executed::Maybe,
    )?;
    same("the code", error.code(), Some(Code::Aborted))?;
    same("requests dead-lettered", server.stats().dead_lettered, 1)?;
    drop(held);
    Ok(())
}

//! What a dead server held is done by another one, counted; what kills its servers is buried, alone.

use antiphon_core::{ErrorKind, Fault, Reply, Server};
use bytes::Bytes;
use futures_util::future::join_all;
use tokio::sync::mpsc;
use tokio::time::sleep;

use crate::bench::*;
use crate::case::{Stop, Verdict, cases};
use crate::harness::Connected;
use crate::peers::*;

cases!("redelivery": [
    killed_server_loses_nothing: G2,
    stopped_process_loses_nothing: G2,
    many_in_hand_survive_a_kill: G2,
    dropped_delivery_is_delivered_again: G2,
    reply_before_settling_is_a_duplicate: G3,
    released_is_not_counted: G6,
    settled_is_not_delivered_again: G6,
    lost_lease_cannot_reply: G8,
]);

async fn killed_server_loses_nothing(bench: Bench) -> Verdict {
    let service = bench.service("killed")?;
    let (told, mut hears) = mpsc::unbounded_channel();
    let stuck = move |_: Bytes| {
        let _ = told.send(());
        std::future::pending::<Result<Bytes, Fault>>()
    };
    let Connected { transport, link } = bench.connect().await?;
    let _first = start(
        Server::new(transport)
            .prefetch(1)
            .handle_raw(&service, stuck),
    )
    .await?;
    let client = bench.client().await?;
    let call = tokio::spawn(
        client
            .call_raw(&service, "body")
            .timeout(12 * PROMPT)
            .into_future(),
    );
    within("the first handler starts", PROMPT, hears.recv()).await?;
    link.sever().await?;
    let attempt = |_: Bytes, context: antiphon_core::Context| async move {
        Ok::<_, Fault>(context.attempt().to_string())
    };
    let _second = start(bench.server().await?.handle_raw(&service, attempt)).await?;
    let result = ended(
        "the call whose server was killed",
        bench.bounds().redelivery + PROMPT,
        call,
    )
    .await?;
    let reply = result.map_err(|error| Stop::error("the call whose server was killed", &error))?;
    body_is("the attempt that answered", &reply.body, b"2")
}

async fn stopped_process_loses_nothing(bench: Bench) -> Verdict {
    let service = bench.service("dropped-server")?;
    let (told, mut hears) = mpsc::unbounded_channel();
    let stuck = move |_: Bytes| {
        let _ = told.send(());
        std::future::pending::<Result<Bytes, Fault>>()
    };
    let first = start(
        bench
            .server()
            .await?
            .prefetch(1)
            .handle_raw(&service, stuck),
    )
    .await?;
    let client = bench.client().await?;
    let call = tokio::spawn(
        client
            .call_raw(&service, "body")
            .timeout(12 * PROMPT)
            .into_future(),
    );
    within("the first handler starts", PROMPT, hears.recv()).await?;
    // Server and transport go without a farewell, as in a process that ends without a shutdown.
    drop(first);
    let attempt = |_: Bytes, context: antiphon_core::Context| async move {
        Ok::<_, Fault>(context.attempt().to_string())
    };
    let _second = start(bench.server().await?.handle_raw(&service, attempt)).await?;
    let result = ended(
        "the call whose server was dropped",
        bench.bounds().redelivery + PROMPT,
        call,
    )
    .await?;
    let reply = result.map_err(|error| Stop::error("the call whose server was dropped", &error))?;
    body_is("the attempt that answered", &reply.body, b"2")
}

async fn many_in_hand_survive_a_kill(bench: Bench) -> Verdict {
    const CALLS: usize = 40;
    let service = bench.service("in-hand")?;
    let Connected { transport, link } = bench.connect().await?;
    let mut requests = Requests::shared(&transport, &service, CALLS / 2).await?;
    let client = bench.client().await?;
    let calls: Vec<_> = (0..CALLS)
        .map(|n| {
            tokio::spawn(
                client
                    .call_raw(&service, n.to_string())
                    .timeout(12 * PROMPT)
                    .into_future(),
            )
        })
        .collect();
    let mut held = Vec::new();
    for _ in 0..CALLS / 2 {
        held.push(requests.next("take half of the requests").await?);
    }
    link.sever().await?;
    let echo = |body: Bytes| async move { Ok::<_, Fault>(body) };
    let _second = start(bench.server().await?.handle_raw(&service, echo)).await?;
    // Suspects may be run one at a time, to find the one that kills.
    let limit = bench.bounds().redelivery + 2 * PROMPT;
    for (n, result) in join_all(calls.into_iter().map(|call| ended("a call", limit, call)))
        .await
        .into_iter()
        .enumerate()
    {
        let reply = result?.map_err(|error| Stop::error("a call of a killed server", &error))?;
        body_is("its reply", &reply.body, n.to_string().as_bytes())?;
    }
    drop(held);
    Ok(())
}

async fn dropped_delivery_is_delivered_again(bench: Bench) -> Verdict {
    let service = bench.service("dropped")?;
    let transport = bench.connect().await?.transport;
    let mut requests = Requests::shared(&transport, &service, 1).await?;
    let client = bench.client().await?;
    let call = tokio::spawn(
        client
            .call_raw(&service, "body")
            .timeout(12 * PROMPT)
            .into_future(),
    );
    for attempt in 1..=3 {
        let limit = bench.bounds().redelivery + PROMPT;
        let delivery = requests
            .next_within("take the request that was dropped", limit)
            .await?;
        same("its attempt", delivery.attempt, attempt)?;
        body_is("its body", &delivery.request.body, b"body")?;
        if attempt == 3 {
            answer(delivery, "done").await?;
        }
    }
    body_is("the reply", &joined("the call", call).await?.body, b"done")
}

async fn reply_before_settling_is_a_duplicate(bench: Bench) -> Verdict {
    let service = bench.service("unsettled")?;
    let transport = bench.connect().await?.transport;
    let mut requests = Requests::shared(&transport, &service, 1).await?;
    let client = bench.client().await?;
    let call = tokio::spawn(
        client
            .call_raw(&service, "")
            .timeout(12 * PROMPT)
            .into_future(),
    );
    let delivery = requests.next("take the request").await?;
    let reply = Reply::value(delivery.request.id.clone(), "first");
    send_reply(&transport, caller(&delivery)?, reply).await?;
    body_is("the reply", &joined("the call", call).await?.body, b"first")?;
    // The server dies between its reply and settling the request.
    drop(delivery);
    let limit = bench.bounds().redelivery + PROMPT;
    let delivery = requests
        .next_within("take the request again", limit)
        .await?;
    same("its attempt", delivery.attempt, 2)?;
    answer(delivery, "second").await?;
    let duplicates = || client.stats().duplicates;
    eventually(
        "after the second reply",
        PROMPT,
        "it is counted as a duplicate",
        || duplicates() == 1,
    )
    .await
}

async fn released_is_not_counted(bench: Bench) -> Verdict {
    let service = bench.service("released")?;
    let transport = bench.connect().await?.transport;
    let mut requests = Requests::shared(&transport, &service, 1).await?;
    let client = bench.connect().await?.transport;
    send(&client, &service, request(12 * PROMPT, "body", None)).await?;
    let limit = bench.bounds().redelivery + PROMPT;
    for _ in 0..4 {
        let delivery = requests
            .next_within("take the request that was released", limit)
            .await?;
        same("its attempt", delivery.attempt, 1)?;
        ok("release it", delivery.release()).await?;
    }
    drop(
        requests
            .next_within("take it once more, and drop it", limit)
            .await?,
    );
    let delivery = requests
        .next_within("take the request that was dropped", limit)
        .await?;
    same("its attempt", delivery.attempt, 2)?;
    ok("release it", delivery.release()).await?;
    let delivery = requests
        .next_within("take the request that was released", limit)
        .await?;
    same("its attempt", delivery.attempt, 2)?;
    answer(delivery, "").await
}

async fn settled_is_not_delivered_again(bench: Bench) -> Verdict {
    let service = bench.service("settled")?;
    let Connected { transport, link } = bench.connect().await?;
    let mut requests = Requests::shared(&transport, &service, 8).await?;
    let client = bench.connect().await?.transport;
    let mut inbox = Inbox::open(&client).await?;
    for _ in 0..8 {
        send(
            &client,
            &service,
            request(12 * PROMPT, "", Some(inbox.address())),
        )
        .await?;
    }
    for _ in 0..8 {
        answer(requests.next("take the requests").await?, "done").await?;
    }
    for _ in 0..8 {
        inbox.next("read the replies").await?;
    }
    // All are settled, but where settling is not confirmed it may still be on its way; then the server dies.
    sleep(QUIET).await;
    link.sever().await?;
    let other = bench.connect().await?.transport;
    let mut others = Requests::shared(&other, &service, 8).await?;
    others
        .none_for("another server comes", bench.bounds().redelivery + QUIET)
        .await
}

async fn lost_lease_cannot_reply(bench: Bench) -> Verdict {
    let service = bench.service("fenced")?;
    let Connected { transport, link } = bench.connect().await?;
    if !transport.capabilities().fenced_replies {
        return Err(Stop::Unsupported(
            "the transport's replies are not fenced".to_owned(),
        ));
    }
    let mut stale_requests = Requests::shared(&transport, &service, 1).await?;
    let client = bench.client().await?;
    let call = tokio::spawn(
        client
            .call_raw(&service, "")
            .timeout(12 * PROMPT)
            .into_future(),
    );
    let stale = stale_requests.next("take the request").await?;
    link.sever().await?;
    let other = bench.connect().await?.transport;
    let mut requests = Requests::shared(&other, &service, 1).await?;
    let limit = bench.bounds().redelivery + PROMPT;
    let fresh = requests
        .next_within("take the request of the server that was cut off", limit)
        .await?;
    same("its attempt", fresh.attempt, 2)?;
    link.restore().await?;
    within(
        "the first server learns that its lease is lost",
        2 * PROMPT,
        stale.lease().cancelled(),
    )
    .await?;
    let reply = Reply::value(stale.request.id.clone(), "stale");
    let result = within(
        "reply without a lease",
        2 * PROMPT,
        stale.reply(Some(reply)),
    )
    .await?;
    match result {
        Err(error) if error.kind() == ErrorKind::LostLease => {}
        other => {
            return Err(Stop::failed(
                "reply without a lease",
                format!("it ends as lost_lease, not: {other:?}"),
            ));
        }
    }
    sleep(QUIET).await;
    ensure(
        "after the stale reply",
        !call.is_finished(),
        "it reaches nobody",
    )?;
    answer(fresh, "fresh").await?;
    body_is("the reply", &joined("the call", call).await?.body, b"fresh")?;
    let stats = client.stats();
    same(
        "duplicates, late, unknown",
        (stats.duplicates, stats.late, stats.unknown),
        (0, 0, 0),
    )
}

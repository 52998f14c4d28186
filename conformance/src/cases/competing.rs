//! Servers of one service share its requests, and none holds more than it asked for.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use antiphon_core::Fault;
use bytes::Bytes;
use futures_util::future::join_all;
use tokio::time::sleep;

use crate::bench::*;
use crate::case::{Verdict, cases};
use crate::peers::*;

cases!("competing": [
    two_servers_share_fairly: G2 alone,
    handlers_never_exceed_prefetch: G2,
    deliveries_never_exceed_prefetch: G2,
    order_is_kept_at_prefetch_one: G2,
    each_request_goes_to_one_server: G2,
]);

async fn two_servers_share_fairly(bench: Bench) -> Verdict {
    const CALLS: usize = 100;
    let service = bench.service("fair")?;
    let mut servers = Vec::new();
    for who in [0, 1] {
        let work = move |_: ()| async move {
            sleep(Duration::from_millis(10)).await;
            Ok::<usize, Fault>(who)
        };
        servers.push(start(bench.server().await?.prefetch(1).handle(&service, work)).await?);
    }
    let client = bench.client().await?;
    let calls =
        (0..CALLS).map(|_| ok_within("call", 4 * PROMPT, client.call::<usize>(&service, &())));
    let served: Vec<usize> = join_all(calls).await.into_iter().collect::<Verdict<_>>()?;
    let second: usize = served.iter().sum();
    let rule = format!(
        "each has 35 to 65 of them, not {} and {second}",
        CALLS - second
    );
    ensure(
        "100 calls of 10 ms over two servers at prefetch 1",
        (35..=65).contains(&second),
        rule,
    )
}

async fn handlers_never_exceed_prefetch(bench: Bench) -> Verdict {
    const PREFETCH: usize = 4;
    let service = bench.service("prefetch")?;
    let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (now, peak) = (Arc::clone(&running), Arc::clone(&most));
    let work = move |body: Bytes| {
        let (now, peak) = (Arc::clone(&now), Arc::clone(&peak));
        async move {
            peak.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            sleep(Duration::from_millis(40)).await;
            now.fetch_sub(1, Ordering::SeqCst);
            Ok::<_, Fault>(body)
        }
    };
    let _server = start(
        bench
            .server()
            .await?
            .prefetch(PREFETCH)
            .handle_raw(&service, work),
    )
    .await?;
    let client = bench.client().await?;
    let calls = (0..60).map(|_| ok_within("call", 4 * PROMPT, client.call_raw(&service, "")));
    join_all(calls)
        .await
        .into_iter()
        .collect::<Verdict<Vec<_>>>()?;
    same(
        "the most handlers that ran at once",
        most.load(Ordering::SeqCst),
        PREFETCH,
    )
}

async fn deliveries_never_exceed_prefetch(bench: Bench) -> Verdict {
    const PREFETCH: usize = 3;
    let service = bench.service("in-hand")?;
    let transport = bench.connect().await?.transport;
    let mut requests = Requests::shared(&transport, &service, PREFETCH).await?;
    let client = bench.connect().await?.transport;
    for n in 0..10 {
        send(&client, &service, request(12 * PROMPT, n.to_string(), None)).await?;
    }
    let mut held = Vec::new();
    for _ in 0..PREFETCH {
        held.push(requests.next("take as many as the prefetch").await?);
    }
    requests
        .none_for("with as many in hand as the prefetch", QUIET)
        .await?;
    // What is held beyond the prefetch, in the transport's own buffers, nobody else could have.
    let other = bench.connect().await?.transport;
    let mut others = Requests::shared(&other, &service, 10).await?;
    for _ in 0..10 - PREFETCH {
        answer(others.next("take the rest by another server").await?, "").await?;
    }
    for delivery in held {
        answer(delivery, "").await?;
    }
    send(&client, &service, request(12 * PROMPT, "more", None)).await?;
    tokio::select! {
        delivery = requests.next("take one more") => answer(delivery?, "").await,
        delivery = others.next("take one more") => answer(delivery?, "").await,
    }
}

async fn order_is_kept_at_prefetch_one(bench: Bench) -> Verdict {
    let service = bench.service("in-order")?;
    let transport = bench.connect().await?.transport;
    let mut requests = Requests::shared(&transport, &service, 1).await?;
    let client = bench.connect().await?.transport;
    for n in 0..30 {
        send(&client, &service, request(12 * PROMPT, n.to_string(), None)).await?;
    }
    for n in 0..30 {
        let delivery = requests.next("take the requests one by one").await?;
        let number = String::from_utf8_lossy(&delivery.request.body).into_owned();
        same(
            "the number of the next request, as they were sent",
            number,
            n.to_string(),
        )?;
        answer(delivery, "").await?;
    }
    Ok(())
}

async fn each_request_goes_to_one_server(bench: Bench) -> Verdict {
    const REQUESTS: usize = 200;
    let service = bench.service("once")?;
    let mut servers = Vec::new();
    let (seen, mut seeing) = tokio::sync::mpsc::unbounded_channel();
    for _ in 0..3 {
        let seen = seen.clone();
        let note = move |n: usize| {
            let noted = seen.send(n);
            async move {
                noted.map_err(|_| Fault::new(antiphon_core::Code::Internal, "the case is over"))
            }
        };
        servers.push(start(bench.server().await?.prefetch(8).handle(&service, note)).await?);
    }
    let client = bench.client().await?;
    let calls = (0..REQUESTS).map(|n| {
        let call = client.call::<()>(&service, &n);
        async move { ok_within("call", 4 * PROMPT, call).await }
    });
    join_all(calls).await.into_iter().collect::<Verdict<()>>()?;
    sleep(QUIET).await;
    let mut counts = BTreeMap::<usize, usize>::new();
    while let Ok(n) = seeing.try_recv() {
        *counts.entry(n).or_default() += 1;
    }
    same(
        "how many of the requests were executed",
        counts.len(),
        REQUESTS,
    )?;
    let repeated: Vec<_> = counts
        .into_iter()
        .filter(|(_, times)| *times != 1)
        .collect();
    same(
        "requests executed more than once, though no server died",
        repeated,
        vec![],
    )
}

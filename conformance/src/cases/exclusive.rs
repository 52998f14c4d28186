//! Whoever asks to serve alone does so, and when it goes the next one gets in.

use std::sync::Arc;
use std::time::Duration;

use antiphon_core::transport::{SubscribeOptions, Subscription};
use antiphon_core::{Error, ErrorKind, Fault, Server, ServiceName, Transport};
use bytes::Bytes;
use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use crate::bench::*;
use crate::case::{Stop, Verdict, cases};
use crate::harness::Connected;
use crate::peers::*;

cases!("exclusive": [
    second_is_refused: G10,
    mixing_is_detected: G10,
    one_of_many_gets_in: G10,
    next_gets_in_after_a_stop: G10,
    next_gets_in_after_a_close: G10,
    next_gets_in_after_a_kill: G10,
    former_owner_stays_out: G10,
    owner_survives_a_cut: G9,
]);

/// The time within which a second subscriber must be refused, and the next one get in after a clean stop.
const AT_ONCE: Duration = Duration::from_secs(1);

async fn echo(body: Bytes) -> Result<Bytes, Fault> {
    Ok(body)
}

async fn try_subscribe(
    transport: &Arc<dyn Transport>,
    service: &ServiceName,
    options: SubscribeOptions,
) -> Verdict<Result<Box<dyn Subscription>, Error>> {
    within(
        "subscribe",
        2 * PROMPT,
        transport.subscribe(service, options),
    )
    .await
}

/// Checks that a subscription is refused in time.
async fn is_refused(
    step: &str,
    transport: &Arc<dyn Transport>,
    service: &ServiceName,
    options: SubscribeOptions,
) -> Verdict {
    let started = Instant::now();
    match try_subscribe(transport, service, options).await? {
        Err(error) if error.kind() == ErrorKind::AlreadyOwned => {}
        Err(error) => {
            return Err(Stop::failed(
                step,
                format!("it ends as already_owned, not as: {error}"),
            ));
        }
        Ok(_) => return Err(Stop::failed(step, "it is refused, but it got in")),
    }
    let took = started.elapsed();
    ensure(
        step,
        took <= AT_ONCE + LATE,
        format!("it is refused within {AT_ONCE:?}, not in {took:?}"),
    )
}

/// Tries until it gets in, which must be within the limit from `since`.
async fn gets_in(
    step: &str,
    transport: &Arc<dyn Transport>,
    service: &ServiceName,
    since: Instant,
    limit: Duration,
) -> Verdict<Requests> {
    loop {
        match try_subscribe(transport, service, SubscribeOptions::exclusive(4)).await? {
            Ok(subscription) => return Ok(Requests::new(subscription)),
            Err(error) if error.kind() != ErrorKind::AlreadyOwned => {
                return Err(Stop::error(step, &error));
            }
            Err(_) => {}
        }
        ensure(
            step,
            since.elapsed() <= limit + LATE,
            format!("the next one gets in within {limit:?}"),
        )?;
        sleep(Duration::from_millis(50)).await;
    }
}

async fn second_is_refused(bench: Bench) -> Verdict {
    let service = bench.service("owned")?;
    let _owner = start(bench.server().await?.exclusive().handle_raw(&service, echo)).await?;
    let other = bench.connect().await?.transport;
    for _ in 0..2 {
        is_refused(
            "a second exclusive one",
            &other,
            &service,
            SubscribeOptions::exclusive(1),
        )
        .await?;
    }
    let server = bench.server().await?.exclusive().handle_raw(&service, echo);
    let result = within("start a second server", 2 * PROMPT, server.start())
        .await?
        .map(drop);
    is_error(
        "start a second server",
        result,
        ErrorKind::AlreadyOwned,
        antiphon_core::Executed::No,
    )?;
    // Neither costs the owner anything, nor another service.
    ok(
        "call the owner",
        bench.client().await?.call_raw(&service, ""),
    )
    .await?;
    let free = bench.service("free")?;
    try_subscribe(&other, &free, SubscribeOptions::exclusive(1))
        .await?
        .map_err(|error| Stop::error("another service", &error))?;
    Ok(())
}

async fn mixing_is_detected(bench: Bench) -> Verdict {
    let (first, second) = (
        bench.connect().await?.transport,
        bench.connect().await?.transport,
    );
    let owned = bench.service("owned")?;
    let _owner = Requests::subscribe(&first, &owned, SubscribeOptions::exclusive(1)).await?;
    is_refused(
        "a shared one beside an owner",
        &second,
        &owned,
        SubscribeOptions::shared(1),
    )
    .await?;
    let shared = bench.service("shared")?;
    let _sharer = Requests::shared(&first, &shared, 1).await?;
    is_refused(
        "an exclusive one beside a shared one",
        &second,
        &shared,
        SubscribeOptions::exclusive(1),
    )
    .await?;
    let _another = Requests::shared(&second, &shared, 1).await?;
    Ok(())
}

async fn one_of_many_gets_in(bench: Bench) -> Verdict {
    let service = bench.service("race")?;
    let mut transports = Vec::new();
    for _ in 0..6 {
        transports.push(bench.connect().await?.transport);
    }
    let tries = transports
        .iter()
        .map(|transport| try_subscribe(transport, &service, SubscribeOptions::exclusive(1)));
    let mut owners = Vec::new();
    for result in join_all(tries).await {
        match result? {
            Ok(subscription) => owners.push(subscription),
            Err(error) if error.kind() == ErrorKind::AlreadyOwned => {}
            Err(error) => return Err(Stop::error("subscribe at once with others", &error)),
        }
    }
    same("how many of six got in", owners.len(), 1)
}

async fn next_gets_in_after_a_stop(bench: Bench) -> Verdict {
    let service = bench.service("stop")?;
    let owner = start(bench.server().await?.exclusive().handle_raw(&service, echo)).await?;
    ok("shut down the owner", owner.shutdown()).await?;
    let (first, second) = (
        bench.connect().await?.transport,
        bench.connect().await?.transport,
    );
    let mut requests = gets_in(
        "after a shutdown",
        &first,
        &service,
        Instant::now(),
        AT_ONCE,
    )
    .await?;
    requests.stop().await?;
    let next = gets_in("after a stop", &second, &service, Instant::now(), AT_ONCE).await?;
    drop(next);
    let mut requests = gets_in("after a drop", &first, &service, Instant::now(), AT_ONCE).await?;
    let client = bench.client().await?;
    let call = tokio::spawn(client.call_raw(&service, "").into_future());
    answer(requests.next("the new owner serves").await?, "").await?;
    joined("a call of the new owner", call).await.map(drop)
}

async fn next_gets_in_after_a_close(bench: Bench) -> Verdict {
    let service = bench.service("close")?;
    let (first, second) = (
        bench.connect().await?.transport,
        bench.connect().await?.transport,
    );
    let _owner = Requests::subscribe(&first, &service, SubscribeOptions::exclusive(1)).await?;
    within("close the owner's transport", 2 * PROMPT, first.close()).await?;
    gets_in("after a close", &second, &service, Instant::now(), AT_ONCE)
        .await
        .map(drop)
}

async fn next_gets_in_after_a_kill(bench: Bench) -> Verdict {
    let service = bench.service("kill")?;
    let Connected { transport, link } = bench.connect().await?;
    let mut owner =
        Requests::subscribe(&transport, &service, SubscribeOptions::exclusive(4)).await?;
    let client = bench.client().await?;
    let call = tokio::spawn(
        client
            .call_raw(&service, "body")
            .timeout(12 * PROMPT)
            .into_future(),
    );
    let held = owner.next("the owner takes the request").await?;
    let other = bench.connect().await?.transport;
    link.sever().await?;
    let killed = Instant::now();
    let mut next = gets_in(
        "after a kill",
        &other,
        &service,
        killed,
        bench.bounds().take_over,
    )
    .await?;
    let limit = bench.bounds().redelivery + PROMPT;
    let delivery = next
        .next_within("the next owner takes the request of the first", limit)
        .await?;
    same("its attempt", delivery.attempt, 2)?;
    answer(delivery, "done").await?;
    body_is("the reply", &joined("the call", call).await?.body, b"done")?;
    drop(held);
    Ok(())
}

async fn former_owner_stays_out(bench: Bench) -> Verdict {
    let service = bench.service("former")?;
    let Connected { transport, link } = bench.connect().await?;
    let mut former =
        Requests::subscribe(&transport, &service, SubscribeOptions::exclusive(4)).await?;
    let other = bench.connect().await?.transport;
    link.sever().await?;
    let mut owner = gets_in(
        "after a kill",
        &other,
        &service,
        Instant::now(),
        bench.bounds().take_over,
    )
    .await?;
    link.restore().await?;
    // It comes back, finds the service taken, and says so; it never takes a request beside the owner.
    let client = bench.client().await?;
    let calls: Vec<_> = (0..30)
        .map(|_| tokio::spawn(client.call_raw(&service, "").into_future()))
        .collect();
    let serve = async {
        for _ in 0..30 {
            answer(owner.next("the owner takes all requests").await?, "owner").await?;
        }
        Ok::<_, Stop>(())
    };
    let watch = async {
        match within(
            "the former owner learns of it",
            2 * PROMPT,
            former.receive(),
        )
        .await?
        {
            Err(_) => Ok(()),
            Ok(_) => Err(Stop::failed(
                "the former owner comes back",
                "it takes no request beside the owner",
            )),
        }
    };
    let (served, watched) = tokio::join!(serve, watch);
    watched?;
    served?;
    for call in calls {
        joined("a call", call).await?;
    }
    Ok(())
}

async fn owner_survives_a_cut(bench: Bench) -> Verdict {
    let service = bench.service("cut")?;
    let Connected { transport, link } = bench.connect().await?;
    let server = Server::new(transport)
        .exclusive()
        .handle_raw(&service, echo);
    let mut running = start(server).await?;
    let client = bench.client().await?;
    ok("call the owner", client.call_raw(&service, "")).await?;
    link.cut().await?;
    // Nobody else wants it, so it is the owner again, and serves.
    ok("call the owner after a cut", client.call_raw(&service, "")).await?;
    let over = tokio::time::timeout(QUIET, running.over()).await;
    ensure("the owner after a cut", over.is_err(), "it goes on")?;
    let other = bench.connect().await?.transport;
    is_refused(
        "a second one after a cut",
        &other,
        &service,
        SubscribeOptions::exclusive(1),
    )
    .await
}

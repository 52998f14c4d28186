//! Whoever stands by gets in when the owner goes; a newcomer that must have the service gets it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use antiphon_core::transport::SubscribeOptions;
use antiphon_core::{
    ConnectionState, Context, Engagement, Error, ErrorKind, Fault, Reply, RunningServer, Server,
    ServiceName,
};
use bytes::Bytes;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::bench::*;
use crate::case::{Stop, Verdict, cases};
use crate::harness::Connected;
use crate::peers::Requests;

cases!("standby": [
    standby_waits_and_takes_over: G10,
    standby_takes_over_after_a_kill: G10,
    one_of_many_takes_over: G10,
    standby_stops_while_it_waits: G10,
    newcomer_takes_over: G10,
    newcomer_waits_for_what_runs: G10,
    newcomer_fences_off_a_deaf_owner: G10,
    newcomer_fences_off_nobody_who_hears: G10,
    standby_waits_for_a_drain: G10,
    standby_has_all_or_none: G10,
    standby_owns_a_second_time: G10,
    standby_answers_for_nobody: G10,
]);

/// A server that answers with its name.
fn named_server(server: Server, service: &ServiceName, name: &'static str) -> Server {
    server.handle_raw(service, move |_: Bytes| async move { Ok::<_, Fault>(name) })
}

async fn standing_by(
    bench: &Bench,
    service: &ServiceName,
    name: &'static str,
) -> Verdict<JoinHandle<Result<RunningServer, Error>>> {
    let server = named_server(bench.server().await?.standby(), service, name);
    Ok(tokio::spawn(server.start()))
}

async fn standby_waits_and_takes_over(bench: Bench) -> Verdict {
    let service = bench.service("waits")?;
    let owner = start(named_server(
        bench.server().await?.exclusive(),
        &service,
        "owner",
    ))
    .await?;
    let heir = standing_by(&bench, &service, "heir").await?;
    let client = bench.client().await?;
    sleep(QUIET).await;
    for _ in 0..5 {
        let reply = ok("call", client.call_raw(&service, "")).await?;
        body_is("who answers while the owner lives", &reply.body, "owner")?;
    }
    ensure("who stands by", !heir.is_finished(), "it waits")?;
    ok("stop the owner", owner.shutdown()).await?;
    let _heir = joined("who stands by", heir).await?;
    let reply = ok("call", client.call_raw(&service, "")).await?;
    body_is("who answers after the owner", &reply.body, "heir")
}

async fn standby_takes_over_after_a_kill(bench: Bench) -> Verdict {
    let service = bench.service("kill")?;
    let connected = bench.connect().await?;
    let owner = Server::new(connected.transport).exclusive();
    let owner = start(named_server(owner, &service, "owner")).await?;
    let heir = standing_by(&bench, &service, "heir").await?;
    sleep(QUIET).await;
    let killed = Instant::now();
    connected.link.sever().await?;
    let bound = bench.bounds().take_over;
    let heir = ended("who stands by", bound + PROMPT, heir).await?;
    let _heir = ok("take over", async { heir }).await?;
    let took = killed.elapsed();
    ensure(
        "take over",
        took <= bound + 2 * LATE,
        format!("it is done within {bound:?}, not after {took:?}"),
    )?;
    drop(owner);
    Ok(())
}

async fn one_of_many_takes_over(bench: Bench) -> Verdict {
    let service = bench.service("many")?;
    let owner = start(named_server(
        bench.server().await?.exclusive(),
        &service,
        "owner",
    ))
    .await?;
    let mut waiting = Vec::new();
    for _ in 0..4 {
        waiting.push(standing_by(&bench, &service, "heir").await?);
    }
    sleep(QUIET).await;
    ok("stop the owner", owner.shutdown()).await?;
    let got_in = || waiting.iter().filter(|heir| heir.is_finished()).count();
    eventually(
        "take over",
        bench.bounds().take_over + PROMPT,
        "one gets in",
        || got_in() > 0,
    )
    .await?;
    sleep(2 * QUIET).await;
    same("how many got in", got_in(), 1)?;
    waiting.iter().for_each(JoinHandle::abort);
    Ok(())
}

async fn standby_stops_while_it_waits(bench: Bench) -> Verdict {
    let service = bench.service("stops")?;
    let owner = start(named_server(
        bench.server().await?.exclusive(),
        &service,
        "owner",
    ))
    .await?;
    let heir = named_server(bench.server().await?.standby(), &service, "heir");
    ok("a standby that is shut down", heir.run_until(sleep(QUIET))).await?;
    ok("stop the owner", owner.shutdown()).await?;
    let next = named_server(bench.server().await?.exclusive(), &service, "next");
    ok("start the next one", next.start()).await.map(drop)
}

async fn newcomer_takes_over(bench: Bench) -> Verdict {
    let service = bench.service("newcomer")?;
    let holder = named_server(bench.server().await?.exclusive(), &service, "holder");
    let mut holder = start(holder).await?;
    let mut engagement = holder.engagement();
    let newcomer = named_server(bench.server().await?.take_over(), &service, "newcomer");
    let bound = bench.bounds().take_over + PROMPT;
    let _newcomer = ok_within("take over", bound, newcomer.start()).await?;
    let error = within("the former holder is told", PROMPT, holder.over()).await?;
    same("what it is told", error.kind(), ErrorKind::AlreadyOwned)?;
    let stopped = |now: &Engagement| matches!(now, Engagement::Stopped { .. });
    ensure(
        "the former holder",
        within(
            "the former holder shows it",
            PROMPT,
            engagement.wait_for(stopped),
        )
        .await?
        .is_ok(),
        "it shows that it is stopped",
    )?;
    let client = bench.client().await?;
    for _ in 0..5 {
        let reply = ok("call", client.call_raw(&service, "")).await?;
        body_is("who answers after the take-over", &reply.body, "newcomer")?;
    }
    Ok(())
}

async fn newcomer_waits_for_what_runs(bench: Bench) -> Verdict {
    let service = bench.service("overlap")?;
    let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let handler = move |body: Bytes| {
        let (running, most) = (Arc::clone(&running), Arc::clone(&most));
        async move {
            let now = running.fetch_add(1, Ordering::SeqCst) + 1;
            most.fetch_max(now, Ordering::SeqCst);
            sleep(Duration::from_millis(200)).await;
            running.fetch_sub(1, Ordering::SeqCst);
            Ok::<_, Fault>(format!(
                "{}{}",
                most.load(Ordering::SeqCst),
                String::from_utf8_lossy(&body)
            ))
        }
    };
    let holder = bench
        .server()
        .await?
        .exclusive()
        .prefetch(1)
        .handle_raw(&service, handler.clone());
    let _holder = start(holder).await?;
    let client = bench.client().await?;
    let calls: Vec<_> = (0..10)
        .map(|_| tokio::spawn(client.call_raw(&service, "").into_future()))
        .collect();
    sleep(QUIET).await;
    let newcomer = bench
        .server()
        .await?
        .take_over()
        .prefetch(1)
        .handle_raw(&service, handler);
    let bound = bench.bounds().take_over + PROMPT;
    let _newcomer = ok_within("take over", bound, newcomer.start()).await?;
    for call in calls {
        let result = ended("a call around a take-over", 4 * PROMPT, call).await?;
        let reply = ok("a call around a take-over", async { result }).await?;
        body_is("the most handlers at once", &reply.body, "1")?;
    }
    Ok(())
}

/// The owner is a bare subscription, of which no server hears that it should hand over, on a transport that lives.
async fn newcomer_fences_off_a_deaf_owner(bench: Bench) -> Verdict {
    let service = bench.service("deaf")?;
    let deaf = bench.connect().await?.transport;
    if !deaf.capabilities().take_over {
        return Err(Stop::Unsupported(
            "an owner that lives cannot be fenced off on this broker".to_owned(),
        ));
    }
    let mut owner = Requests::subscribe(&deaf, &service, SubscribeOptions::exclusive(1)).await?;
    let client = bench.client().await?;
    let call = tokio::spawn(client.call_raw(&service, "").into_future());
    let held = owner.next("take the request").await?;
    let newcomer = named_server(bench.server().await?.take_over(), &service, "newcomer");
    let _newcomer = ok_within("take over", 2 * PROMPT, newcomer.start()).await?;
    let reply = joined("the call that the former owner held", call).await?;
    body_is("who answers it", &reply.body, "newcomer")?;
    let late = Reply::value(held.request.id.clone(), "late");
    within(
        "the former owner loses its lease",
        PROMPT,
        held.lease().cancelled(),
    )
    .await?;
    match within("the former owner replies", PROMPT, held.reply(Some(late))).await? {
        Err(error) => same("how its reply ends", error.kind(), ErrorKind::LostLease)?,
        Ok(()) => {
            return Err(Stop::failed("the former owner replies", "it is refused"));
        }
    }
    match within("the former owner is told", PROMPT, owner.receive()).await? {
        Err(error) => same("what it is told", error.kind(), ErrorKind::AlreadyOwned),
        Ok(_) => Err(Stop::failed("the former owner takes", "it gets nothing")),
    }
}

/// Of two services, one has an owner that does not hear. The other one's is asked all the same, and ends what it has begun.
async fn newcomer_fences_off_nobody_who_hears(bench: Bench) -> Verdict {
    let (deaf, hears) = (bench.service("deaf")?, bench.service("hears")?);
    let connected = bench.connect().await?.transport;
    if !connected.capabilities().take_over {
        return Err(Stop::Unsupported(
            "an owner that lives cannot be fenced off on this broker".to_owned(),
        ));
    }
    let exclusive = SubscribeOptions::exclusive(1);
    let _deaf = Requests::subscribe(&connected, &deaf, exclusive).await?;
    let handler = |name: &'static str| {
        move |_: Bytes, context: Context| async move {
            sleep(QUIET / 2).await;
            Ok::<_, Fault>(format!("{name} {}", context.attempt()))
        }
    };
    let owner = bench.server().await?.exclusive();
    let _owner = start(owner.handle_raw(&hears, handler("owner"))).await?;
    let newcomer = bench.server().await?.take_over();
    let newcomer = newcomer
        .handle_raw(&deaf, handler("newcomer"))
        .handle_raw(&hears, handler("newcomer"));
    let newcomer = tokio::spawn(newcomer.start());
    let client = bench.client().await?;
    let end = Instant::now() + 3 * PROMPT;
    loop {
        let reply = ok("call", client.call_raw(&hears, "")).await?;
        if reply.body == "newcomer 1" {
            break;
        }
        body_is("who answers before", &reply.body, "owner 1")?;
        ensure("take over", Instant::now() < end, "it is done in time")?;
    }
    joined("the newcomer", newcomer).await.map(drop)
}

async fn standby_waits_for_a_drain(bench: Bench) -> Verdict {
    let service = bench.service("drain")?;
    let running = Arc::new(AtomicUsize::new(0));
    let handler = {
        let running = Arc::clone(&running);
        move |_: Bytes| {
            let running = Arc::clone(&running);
            async move {
                let before = running.fetch_add(1, Ordering::SeqCst);
                sleep(5 * QUIET).await;
                running.fetch_sub(1, Ordering::SeqCst);
                Ok::<_, Fault>(before.to_string())
            }
        }
    };
    let owner = bench.server().await?.exclusive().prefetch(1);
    let owner = start(owner.handle_raw(&service, handler.clone())).await?;
    let heir = bench.server().await?.standby().prefetch(1);
    let heir = tokio::spawn(heir.handle_raw(&service, handler).start());
    let client = bench.client().await?;
    let calls: Vec<_> = (0..2)
        .map(|_| tokio::spawn(client.call_raw(&service, "").into_future()))
        .collect();
    eventually("the first call", PROMPT, "its handler runs", || {
        running.load(Ordering::SeqCst) == 1
    })
    .await?;
    ok("stop the owner", owner.shutdown()).await?;
    for call in calls {
        let result = ended("a call around a drain", 3 * PROMPT, call).await?;
        let reply = ok("a call around a drain", async { result }).await?;
        body_is("how many ran before", &reply.body, "0")?;
    }
    joined("the heir", heir).await.map(drop)
}

async fn standby_has_all_or_none(bench: Bench) -> Verdict {
    let (free, taken) = (bench.service("free")?, bench.service("taken")?);
    let owner = named_server(bench.server().await?.exclusive(), &taken, "owner");
    let owner = start(owner).await?;
    let heir = named_server(bench.server().await?.standby(), &free, "heir");
    let heir = tokio::spawn(named_server(heir, &taken, "heir").start());
    sleep(QUIET).await;
    // What it could have and does not need yet is somebody else's for the asking.
    let third = standing_by(&bench, &free, "third").await?;
    let third = joined("who needs the free service only", third).await?;
    let client = bench.client().await?;
    for (service, name) in [(&free, "third"), (&taken, "owner")] {
        let reply = ok("call", client.call_raw(service, "")).await?;
        body_is("who answers while the owner lives", &reply.body, name)?;
    }
    ok("stop the owner", owner.shutdown()).await?;
    sleep(2 * QUIET).await;
    ensure("who stands by", !heir.is_finished(), "it waits for both")?;
    ok("stop the third", third.shutdown()).await?;
    let _heir = joined("who stands by", heir).await?;
    for service in [&free, &taken] {
        let reply = ok("call", client.call_raw(service, "")).await?;
        body_is("who answers after both", &reply.body, "heir")?;
    }
    Ok(())
}

/// Cuts the owner off until who stands by has taken over.
async fn succeeds(
    owner: &Connected,
    heir: JoinHandle<Result<RunningServer, Error>>,
    bound: Duration,
) -> Verdict<RunningServer> {
    owner.link.sever().await?;
    let heir = ended("who stands by", bound, heir).await?;
    let heir = ok("take over", async { heir }).await?;
    owner.link.restore().await?;
    Ok(heir)
}

async fn standby_owns_a_second_time(bench: Bench) -> Verdict {
    let service = bench.service("again")?;
    let connected = bench.connect().await?;
    let first = Server::new(Arc::clone(&connected.transport)).standby();
    let mut first = start(named_server(first, &service, "first")).await?;
    let second = standing_by(&bench, &service, "second").await?;
    let bound = bench.bounds().take_over + PROMPT;
    let second = succeeds(&connected, second, bound).await?;
    let client = bench.client().await?;
    let answers = async |name: &'static str| -> Verdict {
        let reply = ok_within("call", bound, client.call_raw(&service, "")).await?;
        body_is("who answers", &reply.body, name)
    };
    answers("second").await?;
    ok("stop the second", second.shutdown()).await?;
    answers("first").await?;
    // It owns it as before: it can be asked for it.
    let newcomer = named_server(bench.server().await?.take_over(), &service, "newcomer");
    let _newcomer = ok_within("take over", bound, newcomer.start()).await?;
    let error = within("the former owner is told", PROMPT, first.over()).await?;
    same("what it is told", error.kind(), ErrorKind::AlreadyOwned)?;
    answers("newcomer").await
}

async fn standby_answers_for_nobody(bench: Bench) -> Verdict {
    let service = bench.service("answers")?;
    let connected = bench.connect().await?;
    let first = Server::new(Arc::clone(&connected.transport))
        .standby()
        .node("first");
    let first = start(named_server(first, &service, "first")).await?;
    let second = named_server(
        bench.server().await?.standby().node("second"),
        &service,
        "second",
    );
    let second = tokio::spawn(second.start());
    let bound = bench.bounds().take_over + PROMPT;
    let second = succeeds(&connected, second, bound).await?;
    let client = bench.client().await?;
    let mut shown = first.engagement();
    let disengaged = |now: &Engagement| matches!(now, Engagement::Disengaged { .. });
    let state = connected.transport.state();
    let end = Instant::now() + bound + PROMPT;
    // For a while: when the connection is just back, it may show what was before, and not know yet that its service is lost.
    let mut since = Instant::now();
    while since.elapsed() < 3 * QUIET {
        let connected = *state.borrow() == ConnectionState::Connected;
        if !(connected && disengaged(&shown.borrow())) {
            since = Instant::now();
        }
        ensure(
            "who stands by",
            Instant::now() < end,
            "it is connected, and disengaged all the same",
        )?;
        sleep(QUIET / 10).await;
    }
    // It hears what all are asked.
    for _ in 0..8 {
        let asked = client.ask_all_raw(&service, "").timeout(QUIET);
        let answers = ok("ask all", asked).await?.answers;
        let names: Vec<_> = answers.iter().map(|answer| answer.node.as_str()).collect();
        ensure(
            "ask all",
            names == ["second"],
            format!("only the owner answers, not {names:?}"),
        )?;
    }
    ok("stop the second", second.shutdown()).await?;
    let engaged = shown.wait_for(|now| *now == Engagement::Engaged);
    ensure(
        "who has it again",
        within("who has it again", bound, engaged).await?.is_ok(),
        "it is engaged",
    )
}

//! One node among many, and all of them at once.

use std::collections::BTreeSet;
use std::time::Duration;

use antiphon_core::{Code, Context, ErrorKind, Executed, Fault, RunningServer, ServiceName};
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::bench::*;
use crate::case::{Verdict, cases};

cases!("nodes": [
    one_node_is_reached: G1,
    servers_of_one_node_share: G2,
    all_answer: G1,
    silent_node_is_named: G1,
    enough_is_enough: G1,
    dropped_gathering_cancels_its_handlers: G7,
    enough_cancels_the_others: G7,
    nobody_is_there_to_ask: G1,
    faults_are_answers: G5,
    slow_answer_counts_once: G1,
    stopped_node_is_not_asked: G1,
    asked_in_a_burst: G1,
    asked_after_a_cut: G9,
    ping_info_and_stats: G1,
]);

/// Servers of `service` that answer with their node's name.
async fn nodes(
    bench: &Bench,
    service: &ServiceName,
    names: &[&'static str],
) -> Verdict<Vec<RunningServer>> {
    let mut servers = Vec::new();
    for &name in names {
        let answer = move |_: Bytes| async move { Ok::<_, Fault>(name) };
        let server = bench.server().await?.node(name).handle_raw(service, answer);
        servers.push(start(server).await?);
    }
    Ok(servers)
}

async fn one_node_is_reached(bench: Bench) -> Verdict {
    let service = bench.service("nodes")?;
    let _servers = nodes(&bench, &service, &["one", "two"]).await?;
    let client = bench.client().await?;
    for _ in 0..5 {
        for node in ["one", "two"] {
            let reply = ok("call a node", client.call_raw(&service, "").at(node)).await?;
            body_is("the answer of a node", &reply.body, node)?;
        }
    }
    let absent = client.call_raw(&service, "").at("three").expect_responder();
    refused(
        "call a node that is not there",
        absent,
        ErrorKind::NoResponder,
        Executed::No,
    )
    .await?;
    let misnamed = client.call_raw(&service, "").at("no node");
    refused(
        "call a node without a name",
        misnamed,
        ErrorKind::Invalid,
        Executed::No,
    )
    .await?;
    ok("call any node", client.call_raw(&service, ""))
        .await
        .map(drop)
}

async fn servers_of_one_node_share(bench: Bench) -> Verdict {
    let service = bench.service("shared-node")?;
    let _servers = nodes(&bench, &service, &["one", "one"]).await?;
    let client = bench.client().await?;
    for _ in 0..10 {
        let reply = ok("call a node", client.call_raw(&service, "").at("one")).await?;
        body_is("the answer of a node", &reply.body, "one")?;
    }
    // They are two all the same.
    let gathered = ok(
        "ask all",
        client.ask_all_raw(&service, "").timeout(4 * PROMPT),
    )
    .await?;
    same("how many answered", gathered.answers.len(), 2)
}

async fn all_answer(bench: Bench) -> Verdict {
    let service = bench.service("all")?;
    let names = ["one", "two", "three"];
    let _servers = nodes(&bench, &service, &names).await?;
    let client = bench.client().await?;
    for _ in 0..3 {
        // It must not take the deadline to know that all have answered.
        let asked = client.ask_all_raw(&service, "").timeout(4 * PROMPT);
        let gathered = ok("ask all", asked).await?;
        let mut found = BTreeSet::new();
        for answer in &gathered.answers {
            let reply = answer
                .result
                .as_ref()
                .map_err(|error| crate::case::Stop::error("the answer of a node", error))?;
            body_is("the answer of a node", &reply.body, answer.node.as_str())?;
            found.insert(answer.node.as_str());
        }
        same("who answered", found, BTreeSet::from(names))?;
        same("how many answered", gathered.answers.len(), 3)?;
        same(
            "who did not answer",
            gathered.silent.len() + gathered.unheard,
            0,
        )?;
    }
    Ok(())
}

async fn silent_node_is_named(bench: Bench) -> Verdict {
    let service = bench.service("silent")?;
    let _servers = nodes(&bench, &service, &["one", "two"]).await?;
    let hang = |_: Bytes| std::future::pending::<Result<Bytes, Fault>>();
    let _silent = start(
        bench
            .server()
            .await?
            .node("silent")
            .handle_raw(&service, hang),
    )
    .await?;
    let client = bench.client().await?;
    let timeout = Duration::from_secs(1);
    let started = Instant::now();
    let asked = client.ask_all_raw(&service, "").timeout(timeout);
    let gathered = by_deadline("ask all", timeout, asked).await?;
    let gathered = ok("ask all", async { gathered }).await?;
    ensure(
        "a gathering",
        started.elapsed() >= timeout,
        "it waits for the silent one until its deadline",
    )?;
    same("how many answered", gathered.answers.len(), 2)?;
    let silent: Vec<_> = gathered.silent.iter().map(|node| node.as_str()).collect();
    same("who did not answer", silent, vec!["silent"])
}

async fn enough_is_enough(bench: Bench) -> Verdict {
    let service = bench.service("enough")?;
    let _servers = nodes(&bench, &service, &["one", "two", "three"]).await?;
    let client = bench.client().await?;
    let asked = client.ask_all_raw(&service, "").at_most(1);
    same(
        "how many answers were wanted",
        ok("ask all", asked).await?.answers.len(),
        1,
    )
}

/// Servers whose handlers end when they are cancelled; each says so by its name, and when it has started.
async fn patient(
    bench: &Bench,
    service: &ServiceName,
    names: &[&'static str],
) -> Verdict<(Vec<RunningServer>, Said)> {
    let (says, said) = mpsc::unbounded_channel();
    let mut servers = Vec::new();
    for &name in names {
        let says = says.clone();
        let wait = move |body: Bytes, context: Context| {
            let says = says.clone();
            async move {
                // The case may have ended.
                let _ = says.send((name, "started"));
                context.cancellation().cancelled().await;
                let _ = says.send((name, "cancelled"));
                Ok::<_, Fault>(body)
            }
        };
        let server = bench.server().await?.node(name).handle_raw(service, wait);
        servers.push(start(server).await?);
    }
    Ok((servers, said))
}

type Said = mpsc::UnboundedReceiver<(&'static str, &'static str)>;

/// Waits until all have said a word, and none another.
async fn all_say(
    said: &mut Said,
    names: &[&'static str],
    word: &'static str,
    limit: Duration,
) -> Verdict {
    let mut who = BTreeSet::new();
    while who.len() < names.len() {
        let step = format!("each handler says that it is {word}");
        let next = within(&step, limit, said.recv()).await?;
        let Some((name, said)) = next else { break };
        same("what a handler says", said, word)?;
        who.insert(name);
    }
    same("who says it", who, names.iter().copied().collect())
}

async fn dropped_gathering_cancels_its_handlers(bench: Bench) -> Verdict {
    let service = bench.service("unasked")?;
    let names = ["one", "two"];
    let (_servers, mut said) = patient(&bench, &service, &names).await?;
    let client = bench.client().await?;
    let asked = tokio::spawn(client.ask_all_raw(&service, "").into_future());
    all_say(&mut said, &names, "started", PROMPT).await?;
    asked.abort();
    all_say(&mut said, &names, "cancelled", TOLD + LATE).await
}

async fn enough_cancels_the_others(bench: Bench) -> Verdict {
    let service = bench.service("unneeded")?;
    let (_patient, mut said) = patient(&bench, &service, &["slow"]).await?;
    let _quick = nodes(&bench, &service, &["quick"]).await?;
    let client = bench.client().await?;
    let asked = client.ask_all_raw(&service, "").at_most(1);
    let asked = ok("ask all", asked).await?;
    let who: Vec<_> = asked.answers.iter().map(|a| a.node.as_str()).collect();
    same("who answered", who, vec!["quick"])?;
    // It may not have been started yet when it was given up, and then it never is.
    match tokio::time::timeout(TOLD + LATE, said.recv()).await {
        Ok(_) => all_say(&mut said, &["slow"], "cancelled", TOLD + LATE).await,
        Err(_) => Ok(()),
    }
}

async fn nobody_is_there_to_ask(bench: Bench) -> Verdict {
    let client = bench.client().await?;
    let asked = client
        .ask_all_raw(bench.service("nobody")?, "")
        .timeout(4 * PROMPT);
    let gathered = ok("ask nobody", asked).await?;
    ensure(
        "a gathering of nobody",
        gathered.answers.is_empty(),
        "it is empty",
    )
}

async fn faults_are_answers(bench: Bench) -> Verdict {
    let service = bench.service("faults")?;
    let fail = |_: Bytes| async { Err::<Bytes, _>(Fault::new(Code::NotFound, "no log")) };
    let _server = start(bench.server().await?.node("one").handle_raw(&service, fail)).await?;
    let client = bench.client().await?;
    let gathered = ok("ask all", client.ask_all_raw(&service, "")).await?;
    same("how many answered", gathered.answers.len(), 1)?;
    for answer in gathered.answers {
        let error = is_error("the answer", answer.result, ErrorKind::Fault, Executed::Yes)?;
        same(
            "the fault",
            error.fault().map(Fault::code),
            Some(Code::NotFound),
        )?;
    }
    Ok(())
}

async fn slow_answer_counts_once(bench: Bench) -> Verdict {
    let service = bench.service("slow")?;
    let beat = Duration::from_millis(100);
    let slow = async |body: Bytes| {
        tokio::time::sleep(Duration::from_millis(500)).await;
        Ok::<_, Fault>(body)
    };
    let mut servers = Vec::new();
    for _ in 0..2 {
        let server = bench.server().await?.node("one").heartbeat(beat);
        servers.push(start(server.handle_raw(&service, slow)).await?);
    }
    let client = bench.client().await?;
    let asked = client.ask_all_raw(&service, "").timeout(4 * PROMPT);
    let gathered = ok_within("ask all", PROMPT, asked).await?;
    same("how many answered", gathered.answers.len(), 2)?;
    same(
        "who did not answer",
        gathered.silent.len() + gathered.unheard,
        0,
    )
}

async fn stopped_node_is_not_asked(bench: Bench) -> Verdict {
    let service = bench.service("stopped")?;
    let mut servers = nodes(&bench, &service, &["one", "two"]).await?;
    let stopped = servers.pop();
    let client = bench.client().await?;
    same(
        "how many answer",
        ok("ask all", client.ask_all_raw(&service, ""))
            .await?
            .answers
            .len(),
        2,
    )?;
    if let Some(stopped) = stopped {
        ok("stop a server", stopped.shutdown()).await?;
    }
    let gathered = ok(
        "ask all",
        client.ask_all_raw(&service, "").timeout(4 * PROMPT),
    )
    .await?;
    same(
        "how many answer after one has stopped",
        gathered.answers.len(),
        1,
    )
}

async fn asked_in_a_burst(bench: Bench) -> Verdict {
    let service = bench.service("burst")?;
    let _servers = nodes(&bench, &service, &["one", "two"]).await?;
    let client = bench.client().await?;
    let asked: Vec<_> = (0..50)
        .map(|_| tokio::spawn(client.ask_all_raw(&service, "").into_future()))
        .collect();
    for asked in asked {
        same(
            "how many answered",
            joined("ask all", asked).await?.answers.len(),
            2,
        )?;
    }
    same("what waits afterwards", client.stats().pending, 0)
}

async fn asked_after_a_cut(bench: Bench) -> Verdict {
    let service = bench.service("cut")?;
    let connected = bench.connect().await?;
    let answer = |_: Bytes| async { Ok::<_, Fault>("here") };
    let server = antiphon_core::Server::new(connected.transport);
    let _server = start(server.handle_raw(&service, answer)).await?;
    let client = bench.client().await?;
    let asked = client.ask_all_raw(&service, "").timeout(4 * PROMPT);
    same(
        "how many answer",
        ok("ask all", asked).await?.answers.len(),
        1,
    )?;
    connected.link.cut().await?;
    let end = Instant::now() + PROMPT;
    loop {
        let asked = client
            .ask_all_raw(&service, "")
            .timeout(Duration::from_millis(500));
        if ok("ask all", asked).await?.answers.len() == 1 {
            return Ok(());
        }
        ensure(
            "ask all after a cut",
            Instant::now() < end,
            format!("the server hears it again within {PROMPT:?}"),
        )?;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn ping_info_and_stats(bench: Bench) -> Verdict {
    let service = bench.service("asked")?;
    let _servers = nodes(&bench, &service, &["one", "two"]).await?;
    let client = bench.client().await?;
    for _ in 0..3 {
        ok("call", client.call_raw(&service, "").at("one")).await?;
    }
    same(
        "how many are alive",
        ok("ping", client.ping(&service)).await?.answers.len(),
        2,
    )?;
    let infos = ok("ask for information", client.info(&service)).await?;
    same("how many say what they are", infos.answers.len(), 2)?;
    for answer in infos.answers {
        let info = ok("read the information", async { answer.result }).await?;
        ensure(
            "the information",
            info.services.iter().any(|name| name == service.as_str()),
            "it names the service",
        )?;
    }
    let stats = ok("ask for statistics", client.node_stats(&service)).await?;
    same("how many count", stats.answers.len(), 2)?;
    for answer in stats.answers {
        let expected = if answer.node.as_str() == "one" { 3 } else { 0 };
        let stats = ok("read the statistics", async { answer.result }).await?;
        same("what was handled", stats.handled, expected)?;
    }
    Ok(())
}

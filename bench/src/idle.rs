//! What an idle client and an idle server cost.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::Failure;
use crate::args::{Idle, Role};
use crate::brokers::Brokers;
use crate::contenders::Contender;
use crate::cpu;
use crate::load::Arrivals;
use crate::pair::{Pair, unique_service};
use crate::report;

/// What was busy when it was started may end its work.
const SETTLE: Duration = Duration::from_secs(10);

/// How many more clients one process has than another, of which the memory is compared.
const CLIENTS: usize = 100;

#[derive(Debug, Serialize)]
struct Watch {
    contender: Contender,
    services: usize,
    seconds: f64,
    /// Of a core, in per cent.
    client_cpu: f64,
    server_cpu: f64,
    broker_cpu: f64,
    /// What one more idle client takes in its process, in KiB.
    client_kib: f64,
    /// Commands per second by name, where the broker counts them; those of scripts included.
    commands: Option<BTreeMap<String, f64>>,
}

pub(crate) async fn run(idle: &Idle) -> Result<(), Failure> {
    let mut watches = Vec::new();
    for contender in [Contender::Redis, Contender::AmqpQuorum] {
        watches.push(watch(idle, contender).await?);
    }
    print(&watches);
    report::save(&idle.json, &serde_json::to_string_pretty(&watches)?)
}

async fn watch(idle: &Idle, contender: Contender) -> Result<Watch, Failure> {
    let brokers = Brokers::start(&[contender]).await?;
    let role = Role {
        services: idle.services,
        ..role(contender, &brokers)
    };
    let mut pair = Pair::start(role, &brokers).await?;
    // What was never used might be idle in another way.
    pair.measure(1, 64, 0.2, Arrivals::Closed).await?;
    tokio::time::sleep(SETTLE).await;

    let (client, server) = pair.processes();
    let url = brokers.url(contender.needs());
    let cpu = || {
        let broker = pair.watched().used().broker;
        let server = server.map(cpu::of_process).unwrap_or_default();
        [cpu::of_process(client), server, broker]
    };
    let counted = contender == Contender::Redis;
    let commands = match counted {
        true => Some(command_counts(&url).await?),
        false => None,
    };
    let (begun, before) = (Instant::now(), cpu());
    tokio::time::sleep(Duration::try_from_secs_f64(idle.seconds)?).await;
    let (seconds, after) = (begun.elapsed().as_secs_f64(), cpu());
    let commands = match commands {
        Some(before) => Some(rates(&before, &command_counts(&url).await?, seconds)),
        None => None,
    };
    pair.stop().await;

    let part = |index: usize| {
        let used = after[index].saturating_sub(before[index]);
        used.as_secs_f64() / seconds * 100.0
    };
    Ok(Watch {
        contender,
        services: idle.services,
        seconds,
        client_cpu: part(0),
        server_cpu: part(1),
        broker_cpu: part(2),
        client_kib: client_memory(contender, &brokers).await?,
        commands,
    })
}

/// The memory of one more client, in KiB.
async fn client_memory(contender: Contender, brokers: &Brokers) -> Result<f64, Failure> {
    let mut resident = Vec::new();
    for clients in [1, 1 + CLIENTS] {
        let role = Role {
            clients,
            ..role(contender, brokers)
        };
        let pair = Pair::start(role, brokers).await?;
        resident.push(cpu::resident(pair.processes().0) as f64);
        pair.stop().await;
    }
    Ok((resident[1] - resident[0]) / CLIENTS as f64 / 1024.0)
}

fn role(contender: Contender, brokers: &Brokers) -> Role {
    let url = brokers.url(contender.needs());
    Role::plain(contender, url, unique_service(contender), 1, 256)
}

/// How often Redis has run each command.
async fn command_counts(url: &str) -> Result<BTreeMap<String, f64>, Failure> {
    let mut connection = redis::Client::open(url)?
        .get_multiplexed_async_connection()
        .await?;
    let text: String = redis::cmd("INFO")
        .arg("commandstats")
        .query_async(&mut connection)
        .await?;
    let counts = text.lines().filter_map(|line| {
        let (name, rest) = line.strip_prefix("cmdstat_")?.split_once(":calls=")?;
        let (calls, _) = rest.split_once(',')?;
        Some((name.to_owned(), calls.parse().ok()?))
    });
    Ok(counts.collect())
}

/// How many commands Redis has run, without those of whoever looks.
pub(crate) async fn commands(url: &str) -> Result<f64, Failure> {
    let counts = command_counts(url).await?;
    let counts = counts.iter().filter(|(name, _)| !is_own(name));
    Ok(counts.map(|(_, count)| count).sum())
}

/// Commands per second, without those of whoever looks.
fn rates(
    before: &BTreeMap<String, f64>,
    after: &BTreeMap<String, f64>,
    seconds: f64,
) -> BTreeMap<String, f64> {
    after
        .iter()
        .filter(|(name, _)| !is_own(name))
        .map(|(name, count)| {
            let rate = (count - before.get(name).unwrap_or(&0.0)) / seconds;
            (name.clone(), rate)
        })
        .filter(|(_, rate)| *rate > 0.0)
        .collect()
}

fn is_own(name: &str) -> bool {
    ["info", "hello", "ping"].contains(&name)
        || name.starts_with("client|")
        || name.starts_with("command|")
}

fn print(watches: &[Watch]) {
    let head = [
        "idle",
        "services",
        "commands/s",
        "client CPU %",
        "server CPU %",
        "broker CPU %",
        "KiB a client",
    ];
    let mut lines = vec![head.map(str::to_owned).to_vec()];
    for watch in watches {
        let commands = watch.commands.as_ref();
        let sum = commands.map(|commands| commands.values().sum::<f64>());
        lines.push(vec![
            watch.contender.to_string(),
            watch.services.to_string(),
            sum.map_or_else(String::new, |sum| format!("{sum:.1}")),
            format!("{:.2}", watch.client_cpu),
            format!("{:.2}", watch.server_cpu),
            format!("{:.2}", watch.broker_cpu),
            format!("{:.0}", watch.client_kib),
        ]);
    }
    println!("{}", report::aligned(&lines));
    for (name, rate) in watches.iter().filter_map(|w| w.commands.as_ref()).flatten() {
        println!("{name}: {rate:.2}/s");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_of_the_watch_do_not_count() {
        let before = BTreeMap::from([("bzpopmin".to_owned(), 10.0), ("info".to_owned(), 1.0)]);
        let after = BTreeMap::from([
            ("bzpopmin".to_owned(), 14.0),
            ("exists".to_owned(), 2.0),
            ("info".to_owned(), 2.0),
            ("client|setinfo".to_owned(), 2.0),
        ]);
        let rates = rates(&before, &after, 2.0);
        let expected = BTreeMap::from([("bzpopmin".to_owned(), 2.0), ("exists".to_owned(), 1.0)]);
        assert_eq!(rates, expected);
    }
}

//! `antiphon ping`, `info` and `stats`.

use antiphon::{Answer, AskAll, Client, Error, Gathered, NodeInfo, NodeStats, ServiceName};
use serde::Serialize;
use tokio::time::Instant;

use crate::args::InquiryArgs;
use crate::exit::{self, Exit};
use crate::gather::{Named, attended, gather, print_json, print_lines};

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub(crate) enum What {
    Ping,
    Info,
    Stats,
}

/// Asks every live server of a service, and prints a line for each.
pub(crate) async fn run(url: Option<String>, args: InquiryArgs, what: What) -> Exit {
    match what {
        What::Ping => show(url, args, Client::ping, |_| "alive".to_owned()).await,
        What::Info => show(url, args, Client::info, info).await,
        What::Stats => show(url, args, Client::node_stats, stats).await,
    }
}

async fn show<Out: Serialize + Send + 'static>(
    url: Option<String>,
    args: InquiryArgs,
    ask: impl FnOnce(&Client, ServiceName) -> AskAll<Out>,
    describe: impl Fn(&Out) -> String,
) -> Exit {
    let json = args.json;
    let started = Instant::now();
    let result = attended(inquire(url, args, ask)).await;
    let elapsed = started.elapsed();
    if !json {
        return print_lines(&result, |answer: &Answer<Out>| match &answer.result {
            Ok(value) => format!("{}, {:.1?}", describe(value), answer.elapsed),
            Err(error) => error.to_string(),
        });
    }
    let answers = result
        .as_ref()
        .map_or(&[][..], |gathered| &gathered.answers);
    let answers = answers
        .iter()
        .map(|answer| Named {
            node: answer.node.as_str(),
            answer: InquiryReport {
                elapsed_us: answer.elapsed.as_micros(),
                said: answer.result.as_ref().ok(),
            },
        })
        .collect();
    print_json(&result, answers, elapsed)
}

async fn inquire<Out: Send + 'static>(
    url: Option<String>,
    args: InquiryArgs,
    ask: impl FnOnce(&Client, ServiceName) -> AskAll<Out>,
) -> Result<Gathered<Out>, Error> {
    let url = url.ok_or_else(exit::no_url)?;
    let service = ServiceName::new(&args.service)?;
    gather(&url, args.timeout, |client| ask(client, service)).await
}

#[derive(Serialize)]
struct InquiryReport<'a, T> {
    elapsed_us: u128,
    /// None for a ping, whose answer is that there is one.
    #[serde(flatten)]
    said: Option<&'a T>,
}

fn info(info: &NodeInfo) -> String {
    format!(
        "version {}, up {} s, prefetch {}, serves {}",
        info.version,
        info.uptime.as_secs(),
        info.prefetch,
        info.services.join(" ")
    )
}

fn stats(stats: &NodeStats) -> String {
    format!(
        "{} handled, {} running, {} faults, {} expired, {} cancelled, {} redelivered, {} dead-lettered, busy {:.1?}, longest {:.1?}, {} replies kept",
        stats.handled,
        stats.running,
        stats.faults,
        stats.expired,
        stats.cancelled,
        stats.redelivered,
        stats.dead_lettered,
        stats.busy,
        stats.longest,
        stats.kept_replies
    )
}

//! How the cost of a call over Redis grows with what else there is.

mod backlog;

use serde::Serialize;

use crate::Failure;
use crate::args::{Flat, Role};
use crate::brokers::Brokers;
use crate::contenders::Contender;
use crate::load::{Arrivals, Figures};
use crate::pair::{Pair, unique_service};
use crate::report::{self, median};

const CONCURRENCY: usize = 64;
const SIZE: usize = 64;

/// One thing that there may be much of.
#[derive(Debug, Serialize)]
struct Growth {
    what: String,
    /// Processor time of client, server and broker for a call, in microseconds.
    plain_us: f64,
    grown_us: f64,
    /// Grown by plain: in each round, then the median.
    cpu: f64,
    /// The same of the time that passes for a call.
    time: f64,
}

pub(crate) async fn run(flat: &Flat) -> Result<(), Failure> {
    let contender = Contender::Redis;
    let brokers = Brokers::start(&[contender]).await?;
    let url = brokers.url(contender.needs());
    let plain = |brokers: &Brokers| {
        let url = brokers.url(contender.needs());
        Role::plain(contender, url, unique_service(contender), 1, 256)
    };
    let grown = [
        (
            format!("{} services of one server", flat.services),
            Role {
                services: flat.services,
                ..plain(&brokers)
            },
        ),
        (
            format!("{} inboxes on the broker", flat.inboxes),
            Role {
                clients: flat.inboxes,
                ..plain(&brokers)
            },
        ),
        (
            format!("{} pending calls of the client", flat.pending),
            Role {
                pending: flat.pending,
                ..plain(&brokers)
            },
        ),
        (
            format!("{} servers of one service", flat.servers),
            Role {
                servers: flat.servers,
                ..plain(&brokers)
            },
        ),
    ];
    let mut growths = Vec::new();
    for (what, role) in grown {
        eprintln!("{what}");
        let pairs = [
            Pair::start(plain(&brokers), &brokers).await?,
            Pair::start(role, &brokers).await?,
        ];
        growths.push(compare(flat, what, pairs).await?);
    }
    eprintln!("{} requests in the queue", flat.backlog);
    let processes = brokers.processes(contender.needs());
    growths.extend(backlog::measure(&url, processes, flat.backlog).await?);
    print(&growths);
    report::save(&flat.json, &serde_json::to_string_pretty(&growths)?)
}

/// Measures a plain pair and a grown one in turns.
async fn compare(flat: &Flat, what: String, mut pairs: [Pair; 2]) -> Result<Growth, Failure> {
    let mut figures = Vec::new();
    for _ in 0..flat.rounds {
        let [plain, grown] = &mut pairs;
        let plain = plain
            .measure(CONCURRENCY, SIZE, flat.seconds, Arrivals::Closed)
            .await?;
        let grown = grown
            .measure(CONCURRENCY, SIZE, flat.seconds, Arrivals::Closed)
            .await?;
        figures.push((plain, grown));
    }
    for pair in pairs {
        pair.stop().await;
    }
    let cpu = |figures: &Figures| (figures.cpu_per_1000 + figures.broker_cpu_per_1000) * 1e3;
    Ok(Growth {
        what,
        plain_us: median(figures.iter().map(|(plain, _)| cpu(plain))),
        grown_us: median(figures.iter().map(|(_, grown)| cpu(grown))),
        cpu: median(figures.iter().map(|(plain, grown)| cpu(grown) / cpu(plain))),
        time: median(
            figures
                .iter()
                .map(|(plain, grown)| plain.calls_per_second / grown.calls_per_second),
        ),
    })
}

fn print(growths: &[Growth]) {
    let head = [
        "what there is",
        "plain: CPU µs a call",
        "with it",
        "ratio",
        "ratio of time",
    ];
    let mut lines = vec![head.map(str::to_owned).to_vec()];
    for growth in growths {
        lines.push(vec![
            growth.what.clone(),
            format!("{:.2}", growth.plain_us),
            format!("{:.2}", growth.grown_us),
            format!("{:.2}", growth.cpu),
            format!("{:.2}", growth.time),
        ]);
    }
    println!("{}", report::aligned(&lines));
}

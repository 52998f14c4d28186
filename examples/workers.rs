//! A pool of workers in this process. The very same code uses a broker, if it is given its URL: then the workers may as
//! well be elsewhere.
//!
//! `cargo run --example workers` on the memory transport, or with a broker's URL as its argument.

use std::collections::BTreeMap;
use std::time::Duration;

use antiphon::{Error, Fault};
use tokio::time::sleep;

const WORKERS: usize = 4;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let url = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "memory://workers".into());
    let connection = antiphon::connect(&url).await?;
    let workers = connection
        .workers(WORKERS, |worker, server| {
            server.handle("work", move |_: u32| async move {
                sleep(Duration::from_millis(5)).await;
                Ok::<_, Fault>(worker)
            })
        })
        .await?;

    let client = connection.client().await?;
    let mut outputs = client
        .call_many::<usize, _>("work", 0..100_u32)
        .as_completed();
    let mut done = BTreeMap::<usize, u32>::new();
    while let Some((_, worker)) = outputs.next().await {
        *done.entry(worker?).or_default() += 1;
    }
    println!(
        "{} tasks were done by {} workers",
        done.values().sum::<u32>(),
        done.len()
    );

    workers.shutdown().await?;
    connection.close().await;
    Ok(())
}

//! A server dies with work in its hands: another one does it, and how often it was tried, and how long it took, is seen.
//!
//! `cargo run --example monitor` on the memory transport, or with a broker's URL as its argument. Over Redis it takes the lease, 10 s,
//! until the dead server's work is taken over.

use std::time::Duration;

use antiphon::{Connection, Context, Error, Fault, RunningServer};
use tokio::sync::mpsc;

/// A server that hangs with what it takes, if it is `doomed`.
async fn server(
    connection: &Connection,
    name: &'static str,
    doomed: Option<mpsc::UnboundedSender<u32>>,
) -> Result<RunningServer, Error> {
    connection
        .server()
        .node(name)
        .handle("thumbnail", move |image: u32, context: Context| {
            let doomed = doomed.clone();
            async move {
                if let Some(doomed) = doomed {
                    let _ = doomed.send(image);
                    std::future::pending::<()>().await;
                }
                Ok::<_, Fault>(format!("{name} did it, attempt {}", context.attempt()))
            }
        })
        .start()
        .await
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let url = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "memory://monitor".into());
    let (doomed, survivor) = (
        antiphon::connect(&url).await?,
        antiphon::connect(&url).await?,
    );
    let (takes, mut taken) = mpsc::unbounded_channel();
    let doomed_server = server(&doomed, "doomed", Some(takes)).await?;
    let callers = antiphon::connect(&url).await?;
    let client = callers.client().await?;
    let call = client
        .call::<String>("thumbnail", &1)
        .timeout(Duration::from_secs(60));
    let call = tokio::spawn(call.into_future());
    if let Some(image) = taken.recv().await {
        println!("a server has taken image {image}, and dies");
    }
    // As if the process had been killed: nothing is given back.
    drop(doomed_server);
    drop(doomed);

    let surviving = server(&survivor, "survivor", None).await?;
    match call.await {
        Ok(result) => println!("{}", result?),
        Err(error) => println!("the caller failed: {error}"),
    }
    for answer in client.node_stats("thumbnail").await?.answers {
        let stats = answer.result?;
        println!(
            "{}: {} handled, {} of them taken over, the longest in {:?}",
            answer.node, stats.handled, stats.redelivered, stats.longest
        );
    }

    surviving.shutdown().await?;
    survivor.close().await;
    callers.close().await;
    Ok(())
}

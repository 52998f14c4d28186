//! A coordinated channel: many tasks out, a private stream of results back, each acknowledged.
//!
//! `cargo run --example channel` on the memory transport, or with a broker's URL as its argument.

use antiphon::{Error, Fault};

#[tokio::main]
async fn main() -> Result<(), Error> {
    let url = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "memory://channel".into());
    let connection = antiphon::connect(&url).await?;
    let server = connection
        .server()
        .handle("square", |n: u64| async move { Ok::<_, Fault>(n * n) })
        .start()
        .await?;
    let client = connection.client().await?;

    let (tasks, mut results) = client.channel("square").window(16).open().await?;
    let sending = tokio::spawn(async move {
        for n in 1..=100_u64 {
            // What is tied to the task comes back with its result.
            tasks.send(&n, n).await?;
        }
        Ok::<_, Error>(()) // The sender is dropped: the stream ends after the last result.
    });
    let mut sum = 0;
    while let Some(result) = results.next().await {
        let square: u64 = result.read()?;
        assert_eq!(square, result.metadata() * result.metadata());
        sum += square;
        result.ack();
    }
    sending
        .await
        .map_err(|error| Error::not_executed(antiphon::ErrorKind::Closed, error.to_string()))??;
    println!("the squares of 1 to 100 make {sum}");

    // The same without acknowledgements, in order, as a stream of outputs.
    let mut outputs = client
        .call_many::<u64, _>("square", 1..=5_u64)
        .concurrency(2)
        .in_order();
    while let Some(output) = outputs.next().await {
        println!("next: {}", output?);
    }

    server.shutdown().await?;
    connection.close().await;
    Ok(())
}

//! The main job in one process: a server, a client, and a few calls.
//!
//! `cargo run --release --example fibonacci` on the memory transport, or on a broker,
//! `cargo run --release --features redis --example fibonacci -- redis://127.0.0.1:6379`.

mod support;

use std::time::Duration;

#[tokio::main]
async fn main() -> Result<(), antiphon::Error> {
    let url = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "memory://fibonacci".into());
    let connection = antiphon::connect(&url).await?;

    let server = connection
        .server()
        .handle("fib", |n: u64| async move { support::fibonacci(n) })
        .start()
        .await?;
    let client = connection.client().await?;
    for n in [10, 30, 93, 94] {
        println!("asking for fib({n})");
        match client
            .call::<u64>("fib", &n)
            .timeout(Duration::from_secs(5))
            .await
        {
            Ok(value) => println!("fib({n}) = {value}"),
            Err(error) => println!("fib({n}): {error}"),
        }
    }

    client.close().await;
    server.shutdown().await?;
    connection.close().await;
    Ok(())
}

//! The serving half of the main job, for a terminal of its own; any number of them share the calls.
//!
//! `cargo run --release --features redis --example fibonacci_server -- redis://127.0.0.1:6379`

mod support;

#[tokio::main]
async fn main() -> Result<(), antiphon::Error> {
    let url = support::broker_url(std::env::args().nth(1), "fibonacci_server URL");
    let connection = antiphon::connect(&url).await?;

    let handler = |n: u64| async move {
        println!("computing fib({n})");
        support::fibonacci(n)
    };
    let server = connection
        .server()
        .handle("fib", handler)
        .prefetch(16)
        .start()
        .await?;
    println!("ready fib; Ctrl-C drains and ends it");
    if let Err(error) = tokio::signal::ctrl_c().await {
        eprintln!("no Ctrl-C on this system: {error}");
    }

    server.shutdown().await?;
    connection.close().await;
    Ok(())
}

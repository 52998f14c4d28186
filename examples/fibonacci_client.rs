//! The asking half of the main job: all numbers at once, each answer as it comes.
//!
//! `cargo run --release --features redis --example fibonacci_client -- redis://127.0.0.1:6379 10 20 30`

mod support;

use std::time::Duration;

use tokio::task::JoinSet;

const USAGE: &str = "fibonacci_client URL N...";

#[tokio::main]
async fn main() -> Result<(), antiphon::Error> {
    let mut arguments = std::env::args().skip(1);
    let url = support::broker_url(arguments.next(), USAGE);
    let numbers: Result<Vec<u64>, _> = arguments.map(|number| number.parse()).collect();
    let Ok(numbers) = numbers else {
        eprintln!("usage: {USAGE}\nN is a whole number from 0 to 93");
        std::process::exit(2);
    };

    let connection = antiphon::connect(&url).await?;
    let client = connection.client().await?;
    let mut calls = JoinSet::new();
    for n in numbers {
        let call = client
            .call::<u64>("fib", &n)
            .timeout(Duration::from_secs(10));
        calls.spawn(async move { (n, call.await) });
    }
    let mut failed = false;
    while let Some(ended) = calls.join_next().await {
        match ended {
            Ok((n, Ok(value))) => println!("fib({n}) = {value}"),
            Ok((n, Err(error))) => {
                eprintln!("fib({n}): {error}");
                failed = true;
            }
            Err(panic) => {
                eprintln!("a call's task failed: {panic}");
                failed = true;
            }
        }
    }

    client.close().await;
    connection.close().await;
    if failed {
        std::process::exit(1);
    }
    Ok(())
}

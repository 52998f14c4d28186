//! One server of a service at a time: the standby takes over when the owner goes, a newcomer makes it go.
//!
//! `cargo run --example standby` on the memory transport, or with a broker's URL as its argument.

use antiphon::{Connection, Error, Fault, Server};

fn named(connection: &Connection, name: &'static str) -> Server {
    connection
        .server()
        .handle("ledger", move |(): ()| async move { Ok::<_, Fault>(name) })
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let url = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "memory://standby".into());
    let mut connections = Vec::new();
    for _ in 0..4 {
        connections.push(antiphon::connect(&url).await?);
    }
    let [first, second, third, own] = &connections[..] else {
        return Ok(());
    };
    let client = own.client().await?;
    let ask = || client.call::<String>("ledger", &());

    let owner = named(first, "the owner").exclusive().start().await?;
    println!("{} answers", ask().await?);
    if let Err(error) = named(second, "another").exclusive().start().await {
        println!("a second one: {error}");
    }

    let heir = tokio::spawn(named(second, "the standby").standby().start());
    owner.shutdown().await?;
    let mut heir = heir
        .await
        .map_err(|error| Error::not_executed(antiphon::ErrorKind::Closed, error.to_string()))??;
    println!("{} answers", ask().await?);

    let newcomer = named(third, "the newcomer").take_over().start().await?;
    println!("the standby is told: {}", heir.over().await);
    println!("{} answers", ask().await?);

    newcomer.shutdown().await?;
    for connection in connections {
        connection.close().await;
    }
    Ok(())
}

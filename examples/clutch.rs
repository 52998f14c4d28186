//! The broker goes away while a handler runs: the server says so, the handler goes on, and its reply is sent when the broker
//! is back.
//!
//! `cargo run --example clutch` cuts a connection of the memory transport. With a broker's URL as its argument it is yours to
//! stop and start the broker, within a minute. A path as its second argument, with the feature `disk-outbox`, keeps the reply in that
//! file meanwhile: it survives the program, and the next run on the file has it.

use std::sync::Arc;
use std::time::Duration;

use antiphon::memory::{MemoryConfig, MemoryTransport};
use antiphon::{Connection, Engagement, Error, Fault, Server, WhenDisengaged};
use tokio::time::sleep;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1);
    let url = arguments.next();
    let url = url.unwrap_or_else(|| "memory://clutch".to_owned());
    let memory = match url.starts_with("memory://") {
        true => Some(MemoryTransport::connect(MemoryConfig::from_url(&url)?).await?),
        false => None,
    };
    let servers = match &memory {
        Some(transport) => Connection::new(Arc::new(transport.clone())),
        None => antiphon::connect(&url).await?,
    };
    let work = match memory {
        Some(_) => Duration::from_millis(300),
        None => Duration::from_secs(20),
    };
    let server = with_outbox(servers.server(), arguments.next())
        .when_disengaged(WhenDisengaged::GiveUpAfter(Duration::from_secs(60)))
        .handle("report", move |n: u32| async move {
            sleep(work).await;
            Ok::<_, Fault>(n)
        })
        .start()
        .await?;
    let mut engagement = server.engagement();
    tokio::spawn(async move {
        loop {
            println!("{:?}", engagement.borrow_and_update().clone());
            if engagement.changed().await.is_err() {
                break;
            }
        }
    });

    let callers = antiphon::connect(&url).await?;
    let client = callers.client().await?;
    let call = client
        .call::<u32>("report", &7)
        .timeout(Duration::from_secs(60));
    let call = tokio::spawn(call.into_future());
    match &memory {
        Some(transport) => {
            sleep(work / 3).await;
            transport.cut();
            sleep(work).await;
            transport.restore();
        }
        None => println!("stop the broker now, and start it again"),
    }
    match call.await {
        Ok(Ok(report)) => println!("report {report}"),
        Ok(Err(error)) => println!("no report: {error}"),
        Err(error) => println!("the caller failed: {error}"),
    }

    let mut engagement = server.engagement();
    // It may be out of reach still, if it was the caller's connection that was lost.
    let _ = engagement.wait_for(|now| *now == Engagement::Engaged).await;
    server.shutdown().await?;
    servers.close().await;
    callers.close().await;
    Ok(())
}

#[cfg(feature = "disk-outbox")]
fn with_outbox(server: Server, path: Option<String>) -> Server {
    match path {
        Some(path) => server.outbox_store(antiphon::DiskOutbox::new(path)),
        None => server,
    }
}

#[cfg(not(feature = "disk-outbox"))]
fn with_outbox(server: Server, path: Option<String>) -> Server {
    if let Some(path) = path {
        println!("without the feature disk-outbox nothing is kept in {path}");
    }
    server
}

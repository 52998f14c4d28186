//! A call that takes its time: the caller learns where it runs and how far it is.
//!
//! `cargo run --example long_call` on the memory transport, or with a broker's URL as its argument.

use std::time::Duration;

use antiphon::{CallEvent, Context, Error, Fault};
use tokio::time::sleep;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let url = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "memory://long_call".into());
    let connection = antiphon::connect(&url).await?;
    let server = connection
        .server()
        .node("worker-1")
        // So that there is something to see within a second; 5 s is the default.
        .heartbeat(Duration::from_millis(300))
        .handle("render", |pages: u32, context: Context| async move {
            for page in 1..=pages {
                sleep(Duration::from_millis(250)).await;
                context.progress(&page).await?;
            }
            Ok::<_, Fault>(format!("{pages} pages"))
        })
        .start()
        .await?;
    let client = connection.client().await?;

    let rendered: String = client
        .call("render", &4)
        .observe(|event| match event {
            CallEvent::Running { node } => println!("running on {node}"),
            CallEvent::Progress { node, body } => {
                println!("{node}: page {}", String::from_utf8_lossy(&body));
            }
            other => println!("{other:?}"),
        })
        .await?;
    println!("rendered {rendered}");

    server.shutdown().await?;
    connection.close().await;
    Ok(())
}

//! A call that is given up stops its handler; one that nobody takes in time is never started.
//!
//! `cargo run --example cancellation` on the memory transport, or with a broker's URL as its argument.

use std::time::Duration;

use antiphon::{Code, Context, Error, Fault};
use tokio::sync::mpsc;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let url = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "memory://cancellation".into());
    let connection = antiphon::connect(&url).await?;
    let (says, mut said) = mpsc::unbounded_channel();
    let server = connection
        .server()
        .prefetch(1)
        .handle("slow", move |(): (), context: Context| {
            let says = says.clone();
            async move {
                let _ = says.send("the handler has started");
                context.cancellation().cancelled().await;
                let _ = says.send("the handler was cancelled");
                Err::<(), _>(Fault::new(Code::Cancelled, "the caller has gone"))
            }
        })
        .start()
        .await?;
    let client = connection.client().await?;

    let call = tokio::spawn(client.call::<()>("slow", &()).into_future());
    println!("{}", said.recv().await.unwrap_or_default());

    // The only server is busy: nobody takes this one in time, and nobody ever will.
    let second = client
        .call::<()>("slow", &())
        .pickup_timeout(Duration::from_millis(300));
    match second.await {
        Ok(()) => println!("the second call was answered"),
        Err(error) => println!("the second call: {error}"),
    }

    // Dropping a call's future gives it up; a token does the same for a call that is awaited elsewhere.
    call.abort();
    println!("{}", said.recv().await.unwrap_or_default());

    server.shutdown().await?;
    connection.close().await;
    Ok(())
}

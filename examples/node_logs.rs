//! Any node asks another node, or every node, for its log. There is no connection between the nodes, only the broker.
//!
//! `cargo run --example node_logs` on the memory transport, or with a broker's URL as its argument.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use antiphon::{Connection, Context, Fault, RunningServer};

/// The last lines of a node's log.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<VecDeque<String>>>);

impl Log {
    const LINES: usize = 3;

    fn write(&self, line: String) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == Self::LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    fn lines(&self) -> Vec<String> {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().cloned().collect()
    }
}

/// A node, on a connection of its own.
async fn node(
    url: &str,
    name: &'static str,
) -> Result<(Connection, RunningServer), antiphon::Error> {
    let log = Log::default();
    for event in 1..=5 {
        log.write(format!("{name}: event {event}"));
    }
    let connection = antiphon::connect(url).await?;
    let server = connection
        .server()
        .node(name)
        .handle("logs", move |(): (), _: Context| {
            let lines = log.lines();
            async move { Ok::<_, Fault>(lines) }
        })
        .start()
        .await?;
    Ok((connection, server))
}

#[tokio::main]
async fn main() -> Result<(), antiphon::Error> {
    let url = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "memory://node_logs".into());
    let mut nodes = Vec::new();
    for name in ["node-1", "node-2", "node-3"] {
        nodes.push(node(&url, name).await?);
    }

    let connection = antiphon::connect(&url).await?;
    let client = connection.client().await?;

    let lines: Vec<String> = client.call("logs", &()).at("node-2").await?;
    println!("the log of node-2: {lines:?}");

    let gathered = client
        .ask_all::<Vec<String>>("logs", &())
        .timeout(Duration::from_secs(2))
        .await?;
    for answer in gathered.answers {
        println!("{} has {} lines", answer.node, answer.result?.len());
    }
    for silent in gathered.silent {
        println!("{silent} did not answer");
    }

    for (connection, server) in nodes {
        server.shutdown().await?;
        connection.close().await;
    }
    connection.close().await;
    Ok(())
}

//! A server that drains: what was asked of it before is answered, what is asked then is not heard, but for what is given up.

use std::sync::Arc;
use std::time::Duration;

use antiphon_core::{Context, Fault, RunningServer, ServiceName};
use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::bench::*;
use crate::case::{Verdict, cases};

cases!("drain": [
    asked_before_is_answered: G1,
    asked_meanwhile_is_not_heard: G1,
    given_up_meanwhile_is_told: G7,
]);

/// A server whose handlers wait for the gate, or for their callers to give up.
struct Draining {
    service: ServiceName,
    /// Of the same server, and free of handlers.
    beside: ServiceName,
    gate: Arc<Semaphore>,
    /// What handlers say.
    said: mpsc::UnboundedReceiver<&'static str>,
}

impl Draining {
    async fn start(bench: &Bench, label: &str) -> Verdict<(Self, RunningServer)> {
        let service = bench.service(label)?;
        let gate = Arc::new(Semaphore::new(0));
        let (says, said) = mpsc::unbounded_channel();
        let door = Arc::clone(&gate);
        let handler = move |body: Bytes, context: Context| {
            let (door, says) = (Arc::clone(&door), says.clone());
            async move {
                // The case may have ended.
                let _ = says.send("started");
                let given_up = context.cancellation();
                tokio::select! {
                    _ = door.acquire() => {}
                    () = given_up.cancelled() => {
                        let _ = says.send("cancelled");
                    }
                }
                Ok::<_, Fault>(body)
            }
        };
        let server = bench.server().await?.node("one");
        let beside = bench.service(&format!("{label}-beside"))?;
        let echo = async |body: Bytes| Ok::<_, Fault>(body);
        let server = server.handle_raw(&service, handler);
        let server = start(server.handle_raw(&beside, echo)).await?;
        let draining = Self {
            service,
            beside,
            gate,
            said,
        };
        Ok((draining, server))
    }

    async fn says(&mut self, word: &'static str) -> Verdict {
        let said = within("a word of a handler", PROMPT, self.said.recv()).await?;
        same("what a handler says", said, Some(word))
    }

    /// Begins to drain; it has when the server takes no requests any more.
    async fn drain(
        &self,
        bench: &Bench,
        server: RunningServer,
    ) -> Verdict<JoinHandle<Result<(), antiphon_core::Error>>> {
        let drained = tokio::spawn(server.shutdown());
        let client = bench.client().await?;
        let nobody = async || {
            let call = client.call_raw(&self.beside, "").expect_responder();
            call.timeout(QUIET)
                .await
                .is_err_and(|error| error.kind() == antiphon_core::ErrorKind::NoResponder)
        };
        let gone = async {
            while !nobody().await {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        within("a server that drains takes nothing", 2 * PROMPT, gone).await?;
        ensure("a drain", !drained.is_finished(), "it waits for handlers")?;
        Ok(drained)
    }
}

async fn asked_before_is_answered(bench: Bench) -> Verdict {
    let (mut draining, server) = Draining::start(&bench, "before").await?;
    let client = bench.client().await?;
    let asked = client
        .ask_all_raw(&draining.service, "asked")
        .timeout(4 * PROMPT);
    let asked = tokio::spawn(asked.into_future());
    draining.says("started").await?;
    let drained = draining.drain(&bench, server).await?;
    draining.gate.add_permits(100);
    let gathered = joined("ask all", asked).await?;
    same("how many answered", gathered.answers.len(), 1)?;
    joined("a drain", drained).await
}

async fn asked_meanwhile_is_not_heard(bench: Bench) -> Verdict {
    let (mut draining, server) = Draining::start(&bench, "meanwhile").await?;
    let client = bench.client().await?;
    let call = tokio::spawn(client.call_raw(&draining.service, "queued").into_future());
    draining.says("started").await?;
    let drained = draining.drain(&bench, server).await?;
    let asked = client
        .ask_all_raw(&draining.service, "asked")
        .timeout(2 * QUIET);
    let gathered = ok("ask all", asked).await?;
    same(
        "who is named by a server that drains",
        gathered.answers.len() + gathered.silent.len(),
        0,
    )?;
    draining.gate.add_permits(100);
    joined("a call that runs meanwhile", call).await?;
    joined("a drain", drained).await?;
    same("what else was started", draining.said.try_recv().ok(), None)
}

async fn given_up_meanwhile_is_told(bench: Bench) -> Verdict {
    let (mut draining, server) = Draining::start(&bench, "given-up").await?;
    let client = bench.client().await?;
    let call = tokio::spawn(client.call_raw(&draining.service, "").into_future());
    draining.says("started").await?;
    let drained = draining.drain(&bench, server).await?;
    call.abort();
    draining.says("cancelled").await?;
    joined("a drain", drained).await
}

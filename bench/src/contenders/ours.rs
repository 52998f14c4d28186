//! Ours: the public client and server, with everything that they promise.

use std::sync::Arc;
use std::time::Duration;

use antiphon::{Client, Connection, Fault, RunningServer, Server, ServiceName};
use bytes::Bytes;

use super::{Extra, Place, Serving};
use crate::Failure;
use crate::load::Caller;

/// What is sent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Body {
    /// The bytes as they are.
    Bytes,
    /// A JSON string of as many bytes, encoded and decoded on both sides.
    Json,
}

/// A client, and whatever it needs.
#[derive(Clone)]
pub(super) struct Ours {
    client: Client,
    /// They only have their inboxes.
    _others: Arc<[Client]>,
    service: ServiceName,
    body: Body,
    extra: Extra,
}

impl Caller for Ours {
    async fn call(&self, body: Bytes) -> Result<usize, Failure> {
        match self.body {
            Body::Bytes => {
                let call = self.client.call_raw(self.service.clone(), body);
                Ok(self.extra.call(call).await?.body.len())
            }
            Body::Json => {
                let text = std::str::from_utf8(&body)?;
                // The quotes belong to the body.
                let text = text.get(2..).unwrap_or_default();
                let call = self.client.call(self.service.clone(), text);
                let reply: String = self.extra.call(call).await?;
                Ok(reply.len() + 2)
            }
        }
    }
}

/// Connects to whatever the URL names.
async fn connect(url: &str) -> Result<Connection, Failure> {
    Ok(antiphon::connect(url).await?)
}

pub(super) async fn client(place: &Place, body: Body) -> Result<Ours, Failure> {
    let connection = connect(&place.url).await?;
    let client = connection.client().await?;
    let mut others = Vec::new();
    for _ in 1..place.clients {
        others.push(connection.client().await?);
    }
    wait_in_vain(&client, place).await?;
    Ok(Ours {
        client,
        _others: others.into(),
        service: ServiceName::new(&place.service)?,
        body,
        extra: place.extra,
    })
}

/// Starts the calls that wait for a server that is not there.
async fn wait_in_vain(client: &Client, place: &Place) -> Result<(), Failure> {
    if place.pending == 0 {
        return Ok(());
    }
    let nobody = ServiceName::new(&format!("{}-nobody", place.service))?;
    let hour = Duration::from_secs(3600);
    for _ in 0..place.pending {
        let call = client.call_raw(nobody.clone(), Bytes::from_static(b"x"));
        tokio::spawn(async move {
            // It ends with the process.
            let _ = call.timeout(hour).await;
        });
    }
    // They were sent in this order, and one that is answered by the broker comes after all of them.
    client.notify_raw(nobody, Bytes::new()).await?;
    Ok(())
}

pub(super) async fn serve(place: &Place, body: Body) -> Result<Serving, Failure> {
    let mut running = Vec::new();
    for _ in 0..place.servers {
        let connection = connect(&place.url).await?;
        running.push(start(connection.server(), place, body).await?);
    }
    Ok(Box::pin(async move {
        let _running = running;
        std::future::pending().await
    }))
}

/// A client and a server in this process.
pub(super) async fn in_memory(place: &Place, body: Body) -> Result<Ours, Failure> {
    let url = format!("memory://{}", place.service);
    let place = Place {
        url,
        ..place.clone()
    };
    tokio::spawn(serve(&place, body).await?);
    client(&place, body).await
}

async fn start(server: Server, place: &Place, body: Body) -> Result<RunningServer, Failure> {
    let server = place.extra.server(server, &place.service);
    let mut server = server.prefetch(place.prefetch.into());
    for number in 0..place.services {
        let service = match number {
            0 => place.service.clone(),
            _ => format!("{}-{number}", place.service),
        };
        server = match body {
            Body::Bytes => {
                server.handle_raw(&*service, |body: Bytes| async move { Ok::<_, Fault>(body) })
            }
            Body::Json => server.handle(
                &*service,
                |text: String| async move { Ok::<_, Fault>(text) },
            ),
        };
    }
    Ok(server.start().await?)
}

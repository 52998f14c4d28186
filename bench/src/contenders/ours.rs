//! Ours: the public client and server, with everything that they promise.

use antiphon::{Client, Connection, RunningServer, Server, ServiceName};
use bytes::Bytes;

use super::{Place, Serving};
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
    service: ServiceName,
    body: Body,
}

impl Caller for Ours {
    async fn call(&self, body: Bytes) -> Result<usize, Failure> {
        match self.body {
            Body::Bytes => {
                let call = self.client.call_raw(self.service.clone(), body);
                Ok(call.await?.body.len())
            }
            Body::Json => {
                let text = std::str::from_utf8(&body)?;
                // The quotes belong to the body.
                let text = text.get(2..).unwrap_or_default();
                let reply: String = self.client.call(self.service.clone(), text).await?;
                Ok(reply.len() + 2)
            }
        }
    }
}

/// Connects to whatever the URL names.
pub(crate) async fn connect(url: &str) -> Result<Connection, Failure> {
    Ok(antiphon::connect(url).await?)
}

pub(super) async fn client(place: &Place, body: Body) -> Result<Ours, Failure> {
    let connection = connect(&place.url).await?;
    Ok(Ours {
        client: connection.client().await?,
        service: ServiceName::new(&place.service)?,
        body,
    })
}

pub(super) async fn serve(place: &Place, body: Body) -> Result<Serving, Failure> {
    let connection = connect(&place.url).await?;
    let running = start(connection.server(), place, body).await?;
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
    let server = server.prefetch(place.prefetch.into());
    let service = place.service.as_str();
    let server = match body {
        Body::Bytes => server.handle_raw(service, |body: Bytes| async move { Ok(body) }),
        Body::Json => server.handle(service, |text: String| async move { Ok(text) }),
    };
    Ok(server.start().await?)
}

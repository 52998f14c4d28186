//! The peer over a broker that guarantees nothing: request and reply of NATS.

use async_nats::Client;
use bytes::Bytes;
use futures_util::StreamExt;

use super::{Place, Serving};
use crate::Failure;
use crate::load::Caller;

#[derive(Clone)]
pub(super) struct Nats {
    client: Client,
    subject: String,
}

impl Nats {
    pub(super) async fn connect(place: &Place) -> Result<Self, Failure> {
        Ok(Self {
            client: async_nats::connect(&place.url).await?,
            subject: place.service.clone(),
        })
    }
}

impl Caller for Nats {
    async fn call(&self, body: Bytes) -> Result<usize, Failure> {
        let reply = self.client.request(self.subject.clone(), body).await?;
        Ok(reply.payload.len())
    }
}

pub(super) async fn serve(place: &Place) -> Result<Serving, Failure> {
    let client = async_nats::connect(&place.url).await?;
    let mut requests = client.subscribe(place.service.clone()).await?;
    client.flush().await?;
    Ok(Box::pin(async move {
        while let Some(request) = requests.next().await {
            if let Some(reply) = request.reply {
                client.publish(reply, request.payload).await?;
            }
        }
        Ok(())
    }))
}

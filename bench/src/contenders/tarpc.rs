//! The peer in memory: tarpc over its own channel, with its defaults.

use bytes::Bytes;
use futures_util::StreamExt;
use tarpc::server::{BaseChannel, Channel};

use crate::Failure;
use crate::load::Caller;

#[tarpc::service]
trait Echo {
    async fn echo(body: Bytes) -> Bytes;
}

#[derive(Clone)]
struct Service;

impl Echo for Service {
    async fn echo(self, _: tarpc::context::Context, body: Bytes) -> Bytes {
        body
    }
}

#[derive(Clone)]
pub(super) struct Tarpc(EchoClient);

impl Tarpc {
    pub(super) fn start() -> Self {
        let (client, server) = tarpc::transport::channel::unbounded();
        let requests = BaseChannel::with_defaults(server).execute(Service.serve());
        tokio::spawn(requests.for_each(|request| async {
            tokio::spawn(request);
        }));
        Self(EchoClient::new(tarpc::client::Config::default(), client).spawn())
    }
}

impl Caller for Tarpc {
    async fn call(&self, body: Bytes) -> Result<usize, Failure> {
        let reply = self.0.echo(tarpc::context::current(), body).await?;
        Ok(reply.len())
    }
}

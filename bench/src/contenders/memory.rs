//! The floor in memory: a channel to the server, a oneshot back, and a task per request.

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use crate::Failure;
use crate::load::Caller;

struct Request {
    body: Bytes,
    reply: oneshot::Sender<Bytes>,
}

#[derive(Clone)]
pub(super) struct Spawning(mpsc::UnboundedSender<Request>);

impl Spawning {
    pub(super) fn start() -> Self {
        let (requests, mut taken) = mpsc::unbounded_channel::<Request>();
        tokio::spawn(async move {
            while let Some(request) = taken.recv().await {
                tokio::spawn(async move {
                    // A caller that is gone needs no reply.
                    let _ = request.reply.send(request.body);
                });
            }
        });
        Self(requests)
    }
}

impl Caller for Spawning {
    async fn call(&self, body: Bytes) -> Result<usize, Failure> {
        let (reply, replied) = oneshot::channel();
        self.0
            .send(Request { body, reply })
            .map_err(|_| "the server is gone")?;
        Ok(replied.await?.len())
    }
}

//! The floor `b`: reliable lists, one item at a time, as most libraries do it.

use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::{AsyncCommands, Direction};

use super::redis_frame::{self, Waiting};
use super::{Place, Serving};
use crate::Failure;
use crate::load::Caller;

/// How the server replies.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Replies {
    /// Before it takes the next request.
    Inline,
    /// In a task each.
    Spawned,
}

#[derive(Clone)]
pub(super) struct Single {
    connection: MultiplexedConnection,
    queue: String,
    inbox: String,
    waiting: Waiting,
}

impl Single {
    pub(super) async fn connect(place: &Place) -> Result<Self, Failure> {
        let reader = redis_frame::connect(&place.url).await?;
        let this = Self {
            connection: redis_frame::connect(&place.url).await?,
            queue: place.service.clone(),
            inbox: format!("{}:inbox:{}", place.service, std::process::id()),
            waiting: Waiting::default(),
        };
        let (inbox, waiting) = (this.inbox.clone(), this.waiting.clone());
        tokio::spawn(async move {
            if let Err(error) = read(reader, inbox, &waiting).await {
                eprintln!("b: {error}");
            }
            waiting.abandon();
        });
        Ok(this)
    }
}

impl Caller for Single {
    async fn call(&self, body: Bytes) -> Result<usize, Failure> {
        let (id, replied) = self.waiting.enter();
        let frame = redis_frame::encode(&self.inbox, id, &body)?;
        let _: usize = self.connection.clone().lpush(&self.queue, frame).await?;
        Ok(replied.await?)
    }
}

async fn read(
    mut connection: MultiplexedConnection,
    inbox: String,
    waiting: &Waiting,
) -> Result<(), Failure> {
    loop {
        let (_, reply): (String, Bytes) = connection.brpop(&inbox, 0.0).await?;
        waiting.resolve(&reply)?;
    }
}

pub(super) async fn serve(place: &Place, replies: Replies) -> Result<Serving, Failure> {
    let mut taking = redis_frame::connect(&place.url).await?;
    let settling = redis_frame::connect(&place.url).await?;
    let queue = place.service.clone();
    let held = format!("{queue}:held");
    Ok(Box::pin(async move {
        loop {
            let frame: Bytes = taking
                .blmove(&queue, &held, Direction::Right, Direction::Left, 0.0)
                .await?;
            let settle = settle(settling.clone(), held.clone(), frame);
            match replies {
                Replies::Inline => settle.await?,
                Replies::Spawned => {
                    tokio::spawn(async move {
                        if let Err(error) = settle.await {
                            eprintln!("b: {error}");
                        }
                    });
                }
            }
        }
    }))
}

async fn settle(
    mut connection: MultiplexedConnection,
    held: String,
    frame: Bytes,
) -> Result<(), Failure> {
    let (inbox, reply) = redis_frame::echo(&frame)?;
    redis::pipe()
        .lpush(inbox, reply)
        .ignore()
        .lrem(held, 1, &frame[..])
        .ignore()
        .query_async::<()>(&mut connection)
        .await?;
    Ok(())
}

//! The floor `crel`: reliable lists that move whatever has piled up. No item leaves the server's list of what it holds before its
//! reply is pushed. Pushing replies and removing items are two steps, and nothing recovers what a dead server held.

use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::{AsyncCommands, Direction, Script};
use tokio::sync::mpsc;

use super::redis_frame::{self, Waiting};
use super::{Place, Serving};
use crate::Failure;
use crate::load::Caller;

/// The most that moves at once.
const BATCH: usize = 256;

/// Moves as many items as its argument says, or fewer.
const MOVE: &str = r"
local items = redis.call('RPOP', KEYS[1], ARGV[1])
if not items then return {} end
redis.call('LPUSH', KEYS[2], unpack(items))
return items
";

#[derive(Clone)]
pub(super) struct Batched {
    inbox: String,
    waiting: Waiting,
    outgoing: mpsc::UnboundedSender<Vec<u8>>,
}

impl Batched {
    pub(super) async fn connect(place: &Place) -> Result<Self, Failure> {
        let writer = redis_frame::connect(&place.url).await?;
        let reader = redis_frame::connect(&place.url).await?;
        let (outgoing, frames) = mpsc::unbounded_channel();
        let this = Self {
            inbox: format!("{}:inbox:{}", place.service, std::process::id()),
            waiting: Waiting::default(),
            outgoing,
        };
        let queue = place.service.clone();
        tokio::spawn(async move {
            if let Err(error) = write(writer, queue, frames).await {
                eprintln!("crel: {error}");
            }
        });
        let (inbox, waiting) = (this.inbox.clone(), this.waiting.clone());
        tokio::spawn(async move {
            if let Err(error) = read(reader, inbox, &waiting).await {
                eprintln!("crel: {error}");
            }
            waiting.abandon();
        });
        Ok(this)
    }
}

impl Caller for Batched {
    async fn call(&self, body: Bytes) -> Result<usize, Failure> {
        let (id, replied) = self.waiting.enter();
        let frame = redis_frame::encode(&self.inbox, id, &body)?;
        self.outgoing
            .send(frame)
            .map_err(|_| "the writer is gone")?;
        Ok(replied.await?)
    }
}

async fn write(
    mut connection: MultiplexedConnection,
    queue: String,
    mut frames: mpsc::UnboundedReceiver<Vec<u8>>,
) -> Result<(), Failure> {
    let mut batch = Vec::with_capacity(BATCH);
    while frames.recv_many(&mut batch, BATCH).await > 0 {
        let _: usize = connection.lpush(&queue, &batch).await?;
        batch.clear();
    }
    Ok(())
}

async fn read(
    mut connection: MultiplexedConnection,
    inbox: String,
    waiting: &Waiting,
) -> Result<(), Failure> {
    loop {
        let (_, replies): (String, Vec<Bytes>) = connection
            .blmpop(0.0, 1, &inbox, Direction::Right, BATCH)
            .await?;
        for reply in &replies {
            waiting.resolve(reply)?;
        }
    }
}

pub(super) async fn serve(place: &Place) -> Result<Serving, Failure> {
    let mut taking = redis_frame::connect(&place.url).await?;
    let mut settling = redis_frame::connect(&place.url).await?;
    let queue = place.service.clone();
    let held = format!("{queue}:held");
    let take = Script::new(MOVE);
    Ok(Box::pin(async move {
        loop {
            let first: Bytes = taking
                .blmove(&queue, &held, Direction::Right, Direction::Left, 0.0)
                .await?;
            let mut frames: Vec<Bytes> = take
                .key(&queue)
                .key(&held)
                .arg(BATCH - 1)
                .invoke_async(&mut taking)
                .await?;
            frames.push(first);
            settle(&mut settling, &held, &frames).await?;
        }
    }))
}

async fn settle(
    connection: &mut MultiplexedConnection,
    held: &str,
    frames: &[Bytes],
) -> Result<(), Failure> {
    // One client, or few: their replies go together.
    let mut inboxes: Vec<(&[u8], Vec<&[u8]>)> = Vec::new();
    for frame in frames {
        let (inbox, reply) = redis_frame::echo(frame)?;
        match inboxes.iter_mut().find(|(known, _)| *known == inbox) {
            Some((_, replies)) => replies.push(reply),
            None => inboxes.push((inbox, vec![reply])),
        }
    }
    let mut replies = redis::pipe();
    for (inbox, bodies) in inboxes {
        replies.lpush(inbox, bodies).ignore();
    }
    replies.query_async::<()>(connection).await?;
    let mut removals = redis::pipe();
    for frame in frames {
        removals.lrem(held, 1, &frame[..]).ignore();
    }
    removals.query_async::<()>(connection).await?;
    Ok(())
}

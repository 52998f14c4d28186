//! The floors `c` and `cq`: lapin with confirms both ways, many under way at once, and an ack after the reply's confirm. One
//! connection and one channel on each side, nothing mandatory.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer};
use tokio::sync::oneshot;

use super::{Place, Serving};
use crate::Failure;
use crate::load::Caller;

/// The queue of the service.
#[derive(Clone, Copy, Debug)]
pub(crate) enum QueueKind {
    /// In memory, gone with the broker.
    TransientClassic,
    /// On disk, and replicated where there are several nodes.
    Quorum,
}

#[derive(Clone)]
pub(super) struct Confirmed {
    // Dropping the connection would close it.
    _connection: Arc<Connection>,
    channel: Channel,
    queue: ShortString,
    inbox: ShortString,
    waiting: Waiting,
    next: Arc<AtomicU64>,
}

type Waiting = Arc<Mutex<HashMap<String, oneshot::Sender<usize>>>>;

impl Confirmed {
    pub(super) async fn connect(place: &Place) -> Result<Self, Failure> {
        let (connection, channel) = open(place).await?;
        let inbox: ShortString = format!("{}.inbox.{}", place.service, std::process::id()).into();
        let exclusive = QueueDeclareOptions {
            exclusive: true,
            ..QueueDeclareOptions::default()
        };
        channel
            .queue_declare(inbox.clone(), exclusive, FieldTable::default())
            .await?;
        let no_ack = BasicConsumeOptions {
            no_ack: true,
            exclusive: true,
            ..BasicConsumeOptions::default()
        };
        let replies = channel
            .basic_consume(inbox.clone(), "".into(), no_ack, FieldTable::default())
            .await?;
        let waiting = Waiting::default();
        tokio::spawn(dispatch(replies, Arc::clone(&waiting)));
        Ok(Self {
            _connection: Arc::new(connection),
            channel,
            queue: place.service.as_str().into(),
            inbox,
            waiting,
            next: Arc::default(),
        })
    }
}

impl Caller for Confirmed {
    async fn call(&self, body: Bytes) -> Result<usize, Failure> {
        let id = self.next.fetch_add(1, Ordering::Relaxed).to_string();
        let (reply, replied) = oneshot::channel();
        lock(&self.waiting).insert(id.clone(), reply);
        let properties = BasicProperties::default()
            .with_correlation_id(id.into())
            .with_reply_to(self.inbox.clone());
        publish(&self.channel, self.queue.clone(), &body, properties).await?;
        Ok(replied.await?)
    }
}

async fn dispatch(mut replies: Consumer, waiting: Waiting) {
    while let Some(Ok(reply)) = replies.next().await {
        let Some(id) = reply.properties.correlation_id() else {
            continue;
        };
        if let Some(caller) = lock(&waiting).remove(id.as_str()) {
            let _ = caller.send(reply.data.len());
        }
    }
    lock(&waiting).clear();
}

fn lock(waiting: &Waiting) -> std::sync::MutexGuard<'_, HashMap<String, oneshot::Sender<usize>>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Publishes, and waits for the confirm.
async fn publish(
    channel: &Channel,
    queue: ShortString,
    body: &[u8],
    properties: BasicProperties,
) -> Result<(), Failure> {
    let options = BasicPublishOptions::default();
    let confirm = channel
        .basic_publish("".into(), queue, options, body, properties)
        .await?;
    match confirm.await? {
        Confirmation::Ack(None) => Ok(()),
        other => Err(format!("the broker did not take it: {other:?}").into()),
    }
}

pub(super) async fn serve(place: &Place, kind: QueueKind) -> Result<Serving, Failure> {
    let (connection, channel) = open(place).await?;
    declare_on(&channel, place, kind).await?;
    channel
        .basic_qos(place.prefetch, BasicQosOptions::default())
        .await?;
    let mut requests = channel
        .basic_consume(
            place.service.as_str().into(),
            "".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok(Box::pin(async move {
        let _connection = connection;
        while let Some(request) = requests.next().await {
            let (request, channel) = (request?, channel.clone());
            tokio::spawn(async move {
                if let Err(error) = answer(&channel, request).await {
                    eprintln!("c: {error}");
                }
            });
        }
        Err("the consumer is over".into())
    }))
}

async fn answer(channel: &Channel, request: Delivery) -> Result<(), Failure> {
    let properties = &request.properties;
    let reply_to = properties.reply_to().clone().ok_or("no reply_to")?;
    let id = properties.correlation_id().clone().ok_or("no id")?;
    let properties = BasicProperties::default().with_correlation_id(id);
    publish(channel, reply_to, &request.data, properties).await?;
    channel
        .basic_ack(request.delivery_tag, BasicAckOptions::default())
        .await?;
    Ok(())
}

/// Declares the service's queue, for others.
pub(super) async fn declare(place: &Place, kind: QueueKind) -> Result<(), Failure> {
    let (connection, channel) = open(place).await?;
    declare_on(&channel, place, kind).await?;
    connection.close(200, "declared".into()).await?;
    Ok(())
}

async fn declare_on(channel: &Channel, place: &Place, kind: QueueKind) -> Result<(), Failure> {
    let mut options = QueueDeclareOptions::default();
    let mut arguments = FieldTable::default();
    if let QueueKind::Quorum = kind {
        options.durable = true;
        let quorum = AMQPValue::LongString("quorum".into());
        arguments.insert("x-queue-type".into(), quorum);
    }
    channel
        .queue_declare(place.service.as_str().into(), options, arguments)
        .await?;
    Ok(())
}

async fn open(place: &Place) -> Result<(Connection, Channel), Failure> {
    let connection = Connection::connect(&place.url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    Ok((connection, channel))
}

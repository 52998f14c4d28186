//! A private reply address, and what is handed over from it.

use std::sync::Arc;

use antiphon_core::transport::{Inbox, InboxEvent};
use antiphon_core::{Error, ErrorKind, ReplyAddress, ServiceName};
use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::audience::Audiences;
use crate::error;
use crate::inbox_reader::Reader;
use crate::naming::InboxKeys;
use crate::transport::Shared;

/// Pages that wait for the client; more stay on the broker.
const PAGES_WAITING: usize = 4;

/// A private reply address.
#[derive(Debug)]
pub(crate) struct RedisInbox {
    shared: Arc<Shared>,
    address: ReplyAddress,
    audiences: Audiences,
    events: mpsc::Receiver<InboxEvent>,
    closed: CancellationToken,
    _dropped: DropGuard,
}

impl RedisInbox {
    /// Opens an inbox: live as soon as its epoch is set.
    pub(crate) async fn open(shared: &Arc<Shared>) -> Result<Self, Error> {
        let keys = InboxKeys::new(&shared.process.next_name()).ok_or_else(|| {
            Error::not_executed(ErrorKind::Broker, "a random name was not a valid address")
        })?;
        let audiences = Audiences::default();
        let mut reader = Reader::new(Arc::clone(shared), keys.clone(), audiences.clone());
        loop {
            let live = shared
                .link
                .clone()
                .ready(&shared.ending)
                .await
                .ok_or_else(error::closed)?;
            match reader.begin(&live).await {
                Ok(_) => break,
                Err(redis) if redis.is_io_error() || live.broken.is_cancelled() => {}
                Err(redis) => {
                    return Err(Error::not_executed(ErrorKind::Broker, redis.to_string()));
                }
            }
        }
        let (sender, events) = mpsc::channel(PAGES_WAITING);
        let dropped = shared.ending.child_token();
        shared.workers.spawn(reader.run(sender, dropped.clone()));
        Ok(Self {
            shared: Arc::clone(shared),
            address: keys.address().clone(),
            audiences,
            events,
            closed: shared.ending.clone(),
            _dropped: dropped.drop_guard(),
        })
    }
}

#[async_trait]
impl Inbox for RedisInbox {
    fn address(&self) -> ReplyAddress {
        self.address.clone()
    }

    async fn join(&mut self, service: &ServiceName) -> Result<(), Error> {
        self.audiences
            .join(&self.shared, service, &self.address)
            .await
    }

    async fn recv(&mut self) -> InboxEvent {
        tokio::select! {
            biased;
            () = self.closed.cancelled() => InboxEvent::Closed(error::closed()),
            event = self.events.recv() => event.unwrap_or_else(|| InboxEvent::Closed(error::closed())),
        }
    }
}

//! The services of which an inbox hears what is said to all their servers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lapin::Channel;
use lapin::options::QueueBindOptions;
use lapin::types::{FieldTable, ShortString};

use crate::error::Failure;
use crate::link::{Session, bounded};
use crate::naming::TO_ALL;

/// The routing keys of these services: entered before the inbox's queue is bound, so that whoever declares it anew binds it to them
/// all.
#[derive(Clone, Debug, Default)]
pub(crate) struct Joined(Arc<Mutex<Vec<ShortString>>>);

impl Joined {
    pub(crate) fn enter(&self, key: &ShortString) {
        let mut keys = self.lock();
        if !keys.contains(key) {
            keys.push(key.clone());
        }
    }

    pub(crate) fn leave(&self, key: &ShortString) {
        self.lock().retain(|other| other != key);
    }

    /// Binds a queue that was just declared.
    pub(crate) async fn bind_all(
        &self,
        channel: &Channel,
        queue: &ShortString,
    ) -> Result<(), Failure> {
        let keys = self.lock().clone();
        for key in keys {
            bind(channel, queue, &key).await?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<ShortString>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Binds a live inbox, on a channel of its own: a refusal must not cost the inbox its life.
pub(crate) async fn bind_live(
    session: &Session,
    queue: &ShortString,
    key: &ShortString,
) -> Result<(), Failure> {
    let bound = async { bind(&session.channel().await?, queue, key).await }.await;
    if matches!(bound, Err(Failure::TimedOut(_))) {
        session.suspect();
    }
    bound
}

async fn bind(channel: &Channel, queue: &ShortString, key: &ShortString) -> Result<(), Failure> {
    let bind = channel.queue_bind(
        queue.clone(),
        TO_ALL.into(),
        key.clone(),
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    bounded("queue.bind", bind).await
}

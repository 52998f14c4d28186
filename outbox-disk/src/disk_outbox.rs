//! The outbox as a server sees it.

use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use antiphon_core::{Error, KeptReply, OutboxChange, OutboxStore, StoreWrite};
use async_trait::async_trait;
use tokio::sync::oneshot;

use crate::error::OutboxError;
use crate::writer::{Command, Writer};

/// A server's outbox in a file. Making one does nothing; the server opens it when it starts.
#[derive(Debug)]
pub struct DiskOutbox {
    path: PathBuf,
    /// The way to the thread that has the file open.
    writer: Mutex<Option<Sender<Command>>>,
}

impl DiskOutbox {
    /// An outbox in this file, in a directory that exists. The file is made if it is not there, with the rights `0600`.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            writer: Mutex::new(None),
        }
    }

    fn error(&self, error: OutboxError) -> Error {
        error.into_error(&self.path)
    }

    fn writer(&self) -> MutexGuard<'_, Option<Sender<Command>>> {
        // A sender is whole whatever panicked.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl OutboxStore for DiskOutbox {
    async fn open(&self) -> Result<Vec<KeptReply>, Error> {
        let (sender, commands) = channel();
        let (opened, open) = oneshot::channel();
        let path = self.path.clone();
        let run = move || match Writer::open(path) {
            Ok((writer, found)) => {
                // Nobody wants it any more: it is closed again.
                if opened.send(Ok(found)).is_ok() {
                    writer.run(&commands);
                }
            }
            Err(error) => {
                let _ = opened.send(Err(error));
            }
        };
        thread::Builder::new()
            .name("antiphon-outbox".to_owned())
            .spawn(run)
            .map_err(|error| self.error(error.into()))?;
        let opened = open.await.unwrap_or(Err(OutboxError::Closed));
        let found = opened.map_err(|error| self.error(error))?;
        *self.writer() = Some(sender);
        Ok(found)
    }

    fn write(&self, change: OutboxChange) -> StoreWrite {
        let (done, written) = oneshot::channel();
        let closed = self.error(OutboxError::Closed);
        if let Some(writer) = &*self.writer() {
            // If the thread is gone, so is the other end.
            let _ = writer.send(Command::Change(change, done));
        }
        Box::pin(async move { written.await.unwrap_or(Err(closed)) })
    }

    async fn close(&self) {
        let Some(writer) = self.writer().take() else {
            return;
        };
        let (done, closed) = oneshot::channel();
        let _ = writer.send(Command::Close(done));
        // An error means that the thread is gone, and the file closed.
        let _ = closed.await;
    }
}

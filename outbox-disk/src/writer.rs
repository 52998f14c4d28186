//! The thread that does all I/O: whatever has piled up goes into one commit.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use antiphon_core::{Error, KeptReply, OutboxChange};
use tokio::sync::oneshot;

use crate::database::Database;
use crate::error::OutboxError;

/// The most changes of one commit.
const BATCH: usize = 512;

/// How long a file may still be in use: its former owner may be just about to end.
const IN_USE_PATIENCE: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How much may be owed. What is forgotten beyond it is found by the next server on the file, which sends it once more, or
/// finds it expired.
const OWED_MAX: usize = 16_384;

/// What the thread is told.
#[derive(Debug)]
pub(crate) enum Command {
    Change(OutboxChange, oneshot::Sender<Result<(), Error>>),
    Close(oneshot::Sender<()>),
}

#[derive(Debug)]
pub(crate) struct Writer {
    path: PathBuf,
    /// None after a failure: it is opened again for the next change.
    database: Option<Database>,
    /// What must not stay on the disk, and does, since a commit failed.
    owed: Vec<OutboxChange>,
}

impl Writer {
    /// Opens the outbox and reads it.
    pub(crate) fn open(path: PathBuf) -> Result<(Self, Vec<KeptReply>), OutboxError> {
        let end = Instant::now() + IN_USE_PATIENCE;
        let opened = loop {
            let opened = guarded(|| {
                let database = Database::open(&path)?;
                let found = database.read()?;
                Ok((database, found))
            });
            match opened {
                Err(OutboxError::InUse) if Instant::now() < end => std::thread::sleep(LOOK_AGAIN),
                opened => break opened?,
            }
        };
        let (database, found) = opened;
        let writer = Self {
            path,
            database: Some(database),
            owed: Vec::new(),
        };
        Ok((writer, found))
    }

    /// Does what it is told until it is closed, or nobody is left to tell it anything.
    pub(crate) fn run(mut self, commands: &Receiver<Command>) {
        while let Ok(first) = commands.recv() {
            let more = std::iter::from_fn(|| commands.try_recv().ok());
            let mut changes = Vec::new();
            let mut closed = None;
            for command in std::iter::once(first).chain(more).take(BATCH) {
                match command {
                    Command::Change(change, done) => changes.push((change, done)),
                    Command::Close(done) => {
                        closed = Some(done);
                        break;
                    }
                }
            }
            self.write(changes);
            if let Some(done) = closed {
                self.let_go();
                // Whoever waited may have gone.
                let _ = done.send(());
                return;
            }
        }
        self.let_go();
    }

    fn write(&mut self, changes: Vec<(OutboxChange, oneshot::Sender<Result<(), Error>>)>) {
        if changes.is_empty() {
            return;
        }
        let result = self.commit(&changes);
        match &result {
            Ok(()) => self.owed.clear(),
            Err(error) => {
                tracing::error!(path = %self.path.display(), %error, "the outbox cannot be written");
                // The store is not sure of itself after a failure.
                self.let_go();
            }
        }
        for (change, done) in changes {
            let result = match &result {
                Ok(()) => Ok(()),
                Err(error) => {
                    self.owe(change);
                    Err(error.again().into_error(&self.path))
                }
            };
            // Nobody waits for most of them.
            let _ = done.send(result);
        }
    }

    fn commit<T>(&mut self, changes: &[(OutboxChange, T)]) -> Result<(), OutboxError> {
        let Self {
            path,
            database,
            owed,
        } = self;
        guarded(|| {
            let database = match database {
                Some(database) => database,
                None => database.insert(Database::open(path)?),
            };
            database.change(owed.iter().chain(changes.iter().map(|(change, _)| change)))
        })
    }

    /// Notes what is still to be done after a failed commit, which may have been done in part or not.
    fn owe(&mut self, change: OutboxChange) {
        if self.owed.len() >= OWED_MAX {
            return;
        }
        let change = match change {
            // The server has it in memory, and says later what becomes of it.
            OutboxChange::Keep(kept) => OutboxChange::Forget(kept.key()),
            other => other,
        };
        self.owed.push(change);
    }

    fn let_go(&mut self) {
        let database = self.database.take();
        if let Err(error) = guarded(|| {
            drop(database);
            Ok(())
        }) {
            tracing::warn!(path = %self.path.display(), %error, "the outbox was not closed well");
        }
    }
}

/// What panics in the store is an error, where panics unwind.
fn guarded<T>(run: impl FnOnce() -> Result<T, OutboxError>) -> Result<T, OutboxError> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(OutboxError::panicked(&*panic)))
}

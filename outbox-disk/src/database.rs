//! The store: what is kept, in tables of redb.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use antiphon_core::{KeptReply, OutboxChange};
use redb::{
    Builder, Database as Redb, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction,
};

use crate::entry;
use crate::error::OutboxError;
use crate::file::{self, Draft};

/// The format of what is in the tables.
const FORMAT: u64 = 1;

/// Says that it is an outbox, and of which format.
const ABOUT: TableDefinition<'_, &str, u64> = TableDefinition::new("antiphon-outbox");

/// By address and id.
const REPLIES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("replies");

/// The keys of those that are to be sent.
const UNSENT: TableDefinition<'_, &[u8], ()> = TableDefinition::new("unsent");

/// The pages that are held in memory. What is kept is in memory already.
const CACHE: usize = 4 << 20;

pub(crate) struct Database(Redb);

impl Database {
    /// Opens or makes it.
    pub(crate) fn open(path: &Path) -> Result<Self, OutboxError> {
        if let Some(file) = file::find(path)? {
            return Self::attach(file);
        }
        if let Some((draft, file)) = Draft::begin(path)? {
            let database = Self(builder().create_file(file)?);
            database.write(|transaction| {
                transaction.open_table(ABOUT)?.insert("format", FORMAT)?;
                transaction.open_table(REPLIES)?;
                transaction.open_table(UNSENT)?;
                Ok(())
            })?;
            draft.finish()?;
            return Ok(database);
        }
        match file::find(path)? {
            Some(file) => Self::attach(file),
            None => Err(OutboxError::InUse),
        }
    }

    fn attach(file: std::fs::File) -> Result<Self, OutboxError> {
        let mut database = builder().create_file(file)?;
        let said = digest(&database).ok();
        // False also after a clean end, now and then, if nothing but redb's record of its free pages differed. Then the tables say what
        // they said; else it went back to an older state.
        if !database.check_integrity()? && (said.is_none() || digest(&database).ok() != said) {
            let reason = "its checksums did not match".to_owned();
            return Err(OutboxError::Damaged(reason));
        }
        let format = {
            let about = database.begin_read()?.open_table(ABOUT)?;
            about.get("format")?.map(|format| format.value())
        };
        match format {
            Some(FORMAT) => Ok(Self(database)),
            Some(other) => Err(OutboxError::Format(other)),
            None => Err(OutboxError::Foreign),
        }
    }

    pub(crate) fn read(&self) -> Result<Vec<KeptReply>, OutboxError> {
        let transaction = self.0.begin_read()?;
        let unsent = transaction.open_table(UNSENT)?;
        let mut found = Vec::new();
        for entry in transaction.open_table(REPLIES)?.iter()? {
            let (key, value) = entry?;
            let unsent = unsent.get(key.value())?.is_some();
            let kept = entry::decode(key.value(), value.value(), unsent);
            found.push(kept.map_err(OutboxError::Damaged)?);
        }
        Ok(found)
    }

    /// Makes changes, all or none; they are on disk when this returns.
    pub(crate) fn change<'a>(
        &self,
        changes: impl Iterator<Item = &'a OutboxChange>,
    ) -> Result<(), OutboxError> {
        self.write(|transaction| {
            let mut replies = transaction.open_table(REPLIES)?;
            let mut unsent = transaction.open_table(UNSENT)?;
            for change in changes {
                match change {
                    OutboxChange::Keep(kept) => {
                        let key = entry::encode_key(&kept.key());
                        let Some(value) = entry::encode(kept) else {
                            continue;
                        };
                        replies.insert(&*key, &*value)?;
                        if kept.unsent {
                            unsent.insert(&*key, ())?;
                        } else {
                            unsent.remove(&*key)?;
                        }
                    }
                    OutboxChange::Sent(key) => {
                        unsent.remove(&*entry::encode_key(key))?;
                    }
                    OutboxChange::Forget(key) => {
                        let key = entry::encode_key(key);
                        replies.remove(&*key)?;
                        unsent.remove(&*key)?;
                    }
                    _ => {}
                }
            }
            Ok(())
        })
    }

    fn write(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<(), OutboxError>,
    ) -> Result<(), OutboxError> {
        // It is durable by default: an fsync each.
        let transaction = self.0.begin_write()?;
        change(&transaction)?;
        Ok(transaction.commit()?)
    }
}

/// Of all that the tables say.
fn digest(database: &Redb) -> Result<u64, OutboxError> {
    let transaction = database.begin_read()?;
    let mut hasher = DefaultHasher::new();
    for entry in transaction.open_table(REPLIES)?.iter()? {
        let (key, value) = entry?;
        (key.value(), value.value()).hash(&mut hasher);
    }
    for entry in transaction.open_table(UNSENT)?.iter()? {
        entry?.0.value().hash(&mut hasher);
    }
    Ok(hasher.finish())
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE);
    builder
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database").finish_non_exhaustive()
    }
}

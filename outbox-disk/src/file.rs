//! The outbox's file: found, or made whole before it has its name.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use crate::error::OutboxError;

/// What a file of the store begins with.
const MAGIC: [u8; 9] = *b"redb\x1A\x0A\xA9\x0D\x0A";

/// The outbox's file, if there is one.
///
/// # Errors
/// `Foreign` if it is something else, which is then left as it is.
pub(crate) fn find(path: &Path) -> Result<Option<File>, OutboxError> {
    let mut file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if file.metadata()?.len() == 0 {
        return Ok(None);
    }
    let mut start = [0; MAGIC.len()];
    match file.read_exact(&mut start) {
        Ok(()) if start == MAGIC => {}
        Ok(()) => return Err(OutboxError::Foreign),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Err(OutboxError::Foreign),
        Err(error) => return Err(error.into()),
    }
    make_private(&file)?;
    Ok(Some(file))
}

/// A file that is not yet there under its name, so that nobody finds half an outbox.
#[derive(Debug)]
pub(crate) struct Draft {
    path: PathBuf,
    draft: PathBuf,
}

impl Draft {
    /// An empty file beside `path`; none if somebody else was faster.
    ///
    /// # Errors
    /// `InUse` if somebody else is at it.
    pub(crate) fn begin(path: &Path) -> Result<Option<(Self, File)>, OutboxError> {
        let mut draft = OsString::from(path);
        draft.push(".new");
        let draft = PathBuf::from(draft);
        let mut options = OpenOptions::new();
        // Emptied only under the lock: it may be somebody else's.
        options.read(true).write(true).create(true).truncate(false);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(&draft)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OutboxError::InUse),
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        if find(path)?.is_some() {
            let _ = fs::remove_file(&draft);
            return Ok(None);
        }
        make_private(&file)?;
        file.set_len(0)?;
        // The store takes the lock again. Whoever takes it in between does the same as we.
        match file.unlock() {
            Err(error) if error.kind() != ErrorKind::Unsupported => return Err(error.into()),
            _ => {}
        }
        let path = path.to_owned();
        Ok(Some((Self { path, draft }, file)))
    }

    /// Gives the file its name, while whoever made it has its lock.
    pub(crate) fn finish(self) -> io::Result<()> {
        fs::rename(&self.draft, &self.path)?;
        #[cfg(unix)]
        {
            let parent = self
                .path
                .parent()
                .filter(|path| !path.as_os_str().is_empty());
            File::open(parent.unwrap_or_else(|| Path::new(".")))?.sync_all()?;
        }
        Ok(())
    }
}

/// It holds bodies of replies.
fn make_private(file: &File) -> io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        if file.metadata()?.permissions().mode() & 0o077 != 0 {
            file.set_permissions(fs::Permissions::from_mode(0o600))?;
        }
    }
    Ok(())
}

//! A small file of fixed length that is replaced as a whole, and for which there is always room.
//!
//! ```text
//!   NAME       what it says
//!   NAME.tmp   space for the next one; what it holds means nothing
//! ```
//!
//! **Replacing it**: write over `NAME.tmp`, sync it, exchange the two names, sync the directory. The
//! exchange is one step of the file system's journal, so that whatever happens `NAME` is the old file
//! or the new one, whole.
//!
//! | a crash after         | leaves                           | at start                     |
//! |-----------------------|----------------------------------|------------------------------|
//! | writing NAME.tmp      | the old file, torn NAME.tmp      | the old one; not promised    |
//! | the exchange          | either                           | either; not promised         |
//! | syncing the directory | the new file, old one as NAME.tmp | the new one                  |
//!
//! **A full disk stops nothing.** The next contents are written over blocks that are allocated
//! already, and an exchange adds no name. That is why the length is fixed; why `NAME.tmp` is kept; and
//! why it is not replaced with a plain rename, which would give its predecessor's blocks away. On
//! a file system that cannot exchange names we do rename, and make a new `NAME.tmp` afterwards:
//! there the reserve can be missing when it is needed. On one that never writes in place (btrfs,
//! ZFS) no reserve holds.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::{Disk, DiskFile, StorageError};

/// Whoever holds this is the only one who writes the file.
#[derive(Debug)]
pub struct ReservedFile {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    name: &'static str,
    /// Of the file, in bytes.
    len: usize,
}

impl ReservedFile {
    /// Nothing is looked at yet.
    pub fn new(disk: Arc<dyn Disk>, dir: PathBuf, name: &'static str, len: usize) -> ReservedFile {
        ReservedFile {
            disk,
            dir,
            name,
            len,
        }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.join(self.name)
    }

    /// Makes the file, which is not there. If it fails for lack of space it can be tried again.
    pub fn create(&self, bytes: &[u8]) -> Result<(), StorageError> {
        // The reserve first: once the file is there, it can be replaced.
        self.make_reserve()?;
        let first = self.dir.join(format!("{}.first.tmp", self.name));
        let file = self.disk.create(&first)?;
        self.write_whole(file.as_ref(), bytes)?;
        self.disk.rename(&first, &self.path())?;
        self.disk.sync_dir(&self.dir)
    }

    /// When this returns, the new contents are on stable storage. After an error they may be there
    /// or not: the process must end, but for want of space, which leaves the old ones.
    pub fn replace(&mut self, bytes: &[u8]) -> Result<(), StorageError> {
        let (path, reserve) = (self.path(), self.reserve());
        let file = match self.disk.open(&reserve) {
            Err(error) if error.is_not_found() => self.disk.create(&reserve)?,
            other => other?,
        };
        self.write_whole(file.as_ref(), bytes)?;
        match self.disk.exchange(&reserve, &path) {
            Err(error) if error.is_unsupported() => self.disk.rename(&reserve, &path)?,
            other => other?,
        }
        self.disk.sync_dir(&self.dir)?;
        match self.check_reserve() {
            Err(error) if error.is_no_space() => Ok(()),
            other => other,
        }
    }

    /// Makes the reserve if it is not there.
    pub fn check_reserve(&self) -> Result<(), StorageError> {
        match self.disk.file_id(&self.reserve())? {
            Some(_) => Ok(()),
            None => self.make_reserve(),
        }
    }

    fn make_reserve(&self) -> Result<(), StorageError> {
        let file = self.disk.create(&self.reserve())?;
        // Real zeros, not a hole: it is the blocks that matter.
        self.write_whole(file.as_ref(), &vec![0; self.len])?;
        self.disk.sync_dir(&self.dir)
    }

    fn reserve(&self) -> PathBuf {
        self.dir.join(format!("{}.tmp", self.name))
    }

    fn write_whole(&self, file: &dyn DiskFile, bytes: &[u8]) -> Result<(), StorageError> {
        assert_eq!(bytes.len(), self.len, "{} has a fixed length", self.name);
        file.write_at(bytes, 0)?;
        if file.size()? != bytes.len() as u64 {
            file.set_len(bytes.len() as u64)?;
        }
        file.sync_all()
    }
}

/// The contents of a file that should be `len` bytes long: one byte more, if there is one, so that
/// whoever decodes it notices. None if it is not there.
pub fn read_reserved(
    disk: &dyn Disk,
    path: &Path,
    len: usize,
) -> Result<Option<Vec<u8>>, StorageError> {
    let file = match disk.open_read_only(path) {
        Ok(file) => file,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = vec![0; len + 1];
    let read = file.read_at(&mut bytes, 0)?;
    bytes.truncate(read);
    Ok(Some(bytes))
}

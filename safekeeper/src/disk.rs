//! `Disk`: the only door to the file system, and the seam where a simulated disk is put in.
//!
//! Everything the daemon keeps lies below one root, and paths here are relative to it. There is no
//! cache and no buffer on our side: a write that has returned is with the operating system, and a
//! sync that has returned is on stable storage, or as near as the device lets us know.
//!
//! | after a power cut this is there             | only if this has returned             |
//! |---------------------------------------------|---------------------------------------|
//! | bytes written to a file                     | `sync_data` of that file              |
//! | bytes written beyond its old end            | `sync_all` of that file               |
//! | a name: created, renamed, exchanged, removed | `sync_dir` of the directory it is in  |
//!
//! What has not been synced may be there or not, in any part and any order. A crash of the process
//! alone loses nothing that was written; but what can be *read* after it is not therefore durable,
//! which is why the daemon calls `sync_everything` once at start.
//!
//! **Errors.** A failed write, sync or rename is a [`StorageError`], and the caller ends the
//! process: after a failed sync the kernel may have dropped the pages it could not write and call
//! the next sync a success. The one failure that is survived is a lack of space or of descriptors,
//! and only where nothing that was promised depends on it; [`StorageError::is_no_space`] tells it
//! apart.

use std::fmt;
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{CWD, FallocateFlags, RenameFlags};

/// What failed, and on which file: `could not sync wal/0000...02: Input/output error`.
#[derive(Debug, thiserror::Error)]
#[error("could not {doing} \"{}\": {source}", path.display())]
pub struct StorageError {
    /// A verb, as in "could not open".
    pub doing: &'static str,
    pub path: PathBuf,
    pub source: io::Error,
}

impl StorageError {
    /// Space, quota, a size limit or descriptors have run out: what failed can be tried again
    /// later.
    pub fn is_no_space(&self) -> bool {
        matches!(
            self.source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
        ) || self.is_out_of_descriptors()
    }

    /// Too many files are open, here or on the whole host. Only opening one fails like this, so
    /// nothing has been written.
    fn is_out_of_descriptors(&self) -> bool {
        let out = [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE];
        let errno = self.source.raw_os_error();
        out.iter().any(|one| Some(one.raw_os_error()) == errno)
    }

    pub fn is_not_found(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }

    /// The file system has no such operation.
    pub fn is_unsupported(&self) -> bool {
        self.source.kind() == io::ErrorKind::Unsupported
    }
}

pub type Result<T> = std::result::Result<T, StorageError>;

/// Which file a name or a handle stands for; two are equal if and only if it is the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    pub device: u64,
    pub inode: u64,
}

/// A directory tree. Names of one directory are changed by one thread at a time, the caller sees
/// to that.
pub trait Disk: Send + Sync + fmt::Debug {
    /// A file for reading and writing, empty: made, or emptied if there was one.
    fn create(&self, path: &Path) -> Result<Box<dyn DiskFile>>;
    /// A file that is there, for reading and writing.
    fn open(&self, path: &Path) -> Result<Box<dyn DiskFile>>;
    /// A file that is there, for reading only.
    fn open_read_only(&self, path: &Path) -> Result<Box<dyn DiskFile>>;
    /// The file that has this name now, if any has.
    fn file_id(&self, path: &Path) -> Result<Option<FileId>>;
    /// Files that have lost a name so far, or are about to; `None` if nobody counts. While it stays the same,
    /// every open file has the name that it had.
    fn names_lost(&self) -> Option<u64> {
        None
    }
    /// Gives a file another name of the same directory, in place of the file that had it.
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;
    /// Swaps the names of two files at once. Needs no space. Not every file system can.
    fn exchange(&self, one: &Path, other: &Path) -> Result<()>;
    fn remove(&self, path: &Path) -> Result<()>;
    /// Makes a directory; one that is there already will do.
    fn create_dir(&self, path: &Path) -> Result<()>;
    /// Names in a directory, sorted.
    fn list(&self, path: &Path) -> Result<Vec<String>>;
    /// Makes the names in a directory durable. Names have changed by then: so an error never says that there is no
    /// space or descriptor, by which whoever asked would take it that nothing has happened.
    fn sync_dir(&self, path: &Path) -> Result<()>;
    /// Makes durable what any process has written to this file system.
    fn sync_everything(&self) -> Result<()>;
    /// Bytes that may still be written.
    fn free_bytes(&self) -> Result<u64>;
}

/// An open file. Dropping it makes nothing durable.
pub trait DiskFile: Send + fmt::Debug {
    /// Fills `buffer`, except at the end of the file, and returns how many bytes it got.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize>;
    /// Writes all of `bytes`, or fails; then any part of them may have been written.
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()>;
    /// Makes the contents durable, but not necessarily a new length.
    fn sync_data(&self) -> Result<()>;
    /// Makes contents and length durable.
    fn sync_all(&self) -> Result<()>;
    /// Length in bytes.
    fn size(&self) -> Result<u64>;
    /// Cuts the file, or lengthens it by a hole.
    fn set_len(&self, len: u64) -> Result<()>;
    fn file_id(&self) -> Result<FileId>;
    /// Gives an empty file room on the disk for `len` bytes, which read as zeros. False if this file
    /// system can't do that without writing them.
    fn allocate(&self, _len: u64) -> Result<bool> {
        Ok(false)
    }
}

/// A directory of the real file system.
#[derive(Debug)]
pub struct RealDisk {
    root: PathBuf,
    names_lost: AtomicU64,
}

impl RealDisk {
    /// Nothing is looked at yet.
    pub fn new(root: &Path) -> RealDisk {
        RealDisk {
            root: root.to_owned(),
            names_lost: AtomicU64::new(0),
        }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Takes the exclusive lock on a file, made if it is missing, and writes `note` into it; or
    /// returns what the holder has written there. The kernel releases the lock with the process.
    pub fn try_lock(&self, path: &Path, note: &str) -> Result<std::result::Result<File, String>> {
        let full = self.root.join(path);
        // Not truncated when opened: the note in it is the holder's until we have the lock.
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(FILE_MODE)
            .open(&full)
            .map_err(failed("open", &full))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let held_by = std::fs::read_to_string(&full).map_err(failed("read", &full))?;
                return Ok(Err(held_by));
            }
            Err(TryLockError::Error(source)) => return Err(failed("lock", &full)(source)),
        }
        file.set_len(0).map_err(failed("truncate", &full))?;
        file.write_all(note.as_bytes())
            .map_err(failed("write", &full))?;
        Ok(Ok(file))
    }

    fn open_with(&self, path: &Path, options: &mut OpenOptions) -> Result<Box<dyn DiskFile>> {
        let path = self.root.join(path);
        match options.mode(FILE_MODE).open(&path) {
            Ok(file) => Ok(Box::new(RealFile { file, path })),
            Err(source) => Err(failed("open", &path)(source)),
        }
    }
}

impl Disk for RealDisk {
    fn create(&self, path: &Path) -> Result<Box<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        self.open_with(
            path,
            options.read(true).write(true).create(true).truncate(true),
        )
    }

    fn open(&self, path: &Path) -> Result<Box<dyn DiskFile>> {
        self.open_with(path, OpenOptions::new().read(true).write(true))
    }

    fn open_read_only(&self, path: &Path) -> Result<Box<dyn DiskFile>> {
        self.open_with(path, OpenOptions::new().read(true))
    }

    fn file_id(&self, path: &Path) -> Result<Option<FileId>> {
        let path = self.root.join(path);
        match std::fs::symlink_metadata(&path) {
            Ok(metadata) => Ok(Some(file_id(&metadata))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(failed("stat", &path)(source)),
        }
    }

    fn names_lost(&self) -> Option<u64> {
        Some(self.names_lost.load(Ordering::SeqCst))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        let (from, to) = (self.root.join(from), self.root.join(to));
        self.names_lost.fetch_add(1, Ordering::SeqCst);
        std::fs::rename(&from, &to).map_err(failed("rename", &from))
    }

    fn exchange(&self, one: &Path, other: &Path) -> Result<()> {
        let (one, other) = (self.root.join(one), self.root.join(other));
        self.names_lost.fetch_add(1, Ordering::SeqCst);
        let exchanged = rustix::fs::renameat_with(CWD, &one, CWD, &other, RenameFlags::EXCHANGE);
        exchanged.map_err(|errno| {
            use rustix::io::Errno;
            // A file system that cannot exchange says EINVAL, an old kernel ENOSYS.
            let source = match errno {
                Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP => {
                    io::Error::from(io::ErrorKind::Unsupported)
                }
                errno => io::Error::from(errno),
            };
            failed("exchange", &one)(source)
        })
    }

    fn remove(&self, path: &Path) -> Result<()> {
        let path = self.root.join(path);
        self.names_lost.fetch_add(1, Ordering::SeqCst);
        std::fs::remove_file(&path).map_err(failed("remove", &path))
    }

    fn create_dir(&self, path: &Path) -> Result<()> {
        let path = self.root.join(path);
        match DirBuilder::new().mode(DIR_MODE).create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
            other => other.map_err(failed("create directory", &path)),
        }
    }

    fn list(&self, path: &Path) -> Result<Vec<String>> {
        let path = self.root.join(path);
        let failed = failed("list", &path);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&path).map_err(&failed)? {
            // All names of ours are ASCII; one that is not even UTF-8 is not for us.
            if let Ok(name) = entry.map_err(&failed)?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        let path = self.root.join(path);
        let dir = File::open(&path).map_err(io::Error::other);
        let dir = dir.map_err(failed("open", &path))?;
        let synced = dir.sync_all().map_err(io::Error::other);
        synced.map_err(failed("sync", &path))
    }

    fn sync_everything(&self) -> Result<()> {
        let root = File::open(&self.root).map_err(failed("open", &self.root))?;
        rustix::fs::syncfs(&root)
            .map_err(|errno| failed("sync the file system of", &self.root)(errno.into()))
    }

    fn free_bytes(&self) -> Result<u64> {
        let stat = rustix::fs::statvfs(&self.root)
            .map_err(|errno| failed("stat the file system of", &self.root)(errno.into()))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

#[derive(Debug)]
struct RealFile {
    file: File,
    path: PathBuf,
}

impl DiskFile for RealFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self
                .file
                .read_at(&mut buffer[filled..], offset + filled as u64)
            {
                Ok(0) => break,
                Ok(len) => filled += len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(failed("read", &self.path)(source)),
            }
        }
        Ok(filled)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.file
            .write_all_at(bytes, offset)
            .map_err(failed("write", &self.path))
    }

    fn sync_data(&self) -> Result<()> {
        self.file.sync_data().map_err(failed("sync", &self.path))
    }

    fn sync_all(&self) -> Result<()> {
        self.file.sync_all().map_err(failed("sync", &self.path))
    }

    fn size(&self) -> Result<u64> {
        let metadata = self.file.metadata().map_err(failed("stat", &self.path))?;
        Ok(metadata.len())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.file
            .set_len(len)
            .map_err(failed("truncate", &self.path))
    }

    fn file_id(&self) -> Result<FileId> {
        let metadata = self.file.metadata().map_err(failed("stat", &self.path))?;
        Ok(file_id(&metadata))
    }

    fn allocate(&self, len: u64) -> Result<bool> {
        use rustix::io::Errno;
        let allocate = || rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, len);
        match rustix::io::retry_on_intr(allocate) {
            Ok(()) => Ok(true),
            Err(errno @ (Errno::NOSPC | Errno::DQUOT | Errno::IO)) => {
                Err(failed("allocate", &self.path)(errno.into()))
            }
            // File systems and sandboxes say no in many ways; there is another one.
            Err(_) => Ok(false),
        }
    }
}

/// WAL holds everything the database holds: as `initdb` does, for our own user only.
const FILE_MODE: u32 = 0o600;
const DIR_MODE: u32 = 0o700;

fn file_id(metadata: &std::fs::Metadata) -> FileId {
    FileId {
        device: metadata.dev(),
        inode: metadata.ino(),
    }
}

fn failed(doing: &'static str, path: &Path) -> impl Fn(io::Error) -> StorageError {
    let path = path.to_owned();
    move |source| StorageError {
        doing,
        path: path.clone(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> (tempfile::TempDir, RealDisk) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let disk = RealDisk::new(dir.path());
        (dir, disk)
    }

    #[test]
    fn reads_stop_at_the_end_of_the_file_only() {
        let (_dir, disk) = disk();
        let file = disk.create(Path::new("f")).unwrap();
        file.write_at(b"abcdef", 2).unwrap();
        let mut buffer = [9; 8];
        assert_eq!(file.read_at(&mut buffer, 1).unwrap(), 7);
        assert_eq!(&buffer, b"\0abcdef\x09");
        assert_eq!(file.read_at(&mut buffer, 8).unwrap(), 0);
        assert_eq!(file.size().unwrap(), 8);
    }

    #[test]
    fn exchange_swaps_and_rename_replaces() {
        let (_dir, disk) = disk();
        let (a, b) = (Path::new("a"), Path::new("b"));
        let id_a = disk.create(a).unwrap().file_id().unwrap();
        let id_b = disk.create(b).unwrap().file_id().unwrap();
        disk.exchange(a, b).unwrap();
        assert_eq!(disk.file_id(a).unwrap(), Some(id_b));
        assert_eq!(disk.file_id(b).unwrap(), Some(id_a));
        disk.rename(a, b).unwrap();
        assert_eq!(disk.file_id(a).unwrap(), None);
        assert_eq!(disk.file_id(b).unwrap(), Some(id_b));
        disk.sync_dir(Path::new("")).unwrap();
        disk.sync_everything().unwrap();
        assert!(disk.free_bytes().unwrap() > 0);
    }

    #[test]
    fn an_error_names_the_attempt_and_the_file() {
        let (dir, disk) = disk();
        let error = disk.open(Path::new("missing")).unwrap_err();
        assert!(error.is_not_found() && !error.is_no_space());
        for (errno, expected) in [
            (rustix::io::Errno::NOSPC, true),
            (rustix::io::Errno::MFILE, true),
            (rustix::io::Errno::NFILE, true),
            (rustix::io::Errno::IO, false),
        ] {
            let error = StorageError {
                doing: "open",
                path: PathBuf::from("x"),
                source: errno.into(),
            };
            assert_eq!(error.is_no_space(), expected, "{errno}");
        }
        let path = dir.path().join("missing");
        let text = error.to_string();
        assert!(text.starts_with(&format!("could not open \"{}\": ", path.display())));
    }

    #[test]
    fn the_second_lock_is_told_who_holds_the_first() {
        let (_dir, disk) = disk();
        let lock = Path::new("lock");
        let held = disk
            .try_lock(lock, "first")
            .unwrap()
            .expect("nobody holds it");
        assert_eq!(disk.try_lock(lock, "second").unwrap().unwrap_err(), "first");
        drop(held);
        assert!(disk.try_lock(lock, "third").unwrap().is_ok());
    }
}

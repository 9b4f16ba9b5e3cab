//! A real disk that runs out of space, or dies, when told to.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use safekeeper::disk::{Disk, DiskFile, FileId, RealDisk, Result, StorageError};

/// Passes on what it is asked, until a fault is set.
#[derive(Debug)]
pub struct FaultDisk {
    inner: RealDisk,
    faults: Arc<Faults>,
}

#[derive(Debug)]
pub struct Faults {
    /// No file can grow any more.
    full: AtomicBool,
    /// So many changes succeed; then every one fails, as it does when the process is dead.
    steps_left: AtomicU64,
    /// Syncs of data so far.
    pub n_data_syncs: AtomicU64,
    /// Syncs of directories so far.
    pub n_dir_syncs: AtomicU64,
    /// How long each of them takes.
    pub dir_sync_ms: AtomicU64,
}

impl FaultDisk {
    pub fn new(root: &Path) -> (Arc<FaultDisk>, Arc<Faults>) {
        let faults = Arc::new(Faults {
            full: AtomicBool::new(false),
            steps_left: AtomicU64::new(u64::MAX),
            n_data_syncs: AtomicU64::new(0),
            n_dir_syncs: AtomicU64::new(0),
            dir_sync_ms: AtomicU64::new(0),
        });
        let disk = FaultDisk {
            inner: RealDisk::new(root),
            faults: faults.clone(),
        };
        (Arc::new(disk), faults)
    }
}

impl Faults {
    pub fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::SeqCst);
    }

    pub fn die_after(&self, n_steps: u64) {
        self.steps_left.store(n_steps, Ordering::SeqCst);
    }

    fn step(&self, path: &Path) -> Result<()> {
        let left = self.steps_left.load(Ordering::SeqCst);
        match left.checked_sub(1) {
            Some(left) => {
                self.steps_left.store(left, Ordering::SeqCst);
                Ok(())
            }
            None => Err(error(path, io::ErrorKind::Other)),
        }
    }

    fn grow(&self, path: &Path) -> Result<()> {
        match self.full.load(Ordering::SeqCst) {
            true => Err(error(path, io::ErrorKind::StorageFull)),
            false => Ok(()),
        }
    }
}

fn error(path: &Path, kind: io::ErrorKind) -> StorageError {
    StorageError {
        doing: "write",
        path: path.to_owned(),
        source: kind.into(),
    }
}

impl FaultDisk {
    fn file(&self, path: &Path, inner: Result<Box<dyn DiskFile>>) -> Result<Box<dyn DiskFile>> {
        Ok(Box::new(FaultFile {
            inner: inner?,
            path: path.to_owned(),
            faults: self.faults.clone(),
        }))
    }
}

impl Disk for FaultDisk {
    fn create(&self, path: &Path) -> Result<Box<dyn DiskFile>> {
        self.faults.step(path)?;
        self.file(path, self.inner.create(path))
    }

    fn open(&self, path: &Path) -> Result<Box<dyn DiskFile>> {
        self.file(path, self.inner.open(path))
    }

    fn open_read_only(&self, path: &Path) -> Result<Box<dyn DiskFile>> {
        self.file(path, self.inner.open_read_only(path))
    }

    fn file_id(&self, path: &Path) -> Result<Option<FileId>> {
        self.inner.file_id(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.faults.step(from)?;
        self.inner.rename(from, to)
    }

    fn exchange(&self, one: &Path, other: &Path) -> Result<()> {
        self.faults.step(one)?;
        self.inner.exchange(one, other)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        self.faults.step(path)?;
        self.inner.remove(path)
    }

    fn create_dir(&self, path: &Path) -> Result<()> {
        self.faults.step(path)?;
        self.inner.create_dir(path)
    }

    fn list(&self, path: &Path) -> Result<Vec<String>> {
        self.inner.list(path)
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        self.faults.step(path)?;
        self.faults.n_dir_syncs.fetch_add(1, Ordering::SeqCst);
        let takes_ms = self.faults.dir_sync_ms.load(Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(takes_ms));
        self.inner.sync_dir(path)
    }

    fn sync_everything(&self) -> Result<()> {
        self.inner.sync_everything()
    }

    fn free_bytes(&self) -> Result<u64> {
        self.inner.free_bytes()
    }
}

#[derive(Debug)]
struct FaultFile {
    inner: Box<dyn DiskFile>,
    path: PathBuf,
    faults: Arc<Faults>,
}

impl DiskFile for FaultFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        self.inner.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        if self.faults.step(&self.path).is_err() {
            // The process died in the middle of it.
            self.inner.write_at(&bytes[..bytes.len() / 2], offset)?;
            return Err(error(&self.path, io::ErrorKind::Other));
        }
        if offset + bytes.len() as u64 > self.inner.size()? {
            self.faults.grow(&self.path)?;
        }
        self.inner.write_at(bytes, offset)
    }

    fn sync_data(&self) -> Result<()> {
        self.faults.step(&self.path)?;
        self.faults.n_data_syncs.fetch_add(1, Ordering::SeqCst);
        self.inner.sync_data()
    }

    fn sync_all(&self) -> Result<()> {
        self.faults.step(&self.path)?;
        self.inner.sync_all()
    }

    fn size(&self) -> Result<u64> {
        self.inner.size()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.faults.step(&self.path)?;
        self.inner.set_len(len)
    }

    fn file_id(&self) -> Result<FileId> {
        self.inner.file_id()
    }
}

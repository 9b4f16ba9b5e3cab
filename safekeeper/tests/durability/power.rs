//! A real disk whose power can be cut: what was not synced is then there in part, or not at all.
//!
//! Written bytes are undone sector by sector, at random, back to the last sync of their file. Names
//! are undone in the order of a journal: some of the last changes since their directory was synced.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use safekeeper::disk::{Disk, DiskFile, FileId, RealDisk, Result, StorageError};

const SECTOR: usize = 512;

#[derive(Debug)]
pub struct PowerDisk {
    inner: RealDisk,
    root: PathBuf,
    journal: Arc<Journal>,
}

#[derive(Debug)]
struct Journal {
    unsynced: Mutex<Unsynced>,
    /// So many changes succeed; then every one fails.
    steps_left: AtomicU64,
}

#[derive(Debug, Default)]
struct Unsynced {
    writes: Vec<Write>,
    names: Vec<Name>,
    n_removed: u64,
}

#[derive(Debug)]
struct Write {
    id: FileId,
    file: File,
    offset: u64,
    old: Vec<u8>,
}

#[derive(Debug)]
enum Name {
    Created(PathBuf),
    Renamed(PathBuf, PathBuf),
    Exchanged(PathBuf, PathBuf),
    /// The file lives on under another name until the power is cut.
    Removed(PathBuf, PathBuf),
}

impl PowerDisk {
    pub fn new(root: &Path) -> Arc<PowerDisk> {
        Arc::new(PowerDisk {
            inner: RealDisk::new(root),
            root: root.to_owned(),
            journal: Arc::new(Journal {
                unsynced: Mutex::default(),
                steps_left: AtomicU64::new(u64::MAX),
            }),
        })
    }

    /// Fails after so many changes more.
    pub fn die_after(&self, n_steps: u64) {
        self.journal.steps_left.store(n_steps, Ordering::SeqCst);
    }

    /// Cuts the power, and switches it on again. `below` draws a number.
    pub fn cut_power(&self, mut below: impl FnMut(u64) -> u64) {
        self.die_after(u64::MAX);
        let mut unsynced = self.journal.lock();
        let writes = std::mem::take(&mut unsynced.writes);
        // All, none or some of them: each has its own faults to show.
        let odds = below(4);
        for write in writes.iter().rev() {
            for (i, sector) in write.old.chunks(SECTOR).enumerate() {
                if below(4) < odds {
                    let offset = write.offset + (i * SECTOR) as u64;
                    write.file.write_all_at(sector, offset).expect("undone");
                }
            }
        }
        let names = std::mem::take(&mut unsynced.names);
        let kept = below(names.len() as u64 + 1) as usize;
        for name in names[kept..].iter().rev() {
            let rename = |from: &Path, to: &Path| {
                std::fs::rename(self.root.join(from), self.root.join(to)).expect("undone");
            };
            match name {
                Name::Created(path) => {
                    std::fs::remove_file(self.root.join(path)).expect("undone");
                }
                Name::Renamed(from, to) => rename(to, from),
                Name::Exchanged(one, other) => self.inner.exchange(one, other).expect("undone"),
                Name::Removed(path, trash) => rename(trash, path),
            }
        }
        self.forget_trash(&names[..kept]);
    }

    fn forget_trash(&self, names: &[Name]) {
        for name in names {
            if let Name::Removed(_, trash) = name {
                std::fs::remove_file(self.root.join(trash)).expect("removed for good");
            }
        }
    }

    fn file(&self, path: &Path, inner: Result<Box<dyn DiskFile>>) -> Result<Box<dyn DiskFile>> {
        let inner = inner?;
        let mut options = File::options();
        let handle = options.read(true).write(true).open(self.root.join(path));
        Ok(Box::new(PowerFile {
            id: inner.file_id()?,
            handle: handle.expect("opens again"),
            inner,
            journal: self.journal.clone(),
        }))
    }
}

impl Journal {
    fn lock(&self) -> MutexGuard<'_, Unsynced> {
        self.unsynced.lock().expect("no panic under the lock")
    }

    fn step(&self) -> Result<()> {
        let left = self.steps_left.load(Ordering::SeqCst);
        let Some(left) = left.checked_sub(1) else {
            return Err(StorageError {
                doing: "write",
                path: PathBuf::new(),
                source: std::io::ErrorKind::Other.into(),
            });
        };
        self.steps_left.store(left, Ordering::SeqCst);
        Ok(())
    }
}

impl Disk for PowerDisk {
    fn create(&self, path: &Path) -> Result<Box<dyn DiskFile>> {
        self.journal.step()?;
        if self.inner.file_id(path)?.is_none() {
            let mut unsynced = self.journal.lock();
            unsynced.names.push(Name::Created(path.to_owned()));
        }
        self.file(path, self.inner.create(path))
    }

    fn open(&self, path: &Path) -> Result<Box<dyn DiskFile>> {
        self.file(path, self.inner.open(path))
    }

    fn open_read_only(&self, path: &Path) -> Result<Box<dyn DiskFile>> {
        self.inner.open_read_only(path)
    }

    fn file_id(&self, path: &Path) -> Result<Option<FileId>> {
        self.inner.file_id(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.journal.step()?;
        if self.inner.file_id(to)?.is_some() {
            self.remove(to)?;
        }
        self.inner.rename(from, to)?;
        let renamed = Name::Renamed(from.to_owned(), to.to_owned());
        self.journal.lock().names.push(renamed);
        Ok(())
    }

    fn exchange(&self, one: &Path, other: &Path) -> Result<()> {
        self.journal.step()?;
        self.inner.exchange(one, other)?;
        let exchanged = Name::Exchanged(one.to_owned(), other.to_owned());
        self.journal.lock().names.push(exchanged);
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<()> {
        self.journal.step()?;
        let mut unsynced = self.journal.lock();
        let trash = PathBuf::from(format!("removed.{}", unsynced.n_removed));
        unsynced.n_removed += 1;
        self.inner.rename(path, &trash)?;
        unsynced.names.push(Name::Removed(path.to_owned(), trash));
        Ok(())
    }

    fn create_dir(&self, path: &Path) -> Result<()> {
        self.inner.create_dir(path)
    }

    fn list(&self, path: &Path) -> Result<Vec<String>> {
        self.inner.list(path)
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        self.journal.step()?;
        let mut unsynced = self.journal.lock();
        let (synced, others): (Vec<_>, Vec<_>) = std::mem::take(&mut unsynced.names)
            .into_iter()
            .partition(|name| match name {
                Name::Created(of)
                | Name::Renamed(of, _)
                | Name::Exchanged(of, _)
                | Name::Removed(of, _) => of.parent() == Some(path),
            });
        unsynced.names = others;
        self.forget_trash(&synced);
        Ok(())
    }

    fn sync_everything(&self) -> Result<()> {
        let mut unsynced = self.journal.lock();
        unsynced.writes.clear();
        let names = std::mem::take(&mut unsynced.names);
        self.forget_trash(&names);
        Ok(())
    }

    fn free_bytes(&self) -> Result<u64> {
        self.inner.free_bytes()
    }
}

#[derive(Debug)]
struct PowerFile {
    inner: Box<dyn DiskFile>,
    handle: File,
    id: FileId,
    journal: Arc<Journal>,
}

impl PowerFile {
    fn synced(&self) {
        self.journal
            .lock()
            .writes
            .retain(|write| write.id != self.id);
    }
}

impl DiskFile for PowerFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        self.inner.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let died = self.journal.step();
        let bytes = if died.is_ok() {
            bytes
        } else {
            &bytes[..bytes.len() / 2]
        };
        // Undone in whole sectors, as the disk has them; what lies beyond the file's end is zero.
        let begin = offset - offset % SECTOR as u64;
        let end = (offset + bytes.len() as u64).next_multiple_of(SECTOR as u64);
        let mut old = vec![0; (end - begin) as usize];
        self.inner.read_at(&mut old, begin)?;
        let file = self.handle.try_clone().expect("a handle");
        let id = self.id;
        self.journal.lock().writes.push(Write {
            id,
            file,
            offset: begin,
            old,
        });
        self.inner.write_at(bytes, offset)?;
        died
    }

    fn sync_data(&self) -> Result<()> {
        self.journal.step()?;
        self.synced();
        Ok(())
    }

    fn sync_all(&self) -> Result<()> {
        self.sync_data()
    }

    fn size(&self) -> Result<u64> {
        self.inner.size()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.journal.step()?;
        self.inner.set_len(len)
    }

    fn file_id(&self) -> Result<FileId> {
        self.inner.file_id()
    }
}

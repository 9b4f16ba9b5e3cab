//! The simulated disk as the storage code sees it: `Disk` and `DiskFile`.
//!
//! Whatever changes something is a step, at which the machine may stop; whatever can fail asks
//! first whether it does.

use std::io;
use std::path::{Path, PathBuf};

use safekeeper::disk::{Disk, DiskFile, FileId, Result};

use super::{Contents, FileContents, NameChange, SECTOR, SimulatedDisk, WORD, crash, failure};

impl Disk for SimulatedDisk {
    fn create(&self, path: &Path) -> Result<Box<dyn DiskFile>> {
        let contents = &mut *self.contents();
        contents.step("create", path)?;
        if let Some(&file) = contents.names.get(path) {
            let existing = contents.files.get_mut(&file).expect("a named file");
            existing.live.clear();
            existing.dirty.clear();
            return Ok(self.handle(path, file, contents.boot));
        }
        let parent = path.parent().unwrap_or(Path::new(""));
        if !contents.directories.contains_key(parent) {
            return Err(failure("create", path, io::ErrorKind::NotFound.into()));
        }
        let file = contents.next_file;
        contents.next_file += 1;
        contents.files.insert(file, FileContents::default());
        contents.change(NameChange::Link {
            path: path.to_owned(),
            file,
        });
        Ok(self.handle(path, file, contents.boot))
    }

    fn open(&self, path: &Path) -> Result<Box<dyn DiskFile>> {
        self.open_any(path)
    }

    fn open_read_only(&self, path: &Path) -> Result<Box<dyn DiskFile>> {
        self.open_any(path)
    }

    fn file_id(&self, path: &Path) -> Result<Option<FileId>> {
        let contents = self.contents();
        contents.check_running("stat", path)?;
        let found = contents
            .names
            .get(path)
            .or_else(|| contents.directories.get(path));
        Ok(found.map(|&inode| FileId { device: 0, inode }))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        let contents = &mut *self.contents();
        let permille = contents.rates.rename_error;
        contents.step("rename", from)?;
        contents.strike("rename", from, permille)?;
        if !contents.names.contains_key(from) {
            return Err(failure("rename", from, io::ErrorKind::NotFound.into()));
        }
        contents.change(NameChange::Rename {
            from: from.to_owned(),
            to: to.to_owned(),
        });
        Ok(())
    }

    fn exchange(&self, one: &Path, other: &Path) -> Result<()> {
        let contents = &mut *self.contents();
        let permille = contents.rates.rename_error;
        contents.step("exchange", one)?;
        contents.strike("exchange", one, permille)?;
        for path in [one, other] {
            if !contents.names.contains_key(path) {
                return Err(failure("exchange", path, io::ErrorKind::NotFound.into()));
            }
        }
        contents.change(NameChange::Exchange {
            one: one.to_owned(),
            other: other.to_owned(),
        });
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<()> {
        let contents = &mut *self.contents();
        contents.step("remove", path)?;
        if !contents.names.contains_key(path) {
            return Err(failure("remove", path, io::ErrorKind::NotFound.into()));
        }
        contents.change(NameChange::Unlink {
            path: path.to_owned(),
        });
        Ok(())
    }

    fn create_dir(&self, path: &Path) -> Result<()> {
        // Directories are made once, by code that syncs them; losing one is not simulated.
        let contents = &mut *self.contents();
        contents.step("create directory", path)?;
        let next = contents.next_file;
        contents.directories.entry(path.to_owned()).or_insert(next);
        contents.next_file += 1;
        Ok(())
    }

    fn list(&self, path: &Path) -> Result<Vec<String>> {
        let contents = self.contents();
        contents.check_running("list", path)?;
        let files = contents
            .names
            .keys()
            .filter(|name| name.parent() == Some(path));
        let directories = contents
            .directories
            .keys()
            .filter(|d| d.parent() == Some(path));
        let mut names: Vec<String> = files
            .chain(directories)
            .filter_map(|name| Some(name.file_name()?.to_str()?.to_owned()))
            .collect();
        names.sort();
        Ok(names)
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        let contents = &mut *self.contents();
        contents.step("sync", path)?;
        let permille = contents.rates.sync_error;
        contents.strike("sync", path, permille)?;
        let (done, open) = std::mem::take(&mut contents.name_changes)
            .into_iter()
            .partition::<Vec<_>, _>(|change| change.directory() == path);
        contents.name_changes = open;
        for change in done {
            change.apply(&mut contents.durable_names);
        }
        Ok(())
    }

    fn sync_everything(&self) -> Result<()> {
        let contents = &mut *self.contents();
        contents.step("sync", Path::new(""))?;
        for change in std::mem::take(&mut contents.name_changes) {
            change.apply(&mut contents.durable_names);
        }
        for file in contents.files.values_mut() {
            file.sync(true);
        }
        Ok(())
    }

    fn free_bytes(&self) -> Result<u64> {
        let contents = self.contents();
        Ok(contents.capacity.saturating_sub(contents.used()))
    }
}

#[derive(Debug)]
pub struct SimulatedFile {
    pub disk: SimulatedDisk,
    pub path: PathBuf,
    pub file: u64,
    pub boot: u64,
}

impl SimulatedFile {
    /// Runs `with` on the file, unless the machine has crashed since it was opened.
    fn with<T>(
        &self,
        doing: &'static str,
        with: impl FnOnce(&mut Contents, u64) -> Result<T>,
    ) -> Result<T> {
        let contents = &mut *self.disk.contents();
        if contents.boot != self.boot || !contents.files.contains_key(&self.file) {
            return Err(failure(doing, &self.path, crash()));
        }
        contents.check_running(doing, &self.path)?;
        with(contents, self.file)
    }

    fn sync(&self, length_too: bool) -> Result<()> {
        self.with("sync", |contents, file| {
            contents.step("sync", &self.path)?;
            let permille = contents.rates.sync_error;
            let struck = contents.strike("sync", &self.path, permille);
            let file = contents.files.get_mut(&file).expect("checked above");
            match struck {
                Ok(()) => file.sync(length_too),
                // The pages are dropped, and clean from now on.
                Err(_) => file.dirty.clear(),
            }
            struck
        })
    }
}

impl DiskFile for SimulatedFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        self.with("read", |contents, file| {
            let permille = contents.rates.read_error;
            contents.strike("read", &self.path, permille)?;
            let live = &contents.files[&file].live;
            let begin = usize::try_from(offset)
                .unwrap_or(usize::MAX)
                .min(live.len());
            let len = buffer.len().min(live.len() - begin);
            buffer[..len].copy_from_slice(&live[begin..begin + len]);
            Ok(len)
        })
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.with("write", |contents, file| {
            let alive = contents.step("write", &self.path);
            let bytes = match alive {
                Ok(()) => bytes,
                // A part of it may have got there.
                Err(_) => {
                    let len = contents.random.below(bytes.len() as u64 + 1);
                    let end = (offset + len) / WORD as u64 * WORD as u64;
                    &bytes[..end.saturating_sub(offset) as usize]
                }
            };
            let permille = contents.rates.write_error;
            contents.strike("write", &self.path, permille)?;
            let begin = usize::try_from(offset).expect("a file in memory");
            let end = begin + bytes.len();
            let growth = end.saturating_sub(contents.files[&file].live.len()) as u64;
            contents.room("write", &self.path, growth)?;
            let file = contents.files.get_mut(&file).expect("checked above");
            if end > file.live.len() {
                file.live.resize(end, 0);
            }
            file.live[begin..end].copy_from_slice(bytes);
            file.dirty.extend(begin / SECTOR..end.div_ceil(SECTOR));
            alive
        })
    }

    fn sync_data(&self) -> Result<()> {
        self.sync(false)
    }

    fn sync_all(&self) -> Result<()> {
        self.sync(true)
    }

    fn size(&self) -> Result<u64> {
        self.with("stat", |contents, file| {
            Ok(contents.files[&file].live.len() as u64)
        })
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.with("resize", |contents, file| {
            contents.step("resize", &self.path)?;
            let growth = len.saturating_sub(contents.files[&file].live.len() as u64);
            contents.room("resize", &self.path, growth)?;
            let file = contents.files.get_mut(&file).expect("checked above");
            let len = usize::try_from(len).expect("a file in memory");
            file.live.resize(len, 0);
            file.dirty.retain(|sector| sector * SECTOR < len);
            Ok(())
        })
    }

    fn file_id(&self) -> Result<FileId> {
        Ok(FileId {
            device: 0,
            inode: self.file,
        })
    }
}

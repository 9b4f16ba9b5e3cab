//! A disk that does what real ones may do at worst, and the same thing for the same seed.
//!
//! Every file has two contents: what a reader sees now, and what is on the platter. A write goes to
//! the first and marks its sectors dirty; a sync copies dirty sectors to the second. Names are
//! kept twice in the same way, with the operations between the two in order.
//!
//! | at a power cut             | becomes                                                        |
//! |----------------------------|----------------------------------------------------------------|
//! | a dirty sector             | old, new, or torn: new up to some word, and old behind it      |
//! | a length not synced by `sync_all` | old or new                                              |
//! | operations on names, not synced by `sync_dir` | some of the first of them, in order         |
//! | everything else            | what was synced                                                |
//!
//! Any subset of the dirty sectors may survive, in no order. When only the process is killed, all
//! that was written can still be read; but it is not on the platter for that, and a later power cut
//! takes it if nobody has synced it.
//!
//! [`SimulatedDisk::crash_after`] ends the machine in the middle of whatever is being done: the
//! operation that is the n-th from now is carried out in part or not at all, and it and everything
//! after it fail until the machine is started again.
//!
//! A sync that fails drops the dirty pages and calls the next sync a success, as Linux may: what a
//! reader sees is then not what a power cut leaves. So whoever goes on after a failure is found out.

#[path = "disk_io.rs"]
mod disk_io;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use safekeeper::disk::{DiskFile, Result, StorageError};

use super::random::Random;
use disk_io::SimulatedFile;

/// Unit that a device writes as a whole, if it keeps its word.
const SECTOR: usize = 512;
/// Unit that is never torn. Disks check a sector when they read it: they give it old, new, or not
/// at all. Memory that lasts promises whole words, and the kernel copies no less. Tearing a sector
/// between two words is more than has been seen; tearing a word, and with it the length of a
/// record, is what nothing could be built upon.
const WORD: usize = 8;

/// How often each fault strikes, in a thousand operations of its kind.
#[derive(Clone, Copy, Debug, Default)]
pub struct FaultRates {
    pub read_error: u64,
    pub write_error: u64,
    pub sync_error: u64,
    pub rename_error: u64,
}

/// Answer of [`SimulatedDisk::holds`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holds {
    pub readable: bool,
    pub durable: bool,
}

/// How often something really happened, for the proof that it was tested at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Struck {
    pub io_errors: u64,
    pub no_space: u64,
    pub sectors_lost: u64,
    pub sectors_torn: u64,
    pub names_lost: u64,
    pub bit_flips: u64,
}

#[derive(Clone, Debug)]
pub struct SimulatedDisk(Arc<Mutex<Contents>>);

#[derive(Debug)]
struct Contents {
    files: BTreeMap<u64, FileContents>,
    next_file: u64,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    name_changes: Vec<NameChange>,
    directories: BTreeMap<PathBuf, u64>,
    /// Bytes that all files together may hold.
    capacity: u64,
    rates: FaultRates,
    struck: Struck,
    random: Random,
    /// Raised by a crash: handles of an older one answer with an error.
    boot: u64,
    /// So many operations that change something are still carried out.
    crash_after: Option<u64>,
    /// The machine has stopped in the middle of an operation.
    crashed: bool,
}

#[derive(Clone, Debug, Default)]
struct FileContents {
    live: Vec<u8>,
    durable: Vec<u8>,
    dirty: BTreeSet<usize>,
}

#[derive(Clone, Debug)]
enum NameChange {
    Link { path: PathBuf, file: u64 },
    Unlink { path: PathBuf },
    Rename { from: PathBuf, to: PathBuf },
    Exchange { one: PathBuf, other: PathBuf },
}

impl NameChange {
    fn directory(&self) -> &Path {
        let path = match self {
            NameChange::Link { path, .. } | NameChange::Unlink { path } => path,
            NameChange::Rename { to, .. } => to,
            NameChange::Exchange { one, .. } => one,
        };
        path.parent().unwrap_or(Path::new(""))
    }

    fn apply(&self, names: &mut BTreeMap<PathBuf, u64>) {
        match self {
            NameChange::Link { path, file } => {
                names.insert(path.clone(), *file);
            }
            NameChange::Unlink { path } => {
                names.remove(path);
            }
            NameChange::Rename { from, to } => {
                if let Some(file) = names.remove(from) {
                    names.insert(to.clone(), file);
                }
            }
            NameChange::Exchange { one, other } => {
                if let (Some(&a), Some(&b)) = (names.get(one), names.get(other)) {
                    names.insert(one.clone(), b);
                    names.insert(other.clone(), a);
                }
            }
        }
    }
}

impl FileContents {
    fn sector(bytes: &[u8], sector: usize) -> &[u8] {
        let begin = (sector * SECTOR).min(bytes.len());
        &bytes[begin..(begin + SECTOR).min(bytes.len())]
    }

    /// Contents reach the platter within its durable length, unless the length does too.
    fn sync(&mut self, length_too: bool) {
        if length_too {
            self.durable.resize(self.live.len(), 0);
        }
        let reachable = self.durable.len();
        for sector in std::mem::take(&mut self.dirty) {
            let begin = sector * SECTOR;
            let new = FileContents::sector(&self.live, sector);
            let end = (begin + new.len()).min(reachable);
            if begin < end {
                self.durable[begin..end].copy_from_slice(&new[..end - begin]);
            }
            if begin + new.len() > reachable {
                self.dirty.insert(sector);
            }
        }
    }

    fn cut_power(&mut self, random: &mut Random, struck: &mut Struck) {
        if self.live.len() != self.durable.len() && random.chance(500) {
            self.durable.resize(self.live.len(), 0);
        }
        // A device may have written nearly everything, or nearly nothing.
        let survival = [50, 500, 950][random.below(3) as usize];
        for sector in std::mem::take(&mut self.dirty) {
            let begin = sector * SECTOR;
            let new = FileContents::sector(&self.live, sector);
            let mut end = (begin + new.len()).min(self.durable.len());
            if begin >= end {
                continue;
            }
            if random.chance(20) {
                struck.sectors_torn += 1;
                end = begin + random.below((end - begin) as u64) as usize / WORD * WORD;
            } else if !random.chance(survival) {
                struck.sectors_lost += 1;
                continue;
            }
            self.durable[begin..end].copy_from_slice(&new[..end - begin]);
        }
        self.live = self.durable.clone();
    }
}

impl SimulatedDisk {
    pub fn new(random: Random) -> SimulatedDisk {
        SimulatedDisk(Arc::new(Mutex::new(Contents {
            files: BTreeMap::new(),
            next_file: 1,
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            name_changes: Vec::new(),
            directories: BTreeMap::from([(PathBuf::new(), 0)]),
            capacity: u64::MAX,
            rates: FaultRates::default(),
            struck: Struck::default(),
            random,
            boot: 0,
            crash_after: None,
            crashed: false,
        })))
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_rates(&self, rates: FaultRates) {
        self.contents().rates = rates;
    }

    /// Runs `with` while no fault strikes: for whoever looks on.
    pub fn undisturbed<T>(&self, with: impl FnOnce(&SimulatedDisk) -> T) -> T {
        let rates = std::mem::take(&mut self.contents().rates);
        let result = with(self);
        self.contents().rates = rates;
        result
    }

    /// Room for this many bytes in all files together.
    pub fn set_capacity(&self, bytes: u64) {
        self.contents().capacity = bytes;
    }

    pub fn used(&self) -> u64 {
        self.contents().used()
    }

    pub fn struck(&self) -> Struck {
        self.contents().struck
    }

    /// The machine stops in the operation that is the `n`-th from now, counted from 1.
    pub fn crash_after(&self, n: u64) {
        self.contents().crash_after = Some(n);
    }

    /// No such end is due any more.
    pub fn disarm(&self) {
        self.contents().crash_after = None;
    }

    /// It has stopped, and waits for [`Self::kill`] or [`Self::cut_power`] to say how.
    pub fn has_crashed(&self) -> bool {
        self.contents().crashed
    }

    /// The process is killed; what it wrote can still be read.
    pub fn kill(&self) {
        self.contents().start_anew();
    }

    /// The power is cut.
    pub fn cut_power(&self) {
        let contents = &mut *self.contents();
        contents.start_anew();
        let directories: BTreeSet<PathBuf> = contents
            .name_changes
            .iter()
            .map(|change| change.directory().to_owned())
            .collect();
        let mut lasting: BTreeMap<PathBuf, usize> = BTreeMap::new();
        for directory in directories {
            let changes = contents
                .name_changes
                .iter()
                .filter(|c| c.directory() == directory);
            let count = changes.count();
            let kept = contents.random.below(count as u64 + 1) as usize;
            contents.struck.names_lost += (count - kept) as u64;
            lasting.insert(directory, kept);
        }
        for change in std::mem::take(&mut contents.name_changes) {
            let left = lasting
                .get_mut(change.directory())
                .expect("every directory was counted");
            if *left > 0 {
                *left -= 1;
                change.apply(&mut contents.durable_names);
            }
        }
        contents.names = contents.durable_names.clone();
        let Contents {
            files,
            random,
            struck,
            names,
            ..
        } = contents;
        files.retain(|file, _| names.values().any(|named| named == file));
        for file in files.values_mut() {
            file.cut_power(random, struck);
        }
    }

    /// Flips one bit of one file whose path `wanted` likes, on the platter too. Returns where.
    pub fn flip_bit(&self, wanted: impl Fn(&Path) -> bool) -> Option<(PathBuf, usize)> {
        let contents = &mut *self.contents();
        let paths: Vec<PathBuf> = contents
            .names
            .keys()
            .filter(|path| wanted(path))
            .cloned()
            .collect();
        let path = contents.random.pick(&paths)?.clone();
        let file = contents.files.get_mut(&contents.names[&path])?;
        if file.durable.is_empty() {
            return None;
        }
        let offset = contents.random.below(file.durable.len() as u64) as usize;
        flip(file, offset, contents.random.below(8) as u32);
        contents.struck.bit_flips += 1;
        Some((path, offset))
    }

    /// Flips one bit at a place that is known.
    pub fn flip_bit_at(&self, path: &Path, offset: usize, bit: u32) {
        let contents = &mut *self.contents();
        let file = contents.names[path];
        flip(
            contents.files.get_mut(&file).expect("a named file"),
            offset,
            bit,
        );
        contents.struck.bit_flips += 1;
    }

    /// What a reader of the file would see, if it is there.
    pub fn read(&self, path: &Path) -> Option<Vec<u8>> {
        let contents = self.contents();
        contents
            .names
            .get(path)
            .map(|file| contents.files[file].live.clone())
    }

    /// Whether the file holds these bytes at `offset`, as a reader sees it and on the platter,
    /// its name included.
    pub fn holds(&self, path: &Path, offset: usize, bytes: &[u8]) -> Holds {
        let contents = self.contents();
        let range = offset..offset + bytes.len();
        let live = contents.names.get(path);
        let durable = contents.durable_names.get(path);
        Holds {
            readable: live
                .is_some_and(|file| contents.files[file].live.get(range.clone()) == Some(bytes)),
            durable: durable
                .is_some_and(|file| contents.files[file].durable.get(range.clone()) == Some(bytes)),
        }
    }

    /// There is a file of this name, for a reader.
    pub fn is_there(&self, path: &Path) -> bool {
        self.contents().names.contains_key(path)
    }

    /// The file is on the platter as a reader sees it.
    pub fn is_durable(&self, path: &Path) -> bool {
        let contents = self.contents();
        let live = contents.names.get(path);
        live == contents.durable_names.get(path)
            && live.is_none_or(|file| {
                let file = &contents.files[file];
                file.live == file.durable
            })
    }

    fn handle(&self, path: &Path, file: u64, boot: u64) -> Box<dyn DiskFile> {
        Box::new(SimulatedFile {
            disk: self.clone(),
            path: path.to_owned(),
            file,
            boot,
        })
    }

    fn open_any(&self, path: &Path) -> Result<Box<dyn DiskFile>> {
        let contents = self.contents();
        contents.check_running("open", path)?;
        match contents.names.get(path) {
            Some(&file) => Ok(self.handle(path, file, contents.boot)),
            None => Err(failure("open", path, io::ErrorKind::NotFound.into())),
        }
    }
}

fn flip(file: &mut FileContents, offset: usize, bit: u32) {
    for bytes in [&mut file.live, &mut file.durable] {
        if let Some(byte) = bytes.get_mut(offset) {
            *byte ^= 1 << bit;
        }
    }
}

impl Contents {
    fn used(&self) -> u64 {
        self.names
            .values()
            .map(|file| self.files[file].live.len() as u64)
            .sum()
    }

    fn strike(&mut self, doing: &'static str, path: &Path, permille: u64) -> Result<()> {
        if permille > 0 && self.random.chance(permille) {
            self.struck.io_errors += 1;
            return Err(failure(doing, path, rustix::io::Errno::IO.into()));
        }
        Ok(())
    }

    /// Room for a file to grow by `bytes`.
    fn room(&mut self, doing: &'static str, path: &Path, bytes: u64) -> Result<()> {
        if bytes > 0 && self.used().saturating_add(bytes) > self.capacity {
            self.struck.no_space += 1;
            return Err(failure(doing, path, rustix::io::Errno::NOSPC.into()));
        }
        Ok(())
    }

    fn change(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.name_changes.push(change);
    }

    fn start_anew(&mut self) {
        self.boot += 1;
        self.crash_after = None;
        self.crashed = false;
    }

    fn check_running(&self, doing: &'static str, path: &Path) -> Result<()> {
        if self.crashed {
            Err(failure(doing, path, crash()))
        } else {
            Ok(())
        }
    }

    /// Before everything that changes something: does the machine live to do it?
    fn step(&mut self, doing: &'static str, path: &Path) -> Result<()> {
        if let Some(left) = &mut self.crash_after {
            *left = left.saturating_sub(1);
            self.crashed |= *left == 0;
        }
        self.check_running(doing, path)
    }
}

fn crash() -> io::Error {
    io::Error::other("the machine has crashed")
}

fn failure(doing: &'static str, path: &Path, source: io::Error) -> StorageError {
    StorageError {
        doing,
        path: path.to_owned(),
        source,
    }
}

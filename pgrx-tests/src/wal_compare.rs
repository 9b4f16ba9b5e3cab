//! Whether two directories hold the same WAL, and whether Postgres's own tools can read it.

use std::path::{Path, PathBuf};
use std::process::Command;

use safekeeper_protocol::Lsn;
use safekeeper_wal::end_of_log::SegmentFiles;
use safekeeper_wal::history::TimelineHistory;
use safekeeper_wal::segment_name::{SegmentSize, parse_segment_file_name, segment_file_name};

use crate::place::{Programs, copy_tree};
use crate::process::run;

/// A directory of segment files: a server's pg_wal, or a safekeeper's.
pub struct WalDir {
    path: PathBuf,
    history: TimelineHistory,
    segment_size: SegmentSize,
}

impl WalDir {
    /// On timeline 1, in segments of 16 MB, as initdb makes it.
    pub fn new(path: PathBuf) -> WalDir {
        let segment_size = SegmentSize::new(16 << 20).expect("a legal size");
        WalDir::with_format(path, TimelineHistory::root(1), segment_size)
    }

    pub fn with_format(
        path: PathBuf,
        history: TimelineHistory,
        segment_size: SegmentSize,
    ) -> WalDir {
        WalDir {
            path,
            history,
            segment_size,
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Start of the oldest segment.
    pub fn begin(&self) -> Lsn {
        let segments = self.segments();
        let segno = segments
            .first()
            .unwrap_or_else(|| panic!("no WAL in {}", self.path.display()));
        Lsn(segno * u64::from(self.segment_size.bytes()))
    }

    /// Numbers of the segments there are, in order.
    pub fn segments(&self) -> Vec<u64> {
        let entries = std::fs::read_dir(&self.path);
        let entries =
            entries.unwrap_or_else(|e| panic!("could not read {}: {e}", self.path.display()));
        let mut numbers: Vec<_> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|name| parse_segment_file_name(&name, self.segment_size))
            .map(|(_, segno)| segno)
            .collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    }

    /// Whether the page that holds a position has nothing but zeros behind it, or does not exist.
    pub fn ends_at(&self, lsn: Lsn) -> bool {
        let mut rest = vec![0; (PAGE_SIZE - lsn.0 % PAGE_SIZE) as usize];
        let read = self.files().read(lsn, &mut rest);
        let len = read.unwrap_or_else(|e| panic!("could not read {}: {e}", self.path.display()));
        rest[..len].iter().all(|byte| *byte == 0)
    }

    fn files(&self) -> SegmentFiles {
        SegmentFiles::new(&self.path, self.history.clone(), self.segment_size)
    }

    #[track_caller]
    fn read_into(&self, files: &mut SegmentFiles, begin: Lsn, bytes: &mut [u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let lsn = begin + done as u64;
            match files.read(lsn, &mut bytes[done..]) {
                Ok(0) => panic!("no WAL at {lsn} in {}", self.path.display()),
                Ok(len) => done += len,
                Err(error) => panic!("could not read {lsn} in {}: {error}", self.path.display()),
            }
        }
    }

    /// Panics at the first byte that differs from the other's.
    #[track_caller]
    pub fn assert_equal(&self, other: &WalDir, begin: Lsn, end: Lsn) {
        assert!(begin < end, "nothing to compare between {begin} and {end}");
        let (mut ours, mut theirs) = (self.files(), other.files());
        let (mut a, mut b) = (vec![0; CHUNK], vec![0; CHUNK]);
        let mut lsn = begin;
        while lsn < end {
            let len = CHUNK.min((end - lsn) as usize);
            self.read_into(&mut ours, lsn, &mut a[..len]);
            other.read_into(&mut theirs, lsn, &mut b[..len]);
            if let Some(offset) = (0..len).find(|&i| a[i] != b[i]) {
                panic!(
                    "WAL differs at {}: {:#04x} in {}, {:#04x} in {}",
                    lsn + offset as u64,
                    a[offset],
                    self.path.display(),
                    b[offset],
                    other.path.display(),
                );
            }
            lsn = lsn + len as u64;
        }
    }

    /// `pg_waldump` over a range: whether it reads it all, and what it says if not.
    pub fn waldump(&self, begin: Lsn, end: Lsn) -> Result<(), String> {
        let mut command = Command::new(Programs::postgres("pg_waldump"));
        command.arg("--quiet").arg("--path").arg(&self.path);
        command.args(["--start", &begin.to_string(), "--end", &end.to_string()]);
        // It takes the size of segments from the first file that is named, or else from any file
        // there: one that was made ahead, by Postgres or by a safekeeper, has nothing to say.
        for lsn in [begin, Lsn(end.0 - 1)] {
            let segno = lsn.segno(self.segment_size.bytes());
            let tli = self.history.tli_at(lsn);
            command.arg(segment_file_name(tli, segno, self.segment_size));
        }
        match run(command) {
            (true, _) => Ok(()),
            (false, text) => Err(text),
        }
    }
}

const CHUNK: usize = 1 << 20;
const PAGE_SIZE: u64 = 8192;

/// Panics unless the segments of 16 MB that both directories hold, of all timelines, are equal; what lies
/// behind `end` does not count. Returns how many there are.
#[track_caller]
pub fn assert_files_equal(held: &Path, theirs: &Path, end: Lsn) -> usize {
    let mut equal = 0;
    for name in file_names(held) {
        let Some((_, segno)) = parse_segment_file_name(&name, SegmentSize::DEFAULT) else {
            continue;
        };
        let begin = segno * u64::from(SegmentSize::DEFAULT.bytes());
        let len = usize::try_from(end.0.saturating_sub(begin)).expect("a small cluster");
        let read = |dir: &Path| {
            let mut bytes = std::fs::read(dir.join(&name)).ok()?;
            bytes.truncate(len);
            Some(bytes)
        };
        if let Some(bytes) = read(theirs) {
            assert!(
                read(held) == Some(bytes),
                "{name} differs: {} and {}",
                held.display(),
                theirs.display()
            );
            equal += 1;
        }
    }
    equal
}

/// In order.
pub fn file_names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir);
    let entries = entries.unwrap_or_else(|e| panic!("could not read {}: {e}", dir.display()));
    let mut names: Vec<_> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// A copy of what a receiver has, the unfinished segment of the newest timeline under its final name.
pub fn copy_received(received: &Path, copy: &Path) {
    copy_tree(received, copy);
    let newest = file_names(copy).into_iter().rfind(|name| name.len() >= 24);
    if let Some(name) = newest
        && let Some(name_when_full) = name.strip_suffix(".partial")
    {
        std::fs::rename(copy.join(&name), copy.join(name_when_full)).expect("our own copy");
    }
}

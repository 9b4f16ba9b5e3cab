//! WAL by position: the one place the worker reads it from.
//!
//! ```text
//!             oldest in pg_wal                       flushed
//!   ──────────────┬──────────────────────────────────────┬────────►  LSN
//!    from a donor │  from the files of pg_wal, here      │  not yet
//! ```
//!
//! Postgres removes and *recycles* old segments while we read: a recycled file gets a new name and
//! is written over, and a descriptor that is open on it goes on reading, other bytes. So after
//! every read the number of the last removed segment is looked at again, which Postgres raises
//! before it touches a file (`RemoveOldXlogFiles` in `xlog.c`). What was read from a segment that
//! has gone by then is thrown away, and the caller hears that it is gone.
//!
//! Which file holds a position depends on the timeline: at a switch the segment is copied, and the
//! newer timeline's copy holds the bytes of both (`exitArchiveRecovery` in `xlog.c`).
//!
//! A caller never asks beyond the flushed end. Postgres is not called from here: where the last
//! removed segment is known, it is asked through a function that is given.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use safekeeper_protocol::{Lsn, Tli};
use safekeeper_wal::{
    SegNo, SegmentSize, TimelineHistory, parse_segment_file_name, segment_file_name,
};

/// Segments kept open: members read at different places, each mostly in one segment.
const OPEN_MAX: usize = 8;

/// Outcome of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalRead {
    /// All bytes were read.
    Filled,
    /// The first byte's segment is not in `pg_wal` any more.
    Gone,
}

#[derive(Debug, thiserror::Error)]
#[error("could not {doing} WAL segment \"{name}\": {source}")]
pub struct WalSourceError {
    doing: &'static str,
    name: String,
    source: io::Error,
}

/// Reads WAL of one timeline and its ancestors.
pub struct WalSource {
    directory: PathBuf,
    segment_size: SegmentSize,
    timelines: TimelineHistory,
    /// Number of the last segment removed or recycled since the server started; 0 if none was.
    last_removed: fn() -> SegNo,
    /// Most recently used last.
    open: Vec<(SegNo, File)>,
}

impl WalSource {
    pub fn new(
        directory: PathBuf,
        segment_size: SegmentSize,
        timelines: TimelineHistory,
        last_removed: fn() -> SegNo,
    ) -> WalSource {
        WalSource {
            directory,
            segment_size,
            timelines,
            last_removed,
            open: Vec::new(),
        }
    }

    /// Fills `out` with the WAL from `begin_lsn` on.
    pub fn read(&mut self, begin_lsn: Lsn, out: &mut [u8]) -> Result<WalRead, WalSourceError> {
        let segment_bytes = self.segment_size.bytes();
        let (mut lsn, mut rest) = (begin_lsn, out);
        while !rest.is_empty() {
            let segno = lsn.segno(segment_bytes);
            let offset = lsn.segment_offset(segment_bytes);
            let in_segment = (segment_bytes - offset) as usize;
            let (now, later) = rest.split_at_mut(in_segment.min(rest.len()));
            let name = self.file_name(segno);
            let Some(file) = self.file(segno)? else {
                return Ok(WalRead::Gone);
            };
            let read = file.read_exact_at(now, u64::from(offset));
            if (self.last_removed)() >= segno {
                self.close(segno);
                return Ok(WalRead::Gone);
            }
            read.map_err(|source| WalSourceError {
                doing: "read",
                name,
                source,
            })?;
            lsn = lsn + now.len() as u64;
            rest = later;
        }
        Ok(WalRead::Filled)
    }

    /// Is the segment of `lsn` in `pg_wal` now? It may be gone at the next moment.
    pub fn has(&mut self, lsn: Lsn) -> Result<bool, WalSourceError> {
        let segno = lsn.segno(self.segment_size.bytes());
        if (self.last_removed)() >= segno {
            self.close(segno);
            return Ok(false);
        }
        Ok(self.file(segno)?.is_some())
    }

    /// Start of the oldest segment from which on `pg_wal` holds all below `end_lsn`; `end_lsn` if
    /// it does not even hold the byte before.
    pub fn oldest_lsn(&self, end_lsn: Lsn) -> io::Result<Lsn> {
        let mut present = Vec::new();
        for entry in std::fs::read_dir(&self.directory)? {
            let name = entry?.file_name();
            let parsed = name
                .to_str()
                .and_then(|name| parse_segment_file_name(name, self.segment_size));
            if let Some((tli, segno)) = parsed
                && tli == self.tli_of(segno).0
            {
                present.push(segno);
            }
        }
        let size = u64::from(self.segment_size.bytes());
        let last_removed = (self.last_removed)();
        let mut oldest = end_lsn;
        let mut segno = Lsn(end_lsn.0.saturating_sub(1)).segno(self.segment_size.bytes());
        while segno > last_removed && present.contains(&segno) {
            oldest = Lsn(segno * size);
            let Some(previous) = segno.checked_sub(1) else {
                break;
            };
            segno = previous;
        }
        Ok(oldest)
    }

    /// The newest timeline that has begun at or before the segment's end: its file holds all of the
    /// segment that is on our line.
    fn tli_of(&self, segno: SegNo) -> Tli {
        let size = u64::from(self.segment_size.bytes());
        Tli(self.timelines.tli_at(Lsn(segno * size + (size - 1))))
    }

    fn file_name(&self, segno: SegNo) -> String {
        segment_file_name(self.tli_of(segno).0, segno, self.segment_size)
    }

    /// `None` if there is no such file.
    fn file(&mut self, segno: SegNo) -> Result<Option<&File>, WalSourceError> {
        if let Some(at) = self.open.iter().position(|(open, _)| *open == segno) {
            let used = self.open.remove(at);
            self.open.push(used);
        } else {
            let name = self.file_name(segno);
            match File::open(self.directory.join(&name)) {
                Ok(file) => self.open.push((segno, file)),
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                Err(source) => {
                    return Err(WalSourceError {
                        doing: "open",
                        name,
                        source,
                    });
                }
            }
            if self.open.len() > OPEN_MAX {
                self.open.remove(0);
            }
        }
        Ok(self.open.last().map(|(_, file)| file))
    }

    fn close(&mut self, segno: SegNo) {
        self.open.retain(|(open, _)| *open != segno);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    const SIZE: SegmentSize = SegmentSize::MIN;
    const BYTES: u64 = 1 << 20;

    std::thread_local! {
        static LAST_REMOVED: Cell<SegNo> = const { Cell::new(0) };
    }

    /// `pg_wal` with segments `(tli, segno)`, each filled with a byte of its own.
    fn pg_wal(segments: &[(u32, u64, u8)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        for &(tli, segno, byte) in segments {
            let path = dir.path().join(segment_file_name(tli, segno, SIZE));
            std::fs::write(path, vec![byte; BYTES as usize]).expect("written");
        }
        dir
    }

    fn source(dir: &tempfile::TempDir, timelines: TimelineHistory) -> WalSource {
        WalSource::new(dir.path().to_owned(), SIZE, timelines, || {
            LAST_REMOVED.get()
        })
    }

    fn read(source: &mut WalSource, lsn: u64, len: usize) -> (WalRead, Vec<u8>) {
        let mut out = vec![0; len];
        let read = source.read(Lsn(lsn), &mut out).expect("no IO error");
        (read, out)
    }

    #[test]
    fn reads_over_the_ends_of_segments() {
        let dir = pg_wal(&[(1, 2, b'b'), (1, 3, b'c'), (1, 4, b'd')]);
        let mut source = source(&dir, TimelineHistory::root(1));
        let (outcome, bytes) = read(&mut source, 3 * BYTES - 2, BYTES as usize + 3);
        assert_eq!(outcome, WalRead::Filled);
        assert_eq!(
            bytes,
            [vec![b'b'; 2], vec![b'c'; BYTES as usize], vec![b'd']].concat()
        );
        assert_eq!(read(&mut source, 2 * BYTES - 1, 5).0, WalRead::Gone);
    }

    #[test]
    fn what_was_recycled_while_it_was_open_is_not_believed() {
        let dir = pg_wal(&[(1, 2, b'b'), (1, 3, b'c')]);
        let mut source = source(&dir, TimelineHistory::root(1));
        assert_eq!(read(&mut source, 2 * BYTES, 5).0, WalRead::Filled);
        assert_eq!(source.has(Lsn(2 * BYTES)).ok(), Some(true));
        let old = dir.path().join(segment_file_name(1, 2, SIZE));
        std::fs::rename(old, dir.path().join(segment_file_name(1, 5, SIZE))).expect("renamed");
        LAST_REMOVED.set(2);
        assert_eq!(read(&mut source, 2 * BYTES, 5).0, WalRead::Gone);
        assert_eq!(source.has(Lsn(2 * BYTES)).ok(), Some(false));
        assert_eq!(read(&mut source, 3 * BYTES, 5).0, WalRead::Filled);
    }

    #[test]
    fn a_timeline_switch_is_read_from_the_newer_file() {
        let dir = pg_wal(&[(1, 2, b'b'), (1, 3, b'x'), (2, 3, b'c'), (2, 4, b'd')]);
        let switch = format!("1\t{}\twhy\n", Lsn(3 * BYTES + 100));
        let timelines = TimelineHistory::parse(2, &switch).expect("a history");
        let mut source = source(&dir, timelines);
        let (_, bytes) = read(&mut source, 3 * BYTES - 1, BYTES as usize + 2);
        assert_eq!(
            (bytes[0], bytes[1], bytes[bytes.len() - 1]),
            (b'b', b'c', b'd')
        );
    }

    #[test]
    fn the_oldest_position_is_where_an_unbroken_run_begins() {
        let dir = pg_wal(&[(1, 2, 0), (1, 4, 0), (1, 5, 0), (2, 3, 0)]);
        let source = source(&dir, TimelineHistory::root(1));
        assert_eq!(
            source.oldest_lsn(Lsn(5 * BYTES + 9)).ok(),
            Some(Lsn(4 * BYTES))
        );
        assert_eq!(
            source.oldest_lsn(Lsn(3 * BYTES + 9)).ok(),
            Some(Lsn(3 * BYTES + 9))
        );
        assert_eq!(source.oldest_lsn(Lsn(6 * BYTES)).ok(), Some(Lsn(4 * BYTES)));
        LAST_REMOVED.set(4);
        assert_eq!(
            source.oldest_lsn(Lsn(5 * BYTES + 9)).ok(),
            Some(Lsn(5 * BYTES))
        );
    }

    #[test]
    fn few_files_stay_open() {
        let segments: Vec<_> = (1..=30).map(|segno| (1, segno, 0)).collect();
        let dir = pg_wal(&segments);
        let mut source = source(&dir, TimelineHistory::root(1));
        for segno in 1..=30 {
            assert_eq!(read(&mut source, segno * BYTES, 1).0, WalRead::Filled);
        }
        assert_eq!(source.open.len(), OPEN_MAX);
    }
}

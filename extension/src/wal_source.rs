//! WAL by position, from the files of `pg_wal`.
//!
//! ```text
//!             oldest in pg_wal                       written
//!   ──────────────┬──────────────────────────────────────┬────────►  LSN
//!    from a donor │  from the files of pg_wal, here      │  in the server's buffers (local_wal.rs)
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
//! A server that is killed while it zeroes the rest of a segment behind a switch record leaves the
//! older contents of a recycled file there, for ever: its recovery goes on in the next segment.
//! Safekeepers refuse such bytes, rightly. So a segment that may stem from before the server's last
//! start is decoded once when it is opened, and what should be zeros is read as zeros.
//!
//! A caller never asks beyond the written end. Postgres is not called from here: where the last
//! removed segment is known, it is asked through a function that is given.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use safekeeper_protocol::{Lsn, Tli};
use safekeeper_wal::{
    SegNo, SegmentSize, TimelineHistory, WalDecoder, WalFormat, parse_segment_file_name,
    segment_file_name,
};

/// Segments kept open: members read at different places, each mostly in one segment.
const OPEN_MAX: usize = 8;

/// What is decoded at a time when a segment is looked through for stale padding.
const SCAN_LEN: usize = 256 * 1024;

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
    last_removed: fn() -> SegNo,
    format: WalFormat,
    /// WAL below may have been written before the server's last start.
    restarted_lsn: Lsn,
    /// Most recently used last.
    open: Vec<OpenSegment>,
}

struct OpenSegment {
    segno: SegNo,
    file: File,
    /// From this offset on the segment reads as zeros.
    stale_from: Option<u32>,
}

impl WalSource {
    /// `last_removed` gives the number of the last segment removed or recycled since the server
    /// started, or 0. `restarted_lsn` is not below where the WAL ended when it started.
    pub fn new(
        directory: PathBuf,
        format: WalFormat,
        timelines: TimelineHistory,
        restarted_lsn: Lsn,
        last_removed: fn() -> SegNo,
    ) -> WalSource {
        WalSource {
            directory,
            segment_size: format.segment_size,
            timelines,
            last_removed,
            format,
            restarted_lsn,
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
            let Some(segment) = self.segment(segno)? else {
                return Ok(WalRead::Gone);
            };
            let read = segment.file.read_exact_at(now, u64::from(offset));
            if let Some(stale_from) = segment.stale_from {
                let sound = stale_from.saturating_sub(offset) as usize;
                now.iter_mut().skip(sound).for_each(|byte| *byte = 0);
            }
            if (self.last_removed)() >= segno {
                self.close(segno);
                return Ok(WalRead::Gone);
            }
            read.map_err(|source| WalSourceError {
                doing: "read",
                name: self.file_name(segno),
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
        Ok(self.segment(segno)?.is_some())
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
    fn segment(&mut self, segno: SegNo) -> Result<Option<&OpenSegment>, WalSourceError> {
        if let Some(at) = self.open.iter().position(|open| open.segno == segno) {
            let used = self.open.remove(at);
            self.open.push(used);
        } else {
            let error = |doing, source| WalSourceError {
                doing,
                name: self.file_name(segno),
                source,
            };
            let file = match File::open(self.directory.join(self.file_name(segno))) {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                Err(source) => return Err(error("open", source)),
            };
            let stale_from = self
                .find_stale(segno, &file)
                .map_err(|e| error("read", e))?;
            self.open.push(OpenSegment {
                segno,
                file,
                stale_from,
            });
            if self.open.len() > OPEN_MAX {
                self.open.remove(0);
            }
        }
        Ok(self.open.last())
    }

    /// Where the stale bytes behind a switch record begin, if the segment has such. Bytes that
    /// can't be decoded are passed on as they are: the safekeepers will say what is wrong.
    fn find_stale(&self, segno: SegNo, file: &File) -> io::Result<Option<u32>> {
        let size = self.segment_size.bytes();
        let begin = Lsn(segno * u64::from(size));
        if begin + u64::from(size) > self.restarted_lsn {
            return Ok(None);
        }
        let mut decoder = WalDecoder::new(self.format, begin);
        let (mut found, mut cleaned) = (vec![0; SCAN_LEN], vec![0; SCAN_LEN]);
        for offset in (0..size).step_by(SCAN_LEN) {
            file.read_exact_at(&mut found, u64::from(offset))?;
            cleaned.copy_from_slice(&found);
            let decoded = decoder.feed_and_clean(&mut cleaned);
            if found != cleaned {
                let first = found
                    .iter()
                    .zip(&cleaned)
                    .position(|(found, clean)| found != clean);
                return Ok(first
                    .and_then(|at| u32::try_from(at).ok())
                    .map(|at| offset + at));
            }
            if decoded.is_err() {
                break;
            }
        }
        Ok(None)
    }

    fn close(&mut self, segno: SegNo) {
        self.open.retain(|open| open.segno != segno);
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use safekeeper_wal::PgVersion;
    use safekeeper_wal::synthetic::WalBuilder;
    use std::cell::Cell;

    const SIZE: SegmentSize = SegmentSize::MIN;
    pub const BYTES: u64 = 1 << 20;
    const FORMAT: WalFormat = WalFormat {
        version: PgVersion::V15,
        segment_size: SIZE,
        system_id: 7,
    };

    std::thread_local! {
        static LAST_REMOVED: Cell<SegNo> = const { Cell::new(0) };
    }

    /// `pg_wal` with segments `(tli, segno)`, each filled with a byte of its own.
    pub fn pg_wal(segments: &[(u32, u64, u8)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        for &(tli, segno, byte) in segments {
            let path = dir.path().join(segment_file_name(tli, segno, SIZE));
            std::fs::write(path, vec![byte; BYTES as usize]).expect("written");
        }
        dir
    }

    pub fn source(dir: &tempfile::TempDir, timelines: TimelineHistory) -> WalSource {
        restarted_source(dir, timelines, Lsn(0))
    }

    fn restarted_source(
        dir: &tempfile::TempDir,
        timelines: TimelineHistory,
        restarted_lsn: Lsn,
    ) -> WalSource {
        let pg_wal = dir.path().to_owned();
        WalSource::new(pg_wal, FORMAT, timelines, restarted_lsn, || {
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

    #[test]
    fn what_a_crash_left_behind_a_switch_record_reads_as_zeros() {
        let mut wal = WalBuilder::new(FORMAT, 1, Lsn(2 * BYTES));
        wal.noop(1000);
        let switched_lsn = wal.switch().start_lsn;
        let sound = wal.bytes().to_vec();
        let mut left = sound.clone();
        let padding = (switched_lsn.0 % BYTES) as usize + 24;
        left[padding..].fill(b'x');
        let dir = tempfile::tempdir().expect("a directory");
        let name = |segno| dir.path().join(segment_file_name(1, segno, SIZE));
        std::fs::write(name(2), &left).expect("written");
        std::fs::write(name(3), vec![b'x'; BYTES as usize]).expect("written");

        let root = TimelineHistory::root(1);
        let mut after = restarted_source(&dir, root.clone(), Lsn(3 * BYTES));
        assert_eq!(read(&mut after, 2 * BYTES, BYTES as usize).1, sound);
        let tail = read(&mut after, 3 * BYTES - 5, 7).1;
        assert_eq!(tail, b"\0\0\0\0\0xx");
        // What this server wrote itself is read as it is, without a look at it.
        let mut before = restarted_source(&dir, root, Lsn(3 * BYTES - 1));
        assert_eq!(read(&mut before, 2 * BYTES, BYTES as usize).1, left);
    }
}

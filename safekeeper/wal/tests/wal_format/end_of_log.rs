//! Where a log in files ends, and why.

use std::fs;
use std::path::PathBuf;

use crate::support::format;
use safekeeper_protocol::Lsn;
use safekeeper_wal::synthetic::WalBuilder;
use safekeeper_wal::{
    EndOfLog, SegmentFiles, TimelineHistory, WalError, find_end, segment_file_name,
};

const MB: u64 = 1 << 20;

/// A directory of segment files of 1 MiB, removed in the end.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Dir {
        let dir = std::env::temp_dir().join(format!("wal-{name}-{}", std::process::id()));
        fs::create_dir(&dir).expect("a new directory");
        Dir(dir)
    }

    /// Writes `bytes`, which begin at the segment boundary `start`, filled up with `filler`.
    fn write(&self, tli: u32, start: Lsn, bytes: &[u8], filler: u8) {
        let format = format(1);
        for (i, piece) in bytes.chunks(MB as usize).enumerate() {
            let mut segment = vec![filler; MB as usize];
            segment[..piece.len()].copy_from_slice(piece);
            let segno = start.segno(MB as u32) + i as u64;
            let name = segment_file_name(tli, segno, format.segment_size);
            fs::write(self.0.join(name), segment).expect("a segment written");
        }
    }

    fn find_end(&self, timelines: TimelineHistory, start: Lsn) -> EndOfLog {
        let mut files = SegmentFiles::new(&self.0, timelines, format(1).segment_size);
        find_end(format(1), start, |lsn, buffer| files.read(lsn, buffer)).expect("readable")
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

#[test]
fn zeros_old_contents_and_missing_files_all_end_a_log() {
    let start = Lsn(4 * MB);
    let mut wal = WalBuilder::new(format(1), 1, start);
    wal.noop(1_500_000);
    let last = wal.noop(200);
    let end = last.end_lsn;
    let log_end = |reason| EndOfLog {
        end,
        last_record: Some(last.start_lsn),
        reason,
    };
    let root = || TimelineHistory::root(1);

    let zeros = Dir::new("zeros");
    zeros.write(1, start, wal.bytes(), 0);
    let reason = WalError::RecordLength { lsn: end, found: 0 };
    assert_eq!(zeros.find_end(root(), start), log_end(reason));

    let stale = Dir::new("stale");
    stale.write(1, start, wal.bytes(), 0x11);
    let reason = WalError::RecordPrev {
        lsn: end,
        found: Lsn(0x1111_1111_1111_1111),
        expected: Some(last.start_lsn),
    };
    let found = stale.find_end(root(), start);
    assert!(matches!(found.reason, WalError::RecordRmgr { .. }) || found.reason == reason);
    assert_eq!(found.end, end);

    let missing = Dir::new("missing");
    let filled = wal.record_ending_at(Lsn(6 * MB));
    missing.write(1, start, wal.bytes(), 0);
    assert_eq!(
        missing.find_end(root(), start),
        EndOfLog {
            end: Lsn(6 * MB),
            last_record: Some(filled.start_lsn),
            reason: WalError::NoMoreBytes { lsn: Lsn(6 * MB) }
        }
    );
    // Nothing at all: the end is where the search began.
    assert_eq!(
        missing.find_end(root(), Lsn(9 * MB)),
        EndOfLog {
            end: Lsn(9 * MB),
            last_record: None,
            reason: WalError::NoMoreBytes { lsn: Lsn(9 * MB) }
        }
    );
}

#[test]
fn a_torn_record_ends_the_log_before_it() {
    let start = Lsn(4 * MB);
    let mut wal = WalBuilder::new(format(1), 1, start);
    let last = wal.noop(5000);
    let torn = wal.noop(20_000);
    let dir = Dir::new("torn");
    let cut = (torn.start_lsn - start) as usize + 10_000;
    dir.write(1, start, &wal.bytes()[..cut], 0);
    let found = dir.find_end(TimelineHistory::root(1), start);
    assert_eq!(found.end, last.end_lsn);
    assert!(
        matches!(found.reason, WalError::PageMagic { found: 0, .. }),
        "{}",
        found.reason
    );
}

#[test]
fn a_segment_is_read_from_the_newest_timeline_that_has_it() {
    let start = Lsn(4 * MB);
    let mut old = WalBuilder::new(format(1), 1, start);
    old.noop(1_200_000);
    let switch_point = old.position();
    let mut new = old.clone();
    old.noop(300);
    new.set_tli(2);
    let last = new.noop(900_000);
    let dir = Dir::new("timelines");
    dir.write(1, start, old.bytes(), 0);
    let second = Lsn(5 * MB);
    dir.write(2, second, new.bytes_from(second), 0);
    let history = TimelineHistory::parse(2, &format!("1\t{switch_point}\t")).expect("good");
    assert_eq!(dir.find_end(history, start).end, last.end_lsn);
    // The old timeline by itself goes its own way.
    assert_eq!(
        dir.find_end(TimelineHistory::root(1), start).end,
        old.position()
    );
}

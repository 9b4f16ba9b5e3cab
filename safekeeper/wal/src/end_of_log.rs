//! Where a log ends: reading WAL from a known boundary until it makes no sense any more.
//!
//! ```text
//!    segment                              segment
//!   │ record │ record │ rec             │ zeros, or what an earlier use of the file left ...
//!                     ▲    ▲
//!                     end  reason: why the next record could not be read
//! ```
//!
//! A log on disk has no mark at its end. Behind its last record come zeros, old contents of a
//! recycled file, half a record, or no file at all, and all of these look like damage: whether the
//! end is *too early* is for the caller to judge, who knows how much must be there.
//!
//! Nothing is changed on disk; what lies behind the end is left for the caller to cut.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safekeeper_protocol::Lsn;

use crate::decoder::WalDecoder;
use crate::error::WalError;
use crate::format::WalFormat;
use crate::history::TimelineHistory;
use crate::record::Record;
use crate::segment_name::{SegNo, SegmentSize, segment_file_name};

/// Where a log ends, and what stands there instead of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndOfLog {
    /// Canonical end of the last whole record, or where the search began if there is none.
    pub end: Lsn,
    /// Start of that record, `None` if there is none.
    pub last_record: Option<Lsn>,
    /// Why the record behind it could not be read.
    pub reason: WalError,
}

/// The bytes could not be read, so nothing is known about the end.
#[derive(Debug, thiserror::Error)]
#[error("could not read WAL at {lsn}: {source}")]
pub struct FindEndError {
    pub lsn: Lsn,
    pub source: io::Error,
}

/// Decodes from `start` until the first error.
///
/// `start` is as for [`WalDecoder::new`]. `read` fills a buffer with the bytes at a position and
/// returns how many it got, at least one, or 0 where there is no WAL.
pub fn find_end(
    format: WalFormat,
    start: Lsn,
    read: impl FnMut(Lsn, &mut [u8]) -> io::Result<usize>,
) -> Result<EndOfLog, FindEndError> {
    find_end_with(WalDecoder::new(format, start), read, |_| {})
}

/// The same with a decoder of the caller's making, calling `on_record` for every record.
pub fn find_end_with(
    mut decoder: WalDecoder,
    mut read: impl FnMut(Lsn, &mut [u8]) -> io::Result<usize>,
    mut on_record: impl FnMut(&Record),
) -> Result<EndOfLog, FindEndError> {
    let mut buffer = vec![0; READ_SIZE];
    let reason = loop {
        let lsn = decoder.position();
        let len = read(lsn, &mut buffer).map_err(|source| FindEndError { lsn, source })?;
        if len == 0 {
            break WalError::NoMoreBytes { lsn };
        }
        if let Err(reason) = decoder.feed_with(&buffer[..len], &mut on_record) {
            break reason;
        }
    };
    Ok(EndOfLog {
        end: decoder.record_end(),
        last_record: decoder.last_record(),
        reason,
    })
}

/// Enough for the kernel's readahead to work, little enough to stay in the processor's cache.
const READ_SIZE: usize = 128 << 10;

/// Segment files in a directory laid out as `pg_wal` is, read by position.
///
/// A segment in which a timeline ended exists once for the old and once for the new one, with the
/// same bytes up to the switch; it is read from the newest timeline of the history that reaches
/// into it and has a file. (`WalSndSegmentOpen` in `replication/walsender.c`)
#[derive(Debug)]
pub struct SegmentFiles {
    dir: PathBuf,
    timelines: TimelineHistory,
    segment_size: SegmentSize,
    open: Option<(SegNo, File)>,
}

impl SegmentFiles {
    /// Nothing is opened before the first read.
    pub fn new(dir: &Path, timelines: TimelineHistory, segment_size: SegmentSize) -> SegmentFiles {
        SegmentFiles {
            dir: dir.to_owned(),
            timelines,
            segment_size,
            open: None,
        }
    }

    /// Fills `buffer` from `lsn` on, at most up to the end of the segment. Returns 0 where there
    /// is no file, or where it is shorter.
    pub fn read(&mut self, lsn: Lsn, buffer: &mut [u8]) -> io::Result<usize> {
        let size = self.segment_size.bytes();
        let segno = lsn.segno(size);
        let offset = lsn.segment_offset(size);
        let len = buffer.len().min((size - offset) as usize);
        match self.segment(segno)? {
            Some(file) => file.read_at(&mut buffer[..len], offset.into()),
            None => Ok(0),
        }
    }

    fn segment(&mut self, segno: SegNo) -> io::Result<Option<&File>> {
        if !matches!(self.open, Some((open, _)) if open == segno) {
            self.open = self.open_segment(segno)?.map(|file| (segno, file));
        }
        Ok(self.open.as_ref().map(|(_, file)| file))
    }

    fn open_segment(&self, segno: SegNo) -> io::Result<Option<File>> {
        let size = u64::from(self.segment_size.bytes());
        let (first, last) = (Lsn(segno * size), Lsn(segno * size + (size - 1)));
        let newest = self.timelines.tli_at(last);
        let oldest = self.timelines.tli_at(first);
        let ancestors = self.timelines.ancestors.iter().rev().map(|a| a.tli);
        let candidates = [self.timelines.tli].into_iter().chain(ancestors);
        for tli in candidates.filter(|tli| (oldest..=newest).contains(tli)) {
            let name = segment_file_name(tli, segno, self.segment_size);
            match File::open(self.dir.join(name)) {
                Ok(file) => return Ok(Some(file)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

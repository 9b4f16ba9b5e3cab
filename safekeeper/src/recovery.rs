//! Recovery: where a cluster's log begins and ends on disk, found when it is opened.
//!
//! Nothing on disk says where the log ends. It ends where decoding does, and decoding begins at a
//! place that must be sound because of what the control file promises:
//!
//! ```text
//!        oldest            commit_lsn (persisted)        end
//!          │                    │                         │
//!   ───────┼──────────┼─────────┼──────────┼──────────────┼·····┼ zeros, a torn record,
//!                     ▲         │                         │       segments made ahead
//!                     decoding starts at a segment  ──►   stops at the first thing that
//!                     that was committed                  makes no sense
//! ```
//!
//! *Below* `commit_lsn`, not making sense is damage: the bytes were flushed and checked once.
//! Such a cluster is not served. *Above*, it is the usual state after a crash: what was written
//! and not flushed may be there in part. Every whole record is kept (a superset of what was
//! acknowledged), and all behind the last one is made zero again, on disk, before anything is
//! appended: else old bytes behind the end, valid in themselves, could one day be taken for the
//! continuation of new ones.
//!
//! | found at start                          | because                          | then              |
//! |-----------------------------------------|----------------------------------|-------------------|
//! | `*.tmp`                                 | a segment was being made         | removed           |
//! | segments behind the end                 | made ahead, or torn writes       | removed           |
//! | segments of timelines not in the history | a promotion that died            | removed at the end |
//! | bytes behind the end in its segment     | torn write, unfinished truncation | zeroed            |
//! | no segment, no `commit_lsn`             | nothing was ever written         | an empty log      |
//! | segments below a gap                    | removal of old ones was cut short | left to removal   |
//!
//! Each step can be cut short by a crash and repeated: none of them changes what decoding finds.
//! That the bytes read are durable, and not only in the page cache, is the caller's work in part: it
//! syncs the whole file system before. What a failed sync has left in the cache is written again
//! here.

use std::collections::BTreeSet;

use safekeeper_protocol::mutation::{Mutation, is_on};
use safekeeper_protocol::{AcceptorState, Lsn};
use safekeeper_wal::page::{LONG_HEADER_SIZE, PageHeader, page_header_size};
use safekeeper_wal::{
    PAGE_SIZE, SegNo, TimelineHistory, WalDecoder, WalError, WalFormat, canonical_end,
};

use crate::disk::StorageError;
use crate::segment::{SegmentDir, SegmentId, SegmentReader, Timelines, UnsupportedCluster};

/// Why a cluster's WAL can't be served.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Committed WAL is damaged or missing; everything below `lsn` is sound.
    #[error("WAL is damaged at {lsn}, below commit_lsn {commit_lsn}: {problem}")]
    Corrupt {
        lsn: Lsn,
        commit_lsn: Lsn,
        problem: String,
    },
    #[error(transparent)]
    Unsupported(#[from] UnsupportedCluster),
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// A log as it was found.
#[derive(Debug)]
pub struct Recovered {
    /// Position of the first byte kept; [`Lsn::INVALID`] if there is no log.
    pub begin: Lsn,
    /// Stands at the log's end, and expects the timelines it was given.
    pub decoder: WalDecoder,
}

/// Reads a log without changing anything. Above the end there may be garbage.
pub struct LogReader<'a> {
    segments: &'a SegmentDir,
    format: WalFormat,
    timelines: &'a Timelines,
    expected: &'a TimelineHistory,
}

impl<'a> LogReader<'a> {
    /// `expected` is what page headers must say; see [`WalDecoder::expect_timelines`].
    pub fn new(
        segments: &'a SegmentDir,
        format: WalFormat,
        timelines: &'a Timelines,
        expected: &'a TimelineHistory,
    ) -> LogReader<'a> {
        LogReader {
            segments,
            format,
            timelines,
            expected,
        }
    }

    /// Finds the log that `state` tells of.
    pub fn recover(&self, state: &AcceptorState) -> Result<Recovered, OpenError> {
        let commit_lsn = state.commit_lsn;
        let present = self.present()?;
        let Some(&lowest) = present.first() else {
            return self.recover_empty(state);
        };
        let size = self.segments.size();
        // The last committed byte's segment. A commit_lsn at a segment's start may also be that of
        // a log without a byte, and one below all segments is older than the removal of WAL.
        let last_committed = Lsn(commit_lsn.0.saturating_sub(1)).segno(size);
        let at_commit = commit_lsn.segno(size);
        let from = if !commit_lsn.is_valid() || (last_committed < lowest && at_commit < lowest) {
            lowest
        } else if present.contains(&last_committed) {
            last_committed
        } else if present.contains(&at_commit) && commit_lsn.segment_offset(size) == 0 {
            at_commit
        } else {
            let name = self.reader().expected_name(Lsn(commit_lsn.0 - 1));
            return Err(OpenError::Corrupt {
                lsn: self.segments.start(last_committed),
                commit_lsn,
                problem: format!("segment {name} is missing"),
            });
        };
        let mut floor = from;
        while floor > 0 && present.contains(&(floor - 1)) && !self.is_blank(floor - 1)? {
            floor -= 1;
        }
        let begin = self.segments.start(floor);
        let decoder = self.decode_to_end(state, from, floor)?;
        Ok(Recovered { begin, decoder })
    }

    /// From `begin`, a page's start, to the end of the log: a decoder that stands there, and why
    /// what follows is no WAL.
    pub fn find_end(&self, begin: Lsn) -> Result<(WalDecoder, WalError), StorageError> {
        let mut reader = self.reader();
        let mut decoder = self.decoder_at(begin);
        let mut buffer = vec![0; READ_SIZE];
        let reason = loop {
            let lsn = decoder.position();
            let len = reader.read(lsn, &mut buffer)?;
            if len == 0 {
                break WalError::NoMoreBytes { lsn };
            }
            if let Err(reason) = decoder.feed(&buffer[..len]) {
                break reason;
            }
        };
        Ok((decoder, reason))
    }

    /// The log ends at `end`, and nothing has been read beyond.
    pub fn decoder_after(&self, end: Lsn, last_record: Option<Lsn>) -> WalDecoder {
        let mut decoder = WalDecoder::after_record(self.format, end, last_record);
        decoder.expect_timelines(self.expected.clone());
        decoder
    }

    /// The log begins at `begin`, a segment's start, and ends there.
    pub fn decoder_at(&self, begin: Lsn) -> WalDecoder {
        let mut decoder = WalDecoder::new(self.format, begin);
        decoder.expect_timelines(self.expected.clone());
        decoder
    }

    /// A reader of the bytes.
    pub fn reader(&self) -> SegmentReader {
        SegmentReader::new(self.segments.clone(), self.timelines.clone())
    }

    /// If `lsn` is a place between two records of this log, both of them in it: `Some`, with the
    /// start of the record that ends there. `end` is the end of the log's last whole record.
    pub fn boundary(&self, lsn: Lsn, end: Lsn) -> Result<Option<Lsn>, StorageError> {
        let mut reader = self.reader();
        let mut decoder = self.decoder_at(lsn.segment_start(self.segments.size()));
        let mut buffer = vec![0; READ_SIZE];
        let mut last_record = None;
        while last_record.is_none() && decoder.position() < end {
            let len = reader.read(decoder.position(), &mut buffer)?;
            let sound = decoder.feed_with(&buffer[..len], |record| {
                let begin = canonical_end(record.start_lsn, self.format.segment_size);
                if record.end_lsn == lsn {
                    last_record = Some(record.start_lsn);
                } else if begin == lsn && !record.header.is_overwrite_contrecord() {
                    last_record = Some(record.header.prev_lsn);
                }
            });
            if len == 0 || sound.is_err() {
                break;
            }
        }
        Ok(last_record)
    }

    /// Numbers of the segments that are there on a timeline of this log.
    pub fn present(&self) -> Result<BTreeSet<SegNo>, StorageError> {
        let mut present = BTreeSet::new();
        for id in self.segments.list()? {
            if self.is_of_log(id, Lsn(u64::MAX)) {
                present.insert(id.segno);
            }
        }
        Ok(present)
    }

    /// The log, if it ends at `end`, may have bytes in this file.
    pub fn is_of_log(&self, id: SegmentId, end: Lsn) -> bool {
        let begin = self.segments.start(id.segno);
        let segment_end = Lsn(begin.0.saturating_add(self.segments.size().into()));
        let mut tlis = self.timelines.candidates(begin, segment_end.min(end));
        tlis.any(|tli| tli == id.tli)
    }

    /// There is no segment of this log.
    fn recover_empty(&self, state: &AcceptorState) -> Result<Recovered, OpenError> {
        let commit_lsn = state.commit_lsn;
        let corrupt = |problem| OpenError::Corrupt {
            lsn: Lsn::INVALID,
            commit_lsn,
            problem,
        };
        // WAL that the control file knows nothing of is not ours to remove: the control file may
        // be an old copy.
        for id in self.segments.list()? {
            if !self.is_blank_file(id)? {
                let name = self.segments.name(id);
                return Err(corrupt(format!(
                    "segment {name} is of a timeline that the control file does not know"
                )));
            }
        }
        let log_start = state.history.first().map(|entry| entry.start_lsn);
        let begin = if commit_lsn.is_valid() && Some(commit_lsn) == log_start {
            // A log that was begun and holds nothing.
            commit_lsn
        } else if commit_lsn.is_valid() {
            return Err(corrupt("there are no segments".to_owned()));
        } else {
            Lsn::INVALID
        };
        Ok(Recovered {
            begin,
            decoder: self.decoder_at(begin),
        })
    }

    /// Decodes from segment `from`, or from further back if that is not enough to tell.
    ///
    /// A segment may begin inside a record. That record's end can't be told from a torn one before
    /// another whole record follows, so if `from` holds no more than such a rest, the segment
    /// where the record begins must be read too.
    fn decode_to_end(
        &self,
        state: &AcceptorState,
        from: SegNo,
        floor: SegNo,
    ) -> Result<WalDecoder, OpenError> {
        let commit_lsn = state.commit_lsn;
        let mut start = from;
        let mut back = 1;
        loop {
            let begin = self.segments.start(start);
            let (decoder, reason) = self.find_end(begin)?;
            let (end, last_record) = (decoder.record_end(), decoder.last_record());
            let found_record = last_record.is_some();
            if found_record && end >= commit_lsn {
                return Ok(self.decoder_after(end, last_record));
            }
            if start == floor {
                if let Some(decoder) = self.known_end(state, begin, &decoder)? {
                    return Ok(decoder);
                }
                if !found_record && end >= commit_lsn {
                    return Ok(self.decoder_at(begin));
                }
                return Err(OpenError::Corrupt {
                    lsn: end,
                    commit_lsn,
                    problem: reason.to_string(),
                });
            }
            start = start.saturating_sub(back).max(floor);
            back *= 2;
        }
    }

    /// The log begins inside a record, and holds the rest of that and nothing whole behind it. Then
    /// it ends behind that rest if the control file knows of a place between records there; else
    /// where it begins. If more than the rest was committed, the log has lost something.
    fn known_end(
        &self,
        state: &AcceptorState,
        begin: Lsn,
        found: &WalDecoder,
    ) -> Result<Option<WalDecoder>, StorageError> {
        let Some(rest_end) = self.leading_rest_end(begin)? else {
            return Ok(None);
        };
        let starts = state.history.entries().iter().map(|entry| entry.start_lsn);
        let known = starts.chain([state.commit_lsn]).any(|lsn| lsn == rest_end);
        let holds_committed = rest_end >= state.commit_lsn;
        if found.last_record().is_some() || !known || !holds_committed || rest_end <= begin {
            return Ok(None);
        }
        let mut reader = self.reader();
        let mut decoder = self.decoder_at(begin);
        let mut buffer = vec![0; READ_SIZE];
        while decoder.position() < rest_end {
            let left = rest_end - decoder.position();
            let part = usize::try_from(left).map_or(READ_SIZE, |left| left.min(READ_SIZE));
            let len = reader.read(decoder.position(), &mut buffer[..part])?;
            if len == 0 || decoder.feed(&buffer[..len]).is_err() {
                return Ok(None);
            }
        }
        Ok(Some(self.decoder_after(rest_end, None)))
    }

    /// End of the record with whose rest the segment at `begin` begins; `begin` itself if a record
    /// begins there. None if the first page can't be read.
    pub fn leading_rest_end(&self, begin: Lsn) -> Result<Option<Lsn>, StorageError> {
        let mut bytes = [0; LONG_HEADER_SIZE as usize];
        let len = self.reader().read(begin, &mut bytes)?;
        if len < bytes.len() {
            return Ok(None);
        }
        let Ok(header) = PageHeader::decode(&bytes, begin, &self.format) else {
            return Ok(None);
        };
        let mut page_lsn = begin;
        let mut remaining = header.rem_len;
        let mut lsn = begin;
        while remaining > 0 {
            let page_header = page_header_size(page_lsn, &self.format);
            let on_page = remaining.min(PAGE_SIZE - page_header);
            lsn = page_lsn + u64::from(page_header + on_page);
            remaining -= on_page;
            page_lsn = page_lsn + u64::from(PAGE_SIZE);
        }
        Ok(Some(Lsn(lsn.0.next_multiple_of(RECORD_ALIGNMENT))))
    }

    /// Nothing was ever written to the segment: its first page has no header.
    fn is_blank(&self, segno: SegNo) -> Result<bool, StorageError> {
        match self.reader().find(segno)? {
            Some(id) => self.is_blank_file(id),
            None => Ok(true),
        }
    }

    fn is_blank_file(&self, id: SegmentId) -> Result<bool, StorageError> {
        let mut header = [0; LONG_HEADER_SIZE as usize];
        self.segments.open_read_only(id)?.read_at(&mut header, 0)?;
        Ok(header.iter().all(|&byte| byte == 0))
    }
}

/// Removes what a crash may have left unfinished under names that mean nothing.
pub fn remove_leftovers(segments: &SegmentDir) -> Result<(), StorageError> {
    for name in segments.disk().list(segments.dir())? {
        if name.ends_with(".tmp") {
            segments.disk().remove(&segments.dir().join(name))?;
        }
    }
    Ok(())
}

/// Makes everything behind `end` zero or gone, durably. The log begins at `begin`; the segment of
/// its first byte stays even if it holds nothing.
///
/// Nothing below `end` is touched, so a crash in between leaves a log that ends at `end` or
/// anywhere behind it, but not beyond its former end.
pub fn cut(log: &LogReader<'_>, begin: Lsn, end: Lsn) -> Result<(), StorageError> {
    let segments = log.segments;
    let size = segments.size();
    let last = end.segno(size);
    let keep_last = end != end.segment_start(size) || end == begin;
    let mut removed = false;
    // From the back, so that a crash never leaves a gap with WAL behind it.
    for id in segments.list()?.into_iter().rev() {
        let kept = id.segno < last || (id.segno == last && keep_last && log.is_of_log(id, end));
        if !kept {
            segments.disk().remove(&segments.path(id))?;
            removed = true;
        }
    }
    if removed {
        segments.disk().sync_dir(segments.dir())?;
    }
    // Of older timelines' files for this segment the tail is zero since their end.
    if let Some(id) = log.reader().find(last)?
        && !is_on(Mutation::TailNotZeroed)
    {
        segments.zero_tail(id, end.segment_offset(size))?;
    }
    Ok(())
}

/// Writes again, and syncs, what stands between `begin` and the end of the log's last segment.
///
/// The last process may have ended because a sync failed. The kernel takes the pages it could not
/// write for clean from then on: they are read from its cache, no later sync writes them, and the
/// next power cut shows what the disk has held all the time. So of what is *above* the commit_lsn
/// that is persisted, which alone is known to have been synced, nothing is believed to be on disk
/// because it can be read.
pub fn write_again(log: &LogReader<'_>, begin: Lsn, end: Lsn) -> Result<(), StorageError> {
    let segments = log.segments;
    let size = segments.size();
    let reader = log.reader();
    let mut buffer = vec![0; READ_SIZE];
    for segno in begin.segno(size)..=end.segno(size) {
        let Some(id) = reader.find(segno)? else {
            continue;
        };
        let file = segments.open(id)?;
        let mut offset = u64::from(begin.max(segments.start(segno)).segment_offset(size));
        while offset < u64::from(size) {
            let len = file.read_at(&mut buffer, offset)?;
            if len == 0 {
                break;
            }
            file.write_at(&buffer[..len], offset)?;
            offset += len as u64;
        }
        file.sync_data()?;
    }
    Ok(())
}

/// Records begin at multiples of this (`MAXALIGN`).
const RECORD_ALIGNMENT: u64 = 8;

/// Large enough for the kernel's readahead to work.
const READ_SIZE: usize = 128 << 10;

//! `WalReader`: WAL read back, for whoever streams it. One for each consumer; it takes no lock.
//!
//! The caller knows how far it may read (`commit_lsn`, or `flush_lsn` for a proposer that reads
//! from its donor); this file sees to it that what it gets is WAL, and the WAL of that place:
//!
//! * every byte goes through a decoder: page headers, the chain of records, checksums. What has
//!   decayed on disk is an error, and is not served. A record that comes in several reads is
//!   checked with its last byte.
//! * a segment may be removed, and its file filled with zeros for another use, while it is being
//!   read. The file loses its name before that; so if it still has it *after* the read, what was
//!   read is what was there.
//!
//! The decoder has to begin somewhere: at the start of the page where the first read begins, or
//! if no page begins there (inside the zeros behind a switch record), at the segment's.
//!
//! Reads that go on where the last one ended are cheap; any other begins anew.

use std::sync::Arc;

use safekeeper_protocol::{ClusterIdentity, Lsn, TermHistory, TimelineFile};
use safekeeper_wal::{PAGE_SIZE, TimelineHistory, WalDecoder, WalError, WalFormat};

use crate::disk::{Disk, StorageError};
use crate::segment::{SegmentDir, SegmentReader, Timelines, UnsupportedCluster, wal_format};
use crate::timeline_files::expected_timelines;

/// Why WAL can't be had.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It was here once, or is not here yet.
    #[error("requested WAL segment {segment} has already been removed")]
    Removed { segment: String },
    /// What is on disk is not what was written.
    #[error("WAL on disk is damaged: {0}")]
    Damaged(WalError),
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// Reads one cluster's WAL. See the head of this file.
#[derive(Debug)]
pub struct WalReader {
    format: WalFormat,
    segments: SegmentDir,
    source: SegmentReader,
    /// What page headers must say.
    expected: TimelineHistory,
    /// Has taken in all up to where the last read ended. None before the first.
    decoder: Option<WalDecoder>,
    /// For what must be decoded and is not asked for.
    lead: Vec<u8>,
}

impl WalReader {
    /// `history` is the log's at this moment: it tells in which timeline's files to look.
    /// `timeline_files`, the newest first, tell with it of which timeline a page must be.
    pub fn new(
        disk: Arc<dyn Disk>,
        cluster: &ClusterIdentity,
        history: &TermHistory,
        timeline_files: &[TimelineFile],
    ) -> Result<WalReader, UnsupportedCluster> {
        let format = wal_format(cluster)?;
        let segments = SegmentDir::new(disk, &format);
        let timelines = Timelines::new(history);
        let expected = expected_timelines(timeline_files, &timelines);
        let source = SegmentReader::new(segments.clone(), timelines);
        Ok(WalReader {
            format,
            segments,
            source,
            expected,
            decoder: None,
            lead: Vec::new(),
        })
    }

    /// The log's history is another one now, or the files are.
    pub fn set_history(&mut self, history: &TermHistory, timeline_files: &[TimelineFile]) {
        let timelines = Timelines::new(history);
        self.expected = expected_timelines(timeline_files, &timelines);
        self.source = SegmentReader::new(self.segments.clone(), timelines);
        self.decoder = None;
    }

    /// Fills `buffer` with the WAL from `begin` on. On an error its contents mean nothing.
    pub fn read(&mut self, begin: Lsn, buffer: &mut [u8]) -> Result<(), ReadError> {
        if self.decoder.as_ref().is_some_and(|d| d.position() == begin) {
            match self.read_on(begin, buffer) {
                // The open file or the chain may be those of a log that has been cut since.
                Err(ReadError::Damaged(_) | ReadError::Removed { .. }) => {}
                other => return other,
            }
        }
        match self.read_anew(begin, begin.segment_start(PAGE_SIZE), buffer) {
            Err(ReadError::Damaged(_)) => {
                let segment = begin.segment_start(self.segments.size());
                self.read_anew(begin, segment, buffer)
            }
            other => other,
        }
    }

    /// Begins to decode at `start`, a page's.
    fn read_anew(&mut self, begin: Lsn, start: Lsn, buffer: &mut [u8]) -> Result<(), ReadError> {
        self.source.close();
        let mut decoder = WalDecoder::new(self.format, start);
        decoder.expect_timelines(self.expected.clone());
        self.decoder = Some(decoder);
        let mut lead = std::mem::take(&mut self.lead);
        let mut lsn = start;
        while lsn < begin {
            let len = usize::try_from(begin - lsn).map_or(LEAD_SIZE, |left| left.min(LEAD_SIZE));
            lead.resize(len, 0);
            self.read_on(lsn, &mut lead)?;
            lsn = lsn + len as u64;
        }
        self.lead = lead;
        self.read_on(begin, buffer)
    }

    /// Reads where the decoder stands.
    fn read_on(&mut self, begin: Lsn, buffer: &mut [u8]) -> Result<(), ReadError> {
        let mut filled = 0;
        while filled < buffer.len() {
            let lsn = begin + filled as u64;
            let len = self.source.read(lsn, &mut buffer[filled..])?;
            if len == 0 || !self.source.still_there()? {
                self.decoder = None;
                let segment = self.source.expected_name(lsn);
                return Err(ReadError::Removed { segment });
            }
            filled += len;
        }
        let decoder = self.decoder.as_mut().expect("made by whoever calls this");
        decoder.feed(buffer).map_err(ReadError::Damaged)
    }
}

/// Bytes read at once where only the decoder needs them.
const LEAD_SIZE: usize = 128 << 10;

//! A cluster's WAL on disk: one run of bytes, cut into segments. This is its only writer.
//!
//! ```text
//!   oldest_lsn  <=  flush_lsn  <=  write_lsn
//!   │                │              └ given to the operating system
//!   │                └ end of the last whole, checked record that is on stable storage
//!   └ start of the first segment kept; all LSNs are 0/0 while there is no log
//! ```
//!
//! What lies below `flush_lsn` survives a power cut. What lies between it and `write_lsn` may or
//! may not, so nobody outside is told about it. Behind `write_lsn` the segments are zero.
//!
//! Writing only continues at `write_lsn`, and only with bytes the decoder has accepted: page
//! headers, the chain of records, checksums. The hot path is `pwrite` and `fdatasync`: segments
//! have been made ahead (prepare.rs), so no size, block or name changes. What has no checksum is
//! synced before what follows it is written (write_order.rs).
//!
//! **Truncation** must never bring bytes back to life that were cut: a record of a dead reign is
//! valid in itself, and could happen to fit to what is written in its place. So the tail is zeroed
//! and synced before anything else is done at its end; and the acceptor persists the new history
//! only after that. In this order:
//!
//! | a crash after we ...                | leaves                        | which is               |
//! |-------------------------------------|-------------------------------|------------------------|
//! | flush what was written              | the old log                   | true by its old history |
//! | remove segments behind the end      | the old log or less           | a prefix of it         |
//! | sync the directory, zero the tail   | the old log up to the end, or somewhat more | a prefix of it |
//! | sync the segment                    | the new log, old history      | a prefix of it         |
//! | persist the new history             | the new log                   | what we promise from now |
//!
//! A prefix of the old log under its old history is never a lie: all of it was written in those
//! terms. It may be shorter than what this safekeeper once told, but nothing below the cut's end
//! is lost, and for a term that has been won already the cut is right. Beginning a log anew takes
//! the other order, first the new segment and then the removal, so that there is always one.
//!
//! **A new timeline** goes on in a segment of its own. Where the switch is inside a segment, the
//! new file begins as a copy of the old one up to there, as it does in a server. The old file
//! stays, and is zero behind the switch.
//!
//! **A failed write or sync** ends the process (see disk.rs). Two failures are refusals: WAL that
//! does not decode, and a full disk. Both leave the log as if the call had not been made.
//!
//! Terms and votes are unknown here: this file knows where to cut, not why.

use std::borrow::Cow;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use safekeeper_protocol::mutation::{Mutation, is_on};
use safekeeper_protocol::{AcceptorState, ClusterIdentity, Lsn, TimelineFile, Tli};
use safekeeper_wal::{SegNo, TimelineHistory, WalDecoder, WalError, WalFormat};

use crate::disk::{Disk, DiskFile, StorageError};
use crate::prepare::Preparation;
use crate::recovery::{self, LogReader};
use crate::segment::{SegmentDir, SegmentId, Timelines};
use crate::timeline_files::TimelineFiles;
use crate::write_order::decode_with_barriers;

pub use crate::recovery::OpenError;
pub use crate::segment::{UnsupportedCluster, wal_format};

/// Why bytes were not written. After the first two the log is as before the call.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error("damaged WAL refused: {0}")]
    Damaged(WalError),
    #[error("no space for WAL: {0}")]
    NoSpace(StorageError),
    /// The process must end.
    #[error(transparent)]
    Failed(StorageError),
}

/// Why the log was not cut. After the first two it is as before the call.
#[derive(Debug, thiserror::Error)]
pub enum TruncateError {
    /// Only a proposer that contradicts itself asks for this.
    #[error("no log can end at {end_lsn}: {problem}")]
    Refused { end_lsn: Lsn, problem: &'static str },
    /// Only when a log is begun.
    #[error("no space for WAL: {0}")]
    NoSpace(StorageError),
    /// The process must end.
    #[error(transparent)]
    Failed(StorageError),
}

/// One cluster's WAL. See the head of this file.
#[derive(Debug)]
pub struct WalStorage {
    format: WalFormat,
    preparation: Arc<Preparation>,
    thread: Option<JoinHandle<()>>,
    timelines: Timelines,
    timeline_files: TimelineFiles,
    /// Position of the first byte kept, a segment's start. Invalid while there is no log.
    begin: Lsn,
    /// What was written, it has seen: its position is `write_lsn`.
    decoder: WalDecoder,
    flush_lsn: Lsn,
    /// All segments of the last timeline below this one are there, from `write_lsn`'s on.
    made_to: SegNo,
    current: Option<CurrentSegment>,
    /// Segments left behind since the last flush, with bytes that are not synced.
    unsynced: Vec<Box<dyn DiskFile>>,
}

#[derive(Debug)]
struct CurrentSegment {
    segno: SegNo,
    file: Box<dyn DiskFile>,
    dirty: bool,
}

impl WalStorage {
    /// Finds the log on disk and makes it ready to be continued; see recovery.rs. The directory
    /// must be there (`ControlFile::create` makes it), and the file system must have been synced
    /// since the process started.
    pub fn open(
        disk: Arc<dyn Disk>,
        cluster: &ClusterIdentity,
        state: &AcceptorState,
    ) -> Result<WalStorage, OpenError> {
        let format = wal_format(cluster)?;
        let segments = SegmentDir::new(disk.clone(), &format);
        // It is made before the control file, so it was there once.
        if disk.file_id(segments.dir())?.is_none() {
            return Err(OpenError::Corrupt {
                lsn: Lsn::INVALID,
                commit_lsn: state.commit_lsn,
                problem: "the directory of its segments is missing".to_owned(),
            });
        }
        let mut timelines = Timelines::new(&state.history);
        let timeline_files = TimelineFiles::open(disk, segments.dir())?;
        recovery::remove_leftovers(&segments)?;

        let expected = timeline_files.expected(&timelines);
        let log = LogReader::new(&segments, format, &timelines, &expected);
        let recovered = log.recover(state)?;
        let (begin, end) = (recovered.begin, recovered.decoder.position());
        recovery::cut(&log, begin, end)?;
        if begin.is_valid() && !is_on(Mutation::FailedSyncBelieved) {
            recovery::write_again(&log, begin.max(state.commit_lsn), end)?;
        }
        timelines.cut(end);

        let mut storage = WalStorage {
            format,
            preparation: Arc::new(Preparation::new(segments)),
            thread: None,
            timelines,
            timeline_files,
            begin,
            decoder: recovered.decoder,
            flush_lsn: end,
            made_to: 0,
            current: None,
            unsynced: Vec::new(),
        };
        storage.go_on_at_end()?;
        Ok(storage)
    }

    /// Starts the thread that makes segments ahead. Without it they are made when needed. The
    /// thread ends when this is dropped.
    pub fn prepare_in_background(&mut self) -> io::Result<()> {
        let preparation = self.preparation.clone();
        let name = format!("prepare {:x}", self.format.system_id & 0xFFFF);
        let thread = thread::Builder::new().name(name);
        self.thread = Some(thread.spawn(move || preparation.run())?);
        Ok(())
    }

    /// Continues the log with `bytes`, which stand at `begin_lsn` on timeline `tli`. A log must
    /// have been begun by [`WalStorage::truncate`], and `begin_lsn` must be its end.
    pub fn write(&mut self, tli: Tli, begin_lsn: Lsn, bytes: &[u8]) -> Result<(), WriteError> {
        let write_lsn = self.write_lsn();
        assert!(
            self.begin.is_valid() && begin_lsn == write_lsn,
            "WAL from {begin_lsn} does not continue the log, which ends at {write_lsn}"
        );
        if let Some(error) = self.preparation.take_failure() {
            return Err(WriteError::Failed(error));
        }
        if bytes.is_empty() {
            return Ok(());
        }
        if self.timelines.last() != Some(tli) {
            self.turn_to(tli).map_err(refuse_if_no_space)?;
        }
        // Room first: when bytes have been decoded there is no going back without reading.
        let last_byte = begin_lsn + (bytes.len() as u64 - 1);
        self.make_room(tli, last_byte).map_err(refuse_if_no_space)?;
        let before = (self.decoder.record_end(), self.decoder.last_record());
        let (bytes, barriers) = self.decode(bytes)?;
        match self.write_in_order(tli, begin_lsn, &bytes, &barriers) {
            Err(error) if error.is_no_space() => {
                self.step_back(before, begin_lsn)?;
                Err(WriteError::NoSpace(error))
            }
            other => other.map_err(WriteError::Failed),
        }
    }

    /// Takes `bytes` into the decoder, or nothing. Returns them as they are to be written, and the
    /// barriers in them.
    fn decode<'a>(&mut self, bytes: &'a [u8]) -> Result<(Cow<'a, [u8]>, Vec<Lsn>), WriteError> {
        let before = (self.decoder.record_end(), self.decoder.last_record());
        let begin_lsn = self.write_lsn();
        let error = match self.decode_as_they_are(bytes) {
            Ok(barriers) => return Ok((Cow::Borrowed(bytes), barriers)),
            Err(error) => error,
        };
        self.step_back(before, begin_lsn)?;
        if !matches!(error, WalError::Padding { .. }) {
            return Err(WriteError::Damaged(error));
        }
        // Behind a switch record a server that was killed leaves what its recycled file held; its
        // own recovery takes no offence, and it will send the same for ever. Here the zeros that
        // belong there are stored, on every safekeeper the same.
        let mut cleaned = bytes.to_vec();
        let decoded = self.decoder.clone().feed_and_clean(&mut cleaned);
        match decoded.and_then(|()| self.decode_as_they_are(&cleaned)) {
            Ok(barriers) => Ok((Cow::Owned(cleaned), barriers)),
            Err(error) => {
                self.step_back(before, begin_lsn)?;
                Err(WriteError::Damaged(error))
            }
        }
    }

    fn decode_as_they_are(&mut self, bytes: &[u8]) -> Result<Vec<Lsn>, WalError> {
        let (format, begin) = (self.format, self.begin);
        match decode_with_barriers(&mut self.decoder, &format, begin, bytes) {
            (barriers, Err(_)) if is_on(Mutation::DamagedWalTaken) => Ok(barriers),
            (barriers, decoded) => decoded.map(|()| barriers),
        }
    }

    /// Writes `bytes`, and makes durable what is below a barrier before it writes what is above.
    fn write_in_order(
        &mut self,
        tli: Tli,
        begin_lsn: Lsn,
        bytes: &[u8],
        barriers: &[Lsn],
    ) -> Result<(), StorageError> {
        let (mut lsn, mut rest) = (begin_lsn, bytes);
        for barrier in barriers {
            let len = barrier.saturating_distance_from(lsn);
            let (part, after) = rest.split_at(len as usize);
            self.write_decoded(tli, lsn, part)?;
            self.sync()?;
            (lsn, rest) = (lsn + len, after);
        }
        self.write_decoded(tli, lsn, rest)
    }

    /// Makes durable what was written, and returns the new `flush_lsn`. After an error nothing may
    /// be flushed again: the process must end.
    pub fn flush(&mut self) -> Result<Lsn, StorageError> {
        if let Some(error) = self.preparation.take_failure() {
            return Err(error);
        }
        self.sync()?;
        self.flush_lsn = if is_on(Mutation::FlushLsnInsideRecord) {
            self.decoder.position()
        } else {
            self.decoder.record_end()
        };
        Ok(self.flush_lsn)
    }

    fn sync(&mut self) -> Result<(), StorageError> {
        for file in self.unsynced.drain(..) {
            sync_wal(file.as_ref())?;
        }
        if let Some(current) = self.current.as_mut().filter(|current| current.dirty) {
            sync_wal(current.file.as_ref())?;
            current.dirty = false;
        }
        Ok(())
    }

    /// Ends the log at `end_lsn`, from where it goes on on timeline `tli`: durably, with nothing
    /// behind it that could come back.
    ///
    /// `end_lsn` is the end of a record of the log. Where the log holds no whole record, it is the
    /// start of any segment, and the log begins there.
    pub fn truncate(&mut self, tli: Tli, end_lsn: Lsn) -> Result<(), TruncateError> {
        self.flush().map_err(TruncateError::Failed)?;
        let within = self.begin.is_valid() && self.begin < end_lsn && end_lsn <= self.flush_lsn;
        if !within {
            let holds_records = self.begin.is_valid() && self.begin < self.flush_lsn;
            if holds_records && end_lsn != self.begin {
                return Err(TruncateError::Refused {
                    end_lsn,
                    problem: "it is outside the log",
                });
            }
            return self.begin_at(tli, end_lsn);
        }
        let last_record = self.last_record_at(end_lsn)?;
        self.cut_at(end_lsn, last_record)
            .map_err(TruncateError::Failed)
    }

    /// Replaces the timeline history files by `files`, newest first, and removes those of
    /// timelines that are not among them, their ancestors, or in the log.
    pub fn replace_timeline_files(&mut self, files: &[TimelineFile]) -> Result<(), StorageError> {
        self.timeline_files.replace(files, &self.timelines)?;
        self.expect_timelines();
        Ok(())
    }

    /// The timeline history files, newest first.
    pub fn timeline_files(&self) -> Result<Vec<TimelineFile>, StorageError> {
        self.timeline_files.read_all()
    }

    /// Removes whole segments below `lsn`, which must not be above the cluster's `commit_lsn`: a
    /// few, the oldest first. True if there are more. What recovery needs is kept. Takes no space.
    pub fn remove_before(&mut self, lsn: Lsn) -> Result<bool, StorageError> {
        let size = self.segments().size();
        let limit = lsn.min(self.flush_lsn);
        let mut keep = limit.segno(size);
        // The log must not begin with nothing but the rest of a record: where that ends could not
        // be told from a torn write. See `LogReader::decode_to_end`.
        while keep > self.begin.segno(size) && self.leading_rest_end(keep)? >= limit {
            keep -= 1;
        }
        if !self.begin.is_valid() || keep <= self.begin.segno(size) {
            return Ok(false);
        }
        let mut doomed = self.segments().list()?;
        doomed.retain(|id| id.segno < keep);
        // A segment may have files of several timelines; they go together.
        let kept_now = match (doomed.first(), doomed.get(REMOVED_AT_ONCE_MAX)) {
            (Some(first), Some(next)) => next.segno.max(first.segno + 1),
            _ => keep,
        };
        // Oldest first, and durably one by one: the persisted commit_lsn may lie in one of them,
        // and recovery tells WAL that was removed from WAL that is missing by its being oldest.
        for id in doomed {
            if id.segno < kept_now {
                self.preparation.recycle(id)?;
                self.segments().disk().sync_dir(self.segments().dir())?;
            }
        }
        self.begin = self.begin.max(self.segments().start(kept_now));
        Ok(kept_now < keep)
    }

    pub fn write_lsn(&self) -> Lsn {
        self.decoder.position()
    }

    pub fn flush_lsn(&self) -> Lsn {
        self.flush_lsn
    }

    /// Start of the first segment kept.
    pub fn oldest_lsn(&self) -> Lsn {
        self.begin
    }

    pub fn format(&self) -> WalFormat {
        self.format
    }

    fn segments(&self) -> &SegmentDir {
        self.preparation.segments()
    }

    /// Runs `with` on what reads this log's files.
    fn with_log<T>(&self, with: impl FnOnce(&LogReader<'_>) -> T) -> T {
        let expected = self.timeline_files.expected(&self.timelines);
        with(&LogReader::new(
            self.segments(),
            self.format,
            &self.timelines,
            &expected,
        ))
    }

    fn expect_timelines(&mut self) {
        let expected: TimelineHistory = self.timeline_files.expected(&self.timelines);
        self.decoder.expect_timelines(expected);
    }

    /// The log goes on on another timeline from its end on.
    fn turn_to(&mut self, tli: Tli) -> Result<(), StorageError> {
        let lsn = self.write_lsn();
        let size = self.segments().size();
        self.preparation.forget()?;
        let (segno, offset) = (lsn.segno(size), lsn.segment_offset(size));
        if offset > 0 {
            // The copy is durable when it has its name, and recovery would find the log's end by it;
            // but while nothing of the new timeline stands behind the switch, it drops the copy and
            // keeps the original. So that one must be durable before.
            self.sync()?;
            let old = self.with_log(|log| log.reader().find(segno))?;
            let old = old.expect("the segment of the log's last byte is there");
            let source = self.segments().open(old)?;
            let tmp = self.segments().dir().join("copy.tmp");
            let segments = self.segments();
            segments.make_copy(&tmp, source.as_ref(), offset)?;
            segments.install(&tmp, SegmentId { segno, tli })?;
        }
        self.leave_current();
        self.timelines.go_on(tli, lsn);
        self.expect_timelines();
        self.go_on_at_end()
    }

    /// Makes sure of every segment up to the one of `last_byte`.
    fn make_room(&mut self, tli: Tli, last_byte: Lsn) -> Result<(), StorageError> {
        while self.made_to <= last_byte.segno(self.segments().size()) {
            let segno = self.made_to;
            self.preparation.enter(SegmentId { segno, tli })?;
            self.made_to += 1;
        }
        Ok(())
    }

    fn write_decoded(&mut self, tli: Tli, lsn: Lsn, bytes: &[u8]) -> Result<(), StorageError> {
        let size = self.segments().size();
        let (mut lsn, mut rest) = (lsn, bytes);
        while !rest.is_empty() {
            let (segno, offset) = (lsn.segno(size), lsn.segment_offset(size));
            let (part, after) = rest.split_at(rest.len().min((size - offset) as usize));
            let current = self.segment(SegmentId { segno, tli })?;
            // Before the write: one that fails may have written a part.
            current.dirty = true;
            current.file.write_at(part, offset.into())?;
            (lsn, rest) = (lsn + part.len() as u64, after);
        }
        Ok(())
    }

    fn segment(&mut self, id: SegmentId) -> Result<&mut CurrentSegment, StorageError> {
        if self.current.as_ref().is_none_or(|c| c.segno != id.segno) {
            let file = self.segments().open(id)?;
            self.leave_current();
            let segno = id.segno;
            self.current = Some(CurrentSegment {
                segno,
                file,
                dirty: false,
            });
        }
        Ok(self.current.as_mut().expect("it was just made so"))
    }

    fn leave_current(&mut self) {
        if let Some(current) = self.current.take().filter(|current| current.dirty) {
            self.unsynced.push(current.file);
        }
    }

    /// Brings the decoder back to `write_lsn`, where it stood with this record behind it before it
    /// took bytes that were not written.
    fn step_back(
        &mut self,
        (record_end, last_record): (Lsn, Option<Lsn>),
        write_lsn: Lsn,
    ) -> Result<(), WriteError> {
        let begins_here = record_end == self.begin && last_record.is_none();
        let decoder = self.with_log(|log| {
            let mut decoder = if begins_here {
                log.decoder_at(record_end)
            } else {
                log.decoder_after(record_end, last_record)
            };
            let mut reader = log.reader();
            let mut buffer = vec![0; READ_SIZE];
            while decoder.position() < write_lsn {
                let lsn = decoder.position();
                let left = usize::try_from(write_lsn - lsn).unwrap_or(usize::MAX);
                let len = reader.read(lsn, &mut buffer[..left.min(READ_SIZE)])?;
                let sound = decoder.feed(&buffer[..len]);
                if len == 0 || sound.is_err() {
                    return Err(self.lost_bytes(lsn));
                }
            }
            Ok(decoder)
        });
        self.decoder = decoder.map_err(WriteError::Failed)?;
        Ok(())
    }

    /// What we wrote ourselves does not read back.
    fn lost_bytes(&self, lsn: Lsn) -> StorageError {
        let segno = lsn.segno(self.segments().size());
        let tli = self.timelines.last().unwrap_or(Tli(1));
        StorageError {
            doing: "read back",
            path: self.segments().path(SegmentId { segno, tli }),
            source: io::ErrorKind::InvalidData.into(),
        }
    }

    /// Start of the record that ends at `end_lsn`, if it can be known; refuses what is not
    /// a place between records.
    fn last_record_at(&self, end_lsn: Lsn) -> Result<Option<Lsn>, TruncateError> {
        if end_lsn == self.flush_lsn {
            return Ok(self.decoder.last_record());
        }
        let boundary = self.with_log(|log| log.boundary(end_lsn, self.flush_lsn));
        match boundary.map_err(TruncateError::Failed)? {
            Some(last_record) => Ok(Some(last_record)),
            None => Err(TruncateError::Refused {
                end_lsn,
                problem: "it is not the end of a record",
            }),
        }
    }

    fn cut_at(&mut self, end_lsn: Lsn, last_record: Option<Lsn>) -> Result<(), StorageError> {
        self.preparation.forget()?;
        self.current = None;
        self.timelines.cut(end_lsn);
        self.with_log(|log| recovery::cut(log, self.begin, end_lsn))?;
        self.decoder = self.with_log(|log| log.decoder_after(end_lsn, last_record));
        self.flush_lsn = end_lsn;
        self.go_on_at_end()
    }

    /// The log begins at `begin`, and is empty.
    fn begin_at(&mut self, tli: Tli, begin: Lsn) -> Result<(), TruncateError> {
        let size = self.segments().size();
        if !begin.is_valid() || begin.segment_offset(size) != 0 {
            return Err(TruncateError::Refused {
                end_lsn: begin,
                problem: "a log begins at the start of a segment",
            });
        }
        let id = SegmentId {
            segno: begin.segno(size),
            tli,
        };
        self.make_first(id).map_err(|error| match error {
            error if error.is_no_space() => TruncateError::NoSpace(error),
            error => TruncateError::Failed(error),
        })?;
        self.current = None;
        self.timelines = Timelines::default();
        self.timelines.go_on(tli, begin);
        self.remove_all_but(id).map_err(TruncateError::Failed)?;
        self.begin = begin;
        self.decoder = self.with_log(|log| log.decoder_at(begin));
        self.flush_lsn = begin;
        self.go_on_at_end().map_err(TruncateError::Failed)
    }

    fn make_first(&mut self, id: SegmentId) -> Result<(), StorageError> {
        self.preparation.forget()?;
        if self
            .segments()
            .disk()
            .file_id(&self.segments().path(id))?
            .is_some()
        {
            return self.segments().zero_tail(id, 0);
        }
        let tmp = self.segments().dir().join("first.tmp");
        self.segments().make_zeroed(&tmp)?;
        self.segments().install(&tmp, id)
    }

    fn remove_all_but(&self, kept: SegmentId) -> Result<(), StorageError> {
        for id in self.segments().list()?.into_iter().rev() {
            if id != kept {
                self.segments().disk().remove(&self.segments().path(id))?;
            }
        }
        self.segments().disk().sync_dir(self.segments().dir())
    }

    /// Sees to it that segments are made ahead of the log's end.
    fn go_on_at_end(&mut self) -> Result<(), StorageError> {
        let size = self.segments().size();
        let end = self.write_lsn();
        let (Some(tli), true) = (self.timelines.last(), self.begin.is_valid()) else {
            return Ok(());
        };
        // An end inside a segment is an end in a segment that is there.
        let mut next = SegmentId {
            segno: end.segno(size),
            tli,
        };
        let path = self.segments().path(next);
        if end.segment_offset(size) > 0 || self.segments().disk().file_id(&path)?.is_some() {
            next.segno += 1;
        }
        self.made_to = next.segno;
        self.preparation.go_on_at(next);
        Ok(())
    }

    /// End of the record with whose rest segment `segno` begins; the segment's start if it begins
    /// with a record of its own, and the end of all WAL if its first page can't be read.
    fn leading_rest_end(&self, segno: SegNo) -> Result<Lsn, StorageError> {
        let start = self.segments().start(segno);
        let rest_end = self.with_log(|log| log.leading_rest_end(start))?;
        Ok(rest_end.unwrap_or(Lsn(u64::MAX)))
    }
}

impl Drop for WalStorage {
    fn drop(&mut self) {
        self.preparation.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported where it happened.
            let _ = thread.join();
        }
    }
}

fn sync_wal(file: &dyn DiskFile) -> Result<(), StorageError> {
    if is_on(Mutation::AnswerBeforeFsync) {
        return Ok(());
    }
    match file.sync_data() {
        Err(_) if is_on(Mutation::FsyncErrorIgnored) => Ok(()),
        synced => synced,
    }
}

fn refuse_if_no_space(error: StorageError) -> WriteError {
    match error {
        error if error.is_no_space() => WriteError::NoSpace(error),
        error => WriteError::Failed(error),
    }
}

/// Files removed by one call. Each takes a sync of the directory, and meanwhile nobody can write.
const REMOVED_AT_ONCE_MAX: usize = 8;

/// A record that has arrived in part is rarely longer.
const READ_SIZE: usize = 128 << 10;

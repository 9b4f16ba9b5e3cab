//! Appending to the local log what the quorum holds of it and the local disk has lost (design §7.1).
//!
//! ```text
//!   local    ...────────┤ end
//!   donor    ...────────┴──────────┤ end
//!                       └ appended ┘   decoded as it comes, written, fsynced
//! ```
//!
//! It happens before recovery, in files that recovery will read next. A segment that is not there
//! is made as Postgres makes one: zeroed and fsynced under another name, then renamed. If the donor
//! fails, the log ends with the last whole record that has come, which is our own WAL like all of it.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use safekeeper_protocol::{Completed, Lsn, Tli};
use safekeeper_wal::{SegNo, WalDecoder, WalFormat, segment_file_name};

use crate::donor::{Donor, DonorEvent};

/// While a segment is made it has this name, which Postgres takes for nothing.
const NEW_SEGMENT: &str = "walproposer.new";

pub struct Completion {
    donor: Donor,
    pg_wal: PathBuf,
    format: WalFormat,
    tli: Tli,
    missing: Range<Lsn>,
    decoder: WalDecoder,
    open: Option<(SegNo, File)>,
}

/// What came of looking at a completion.
#[derive(Debug)]
pub enum CompletionEvent {
    /// Still going on.
    Nothing,
    Ended(Completed),
    /// The local disk has failed.
    Failed(String),
}

impl Completion {
    /// `donor` reads `missing`; `last_record` is the start of the record before it, if it is known.
    pub fn new(
        donor: Donor,
        pg_wal: &Path,
        format: WalFormat,
        tli: Tli,
        missing: Range<Lsn>,
        last_record: Option<Lsn>,
    ) -> Completion {
        Completion {
            donor,
            pg_wal: pg_wal.to_owned(),
            format,
            tli,
            decoder: WalDecoder::after_record(format, missing.start, last_record),
            missing,
            open: None,
        }
    }

    pub fn poll(&mut self) -> CompletionEvent {
        while let Some(event) = self.donor.poll() {
            match event {
                DonorEvent::Chunk { begin_lsn, wal } => {
                    // First, so that all that the decoder will have counted is there. What is
                    // damaged lies behind the last whole record, and is written over.
                    if let Err(error) = self.append(begin_lsn, &wal) {
                        return CompletionEvent::Failed(format!(
                            "could not complete the local WAL at {begin_lsn}: {error}"
                        ));
                    }
                    if let Err(error) = self.decoder.feed(&wal) {
                        return self.stop(format!("donor's WAL is damaged: {error}"));
                    }
                }
                DonorEvent::Done => return self.finish(),
                DonorEvent::Removed { oldest_lsn } => {
                    return self.stop(format!("donor keeps WAL from {oldest_lsn} on only"));
                }
                DonorEvent::Failed(reason) => return self.stop(reason),
                DonorEvent::Panicked(text) => return CompletionEvent::Failed(text),
            }
        }
        CompletionEvent::Nothing
    }

    /// Bytes by which the local log has become longer.
    pub fn appended(&self, outcome: &Completed) -> u64 {
        let end_lsn = match outcome {
            Completed::Whole => self.missing.end,
            Completed::Partly { end_lsn, .. } => *end_lsn,
        };
        end_lsn.saturating_distance_from(self.missing.start)
    }

    fn finish(&mut self) -> CompletionEvent {
        if self.decoder.record_end() != self.missing.end {
            let end_lsn = self.decoder.record_end();
            return self.stop(format!("donor's WAL ends within a record behind {end_lsn}"));
        }
        match self.sync() {
            Ok(()) => CompletionEvent::Ended(Completed::Whole),
            Err(error) => failed_sync(&error),
        }
    }

    fn stop(&mut self, reason: String) -> CompletionEvent {
        let end_lsn = self.decoder.record_end();
        match self.sync() {
            Ok(()) => CompletionEvent::Ended(Completed::Partly { end_lsn, reason }),
            Err(error) => failed_sync(&error),
        }
    }

    fn append(&mut self, begin_lsn: Lsn, wal: &[u8]) -> io::Result<()> {
        let size = self.format.segment_size.bytes();
        let (mut lsn, mut rest) = (begin_lsn, wal);
        while !rest.is_empty() {
            let offset = lsn.segment_offset(size);
            let (now, later) = rest.split_at(rest.len().min((size - offset) as usize));
            let file = self.segment(lsn.segno(size))?;
            file.write_all_at(now, u64::from(offset))?;
            (lsn, rest) = (lsn + now.len() as u64, later);
        }
        Ok(())
    }

    fn segment(&mut self, segno: SegNo) -> io::Result<&File> {
        if self.open.as_ref().is_none_or(|(open, _)| *open != segno) {
            self.sync()?;
            let name = segment_file_name(self.tli.0, segno, self.format.segment_size);
            let path = self.pg_wal.join(name);
            let file = match OpenOptions::new().read(true).write(true).open(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => self.make_segment(&path)?,
                opened => opened?,
            };
            self.open = Some((segno, file));
        }
        let (_, file) = self.open.as_ref().expect("opened above");
        Ok(file)
    }

    fn make_segment(&self, path: &Path) -> io::Result<File> {
        let new = self.pg_wal.join(NEW_SEGMENT);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        let zeros = vec![0; 1 << 20];
        let size = u64::from(self.format.segment_size.bytes());
        for at in (0..size).step_by(zeros.len()) {
            file.write_all_at(&zeros, at)?;
        }
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        self.sync_directory()?;
        Ok(file)
    }

    /// What was written is on stable storage.
    fn sync(&mut self) -> io::Result<()> {
        match self.open.take() {
            Some((_, file)) => file.sync_all(),
            None => Ok(()),
        }
    }

    fn sync_directory(&self) -> io::Result<()> {
        File::open(&self.pg_wal)?.sync_all()
    }
}

fn failed_sync(error: &io::Error) -> CompletionEvent {
    CompletionEvent::Failed(format!("could not fsync the completed WAL: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::unbounded;
    use safekeeper_wal::synthetic::WalBuilder;
    use safekeeper_wal::{PgVersion, SegmentSize};

    const START: Lsn = Lsn(3 << 20);

    fn format() -> WalFormat {
        WalFormat {
            version: PgVersion::V15,
            segment_size: SegmentSize::new(1 << 20).expect("a legal size"),
            system_id: 7,
        }
    }

    /// What the local log has of `wal`, up to `end`.
    fn local(dir: &Path, wal: &WalBuilder, end: Lsn) -> Vec<u8> {
        let read = |segno: u64| {
            let name = segment_file_name(1, segno, format().segment_size);
            std::fs::read(dir.join(name)).unwrap_or_default()
        };
        let mut bytes: Vec<u8> = (3..=end.0 >> 20).flat_map(read).collect();
        bytes.truncate((end - wal.start()) as usize);
        bytes
    }

    #[test]
    fn what_is_counted_is_there_though_the_chunk_is_damaged() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut wal = WalBuilder::new(format(), 1, START);
        wal.noop(100);
        let whole = wal.noop(1_500_000);
        let torn = wal.noop(5_000);
        wal.noop(10);
        let (end, mut sent) = (wal.position(), wal.bytes().to_vec());
        sent[(torn.start_lsn - START) as usize + 3_000] ^= 1;
        let begin = |wal: Vec<u8>, missing: Range<Lsn>| {
            let (sender, events) = unbounded();
            let begin_lsn = missing.start;
            sender
                .send(DonorEvent::Chunk { begin_lsn, wal })
                .expect("received");
            sender.send(DonorEvent::Done).expect("received");
            let donor = Donor::that_says(events);
            Completion::new(donor, dir.path(), format(), Tli(1), missing, None)
        };
        let mut completion = begin(sent, START..end);
        let CompletionEvent::Ended(Completed::Partly { end_lsn, .. }) = completion.poll() else {
            panic!("damage went unnoticed");
        };
        assert_eq!(end_lsn, whole.end_lsn);
        let expected = &wal.bytes()[..(end_lsn - START) as usize];
        assert_eq!(local(dir.path(), &wal, end_lsn), expected);

        // Another donor goes on from there.
        let mut completion = begin(wal.bytes_from(end_lsn).to_vec(), end_lsn..end);
        let ended = completion.poll();
        assert!(
            matches!(ended, CompletionEvent::Ended(Completed::Whole)),
            "{ended:?}"
        );
        assert_eq!(local(dir.path(), &wal, end), wal.bytes());
    }
}

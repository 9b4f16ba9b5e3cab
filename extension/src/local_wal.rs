//! Local WAL by position: the one place the pusher reads it from.
//!
//! ```text
//!   oldest in pg_wal            written            inserted
//!   ──────┬────────────────────────┬───────────────────┬────────►  LSN
//!         │  files (wal_source.rs) │ the server's      │  not yet
//!         │                        │ buffers           │
//! ```
//!
//! The two overlap: a page stays in the buffers until its room is needed, so these are asked first.
//! A page leaves them only when it is written, hence what is not there is in a file; and in the page
//! cache, as it is young.
//!
//! WAL that was inserted is final: what was read last is kept, since the other members are to be sent
//! the same. So it is read once, and sent from where it was read to.
//!
//! A caller never asks beyond what is inserted. Postgres is not called from here.

use safekeeper_protocol::{Append, Lsn};

use crate::wal_source::{WalRead, WalSource};

/// WAL that may not be written yet.
pub trait RecentWal {
    /// Copies WAL from `lsn` on, and returns how many bytes of `out` it could fill: 0 if the page of
    /// `lsn` is not there any more. Below what is inserted.
    fn read(&self, lsn: Lsn, out: &mut [u8]) -> usize;

    /// Below this WAL is in files.
    fn written_lsn(&self) -> Lsn;
}

/// How many bytes came from where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origins {
    pub buffers: u64,
    pub files: u64,
}

pub struct WalReader<R> {
    /// None: from files only.
    pub buffers: Option<R>,
    pub files: WalSource,
    /// What is written is read from files, though it may still be in the buffers.
    pub prefers_files: bool,
    /// What was read last: WAL from `begin_lsn` on.
    chunk: Vec<u8>,
    begin_lsn: Lsn,
    /// Where it came from: ends of stretches, ascending, and whether that was the buffers.
    origins: Vec<(Lsn, bool)>,
}

impl<R: RecentWal> WalReader<R> {
    pub fn new(buffers: Option<R>, files: WalSource) -> WalReader<R> {
        WalReader {
            buffers,
            files,
            prefers_files: false,
            chunk: Vec::new(),
            begin_lsn: Lsn::INVALID,
            origins: Vec::new(),
        }
    }

    /// Is WAL from `lsn` on to be had here now? What is not in the files yet is in the buffers.
    pub fn has(&mut self, lsn: Lsn) -> Result<bool, String> {
        if let Some(buffers) = &self.buffers
            && lsn >= buffers.written_lsn()
        {
            return Ok(true);
        }
        self.files.has(lsn).map_err(|error| error.to_string())
    }

    /// `len` bytes of WAL from `lsn` on, at most [`Append::LEN_MAX`]. Fails if it has left `pg_wal`
    /// meanwhile.
    pub fn read(&mut self, lsn: Lsn, len: u32) -> Result<(&[u8], Origins), String> {
        let end_lsn = lsn + u64::from(len.min(Append::LEN_MAX));
        if lsn < self.begin_lsn || end_lsn > self.end_lsn() {
            self.fill(lsn, end_lsn)?;
        }
        let from = (lsn.0 - self.begin_lsn.0) as usize;
        let to = (end_lsn.0 - self.begin_lsn.0) as usize;
        Ok((&self.chunk[from..to], self.origins_of(lsn, end_lsn)))
    }

    fn end_lsn(&self) -> Lsn {
        self.begin_lsn + self.chunk.len() as u64
    }

    fn fill(&mut self, begin_lsn: Lsn, end_lsn: Lsn) -> Result<(), String> {
        let mut chunk = std::mem::take(&mut self.chunk);
        self.origins.clear();
        // What is there is written over, so only what is new is zeroed first.
        chunk.resize((end_lsn.0 - begin_lsn.0) as usize, 0);
        let mut lsn = begin_lsn;
        while lsn < end_lsn {
            let rest = &mut chunk[(lsn.0 - begin_lsn.0) as usize..];
            let copied = match &self.buffers {
                Some(buffers) if !self.prefers_files || lsn >= buffers.written_lsn() => {
                    buffers.read(lsn, rest)
                }
                _ => 0,
            };
            let from_buffers = copied > 0;
            lsn = match from_buffers {
                true => lsn + copied as u64,
                false => self.read_files(lsn, end_lsn, rest)?,
            };
            self.origins.push((lsn, from_buffers));
        }
        self.chunk = chunk;
        self.begin_lsn = begin_lsn;
        Ok(())
    }

    /// Returns how far it has come: what is not written yet must be in the buffers.
    fn read_files(&mut self, lsn: Lsn, end_lsn: Lsn, out: &mut [u8]) -> Result<Lsn, String> {
        let written_lsn = match &self.buffers {
            Some(buffers) => buffers.written_lsn().min(end_lsn),
            None => end_lsn,
        };
        if written_lsn <= lsn {
            return Err(format!(
                "WAL from {lsn} on is neither in the WAL buffers nor written"
            ));
        }
        let out = &mut out[..(written_lsn.0 - lsn.0) as usize];
        match self.files.read(lsn, out) {
            Ok(WalRead::Filled) => Ok(written_lsn),
            Ok(WalRead::Gone) => Err(format!("WAL from {lsn} on was removed meanwhile")),
            Err(error) => Err(error.to_string()),
        }
    }

    fn origins_of(&self, lsn: Lsn, end_lsn: Lsn) -> Origins {
        let mut origins = Origins::default();
        let mut begin_lsn = self.begin_lsn;
        for &(stretch_end_lsn, from_buffers) in &self.origins {
            let end = stretch_end_lsn.min(end_lsn);
            let len = end.saturating_distance_from(begin_lsn.max(lsn));
            match from_buffers {
                true => origins.buffers += len,
                false => origins.files += len,
            }
            begin_lsn = stretch_end_lsn;
        }
        origins
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal_source::tests::{BYTES, pg_wal, source};
    use safekeeper_wal::TimelineHistory;
    use std::cell::Cell;

    /// Buffers that hold WAL from `from` on, all bytes `b`; what lies below `written` is in files.
    struct Buffers {
        from: Lsn,
        written: Lsn,
        reads: Cell<usize>,
        /// After so many bytes of one read the rest has left.
        limit: usize,
    }

    impl RecentWal for Buffers {
        fn read(&self, lsn: Lsn, out: &mut [u8]) -> usize {
            self.reads.set(self.reads.get() + 1);
            if lsn < self.from {
                return 0;
            }
            let len = out.len().min(self.limit);
            out[..len].fill(b'b');
            len
        }
        fn written_lsn(&self) -> Lsn {
            self.written
        }
    }

    /// Segment 2 is in a file, all bytes `f`; the rest of the WAL in buffers.
    fn reader(dir: &tempfile::TempDir, from: u64, written: u64) -> WalReader<Buffers> {
        let buffers = Buffers {
            from: Lsn(from),
            written: Lsn(written),
            reads: Cell::new(0),
            limit: usize::MAX,
        };
        WalReader::new(Some(buffers), source(dir, TimelineHistory::root(1)))
    }

    #[test]
    fn what_has_left_the_buffers_comes_from_files() {
        let dir = pg_wal(&[(1, 2, b'f')]);
        let end = 3 * BYTES;
        let mut reader = reader(&dir, end - 10, end - 10);
        let (wal, origins) = reader.read(Lsn(end - 15), 12).expect("there");
        assert_eq!(wal, b"fffffbbbbbbb");
        let (buffers, files) = (7, 5);
        assert_eq!(origins, Origins { buffers, files });
        // A part of it, for a member that is elsewhere.
        let (wal, origins) = reader.read(Lsn(end - 12), 4).expect("there");
        assert_eq!(wal, b"ffbb");
        let (buffers, files) = (2, 2);
        assert_eq!(origins, Origins { buffers, files });
    }

    #[test]
    fn what_is_sent_to_three_is_read_once() {
        let dir = pg_wal(&[(1, 2, b'f')]);
        let mut reader = reader(&dir, 2 * BYTES, 2 * BYTES);
        for _ in 0..3 {
            assert_eq!(
                reader.read(Lsn(2 * BYTES + 5), 100).expect("there").0,
                [b'b'; 100]
            );
        }
        let buffers = reader.buffers.as_ref().expect("given");
        assert_eq!(buffers.reads.get(), 1);
    }

    #[test]
    fn a_page_that_leaves_in_the_middle_is_fetched_from_its_file() {
        let dir = pg_wal(&[(1, 2, b'f')]);
        let mut reader = reader(&dir, 2 * BYTES, 2 * BYTES + 30);
        reader.buffers.as_mut().expect("given").limit = 10;
        // The first ten bytes were there; the page of the eleventh is gone when it is looked for.
        let buffers = reader.buffers.as_mut().expect("given");
        buffers.from = Lsn(2 * BYTES);
        assert_eq!(
            reader.read(Lsn(2 * BYTES), 25).expect("there").0,
            [b'b'; 25]
        );
        let buffers = reader.buffers.as_mut().expect("given");
        buffers.from = Lsn(2 * BYTES + 30);
        let (wal, _) = reader.read(Lsn(2 * BYTES + 20), 12).expect("there");
        assert_eq!(wal, b"ffffffffffbb");
    }

    #[test]
    fn wal_that_is_nowhere_is_an_error_and_nothing_old_is_handed_out_for_it() {
        let dir = pg_wal(&[(1, 2, b'f')]);
        let mut reader = reader(&dir, 9 * BYTES, 2 * BYTES + 5);
        reader.read(Lsn(2 * BYTES), 5).expect("in the file");
        let error = reader.read(Lsn(2 * BYTES), 6).expect_err("not written");
        assert!(error.contains("neither in the WAL buffers"), "{error}");
        let error = reader.read(Lsn(2 * BYTES + 5), 1).expect_err("not written");
        assert!(error.contains("neither in the WAL buffers"), "{error}");
        assert_eq!(
            reader.read(Lsn(2 * BYTES), 3).expect("in the file").0,
            b"fff"
        );
        let error = reader.read(Lsn(BYTES), 1).expect_err("no such segment");
        assert!(error.contains("was removed"), "{error}");
    }

    #[test]
    fn only_what_is_written_is_looked_for_in_files() {
        let dir = pg_wal(&[(1, 2, b'f')]);
        let mut reader = reader(&dir, 4 * BYTES, 4 * BYTES);
        assert_eq!(reader.has(Lsn(2 * BYTES)), Ok(true));
        assert_eq!(reader.has(Lsn(3 * BYTES)), Ok(false));
        // Its file need not even be there yet.
        assert_eq!(reader.has(Lsn(4 * BYTES)), Ok(true));
        reader.buffers = None;
        assert_eq!(reader.has(Lsn(4 * BYTES)), Ok(false));
    }
}

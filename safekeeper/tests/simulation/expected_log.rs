//! The log as it should be: a vector of bytes, and what is known about them.
//!
//! It makes the WAL itself, of every kind a server makes: short records and long ones, switches to
//! the next segment, records lost in a crash and overwritten, new timelines. What it makes at one
//! place again after a cut is different from what was there.

use std::ops::Range;

use safekeeper_protocol::{Lsn, Tli};
use safekeeper_wal::page::FLAG_REMOVABLE;
use safekeeper_wal::synthetic::WalBuilder;
use safekeeper_wal::{PAGE_SIZE, WalFormat};

use super::random::Random;

#[derive(Debug)]
pub struct ExpectedLog {
    format: WalFormat,
    begin: Lsn,
    bytes: Vec<u8>,
    /// Start and end of each whole record.
    records: Vec<(Lsn, Lsn)>,
    /// What there is of records lost in a crash of the server: no checksum covers it.
    lost: Vec<Range<Lsn>>,
    wal: WalBuilder,
}

impl ExpectedLog {
    pub fn new(format: WalFormat, begin: Lsn) -> ExpectedLog {
        ExpectedLog {
            format,
            begin,
            bytes: Vec::new(),
            records: Vec::new(),
            lost: Vec::new(),
            wal: WalBuilder::new(format, 1, begin),
        }
    }

    pub fn begin(&self) -> Lsn {
        self.begin
    }

    pub fn end(&self) -> Lsn {
        self.begin + self.bytes.len() as u64
    }

    pub fn bytes(&self, range: Range<Lsn>) -> &[u8] {
        let at = |lsn: Lsn| (lsn - self.begin) as usize;
        &self.bytes[at(range.start)..at(range.end)]
    }

    /// Ends of the whole records, in order.
    pub fn record_ends(&self) -> impl Iterator<Item = Lsn> + '_ {
        self.records.iter().map(|(_, end)| *end)
    }

    /// End of the last whole record at or below `lsn`.
    pub fn record_end(&self, lsn: Lsn) -> Lsn {
        let whole = self.records.iter().rev().find(|(_, end)| *end <= lsn);
        whole.map_or(self.begin, |(_, end)| *end)
    }

    /// The end of the zeros at `lsn`: those behind a switch record are there before they come.
    pub fn zeros_end(&self, lsn: Lsn) -> Lsn {
        let rest = self.bytes(lsn..self.end());
        lsn + rest.iter().take_while(|byte| **byte == 0).count() as u64
    }

    /// Nothing would show that these bits of the byte at `lsn` had changed, in a log of which all
    /// below `oldest` was removed.
    pub fn is_unchecked(&self, lsn: Lsn, bits: u8, oldest: Lsn) -> bool {
        let is_rest = |(start, end): &(Lsn, Lsn)| *start < oldest && oldest < *end && lsn < *end;
        let is_flag = lsn.segment_offset(PAGE_SIZE) == 2 && bits == FLAG_REMOVABLE as u8;
        is_flag
            || self.lost.iter().any(|lost| lost.contains(&lsn))
            || self.records.iter().any(is_rest)
    }

    /// Nothing stands behind `end`, a record's, any more.
    pub fn cut(&mut self, end: Lsn) {
        self.records.retain(|(_, record_end)| *record_end <= end);
        self.lost.retain(|lost| lost.end <= end);
        self.bytes.truncate((end - self.begin) as usize);
    }

    /// Goes on from its end on this timeline, with bytes of its own.
    pub fn go_on(&mut self, tli: Tli, random: &mut Random) {
        let last = self.records.last();
        let last_record = last.map_or(Lsn::INVALID, |(start, _)| *start);
        self.wal = WalBuilder::new(self.format, tli.0, self.end()).following(last_record);
        let record = self.wal.noop(random.below(300) as u32 + 8);
        self.take(record.start_lsn, record.end_lsn);
    }

    /// Makes one more record.
    pub fn generate(&mut self, random: &mut Random) {
        let segment_size = self.format.segment_size.bytes();
        let position = self.wal.position();
        let page_rest = PAGE_SIZE - position.segment_offset(PAGE_SIZE);
        let record = match random.below(40) {
            0..=1 => self.wal.noop(random.range(100_000..900_000) as u32),
            2..=4 => self.wal.noop(random.range(5_000..40_000) as u32),
            5 if position.segment_offset(segment_size) != 0 => self.wal.switch(),
            6..=8 if (64..PAGE_SIZE).contains(&page_rest) => {
                let (lost, record) = self.wal.overwritten(30_000, random.below(3) as u32);
                self.lost.push(lost..record.start_lsn);
                record
            }
            _ => self.wal.noop(random.below(700) as u32),
        };
        self.take(record.start_lsn, record.end_lsn);
    }

    /// A record that is long enough to be torn, and lost, and two that are whole.
    pub fn lose_a_record(&mut self) {
        let (lost, record) = self.wal.overwritten(30_000, 0);
        self.lost.push(lost..record.start_lsn);
        self.take(record.start_lsn, record.end_lsn);
        let record = self.wal.noop(100);
        self.take(record.start_lsn, record.end_lsn);
    }

    fn take(&mut self, start: Lsn, end: Lsn) {
        self.records.push((start, end));
        self.bytes.extend(self.wal.take_bytes());
    }
}

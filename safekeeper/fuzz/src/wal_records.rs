//! The WAL decoder on WAL that is sound but for a few bytes.
//!
//! Checksums keep a blind search out of everything that lies behind them. So the input is not WAL
//! but a recipe for it: which records to write, on how many pages, then which bytes to damage.
//!
//! ```text
//!   1  bits 0-1: Postgres's version   bit 2: timelines are known   2  where the log begins
//!   then records, one letter each with its arguments (see Recipe::next_record), up to an END
//!   then damage, 3 bytes each: place 2, what is xor-ed there 1
//! ```
//!
//! Sound WAL must give the records written. One damaged byte must be noticed before the record that
//! holds it is promised. And whatever the damage, the pieces in which WAL comes must not matter, nor
//! whether decoding was interrupted at a record's end; and the decoder allocates nothing.

use std::ops::Range;

use allocation_counter::measure;
use safekeeper_protocol::Lsn;
use safekeeper_wal::page::FLAG_REMOVABLE;
use safekeeper_wal::synthetic::WalBuilder;
use safekeeper_wal::{
    PAGE_SIZE, PgVersion, Record, SegmentSize, TimelineHistory, WalDecoder, WalError, WalFormat,
};

/// A log is not made longer than this, in bytes: enough for a dozen pages of every kind.
const LOG_LEN_MAX: u64 = 96 * 1024;
/// Zeros behind a switch record are all alike, so a log has only a few of them.
const PADDING_LEN_MAX: u64 = 64 * 1024;
/// The log begins within eight pages before the end of this segment.
const SEGMENT_END: Lsn = Lsn(5 << 20);

pub fn check(input: &[u8]) {
    let mut recipe = Recipe(input);
    let log = recipe.log();
    let decoded = log.decode(&log.bytes, usize::MAX);
    assert_eq!(decoded.result, Ok(()));
    assert_eq!(decoded.records, log.records);
    check_pieces(&log, &log.bytes, &decoded);

    let mut bytes = log.bytes.clone();
    let mut places = Vec::new();
    while let Some((at, xor)) = recipe.next_damage(&log) {
        bytes[at] ^= xor;
        places.push(at);
    }
    let decoded = log.decode(&bytes, usize::MAX);
    check_pieces(&log, &bytes, &decoded);
    if let [at] = places[..]
        && bytes[at] != log.bytes[at]
        && log.tli_is_known
    {
        check_noticed(&log, at, bytes[at] ^ log.bytes[at], &decoded);
    }
}

struct Log {
    format: WalFormat,
    tli_is_known: bool,
    start: Lsn,
    bytes: Vec<u8>,
    records: Vec<Record>,
    /// Places of records lost in a crash, of which only what stands in page headers is checked.
    lost: Vec<Range<Lsn>>,
}

#[derive(Debug, PartialEq)]
struct Decoded {
    records: Vec<Record>,
    result: Result<(), WalError>,
    position: Lsn,
    record_end: Lsn,
    last_record: Option<Lsn>,
}

impl Log {
    fn decoder(&self, at: Lsn, last_record: Option<Lsn>) -> WalDecoder {
        let mut decoder = WalDecoder::after_record(self.format, at, last_record);
        if self.tli_is_known {
            decoder.expect_timelines(TimelineHistory::root(1));
        }
        decoder
    }

    fn decode(&self, bytes: &[u8], piece: usize) -> Decoded {
        decode(self.decoder(self.start, None), bytes, piece)
    }
}

fn decode(mut decoder: WalDecoder, bytes: &[u8], piece: usize) -> Decoded {
    let mut records = Vec::new();
    let mut result = Ok(());
    for piece in bytes.chunks(piece.min(bytes.len().max(1))) {
        result = decoder.feed_with(piece, |record| records.push(*record));
        assert!(decoder.record_end() <= decoder.position());
        if result.is_err() {
            assert_eq!(decoder.feed(&[]), result, "an error stays");
            break;
        }
    }
    Decoded {
        records,
        result,
        position: decoder.position(),
        record_end: decoder.record_end(),
        last_record: decoder.last_record(),
    }
}

/// The same whatever the pieces, whether interrupted or not; and without the heap.
fn check_pieces(log: &Log, bytes: &[u8], whole: &Decoded) {
    for piece in [1 + bytes.len() % 61, PAGE_SIZE as usize] {
        assert_eq!(log.decode(bytes, piece), *whole, "in pieces of {piece}");
    }
    // Unless the timelines are known, a page is only compared with the one before it, and a decoder
    // that begins between the two can't do that.
    if log.tli_is_known && !whole.records.is_empty() {
        let i = whole.records.len() / 2;
        let at = whole.records[i];
        let decoder = log.decoder(at.end_lsn, Some(at.start_lsn));
        let rest = decode(decoder, &bytes[(at.end_lsn - log.start) as usize..], 5000);
        assert_eq!(rest.records, whole.records[i + 1..]);
        assert_eq!(rest.result, whole.result);
        assert_eq!(rest.record_end, whole.record_end);
    }
    let mut decoder = log.decoder(log.start, None);
    let n_allocations = measure(|| drop(decoder.feed(bytes))).count_total;
    assert_eq!(n_allocations, 0);
}

/// One byte is wrong: no record that holds it, or stands behind it, may be believed.
fn check_noticed(log: &Log, at: usize, xor: u8, decoded: &Decoded) {
    let lsn = log.start + at as u64;
    let believed = decoded.records.iter().any(|record| record.end_lsn > lsn);
    // Nobody acts upon the one, nobody will ever read the other.
    let removable_flag = lsn.0 % u64::from(PAGE_SIZE) == 2 && u16::from(xor) == FLAG_REMOVABLE;
    let of_lost_record = log.lost.iter().any(|lost| lost.contains(&lsn));
    assert!(
        !believed || removable_flag || of_lost_record,
        "{xor:#04x} at {lsn} went unnoticed"
    );
}

/// The bytes of the input that are still to be read.
struct Recipe<'a>(&'a [u8]);

impl Recipe<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*byte)
    }

    fn log(&mut self) -> Log {
        let flags = self.byte().unwrap_or(0);
        let format = WalFormat {
            version: PgVersion::ALL[usize::from(flags & 3)],
            segment_size: SegmentSize::MIN,
            system_id: 0x1234_5678_9ABC_DEF0,
        };
        let (pages, offset) = (self.byte().unwrap_or(0), self.byte().unwrap_or(0));
        // At the start of a page, or anywhere behind its header.
        let offset = match u64::from(offset) * 32 {
            0 => 0,
            offset => offset.max(40),
        };
        let page = SEGMENT_END.0 - u64::from(PAGE_SIZE) * (1 + u64::from(pages % 8));
        let mut log = Log {
            format,
            tli_is_known: flags & 4 != 0,
            start: Lsn(page + offset),
            bytes: Vec::new(),
            records: Vec::new(),
            lost: Vec::new(),
        };
        let mut wal = WalBuilder::new(format, 1, log.start);
        let mut tli = 1;
        while wal.position() - log.start < LOG_LEN_MAX
            && let Some(record) = self.next_record(&mut wal, &mut log, &mut tli)
        {
            log.records.push(record);
        }
        log.bytes = wal.take_bytes();
        log
    }

    /// None at the end of the records.
    fn next_record(
        &mut self,
        wal: &mut WalBuilder,
        log: &mut Log,
        tli: &mut u32,
    ) -> Option<Record> {
        let (kind, argument) = (self.byte()?, self.byte()?);
        Some(match kind {
            b'n' => wal.noop(argument.into()),
            b'N' => wal.noop(u32::from(argument) * 80),
            // One with a resource manager of its own: those from 22 to 127 are nobody's.
            b'r' => wal.record(argument | 0x80, argument, 7, &[argument; 5]),
            b'b' => wal.record(1 + argument % 21, argument, 8, &[]),
            b'e' => {
                let page = wal.position().0 / u64::from(PAGE_SIZE) + 2 + u64::from(argument % 2);
                wal.record_ending_at(Lsn(page * u64::from(PAGE_SIZE)))
            }
            b'o' => {
                let (lost, record) = wal.overwritten(30_000, u32::from(argument % 3));
                log.lost
                    .push(lost..record.start_lsn.segment_start(PAGE_SIZE));
                record
            }
            b's' => {
                let size = log.format.segment_size.bytes();
                let offset = wal.position().segment_offset(size);
                let padding = u64::from(size - offset);
                if offset == 0 || padding > PADDING_LEN_MAX {
                    return self.next_record(wal, log, tli);
                }
                wal.switch()
            }
            b't' => {
                if !log.tli_is_known {
                    *tli += 1 + u32::from(argument);
                    wal.set_tli(*tli);
                }
                return self.next_record(wal, log, tli);
            }
            _ => return None,
        })
    }

    /// A place in the log and what to xor there; aimed at the headers of pages and records, since
    /// the bodies are all alike.
    fn next_damage(&mut self, log: &Log) -> Option<(usize, u8)> {
        let (what, offset, xor) = (self.byte()?, self.byte()?, self.byte()?);
        let n = usize::from(what >> 2);
        let at = match what & 3 {
            0 => {
                let to_page = (log.start.0 as usize).wrapping_neg() % PAGE_SIZE as usize;
                to_page + n * PAGE_SIZE as usize + usize::from(offset) % 40
            }
            1 => {
                let record = log.records.get(n)?;
                (record.start_lsn - log.start) as usize + usize::from(offset) % 32
            }
            2 => {
                let record = log.records.get(n)?;
                ((record.end_lsn - log.start) as usize).checked_sub(1 + usize::from(offset) % 16)?
            }
            _ => usize::from(what) * 256 + usize::from(offset),
        };
        (at < log.bytes.len()).then_some((at, xor))
    }
}

/// Recipes with every kind of record, sound and damaged.
pub fn seeds() -> Vec<Vec<u8>> {
    [
        &b"\x04\x01\x00n\x03n\x96N\x65n\x00e\x00o\x00n\x20"[..],
        b"\x04\x00\x10n\x03s\x00n\x00N\xFF.\x00",
        b"\x00\x02\x00n\x01t\x01N\xC8r\x82b\x03t\x00N\xC8",
        b"\x05\x03\x80o\x02o\x01e\x01n\x08.\x00\x00\x02\x04",
        b"\x06\x00\x00e\x00n\x10n\x20.\x00\x05\x05\x80",
        b"\x07\x01\xF0N\x30n\x10n\x11.\x00\x06\x01\x01\x01\x08\xFF",
    ]
    .map(<[u8]>::to_vec)
    .to_vec()
}

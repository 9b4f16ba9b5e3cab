//! WAL made to order, for tests: the decoder's counterpart, which writes what a server would.
//!
//! ```
//! use safekeeper_protocol::Lsn;
//! use safekeeper_wal::synthetic::WalBuilder;
//! use safekeeper_wal::{PgVersion, SegmentSize, WalDecoder, WalFormat};
//!
//! let format = WalFormat { version: PgVersion::V15, segment_size: SegmentSize::MIN, system_id: 7 };
//! let mut wal = WalBuilder::new(format, 1, Lsn(0x10_0000));
//! wal.noop(100);
//! wal.noop(50_000); // over several pages
//! wal.switch(); // the rest of the segment is zeros
//!
//! let mut decoder = WalDecoder::new(format, wal.start());
//! assert!(decoder.feed(wal.bytes()).is_ok());
//! assert_eq!(decoder.record_end(), Lsn(0x20_0000));
//! ```
//!
//! The records of [`WalBuilder::noop`] are whole to `pg_waldump`, too: they are the server's own
//! records that do nothing. A log that ends in the middle of something is a slice of
//! [`WalBuilder::bytes`]; one that begins so is [`WalBuilder::bytes_from`].
//!
//! Asked for something no server would write, the builder panics. It is not for production use.

use safekeeper_protocol::Lsn;

use crate::format::WalFormat;
use crate::page::{
    FLAG_CONTRECORD, FLAG_LONG_HEADER, FLAG_OVERWRITE_CONTRECORD, LONG_HEADER_SIZE, PAGE_SIZE,
    page_header_size,
};
use crate::record::{
    CRC_OFFSET, INFO_OVERWRITE_CONTRECORD, INFO_SWITCH, RECORD_HEADER_SIZE, RMGR_XLOG, Record,
    RecordHeader, record_crc,
};

/// `info` of a record of [`RMGR_XLOG`] that does nothing (`XLOG_NOOP`).
const INFO_NOOP: u8 = 0x20;

/// Writes WAL into memory, record by record.
#[derive(Clone, Debug)]
pub struct WalBuilder {
    format: WalFormat,
    tli: u32,
    start: Lsn,
    bytes: Vec<u8>,
    last_record: Lsn,
}

impl WalBuilder {
    /// Begins at a record boundary: any multiple of 8 bytes that is not inside a page header.
    /// At the start of a page, that page's header is the first thing written.
    pub fn new(format: WalFormat, tli: u32, start: Lsn) -> WalBuilder {
        let offset = start.segment_offset(PAGE_SIZE);
        let header = page_header_size(start.segment_start(PAGE_SIZE), &format);
        assert!(
            start.0.is_multiple_of(8),
            "WAL records begin at multiples of 8, not at {start}"
        );
        assert!(
            offset == 0 || offset >= header,
            "{start} is inside a page header"
        );
        WalBuilder {
            format,
            tli,
            start,
            bytes: Vec::new(),
            last_record: Lsn::INVALID,
        }
    }

    /// Makes the first record name `last_record` as the one before it. Otherwise it names 0/0.
    pub fn following(self, last_record: Lsn) -> WalBuilder {
        WalBuilder {
            last_record,
            ..self
        }
    }

    /// Pages begun from now on are of this timeline.
    pub fn set_tli(&mut self, tli: u32) {
        self.tli = tli;
    }

    /// Appends a record with this body, which nothing looks into. The server's bodies are built
    /// of tagged parts (`access/xlogrecord.h`), so `pg_waldump` will mostly refuse it.
    pub fn record(&mut self, rmgr_id: u8, info: u8, xid: u32, body: &[u8]) -> Record {
        let (header, bytes) = self.encode(rmgr_id, info, xid, body);
        let start_lsn = self.begin_record();
        self.put(&bytes, 0, bytes.len());
        self.align();
        self.end_record(start_lsn, header)
    }

    /// Appends a record that does nothing, with so many bytes of data. The record is longer by its
    /// header of 24 bytes and, if there are data, by 2 or (above 255 bytes of data) 5 more.
    pub fn noop(&mut self, data_len: u32) -> Record {
        let mut body = match u8::try_from(data_len) {
            Ok(0) => Vec::new(),
            Ok(short) => vec![255, short],
            Err(_) => [[254].as_slice(), &data_len.to_le_bytes()].concat(),
        };
        // Data that differ from one place to another, so that misplaced bytes are noticed.
        let seed = self.position().0;
        body.extend((0..u64::from(data_len)).map(|i| (seed.wrapping_add(i * 7919) >> 3) as u8));
        self.record(RMGR_XLOG, INFO_NOOP, 0, &body)
    }

    /// Appends a record, opaque to `pg_waldump`, that ends exactly at `end`, a multiple of 8 with
    /// room for it. An `end` at a page's start is the end of the page before.
    pub fn record_ending_at(&mut self, end: Lsn) -> Record {
        let room = self.room_up_to(end);
        let header = u64::from(RECORD_HEADER_SIZE);
        assert!(
            room >= header,
            "no room for a record between {} and {end}",
            self.position()
        );
        let body = vec![0xA5; (room - header) as usize];
        let record = self.record(RMGR_XLOG, INFO_NOOP, 0, &body);
        assert_eq!(record.end_lsn, end, "no record can end there");
        record
    }

    /// Appends a switch record and the zeros up to the end of the segment. At the start of a
    /// segment a server would write nothing; here that panics.
    pub fn switch(&mut self) -> Record {
        let segment_size = self.format.segment_size.bytes();
        let offset = self.position().segment_offset(segment_size);
        assert!(
            offset != 0,
            "there is nothing to switch from at {}",
            self.position()
        );
        let (header, bytes) = self.encode(RMGR_XLOG, INFO_SWITCH, 0, &[]);
        let start_lsn = self.begin_record();
        self.put(&bytes, 0, bytes.len());
        let used = self.position().segment_offset(segment_size);
        if used != 0 {
            let padding = (segment_size - used) as usize;
            self.bytes.resize(self.bytes.len() + padding, 0);
        }
        self.end_record(start_lsn, header)
    }

    /// Appends what a crash in the middle of a record leaves: a record of `body_len` bytes as far
    /// as the end of the page `n_pages` behind the one where it begins, then a page marked as
    /// overwriting it, with the record that says so. Returns the lost record's start and that
    /// other record. The lost record must be long enough to go on.
    pub fn overwritten(&mut self, body_len: u32, n_pages: u32) -> (Lsn, Record) {
        let body = vec![0x5A; body_len as usize];
        let (_, bytes) = self.encode(RMGR_XLOG, INFO_NOOP, 0, &body);
        let lost = self.begin_record();
        let page_end = lost.segment_start(PAGE_SIZE) + u64::from(PAGE_SIZE);
        let kept = self.room_up_to(page_end + u64::from(n_pages) * u64::from(PAGE_SIZE)) as usize;
        assert!(
            kept < bytes.len(),
            "the record ends before it could be cut short"
        );
        self.put(&bytes[..kept], 0, bytes.len());
        self.begin_page(FLAG_OVERWRITE_CONTRECORD, 0);
        let mut body = vec![255, 16];
        body.extend(lost.0.to_le_bytes());
        body.extend(0u64.to_le_bytes());
        (
            lost,
            self.record(RMGR_XLOG, INFO_OVERWRITE_CONTRECORD, 0, &body),
        )
    }

    /// Position of the first byte.
    pub fn start(&self) -> Lsn {
        self.start
    }

    /// End of what was written: the canonical end of the last record.
    pub fn position(&self) -> Lsn {
        self.start + self.bytes.len() as u64
    }

    /// All bytes from `start()` to `position()`.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes from `lsn` to `position()`.
    pub fn bytes_from(&self, lsn: Lsn) -> &[u8] {
        &self.bytes[(lsn - self.start) as usize..]
    }

    /// Takes the bytes written so far out of memory; `start()` moves to `position()`.
    pub fn take_bytes(&mut self) -> Vec<u8> {
        self.start = self.position();
        std::mem::take(&mut self.bytes)
    }

    /// Header and bytes of a record that follows the last one.
    fn encode(&self, rmgr_id: u8, info: u8, xid: u32, body: &[u8]) -> (RecordHeader, Vec<u8>) {
        let total_len = RECORD_HEADER_SIZE as usize + body.len();
        let total_len = u32::try_from(total_len).expect("a record is shorter than 4 GiB");
        let prev_lsn = self.last_record;
        let mut header = RecordHeader {
            total_len,
            xid,
            prev_lsn,
            info,
            rmgr_id,
            crc: 0,
        };
        header.crc = record_crc(crc32c::crc32c(body), &header.encode());
        debug_assert_eq!(header.encode()[CRC_OFFSET..], header.crc.to_le_bytes());
        (header, [&header.encode(), body].concat())
    }

    /// Writes the page's header if one is due, and returns where the record begins.
    fn begin_record(&mut self) -> Lsn {
        if self.page_offset() == 0 {
            self.begin_page(0, 0);
        }
        self.position()
    }

    fn end_record(&mut self, start_lsn: Lsn, header: RecordHeader) -> Record {
        self.last_record = start_lsn;
        Record {
            start_lsn,
            end_lsn: self.position(),
            header,
        }
    }

    /// Writes `bytes`, which stand at `offset` of a record of `total_len`, over as many pages as
    /// it takes.
    fn put(&mut self, mut bytes: &[u8], mut offset: usize, total_len: usize) {
        while !bytes.is_empty() {
            if self.page_offset() == 0 {
                let rem_len = u32::try_from(total_len - offset).expect("a record's length fits");
                self.begin_page(FLAG_CONTRECORD, rem_len);
            }
            let on_page = bytes.len().min((PAGE_SIZE - self.page_offset()) as usize);
            self.bytes.extend_from_slice(&bytes[..on_page]);
            bytes = &bytes[on_page..];
            offset += on_page;
        }
    }

    fn align(&mut self) {
        let end = self.position().0.next_multiple_of(8);
        self.bytes.resize((end - self.start.0) as usize, 0);
    }

    fn begin_page(&mut self, info: u16, rem_len: u32) {
        let page_lsn = self.position();
        let long = page_header_size(page_lsn, &self.format) == LONG_HEADER_SIZE;
        let info = if long { info | FLAG_LONG_HEADER } else { info };
        self.bytes
            .extend(self.format.version.page_magic().to_le_bytes());
        self.bytes.extend(info.to_le_bytes());
        self.bytes.extend(self.tli.to_le_bytes());
        self.bytes.extend(page_lsn.0.to_le_bytes());
        self.bytes.extend(rem_len.to_le_bytes());
        self.bytes.extend([0; 4]);
        if long {
            self.bytes.extend(self.format.system_id.to_le_bytes());
            self.bytes
                .extend(self.format.segment_size.bytes().to_le_bytes());
            self.bytes.extend(PAGE_SIZE.to_le_bytes());
        }
    }

    fn page_offset(&self) -> u32 {
        self.position().segment_offset(PAGE_SIZE)
    }

    /// Bytes of records that fit between here and `end`, page headers not counted.
    fn room_up_to(&self, end: Lsn) -> u64 {
        let mut page_lsn = self.position();
        let mut room = end.saturating_distance_from(page_lsn);
        if self.page_offset() != 0 {
            page_lsn = page_lsn.segment_start(PAGE_SIZE) + u64::from(PAGE_SIZE);
        }
        while page_lsn < end {
            room = room.saturating_sub(page_header_size(page_lsn, &self.format).into());
            page_lsn = page_lsn + u64::from(PAGE_SIZE);
        }
        room
    }
}

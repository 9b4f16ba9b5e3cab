//! The decoder: takes WAL byte by byte as it comes, and says where its last whole record ends.
//!
//! It stands between the network and the disk of a safekeeper, reads the log back at start, and
//! is what `verify` runs. It keeps no bytes: a record's checksum is computed on the way through,
//! and only headers, which may come in pieces, are gathered in small arrays.
//!
//! ```text
//!  page    │header│ record A │ record B ... │header│ ... B │ record C ...        │header│
//!                            ▲                             ▲                ▲
//!                            start_lsn of B       record_end()        position()
//! ```
//!
//! What it is inside of, apart from page headers, which may cut through all of it but padding:
//!
//! ```text
//!           page says: continues                   ┌──────────────────────┐
//!  Unknown ──────────────────────► Skip ─┐         ▼                      │ next record
//!     │                                  ├──► RecordHeader ──► Body ──► Alignment
//!     └──────────────────────────────────┘         ▲                      │ switch record
//!           page says: begins anew                 └──── SwitchPadding ◄──┘
//! ```
//!
//! From Skip, RecordHeader and Body a page marked `OVERWRITE_CONTRECORD` leads back to RecordHeader:
//! a crash lost the rest of the record, and another begins there.
//!
//! **What is checked.** Every byte, against the checksum or the one value it can have, but for:
//!
//! * the page flag `REMOVABLE`, which nobody acts upon;
//! * the timeline of a page when it grows, unless [`WalDecoder::expect_timelines`] was called;
//! * the rest of a record that began before the start, skipped by its length;
//! * what there is of a record lost in a crash, which no reader will ever see.
//!
//! A single flipped bit elsewhere is an error, or leaves a record incomplete that would have been
//! whole (a length made longer), so [`WalDecoder::record_end`] never passes it.
//!
//! **Not here**: what records mean, files, and where a log should be cut.

use safekeeper_protocol::Lsn;

use crate::bytes::{u32_at, u64_at};
use crate::crc::crc32c_append;
use crate::error::WalError;
use crate::format::WalFormat;
use crate::history::TimelineHistory;
use crate::page::{
    FLAG_OVERWRITE_CONTRECORD, LONG_HEADER_SIZE, PAGE_SIZE, PageHeader, page_header_size,
};
use crate::record::{
    RECORD_HEADER_SIZE, Record, RecordHeader, record_crc, record_len_max, rmgr_is_valid,
};

/// Reads WAL in pieces of any size. See the head of this file.
#[derive(Clone, Debug)]
pub struct WalDecoder {
    format: WalFormat,
    /// Everything below has been taken in.
    position: Lsn,
    /// `start <= record_end <= position`.
    record_end: Lsn,
    /// Start of the last record known to be whole.
    last_record: Option<Lsn>,
    inside: Inside,
    /// The header of the page at hand, as far as it has come.
    page_header: Gather<{ LONG_HEADER_SIZE as usize }>,
    /// The header of the record at hand, as far as it has come.
    record_header: Gather<{ RECORD_HEADER_SIZE as usize }>,
    /// The record at hand. Stale outside Body, Alignment and SwitchPadding, but for `start_lsn`,
    /// which RecordHeader sets.
    record: Current,
    /// What the page at hand demands of its first record.
    overwrite: Overwrite,
    /// Timeline of the last page seen, 0 if none.
    page_tli: u32,
    timelines: Option<TimelineHistory>,
    stale_switch_padding: bool,
    failed: Option<WalError>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inside {
    /// At the start of a page of which it is not known whether a record begins with it.
    Unknown,
    /// In a record whose beginning was not seen; so many bytes are still to come.
    Skip {
        remaining: u32,
    },
    /// In the bytes that follow such a record, up to a multiple of 8.
    SkipAlignment,
    /// In a record's header, or before its first byte.
    RecordHeader,
    Body {
        remaining: u32,
    },
    /// In the zeros behind a record, up to a multiple of 8.
    Alignment,
    /// In the zeros behind a switch record, up to the end of the segment.
    SwitchPadding,
}

/// A header that may arrive in pieces.
#[derive(Clone, Copy, Debug)]
struct Gather<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

#[derive(Clone, Copy, Debug)]
struct Current {
    start_lsn: Lsn,
    header: RecordHeader,
    /// CRC-32C of the part of the body that has come.
    body_crc: u32,
    /// The first bytes of the body, gathered for OVERWRITE_CONTRECORD only.
    overwrite_body: Gather<OVERWRITE_BODY_SIZE>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Overwrite {
    /// The next record is an ordinary one.
    No,
    /// The record is the first of its page, whose header was not seen: it may be either.
    Unseen,
    /// The next record must be OVERWRITE_CONTRECORD, and name this record as lost, if known.
    Due { lost: Option<Lsn> },
}

/// Body of OVERWRITE_CONTRECORD: 255 (main data), its length 16, the lost record's start, and a
/// time. (`xl_overwrite_contrecord` in `access/xlog_internal.h`)
const OVERWRITE_BODY_SIZE: usize = 18;
const OVERWRITE_BODY_BEGIN: [u8; 2] = [255, 16];

/// Records begin at multiples of this (`MAXALIGN`).
const ALIGNMENT: u64 = 8;

/// No server comes near. Keeps every sum of a position and a length from overflowing.
const LSN_MAX: Lsn = Lsn(1 << 63);

impl WalDecoder {
    /// Begins at a record boundary, or at the start of a page or segment.
    ///
    /// At the start of a page the page itself says whether it continues a record. The rest of
    /// such a record is skipped unchecked, and `record_end()` stays at `start` until the record
    /// behind it is whole. Where the page is known to begin a record, use
    /// [`WalDecoder::after_record`], which does not believe the page.
    ///
    /// A `start` that can't be any of these is reported by the first call of `feed`.
    pub fn new(format: WalFormat, start: Lsn) -> WalDecoder {
        let page_lsn = start.segment_start(PAGE_SIZE);
        let at_page_start = start == page_lsn;
        let behind_header = start == page_lsn + u64::from(page_header_size(page_lsn, &format));
        let inside = if at_page_start {
            Inside::Unknown
        } else {
            Inside::RecordHeader
        };
        WalDecoder {
            format,
            position: start,
            record_end: start,
            last_record: None,
            inside,
            page_header: Gather::EMPTY,
            record_header: Gather::EMPTY,
            record: Current::none(start),
            overwrite: if behind_header {
                Overwrite::Unseen
            } else {
                Overwrite::No
            },
            page_tli: 0,
            timelines: None,
            stale_switch_padding: false,
            failed: check_start(start, &format).err(),
        }
    }

    /// Begins where a record is known to end, and another must begin: at what
    /// [`WalDecoder::record_end`] said before. `last_record` is the start of the record that ends
    /// there, if known; the next one must name it.
    pub fn after_record(format: WalFormat, end: Lsn, last_record: Option<Lsn>) -> WalDecoder {
        WalDecoder {
            last_record,
            inside: Inside::RecordHeader,
            ..WalDecoder::new(format, end)
        }
    }

    /// From now on every page must be of the timeline that `history` gives its first byte.
    ///
    /// Without it a page's timeline is only known not to be lower than the page before. May be
    /// called again when a longer history has become known.
    pub fn expect_timelines(&mut self, history: TimelineHistory) {
        self.timelines = Some(history);
    }

    /// From now on anything may stand between a switch record and the end of its segment.
    ///
    /// For reading a server's own `pg_wal` only. When a server is killed while it writes the
    /// zeros behind a switch record, its recovery takes the record for complete nevertheless and
    /// goes on in the next segment; the older contents of a recycled file remain for ever. Who
    /// passes such WAL on must put the zeros in their place: [`WalDecoder::feed_and_clean`].
    pub fn allow_stale_switch_padding(&mut self) {
        self.stale_switch_padding = true;
    }

    /// Takes the bytes that follow `position()`.
    ///
    /// How the WAL is cut into calls makes no difference. After an error the same error is
    /// returned for ever; then `record_end()` still holds, and `position()` is the end of the
    /// bytes that were looked at.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), WalError> {
        self.feed_with(bytes, |_| {})
    }

    /// The same, and calls `on_record` for every record that became whole, in order.
    pub fn feed_with(
        &mut self,
        bytes: &[u8],
        mut on_record: impl FnMut(&Record),
    ) -> Result<(), WalError> {
        let mut rest = bytes;
        while !rest.is_empty() || self.failed.is_some() {
            let taken = self.step_or_fail(rest, &mut on_record)?;
            rest = &rest[taken..];
        }
        Ok(())
    }

    /// The same for a server's own `pg_wal` whose bytes are to be passed on: what a killed server
    /// left between a switch record and the end of its segment is overwritten with the zeros that
    /// belong there. See [`WalDecoder::allow_stale_switch_padding`].
    pub fn feed_and_clean(&mut self, bytes: &mut [u8]) -> Result<(), WalError> {
        let mut rest = bytes;
        while !rest.is_empty() || self.failed.is_some() {
            if let Some(end) = self.switch_padding_end() {
                let len = bytes_up_to(rest, end - self.position).len();
                rest[..len].fill(0);
            }
            let taken = self.step_or_fail(rest, &mut |_| {})?;
            rest = &mut rest[taken..];
        }
        Ok(())
    }

    /// End of the bytes taken in.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// Canonical end of the last whole, checked record, or the start if there is none yet.
    /// Never above `position()`.
    pub fn record_end(&self) -> Lsn {
        self.record_end
    }

    /// Start of the last whole, checked record, which the next one will name; for
    /// [`WalDecoder::after_record`].
    pub fn last_record(&self) -> Option<Lsn> {
        self.last_record
    }

    /// If `position()` is behind a switch record and before the end of its segment: that end.
    /// All bytes up to it should be zero.
    pub fn switch_padding_end(&self) -> Option<Lsn> {
        (self.inside == Inside::SwitchPadding).then(|| self.segment_end())
    }

    /// One step; an error is kept, and returned by every later call.
    fn step_or_fail(
        &mut self,
        bytes: &[u8],
        on_record: &mut impl FnMut(&Record),
    ) -> Result<usize, WalError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.step(bytes, on_record)
            .inspect_err(|error| self.failed = Some(error.clone()))
    }

    /// Takes at least one byte, up to the next place where something has to be decided.
    fn step(
        &mut self,
        bytes: &[u8],
        on_record: &mut impl FnMut(&Record),
    ) -> Result<usize, WalError> {
        if self.inside == Inside::SwitchPadding {
            return self.step_switch_padding(bytes, on_record);
        }
        let page_lsn = self.page_start();
        let page_offset = (self.position - page_lsn) as usize;
        let header_size = page_header_size(page_lsn, &self.format) as usize;
        if page_offset < header_size {
            let taken = self.page_header.take(bytes, header_size);
            self.position = self.position + taken as u64;
            if self.page_header.len == header_size {
                self.on_page(page_lsn)?;
            }
            return Ok(taken);
        }
        let on_page = PAGE_SIZE as usize - page_offset;
        let bytes = &bytes[..bytes.len().min(on_page)];
        if self.inside == Inside::RecordHeader
            && let Some(taken) = self.step_whole_record(bytes, on_record)
        {
            return Ok(taken);
        }
        match self.inside {
            Inside::Skip { remaining } => Ok(self.step_skip(bytes, remaining)),
            Inside::RecordHeader => self.step_record_header(bytes, on_record),
            Inside::Body { remaining } => self.step_body(bytes, remaining, on_record),
            Inside::SkipAlignment | Inside::Alignment => self.step_alignment(bytes, on_record),
            Inside::Unknown | Inside::SwitchPadding => {
                unreachable!("Unknown ends with the page's header; SwitchPadding is handled above")
            }
        }
    }

    /// The header of the page at `page_lsn` is there: does it go on with what was before it?
    fn on_page(&mut self, page_lsn: Lsn) -> Result<(), WalError> {
        let header = PageHeader::decode(self.page_header.gathered(), page_lsn, &self.format)?;
        self.page_header.clear();
        self.check_timeline(page_lsn, header.tli)?;
        if header.has(FLAG_OVERWRITE_CONTRECORD) {
            return self.on_overwrite_page(page_lsn, &header);
        }
        if self.inside == Inside::Unknown {
            match header.rem_len {
                0 => self.begin_record_header(),
                remaining => self.inside = Inside::Skip { remaining },
            }
            return Ok(());
        }
        let expected = self.due();
        if header.rem_len != expected {
            return Err(WalError::Continuation {
                page_lsn,
                found: header.rem_len,
                expected,
            });
        }
        Ok(())
    }

    fn check_timeline(&mut self, page_lsn: Lsn, found: u32) -> Result<(), WalError> {
        let expected = match &self.timelines {
            Some(history) => history.tli_at(page_lsn),
            None => found.max(self.page_tli),
        };
        if found != expected {
            return Err(WalError::Timeline {
                page_lsn,
                found,
                expected,
            });
        }
        self.page_tli = found;
        Ok(())
    }

    /// The record at hand was cut short by a crash; its place is taken by another. The chain goes
    /// from the last whole record to that one, as if the lost one had never been.
    fn on_overwrite_page(&mut self, page_lsn: Lsn, header: &PageHeader) -> Result<(), WalError> {
        let lost = match self.inside {
            Inside::Unknown | Inside::Skip { .. } => None,
            _ if self.due() > 0 => Some(self.record.start_lsn),
            _ => {
                let found = header.info.into();
                return Err(WalError::PageField {
                    page_lsn,
                    name: "info",
                    found,
                });
            }
        };
        self.overwrite = Overwrite::Due { lost };
        self.begin_record_header();
        Ok(())
    }

    /// Bytes still to come of the record at hand, alignment not counted; 0 between records.
    fn due(&self) -> u32 {
        match self.inside {
            Inside::Skip { remaining } | Inside::Body { remaining } => remaining,
            Inside::RecordHeader if self.record_header.len > 0 => {
                // The length is on the page where the record begins, so it has been checked.
                u32_at(&self.record_header.bytes, 0) - self.record_header.len as u32
            }
            _ => 0,
        }
    }

    fn step_skip(&mut self, bytes: &[u8], remaining: u32) -> usize {
        let taken = bytes.len().min(remaining as usize);
        self.position = self.position + taken as u64;
        let remaining = remaining - taken as u32;
        if remaining > 0 {
            self.inside = Inside::Skip { remaining };
        } else if self.is_aligned() {
            self.begin_record_header();
        } else {
            self.inside = Inside::SkipAlignment;
        }
        taken
    }

    fn begin_record_header(&mut self) {
        self.inside = Inside::RecordHeader;
        self.record_header.clear();
    }

    /// An ordinary record that is here as a whole, with its padding, on one page: most are. `None`, and
    /// nothing has happened: it is something else, or is not as it should be; that is found out step by step.
    fn step_whole_record(
        &mut self,
        bytes: &[u8],
        on_record: &mut impl FnMut(&Record),
    ) -> Option<usize> {
        if self.record_header.len > 0 || self.overwrite != Overwrite::No {
            return None;
        }
        let header_bytes = bytes.first_chunk::<HEADER_SIZE>()?;
        let header = RecordHeader::decode(header_bytes);
        let record = bytes.get(..header.total_len as usize)?;
        let padding_len =
            (ALIGNMENT as usize - record.len() % ALIGNMENT as usize) % ALIGNMENT as usize;
        let padding = bytes.get(record.len()..record.len() + padding_len)?;
        let body_crc = crc32c_append(0, record.get(HEADER_SIZE..)?);
        let is_ordinary = !header.is_switch() && !header.is_overwrite_contrecord();
        let is_sound = padding.iter().all(|byte| *byte == 0)
            && header.crc == record_crc(body_crc, header_bytes)
            && self.check_record_header(self.position, &header).is_ok();
        if !is_ordinary || !is_sound {
            return None;
        }
        let taken = record.len() + padding_len;
        self.record = Current {
            header,
            ..Current::none(self.position)
        };
        self.position = self.position + taken as u64;
        self.end_record(on_record);
        Some(taken)
    }

    fn step_record_header(
        &mut self,
        bytes: &[u8],
        on_record: &mut impl FnMut(&Record),
    ) -> Result<usize, WalError> {
        if self.record_header.len == 0 {
            self.record.start_lsn = self.position;
        }
        // The length alone first: behind the end of a log it is mostly zero, and what follows is
        // not worth waiting for.
        let wanted = if self.record_header.len < LENGTH_SIZE {
            LENGTH_SIZE
        } else {
            HEADER_SIZE
        };
        let taken = self.record_header.take(bytes, wanted);
        self.position = self.position + taken as u64;
        match self.record_header.len {
            LENGTH_SIZE => self.check_total_len()?,
            HEADER_SIZE => self.on_record_header(on_record)?,
            _ => {}
        }
        Ok(taken)
    }

    fn check_total_len(&self) -> Result<(), WalError> {
        let found = u32_at(&self.record_header.bytes, 0);
        let allowed = RECORD_HEADER_SIZE..=record_len_max(self.format.version);
        if !allowed.contains(&found) {
            return Err(WalError::RecordLength {
                lsn: self.record.start_lsn,
                found,
            });
        }
        Ok(())
    }

    fn on_record_header(&mut self, on_record: &mut impl FnMut(&Record)) -> Result<(), WalError> {
        let header = RecordHeader::decode(&self.record_header.bytes);
        self.check_record_header(self.record.start_lsn, &header)?;
        self.record = Current {
            header,
            ..Current::none(self.record.start_lsn)
        };
        match header.total_len - RECORD_HEADER_SIZE {
            0 => self.on_record_data(on_record),
            remaining => {
                self.inside = Inside::Body { remaining };
                Ok(())
            }
        }
    }

    fn check_record_header(&mut self, lsn: Lsn, header: &RecordHeader) -> Result<(), WalError> {
        if !rmgr_is_valid(header.rmgr_id) {
            return Err(WalError::RecordRmgr {
                lsn,
                found: header.rmgr_id,
            });
        }
        let chained = match self.last_record {
            Some(last) => header.prev_lsn == last,
            None => header.prev_lsn < lsn,
        };
        if !chained {
            let (found, expected) = (header.prev_lsn, self.last_record);
            return Err(WalError::RecordPrev {
                lsn,
                found,
                expected,
            });
        }
        let overwrites = header.is_overwrite_contrecord();
        if self.overwrite == Overwrite::Unseen && overwrites {
            self.overwrite = Overwrite::Due { lost: None };
        }
        if overwrites != matches!(self.overwrite, Overwrite::Due { .. }) {
            return Err(WalError::Overwrite { lsn });
        }
        if overwrites && header.total_len as usize != HEADER_SIZE + OVERWRITE_BODY_SIZE {
            return Err(WalError::RecordLength {
                lsn,
                found: header.total_len,
            });
        }
        Ok(())
    }

    fn step_body(
        &mut self,
        bytes: &[u8],
        remaining: u32,
        on_record: &mut impl FnMut(&Record),
    ) -> Result<usize, WalError> {
        let part = &bytes[..bytes.len().min(remaining as usize)];
        self.record.body_crc = crc32c_append(self.record.body_crc, part);
        if self.overwrite != Overwrite::No {
            self.record.overwrite_body.take(part, OVERWRITE_BODY_SIZE);
        }
        self.position = self.position + part.len() as u64;
        let remaining = remaining - part.len() as u32;
        self.inside = Inside::Body { remaining };
        if remaining == 0 {
            self.on_record_data(on_record)?;
        }
        Ok(part.len())
    }

    /// Header and body of the record are there.
    fn on_record_data(&mut self, on_record: &mut impl FnMut(&Record)) -> Result<(), WalError> {
        let lsn = self.record.start_lsn;
        let found = self.record.header.crc;
        let computed = record_crc(self.record.body_crc, &self.record_header.bytes);
        if found != computed {
            return Err(WalError::RecordCrc {
                lsn,
                found,
                computed,
            });
        }
        if let Overwrite::Due { lost } = self.overwrite {
            let body = &self.record.overwrite_body.bytes;
            let named = Lsn(u64_at(body, OVERWRITE_BODY_BEGIN.len()));
            if !body.starts_with(&OVERWRITE_BODY_BEGIN) || lost.unwrap_or(named) != named {
                return Err(WalError::Overwrite { lsn });
            }
        }
        let segment_size = self.format.segment_size.bytes();
        if self.record.header.is_switch() && self.position.segment_offset(segment_size) != 0 {
            self.inside = Inside::SwitchPadding;
        } else if self.is_aligned() {
            self.end_record(on_record);
        } else {
            self.inside = Inside::Alignment;
        }
        Ok(())
    }

    fn step_alignment(
        &mut self,
        bytes: &[u8],
        on_record: &mut impl FnMut(&Record),
    ) -> Result<usize, WalError> {
        let taken = self.take_zeros(bytes, Lsn(self.position.0.next_multiple_of(ALIGNMENT)))?;
        if self.is_aligned() {
            match self.inside {
                Inside::SkipAlignment => self.begin_record_header(),
                _ => self.end_record(on_record),
            }
        }
        Ok(taken)
    }

    fn step_switch_padding(
        &mut self,
        bytes: &[u8],
        on_record: &mut impl FnMut(&Record),
    ) -> Result<usize, WalError> {
        let end = self.segment_end();
        let taken = if self.stale_switch_padding {
            let taken = bytes_up_to(bytes, end - self.position).len();
            self.position = self.position + taken as u64;
            taken
        } else {
            self.take_zeros(bytes, end)?
        };
        if self.position == end {
            self.end_record(on_record);
        }
        Ok(taken)
    }

    fn end_record(&mut self, on_record: &mut impl FnMut(&Record)) {
        self.record_end = self.position;
        self.last_record = Some(self.record.start_lsn);
        self.overwrite = Overwrite::No;
        self.begin_record_header();
        on_record(&Record {
            start_lsn: self.record.start_lsn,
            end_lsn: self.record_end,
            header: self.record.header,
        });
    }

    /// Takes bytes up to `end`, which must be zero.
    fn take_zeros(&mut self, bytes: &[u8], end: Lsn) -> Result<usize, WalError> {
        let bytes = bytes_up_to(bytes, end - self.position);
        let n_zeros = count_leading_zeros(bytes);
        self.position = self.position + n_zeros as u64;
        match bytes.get(n_zeros) {
            Some(&found) => Err(WalError::Padding {
                lsn: self.position,
                found,
            }),
            None => Ok(n_zeros),
        }
    }

    fn is_aligned(&self) -> bool {
        self.position.0.is_multiple_of(ALIGNMENT)
    }

    fn page_start(&self) -> Lsn {
        self.position.segment_start(PAGE_SIZE)
    }

    fn segment_end(&self) -> Lsn {
        let size = self.format.segment_size.bytes();
        self.position.segment_start(size) + u64::from(size)
    }
}

impl<const N: usize> Gather<N> {
    const EMPTY: Gather<N> = Gather {
        bytes: [0; N],
        len: 0,
    };

    /// Takes from `bytes` until `wanted` have been gathered; says how many.
    fn take(&mut self, bytes: &[u8], wanted: usize) -> usize {
        let taken = bytes.len().min(wanted - self.len);
        self.bytes[self.len..self.len + taken].copy_from_slice(&bytes[..taken]);
        self.len += taken;
        taken
    }

    fn gathered(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn clear(&mut self) {
        self.len = 0;
    }
}

impl Current {
    fn none(start_lsn: Lsn) -> Current {
        Current {
            start_lsn,
            header: RecordHeader {
                total_len: 0,
                xid: 0,
                prev_lsn: Lsn::INVALID,
                info: 0,
                rmgr_id: 0,
                crc: 0,
            },
            body_crc: 0,
            overwrite_body: Gather::EMPTY,
        }
    }
}

const LENGTH_SIZE: usize = 4;
const HEADER_SIZE: usize = RECORD_HEADER_SIZE as usize;

fn check_start(start: Lsn, format: &WalFormat) -> Result<(), WalError> {
    let page_lsn = start.segment_start(PAGE_SIZE);
    let behind_header = start - page_lsn >= u64::from(page_header_size(page_lsn, format));
    let possible = start.0.is_multiple_of(ALIGNMENT) && (start == page_lsn || behind_header);
    if possible && start < LSN_MAX {
        Ok(())
    } else {
        Err(WalError::Start { lsn: start })
    }
}

fn bytes_up_to(bytes: &[u8], len_max: u64) -> &[u8] {
    // A length that does not fit is longer than any slice.
    let len_max = usize::try_from(len_max).unwrap_or(usize::MAX);
    &bytes[..bytes.len().min(len_max)]
}

/// Padding may fill nearly a whole segment, so it is looked at in blocks the compiler can vectorise.
fn count_leading_zeros(bytes: &[u8]) -> usize {
    let zero_block = |block: &&[u8]| block.iter().fold(0, |all, b| all | b) == 0;
    let in_blocks: usize = bytes
        .chunks(256)
        .take_while(zero_block)
        .map(<[u8]>::len)
        .sum();
    in_blocks + bytes[in_blocks..].iter().take_while(|&&b| b == 0).count()
}

//! Pages: WAL is cut into pages of 8 KiB, and each begins with a header.
//!
//! ```text
//!  offset size
//!       0    2  magic      which format: one value for each major version
//!       2    2  info       flags, below
//!       4    4  tli        timeline on which the page was begun
//!       8    8  pageaddr   position of the page's first byte
//!      16    4  rem_len    bytes still to come of the record that began on an earlier page
//!      20    4  zero
//!                          only on the first page of a segment:
//!      24    8  sysid      system identifier of the cluster
//!      32    4  seg_size   bytes in a segment
//!      36    4  blcksz     bytes in a page
//! ```
//!
//! Everything is little-endian, as on every platform we run on. (`access/xlog_internal.h`)
//!
//! No checksum covers a header, so each field is compared with what it must be. Two things cannot
//! be told from the page alone: the flag `REMOVABLE`, which no reader acts upon, and whether a
//! timeline higher than the last page's is right; for the latter see
//! [`WalDecoder::expect_timelines`](crate::WalDecoder::expect_timelines).
//!
//! Whether the page *should* continue a record is the decoder's question, not asked here.

use std::fmt;
use std::str::FromStr;

use safekeeper_protocol::Lsn;

use crate::bytes::{u16_at, u32_at, u64_at};
use crate::error::WalError;
use crate::format::WalFormat;

/// Bytes in a page of WAL (`XLOG_BLCKSZ`). Servers built with another size are not supported.
pub const PAGE_SIZE: u32 = 8192;

/// Bytes of the header on every page but the first of a segment.
pub const SHORT_HEADER_SIZE: u32 = 24;
/// Bytes of the header on the first page of a segment.
pub const LONG_HEADER_SIZE: u32 = 40;

/// The page begins with the rest of a record from an earlier page.
pub const FLAG_CONTRECORD: u16 = 0x0001;
/// The header is the long one.
pub const FLAG_LONG_HEADER: u16 = 0x0002;
/// Full-page images that begin on this page may be dropped by a compressing archiver.
pub const FLAG_REMOVABLE: u16 = 0x0004;
/// The record that should have continued here was lost in a crash; another begins in its place.
pub const FLAG_OVERWRITE_CONTRECORD: u16 = 0x0008;

const FLAGS_KNOWN: u16 = 0x000F;

/// A major version of Postgres whose WAL we can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PgVersion {
    V15,
    V16,
    V17,
    V18,
}

impl PgVersion {
    pub const ALL: [PgVersion; 4] = [
        PgVersion::V15,
        PgVersion::V16,
        PgVersion::V17,
        PgVersion::V18,
    ];

    /// From `server_version_num`: 150018 is 15.
    pub fn from_version_num(version_num: u32) -> Option<PgVersion> {
        Self::ALL
            .into_iter()
            .find(|v| u32::from(v.major()) == version_num / 10_000)
    }

    /// From the first two bytes of a page.
    pub fn from_page_magic(magic: u16) -> Option<PgVersion> {
        Self::ALL.into_iter().find(|v| v.page_magic() == magic)
    }

    pub fn major(self) -> u16 {
        match self {
            PgVersion::V15 => 15,
            PgVersion::V16 => 16,
            PgVersion::V17 => 17,
            PgVersion::V18 => 18,
        }
    }

    /// `XLOG_PAGE_MAGIC` of that version.
    pub fn page_magic(self) -> u16 {
        match self {
            PgVersion::V15 => 0xD110,
            PgVersion::V16 => 0xD113,
            PgVersion::V17 => 0xD116,
            PgVersion::V18 => 0xD118,
        }
    }
}

impl fmt::Display for PgVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.major())
    }
}

/// The text was not the number of a supported major version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unsupported PostgreSQL version, expected 15, 16, 17 or 18")]
pub struct UnsupportedVersion;

impl FromStr for PgVersion {
    type Err = UnsupportedVersion;

    fn from_str(text: &str) -> Result<PgVersion, UnsupportedVersion> {
        Self::ALL
            .into_iter()
            .find(|v| v.to_string() == text)
            .ok_or(UnsupportedVersion)
    }
}

/// The fields of a page's header that still say something once [`PageHeader::decode`] has
/// compared the others with what they must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHeader {
    /// Flags (`FLAG_*`), none but known ones.
    pub info: u16,
    pub tli: u32,
    /// Bytes of the continued record that follow, on this page and later ones. Zero if and only
    /// if `FLAG_CONTRECORD` is not set.
    pub rem_len: u32,
}

/// Bytes of the header of the page that begins at `page_lsn`.
pub fn page_header_size(page_lsn: Lsn, format: &WalFormat) -> u32 {
    match page_lsn.segment_offset(format.segment_size.bytes()) {
        0 => LONG_HEADER_SIZE,
        _ => SHORT_HEADER_SIZE,
    }
}

impl PageHeader {
    /// Checks the header of the page that begins at `page_lsn`.
    ///
    /// `bytes` is the whole header, [`page_header_size`] bytes of it.
    pub fn decode(bytes: &[u8], page_lsn: Lsn, format: &WalFormat) -> Result<PageHeader, WalError> {
        let long = page_header_size(page_lsn, format) == LONG_HEADER_SIZE;
        let field = |name, found: u64| WalError::PageField {
            page_lsn,
            name,
            found,
        };
        let magic = u16_at(bytes, 0);
        if magic != format.version.page_magic() {
            return Err(WalError::PageMagic {
                page_lsn,
                found: magic,
                expected: format.version.page_magic(),
            });
        }
        let header = PageHeader {
            info: u16_at(bytes, 2),
            tli: u32_at(bytes, 4),
            rem_len: u32_at(bytes, 16),
        };
        let info_ok = header.info & !FLAGS_KNOWN == 0
            && header.has(FLAG_LONG_HEADER) == long
            && !header.has(FLAG_CONTRECORD | FLAG_OVERWRITE_CONTRECORD);
        if !info_ok {
            return Err(field("info", header.info.into()));
        }
        let pageaddr = u64_at(bytes, 8);
        if pageaddr != page_lsn.0 {
            return Err(WalError::PageAddress {
                page_lsn,
                found: Lsn(pageaddr),
            });
        }
        if header.tli == 0 {
            return Err(field("tli", 0));
        }
        if header.has(FLAG_CONTRECORD) != (header.rem_len != 0) {
            return Err(field("rem_len", header.rem_len.into()));
        }
        let padding = u32_at(bytes, 20);
        if padding != 0 {
            return Err(field("padding", padding.into()));
        }
        if long {
            check_long_fields(bytes, page_lsn, format)?;
        }
        Ok(header)
    }

    /// Whether all of `flags` are set.
    pub fn has(&self, flags: u16) -> bool {
        self.info & flags == flags
    }
}

fn check_long_fields(bytes: &[u8], page_lsn: Lsn, format: &WalFormat) -> Result<(), WalError> {
    let long = LongHeader::decode(bytes);
    if long.system_id != format.system_id {
        return Err(WalError::SystemId {
            page_lsn,
            found: long.system_id,
            expected: format.system_id,
        });
    }
    let field = |name, found: u32| WalError::PageField {
        page_lsn,
        name,
        found: found.into(),
    };
    if long.segment_size != format.segment_size.bytes() {
        return Err(field("segment size", long.segment_size));
    }
    if long.page_size != PAGE_SIZE {
        return Err(field("page size", long.page_size));
    }
    Ok(())
}

/// What the first page of a segment says of the whole cluster, unchecked.
struct LongHeader {
    system_id: u64,
    segment_size: u32,
    page_size: u32,
}

impl LongHeader {
    fn decode(bytes: &[u8]) -> LongHeader {
        LongHeader {
            system_id: u64_at(bytes, 24),
            segment_size: u32_at(bytes, 32),
            page_size: u32_at(bytes, 36),
        }
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment_name::SegmentSize;

    const FORMAT: WalFormat = WalFormat {
        version: PgVersion::V17,
        segment_size: SegmentSize::DEFAULT,
        system_id: 0x0102_0304_0506_0708,
    };

    /// A segment's first page that goes on with 1000 bytes of a record.
    const LONG: [u8; 40] = [
        0x16, 0xD1, 0x03, 0, 9, 0, 0, 0, 0, 0, 0, 3, 1, 0, 0, 0, 0xE8, 3, 0, 0, 0, 0, 0, 0, 8, 7,
        6, 5, 4, 3, 2, 1, 0, 0, 0, 1, 0, 0x20, 0, 0,
    ];
    const LONG_LSN: Lsn = Lsn(0x1_0300_0000);

    #[test]
    fn versions_are_told_by_number_magic_and_text() {
        for (version, num, magic, text) in [
            (PgVersion::V15, 150_018, 0xD110, "15"),
            (PgVersion::V16, 160_000, 0xD113, "16"),
            (PgVersion::V17, 170_011, 0xD116, "17"),
            (PgVersion::V18, 180_006, 0xD118, "18"),
        ] {
            assert_eq!(PgVersion::from_version_num(num), Some(version));
            assert_eq!(PgVersion::from_page_magic(magic), Some(version));
            assert_eq!(text.parse(), Ok(version));
            assert_eq!(version.to_string(), text);
        }
        assert_eq!(PgVersion::from_version_num(140_009), None);
        assert_eq!(PgVersion::from_page_magic(0xD111), None);
        assert_eq!("015".parse::<PgVersion>(), Err(UnsupportedVersion));
    }

    #[test]
    fn a_long_header_has_its_fields_where_postgres_puts_them() {
        let header = PageHeader::decode(&LONG, LONG_LSN, &FORMAT);
        let info = FLAG_CONTRECORD | FLAG_LONG_HEADER;
        assert_eq!(
            header,
            Ok(PageHeader {
                info,
                tli: 9,
                rem_len: 1000
            })
        );
    }

    #[test]
    fn each_field_is_compared_with_what_it_must_be() {
        let page_lsn = LONG_LSN;
        let field = |name, found| WalError::PageField {
            page_lsn,
            name,
            found,
        };
        for (at, byte, error) in [
            (
                0,
                0x13,
                WalError::PageMagic {
                    page_lsn,
                    found: 0xD113,
                    expected: 0xD116,
                },
            ),
            (2, 0x01, field("info", 0x01)),
            (2, 0x0B, field("info", 0x0B)),
            (2, 0x13, field("info", 0x13)),
            (2, 0x02, field("rem_len", 1000)),
            (4, 0, field("tli", 0)),
            (
                12,
                0,
                WalError::PageAddress {
                    page_lsn,
                    found: Lsn(0x300_0000),
                },
            ),
            (20, 1, field("padding", 1)),
            (
                31,
                0,
                WalError::SystemId {
                    page_lsn,
                    found: 0x0002_0304_0506_0708,
                    expected: FORMAT.system_id,
                },
            ),
            (35, 2, field("segment size", 32 << 20)),
            (37, 0x40, field("page size", 16384)),
        ] {
            let mut bytes = LONG;
            bytes[at] = byte;
            assert_eq!(PageHeader::decode(&bytes, page_lsn, &FORMAT), Err(error));
        }
    }

    #[test]
    fn a_long_header_inside_a_segment_is_refused() {
        let mut bytes = LONG;
        bytes[9] = 0x20;
        let page_lsn = LONG_LSN + 0x2000;
        let expected = WalError::PageField {
            page_lsn,
            name: "info",
            found: 3,
        };
        assert_eq!(
            PageHeader::decode(&bytes[..24], page_lsn, &FORMAT),
            Err(expected)
        );
        bytes[2] = 1;
        assert!(PageHeader::decode(&bytes[..24], page_lsn, &FORMAT).is_ok());
    }
}

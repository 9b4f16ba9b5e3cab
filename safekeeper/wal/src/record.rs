//! Records: the entries of the WAL, each begun by a header of 24 bytes.
//!
//! ```text
//!  offset size
//!       0    4  total_len  bytes of the whole record, this header included
//!       4    4  xid        transaction, 0 if none
//!       8    8  prev       position of the record before this one
//!      16    1  info       high half: the resource manager's; low half: flags
//!      17    1  rmgr_id    resource manager: which module wrote it and will replay it
//!      18    2  zero
//!      20    4  crc        CRC-32C of bytes 24.. and then of bytes 0..20
//!      24       body       blocks and data, opaque to us
//! ```
//!
//! A record begins at a multiple of 8 bytes. The bytes up to the next multiple behind it are zero
//! and belong to it: its *end* is where the next one may begin. It goes on over as many pages and
//! segments as it needs, headers of pages in between; at least the first 8 bytes of its header
//! are on the page where it begins. (`access/xlogrecord.h`, `xloginsert.c`)
//!
//! Two kinds of record shape the log itself, both of resource manager 0 (`catalog/pg_control.h`):
//!
//! * `SWITCH` ends its segment early. It is followed by zeros, without page headers, up to the
//!   end of the segment.
//! * `OVERWRITE_CONTRECORD` stands first on a page where the continuation of another record was
//!   due, and names that other record, which a crash cut short.

use safekeeper_protocol::Lsn;

use crate::bytes::{u32_at, u64_at};
use crate::crc::crc32c_append;
use crate::page::PgVersion;

/// Bytes of the header of a record.
pub const RECORD_HEADER_SIZE: u32 = 24;
/// Where the checksum stands in the header; it covers what lies before it, and the body.
pub(crate) const CRC_OFFSET: usize = 20;

/// Resource manager of the log's own records (`RM_XLOG_ID`).
pub const RMGR_XLOG: u8 = 0;
/// The record ends its segment (`XLOG_SWITCH`).
pub const INFO_SWITCH: u8 = 0x40;
/// The record replaces the lost rest of another (`XLOG_OVERWRITE_CONTRECORD`).
pub const INFO_OVERWRITE_CONTRECORD: u8 = 0xD0;

/// The resource manager's half of `info` (`XLR_RMGR_INFO_MASK`).
const RMGR_INFO_MASK: u8 = 0xF0;

/// Last built-in resource manager, LogicalMessage, in all of 15 to 18 (`access/rmgrlist.h`).
const RMGR_BUILTIN_MAX: u8 = 21;
/// From here on identifiers belong to extensions (`RM_MIN_CUSTOM_ID`).
const RMGR_CUSTOM_MIN: u8 = 128;

/// The fields of a record's header, as they stand in the WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// Bytes of header and body, page headers in between not counted.
    pub total_len: u32,
    pub xid: u32,
    /// Start of the record before this one.
    pub prev_lsn: Lsn,
    pub info: u8,
    pub rmgr_id: u8,
    pub crc: u32,
}

/// A record that was read to its end, and whose checksum is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Position of the record's header, as `pg_waldump` prints it.
    pub start_lsn: Lsn,
    /// Canonical end (see [`canonical_end`](crate::canonical_end)); for a switch record the
    /// start of the next segment.
    pub end_lsn: Lsn,
    pub header: RecordHeader,
}

impl RecordHeader {
    pub(crate) fn decode(bytes: &[u8; RECORD_HEADER_SIZE as usize]) -> RecordHeader {
        RecordHeader {
            total_len: u32_at(bytes, 0),
            xid: u32_at(bytes, 4),
            prev_lsn: Lsn(u64_at(bytes, 8)),
            info: bytes[16],
            rmgr_id: bytes[17],
            crc: u32_at(bytes, CRC_OFFSET),
        }
    }

    /// The bytes of the header, as they stand in the WAL.
    pub fn encode(&self) -> [u8; RECORD_HEADER_SIZE as usize] {
        let mut bytes = [0; RECORD_HEADER_SIZE as usize];
        bytes[0..4].copy_from_slice(&self.total_len.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.xid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.prev_lsn.0.to_le_bytes());
        bytes[16] = self.info;
        bytes[17] = self.rmgr_id;
        bytes[CRC_OFFSET..].copy_from_slice(&self.crc.to_le_bytes());
        bytes
    }

    /// Whether the rest of the segment behind this record is padding.
    pub fn is_switch(&self) -> bool {
        self.is_xlog(INFO_SWITCH)
    }

    /// Whether this record stands where the rest of another was lost.
    pub fn is_overwrite_contrecord(&self) -> bool {
        self.is_xlog(INFO_OVERWRITE_CONTRECORD)
    }

    fn is_xlog(&self, info: u8) -> bool {
        self.rmgr_id == RMGR_XLOG && self.info & RMGR_INFO_MASK == info
    }
}

/// The most bytes a record may have.
///
/// From 16 on the server refuses to write more (`XLogRecordMaxSize`); before, a reader could not
/// allocate more (`MaxAllocSize`). Nothing is allocated here: the limit only makes garbage look
/// like garbage sooner.
pub fn record_len_max(version: PgVersion) -> u32 {
    match version {
        PgVersion::V15 => 0x3FFF_FFFF,
        PgVersion::V16 | PgVersion::V17 | PgVersion::V18 => 1020 << 20,
    }
}

/// Whether a server of any supported version can have written a record of that manager.
pub(crate) fn rmgr_is_valid(rmgr_id: u8) -> bool {
    rmgr_id <= RMGR_BUILTIN_MAX || rmgr_id >= RMGR_CUSTOM_MIN
}

/// The checksum of a record, from the CRC-32C of its body and its header's bytes.
pub(crate) fn record_crc(body_crc: u32, header: &[u8; RECORD_HEADER_SIZE as usize]) -> u32 {
    crc32c_append(body_crc, &header[..CRC_OFFSET])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_survives_a_round_trip_and_has_the_right_bytes() {
        let header = RecordHeader {
            total_len: 0x0102_0304,
            xid: 0x1112_1314,
            prev_lsn: Lsn(0x2122_2324_2526_2728),
            info: 0x31,
            rmgr_id: 0x41,
            crc: 0x5152_5354,
        };
        let bytes = header.encode();
        let golden = [
            0x04, 0x03, 0x02, 0x01, 0x14, 0x13, 0x12, 0x11, 0x28, 0x27, 0x26, 0x25, 0x24, 0x23,
            0x22, 0x21, 0x31, 0x41, 0, 0, 0x54, 0x53, 0x52, 0x51,
        ];
        assert_eq!(bytes, golden);
        assert_eq!(RecordHeader::decode(&bytes), header);
    }

    #[test]
    fn low_bits_of_info_do_not_hide_a_switch() {
        let header = |rmgr_id, info| RecordHeader {
            total_len: 24,
            xid: 0,
            prev_lsn: Lsn(8),
            info,
            rmgr_id,
            crc: 0,
        };
        assert!(header(0, 0x40).is_switch());
        assert!(header(0, 0x43).is_switch());
        assert!(!header(1, 0x40).is_switch());
        assert!(!header(0, 0x50).is_switch());
        assert!(header(0, 0xD0).is_overwrite_contrecord());
    }

    #[test]
    fn resource_managers_between_built_in_and_custom_are_invalid() {
        for (rmgr_id, valid) in [
            (0, true),
            (21, true),
            (22, false),
            (127, false),
            (128, true),
        ] {
            assert_eq!(rmgr_is_valid(rmgr_id), valid, "{rmgr_id}");
        }
        assert!(rmgr_is_valid(255));
    }
}

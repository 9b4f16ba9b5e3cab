//! `WalFormat`: what must be known of a cluster before a byte of its WAL can be read; and the two
//! names that the end of a page has.
//!
//! ```text
//!       page        │header│      page
//!  ... last record  │      │ next record ...
//!                   ▲      ▲
//!                   │      └ where the server says it will insert next
//!                   └ where the last record ended: the canonical name
//! ```

use safekeeper_protocol::Lsn;

use crate::page::{LONG_HEADER_SIZE, PAGE_SIZE, PgVersion, SHORT_HEADER_SIZE};
use crate::segment_name::SegmentSize;

/// What must be known of a cluster to read its WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalFormat {
    pub version: PgVersion,
    pub segment_size: SegmentSize,
    /// `system_identifier` of `pg_control`.
    pub system_id: u64,
}

/// The one name of a place that has two.
///
/// A record that fills its page ends at the page's end. The next record's start, and with it the
/// server's insert position (`GetXLogInsertRecPtr`), is the place behind the next page's header:
/// 24 bytes further, or 40 at the start of a segment. This maps the latter to the former, and any
/// other position to itself. Only for positions between records.
pub fn canonical_end(lsn: Lsn, segment_size: SegmentSize) -> Lsn {
    let header = match lsn.segment_offset(segment_size.bytes()) {
        LONG_HEADER_SIZE => LONG_HEADER_SIZE,
        offset if offset > PAGE_SIZE && offset % PAGE_SIZE == SHORT_HEADER_SIZE => {
            SHORT_HEADER_SIZE
        }
        _ => 0,
    };
    Lsn(lsn.0 - u64::from(header))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_behind_a_page_header_is_the_end_of_the_page_before() {
        for (lsn, canonical) in [
            (0x200_0000, 0x200_0000),
            (0x200_0018, 0x200_0018), // inside the long header: no position between records
            (0x200_0028, 0x200_0000),
            (0x200_0030, 0x200_0030),
            (0x200_2000, 0x200_2000),
            (0x200_2018, 0x200_2000),
            (0x200_2028, 0x200_2028),
            (0x2FF_E018, 0x2FF_E000),
            (0x28, 0),
        ] {
            assert_eq!(
                canonical_end(Lsn(lsn), SegmentSize::DEFAULT),
                Lsn(canonical),
                "{lsn:X}"
            );
        }
        assert_eq!(
            canonical_end(Lsn(0x210_0028), SegmentSize::MIN),
            Lsn(0x210_0000)
        );
        assert_eq!(
            canonical_end(Lsn(0x210_0028), SegmentSize::MAX),
            Lsn(0x210_0028)
        );
    }
}

//! Names of files in `pg_wal`, and the sizes a segment may have.
//!
//! ```text
//! 00000002 0000000A 0000003C        a segment: timeline, then its number in two halves
//! │        │        └ number of the segment within that 4 GiB of WAL
//! │        └ which 4 GiB of WAL
//! └ timeline
//! 00000002.history                  where timeline 2 left its parent (see `history.rs`)
//! ```
//!
//! The number of the third group runs only up to the segments in 4 GiB, so a name means nothing
//! without the segment size: `...01 00000000 00000040` is segment 64 of 16 MiB ones, and no
//! segment at all of 1 GiB ones. Such names are refused, as are lower-case digits: a file that
//! Postgres would not have named so is not ours to read. (`access/xlog_internal.h`)
//!
//! Endings such as `.partial` and directories are the business of whoever owns the files.

use std::fmt;

/// Number of a segment: its first byte's position divided by the segment size.
pub type SegNo = u64;

/// Size of a segment in bytes: a power of two, 1 MiB to 1 GiB (`initdb --wal-segsize`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SegmentSize(u32);

impl SegmentSize {
    pub const MIN: SegmentSize = SegmentSize(1 << 20);
    pub const MAX: SegmentSize = SegmentSize(1 << 30);
    /// What `initdb` takes if not told otherwise.
    pub const DEFAULT: SegmentSize = SegmentSize(16 << 20);

    pub fn new(bytes: u32) -> Result<SegmentSize, InvalidSegmentSize> {
        let allowed = Self::MIN.0..=Self::MAX.0;
        if bytes.is_power_of_two() && allowed.contains(&bytes) {
            Ok(SegmentSize(bytes))
        } else {
            Err(InvalidSegmentSize(bytes))
        }
    }

    pub fn bytes(self) -> u32 {
        self.0
    }

    /// How many segments share the middle group of a file name.
    fn segments_per_group(self) -> u64 {
        (1 << 32) / u64::from(self.0)
    }
}

impl fmt::Display for SegmentSize {
    /// In MiB, the unit of `initdb --wal-segsize`: `16MB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}MB", self.0 >> 20)
    }
}

/// Not a size Postgres can have been initialised with; holds the value in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid WAL segment size {0}: must be a power of two between 1 MB and 1 GB")]
pub struct InvalidSegmentSize(pub u32);

/// Name of the file that holds segment `segno` of timeline `tli`: 24 upper-case hex digits.
///
/// `segno` must be that of an LSN, that is below 2^64 / segment size.
pub fn segment_file_name(tli: u32, segno: SegNo, size: SegmentSize) -> String {
    let per_group = size.segments_per_group();
    format!(
        "{tli:08X}{:08X}{:08X}",
        segno / per_group,
        segno % per_group
    )
}

/// Timeline and number from a segment's file name, or `None` if it is not one for this `size`.
pub fn parse_segment_file_name(name: &str, size: SegmentSize) -> Option<(u32, SegNo)> {
    if name.len() != 24 {
        return None;
    }
    let tli = hex_group(name.get(..8)?)?;
    let group = hex_group(name.get(8..16)?)?;
    let within = u64::from(hex_group(name.get(16..)?)?);
    if tli == 0 || within >= size.segments_per_group() {
        return None;
    }
    Some((tli, u64::from(group) * size.segments_per_group() + within))
}

/// Name of the file that tells the ancestry of timeline `tli`.
pub fn history_file_name(tli: u32) -> String {
    format!("{tli:08X}.history")
}

/// Timeline from a history file's name, or `None` if it is not one.
pub fn parse_history_file_name(name: &str) -> Option<u32> {
    let tli = hex_group(name.strip_suffix(".history")?)?;
    (tli != 0).then_some(tli)
}

/// Exactly eight upper-case hex digits.
fn hex_group(digits: &str) -> Option<u32> {
    let upper_hex = |b: u8| matches!(b, b'0'..=b'9' | b'A'..=b'F');
    if digits.len() != 8 || !digits.bytes().all(upper_hex) {
        return None;
    }
    u32::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size_mb(mb: u32) -> SegmentSize {
        SegmentSize::new(mb << 20).expect("a valid size")
    }

    #[test]
    fn only_powers_of_two_from_1_mb_to_1_gb_are_segment_sizes() {
        for exponent in 0..32 {
            let bytes = 1u32 << exponent;
            let valid = (20..=30).contains(&exponent);
            assert_eq!(SegmentSize::new(bytes).is_ok(), valid, "{bytes}");
            assert!(
                SegmentSize::new(bytes | 1).is_err() || bytes == 1,
                "{}",
                bytes | 1
            );
        }
        assert_eq!(SegmentSize::new(0), Err(InvalidSegmentSize(0)));
        assert_eq!(
            SegmentSize::new(u32::MAX),
            Err(InvalidSegmentSize(u32::MAX))
        );
        assert_eq!(SegmentSize::DEFAULT.to_string(), "16MB");
    }

    #[test]
    fn segment_names_are_those_of_postgres() {
        for (tli, segno, mb, name) in [
            (1, 2, 16, "000000010000000000000002"),
            (1, 255, 16, "0000000100000000000000FF"),
            (1, 256, 16, "000000010000000100000000"),
            (0xAB, 0x12_3456_789A, 16, "000000AB123456780000009A"),
            (1, 4095, 1, "000000010000000000000FFF"),
            (1, 4096, 1, "000000010000000100000000"),
            (2, 63, 64, "00000002000000000000003F"),
            (2, 64, 64, "000000020000000100000000"),
            (3, 3, 1024, "000000030000000000000003"),
            (3, 4, 1024, "000000030000000100000000"),
            (u32::MAX, (1 << 34) - 1, 1024, "FFFFFFFFFFFFFFFF00000003"),
        ] {
            let size = size_mb(mb);
            assert_eq!(segment_file_name(tli, segno, size), name);
            assert_eq!(parse_segment_file_name(name, size), Some((tli, segno)));
        }
    }

    #[test]
    fn names_postgres_would_not_give_are_refused() {
        for name in [
            "",
            "00000001000000000000000",
            "0000000100000000000000022",
            "000000010000000000000002.partial",
            "00000001000000000000000a",
            "+00000010000000000000002",
            "00000001000000000000000G",
            "000000010000000000000100",
            "000000000000000000000001",
            "0000000100000000000000é",
            "é0000000000000000000000",
        ] {
            assert_eq!(
                parse_segment_file_name(name, SegmentSize::DEFAULT),
                None,
                "{name:?}"
            );
        }
    }

    #[test]
    fn history_names() {
        assert_eq!(history_file_name(0x1F), "0000001F.history");
        assert_eq!(parse_history_file_name("0000001F.history"), Some(0x1F));
        for name in [
            "0000001f.history",
            "1F.history",
            "0000001F",
            "00000000.history",
            ".history",
        ] {
            assert_eq!(parse_history_file_name(name), None, "{name:?}");
        }
    }
}

//! `Lsn`: a byte position in the WAL.
//!
//! Ranges of WAL are half-open, `begin_lsn..end_lsn`. Position 0 is never the place of a byte;
//! it means "nothing yet", as `InvalidXLogRecPtr` does in Postgres (`access/xlogdefs.h`).

use core::fmt;
use core::ops::{Add, Sub};
use core::str::FromStr;

/// A byte position in the WAL of one cluster, printed `0/16B3748` as Postgres does.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// "No position": below every byte of WAL.
    pub const INVALID: Lsn = Lsn(0);

    pub fn is_valid(self) -> bool {
        self != Self::INVALID
    }

    /// Number of the segment that holds the byte at this position.
    /// `segment_size` is in bytes, a power of two.
    pub fn segno(self, segment_size: u32) -> u64 {
        self.0 / u64::from(segment_size)
    }

    /// Offset of this position in its segment, in bytes.
    pub fn segment_offset(self, segment_size: u32) -> u32 {
        u32::try_from(self.0 % u64::from(segment_size)).expect("a remainder of a u32 fits")
    }

    /// Start of the segment that holds the byte at this position.
    pub fn segment_start(self, segment_size: u32) -> Lsn {
        Lsn(self.0 - u64::from(self.segment_offset(segment_size)))
    }

    /// Bytes from `earlier` up to here; 0 if `earlier` is not earlier.
    pub fn saturating_distance_from(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The position `bytes` further on, or `None` past the end of the address space.
    /// For numbers that came from the network or the disk.
    pub fn checked_add(self, bytes: u64) -> Option<Lsn> {
        self.0.checked_add(bytes).map(Lsn)
    }
}

impl Add<u64> for Lsn {
    type Output = Lsn;
    fn add(self, bytes: u64) -> Lsn {
        Lsn(self.0 + bytes)
    }
}

impl Sub<Lsn> for Lsn {
    type Output = u64;
    fn sub(self, earlier: Lsn) -> u64 {
        self.0 - earlier.0
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text was not of the form `hex/hex` with at most eight digits on each side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidLsn;

impl fmt::Display for InvalidLsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("invalid LSN, expected two hexadecimal numbers such as 0/16B3748")
    }
}

impl core::error::Error for InvalidLsn {}

impl FromStr for Lsn {
    type Err = InvalidLsn;

    fn from_str(text: &str) -> Result<Lsn, InvalidLsn> {
        let (high, low) = text.split_once('/').ok_or(InvalidLsn)?;
        Ok(Lsn(
            u64::from(hex_u32(high)?) << 32 | u64::from(hex_u32(low)?)
        ))
    }
}

fn hex_u32(digits: &str) -> Result<u32, InvalidLsn> {
    // from_str_radix would take a leading '+'.
    let plain = (1..=8).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
    if !plain {
        return Err(InvalidLsn);
    }
    u32::from_str_radix(digits, 16).map_err(|_| InvalidLsn)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn prints_and_parses_as_postgres_does() {
        for (lsn, text) in [
            (Lsn(0), "0/0"),
            (Lsn(0x16B_3748), "0/16B3748"),
            (Lsn(0x1_0000_0000), "1/0"),
            (Lsn(u64::MAX), "FFFFFFFF/FFFFFFFF"),
        ] {
            assert_eq!(lsn.to_string(), text);
            assert_eq!(text.parse(), Ok(lsn));
        }
        assert_eq!("a/b".parse(), Ok(Lsn(0xA_0000_000B)));
    }

    #[test]
    fn refuses_what_is_not_an_lsn() {
        for text in [
            "",
            "/",
            "1",
            "1/",
            "/1",
            "g/0",
            "+1/0",
            "123456789/0",
            "1/2/3",
            " 1/2",
        ] {
            assert_eq!(text.parse::<Lsn>(), Err(InvalidLsn), "{text:?}");
        }
    }

    #[test]
    fn segments() {
        let lsn = Lsn(0x3_0001_0028);
        assert_eq!(lsn.segno(16 << 20), 0x300);
        assert_eq!(lsn.segment_offset(16 << 20), 0x1_0028);
        assert_eq!(lsn.segment_start(16 << 20), Lsn(0x3_0000_0000));
        assert_eq!(lsn.segno(1 << 30), 12);
    }
}

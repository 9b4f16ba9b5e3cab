//! CRC-32C (Castagnoli), by which every record says whether it is sound. (`port/pg_crc32c.h`)
//!
//! Two libraries compute it: with short pieces, a record's header or that of a small transaction, the
//! processor's own instruction is the fastest; a page's worth goes more than twice as fast by carry-less
//! multiplication, and bulk is what a safekeeper reads for its consumers.

use crc_fast::{CrcAlgorithm, Digest};

/// From this length on, in bytes, carry-less multiplication is faster (`cargo bench -p safekeeper-wal`).
const FOLDED_LEN_MIN: usize = 1024;

/// The checksum of what has the checksum `crc`, 0 if that is nothing, with `bytes` behind it.
pub(crate) fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 {
    if bytes.len() < FOLDED_LEN_MIN {
        return crc32c::crc32c_append(crc, bytes);
    }
    // Its state is the checksum before all bits are turned.
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(!crc));
    digest.update(bytes);
    digest.finalize() as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// However the bytes are cut, and whichever library takes the pieces.
        #[test]
        fn both_libraries_compute_one_checksum(
            bytes in proptest::collection::vec(any::<u8>(), 0..40_000),
            cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.sort_unstable();
            cuts.push(bytes.len());
            let (mut crc, mut begin) = (0, 0);
            for end in cuts {
                crc = crc32c_append(crc, &bytes[begin..end]);
                begin = end;
            }
            prop_assert_eq!(crc, crc32c::crc32c(&bytes));
        }
    }

    #[test]
    fn the_check_value_of_the_catalogue() {
        assert_eq!(crc32c_append(0, b"123456789"), 0xE306_9283);
        assert_eq!(crc32c_append(0, &[0; 8192]), crc32c::crc32c(&[0; 8192]));
    }
}

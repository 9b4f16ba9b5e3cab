//! In which order WAL must reach the disk: what has no checksum before what follows it.
//!
//! A power cut keeps any of the sectors that were written and not synced. Where it tore a record,
//! recovery finds out by the record's checksum, and the log ends before it. Two things have none:
//!
//! ```text
//!   │ ...record │ lost record, cut short by a crash of the server ║ page that overwrites it │
//!   │ rest of a record that began before the log did              ║ first record of the log │
//!                                                                 ║
//!                                                          a barrier
//! ```
//!
//! If what stands behind the barrier could survive and what stands before it not, recovery would
//! find a whole log with a hole in it, and nobody could tell. So all before a barrier is synced
//! before anything behind it is written. Then the hole can only be at the end, where nothing vouches
//! for the bytes before it.
//!
//! Barriers are rare: one behind each crash of the primary, and one where a log begins. All other
//! WAL costs a look at one flag of each page.

use safekeeper_protocol::Lsn;
use safekeeper_wal::page::FLAG_OVERWRITE_CONTRECORD;
use safekeeper_wal::{PAGE_SIZE, WalDecoder, WalError, WalFormat, canonical_end};

/// Takes `bytes` into the decoder of a log that begins at `log_begin`. Returns the barriers in
/// them, in order, and what the decoder says. A barrier below the decoder's former position is one
/// before all of `bytes`.
pub fn decode_with_barriers(
    decoder: &mut WalDecoder,
    format: &WalFormat,
    log_begin: Lsn,
    bytes: &[u8],
) -> (Vec<Lsn>, Result<(), WalError>) {
    let begin = decoder.position();
    let has_records = decoder.last_record().is_some();
    let mut first_record = None;
    let decoded = decoder.feed_with(bytes, |record| {
        first_record.get_or_insert(record.start_lsn);
    });
    let mut barriers: Vec<Lsn> = overwriting_pages(begin, bytes).collect();
    let behind_rest = |lsn: &Lsn| canonical_end(*lsn, format.segment_size) != log_begin;
    if let Some(lsn) = first_record.filter(|lsn| !has_records && behind_rest(lsn)) {
        barriers.push(lsn.max(begin));
        barriers.sort_unstable();
    }
    (barriers, decoded)
}

/// Starts of the pages in `bytes`, which stand at `begin`, that overwrite a lost record, or may: the
/// flags of the last one may not have come yet.
fn overwriting_pages(begin: Lsn, bytes: &[u8]) -> impl Iterator<Item = Lsn> + '_ {
    let page_size = PAGE_SIZE as usize;
    let into_page = begin.segment_offset(PAGE_SIZE) as usize;
    let first = (page_size - into_page) % page_size;
    let overwrites = |at: &usize| match bytes.get(at + FLAGS_OFFSET..at + FLAGS_OFFSET + 2) {
        Some(&[low, high]) => u16::from_le_bytes([low, high]) & FLAG_OVERWRITE_CONTRECORD != 0,
        _ => true,
    };
    let pages = (first..bytes.len()).step_by(page_size);
    pages.filter(overwrites).map(move |at| begin + at as u64)
}

/// Where a page's header has its flags.
const FLAGS_OFFSET: usize = 2;

#[cfg(test)]
mod tests {
    use super::*;
    use safekeeper_wal::synthetic::WalBuilder;
    use safekeeper_wal::{PgVersion, SegmentSize};

    const FORMAT: WalFormat = WalFormat {
        version: PgVersion::V17,
        segment_size: SegmentSize::MIN,
        system_id: 5,
    };
    const START: Lsn = Lsn(0x30_0000);

    /// The barriers in `bytes` when they come in pieces of these lengths, for ever the last one.
    fn barriers(begin: Lsn, bytes: &[u8], lens: &[usize]) -> Vec<Vec<Lsn>> {
        let mut decoder = WalDecoder::new(FORMAT, begin);
        let (mut all, mut rest) = (Vec::new(), bytes);
        let last = lens.last().expect("a length");
        for len in lens.iter().chain(std::iter::repeat(last)) {
            let (piece, after) = rest.split_at(rest.len().min(*len));
            let (found, decoded) = decode_with_barriers(&mut decoder, &FORMAT, begin, piece);
            decoded.expect("sound WAL");
            all.push(found);
            rest = after;
            if rest.is_empty() {
                return all;
            }
        }
        unreachable!("the last length is repeated")
    }

    #[test]
    fn ordinary_wal_has_no_barrier_however_it_is_cut() {
        let mut wal = WalBuilder::new(FORMAT, 1, START);
        for len in [100, 30_000, 8_000, 8, 20_000] {
            wal.noop(len);
        }
        wal.switch();
        wal.noop(100);
        for len in [64, 8192, 100_000, usize::MAX] {
            assert!(
                barriers(START, wal.bytes(), &[len]).concat().is_empty(),
                "{len}"
            );
        }
    }

    #[test]
    fn a_page_that_overwrites_a_lost_record_comes_behind_a_barrier() {
        let mut wal = WalBuilder::new(FORMAT, 1, START);
        wal.noop(100);
        wal.overwritten(30_000, 1);
        wal.noop(100);
        let page = START + 2 * u64::from(PAGE_SIZE);
        let into = 2 * PAGE_SIZE as usize;
        assert_eq!(barriers(START, wal.bytes(), &[usize::MAX]), [[page]]);
        let begins_there = barriers(START, wal.bytes(), &[into, usize::MAX]);
        assert_eq!(begins_there, [vec![], vec![page]]);
        // As long as the flags have not come they may be anything.
        let cut_in_flags = barriers(START, wal.bytes(), &[into + 3, usize::MAX]);
        assert_eq!(cut_in_flags, [vec![page], vec![]]);
    }

    #[test]
    fn the_rest_of_a_record_with_which_a_log_begins_comes_before_the_first_whole_one() {
        let mut wal = WalBuilder::new(FORMAT, 1, START + u64::from(PAGE_SIZE));
        wal.noop(1 << 20);
        let first = wal.noop(100);
        wal.noop(100);
        let begin = START + (1 << 20);
        let bytes = wal.bytes_from(begin);
        assert_eq!(barriers(begin, bytes, &[usize::MAX]), [[first.start_lsn]]);
        // It becomes whole with the second piece: nothing of that may come before the rest.
        let into = (first.start_lsn - begin) as usize + 10;
        let cut = first.start_lsn + 10;
        let pieces = barriers(begin, bytes, &[into, usize::MAX]);
        assert_eq!(pieces, [vec![], vec![cut]]);
    }
}

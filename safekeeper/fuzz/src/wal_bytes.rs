//! The WAL decoder, and the search for the end of a log, on any bytes at any position.
//!
//! ```text
//!   1  bits 0-1: Postgres's version   2-3: size of a segment   4: the position begins a record
//!      5: rests behind switch records may be stale
//!   1  size of the pieces, less 1     8  position, big-endian      then the bytes there
//! ```

use allocation_counter::measure;
use safekeeper_protocol::Lsn;
use safekeeper_wal::synthetic::WalBuilder;
use safekeeper_wal::{
    PgVersion, SegmentSize, WalDecoder, WalError, WalFormat, canonical_end, find_end_with,
};

const HEADER_LEN: usize = 10;

pub fn check(input: &[u8]) {
    let Some((&[flags, piece, ref position @ ..], bytes)) = input.split_first_chunk::<HEADER_LEN>()
    else {
        return;
    };
    let format = format(flags);
    let start = Lsn(u64::from_be_bytes(*position));
    let mut begun = match flags & 16 {
        0 => WalDecoder::new(format, start),
        _ => WalDecoder::after_record(format, start, None),
    };
    if flags & 32 != 0 {
        begun.allow_stale_switch_padding();
    }

    let mut whole = begun.clone();
    let mut result = Ok(());
    let n_allocations = measure(|| result = whole.feed(bytes)).count_total;
    assert_eq!(n_allocations, 0);
    assert!(start <= whole.record_end() && whole.record_end() <= whole.position());
    assert!(whole.position() - start <= bytes.len() as u64);
    assert!(canonical_end(whole.record_end(), format.segment_size) <= whole.record_end());

    let mut pieces = begun.clone();
    let in_pieces = bytes
        .chunks(1 + usize::from(piece))
        .try_for_each(|piece| pieces.feed(piece));
    // Before the first byte the pieces have had no occasion to complain of the start.
    if !bytes.is_empty() {
        assert_eq!(in_pieces, result);
    }
    assert_eq!(pieces.position(), whole.position());
    assert_eq!(pieces.record_end(), whole.record_end());
    assert_eq!(pieces.last_record(), whole.last_record());

    check_end(&begun, bytes, &whole, &result);
    check_cleaning(&begun, bytes);
}

/// Reading a log from disk up to its end finds what decoding in one go does.
fn check_end(begun: &WalDecoder, bytes: &[u8], whole: &WalDecoder, result: &Result<(), WalError>) {
    let start = begun.position();
    let mut records = 0;
    let found = find_end_with(
        begun.clone(),
        |lsn, buffer| {
            let rest = &bytes[(lsn - start) as usize..];
            let len = rest.len().min(buffer.len()).min(3000);
            buffer[..len].copy_from_slice(&rest[..len]);
            Ok(len)
        },
        |_| records += 1,
    )
    .expect("reading cannot fail here");
    assert_eq!(found.end, whole.record_end());
    assert_eq!(found.last_record, whole.last_record());
    assert_eq!(found.last_record.is_some(), records > 0);
    match result {
        Err(reason) if !bytes.is_empty() => assert_eq!(found.reason, *reason),
        _ => {
            let lsn = whole.position();
            assert_eq!(found.reason, WalError::NoMoreBytes { lsn });
        }
    }
}

/// WAL that was cleaned on its way through is sound to a decoder that takes no stale bytes.
fn check_cleaning(begun: &WalDecoder, bytes: &[u8]) {
    let mut cleaned = bytes.to_vec();
    let mut cleaning = begun.clone();
    if cleaning.feed_and_clean(&mut cleaned).is_ok() {
        let mut strict = begun.clone();
        assert_eq!(strict.feed(&cleaned), Ok(()));
        assert_eq!(strict.record_end(), cleaning.record_end());
    }
}

fn format(flags: u8) -> WalFormat {
    let megabytes = [1, 16, 64, 1024][usize::from(flags >> 2 & 3)];
    WalFormat {
        version: PgVersion::ALL[usize::from(flags & 3)],
        segment_size: SegmentSize::new(megabytes << 20).expect("a power of two"),
        system_id: 0x0102_0304_0506_0708,
    }
}

/// Two pages of every version: at the end of a segment, with a switch, in the middle of a record.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for flags in [0, 1, 16 + 2, 32 + 3] {
        let format = format(flags);
        let size = u64::from(format.segment_size.bytes());
        let input =
            |start: Lsn, bytes: &[u8]| [&[flags, 99][..], &start.0.to_be_bytes(), bytes].concat();
        let mut wal = WalBuilder::new(format, 1, Lsn(3 * size - 8192));
        wal.noop(100);
        wal.noop(8100);
        wal.noop(0);
        seeds.push(input(wal.start(), wal.bytes()));

        let mut wal = WalBuilder::new(format, 1, Lsn(3 * size - 400));
        wal.noop(30);
        wal.switch();
        wal.noop(30);
        seeds.push(input(wal.start(), wal.bytes()));

        let mut wal = WalBuilder::new(format, 2, Lsn(3 * size - 2 * 8192));
        wal.noop(9000);
        wal.noop(10);
        let page = Lsn(3 * size - 8192);
        seeds.push(input(page, wal.bytes_from(page)));
    }
    seeds
}

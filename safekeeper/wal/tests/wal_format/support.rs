//! What the tests of this crate share: formats, seeded numbers, and a log with everything in it.

use safekeeper_protocol::Lsn;
use safekeeper_wal::synthetic::WalBuilder;
use safekeeper_wal::{PgVersion, Record, SegmentSize, WalDecoder, WalError, WalFormat};

pub fn format(segment_mb: u32) -> WalFormat {
    let segment_size = SegmentSize::new(segment_mb << 20).expect("a valid size");
    WalFormat {
        version: PgVersion::V15,
        segment_size,
        system_id: 0x1234_5678_9ABC_DEF0,
    }
}

/// SplitMix64: the same numbers from the same seed, on every machine.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % bound
    }
}

/// What a log of `n_records` steps contains, apart from its bytes.
pub struct Log {
    pub wal: WalBuilder,
    pub records: Vec<Record>,
}

/// Short and long records, some ending exactly at a page's end, switches and lost records.
pub fn mixed_log(format: WalFormat, start: Lsn, seed: u64, n_records: u32) -> Log {
    let mut random = Random(seed);
    let mut wal = WalBuilder::new(format, 1, start);
    let mut records = Vec::new();
    for _ in 0..n_records {
        let record = match random.below(20) {
            0 => wal.overwritten(30_000, random.below(3) as u32).1,
            1 if wal.position().segment_offset(format.segment_size.bytes()) != 0 => wal.switch(),
            2 => {
                let page_end = Lsn((wal.position().0 / 8192 + 2) * 8192);
                wal.record_ending_at(page_end)
            }
            3 => wal.noop(20_000 + random.below(100_000) as u32),
            4 => wal.record(130, 0x70, 77, &[9; 1]),
            5 => wal.record(1, 0, 78, &[]),
            _ => wal.noop(random.below(400) as u32),
        };
        records.push(record);
    }
    Log { wal, records }
}

/// Feeds all of `bytes` in chunks whose lengths come from `next_len`; returns what was seen.
pub fn decode(
    mut decoder: WalDecoder,
    mut bytes: &[u8],
    mut next_len: impl FnMut() -> usize,
) -> (WalDecoder, Vec<Record>, Result<(), WalError>) {
    let mut records = Vec::new();
    let mut result = Ok(());
    while !bytes.is_empty() && result.is_ok() {
        let (chunk, rest) = bytes.split_at(next_len().min(bytes.len()));
        result = decoder.feed_with(chunk, |record| records.push(*record));
        bytes = rest;
        assert!(decoder.record_end() <= decoder.position());
        assert!(
            records
                .last()
                .is_none_or(|last| last.end_lsn == decoder.record_end())
        );
    }
    (decoder, records, result)
}

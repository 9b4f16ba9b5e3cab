//! What checking WAL costs: each byte is decoded and goes through its record's CRC, once on its way
//! to the disk.
//!
//! * `records of 64 bytes`, `of 300`, `of 8000`: small transactions, common ones, page images;
//! * `pieces of 512 bytes`: the same records of 300 bytes as they come from many small commits;
//! * `crc32c alone`: the floor.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use safekeeper_protocol::Lsn;
use safekeeper_wal::synthetic::WalBuilder;
use safekeeper_wal::{PgVersion, SegmentSize, WalDecoder, WalFormat};

const FORMAT: WalFormat = WalFormat {
    version: PgVersion::V15,
    segment_size: SegmentSize::DEFAULT,
    system_id: 7,
};
const START: Lsn = Lsn(16 << 20);
const MIB: usize = 1 << 20;

fn wal(record_len: u32) -> Vec<u8> {
    let mut wal = WalBuilder::new(FORMAT, 1, START);
    while wal.bytes().len() < MIB {
        // A record's header, and that of its data.
        wal.noop(record_len - 29);
    }
    wal.take_bytes()
}

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode");
    let cases = [
        ("records of 64 bytes", 64, usize::MAX),
        ("records of 300 bytes", 300, usize::MAX),
        ("records of 8000 bytes", 8000, usize::MAX),
        ("records of 300 bytes, pieces of 512 bytes", 300, 512),
    ];
    for (name, record_len, piece_len) in cases {
        let wal = wal(record_len);
        group.throughput(Throughput::Bytes(wal.len() as u64));
        group.bench_function(name, |b| {
            b.iter_batched_ref(
                || WalDecoder::new(FORMAT, START),
                |decoder| {
                    for piece in black_box(&wal).chunks(piece_len.min(wal.len())) {
                        decoder.feed(piece).expect("sound WAL");
                    }
                    // Else it might have skipped what it could not place.
                    assert!(decoder.record_end() > START);
                },
                BatchSize::SmallInput,
            );
        });
    }
    let wal = wal(300);
    group.throughput(Throughput::Bytes(wal.len() as u64));
    group.bench_function("crc32c alone", |b| {
        b.iter(|| crc32c::crc32c(black_box(&wal)));
    });
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);

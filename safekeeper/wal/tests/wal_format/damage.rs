//! Damaged WAL is never taken for sound, and no bytes whatever make the decoder panic.

use std::ops::Range;

use crate::support::{Random, decode, format, mixed_log};
use safekeeper_protocol::Lsn;
use safekeeper_wal::synthetic::WalBuilder;
use safekeeper_wal::{TimelineHistory, WalDecoder, WalError, WalFormat};

const MB: u64 = 1 << 20;

/// A log over the end of a segment with every kind of thing in it, in a few pages.
struct SmallLog {
    wal: WalBuilder,
    /// What there is of a record that was lost, without page headers.
    lost: Range<Lsn>,
}

fn small_log(format: WalFormat) -> SmallLog {
    let start = Lsn(3 * MB - 8192 - 200);
    let mut wal = WalBuilder::new(format, 1, start);
    wal.noop(3);
    wal.noop(150);
    wal.noop(8100);
    wal.noop(0);
    wal.record_ending_at(Lsn(3 * MB + 8000));
    let (lost, overwrite) = wal.overwritten(20_000, 0);
    wal.noop(300);
    SmallLog {
        wal,
        lost: lost..overwrite.start_lsn.segment_start(8192),
    }
}

/// Flags of pages whose bit says only what an archiver may leave out.
fn is_removable_flag(lsn: Lsn, bit: usize) -> bool {
    lsn.0 % 8192 == 2 && bit == 2
}

#[test]
fn every_flipped_bit_is_noticed_before_its_record_is_promised() {
    let format = format(1);
    let SmallLog { wal, lost } = small_log(format);
    let mut decoder = WalDecoder::new(format, wal.start());
    decoder.expect_timelines(TimelineHistory::root(1));
    let mut bytes = wal.bytes().to_vec();
    for at in 0..bytes.len() {
        let lsn = wal.start() + at as u64;
        // Deep inside a long body one bit is like another, and a debug build is slow.
        let near_page_start = (lsn.0 + 300) % 8192 < 800;
        for bit in (0..8_usize).filter(|&bit| near_page_start || at % 8 == bit) {
            bytes[at] ^= 1 << bit;
            let mut flipped = decoder.clone();
            let mut seen = Vec::new();
            let result = flipped.feed_with(&bytes[at..], |record| seen.push(*record));
            let noticed = match result {
                // All there, and nothing said: only what nobody acts upon or will ever see.
                Ok(()) if flipped.record_end() == wal.position() => {
                    is_removable_flag(lsn, bit) || lost.contains(&lsn)
                }
                // A record made longer than the log, or the reverse: none behind the flip counts.
                _ => seen.iter().all(|record| record.end_lsn <= lsn),
            };
            assert!(noticed, "bit {bit} at {lsn} (byte {at}): {result:?}");
            bytes[at] ^= 1 << bit;
        }
        decoder.feed(&bytes[at..=at]).expect("sound WAL");
    }
    assert_eq!(decoder.record_end(), wal.position());
}

#[test]
fn without_a_history_only_a_timeline_that_grows_goes_unnoticed() {
    let format = format(1);
    let SmallLog { wal, .. } = small_log(format);
    let page = (8192 - wal.start().0 % 8192) as usize;
    for bit in 0..32 {
        let mut bytes = wal.bytes().to_vec();
        bytes[page + 4 + bit / 8] ^= 1 << (bit % 8);
        let result = WalDecoder::new(format, wal.start()).feed(&bytes);
        // The page behind it is of timeline 1 again.
        assert!(result.is_err(), "bit {bit}");
    }
}

#[test]
fn an_error_is_the_same_for_every_chunking_and_stays() {
    let format = format(1);
    let SmallLog { wal, .. } = small_log(format);
    let mut random = Random(11);
    for _ in 0..1000 {
        let mut bytes = wal.bytes().to_vec();
        let at = random.below(bytes.len() as u64) as usize;
        bytes[at] ^= 1 << random.below(8);
        let begun = WalDecoder::new(format, wal.start());
        let (whole, records, result) = decode(begun.clone(), &bytes, || usize::MAX);
        let (mut pieces, again, same) = decode(begun, &bytes, || 1 + random.below(50) as usize);
        assert_eq!(result, same);
        assert_eq!(records, again);
        assert_eq!(whole.position(), pieces.position());
        assert_eq!(whole.record_end(), pieces.record_end());
        assert_eq!(pieces.feed(&[]), result);
    }
}

#[test]
fn a_swapped_or_repeated_or_missing_page_is_an_error() {
    let format = format(1);
    let mut wal = WalBuilder::new(format, 1, Lsn(2 * MB));
    for _ in 0..400 {
        wal.noop(100);
    }
    let page = |n: usize| &wal.bytes()[n * 8192..(n + 1) * 8192];
    for order in [[0, 2, 1], [0, 0, 1], [0, 2, 3], [1, 2, 3]] {
        let bytes: Vec<u8> = order.iter().flat_map(|&n| page(n).to_vec()).collect();
        let error = WalDecoder::new(format, wal.start())
            .feed(&bytes)
            .expect_err("misplaced");
        let expected = matches!(
            error,
            WalError::PageAddress { .. } | WalError::PageField { .. }
        );
        assert!(expected, "{order:?}: {error}");
    }
}

#[test]
fn an_older_record_in_place_of_a_newer_breaks_the_chain() {
    let format = format(1);
    // Two logs that agree up to a point, then go on with records of the same length.
    let mut old = WalBuilder::new(format, 1, Lsn(2 * MB));
    old.noop(100);
    let mut new = old.clone();
    old.record(1, 0, 5, &[1; 26]);
    new.record(1, 0, 6, &[2; 6]);
    let last = new.record(1, 0, 6, &[]);
    let torn = old.record(1, 0, 5, &[1; 10]);
    assert!(torn.start_lsn > last.start_lsn);
    let gap = (torn.start_lsn - new.position()) as usize;
    assert_eq!(gap % 8, 0);
    // What a torn write leaves: the new records, then at once an old one, itself sound.
    let mut bytes = new.bytes().to_vec();
    bytes.extend(old.bytes_from(torn.start_lsn));
    if gap == 0 {
        let error = WalDecoder::new(format, new.start())
            .feed(&bytes)
            .expect_err("torn");
        assert_eq!(
            error,
            WalError::RecordPrev {
                lsn: torn.start_lsn,
                found: torn.header.prev_lsn,
                expected: Some(last.start_lsn)
            }
        );
    } else {
        panic!("the two logs were meant to have the same length, differ by {gap}");
    }
}

#[test]
fn an_overwrite_mark_without_a_lost_record_is_refused() {
    let format = format(1);
    let mut wal = WalBuilder::new(format, 1, Lsn(2 * MB));
    let first = wal.record_ending_at(Lsn(2 * MB + 8192));
    let time = [255u8, 16].into_iter().chain([0; 16]).collect::<Vec<u8>>();
    let overwrite = wal.record(0, 0xD0, 0, &time);
    let mut bytes = wal.bytes().to_vec();
    let refused = |bytes: &[u8]| WalDecoder::new(format, Lsn(2 * MB)).feed(bytes);
    assert_eq!(
        refused(&bytes),
        Err(WalError::Overwrite {
            lsn: overwrite.start_lsn
        })
    );
    bytes[8192 + 2] |= 8;
    let page_lsn = first.end_lsn;
    assert_eq!(
        refused(&bytes),
        Err(WalError::PageField {
            page_lsn,
            name: "info",
            found: 8
        })
    );
}

#[test]
fn the_wrong_record_named_as_lost_is_refused() {
    let format = format(1);
    let mut wal = WalBuilder::new(format, 1, Lsn(2 * MB));
    let (lost, overwrite) = wal.overwritten(20_000, 1);
    let page = overwrite.start_lsn.segment_start(8192);
    let mut other = WalBuilder::new(format, 1, page);
    let mut body = vec![255, 16];
    body.extend((lost + 8).0.to_le_bytes());
    body.extend([0; 8]);
    other.record(0, 0xD0, 0, &body);
    let mut bytes = wal.bytes().to_vec();
    let at = (overwrite.start_lsn - wal.start()) as usize;
    bytes[at..].copy_from_slice(&other.bytes()[24..]);
    let mut decoder = WalDecoder::new(format, wal.start());
    assert_eq!(
        decoder.feed(&bytes),
        Err(WalError::Overwrite {
            lsn: overwrite.start_lsn
        })
    );
}

#[test]
fn garbage_never_panics() {
    let format = format(1);
    let log = mixed_log(format, Lsn(5 * MB - 20_000), 21, 12);
    let mut random = Random(22);
    for round in 0..1500 {
        let mut bytes = log.wal.bytes()[..log.wal.bytes().len().min(100_000)].to_vec();
        match round % 4 {
            // Noise, from any place.
            0 => bytes
                .iter_mut()
                .take(9000)
                .for_each(|b| *b = random.below(256) as u8),
            // A few bytes wrong; more often than not in headers.
            1 => {
                for _ in 0..1 + random.below(5) {
                    let page = random.below(bytes.len() as u64 / 8192) as usize * 8192;
                    let near = [40, 200, 8192][random.below(3) as usize];
                    bytes[page + random.below(near) as usize] = random.below(256) as u8;
                }
            }
            // A piece moved.
            2 => {
                let from = random.below(50_000) as usize & !7;
                let to = random.below(50_000) as usize & !7;
                bytes.copy_within(from..from + random.below(20_000) as usize, to);
            }
            // The right bytes for another place.
            _ => {}
        }
        let start = match random.below(3) {
            0 => log.wal.start(),
            1 => Lsn(random.below(1 << 20) * 8),
            _ => Lsn(u64::MAX - random.below(1 << 40)),
        };
        let mut decoder = WalDecoder::new(format, start);
        decoder.feed_with(&bytes, |_| {}).ok();
        assert!(decoder.record_end() <= decoder.position());
        assert!(decoder.position().0 - start.0 <= bytes.len() as u64);
    }
}

//! Sound WAL is decoded to the records that were written, however it is cut and wherever it begins.

use crate::support::{Random, decode, format, mixed_log};
use safekeeper_protocol::Lsn;
use safekeeper_wal::synthetic::WalBuilder;
use safekeeper_wal::{PgVersion, TimelineHistory, WalDecoder, WalError, WalFormat};

const MB: u64 = 1 << 20;

/// Decodes all at once and expects no error.
fn decoded(format: WalFormat, start: Lsn, bytes: &[u8]) -> WalDecoder {
    let (decoder, _, result) = decode(WalDecoder::new(format, start), bytes, || usize::MAX);
    assert_eq!(result, Ok(()));
    assert_eq!(decoder.position(), start + bytes.len() as u64);
    decoder
}

#[test]
fn every_chunking_gives_the_same_records() {
    let format = format(1);
    for (seed, start) in [(1, Lsn(MB)), (2, Lsn(5 * MB + 8192)), (3, Lsn(5 * MB - 8))] {
        let log = mixed_log(format, start, seed, 30);
        let mut random = Random(seed);
        let mut cuts: Vec<Box<dyn FnMut() -> usize>> = vec![
            Box::new(|| usize::MAX),
            Box::new(|| 1),
            Box::new(|| 7),
            Box::new(|| 8192),
            Box::new(move || 1 + random.below(300) as usize),
        ];
        for next_len in &mut cuts {
            let decoder = WalDecoder::new(format, start);
            let (decoder, records, result) = decode(decoder, log.wal.bytes(), next_len);
            assert_eq!(result, Ok(()), "seed {seed}");
            assert!(records == log.records, "seed {seed}");
            assert_eq!(decoder.record_end(), log.wal.position());
            assert_eq!(
                decoder.last_record(),
                log.records.last().map(|r| r.start_lsn)
            );
        }
    }
}

#[test]
fn a_log_that_stops_anywhere_ends_with_its_last_whole_record() {
    let format = format(1);
    let log = mixed_log(format, Lsn(3 * MB - 5000 * 8), 4, 25);
    let mut decoder = WalDecoder::new(format, log.wal.start());
    let mut whole = log.records.iter().peekable();
    let mut expected = log.wal.start();
    for byte in log.wal.bytes() {
        decoder.feed(std::slice::from_ref(byte)).expect("sound WAL");
        if let Some(record) = whole.next_if(|record| record.end_lsn <= decoder.position()) {
            expected = record.end_lsn;
        }
        assert_eq!(decoder.record_end(), expected);
    }
    assert_eq!(whole.next(), None);
}

#[test]
fn decoding_can_go_on_from_every_record_end() {
    let format = format(1);
    let log = mixed_log(format, Lsn(2 * MB), 5, 30);
    for (i, record) in log.records.iter().enumerate() {
        let rest = log.wal.bytes_from(record.end_lsn);
        for decoder in [
            WalDecoder::new(format, record.end_lsn),
            WalDecoder::after_record(format, record.end_lsn, Some(record.start_lsn)),
            WalDecoder::after_record(format, record.end_lsn, None),
        ] {
            let (_, records, result) = decode(decoder, rest, || 5000);
            assert_eq!(result, Ok(()));
            assert!(records == log.records[i + 1..]);
        }
        // The place behind the page header, where the server says it will insert, serves as well.
        if let Some(next) = log.records.get(i + 1) {
            let begun = WalDecoder::new(format, next.start_lsn);
            let (_, records, result) = decode(begun, log.wal.bytes_from(next.start_lsn), || 5000);
            if next.start_lsn.segment_start(8192) == record.end_lsn.segment_start(8192) {
                assert_eq!(result, Ok(()));
                assert!(records == log.records[i + 1..]);
            }
        }
    }
}

#[test]
fn a_start_in_the_middle_of_a_record_skips_to_the_next() {
    let format = format(1);
    // Ends 1. inside a page off the grid of 8, 2. exactly at the end of a page, 3. of a segment.
    for (name, end) in [
        ("inside", Lsn(4 * MB + 808)),
        ("page", Lsn(4 * MB + 8192 * 3)),
        ("segment", Lsn(5 * MB)),
    ] {
        let mut wal = WalBuilder::new(format, 1, Lsn(2 * MB + 800));
        let first = wal.noop(10);
        let long = match name {
            "inside" => wal.noop(2 * MB as u32 + 5),
            _ => wal.record_ending_at(end),
        };
        let next = wal.noop(11);
        for start in [3 * MB, 3 * MB + 8192, 4 * MB] {
            let begun = WalDecoder::new(format, Lsn(start));
            let (decoder, records, result) = decode(begun, wal.bytes_from(Lsn(start)), || 4001);
            assert_eq!((result, records), (Ok(()), vec![next]), "{name}");
            assert_eq!(decoder.record_end(), next.end_lsn);
            // Until the first record that could be checked, nothing is promised.
            let skipped = &wal.bytes_from(Lsn(start))[..(long.end_lsn - Lsn(start)) as usize];
            assert_eq!(
                decoded(format, Lsn(start), skipped).record_end(),
                Lsn(start)
            );
            // Where a record is known to end, a page that continues one is an error.
            let mut strict = WalDecoder::after_record(format, Lsn(start), Some(first.start_lsn));
            let error = strict
                .feed(wal.bytes_from(Lsn(start)))
                .expect_err("not a boundary");
            assert!(
                matches!(error, WalError::Continuation { expected: 0, .. }),
                "{error}"
            );
        }
    }
}

#[test]
fn all_segment_sizes_and_versions() {
    for exponent in 0..=10 {
        for version in PgVersion::ALL {
            let format = WalFormat {
                version,
                ..format(1 << exponent)
            };
            let size = MB << exponent;
            // Over the end of a segment, without writing a whole one.
            let mut wal = WalBuilder::new(format, 1, Lsn(size * 5 - 8192));
            wal.noop(100);
            let over = wal.noop(30_000);
            assert!(over.start_lsn < Lsn(size * 5) && Lsn(size * 5) < over.end_lsn);
            let last = wal.noop(0);
            assert_eq!(
                decoded(format, wal.start(), wal.bytes()).record_end(),
                last.end_lsn
            );
            let refusal = match version {
                PgVersion::V15 => PgVersion::V16,
                _ => PgVersion::V15,
            };
            let error = WalDecoder::new(
                WalFormat {
                    version: refusal,
                    ..format
                },
                wal.start(),
            )
            .feed(wal.bytes())
            .expect_err("another version");
            assert!(matches!(error, WalError::PageMagic { .. }), "{error}");
        }
    }
}

#[test]
fn another_cluster_or_segment_size_is_refused_at_the_segment() {
    let ours = format(2);
    let mut wal = WalBuilder::new(ours, 1, Lsn(4 * MB));
    wal.noop(100);
    let refusal = |format| WalDecoder::new(format, Lsn(4 * MB)).feed(wal.bytes());
    assert_eq!(
        refusal(WalFormat {
            system_id: 5,
            ..ours
        }),
        Err(WalError::SystemId {
            page_lsn: Lsn(4 * MB),
            found: ours.system_id,
            expected: 5
        })
    );
    let name = "segment size";
    assert_eq!(
        refusal(format(4)),
        Err(WalError::PageField {
            page_lsn: Lsn(4 * MB),
            name,
            found: 2 * MB
        })
    );
}

#[test]
fn a_huge_record_spans_segments() {
    let format = format(1);
    let mut wal = WalBuilder::new(format, 1, Lsn(7 * MB + 4096));
    wal.noop(1);
    let huge = wal.noop(9 * MB as u32);
    let last = wal.noop(1);
    assert_eq!(
        huge.end_lsn.segno(MB as u32) - huge.start_lsn.segno(MB as u32),
        9
    );
    assert_eq!(
        decoded(format, wal.start(), wal.bytes()).record_end(),
        last.end_lsn
    );
}

#[test]
fn a_switch_record_is_whole_with_the_last_byte_of_its_padding() {
    let format = format(1);
    // From 16 bytes before a page's end the switch record itself crosses it; 24 bytes before a
    // segment's end there is no padding at all.
    for distance in [
        MB - 64,
        MB - 8192 + 16,
        8192 + 16,
        8192 + 24,
        8192,
        48,
        32,
        24,
    ] {
        let begin = Lsn(4 * MB - distance);
        let mut wal = WalBuilder::new(format, 1, begin.segment_start(8192));
        if begin != wal.position() {
            wal.record_ending_at(begin);
        }
        let before = wal.position();
        let switch = wal.switch();
        assert_eq!(switch.end_lsn, Lsn(4 * MB));
        for piece in [1000, 8192, usize::MAX] {
            let (last, most) = wal.bytes().split_last().expect("not empty");
            let begun = WalDecoder::new(format, wal.start());
            let (mut decoder, _, result) = decode(begun, most, || piece);
            assert_eq!(result, Ok(()));
            assert_eq!(decoder.record_end(), before, "distance {distance}");
            let in_padding = distance > 24;
            assert_eq!(
                decoder.switch_padding_end(),
                in_padding.then_some(Lsn(4 * MB))
            );
            decoder.feed(&[*last]).expect("sound WAL");
            assert_eq!(decoder.record_end(), Lsn(4 * MB));
            assert_eq!(decoder.switch_padding_end(), None);
        }
    }
}

#[test]
fn stale_bytes_behind_a_switch_are_refused_unless_expected() {
    let format = format(1);
    let mut wal = WalBuilder::new(format, 1, Lsn(4 * MB));
    wal.noop(7);
    let switch = wal.switch();
    let next = wal.noop(7);
    let mut bytes = wal.bytes().to_vec();
    let stale = Lsn(4 * MB + 700_000);
    bytes[700_000] = 0x10;
    let (decoder, _, result) = decode(WalDecoder::new(format, wal.start()), &bytes, || 100);
    assert_eq!(
        result,
        Err(WalError::Padding {
            lsn: stale,
            found: 0x10
        })
    );
    assert_eq!(
        (decoder.record_end(), decoder.position()),
        (switch.header.prev_lsn + 40, stale)
    );
    let mut lenient = WalDecoder::new(format, wal.start());
    lenient.allow_stale_switch_padding();
    let (decoder, _, result) = decode(lenient, &bytes, || 100);
    assert_eq!((result, decoder.record_end()), (Ok(()), next.end_lsn));
    // Cleaned on the way, the bytes are again those the server meant.
    let mut cleaner = WalDecoder::new(format, wal.start());
    for chunk in bytes.chunks_mut(100_001) {
        cleaner
            .feed_and_clean(chunk)
            .expect("only the padding was wrong");
    }
    assert!(bytes == wal.bytes());
    assert_eq!(cleaner.record_end(), next.end_lsn);
}

#[test]
fn a_record_lost_in_a_crash_is_passed_over() {
    let format = format(1);
    // The lost record ends: at its first page; pages later; at a segment's end; in its header.
    for (start, n_pages) in [
        (4096, 0),
        (4096, 3),
        (MB - 4096, 0),
        (8192 - 8, 0),
        (8192 - 16, 2),
    ] {
        let mut wal = WalBuilder::new(format, 1, Lsn(2 * MB));
        let before = wal.record_ending_at(Lsn(2 * MB + start));
        let (lost, overwrite) = wal.overwritten(100_000, n_pages);
        let after = wal.noop(5);
        assert_eq!(overwrite.header.prev_lsn, before.start_lsn);
        let begun = WalDecoder::new(format, wal.start());
        let (_, records, result) = decode(begun, wal.bytes(), || 13);
        assert_eq!((result, records), (Ok(()), vec![before, overwrite, after]));
        // Nothing moves before the record that replaces it is whole.
        let unfinished = &wal.bytes()[..(overwrite.end_lsn - wal.start()) as usize - 1];
        assert_eq!(decoded(format, wal.start(), unfinished).record_end(), lost);
        // From the page itself it reads as well.
        let page = overwrite.start_lsn.segment_start(8192);
        let begun = WalDecoder::new(format, page);
        let (_, records, result) = decode(begun, wal.bytes_from(page), || 13);
        assert_eq!((result, records), (Ok(()), vec![overwrite, after]));
        let behind_header = WalDecoder::new(format, overwrite.start_lsn);
        let (_, records, _) = decode(behind_header, wal.bytes_from(overwrite.start_lsn), || 13);
        assert_eq!(records, vec![overwrite, after]);
    }
}

#[test]
fn a_new_timeline_shows_on_the_first_page_begun_after_the_switch() {
    let format = format(1);
    let mut wal = WalBuilder::new(format, 3, Lsn(2 * MB));
    wal.noop(100);
    let switch_point = wal.position();
    wal.set_tli(5);
    wal.noop(20_000);
    let history = |text: &str| TimelineHistory::parse(5, text).expect("a good history");
    let feed = |history: Option<TimelineHistory>| {
        let mut decoder = WalDecoder::new(format, wal.start());
        if let Some(history) = history {
            decoder.expect_timelines(history);
        }
        decoder.feed(wal.bytes())
    };
    assert_eq!(feed(None), Ok(()));
    assert_eq!(feed(Some(history(&format!("3\t{switch_point}\t")))), Ok(()));
    let second_page = Lsn(2 * MB + 8192);
    assert_eq!(
        feed(Some(history(&format!("3\t{}\t", second_page + 8)))),
        Err(WalError::Timeline {
            page_lsn: second_page,
            found: 5,
            expected: 3
        })
    );
    wal.set_tli(4);
    wal.noop(20_000);
    let mut decoder = WalDecoder::new(format, wal.start());
    let error = decoder.feed(wal.bytes()).expect_err("a timeline went back");
    assert!(
        matches!(
            error,
            WalError::Timeline {
                found: 4,
                expected: 5,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_place_where_no_record_can_begin_is_an_error() {
    let format = format(1);
    for start in [
        4 * MB + 4,
        4 * MB + 8,
        4 * MB + 32,
        4 * MB + 8192 + 16,
        1 << 63,
        u64::MAX,
    ] {
        let mut decoder = WalDecoder::new(format, Lsn(start));
        let refusal = Err(WalError::Start { lsn: Lsn(start) });
        assert_eq!(decoder.feed(&[0]), refusal);
        assert_eq!(decoder.feed(&[]), refusal, "an error stays");
    }
}

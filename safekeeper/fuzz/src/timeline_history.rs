//! Postgres's timeline history files, and the names of files that a directory of WAL holds.
//!
//! The first byte of the input is the timeline that the file tells of; the rest is its text, and
//! each line of it is tried as a file name and as a position.

use allocation_counter::measure;
use safekeeper_protocol::Lsn;
use safekeeper_wal::{
    SegmentSize, TimelineHistory, history_file_name, parse_history_file_name,
    parse_segment_file_name, segment_file_name,
};

/// The shortest line takes 6 bytes in the file and 40 in memory, in a list that grows by doubling.
const HEAP_PER_BYTE: u64 = 24;
/// The list begins with room for four.
const HEAP_OF_LIST: u64 = 256;

pub fn check(input: &[u8]) {
    let Some((&tli, text)) = input.split_first() else {
        return;
    };
    let Ok(text) = std::str::from_utf8(text) else {
        return;
    };
    let mut parsed = None;
    let heap = measure(|| parsed = Some(TimelineHistory::parse(tli.into(), text))).bytes_max;
    assert!(heap <= HEAP_PER_BYTE * text.len() as u64 + HEAP_OF_LIST);
    if let Some(Ok(history)) = parsed {
        check_history(&history);
    }
    for line in text.lines() {
        check_name(line);
    }
}

fn check_history(history: &TimelineHistory) {
    let again = TimelineHistory::parse(history.tli, &history.to_string());
    assert_eq!(again.as_ref(), Ok(history));
    let mut begin = Lsn::INVALID;
    for ancestor in &history.ancestors {
        assert_eq!(history.begin(ancestor.tli), Some(begin));
        assert_eq!(history.switch_point(ancestor.tli), Some(ancestor.end_lsn));
        if begin < ancestor.end_lsn {
            assert_eq!(history.tli_at(begin), ancestor.tli);
            assert_eq!(history.tli_at(Lsn(ancestor.end_lsn.0 - 1)), ancestor.tli);
        }
        begin = ancestor.end_lsn;
    }
    assert_eq!(history.begin(history.tli), Some(begin));
    assert_eq!(history.tli_at(begin), history.tli);
    assert_eq!(history.tli_at(Lsn(u64::MAX)), history.tli);
}

/// A name that is understood is the name that would be given.
fn check_name(name: &str) {
    if let Some(tli) = parse_history_file_name(name) {
        assert_eq!(history_file_name(tli), name);
    }
    for size in [SegmentSize::MIN, SegmentSize::DEFAULT, SegmentSize::MAX] {
        if let Some((tli, segno)) = parse_segment_file_name(name, size) {
            assert_eq!(segment_file_name(tli, segno, size), name);
            assert!(segno.checked_mul(size.bytes().into()).is_some());
        }
    }
    if let Ok(lsn) = name.parse::<Lsn>() {
        assert_eq!(lsn.to_string().parse(), Ok(lsn));
    }
}

/// Files as servers write them and as people mend them, and names.
pub fn seeds() -> Vec<Vec<u8>> {
    [
        "\x04# mended by hand\n\n 1 0/10 \r\n2\t0/10",
        "\x031\t0/3000148\tno recovery target specified\n\n2\t1/5A00000\tat restore point \"x\"\n",
        "\x0200000002.history\n0000000100000000000000FF\n00000001FFFFFFFF00000003\n",
    ]
    .map(|seed| seed.as_bytes().to_vec())
    .to_vec()
}

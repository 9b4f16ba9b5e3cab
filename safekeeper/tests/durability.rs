//! Durability: real files, and what becomes of them when a process is killed, a disk is full, a
//! bit flips.
//!
//! Each test says of one log (`durability/log.rs`) what was promised, does something to it, and
//! opens it again: what was flushed is there, what was cut is not, and what is damaged is noticed.

#[path = "durability/fault_disk.rs"]
mod fault_disk;
#[path = "durability/log.rs"]
mod log;
#[path = "durability/power.rs"]
mod power;
#[path = "durability/slots.rs"]
mod slots;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use fault_disk::FaultDisk;
use log::{LogDir, SEGMENT, START, history, wal_from};
use power::PowerDisk;
use safekeeper::control_file::{ControlFile, cluster_dir, read_state};
use safekeeper::disk::Disk;
use safekeeper::dump::dump;
use safekeeper::identity::Identity;
use safekeeper::keeper::{Keeper, PushError};
use safekeeper::metrics::Metrics;
use safekeeper::retention::{Retention, Space};
use safekeeper::verify::verify;
use safekeeper::wal_reader::ReadError;
use safekeeper::wal_storage::{OpenError, TruncateError, WalStorage, WriteError};
use safekeeper_protocol::*;
use safekeeper_wal::synthetic::WalBuilder;

/// A small generator, so that a failing run can be repeated (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % n
    }
}

/// Records of all sizes: inside a page, over pages, over segments.
fn mixed_wal(n_records: u32) -> WalBuilder {
    let mut wal = wal_from(START);
    for i in 0..n_records {
        wal.noop([10, 300, 9_000, 100, 60_000, 0, 400_000][i as usize % 7] + i);
    }
    wal
}

#[test]
fn what_was_flushed_is_there_again() {
    let dir = LogDir::new();
    let wal = mixed_wal(70);
    let mut storage = dir.begin();
    for part in wal.bytes().chunks(77_777) {
        storage.write(Tli(1), storage.write_lsn(), part).unwrap();
    }
    assert_eq!(storage.flush_lsn(), START);
    assert_eq!(storage.flush().unwrap(), wal.position());
    assert!(wal.position() - START > 4 * SEGMENT);
    drop(storage);

    let storage = dir.open();
    assert_eq!(storage.flush_lsn(), wal.position());
    assert_eq!(storage.write_lsn(), wal.position());
    assert_eq!(storage.oldest_lsn(), START);
    assert_eq!(dir.read(START, wal.position()).unwrap(), wal.bytes());
    dir.assert_zero_behind(wal.position());
}

#[test]
fn a_directory_without_wal_holds_an_empty_log() {
    let dir = LogDir::new();
    let mut storage = dir.open();
    assert_eq!(storage.flush().unwrap(), Lsn::INVALID);
    assert_eq!(
        (storage.write_lsn(), storage.oldest_lsn()),
        (Lsn(0), Lsn(0))
    );
    // Begun and begun again elsewhere, as long as it holds nothing.
    for begin in [START, START + SEGMENT, START] {
        storage.truncate(Tli(1), begin).unwrap();
        assert_eq!(storage.flush().unwrap(), begin);
        assert_eq!(dir.segment_names().len(), 1);
        drop(storage);
        storage = dir.open();
        assert_eq!(storage.flush_lsn(), begin);
    }
    let refused = storage.truncate(Tli(1), START + 8192);
    assert!(matches!(refused, Err(TruncateError::Refused { .. })));
}

#[test]
fn a_torn_record_is_cut_and_its_bytes_do_not_come_back() {
    let dir = LogDir::new();
    let mut wal = wal_from(START);
    wal.noop(5_000);
    let end = wal.position();
    wal.noop(2_500_000);
    // As far as the third segment.
    let torn = &wal.bytes()[..2_300_000];
    let mut storage = dir.begin();
    storage.write(Tli(1), START, torn).unwrap();
    assert_eq!(storage.flush().unwrap(), end);
    drop(storage);

    let mut storage = dir.open();
    assert_eq!((storage.flush_lsn(), storage.write_lsn()), (end, end));
    dir.assert_zero_behind(end);
    storage.write(Tli(1), end, wal.bytes_from(end)).unwrap();
    assert_eq!(storage.flush().unwrap(), wal.position());
    assert_eq!(dir.read(START, wal.position()).unwrap(), wal.bytes());
}

#[test]
fn a_flipped_byte_below_commit_lsn_is_corruption_and_above_it_the_end() {
    let mut dir = LogDir::new();
    let wal = mixed_wal(12);
    dir.hold(&wal);
    let mut committed = wal_from(START);
    for i in 0..9 {
        committed.noop([10, 300, 9_000, 100, 60_000, 0, 400_000][i as usize % 7] + i);
    }
    dir.state.commit_lsn = committed.position();
    let segment = dir.state.commit_lsn.segment_start(SEGMENT as u32);
    let mut random = Random(42);
    for _ in 0..60 {
        let lsn = segment + random.below(wal.position() - segment);
        // A flag of the page's header that nobody acts upon.
        if lsn.0 % 8192 == 2 {
            continue;
        }
        dir.flip(lsn);
        match dir.try_open() {
            Err(OpenError::Corrupt { lsn: at, .. }) => {
                assert!(lsn < dir.state.commit_lsn && at <= lsn, "{lsn} {at}");
                dir.flip(lsn);
            }
            Err(error) => panic!("{lsn}: {error}"),
            Ok(mut storage) => {
                let end = storage.flush_lsn();
                assert!(end >= dir.state.commit_lsn && end <= lsn, "{lsn} {end}");
                dir.assert_zero_behind(end);
                storage.write(Tli(1), end, wal.bytes_from(end)).unwrap();
                storage.flush().unwrap();
            }
        }
    }
    assert_eq!(dir.read(START, wal.position()).unwrap(), wal.bytes());
}

#[test]
fn a_missing_segment_is_corruption_only_if_it_was_committed() {
    let mut dir = LogDir::new();
    let wal = mixed_wal(12);
    dir.hold(&wal);
    let names = dir.segment_names();
    dir.state.commit_lsn = wal.position();
    let last = dir.wal_dir().join(&names[names.len() - 1]);
    let bytes = std::fs::read(&last).unwrap();
    std::fs::remove_file(&last).unwrap();
    let error = dir.try_open().unwrap_err();
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
    // A file that lost its end, as a failed copy leaves it.
    std::fs::write(&last, &bytes[..5000]).unwrap();
    let error = dir.try_open().unwrap_err();
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
    dir.state.commit_lsn = Lsn::INVALID;
    let storage = dir.open();
    assert!(storage.flush_lsn() < wal.position());
    dir.assert_zero_behind(storage.flush_lsn());
    drop(storage);
    for name in dir.segment_names() {
        std::fs::remove_file(dir.wal_dir().join(name)).unwrap();
    }
    assert_eq!(dir.open().flush_lsn(), Lsn::INVALID);
    dir.state.commit_lsn = wal.position();
    let error = dir.try_open().unwrap_err();
    assert!(
        error.to_string().contains("there are no segments"),
        "{error}"
    );
    dir.state.commit_lsn = Lsn::INVALID;
    std::fs::remove_dir(dir.wal_dir()).unwrap();
    let error = dir.try_open().unwrap_err();
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
}

#[test]
fn wal_that_the_control_file_does_not_know_is_not_removed() {
    // The control file is an older copy than the WAL.
    let mut dir = LogDir::new();
    let wal = mixed_wal(12);
    dir.hold(&wal);
    let before = dir.files();
    for known in [history(&[]), history(&[(7, START)])] {
        dir.state.history = known;
        let error = dir.try_open().unwrap_err();
        assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
        assert_eq!(dir.files(), before);
    }
}

#[test]
fn damaged_wal_is_refused_and_the_log_goes_on() {
    let dir = LogDir::new();
    let wal = mixed_wal(12);
    let mut storage = dir.begin();
    let mut random = Random(7);
    while storage.write_lsn() < wal.position() {
        let begin = storage.write_lsn();
        let left = wal.bytes_from(begin);
        let part = &left[..left.len().min(1 + random.below(150_000) as usize)];
        let mut damaged = part.to_vec();
        let at = random.below(part.len() as u64) as usize;
        damaged[at] ^= 0x80;
        let flushed = storage.flush().unwrap();
        match storage.write(Tli(1), begin, &damaged) {
            Err(WriteError::Damaged(_)) => assert_eq!(storage.write_lsn(), begin),
            // The checksum stands in another part, where it would be noticed. The record begins
            // again here, and comes sound.
            Ok(()) => {
                assert!(storage.flush().unwrap() <= begin + at as u64);
                storage.truncate(Tli(1), storage.flush_lsn()).unwrap();
                let end = begin + part.len() as u64;
                let begin = storage.write_lsn();
                let again = &wal.bytes_from(begin)[..(end - begin) as usize];
                storage.write(Tli(1), begin, again).unwrap();
                continue;
            }
            Err(error) => panic!("{error}"),
        }
        assert_eq!(storage.flush().unwrap(), flushed);
        storage.write(Tli(1), begin, part).unwrap();
    }
    assert_eq!(storage.flush().unwrap(), wal.position());
    assert_eq!(dir.read(START, wal.position()).unwrap(), wal.bytes());
}

#[test]
fn a_cut_log_ends_at_a_record_and_goes_on_with_other_bytes() {
    let dir = LogDir::new();
    let wal = mixed_wal(14);
    let mut boundaries = Vec::new();
    let mut again = wal_from(START);
    for i in 0..14 {
        boundaries.push(again.noop([10, 300, 9_000, 100, 60_000, 0, 400_000][i % 7] + i as u32));
    }
    dir.hold(&wal);
    let mut storage = dir.open();
    let middle = boundaries[5].end_lsn;
    for lsn in [middle + 8, START + 24, wal.position() + 8, START + SEGMENT] {
        let refused = storage.truncate(Tli(1), lsn);
        assert!(
            matches!(refused, Err(TruncateError::Refused { .. })),
            "{lsn}"
        );
        assert_eq!(storage.flush_lsn(), wal.position());
    }
    for record in boundaries.iter().rev() {
        storage.truncate(Tli(1), record.end_lsn).unwrap();
        assert_eq!(storage.flush_lsn(), record.end_lsn);
        dir.assert_zero_behind(record.end_lsn);
        drop(storage);
        storage = dir.open();
        assert_eq!(storage.flush_lsn(), record.end_lsn);
        // A record that does not follow the one before the cut is refused, the right one is not.
        let format = storage.format();
        let mut other = WalBuilder::new(format, 1, record.end_lsn).following(START + 8);
        other.noop(33);
        let refused = storage.write(Tli(1), record.end_lsn, other.bytes());
        assert!(matches!(refused, Err(WriteError::Damaged(_))));
        let mut other = WalBuilder::new(format, 1, record.end_lsn).following(record.start_lsn);
        other.noop(33);
        storage
            .write(Tli(1), record.end_lsn, other.bytes())
            .unwrap();
        assert_eq!(storage.flush().unwrap(), other.position());
    }
    storage.truncate(Tli(1), START).unwrap();
    dir.assert_zero_behind(START);
    assert_eq!(storage.flush().unwrap(), START);
}

#[test]
fn a_truncation_that_dies_at_any_step_leaves_a_prefix_that_opens() {
    let mut wal = wal_from(START);
    for len in [100, 900_000, 50, 70_000, 1_500_000, 20] {
        wal.noop(len);
    }
    let mut keep = wal_from(START);
    keep.noop(100);
    let end = keep.position();
    let mut n_steps = 0;
    loop {
        let dir = LogDir::new();
        dir.hold(&wal);
        let (disk, faults) = FaultDisk::new(dir.temp.path());
        let mut storage = WalStorage::open(disk, &log::cluster(), &dir.state).unwrap();
        faults.die_after(n_steps);
        let result = storage.truncate(Tli(1), end);
        drop(storage);
        let storage = dir.open();
        let left = storage.flush_lsn();
        assert!(
            end <= left && left <= wal.position(),
            "step {n_steps}: {left}"
        );
        let len = (left - START) as usize;
        assert_eq!(dir.read(START, left).unwrap(), wal.bytes()[..len]);
        dir.assert_zero_behind(left);
        match result {
            Ok(()) => {
                assert_eq!(left, end);
                break;
            }
            Err(TruncateError::Failed(_)) => n_steps += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(n_steps > 6, "{n_steps}");
}

#[test]
fn opening_may_die_at_any_step_and_be_repeated() {
    let mut wal = wal_from(START);
    wal.noop(5_000);
    let end = wal.position();
    wal.noop(3_000_000);
    for n_steps in 0.. {
        let dir = LogDir::new();
        let mut storage = dir.begin();
        storage
            .write(Tli(1), START, &wal.bytes()[..2_500_000])
            .unwrap();
        drop(storage);
        std::fs::write(dir.wal_dir().join("spare.0.tmp"), "x").unwrap();
        let (disk, faults) = FaultDisk::new(dir.temp.path());
        faults.die_after(n_steps);
        let opened = WalStorage::open(disk, &log::cluster(), &dir.state).is_ok();
        let storage = dir.open();
        assert_eq!(storage.flush_lsn(), end);
        dir.assert_zero_behind(end);
        assert_eq!(dir.files().len(), 1);
        if opened {
            assert!(n_steps > 3);
            break;
        }
    }
}

#[test]
fn a_new_timeline_goes_on_in_a_file_of_its_own() {
    // (bytes before the switch, name of the new timeline's first segment)
    for at_boundary in [false, true] {
        let mut dir = LogDir::new();
        let mut wal = wal_from(START);
        wal.noop(300_000);
        let end = START + SEGMENT;
        if at_boundary {
            wal.record_ending_at(end);
        }
        let switch = wal.position();
        dir.hold(&wal);
        let mut storage = dir.open();
        let content = format!("1\t{switch}\tno recovery target specified\n");
        let file = TimelineFile {
            tli: Tli(2),
            content: content.into_bytes(),
        };
        storage
            .replace_timeline_files(std::slice::from_ref(&file))
            .unwrap();
        wal.set_tli(2);
        wal.noop(1_000_000);
        storage
            .write(Tli(2), switch, wal.bytes_from(switch))
            .unwrap();
        assert_eq!(storage.flush().unwrap(), wal.position());
        drop(storage);
        let old_state = dir.state.clone();
        dir.state.history = history(&[(1, START), (2, switch)]);
        let mut storage = dir.open();
        assert_eq!(storage.flush_lsn(), wal.position());
        assert_eq!(storage.timeline_files().unwrap(), [file]);
        assert_eq!(dir.read(START, wal.position()).unwrap(), wal.bytes());
        let names = dir.segment_names();
        assert!(names.contains(&"000000010000000000000003".to_owned()));
        let copied = names.contains(&"000000020000000000000003".to_owned());
        assert_eq!(copied, !at_boundary);
        assert!(names.contains(&"000000020000000000000004".to_owned()));

        // The promotion dies: the log goes on on timeline 1.
        storage.truncate(Tli(1), switch).unwrap();
        storage.replace_timeline_files(&[]).unwrap();
        dir.assert_zero_behind(switch);
        assert_eq!(dir.segment_names(), ["000000010000000000000003"]);
        dir.state = old_state;
        drop(storage);
        let mut storage = dir.open();
        assert_eq!(storage.flush_lsn(), switch);
        let mut other = wal_from(START);
        other.noop(300_000);
        if at_boundary {
            other.record_ending_at(end);
        }
        other.noop(900_000);
        storage
            .write(Tli(1), switch, other.bytes_from(switch))
            .unwrap();
        assert_eq!(storage.flush().unwrap(), other.position());
        assert_eq!(dir.read(START, other.position()).unwrap(), other.bytes());
    }
}

#[test]
fn pages_of_another_timeline_than_the_history_names_are_refused() {
    let dir = LogDir::new();
    let mut storage = dir.begin();
    let mut wal = wal_from(START);
    wal.set_tli(2);
    wal.noop(10);
    let refused = storage.write(Tli(1), START, wal.bytes());
    assert!(matches!(refused, Err(WriteError::Damaged(_))));
}

#[test]
fn segments_are_made_ahead_and_old_ones_are_used_again() {
    let dir = LogDir::new();
    let mut storage = dir.begin();
    storage.prepare_in_background().unwrap();
    let mut wal = wal_from(START);
    let mut inodes = std::collections::HashSet::new();
    for round in 0..40u32 {
        let begin = wal.position();
        wal.noop(150_000 + round * 1000);
        storage.write(Tli(1), begin, wal.bytes_from(begin)).unwrap();
        storage.flush().unwrap();
        storage.remove_before(begin).unwrap();
        // Nothing is lost of what is kept, whatever the other thread is doing.
        let oldest = storage.oldest_lsn();
        assert!(oldest >= START && oldest <= begin);
        assert_eq!(
            dir.read(oldest, wal.position()).unwrap(),
            wal.bytes_from(oldest)
        );
        for name in dir.segment_names() {
            use std::os::unix::fs::MetadataExt;
            if let Ok(metadata) = std::fs::metadata(dir.wal_dir().join(name)) {
                inodes.insert(metadata.ino());
            }
        }
    }
    let written = (wal.position() - START) / SEGMENT;
    assert!(written >= 6 && storage.oldest_lsn() > START + 4 * SEGMENT);
    wait_for("two segments made ahead", || {
        dir.segment_names().last().is_some_and(|name| {
            u64::from_str_radix(&name[16..], 16).unwrap() == wal.position().0 / SEGMENT + 2
        })
    });
    dir.assert_zero_behind(wal.position());
    let gone = dir.read(START, START + 100).unwrap_err();
    let text = gone.to_string();
    assert!(matches!(gone, ReadError::Removed { .. }));
    assert_eq!(
        text,
        "requested WAL segment 000000010000000000000003 has already been removed"
    );
    drop(storage);
    assert_eq!(dir.open().flush_lsn(), wal.position());
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

#[test]
fn what_recovery_needs_is_not_removed() {
    let mut dir = LogDir::new();
    let mut wal = wal_from(START);
    wal.noop(100);
    wal.noop(2_200_000);
    // The last record's rest is all that its last segment holds.
    let end = wal.position();
    dir.hold(&wal);
    let mut storage = dir.open();
    storage.remove_before(end).unwrap();
    drop(storage);
    dir.state.commit_lsn = end;
    assert_eq!(dir.open().flush_lsn(), end);
    // The control file may lag behind the removal.
    let mut storage = dir.open();
    wal.noop(2_200_000);
    wal.noop(50_000);
    storage.write(Tli(1), end, wal.bytes_from(end)).unwrap();
    storage.flush().unwrap();
    storage.remove_before(wal.position()).unwrap();
    assert!(storage.oldest_lsn() > end);
    drop(storage);
    let storage = dir.open();
    assert_eq!(storage.flush_lsn(), wal.position());
}

#[test]
fn who_wants_the_keeper_need_not_wait_for_all_old_wal_to_be_removed() {
    let mut dir = LogDir::new();
    let mut wal = wal_from(START);
    while wal.position() < START + 40 * SEGMENT {
        wal.noop(500_000);
    }
    dir.hold(&wal);
    dir.state.commit_lsn = wal.position();
    dir.persist();
    let (disk, faults) = FaultDisk::new(dir.temp.path());
    let identity = Identity {
        id: MemberId(1),
        incarnation: Incarnation(5),
    };
    let keeper = Keeper::open(disk, identity, log::SYSTEM_ID, |_| {
        Metrics::default().of_cluster("main")
    });
    let keeper = keeper.unwrap();
    let n_removed = || faults.n_dir_syncs.load(Ordering::SeqCst);
    let before = n_removed();
    faults.dir_sync_ms.store(10, Ordering::SeqCst);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let retention = Retention {
                wal_keep_size: 0,
                max_wal_keep: Some(SEGMENT),
                min_free_space: 0,
            };
            keeper.housekeep(&retention, Space::Enough);
        });
        wait_for("removal to begin", || n_removed() > before);
        let turn = keeper.take_turn();
        let n_waited_for = n_removed() - before;
        assert!(n_waited_for <= 8, "{n_waited_for}");
        drop(turn);
    });
    assert!(n_removed() - before >= 37);
    // Less one segment, if the rest of a record is all that is kept of the first.
    let bound = Lsn(wal.position().0 - SEGMENT).segment_start(SEGMENT as u32);
    let oldest_lsn = keeper.status().oldest_lsn.0;
    assert!(oldest_lsn <= bound && bound <= oldest_lsn + SEGMENT);
}

#[test]
fn a_log_that_has_lost_what_followed_the_rest_it_begins_with_is_corrupt() {
    let mut dir = LogDir::new();
    let mut wal = wal_from(START);
    wal.noop(2_200_000);
    // A term begins right behind the record with whose rest the oldest segment will begin.
    let rest_end = wal.position();
    wal.noop(1_000);
    dir.state.history = history(&[(1, START), (1, rest_end)]);
    dir.hold(&wal);
    dir.state.commit_lsn = wal.position();
    let mut storage = dir.open();
    storage.remove_before(wal.position()).unwrap();
    assert_eq!(storage.oldest_lsn(), START + 2 * SEGMENT);
    drop(storage);
    dir.flip(rest_end + 100);
    match dir.try_open() {
        Err(OpenError::Corrupt { lsn, .. }) => assert!(lsn <= rest_end),
        other => panic!("unexpected {other:?}"),
    }
    // What is not known to be committed may go.
    dir.state.commit_lsn = rest_end;
    assert_eq!(dir.open().flush_lsn(), rest_end);
}

#[test]
fn a_full_disk_refuses_wal_and_loses_nothing() {
    let dir = LogDir::new();
    let (disk, faults) = FaultDisk::new(dir.temp.path());
    let mut storage = WalStorage::open(disk.clone(), &log::cluster(), &dir.state).unwrap();
    storage.truncate(Tli(1), START).unwrap();
    let wal = mixed_wal(30);
    faults.set_full(true);
    let first = &wal.bytes()[..SEGMENT as usize - 10];
    storage.write(Tli(1), START, first).unwrap();
    let flushed = storage.flush().unwrap();
    let next = START + first.len() as u64;
    for _ in 0..3 {
        let refused = storage.write(Tli(1), next, wal.bytes_from(next));
        assert!(matches!(refused, Err(WriteError::NoSpace(_))));
        assert_eq!(storage.write_lsn(), next);
        assert_eq!(storage.flush().unwrap(), flushed);
    }
    // A vote, meanwhile.
    let (mut control, mut state) = ControlFile::open(disk.clone(), log::SYSTEM_ID).unwrap();
    for term in 2..5 {
        state.term = Term(term);
        control.persist(&state).unwrap();
        assert_eq!(read_state(disk.as_ref(), log::SYSTEM_ID).unwrap(), state);
    }
    faults.set_full(false);
    storage.write(Tli(1), next, wal.bytes_from(next)).unwrap();
    storage.flush().unwrap();
    // Removing takes no space, and gives some.
    faults.set_full(true);
    let end = wal.position();
    storage.remove_before(end).unwrap();
    assert!(storage.oldest_lsn() > START);
    let mut more = mixed_wal(30);
    more.noop(900_000);
    storage.write(Tli(1), end, more.bytes_from(end)).unwrap();
    assert_eq!(storage.flush().unwrap(), more.position());
}

#[test]
fn an_election_for_whose_history_file_there_is_no_room_can_be_repeated() {
    let mut dir = LogDir::new();
    let mut wal = wal_from(START);
    wal.noop(10_000);
    dir.hold(&wal);
    let end = wal.position();
    let version = ConfigurationVersion {
        term: Term(1),
        generation: 1,
    };
    let identity = Identity {
        id: MemberId(1),
        incarnation: Incarnation(5),
    };
    dir.state.term = Term(2);
    dir.state.configuration = Configuration {
        lineage: Lineage(1),
        version,
        members: vec![Member {
            id: identity.id,
            incarnation: identity.incarnation,
            host: "localhost".into(),
            port: 5454,
        }],
        new_members: None,
    };
    dir.persist();
    let (disk, faults) = FaultDisk::new(dir.temp.path());
    let metrics = |_: &ClusterIdentity| Metrics::default().of_cluster("main");
    let keeper = Keeper::open(disk, identity, log::SYSTEM_ID, metrics).unwrap();
    let elected = ProposerMessage::Elected(Elected {
        configuration_version: version,
        term: Term(2),
        history: history(&[(1, START), (2, end)]),
        start_lsn: end,
        timeline_files: vec![TimelineFile {
            tli: Tli(2),
            content: format!("1\t{end}\tx\n").into_bytes(),
        }],
    });
    let session = Session {
        id: 1,
        proposer_id: ProposerId(7),
    };
    let elect = || {
        let mut turn = keeper.take_turn();
        let address = ([127, 0, 0, 1], 1).into();
        turn.handle(session, address, &elected, 0, &mut Vec::new())
    };
    let control = dir
        .temp
        .path()
        .join(cluster_dir(log::SYSTEM_ID))
        .join("control");
    faults.set_full(true);
    for _ in 0..2 {
        let refused = elect();
        assert!(matches!(refused, Err(PushError::NoSpace(_))), "{refused:?}");
        assert_eq!(keeper.view().state.history, dir.state.history);
        // What it has promised it knows by itself, should the file be damaged meanwhile.
        std::fs::write(&control, [0xFF; 1000]).unwrap();
    }
    assert!(read_state(dir.disk.as_ref(), log::SYSTEM_ID).is_err());
    faults.set_full(false);
    elect().unwrap();
    let persisted = read_state(dir.disk.as_ref(), log::SYSTEM_ID).unwrap();
    assert_eq!(persisted.history, keeper.view().state.history);
    assert_eq!(
        keeper.view().state.history,
        history(&[(1, START), (2, end)])
    );
    assert_eq!(keeper.status().flush_lsn.0, end);
}

#[test]
fn a_file_size_limit_counts_as_a_full_disk() {
    // The limit of a real kernel, in a process of its own since it holds for all of it.
    let dir = LogDir::new();
    let mut child = rerun("limited_writer", &dir)
        .env("SAFEKEEPER_TEST_FSIZE", "500000")
        .spawn()
        .unwrap();
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}");
}

/// Names that were changed and could not be made durable are no reason to try again: what a file stands for is not
/// known then.
#[test]
fn a_directory_that_cannot_be_opened_is_no_full_disk() {
    let dir = LogDir::new();
    let mut child = rerun("without_descriptors", &dir).spawn().unwrap();
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}");
}

#[test]
fn a_flush_is_one_sync() {
    let dir = LogDir::new();
    let (disk, faults) = FaultDisk::new(dir.temp.path());
    let mut storage = WalStorage::open(disk, &log::cluster(), &dir.state).unwrap();
    storage.truncate(Tli(1), START).unwrap();
    let mut wal = wal_from(START);
    let syncs = |faults: &fault_disk::Faults| faults.n_data_syncs.load(Ordering::SeqCst);
    let before = syncs(&faults);
    for _ in 0..5 {
        let begin = wal.position();
        wal.noop(100);
        storage.write(Tli(1), begin, wal.bytes_from(begin)).unwrap();
    }
    storage.flush().unwrap();
    storage.flush().unwrap();
    assert_eq!(syncs(&faults) - before, 1);
}

#[test]
fn a_reader_notices_decay_and_serves_none_of_it() {
    let dir = LogDir::new();
    let wal = mixed_wal(12);
    dir.hold(&wal);
    let mut reader = dir.reader();
    let mut random = Random(3);
    for _ in 0..40 {
        let lsn = START + random.below(wal.position() - START);
        if lsn.0 % 8192 == 2 {
            continue;
        }
        dir.flip(lsn);
        let damaged = dir.read(START, wal.position());
        assert!(matches!(damaged, Err(ReadError::Damaged(_))), "{lsn}");
        dir.flip(lsn);
        // From anywhere, in pieces of any size.
        let mut begin = START + random.below(wal.position() - START);
        for _ in 0..5 {
            let left = (wal.position() - begin) as usize;
            let mut buffer = vec![0; left.min(random.below(300_000) as usize)];
            reader.read(begin, &mut buffer).unwrap();
            assert_eq!(buffer, wal.bytes_from(begin)[..buffer.len()]);
            begin = begin + buffer.len() as u64;
        }
    }
}

/// Whatever an append ends in, only whole records are promised; and from there the log goes on, after
/// a kill too.
#[test]
fn an_append_may_end_anywhere() {
    let mut wal = wal_from(START);
    let short = wal.noop(100);
    let long = wal.noop(20_000);
    let before = wal.noop(50);
    let (lost, overwriting) = wal.overwritten(30_000, 0);
    let behind = wal.noop(70);
    let switch = wal.switch();
    wal.noop(400);
    let next_page = |lsn: Lsn| Lsn((lsn.0 / 8192 + 1) * 8192);
    let torn = next_page(lost);
    for (name, end, promised) in [
        ("a page boundary", next_page(long.start_lsn), short.end_lsn),
        (
            "a page header",
            next_page(long.start_lsn) + 10,
            short.end_lsn,
        ),
        ("a record", long.end_lsn, long.end_lsn),
        ("a record header", long.end_lsn + 9, long.end_lsn),
        ("a record a crash cut short", lost + 30, before.end_lsn),
        ("the page behind it", torn, before.end_lsn),
        ("the mark of that page", torn + 3, before.end_lsn),
        (
            "the record that tells of it",
            overwriting.start_lsn + 4,
            before.end_lsn,
        ),
        (
            "that record's end",
            overwriting.end_lsn,
            overwriting.end_lsn,
        ),
        ("a switch record", switch.start_lsn + 24, behind.end_lsn),
        (
            "the zeros behind it",
            switch.start_lsn + 5_000,
            behind.end_lsn,
        ),
        ("the end of those zeros", switch.end_lsn, switch.end_lsn),
    ] {
        let dir = LogDir::new();
        let mut storage = dir.begin();
        let len = (end - START) as usize;
        storage.write(Tli(1), START, &wal.bytes()[..len]).unwrap();
        assert_eq!(storage.flush().unwrap(), promised, "within {name}");
        // Killed, and found again: what follows the last whole record is gone or is sent again.
        drop(storage);
        let mut storage = dir.open();
        // The zeros behind a switch record were there before they were written.
        let found = match (switch.start_lsn + 24..switch.end_lsn).contains(&end) {
            true => switch.end_lsn,
            false => promised,
        };
        assert_eq!(storage.flush_lsn(), found, "after a kill within {name}");
        let next = storage.write_lsn();
        storage.write(Tli(1), next, wal.bytes_from(next)).unwrap();
        assert_eq!(storage.flush().unwrap(), wal.position(), "behind {name}");
        assert_eq!(dir.read(START, wal.position()).unwrap(), wal.bytes());
    }
}

#[test]
fn a_reader_may_begin_in_the_zeros_behind_a_switch() {
    let dir = LogDir::new();
    let mut wal = wal_from(START);
    wal.noop(20_000);
    wal.switch();
    wal.noop(20_000);
    dir.hold(&wal);
    for offset in [0, 30_000, 500_000, SEGMENT - 8192, SEGMENT - 1, SEGMENT] {
        let begin = START + offset;
        let bytes = dir.read(begin, wal.position()).unwrap();
        assert_eq!(bytes, wal.bytes_from(begin));
    }
    let storage = dir.open();
    assert_eq!(storage.flush_lsn(), wal.position());
}

#[test]
fn verify_and_dump_tell_sound_from_broken_and_write_nothing() {
    let mut dir = LogDir::new();
    dir.make_data_dir();
    let mut wal = mixed_wal(12);
    let switch = wal.position();
    dir.hold(&wal);
    let mut storage = dir.open();
    wal.set_tli(2);
    wal.noop(1_500_000);
    storage
        .write(Tli(2), switch, wal.bytes_from(switch))
        .unwrap();
    storage.flush().unwrap();
    storage.prepare_in_background().unwrap();
    dir.state.history = history(&[(1, START), (2, switch)]);
    dir.state.commit_lsn = wal.position();
    dir.persist();
    let path = dir.temp.path();

    // With the log open.
    let report = verify(path).unwrap();
    assert!(report.is_sound(), "{report}");
    let cluster = &report.clusters[0];
    assert_eq!(
        (cluster.begin_lsn, cluster.end_lsn),
        (START, wal.position())
    );
    drop(storage);
    let dumped = |dir: &LogDir| {
        let mut out = Vec::new();
        dump(dir.temp.path(), &mut out).unwrap();
        String::from_utf8(out).unwrap()
    };
    let before = dir.files();
    let text = dumped(&dir);
    assert!(
        text.contains("cluster 77 \"main\": PostgreSQL 15, segments of 1MB"),
        "{text}"
    );
    assert!(
        text.contains(&format!("WAL ends at {}", wal.position())),
        "{text}"
    );

    // A flipped byte anywhere, also far below commit_lsn and in the older timeline's copy.
    let mut random = Random(11);
    for _ in 0..25 {
        let lsn = START + random.below(switch - START);
        if lsn.0 % 8192 == 2 {
            continue;
        }
        dir.flip(lsn);
        let report = verify(path).unwrap();
        assert!(!report.is_sound(), "{lsn}");
        assert!(dumped(&dir).contains(&dir.segment_names()[0]));
        dir.flip(lsn);
    }
    assert!(verify(path).unwrap().is_sound());
    let name = dir.segment_names()[1].clone();
    let segment = dir.wal_dir().join(&name);
    let bytes = std::fs::read(&segment).unwrap();
    std::fs::remove_file(&segment).unwrap();
    let report = verify(path).unwrap();
    assert!(!report.is_sound(), "{report}");
    std::fs::write(&segment, bytes).unwrap();
    assert_eq!(dir.files(), before);

    let control = path.join("77/control");
    let mut bytes = std::fs::read(&control).unwrap();
    bytes[30] ^= 1;
    std::fs::write(&control, bytes).unwrap();
    let report = verify(path).unwrap();
    assert!(
        report.to_string().contains("PROBLEM: control file"),
        "{report}"
    );
    assert!(dumped(&dir).contains("is damaged"));
}

#[test]
fn random_writes_cuts_and_restarts_agree_with_a_vector() {
    for seed in 1..=4 {
        model_test(seed);
    }
}

/// The model: all bytes, and where records end.
fn model_test(seed: u64) {
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let mut dir = LogDir::new();
    let mut storage = dir.begin();
    let format = storage.format();
    let mut bytes: Vec<u8> = Vec::new();
    let mut ends = vec![(START, Lsn::INVALID)];
    let mut oldest = START;
    for _ in 0..100 {
        let (end, last_record) = *ends.last().unwrap();
        match random.below(10) {
            0..6 => {
                let mut wal = WalBuilder::new(format, 1, end).following(last_record);
                for _ in 0..=random.below(4) {
                    let max = [40, 9_000, 300_000][random.below(3) as usize];
                    let record = wal.noop(random.below(max) as u32);
                    ends.push((record.end_lsn, record.start_lsn));
                }
                for part in wal.bytes().chunks(1 + random.below(200_000) as usize) {
                    storage.write(Tli(1), storage.write_lsn(), part).unwrap();
                }
                bytes.extend(wal.bytes());
            }
            6 => {
                let commit_lsn = storage.flush().unwrap();
                assert_eq!(commit_lsn, end);
                dir.state.commit_lsn = commit_lsn;
            }
            7 => {
                let above = |(lsn, _): &(Lsn, Lsn)| *lsn >= dir.state.commit_lsn;
                let first = ends.iter().position(above).unwrap();
                let n = first as u64 + random.below((ends.len() - first) as u64);
                ends.truncate(n as usize + 1);
                let end = ends.last().unwrap().0;
                bytes.truncate((end - START) as usize);
                if end > oldest || dir.state.commit_lsn.is_valid() || end == START {
                    storage.truncate(Tli(1), end).unwrap();
                }
                dir.assert_zero_behind(end);
            }
            8 => {
                storage.remove_before(dir.state.commit_lsn).unwrap();
                oldest = storage.oldest_lsn();
            }
            _ => {
                if random.below(2) == 0 {
                    // A record that arrived in part; killed or not, it is gone at the next start.
                    let mut wal = WalBuilder::new(format, 1, end).following(last_record);
                    wal.noop(50_000);
                    let part = random.below(40_000) as usize;
                    storage.write(Tli(1), end, &wal.bytes()[..part]).unwrap();
                }
                drop(storage);
                storage = dir.open();
            }
        }
        let end = ends.last().unwrap().0;
        assert_eq!(storage.write_lsn(), end, "seed {seed}");
        assert_eq!(storage.oldest_lsn(), oldest, "seed {seed}");
        let kept = &bytes[(oldest - START) as usize..];
        assert_eq!(dir.read(oldest, end).unwrap(), kept, "seed {seed}");
    }
}

#[test]
fn a_power_cut_takes_nothing_flushed_and_brings_nothing_back() {
    for seed in 1..=20 {
        power_test(seed);
    }
}

/// Random work on a disk that dies at a random step and then loses part of what was not synced.
fn power_test(seed: u64) {
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let mut dir = LogDir::new();
    dir.begin();
    let disk = PowerDisk::new(dir.temp.path());
    dir.disk = disk.clone();
    let format = dir.open().format();
    let (mut control, _) = ControlFile::open(disk.clone(), log::SYSTEM_ID).unwrap();
    let mut bytes: Vec<u8> = Vec::new();
    let mut ends = vec![(START, Lsn::INVALID)];
    for life in 0..6 {
        disk.sync_everything().unwrap();
        let mut storage = dir.open();
        let mut flushed = storage.flush_lsn();
        let mut oldest = storage.oldest_lsn();
        let mut term = dir.state.term;
        disk.die_after(random.below(60));
        // What the log may end at if the process dies now: anything from `flushed` on.
        loop {
            let (end, last_record) = *ends.last().unwrap();
            let done = match random.below(8) {
                0..4 => {
                    let mut wal = WalBuilder::new(format, 1, end).following(last_record);
                    for _ in 0..=random.below(3) {
                        let record = wal.noop(random.below(300_000) as u32);
                        ends.push((record.end_lsn, record.start_lsn));
                    }
                    bytes.extend(wal.bytes());
                    storage.write(Tli(1), end, wal.bytes()).is_ok()
                }
                4..6 => storage.flush().map(|lsn| flushed = lsn).is_ok(),
                6 => {
                    let n = random.below(ends.len() as u64) as usize;
                    let (to, _) = ends[n];
                    let can = to >= dir.state.commit_lsn && to > oldest;
                    let done = !can || storage.truncate(Tli(1), to).is_ok();
                    if can && done {
                        ends.truncate(n + 1);
                        bytes.truncate((to - START) as usize);
                        flushed = to;
                    }
                    // Cut short, it leaves any prefix down to the cut; and what was written and
                    // not flushed may have been flushed by it.
                    flushed = if can { flushed.min(to) } else { flushed };
                    done
                }
                _ => {
                    let mut state = dir.state.clone();
                    state.term = Term(term.0 + 1);
                    state.commit_lsn = flushed;
                    let done = control.persist(&state).is_ok();
                    if done {
                        term = state.term;
                        dir.state = state;
                        let commit_lsn = dir.state.commit_lsn;
                        let removed = storage.remove_before(commit_lsn);
                        oldest = storage.oldest_lsn();
                        removed.is_ok()
                    } else {
                        done
                    }
                }
            };
            if !done {
                break;
            }
        }
        drop(storage);
        disk.cut_power(|n| random.below(n));
        let state = read_state(disk.as_ref(), log::SYSTEM_ID).unwrap();
        assert!(
            state.term >= term,
            "seed {seed} life {life}: a vote is lost"
        );
        dir.state = state;

        let storage = dir.open();
        let end = storage.flush_lsn();
        assert!(end >= flushed, "seed {seed} life {life}: {end} < {flushed}");
        let n = ends.iter().position(|(lsn, _)| *lsn == end);
        let n = n.unwrap_or_else(|| panic!("seed {seed} life {life}: {end} is no record's end"));
        ends.truncate(n + 1);
        bytes.truncate((end - START) as usize);
        let oldest = storage.oldest_lsn();
        let kept = &bytes[(oldest - START) as usize..];
        assert_eq!(
            dir.read(oldest, end).unwrap(),
            kept,
            "seed {seed} life {life}"
        );
        dir.assert_zero_behind(end);
    }
}

#[test]
fn a_killed_writer_loses_nothing_it_has_flushed() {
    let dir = LogDir::new();
    let mut flushed = START;
    for round in 0..8u64 {
        let mut child = rerun("endless_writer", &dir)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // A while after its first flush, at no particular moment.
        let n_lines = 3 + round * 17;
        let mut lsns = lines.by_ref().filter_map(|line| {
            let line = line.expect("a line");
            line.strip_prefix("flushed ")
                .map(|lsn| lsn.parse().expect("an LSN"))
        });
        for lsn in lsns.by_ref().take(n_lines as usize) {
            flushed = lsn;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What it had said before it died and we had not read yet.
        flushed = lsns.last().unwrap_or(flushed);

        let storage = dir.open();
        assert!(
            storage.flush_lsn() >= flushed,
            "{} {flushed}",
            storage.flush_lsn()
        );
        let end = storage.flush_lsn();
        assert_eq!(dir.read(START, end).unwrap(), endless_wal(end).bytes());
        dir.assert_zero_behind(end);
        drop(storage);
    }
    assert!(flushed > START + SEGMENT, "{flushed}");
}

/// The same records whoever writes them, up to `end`.
fn endless_wal(end: Lsn) -> WalBuilder {
    let mut wal = wal_from(START);
    while wal.position() < end {
        let len = (wal.position().0 * 31) % 30_000;
        wal.noop(len as u32);
    }
    wal
}

/// This test again, in a process of its own: the part of it named `role`.
fn rerun(role: &str, dir: &LogDir) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "--nocapture", "in_a_process_of_its_own"])
        .env("SAFEKEEPER_TEST_ROLE", role)
        .env("SAFEKEEPER_TEST_DIR", dir.temp.path());
    command
}

/// Does nothing unless another test starts it.
#[test]
fn in_a_process_of_its_own() {
    let Ok(role) = std::env::var("SAFEKEEPER_TEST_ROLE") else {
        return;
    };
    let root = std::env::var_os("SAFEKEEPER_TEST_DIR").expect("set together");
    let disk = std::sync::Arc::new(safekeeper::disk::RealDisk::new(root.as_ref()));
    let state = read_state(disk.as_ref(), log::SYSTEM_ID).unwrap();
    let mut storage = WalStorage::open(disk.clone(), &log::cluster(), &state).unwrap();
    if !storage.oldest_lsn().is_valid() {
        storage.truncate(Tli(1), START).unwrap();
    }
    match role.as_str() {
        "endless_writer" => {
            storage.prepare_in_background().unwrap();
            let mut out = std::io::stdout();
            let mut wal = endless_wal(storage.flush_lsn());
            loop {
                let begin = wal.position();
                let len = (begin.0 * 31) % 30_000;
                wal.noop(len as u32);
                storage.write(Tli(1), begin, wal.bytes_from(begin)).unwrap();
                let flushed = storage.flush().unwrap();
                writeln!(out, "flushed {flushed}").unwrap();
            }
        }
        "limited_writer" => {
            let limit = std::env::var("SAFEKEEPER_TEST_FSIZE").unwrap();
            let limit = Some(limit.parse().unwrap());
            let rlimit = rustix::process::Rlimit {
                current: limit,
                maximum: limit,
            };
            // The signal that comes with it would end the process.
            let ignored = signal_hook::flag::register(
                signal_hook::consts::SIGXFSZ,
                std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false)),
            );
            ignored.unwrap();
            rustix::process::setrlimit(rustix::process::Resource::Fsize, rlimit).unwrap();
            let wal = mixed_wal(20);
            let first = 400_000;
            storage.write(Tli(1), START, &wal.bytes()[..first]).unwrap();
            let flushed = storage.flush().unwrap();
            let begin = START + first as u64;
            let refused = storage.write(Tli(1), begin, wal.bytes_from(begin));
            assert!(matches!(refused, Err(WriteError::NoSpace(_))));
            assert_eq!(storage.flush().unwrap(), flushed);
        }
        "without_descriptors" => {
            let limit = rustix::process::Rlimit {
                current: Some(64),
                maximum: Some(64),
            };
            rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
            let opened = || std::fs::File::open("/dev/null");
            let all: Vec<_> = std::iter::from_fn(|| opened().ok()).collect();
            let refused = disk.create(Path::new("new")).map(drop).unwrap_err();
            assert!(refused.is_no_space(), "{refused}");
            let refused = disk.sync_dir(Path::new("")).unwrap_err();
            assert!(!refused.is_no_space(), "{refused}");
            drop(all);
            disk.sync_dir(Path::new("")).unwrap();
        }
        role => panic!("unknown role {role}"),
    }
}

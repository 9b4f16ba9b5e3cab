//! The slot file on a disk that dies, fills up, or takes its time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use safekeeper::control_file::cluster_dir;
use safekeeper::disk::Disk;
use safekeeper::dump::dump;
use safekeeper::identity::Identity;
use safekeeper::keeper::Keeper;
use safekeeper::metrics::Metrics;
use safekeeper::slot_file::{SlotData, read_slots};
use safekeeper::slots::{Holder, SlotLimit, Slots};
use safekeeper::verify::verify;
use safekeeper_protocol::*;
use safekeeper_wire::pgwire::ErrorReport;

use super::fault_disk::FaultDisk;
use super::log::{self, LogDir};
use super::wait_for;

fn holder() -> Holder {
    Holder {
        connection_id: 1,
        description: "a test".to_owned(),
    }
}

fn identity() -> Identity {
    Identity {
        id: MemberId(1),
        incarnation: Incarnation(5),
    }
}

fn create(slots: &Slots, name: &str, restart_lsn: u64) -> Result<(), ErrorReport> {
    let limit = SlotLimit {
        max: 10,
        pg_major: 15,
    };
    slots.create(name, &holder(), false, Some(Lsn(restart_lsn)), limit)
}

fn drop_slot(slots: &Slots, name: &str) -> Result<(), ErrorReport> {
    slots.drop_slot(name, 1, false, || true)
}

fn on_disk(disk: &dyn Disk) -> Vec<(String, u64, bool)> {
    let slots = read_slots(disk, log::SYSTEM_ID).expect("whole");
    let slots = slots.unwrap_or_default().into_iter();
    let shown = |slot: SlotData| (slot.name, slot.restart_lsn.0, slot.lost);
    slots.map(shown).collect()
}

fn slot(name: &str, restart_lsn: u64) -> (String, u64, bool) {
    (name.to_owned(), restart_lsn, restart_lsn == 0)
}

/// Every change is there or not there, as a whole; and what was answered is there.
#[test]
fn slots_are_the_old_or_the_new_ones_wherever_the_process_dies() {
    type Change = fn(&Slots) -> Result<(), ErrorReport>;
    let changes: [(Change, Vec<_>); 4] = [
        (|slots| create(slots, "a", 100), vec![slot("a", 100)]),
        (
            |slots| create(slots, "b", 200),
            vec![slot("a", 100), slot("b", 200)],
        ),
        (
            |slots| {
                slots.lose_below(Lsn(150));
                Ok(())
            },
            vec![slot("a", 0), slot("b", 200)],
        ),
        (|slots| drop_slot(slots, "a"), vec![slot("b", 200)]),
    ];
    for (n, (change, after)) in changes.iter().enumerate() {
        let before = match n {
            0 => Vec::new(),
            n => changes[n - 1].1.clone(),
        };
        let mut n_steps = 0;
        loop {
            let dir = LogDir::new();
            let (disk, faults) = FaultDisk::new(dir.temp.path());
            let slots = Slots::open(disk.clone(), log::SYSTEM_ID);
            for (earlier, _) in &changes[..n] {
                earlier(&slots).expect("done");
            }
            faults.die_after(n_steps);
            let done = catch_unwind(AssertUnwindSafe(|| change(&slots)));
            faults.die_after(u64::MAX);
            let left = on_disk(disk.as_ref());
            assert!(left == before || left == *after, "{n}, {n_steps}: {left:?}");
            // The next process goes on from either.
            let again = Slots::open(disk.clone(), log::SYSTEM_ID);
            assert_eq!(again.unreadable(), None);
            create(&again, "z", 900).expect("made");
            assert_eq!(on_disk(disk.as_ref()).last(), Some(&slot("z", 900)));
            match done {
                Ok(done) => {
                    done.expect("done");
                    assert_eq!(left, *after);
                    break;
                }
                Err(_) => n_steps += 1,
            }
        }
        assert!(n_steps > 2, "{n}: {n_steps}");
    }
}

#[test]
fn a_full_disk_makes_no_first_slot_and_all_else_needs_no_space() {
    let dir = LogDir::new();
    let (disk, faults) = FaultDisk::new(dir.temp.path());
    let slots = Slots::open(disk.clone(), log::SYSTEM_ID);
    faults.set_full(true);
    let refused = create(&slots, "a", 100).expect_err("no space");
    assert_eq!(refused.sqlstate, "53100");
    assert_eq!(slots.list(), []);
    faults.set_full(false);
    create(&slots, "a", 100).expect("made");
    faults.set_full(true);
    create(&slots, "b", 200).expect("made");
    assert_eq!(on_disk(disk.as_ref()), [slot("a", 100), slot("b", 200)]);
    assert_eq!(slots.lose_below(Lsn(150)), [("a".to_owned(), Lsn(100))]);
    assert_eq!(on_disk(disk.as_ref()), [slot("a", 0), slot("b", 200)]);
    drop_slot(&slots, "a").expect("dropped");
    assert_eq!(on_disk(disk.as_ref()), [slot("b", 200)]);
}

#[test]
fn dump_and_verify_show_slots_and_what_is_wrong_with_them() {
    let dir = LogDir::new();
    let root = dir.temp.path();
    let identity = safekeeper::identity::encode(&identity());
    std::fs::write(root.join("safekeeper.identity"), identity).expect("written");
    let (disk, _) = FaultDisk::new(root);
    let slots = Slots::open(disk, log::SYSTEM_ID);
    create(&slots, "a", 100).expect("made");
    create(&slots, "b", 0x1_0000_0200).expect("made");
    slots.lose_below(Lsn(150));
    let dumped = || {
        let mut out = Vec::new();
        dump(root, &mut out).expect("written to memory");
        String::from_utf8(out).expect("text")
    };
    let text = dumped();
    let lost = "slot a  restart_lsn 0/0  xmin 0  catalog_xmin 0  lost";
    assert!(text.contains(lost), "{text}");
    assert!(text.contains("slot b  restart_lsn 1/200 "), "{text}");
    let path = root.join(cluster_dir(log::SYSTEM_ID)).join("slots");
    let mut bytes = std::fs::read(&path).expect("a file");
    bytes[30] ^= 1;
    std::fs::write(&path, bytes).expect("damaged");
    assert!(dumped().contains("slots\" is damaged"));
    let problems = verify(root).expect("a data directory").to_string();
    assert!(problems.contains("slots\" is damaged"), "{problems}");
}

/// WAL is kept from what is on disk, which is never ahead of what was reported.
#[test]
fn wal_is_kept_from_the_older_of_disk_and_memory() {
    let dir = LogDir::new();
    let (disk, faults) = FaultDisk::new(dir.temp.path());
    let slots = Slots::open(disk.clone(), log::SYSTEM_ID);
    create(&slots, "a", 100).expect("made");
    let acquired = slots.acquire("a", &holder()).expect("free");
    acquired.flushed(Lsn(300));
    acquired.needs_transactions(7, 0);
    assert_eq!(slots.list()[0].data.restart_lsn, Lsn(300));
    assert_eq!(
        on_disk(disk.as_ref()),
        [slot("a", 300)],
        "with the first xmin"
    );
    acquired.flushed(Lsn(500));
    acquired.needs_transactions(9, 0);
    assert_eq!(slots.list()[0].data.restart_lsn, Lsn(500));
    assert_eq!(slots.needed_from(), Some(Lsn(300)));
    assert_eq!(on_disk(disk.as_ref()), [slot("a", 300)], "not yet");
    let after_a_crash = Slots::open(disk.clone(), log::SYSTEM_ID);
    assert_eq!(after_a_crash.needed_from(), Some(Lsn(300)));
    assert_eq!(after_a_crash.xmins(), (7, 0));
    slots.save_or_warn();
    assert_eq!(slots.needed_from(), Some(Lsn(500)));
    // Who was set back is on disk when the keeper looks next, and not as often as it likes.
    for lsn in (400..500).rev() {
        acquired.flushed(Lsn(lsn));
    }
    assert_eq!(on_disk(disk.as_ref()), [slot("a", 500)], "not yet");
    assert_eq!(slots.needed_from(), Some(Lsn(400)));
    slots.save_if_due();
    assert_eq!(on_disk(disk.as_ref()), [slot("a", 400)]);
    acquired.flushed(Lsn(600));
    slots.save_if_due();
    assert_eq!(on_disk(disk.as_ref()), [slot("a", 400)], "not yet");
    // Nor is one whose transactions come and go; but the slot's new ones are on disk soon, also if there is
    // no space at first.
    let syncs = || faults.n_dir_syncs.load(Ordering::SeqCst);
    let come_and_go = || {
        acquired.needs_transactions(0, 6);
        acquired.needs_transactions(11, 0);
    };
    come_and_go();
    let before = syncs();
    (0..100).for_each(|_| come_and_go());
    assert_eq!(syncs(), before);
    slots.save_if_due();
    assert_eq!(syncs(), before + 1);
    assert_eq!(Slots::open(disk.clone(), log::SYSTEM_ID).xmins(), (11, 0));
    acquired.flushed(Lsn(300));
    // The space that is reserved is gone.
    disk.remove(&cluster_dir(log::SYSTEM_ID).join("slots.tmp"))
        .expect("there");
    faults.set_full(true);
    slots.save_if_due();
    assert_eq!(on_disk(disk.as_ref()), [slot("a", 600)], "no space");
    faults.set_full(false);
    slots.save_if_due();
    assert_eq!(on_disk(disk.as_ref()), [slot("a", 300)]);
}

#[test]
fn saving_slots_holds_up_no_commit_and_no_report() {
    let dir = LogDir::new();
    dir.persist();
    let (disk, faults) = FaultDisk::new(dir.temp.path());
    let disk: Arc<dyn Disk> = disk;
    let keeper = Keeper::open(disk, identity(), log::SYSTEM_ID, |_| {
        Metrics::default().of_cluster("main")
    });
    let keeper = keeper.expect("opened");
    create(&keeper.slots, "a", 100).expect("made");
    let acquired = keeper.slots.acquire("a", &holder()).expect("free");
    let syncs = || faults.n_dir_syncs.load(Ordering::SeqCst);
    let before = syncs();
    faults.dir_sync_ms.store(3_000, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| create(&keeper.slots, "b", 200));
        wait_for("the slow disk", || syncs() > before);
        let begun = Instant::now();
        for lsn in 101..200 {
            let turn = keeper.take_turn();
            acquired.flushed(Lsn(lsn));
            keeper.consumers.gather_feedback();
            keeper.consumers.wake();
            assert_eq!(keeper.slots.needed_from(), Some(Lsn(100)));
            drop(turn);
        }
        let taken = begun.elapsed();
        assert!(
            !slow.is_finished(),
            "it was over before it could be in the way"
        );
        assert!(taken < Duration::from_secs(2), "{taken:?}");
        faults.dir_sync_ms.store(0, Ordering::SeqCst);
        slow.join().expect("no panic").expect("made");
    });
}

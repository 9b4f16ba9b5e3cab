//! `pg_receivewal` of the version under test, told of all safekeepers, over everything that happens to it
//! and to them.

use std::path::{Path, PathBuf};
use std::process::Command;

use cluster_tests::Cluster;
use cluster_tests::ledger::Ledger;
use cluster_tests::place::Programs;

use cluster_tests::process::Process;
use cluster_tests::safekeeper::Safekeeper;
use cluster_tests::wal_compare::{assert_files_equal, copy_received, file_names};

/// Under load the safekeeper in use is killed, then the receiver, then the primary; a standby is promoted,
/// and the safekeeper in use is killed again. In the end the receiver has every segment that the primaries
/// wrote, byte for byte, up to the last commit.
#[test]
fn a_receiver_that_knows_all_safekeepers_misses_nothing() {
    over_everything(false);
}

/// The same with a slot at each safekeeper, for the receiver and for the standby. No WAL is kept without.
#[test]
fn a_receiver_with_a_slot_on_each_safekeeper_misses_nothing() {
    over_everything(true);
}

fn over_everything(with_slots: bool) {
    let mut cluster = Cluster::prepare(&[]);
    cluster.primary.configure("wal_keep_size = '1GB'");
    if with_slots {
        for safekeeper in &mut cluster.safekeepers {
            safekeeper.set_settings(&["--wal-keep-size", "0"]);
        }
    }
    cluster.start_all();
    if with_slots {
        for safekeeper in &cluster.safekeepers {
            safekeeper.create_slot("archive");
            safekeeper.create_slot("heir");
        }
    }
    let mut receiver = Receiver::start(&cluster, "archive", with_slots);
    // It begins with the segment that is being written, and a base backup begins another one.
    cluster.wait_source_of("archive");
    let heir = cluster.start_standby("heir");
    if with_slots {
        heir.configure("primary_slot_name = 'heir'");
        heir.reload();
    }
    let mut ledger = Ledger::start(&cluster.primary, 4);
    let write_some = |primary: &cluster_tests::postgres::Postgres| {
        primary.sql("select pg_logical_emit_message(false, 'some', repeat('x', 3000000))");
        primary.sql("select pg_switch_wal()");
        primary.flush_lsn()
    };
    let lsn = write_some(&cluster.primary);
    cluster.wait_flushed_by("archive", lsn);

    let source = cluster.wait_source_of("archive");
    cluster.safekeepers[source].kill9();
    let lsn = write_some(&cluster.primary);
    cluster.wait_flushed_by("archive", lsn);
    assert_ne!(cluster.wait_source_of("archive"), source);
    cluster.safekeepers[source].start();

    receiver.process.kill9();
    let lsn = write_some(&cluster.primary);
    receiver = receiver.start_again(&cluster);
    cluster.wait_flushed_by("archive", lsn);

    cluster.wait_streaming(3);
    cluster.primary.kill9();
    assert_eq!(heir.value("select walproposer_promote(60)"), "t");
    ledger.send_to(&heir);
    let lsn = write_some(&heir);
    cluster.wait_flushed_by("archive", lsn);
    let source = cluster.wait_source_of("archive");
    cluster.safekeepers[source].kill9();
    let lsn = write_some(&heir);
    cluster.wait_flushed_by("archive", lsn);
    cluster.safekeepers[source].start();
    ledger.stop().assert_all_in(&heir);

    let end = heir.flush_lsn();
    cluster.wait_flushed_by("archive", end);
    let copy = cluster.dir.path().join("received.copy");
    copy_received(&receiver.dir, &copy);
    if with_slots {
        let is_used = |safekeeper: &Safekeeper| {
            let slot = safekeeper.slot(cluster.system_id, "archive");
            slot.is_some_and(|slot| slot["active"] == true)
        };
        let used = cluster.safekeepers.iter().filter(|it| is_used(it)).count();
        assert_eq!(used, 1);
    }
    let equal = assert_files_equal(&copy, &heir.wal_dir(), end);
    assert!(equal >= 6, "{equal} of {:?}", file_names(&copy));
    assert_no_gap(&copy, end.segno(16 << 20));
    let name = "00000002.history";
    let read = |dir: &Path| std::fs::read(dir.join(name)).expect("a history file");
    assert_eq!(read(&copy), read(&heir.wal_dir()));
}

/// From the first segment to the one that holds the end, on either timeline.
#[track_caller]
fn assert_no_gap(dir: &Path, last: u64) {
    let names = file_names(dir);
    for segno in 1..=last {
        let number = format!("{:08X}{:08X}", segno >> 8, segno & 0xFF);
        let found = names.iter().any(|name| name.get(8..) == Some(&number));
        assert!(found, "segment {number} is missing in {names:?}");
    }
}

/// `pg_receivewal --synchronous` that goes to any of the safekeepers, from where its files end.
struct Receiver {
    name: String,
    dir: PathBuf,
    /// It uses the slot of its name.
    has_slot: bool,
    process: Process,
}

impl Receiver {
    fn start(cluster: &Cluster, name: &str, has_slot: bool) -> Receiver {
        let dir = cluster.dir.create(name);
        let process = Receiver::run(cluster, name, &dir, has_slot);
        Receiver {
            name: name.to_owned(),
            dir,
            has_slot,
            process,
        }
    }

    fn start_again(self, cluster: &Cluster) -> Receiver {
        let process = Receiver::run(cluster, &self.name, &self.dir, self.has_slot);
        Receiver { process, ..self }
    }

    fn run(cluster: &Cluster, name: &str, dir: &Path, has_slot: bool) -> Process {
        let mut command = Command::new(Programs::postgres("pg_receivewal"));
        command.args(["--synchronous", "--no-password", "--status-interval=1"]);
        command.args(["--dbname", &cluster.conninfo(name), "--directory"]);
        command.arg(dir);
        if has_slot {
            command.args(["--slot", name]);
        }
        let log = cluster.dir.path().join(format!("{name}.log"));
        Process::start(name, command, &log)
    }
}

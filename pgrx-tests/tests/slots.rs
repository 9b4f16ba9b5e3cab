//! Replication slots on safekeepers, as stock tools use them.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use cluster_tests::Cluster;
use cluster_tests::place::{Programs, copy_tree};
use cluster_tests::poll::{SOON, never_within, wait_until};
use cluster_tests::postgres::{Postgres, Stop, text_rows};
use cluster_tests::process::{Process, run_ok};
use cluster_tests::safekeeper::Safekeeper;
use cluster_tests::wal_compare::WalDir;
use safekeeper_protocol::Lsn;
use safekeeper_wal::history::TimelineHistory;
use safekeeper_wal::segment_name::SegmentSize;

/// It is made with pg_receivewal, which then follows it. Daemon and receiver are killed, each while the
/// other goes on or is away; in the end the receiver has what the primary wrote, byte for byte.
#[test]
fn pg_receivewal_misses_nothing_with_a_slot() {
    let mut cluster = Cluster::prepare(&["--wal-segsize=1"]);
    cluster.primary.configure("wal_keep_size = '1GB'");
    for safekeeper in &mut cluster.safekeepers {
        // Nothing is kept but for the slot.
        safekeeper.set_settings(&["--wal-keep-size=0"]);
    }
    cluster.start_all();
    let dir = cluster.dir.create("received");
    let receive = |safekeeper: &Safekeeper, action: &[&str]| {
        let mut command = receivewal(safekeeper, "archive");
        command.args(["--synchronous", "--verbose", "--directory"]);
        command.arg(&dir).args(action);
        command
    };
    run_ok(receive(&cluster.safekeepers[0], &["--create-slot"]));
    let slot = slot(&cluster, 0, "archive");
    assert!(slot["wal_status"].is_null(), "{slot}");
    assert_eq!(slot["active"], false, "{slot}");
    let log = cluster.dir.path().join("receiver.log");
    let start =
        |safekeeper: &Safekeeper| Process::start("pg_receivewal", receive(safekeeper, &[]), &log);
    let followed = |cluster: &Cluster| {
        let lsn = cluster.primary.flush_lsn();
        wait_until("the slot follows the receiver", SOON, || {
            restart_lsn(cluster, 0, "archive") >= lsn
        });
    };
    let mut receiver = start(&cluster.safekeepers[0]);
    followed(&cluster);
    cluster.safekeepers[0].kill9();
    write_segments(&cluster.primary, 2);
    cluster.safekeepers[0].start();
    followed(&cluster);
    receiver.kill9();
    // So much that without the slot some of it were gone when the receiver is back.
    write_segments(&cluster.primary, 4);
    cluster.wait_all_caught_up(SOON);
    wait_until("the others keep less", SOON, || {
        let oldest = |at: usize| cluster.safekeepers[at].lsn(cluster.system_id, "oldest_lsn");
        oldest(1) > oldest(0) && oldest(2) > oldest(0)
    });
    cluster.safekeepers[0].kill9();
    cluster.safekeepers[0].start();
    write_segments(&cluster.primary, 1);
    receiver = start(&cluster.safekeepers[0]);
    followed(&cluster);
    receiver.kill9();

    let end = cluster.wait_all_caught_up(SOON);
    let received = received(&cluster, &dir);
    let ours = wal_dir(cluster.primary.wal_dir());
    assert!(received.segments().len() >= 7);
    ours.assert_equal(&received, received.begin(), end);
    wait_until("the slot is free", SOON, || {
        self::slot(&cluster, 0, "archive")["active"] == false
    });
    run_ok(receive(&cluster.safekeepers[0], &["--drop-slot"]));
    assert!(
        cluster.safekeepers[0]
            .slot(cluster.system_id, "archive")
            .is_none()
    );
}

/// A snapshot on the standby holds back the primary's vacuum: by way of the safekeeper's slot, also while
/// the standby is gone, and the safekeeper is killed; and no longer than the slot is there.
#[test]
fn a_standbys_xmin_is_the_primarys_also_while_it_is_away() {
    let mut cluster = Cluster::start_with("autovacuum = off", &[]);
    for safekeeper in &cluster.safekeepers {
        safekeeper.create_slot("standby");
    }
    let mut standby = Postgres::base_backup_of(&cluster.primary, &cluster.dir, "standby");
    cluster.follow_safekeepers(&standby);
    standby.configure(
        "primary_slot_name = 'standby'\nhot_standby_feedback = on\n\
         wal_receiver_status_interval = '1s'\nmax_standby_streaming_delay = -1",
    );
    standby.start();
    let primary = &cluster.primary;
    primary.sql("create table kept as select generate_series(1, 1000)");
    let lsn = primary.flush_lsn();
    wait_until("it is replayed", SOON, || standby.replay_lsn() >= lsn);
    let mut session = standby.client();
    let count = "begin isolation level repeatable read; select count(*) from kept";
    text_rows(&mut session, count).expect("a snapshot");
    let slot_xmin = |primary: &Postgres| -> u64 {
        let query = "select coalesce(max(xmin::text::bigint), 0) from pg_replication_slots";
        primary.value(query).parse().expect("a number")
    };
    wait_until("the primary hears of it", SOON, || slot_xmin(primary) > 0);
    let deleted: u64 = primary
        .value("delete from kept; select txid_current()")
        .parse()
        .expect("a number");
    let at = (0..3)
        .find(|at| slot(&cluster, *at, "standby")["active"] == true)
        .expect("the one in use");
    assert!(
        slot(&cluster, at, "standby")["xmin"]
            .as_u64()
            .expect("an id")
            <= deleted
    );
    standby.kill9();
    drop(session);

    cluster.safekeepers[at].kill9();
    cluster.safekeepers[at].start();
    cluster.wait_streaming(3);
    let primary = &cluster.primary;
    let size = || -> u64 {
        primary.sql("vacuum kept");
        let size = primary.value("select pg_relation_size('kept')");
        size.parse().expect("a number")
    };
    never_within("its rows are removed", Duration::from_secs(5), || {
        size() == 0
    });
    assert!((1..=deleted).contains(&slot_xmin(primary)));
    for safekeeper in &cluster.safekeepers {
        let mut command = receivewal(safekeeper, "standby");
        command.arg("--drop-slot");
        run_ok(command);
    }
    wait_until("it is let go", SOON, || {
        slot_xmin(primary) == 0 && size() == 0
    });
}

/// It was away for longer than its WAL may be kept: the slot is lost, says so on all sides, and the standby
/// is refused by each safekeeper. The commits did not mind.
#[test]
fn a_slot_that_is_away_for_too_long_is_lost() {
    let mut cluster = Cluster::prepare(&["--wal-segsize=1"]);
    cluster
        .primary
        .configure("wal_keep_size = '0'\nmax_wal_size = '8MB'\nmin_wal_size = '2MB'");
    for safekeeper in &mut cluster.safekeepers {
        safekeeper.set_settings(&["--wal-keep-size=1MB", "--max-wal-keep=4MB"]);
    }
    cluster.start_all();
    for safekeeper in &cluster.safekeepers {
        safekeeper.create_slot("standby");
    }
    let mut standby = Postgres::base_backup_of(&cluster.primary, &cluster.dir, "standby");
    cluster.follow_safekeepers(&standby);
    standby.configure("primary_slot_name = 'standby'");
    standby.start();
    let lsn = cluster.primary.flush_lsn();
    wait_until("the standby follows", SOON, || standby.replay_lsn() >= lsn);
    standby.stop(Stop::Fast);

    write_segments(&cluster.primary, 10);
    cluster.primary.sql("checkpoint");
    for at in 0..3 {
        wait_until("the slot is lost", SOON, || {
            slot(&cluster, at, "standby")["wal_status"] == "lost"
        });
        assert!(slot(&cluster, at, "standby")["restart_lsn"].is_null());
        let removed = || cluster.safekeepers[at].lsn(cluster.system_id, "oldest_lsn") > lsn;
        wait_until("its WAL is removed", SOON, removed);
    }
    standby.start();
    wait_until("the standby is told", SOON, || {
        let refused = "can no longer access replication slot \"standby\"";
        standby.log_since_start().contains(refused)
    });
    // Without a slot, what is asked for is not to be had from anybody.
    standby.configure("primary_slot_name = ''");
    standby.reload();
    wait_until("the standby is told so", SOON, || {
        standby
            .log_since_start()
            .contains("has already been removed")
    });
    cluster.primary.sql("create table goes_on ()");
}

/// So many segments of WAL, and a bit.
fn write_segments(primary: &Postgres, segments: u32) {
    primary.sql("create table if not exists filler (t text)");
    for _ in 0..segments {
        primary.sql("insert into filler select repeat('x', 500) from generate_series(1, 500)");
        primary.sql("select pg_switch_wal()");
    }
}

fn slot(cluster: &Cluster, at: usize, name: &str) -> serde_json::Value {
    let slot = cluster.safekeepers[at].slot(cluster.system_id, name);
    slot.unwrap_or_default()
}

fn restart_lsn(cluster: &Cluster, at: usize, name: &str) -> Lsn {
    let slot = slot(cluster, at, name);
    let lsn = slot["restart_lsn"]
        .as_str()
        .and_then(|lsn| lsn.parse().ok());
    lsn.unwrap_or(Lsn(0))
}

fn receivewal(safekeeper: &Safekeeper, slot: &str) -> Command {
    let address = safekeeper.address();
    let mut command = Command::new(Programs::postgres("pg_receivewal"));
    command.args(["--no-password", "--username", "postgres", "--slot", slot]);
    command.args(["--host", &address.ip().to_string()]);
    command.args(["--port", &address.port().to_string()]);
    command
}

/// A copy of what was received, the unfinished segment under its final name.
fn received(cluster: &Cluster, dir: &std::path::Path) -> WalDir {
    let copy: PathBuf = cluster.dir.path().join("received.copy");
    copy_tree(dir, &copy);
    for file in std::fs::read_dir(&copy).expect("our own copy").flatten() {
        let path = file.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "partial")
        {
            std::fs::rename(&path, path.with_extension("")).expect("our own copy");
        }
    }
    wal_dir(copy)
}

fn wal_dir(path: PathBuf) -> WalDir {
    let size = SegmentSize::new(1 << 20).expect("a size");
    WalDir::with_format(path, TimelineHistory::root(1), size)
}

//! WAL leaves the server's shared buffers before it is flushed. (design §5)
//!
//! `WAL_MB=n` compares that much WAL for each size of the buffers, instead of 100 MB.

use std::time::{Duration, Instant};

use cluster_tests::Cluster;
use cluster_tests::poll::{SOON, let_run, wait_for, wait_until};
use cluster_tests::slow_disk::SlowDisk;
use safekeeper_protocol::Lsn;

const MIB: u64 = 1 << 20;

/// While the local disk does not answer, the quorum has the commit already. The primary dies there, and
/// its disk has lost what it had not flushed: the next start fetches it back.
#[test]
fn the_quorum_has_a_commit_before_the_local_disk_and_it_survives_the_loss_of_that() {
    let mut cluster = Cluster::prepare(&[]);
    let disk = SlowDisk::new(&cluster.dir, "primary");
    cluster.primary.set_environment(disk.environment());
    cluster
        .primary
        .configure("checkpoint_timeout = '1h'\nbgwriter_lru_maxpages = 0");
    cluster.start_all();
    cluster.primary.sql("create table t (n int)");
    for round in 1..=5 {
        cluster.primary.sql("checkpoint");
        cluster.wait_all_caught_up(SOON);
        disk.hold();
        let commit = cluster.commit_in_background(&format!("insert into t values ({round})"));
        let (flush, quorum) = wait_for("the quorum is ahead of the local disk", SOON, || {
            let positions = "select flush_lsn || ' ' || commit_lsn from pg_stat_walproposer";
            let positions = cluster.primary.value(positions);
            let (flush, commit) = positions.split_once(' ')?;
            let (flush, commit): (Lsn, Lsn) = (flush.parse().ok()?, commit.parse().ok()?);
            (commit > flush).then_some((flush, commit))
        });
        assert!(!commit.answered(), "acknowledged before the local flush");
        cluster.primary.kill9();
        disk.set(Duration::ZERO);
        cluster.primary.start_without_wal(flush, quorum);
        assert_eq!(
            cluster.primary.value("select max(n) from t"),
            round.to_string()
        );
        cluster.wait_streaming(3);
    }
    let end = cluster.wait_all_caught_up(SOON);
    cluster.assert_wal_equal(end);
}

/// Buffers of two pages and more for each insertion lock, and of a segment: under commits, bulk and
/// records that are larger than the buffers, what was pushed is what `pg_wal` holds later.
#[test]
fn what_was_pushed_equals_pg_wal_whatever_the_size_of_the_buffers() {
    let wal_mb = std::env::var("WAL_MB").map_or(100, |mb| mb.parse().expect("a number"));
    for wal_buffers in ["64kB", "1MB", "16MB"] {
        let mut compared = 0;
        while compared < wal_mb * MIB {
            // Members keep a gigabyte of what all have.
            let round = (wal_mb * MIB - compared).min(768 * MIB);
            let settings = format!(
                "wal_buffers = '{wal_buffers}'\nwal_keep_size = '16GB'\nmax_wal_size = '4GB'"
            );
            let cluster = Cluster::start_with(&settings, &[]);
            cluster.primary.pgbench_init(10);
            cluster.primary.sql("create table bulk (a int, b text)");
            let begin = cluster.primary.flush_lsn();
            while cluster.primary.flush_lsn() < begin + round {
                cluster.primary.pgbench(4, Duration::from_secs(3));
                cluster.primary.sql(
                    "insert into bulk select g, repeat(md5(g::text), 8) from generate_series(1, 100000) g;
                     select pg_logical_emit_message(true, 'x', repeat('0123456789abcdef', 3 << 16));
                     select pg_switch_wal();
                     truncate bulk",
                );
            }
            let end = cluster.wait_all_caught_up(SOON);
            cluster.assert_wal_equal(end);
            compared += end - begin;
            let (buffers, files) = origins(&cluster);
            println!(
                "wal_buffers {wal_buffers}: compared {} MB; {buffers} bytes from buffers, {files} from files",
                (end - begin) / MIB
            );
            assert!(
                buffers > 0 && files > 0,
                "{buffers} from buffers, {files} from files"
            );
        }
    }
}

#[test]
fn under_pgbench_most_wal_comes_from_the_buffers() {
    let cluster = Cluster::start();
    cluster.primary.pgbench_init(10);
    let before = origins(&cluster);
    cluster.primary.pgbench(8, Duration::from_secs(8));
    cluster.wait_all_caught_up(SOON);
    let after = origins(&cluster);
    let (buffers, files) = (after.0 - before.0, after.1 - before.1);
    println!("{buffers} bytes from buffers, {files} from files");
    assert!(
        buffers > files,
        "{buffers} from buffers, {files} from files"
    );
}

/// The setting is read again while the server runs; without buffers commits are as safe.
#[test]
fn without_the_buffers_wal_comes_from_files() {
    let cluster = Cluster::start_with("walproposer.read_wal_buffers = off", &[]);
    cluster.primary.pgbench_init(1);
    cluster.primary.pgbench(4, Duration::from_secs(2));
    let end = cluster.wait_all_caught_up(SOON);
    let (buffers, files) = origins(&cluster);
    assert!(
        buffers == 0 && files > 0,
        "{buffers} from buffers, {files} from files"
    );
    cluster.assert_wal_equal(end);

    cluster
        .primary
        .configure("walproposer.read_wal_buffers = on");
    cluster.primary.reload();
    cluster.primary.sql("create table t (n int)");
    wait_until("WAL comes from buffers", SOON, || {
        cluster.primary.sql("insert into t values (1)");
        origins(&cluster).0 > 0
    });
    let end = cluster.wait_all_caught_up(SOON);
    cluster.assert_wal_equal(end);
}

/// With nothing to send the worker wakes up for heartbeats and their answers, and for nothing else.
#[test]
fn an_idle_server_costs_nothing_but_heartbeats() {
    const HEARTBEAT: Duration = Duration::from_secs(1);
    let settings = "autovacuum = off\nwalproposer.member_timeout = '4s'";
    let cluster = Cluster::start_with(settings, &[]);
    cluster.primary.sql("checkpoint");
    cluster.wait_all_caught_up(SOON);
    let wal = cluster.primary.flush_lsn();
    let (began, before) = (Instant::now(), wakeups(&cluster));
    let_run(Duration::from_secs(12));
    let (woken, passed) = (wakeups(&cluster) - before, began.elapsed());
    assert_eq!(cluster.primary.flush_lsn(), wal, "the server was not idle");
    // For each member one to send it and one for its answer.
    let heartbeats = u64::from(passed.div_duration_f64(HEARTBEAT) as u32 + 1);
    println!("{woken} wake-ups in {passed:?}");
    assert!(woken <= 6 * heartbeats, "{woken} wake-ups in {passed:?}");
    assert!(
        woken >= heartbeats / 2,
        "{woken} wake-ups: are they counted?"
    );
}

/// Bytes sent from buffers and from files.
fn origins(cluster: &Cluster) -> (u64, u64) {
    let columns = "select bytes_from_buffers || ' ' || bytes_from_files from pg_stat_walproposer";
    let columns = cluster.primary.value(columns);
    let (buffers, files) = columns.split_once(' ').expect("two numbers");
    (
        buffers.parse().expect("a number"),
        files.parse().expect("a number"),
    )
}

fn wakeups(cluster: &Cluster) -> u64 {
    let wakeups = cluster
        .primary
        .value("select wakeups from pg_stat_walproposer");
    wakeups.parse().expect("a number")
}

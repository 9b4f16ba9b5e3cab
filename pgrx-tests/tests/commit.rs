//! What a commit is worth: it is on a majority of the safekeepers, byte for byte, or it waits.

use std::time::Duration;

use cluster_tests::Cluster;
use cluster_tests::poll::{SOON, never_within, wait_until};
use cluster_tests::process::signal_descendant;

#[test]
fn after_half_a_minute_of_pgbench_the_wal_on_all_three_equals_pg_wal() {
    // Nothing is removed, so that all of it can be compared.
    let cluster = Cluster::start_with("wal_keep_size = '16GB'", &[]);
    cluster.primary.pgbench_init(10);
    let tps = cluster.primary.pgbench(8, Duration::from_secs(30));
    println!("{tps:.0} transactions per second");

    let end = cluster.wait_all_caught_up(SOON);
    cluster.assert_wal_equal(end);
    for safekeeper in &cluster.safekeepers {
        let (ours, theirs) = cluster.wal_dirs(safekeeper);
        assert_eq!(
            theirs.begin(),
            ours.begin(),
            "the log does not begin where pg_wal does"
        );
        theirs
            .waldump(theirs.begin(), end)
            .unwrap_or_else(|error| panic!("pg_waldump: {error}"));
    }
}

/// Whatever flushes WAL wakes the worker, however the server does that: here nothing else would before
/// the test gives up, since heartbeats are hours apart. Again and again, in case one comes at a bad time.
#[test]
fn every_flush_wakes_the_worker() {
    let cluster = Cluster::start_with("walproposer.member_timeout = '1h'", &[]);
    cluster.primary.sql("create table t (a int)");
    for _ in 0..50 {
        let commit = cluster.commit_in_background("insert into t values (1)");
        commit.wait(SOON).expect("a quorum is there");
        // Its WAL is no transaction's.
        cluster.primary.sql("checkpoint");
        cluster.wait_all_caught_up(SOON);
    }
}

/// Where the log ends with a segment, the next record goes behind a page header that is not there yet:
/// a worker that begins just then has nothing to wait for.
#[test]
fn a_worker_that_begins_where_a_segment_ends_leads() {
    let cluster = Cluster::start();
    cluster.primary.sql("create table t (a int)");
    cluster.primary.sql("checkpoint");
    cluster.primary.sql("select pg_switch_wal()");
    let worker = cluster.primary.worker().expect("there is a worker");
    signal_descendant(worker, libc::SIGTERM);
    wait_until("the next worker leads", SOON, || {
        cluster.primary.worker().is_some_and(|pid| pid != worker)
            && cluster.members_active() == Some(3)
    });
    cluster.primary.sql("insert into t values (1)");
    let log = cluster.primary.log();
    assert!(!log.contains("is not satisfied"), "{log}");
}

/// One down: commits go on. Two down: commits wait, reads go on. Back: they finish. The views tell
/// the truth at each step.
#[test]
fn commits_need_two_of_three() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create table t (a int)");
    for id in 1..=3 {
        assert_eq!(cluster.member(id, "state"), "streaming");
    }
    assert_eq!(standby_row(&cluster), "walproposer streaming sync");

    cluster.safekeepers[2].kill9();
    cluster.primary.sql("insert into t values (1)");
    wait_until("the view shows two members", SOON, || {
        cluster.members_active() == Some(2)
    });
    assert_ne!(cluster.member(3, "state"), "streaming");
    wait_until("the view says why", SOON, || {
        !cluster.member(3, "last_error").is_empty()
    });
    assert_eq!(standby_row(&cluster), "walproposer streaming sync");

    cluster.safekeepers[1].kill9();
    wait_until("the view shows one member", SOON, || {
        cluster.members_active() == Some(1)
    });
    let waiting = cluster.commit_in_background("insert into t values (2)");
    cluster.wait_commits_waiting(1);
    let commit_lsn = "select commit_lsn from pg_stat_walproposer";
    let before = cluster.primary.lsn(commit_lsn);
    never_within("a commit without a quorum", Duration::from_secs(4), || {
        waiting.answered() || cluster.primary.value("select count(*) from t") != "1"
    });
    assert_eq!(cluster.primary.lsn(commit_lsn), before);
    assert!(
        before < cluster.primary.flush_lsn(),
        "the waiting commit is not part of the log"
    );
    let released = cluster
        .primary
        .lsn("select flush_lsn from pg_stat_replication where application_name = 'walproposer'");
    assert!(
        released <= before,
        "pg_stat_replication claims {released}, committed is {before}"
    );

    cluster.safekeepers[1].start();
    waiting
        .wait(SOON)
        .expect("the commit finishes once a quorum is back");
    assert_eq!(cluster.primary.value("select count(*) from t"), "2");

    cluster.safekeepers[2].start();
    cluster.wait_streaming(3);
    let end = cluster.wait_all_caught_up(SOON);
    cluster.assert_wal_equal(end);
}

/// Whoever lowers synchronous_commit for a transaction that writes gets the least that is allowed.
#[test]
fn synchronous_commit_cannot_be_lowered_below_the_minimum() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create table t (a int)");
    cluster.safekeepers[1].kill9();
    cluster.safekeepers[2].kill9();
    let statements = [
        "set synchronous_commit = off; insert into t values (1)",
        "set synchronous_commit = local; insert into t values (2)",
        "begin; set local synchronous_commit = off; insert into t values (3); commit",
    ];
    let waiting: Vec<_> = statements
        .iter()
        .map(|s| cluster.commit_in_background(s))
        .collect();
    cluster.wait_commits_waiting(3);
    assert!(waiting.iter().all(|commit| !commit.answered()));
    // A transaction that wrote nothing has nothing to wait for.
    cluster
        .primary
        .sql("set synchronous_commit = off; select * from t");
    cluster.safekeepers[1].start();
    for commit in waiting {
        commit
            .wait(SOON)
            .expect("the commit finishes once a quorum is back");
    }
    assert_eq!(cluster.primary.value("select count(*) from t"), "3");
}

fn standby_row(cluster: &Cluster) -> String {
    cluster.primary.value(
        "select concat_ws(' ', application_name, state, sync_state) from pg_stat_replication",
    )
}

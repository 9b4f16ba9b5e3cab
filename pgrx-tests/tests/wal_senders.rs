//! A server whose WAL senders are all taken does not crash.
//!
//! A background worker that finds no WAL sender slot, and a WAL sender that finds none because the
//! worker has taken one that was not counted, both end in a crash of stock Postgres if nobody looks
//! first.

use std::process::Stdio;

use cluster_tests::Cluster;
use cluster_tests::poll::{SOON, wait_until};
use cluster_tests::process::{Process, signal_descendant};

#[test]
fn with_all_wal_senders_taken_the_worker_waits_and_says_so() {
    let cluster = Cluster::start_with("max_wal_senders = 3", &[]);
    cluster.primary.sql("create table t (a int)");
    // More than there is room for, each trying again and again. Now and then the worker goes away,
    // so that they may be faster than it.
    let mut receivers: Vec<_> = (0..4).map(|i| start_receiver(&cluster, i)).collect();
    for _ in 0..5 {
        let worker = cluster.primary.worker();
        if let Some(worker) = worker {
            signal_descendant(worker, libc::SIGTERM);
        }
        wait_until("there is another worker", SOON, || {
            cluster
                .primary
                .worker()
                .is_some_and(|pid| Some(pid) != worker)
        });
        let senders = "select count(*) from pg_stat_replication";
        assert!(
            cluster
                .primary
                .value(senders)
                .parse::<u32>()
                .expect("a number")
                <= 3
        );
    }
    receivers.truncate(1);
    wait_until("commits go on once there is room", SOON, || {
        cluster.members_active() == Some(3)
    });
    cluster.primary.sql("insert into t values (1)");
    assert_no_crash(&cluster);
}

/// The only slot is the worker's. Whoever else asks is refused, by an error, not by a crash.
#[test]
fn the_only_wal_sender_is_the_workers() {
    let cluster = Cluster::start_with("max_wal_senders = 1", &[]);
    cluster.primary.sql("create table t (a int)");
    let mut command = cluster.primary.program("pg_receivewal");
    command
        .arg("--no-loop")
        .arg("--directory")
        .arg(cluster.dir.create("refused"));
    let (ok, text) = cluster_tests::process::run(command);
    assert!(!ok && text.contains("FATAL"), "{text}");
    cluster.primary.sql("insert into t values (1)");
    assert_no_crash(&cluster);
}

fn start_receiver(cluster: &Cluster, number: u32) -> Process {
    let name = format!("receiver{number}");
    let mut command = cluster.primary.program("pg_receivewal");
    command
        .arg("--directory")
        .arg(cluster.dir.create(&name))
        .stdout(Stdio::null());
    Process::start(
        &name,
        command,
        &cluster.dir.path().join(format!("{name}.log")),
    )
}

fn assert_no_crash(cluster: &Cluster) {
    let log = cluster.primary.log();
    let crash = log
        .lines()
        .find(|line| line.contains("was terminated by signal"));
    assert_eq!(crash, None, "a server process crashed");
}

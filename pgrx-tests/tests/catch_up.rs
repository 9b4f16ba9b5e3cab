//! A member that falls behind costs the others nothing, and comes back.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use cluster_tests::Cluster;
use cluster_tests::poll::{SOON, wait_until};
use cluster_tests::process::{resident_bytes, spawn};

const MIB: u64 = 1 << 20;

/// Few segments are kept, and a member may lag by 64 MB before it is let go.
const LITTLE_WAL: &str = "
max_wal_size = '64MB'
min_wal_size = '32MB'
walproposer.max_member_lag = '64MB'
";

/// A safekeeper is away for several times more WAL than pg_wal may keep. pg_wal stays small all
/// the while. What the returned one lacks, it gets from another safekeeper.
#[test]
fn a_member_away_for_more_wal_than_pg_wal_keeps_catches_up_from_a_donor() {
    let mut cluster = Cluster::start_with(LITTLE_WAL, &[]);
    cluster.primary.sql("create table t (a int, b text)");
    cluster.safekeepers[2].kill9();

    let start = cluster.primary.flush_lsn();
    let mut largest = 0;
    while cluster.primary.flush_lsn() - start < 400 * MIB {
        write_megabytes(&cluster, 16);
        cluster.primary.sql("checkpoint");
        largest = largest.max(pg_wal_bytes(&cluster));
    }
    println!("pg_wal held at most {} MB", largest / MIB);
    // Twice max_wal_size is what stock Postgres may keep around a checkpoint; then the slot.
    assert!(
        largest <= (2 * 64 + 64 + 64) * MIB,
        "pg_wal grew to {} MB",
        largest / MIB
    );
    let (ours, _) = cluster.wal_dirs(&cluster.safekeepers[0]);
    assert!(
        ours.begin() > start,
        "pg_wal still holds what the member lacks: no donor is needed"
    );

    cluster.safekeepers[2].start();
    cluster.wait_streaming(3);
    let end = cluster.wait_all_caught_up(4 * SOON);
    let from_donor = cluster
        .primary
        .value("select bytes_from_donor from pg_stat_walproposer");
    assert!(
        from_donor.parse::<u64>().expect("a number") > 100 * MIB,
        "only {from_donor} from a donor"
    );
    let (_, theirs) = cluster.wal_dirs(&cluster.safekeepers[2]);
    let (_, donor) = cluster.wal_dirs(&cluster.safekeepers[0]);
    donor.assert_equal(&theirs, donor.begin().max(theirs.begin()), end);
    assert!(
        theirs.begin() <= start,
        "the member's log has a hole below {}",
        theirs.begin()
    );
    cluster.assert_wal_equal(end);
}

/// A member that hangs (it neither answers nor closes its connection) makes nothing grow in the
/// worker, and stalls no commit.
#[test]
fn the_workers_memory_is_bounded_while_a_member_hangs() {
    let cluster = Cluster::start_with(LITTLE_WAL, &[]);
    cluster.primary.sql("create table t (a int, b text)");
    cluster.primary.pgbench_init(5);
    let worker = cluster.primary.worker().expect("the worker runs");
    cluster.safekeepers[2].process().pause();

    // Less than the safekeepers keep for a member that is away, much more than pg_wal keeps.
    let mut command = cluster.primary.pgbench_command(4, Duration::from_secs(600));
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut load = spawn(command).expect("could not start pgbench");
    let begin = cluster.primary.flush_lsn();
    let (mut largest, mut longest) = (0, Duration::ZERO);
    while cluster.primary.flush_lsn() - begin < 500 * MIB {
        let start = Instant::now();
        write_megabytes(&cluster, 4);
        longest = longest.max(start.elapsed());
        largest = largest.max(resident_bytes(worker));
    }
    let kilobytes = largest >> 10;
    println!("worker: at most {kilobytes} kB resident; longest commit {longest:?}");
    let load_goes_on = load.try_wait().expect("our own child").is_none();
    assert!(load_goes_on, "pgbench ended with an error");
    load.kill().expect("our own child");
    load.wait().expect("our own child");
    assert_eq!(
        cluster.primary.worker(),
        Some(worker),
        "the worker was restarted"
    );
    assert!(
        largest > 0 && largest <= 64 * MIB,
        "{} MB resident",
        largest / MIB
    );
    assert!(
        longest < Duration::from_secs(4),
        "a hanging member stalled a commit for {longest:?}"
    );
    wait_until("the view shows it", SOON, || {
        cluster.members_active() == Some(2)
    });

    cluster.safekeepers[2].process().resume();
    cluster.wait_streaming(3);
    let end = cluster.wait_all_caught_up(4 * SOON);
    cluster.assert_wal_equal(end);
}

fn write_megabytes(cluster: &Cluster, megabytes: u32) {
    let rows = megabytes * 1024;
    cluster.primary.sql(&format!(
        "insert into t select g, repeat(md5(g::text), 31) from generate_series(1, {rows}) g"
    ));
    cluster.primary.sql("truncate t");
}

fn pg_wal_bytes(cluster: &Cluster) -> u64 {
    let files = fs::read_dir(cluster.primary.wal_dir())
        .expect("pg_wal is there")
        .flatten();
    // A file may be recycled while we look.
    files
        .filter_map(|file| file.metadata().ok())
        .filter(|meta| meta.is_file())
        .map(|m| m.len())
        .sum()
}

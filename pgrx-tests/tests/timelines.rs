//! Consumers over a change of timelines, from the safekeepers alone: history files, segments of both
//! timelines, the end of the old one.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use cluster_tests::Cluster;
use cluster_tests::place::Programs;
use cluster_tests::poll::{SOON, wait_until};
use cluster_tests::postgres::Stop;
use cluster_tests::process::{Process, run_ok};
use cluster_tests::safekeeper::Safekeeper;
use cluster_tests::wal_compare::{assert_files_equal, file_names};

/// A receiver and a standby stream while the timeline changes twice, once in the middle of a segment
/// under load and once behind a switch of segments. What they hold in the end is what the primaries
/// wrote.
#[test]
fn receivers_and_standbys_follow_over_the_switch() {
    let mut cluster = Cluster::start_with("wal_keep_size = '1GB'", &[]);
    let received = cluster.dir.create("received");
    let log = cluster.dir.path().join("receiver.log");
    let mut command = psql_like("pg_receivewal", &cluster.safekeepers[0]);
    command
        .args(["--synchronous", "--directory"])
        .arg(&received);
    let _receiver = Process::start("pg_receivewal", command, &log);
    let mut first = cluster.start_standby("first");
    let second = cluster.start_standby("second");
    let reader = cluster.start_standby("reader");
    cluster.primary.pgbench_init(1);
    cluster.primary.pgbench(4, Duration::from_secs(2));
    cluster.primary.kill9();
    assert_eq!(first.value("select walproposer_promote(60)"), "t");
    first.pgbench(4, Duration::from_secs(2));
    first.sql("select pg_switch_wal()");
    let switched = first.flush_lsn();
    wait_until("the second has the switch", SOON, || {
        second.replay_lsn() >= switched
    });
    first.stop(Stop::Immediate);
    assert_eq!(second.value("select walproposer_promote(60)"), "t");
    second.pgbench(4, Duration::from_secs(2));
    let end = second.flush_lsn();

    wait_until("the reader has all", SOON, || reader.replay_lsn() >= end);
    let sums = "select sum(abalance), (select count(*) from pgbench_history) from pgbench_accounts";
    assert_eq!(reader.sql(sums), second.sql(sums));
    for tli in [2, 3] {
        let name = format!("{tli:08X}.history");
        let read = |dir: &Path| std::fs::read(dir.join(&name)).ok();
        wait_until("the receiver has the history files", SOON, || {
            read(&received).is_some()
        });
        // As the server that began the timeline wrote it.
        assert_eq!(read(&received), read(&second.wal_dir()), "{name}");
        assert_eq!(read(&reader.wal_dir()), read(&second.wal_dir()), "{name}");
    }
    // Every segment that was finished, under the name and with the bytes that the server gave it.
    let theirs = second.wal_dir();
    wait_until("the receiver has come to timeline 3", SOON, || {
        file_names(&received)
            .iter()
            .any(|name| name.starts_with("00000003"))
    });
    assert!(
        assert_files_equal(&received, &theirs, end) >= 2,
        "{:?}",
        file_names(&received)
    );
    for safekeeper in &cluster.safekeepers {
        wait_until("all is committed", SOON, || {
            safekeeper.lsn(cluster.system_id, "commit_lsn") >= end
        });
        let held = safekeeper.wal_dir(cluster.system_id);
        assert!(
            assert_files_equal(&held, &theirs, end) >= 2,
            "{:?}",
            file_names(&held)
        );
        let (ok, report) = safekeeper.verify();
        assert!(ok, "{report}");
    }
}

/// Whoever begins on a timeline that has ended gets its WAL up to the end, and hears which is next.
#[test]
fn a_timeline_that_has_ended_is_streamed_to_its_end() {
    let mut cluster = Cluster::start_with("wal_keep_size = '1GB'", &[]);
    let standby = cluster.start_standby("standby");
    cluster.primary.sql("create table t (n int)");
    cluster.primary.kill9();
    let begin = standby.lsn("select '0/0'::pg_lsn + (pg_last_wal_replay_lsn() - '0/0') - (pg_last_wal_replay_lsn() - '0/0') % 16777216");
    assert_eq!(standby.value("select walproposer_promote(60)"), "t");
    let end = standby.flush_lsn();
    // It ends when it has been sent something beyond the end.
    standby.sql("insert into t values (1)");
    let history = std::fs::read_to_string(standby.wal_dir().join("00000002.history"));
    let history = history.expect("a history file");
    let switch = history.split('\t').nth(1).expect("a position").to_owned();
    for safekeeper in &cluster.safekeepers {
        wait_until("timeline 2 is shown", SOON, || {
            identify(safekeeper).contains("|2|")
        });
        // pg_receivewal begins with the timeline of the files it finds: an old one, at a segment.
        let dir = cluster.dir.create(&format!("from{}", safekeeper.id));
        let name = format!("{:08X}{:08X}{:08X}.partial", 1, 0, begin.0 >> 24);
        std::fs::write(dir.join(&name), vec![0; 16 << 20]).expect("written");
        cluster_tests::place::give_to_server_user(&dir.join(&name));
        let mut command = psql_like("pg_receivewal", safekeeper);
        command.args(["--no-loop", "--verbose", "--endpos", &end.to_string()]);
        command.arg("--directory").arg(&dir);
        let output = run_ok(command);
        assert!(
            output.contains(&format!("switched to timeline 2 at {switch}")),
            "{output}"
        );
    }
}

fn identify(safekeeper: &Safekeeper) -> String {
    let mut command = Command::new(Programs::postgres("psql"));
    let address = safekeeper.address();
    command.args(["-X", "-A", "-t", "-c", "IDENTIFY_SYSTEM"]);
    command.args(["-d", "dbname=postgres replication=true"]);
    command.args(["--host", &address.ip().to_string()]);
    command.args(["--port", &address.port().to_string()]);
    command.args(["--username", "postgres"]);
    run_ok(command)
}

/// One of Postgres's programs, told to connect to a safekeeper.
fn psql_like(program: &str, safekeeper: &Safekeeper) -> Command {
    let mut command = Command::new(Programs::postgres(program));
    let address = safekeeper.address();
    command.args(["--host", &address.ip().to_string()]);
    command.args(["--port", &address.port().to_string()]);
    command.args(["--username", "postgres", "--no-password"]);
    command
}

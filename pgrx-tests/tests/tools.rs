//! Other people's tools set on safekeepers: Barman's streaming archiver, psycopg2, pg_basebackup.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use cluster_tests::Cluster;
use cluster_tests::place::{Programs, ServerUser, give_to_server_user};
use cluster_tests::poll::{SOON, wait_until};
use cluster_tests::postgres::Postgres;
use cluster_tests::process::{Process, run, spawn};
use cluster_tests::wal_compare::{WalDir, assert_files_equal, file_names};
use safekeeper_protocol::Lsn;

/// Barman archives what a safekeeper streams, while it asks the primary about the server. The safekeeper in
/// use is killed, Barman's receiver ends and is started again, as its cron does, and goes on from another.
/// What is in the archive is what the primary wrote, without a gap.
#[test]
fn barman_archives_what_safekeepers_stream() {
    let mut cluster = Cluster::start_with("wal_keep_size = '1GB'", &[]);
    let barman = Barman::configure_with(&cluster, "archiver = on\n");
    let mut receiver = barman.receive_wal(&cluster);
    let source = cluster.wait_source_of("barman");
    let first = finish_segment(&cluster.primary);
    barman.wait_archived(&first);
    let report = barman.run("check");
    for line in [
        "PostgreSQL: OK",
        "PostgreSQL streaming: OK",
        "systemid coherence: OK",
        "pg_receivexlog compatible: OK",
        "receive-wal running: OK",
    ] {
        assert!(report.contains(line), "no {line:?} in:\n{report}");
    }

    cluster.safekeepers[source].kill9();
    let second = finish_segment(&cluster.primary);
    receiver.wait(SOON);
    let _receiver = barman.receive_wal(&cluster);
    barman.wait_archived(&second);
    assert_ne!(cluster.wait_source_of("barman"), source);
    let last = finish_segment(&cluster.primary);
    barman.wait_archived(&last);
    let end = cluster.primary.flush_lsn();
    let archive = barman.archive(&last);
    let equal = assert_files_equal(&archive, &cluster.primary.wal_dir(), end);
    assert!(equal >= 3, "{equal} of {:?}", file_names(&archive));
    let number = |name: &str| u64::from_str_radix(&name[16..], 16).expect("a segment's name");
    assert_eq!(equal as u64, number(&last) - number(&first) + 1, "a gap");
}

/// The same with a slot, which Barman makes at each safekeeper that it comes to, and over a failover: both
/// timelines are in the archive, with the history between them, once Barman knows of the new primary.
#[test]
fn barman_goes_on_with_its_slot_after_a_failover() {
    let mut cluster = Cluster::start_with("wal_keep_size = '1GB'", &[]);
    let heir = cluster.start_standby("heir");
    heir.configure("wal_keep_size = '1GB'");
    let with_slot = "slot_name = barman\ncreate_slot = auto\n";
    let barman = Barman::configure_with(&cluster, with_slot);
    let mut receiver = barman.receive_wal(&cluster);
    let source = cluster.wait_source_of("barman");
    let first = finish_segment(&cluster.primary);
    barman.wait_archived(&first);
    let slot = cluster.safekeepers[source].slot(cluster.system_id, "barman");
    assert_eq!(slot.expect("it was made")["active"], true);

    cluster.safekeepers[source].kill9();
    receiver.wait(SOON);
    cluster.wait_streaming(2);
    cluster.primary.kill9();
    assert_eq!(heir.value("select walproposer_promote(60)"), "t");
    cluster.primary = heir;
    let barman = Barman::configure_with(&cluster, with_slot);
    let _receiver = barman.receive_wal(&cluster);
    assert_ne!(cluster.wait_source_of("barman"), source);
    let last = finish_segment(&cluster.primary);
    barman.wait_archived(&last);
    cluster.safekeepers[source].start();
    assert_eq!((&first[..8], &last[..8]), ("00000001", "00000002"));
    let history = "00000002.history";
    barman.wait_archived(history);
    let read = |path: PathBuf| std::fs::read(path).expect("a history file");
    let theirs = read(cluster.primary.wal_dir().join(history));
    assert_eq!(read(barman.archived(history)), theirs);
    // All of the new timeline; of the old one what was complete when it ended.
    let end = cluster.primary.flush_lsn();
    for segment in [&first, &last] {
        let equal = assert_files_equal(&barman.archive(segment), &cluster.primary.wal_dir(), end);
        assert!(equal >= 1, "{:?}", file_names(&barman.archive(segment)));
    }
}

/// psycopg2 receives from a safekeeper, and reports; another process goes on where it ended.
#[test]
fn psycopg2_receives_and_reports() {
    let cluster = Cluster::start_with("wal_keep_size = '1GB'", &[]);
    let dir = cluster.dir.create("received");
    let begin = WalDir::new(cluster.primary.wal_dir()).begin();
    let mut position = begin;
    for _ in 0..2 {
        finish_segment(&cluster.primary);
        cluster.primary.sql("create table t (a int); drop table t");
        let end = cluster.wait_all_caught_up(SOON);
        let receiver = Python::receive(&cluster, position, end, &dir);
        cluster.wait_flushed_by("psycopg2", end);
        let output = receiver.end();
        let identified = format!("identified: {} 1", cluster.system_id);
        assert!(output.contains(&identified), "{output}");
        position = end;
    }
    let ours = WalDir::new(cluster.primary.wal_dir());
    ours.assert_equal(&WalDir::new(dir), begin, position);
}

/// `pg_basebackup -X stream` under load, with the WAL that the backup needs from the primary; the standby
/// made of it takes the rest from the safekeepers, of which one is killed. The primary is gone by then.
#[test]
fn a_base_backup_with_its_wal_becomes_a_standby_of_the_safekeepers() {
    let mut cluster = Cluster::start_with("wal_keep_size = '1GB'", &[]);
    cluster.primary.pgbench_init(1);
    let mut load = cluster.primary.pgbench_command(4, Duration::from_secs(5));
    load.stdout(Stdio::null()).stderr(Stdio::null());
    let mut load = spawn(load).expect("could not start pgbench");
    let mut standby = Postgres::base_backup_with_wal_of(&cluster.primary, &cluster.dir, "standby");
    assert!(
        load.wait().expect("our own child").success(),
        "pgbench failed"
    );
    let end = cluster.wait_all_caught_up(SOON);
    let sums = "select sum(abalance), (select count(*) from pgbench_history) from pgbench_accounts";
    let expected = cluster.primary.sql(sums);
    cluster.primary.kill9();
    cluster.safekeepers[0].kill9();
    cluster.follow_safekeepers(&standby);
    standby.start();
    wait_until("all is replayed", SOON, || standby.replay_lsn() >= end);
    assert_eq!(standby.sql(sums), expected);
    let equal = assert_files_equal(&standby.wal_dir(), &cluster.primary.wal_dir(), end);
    assert!(equal >= 1, "{:?}", file_names(&standby.wal_dir()));
}

/// Writes enough to be worth a segment, ends it, and begins the next: Barman leaves the newest file alone.
/// Returns its name.
fn finish_segment(primary: &Postgres) -> String {
    primary.sql("select pg_logical_emit_message(false, 'some', repeat('x', 3000000))");
    let segment = primary.value("select pg_walfile_name(pg_current_wal_insert_lsn())");
    primary.sql("select pg_switch_wal()");
    primary.sql("select pg_logical_emit_message(true, 'next', '')");
    segment
}

/// Debian's Barman with a configuration and a home of its own.
struct Barman {
    configuration: PathBuf,
    home: PathBuf,
}

impl Barman {
    /// Once more after its cluster has changed: what it has stays.
    fn configure_with(cluster: &Cluster, more: &str) -> Barman {
        let home = cluster.dir.path().join("barman");
        if !home.exists() {
            cluster.dir.create("barman");
        }
        let configuration = cluster.dir.path().join("barman.conf");
        let pg_receivewal = Programs::postgres("pg_receivewal");
        let user = match ServerUser::other_than_us() {
            Some(_) => "postgres".to_owned(),
            None => std::env::var("USER").expect("we are somebody"),
        };
        let text = format!(
            "[barman]
barman_home = {home}
barman_user = {user}
log_file = {home}.log
[pg]
description = a primary and its safekeepers
conninfo = host={socket} port=5432 user=postgres dbname=postgres
streaming_conninfo = {streaming}
streaming_archiver = on
backup_method = postgres
path_prefix = {programs}
{more}",
            home = home.display(),
            socket = cluster.primary.socket_dir().display(),
            streaming = cluster.conninfo("barman"),
            programs = pg_receivewal.parent().expect("it has one").display(),
        );
        std::fs::write(&configuration, text).expect("our own directory");
        give_to_server_user(&configuration);
        Barman {
            configuration,
            home,
        }
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(Programs::installed("barman"));
        command
            .arg("-c")
            .arg(&self.configuration)
            .args([verb, "pg"]);
        command
    }

    /// What it says; it calls a server without a backup a failure.
    fn run(&self, verb: &str) -> String {
        run(self.command(verb)).1
    }

    fn receive_wal(&self, cluster: &Cluster) -> Process {
        let log = cluster.dir.path().join("receive-wal.log");
        Process::start("receive-wal", self.command("receive-wal"), &log)
    }

    fn archive(&self, segment: &str) -> PathBuf {
        self.home.join("pg/wals").join(&segment[..16])
    }

    /// Where a file is when it has been archived.
    fn archived(&self, name: &str) -> PathBuf {
        match name.ends_with(".history") {
            true => self.home.join("pg/wals").join(name),
            false => self.archive(name).join(name),
        }
    }

    /// As its cron does it, until it is done.
    #[track_caller]
    fn wait_archived(&self, segment: &str) {
        let file = self.archived(segment);
        let what = format!("{segment} is in Barman's archive");
        wait_until(&what, SOON, || {
            self.run("archive-wal");
            file.exists()
        });
    }
}

/// `tools/receive.py` at work.
struct Python(Process);

impl Python {
    fn receive(cluster: &Cluster, begin: Lsn, end: Lsn, dir: &Path) -> Python {
        // The server's user may not be able to read the sources.
        let script = cluster.dir.path().join("receive.py");
        std::fs::write(&script, include_str!("tools/receive.py")).expect("our own directory");
        give_to_server_user(&script);
        let mut command = Command::new(Programs::installed("python3"));
        command.arg(script).arg(cluster.conninfo("psycopg2"));
        command.args([begin.to_string(), end.to_string()]);
        command.arg("16777216").arg(dir);
        let log = cluster.dir.path().join("receive.log");
        Python(Process::start("receive.py", command, &log))
    }

    fn end(self) -> String {
        self.0.log()
    }
}

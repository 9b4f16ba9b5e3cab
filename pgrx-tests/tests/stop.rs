//! A clean stop brings the shutdown checkpoint to the quorum, so that the stopped primary can follow
//! the next one as it is; without a quorum it ends in time, and says so. (design §5, "Shutdown")

use std::time::{Duration, Instant};

use cluster_tests::Cluster;
use cluster_tests::poll::{SOON, never_within, wait_for, wait_until};
use cluster_tests::postgres::{Postgres, Stop};
use cluster_tests::process::{self, Process, signal_descendant};
use safekeeper_protocol::Lsn;

/// With a quorum a stop takes a moment. Generous: the machine may be busy.
const A_MOMENT: Duration = Duration::from_secs(10);

const IS_ON_QUORUM: &str = "is on the safekeepers' quorum";

fn wait_for_last_sender(postgres: &Postgres) -> u32 {
    let query =
        "select pid from pg_stat_activity where application_name = 'walproposer last sender'";
    let mut pid = 0;
    wait_until("there is a last sender", SOON, || {
        let rows = postgres.sql(query);
        pid = rows
            .first()
            .and_then(|row| row[0].as_deref()?.parse().ok())
            .unwrap_or(0);
        pid != 0 && rows.len() == 1
    });
    pid
}

fn start_pgbench(cluster: &Cluster, name: &str) -> Process {
    let command = cluster.primary.pgbench_command(4, Duration::from_secs(120));
    let log = cluster.dir.path().join(format!("{name}.log"));
    Process::start(name, command, &log)
}

/// Start of the last checkpoint's record, which must be a shutdown's, on all running safekeepers.
#[track_caller]
fn assert_checkpoint_committed(cluster: &Cluster) -> Lsn {
    let primary = &cluster.primary;
    assert_eq!(primary.control_data("Database cluster state"), "shut down");
    let checkpoint: Lsn = primary
        .control_data("Latest checkpoint location")
        .parse()
        .expect("an LSN");
    for safekeeper in cluster.safekeepers.iter().filter(|s| s.runs()) {
        let commit_lsn = safekeeper.lsn(cluster.system_id, "commit_lsn");
        assert!(
            commit_lsn > checkpoint,
            "safekeeper {}: {commit_lsn}, checkpoint {checkpoint}\n{}",
            safekeeper.id,
            primary.log_since_start()
        );
        let (ours, theirs) = cluster.wal_dirs(safekeeper);
        ours.assert_equal(&theirs, ours.begin().max(theirs.begin()), commit_lsn);
        assert!(ours.ends_at(commit_lsn), "there is WAL beyond {commit_lsn}");
        let mut waldump = primary.program("pg_waldump");
        waldump.arg("--path").arg(theirs.path());
        waldump.args(["--start", &checkpoint.to_string(), "--limit", "1"]);
        // It takes the size of segments from the file that is named.
        let segno = checkpoint.0 >> 24;
        waldump.arg(format!("00000001{:08X}{:08X}", segno >> 8, segno & 0xff));
        let text = process::run_ok(waldump);
        assert!(text.contains("CHECKPOINT_SHUTDOWN"), "{text}");
    }
    checkpoint
}

/// Under load, fast and smart, several times.
#[test]
fn the_shutdown_checkpoint_is_on_the_quorum() {
    let mut cluster = Cluster::start();
    cluster.primary.pgbench_init(2);
    for (round, how) in [Stop::Fast, Stop::Smart, Stop::Fast, Stop::Fast, Stop::Smart]
        .into_iter()
        .enumerate()
    {
        wait_for_last_sender(&cluster.primary);
        let mut load = start_pgbench(&cluster, &format!("load{round}"));
        wait_until("there is load", SOON, || {
            cluster.primary.value(
                "select count(*) > 4 from pg_stat_activity where backend_type = 'client backend'",
            ) == "t"
        });
        let begun = Instant::now();
        cluster.primary.begin_stop(how);
        if how == Stop::Smart {
            // It waits for its sessions, as ever.
            assert!(!cluster.primary.ended());
            load.kill9();
        }
        cluster.primary.wait_ended(SOON);
        assert!(begun.elapsed() < A_MOMENT, "{how:?}: {:?}", begun.elapsed());
        let log = cluster.primary.log_since_start();
        assert!(log.contains(IS_ON_QUORUM), "{log}");
        assert!(
            !log.contains("PANIC") && !log.contains("was terminated by"),
            "{log}"
        );
        assert_checkpoint_committed(&cluster);
        cluster.primary.start();
        cluster.wait_streaming(3);
    }
    let end = cluster.wait_all_caught_up(SOON);
    cluster.assert_wal_equal(end);
}

/// The stopped primary holds nothing that the quorum lacks: a copy of it takes over, writes, and the
/// stopped one follows it as a standby, without a rewind.
#[test]
fn a_stopped_primary_can_follow_the_next_one() {
    let mut cluster = Cluster::start();
    cluster
        .primary
        .sql("create table t (n int); insert into t values (1)");
    wait_for_last_sender(&cluster.primary);
    cluster.primary.stop(Stop::Fast);
    assert_checkpoint_committed(&cluster);
    let mut second = Postgres::copy_of(&cluster.primary, &cluster.dir, "second");
    second.start();
    second.sql("insert into t values (2)");
    let address = cluster.safekeepers[0].address();
    cluster.primary.configure(&format!(
        "primary_conninfo = 'host={} port={} application_name=first'",
        address.ip(),
        address.port()
    ));
    cluster.primary.touch("standby.signal");
    cluster.primary.start();
    wait_until("the first follows", SOON, || {
        cluster.primary.value("select count(*) from t") == "2"
    });
}

/// Nothing runs on in a server that is idle: the last sender sleeps. One that goes away is replaced;
/// it stays when the worker is started again; the next stop is as clean.
#[test]
fn the_last_sender_is_always_there() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create table t (n int)");
    let first = wait_for_last_sender(&cluster.primary);
    let ticks = |pid: u32| -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
        let fields: Vec<_> = stat[stat.rfind(')').expect("a name")..]
            .split(' ')
            .collect();
        fields[12].parse::<u64>().expect("a number") + fields[13].parse::<u64>().expect("a number")
    };
    let (before, switches) = (ticks(first), voluntary_switches(first));
    never_within("it runs", Duration::from_secs(3), || {
        voluntary_switches(first) > switches + 2
    });
    assert_eq!(ticks(first), before);
    // It holds nothing up: no snapshot, no slot, no database.
    assert_eq!(
        cluster.primary.value(&format!(
            "select backend_xmin is null and datname is null from pg_stat_activity where pid = {first}"
        )),
        "t"
    );
    println!("{} kB resident", process::resident_bytes(first) / 1024);

    // All processes must take part in this.
    cluster.primary.sql("create database d");
    cluster.primary.sql("drop database d");

    // Whoever terminates it, or its worker: it is there.
    signal_descendant(first, libc::SIGTERM);
    let worker = cluster.primary.worker().expect("it runs");
    signal_descendant(worker, libc::SIGTERM);
    wait_until("there is another worker", SOON, || {
        cluster.primary.worker().is_some_and(|pid| pid != worker)
    });
    cluster.primary.sql("delete from t");
    assert_eq!(wait_for_last_sender(&cluster.primary), first);
    cluster.primary.reload();
    cluster.primary.sql("insert into t values (1)");
    cluster.primary.stop(Stop::Fast);
    assert_checkpoint_committed(&cluster);
    cluster.primary.start();
    assert_eq!(cluster.primary.value("select count(*) from t"), "1");
}

fn voluntary_switches(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.and_then(|n| n.trim().parse().ok()).expect("a number")
}

/// One safekeeper is enough of a loss to be borne, two are not: then the stop ends in time and says
/// how far the quorum is. The next start pushes the rest.
#[test]
fn without_a_quorum_a_stop_ends_in_time() {
    let mut cluster = Cluster::start_with("walproposer.shutdown_timeout = '4s'", &[]);
    cluster.primary.sql("create table t (n int)");
    wait_for_last_sender(&cluster.primary);
    cluster.safekeepers[2].kill9();
    cluster.primary.sql("insert into t values (1)");
    let begun = Instant::now();
    cluster.primary.stop(Stop::Fast);
    assert!(begun.elapsed() < A_MOMENT, "{:?}", begun.elapsed());
    assert_checkpoint_committed(&cluster);
    cluster.primary.start();
    cluster.wait_streaming(2);
    wait_for_last_sender(&cluster.primary);

    cluster.safekeepers[1].kill9();
    for how in [Stop::Fast, Stop::Smart] {
        let begun = Instant::now();
        cluster.primary.stop(how);
        let took = begun.elapsed();
        assert!(took >= Duration::from_secs(4), "{took:?}");
        assert!(took < Duration::from_secs(4) + A_MOMENT, "{took:?}");
        let log = cluster.primary.log_since_start();
        assert!(log.contains("is not on the safekeepers' quorum"), "{log}");
        assert!(log.contains("shutdown_timeout is over"), "{log}");
        assert_eq!(
            cluster.primary.control_data("Database cluster state"),
            "shut down"
        );
        cluster.safekeepers[1].start();
        cluster.primary.start();
        cluster.wait_streaming(2);
        wait_for_last_sender(&cluster.primary);
        if how == Stop::Fast {
            cluster.safekeepers[1].kill9();
        }
    }
    cluster.primary.stop(Stop::Fast);
    assert_checkpoint_committed(&cluster);
}

/// A commit on a replication connection, which lives longer than ordinary sessions, does not hold a
/// stop up for ever, nor is it acknowledged.
#[test]
fn sql_on_a_replication_connection_does_not_hold_up_a_stop() {
    let mut cluster = Cluster::start_with("walproposer.shutdown_timeout = '3s'", &[]);
    cluster.primary.sql("create table t (a int)");
    wait_for_last_sender(&cluster.primary);
    cluster.safekeepers[1].kill9();
    cluster.safekeepers[2].kill9();
    let mut psql = cluster.primary.program("psql");
    psql.args(["-X", "-q", "-d", "dbname=postgres replication=database"])
        .args(["-c", "insert into t values (1)"]);
    let mut child = process::spawn(psql).expect("psql starts");
    cluster.wait_commits_waiting(1);
    cluster.primary.stop(Stop::Fast);
    assert!(!child.wait().expect("a child").success(), "acknowledged");
}

/// Everybody is terminated, as is often done before a stop: the worker ends, and nobody answers commits.
/// The last sender is not to be had so, and ends their wait.
#[test]
fn a_stop_without_a_worker_ends_too() {
    let mut cluster = Cluster::start_with("walproposer.shutdown_timeout = '1s'", &[]);
    cluster.primary.sql("create table t (a int)");
    wait_for_last_sender(&cluster.primary);
    cluster.safekeepers[1].kill9();
    cluster.safekeepers[2].kill9();
    let commit = cluster.commit_in_background("insert into t values (1)");
    cluster.wait_commits_waiting(1);
    let worker = cluster.primary.worker().expect("it runs");
    cluster.primary.sql(
        "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()",
    );
    wait_until("the worker is gone", SOON, || {
        cluster.primary.worker() != Some(worker)
    });
    cluster.primary.stop(Stop::Fast);
    commit.wait(SOON).expect_err("no acknowledgement");
    let log = cluster.primary.log_since_start();
    assert!(log.contains("gave up waiting"), "{log}");
}

/// Whatever pg_hba.conf asks of the server's own user, short of rejecting it.
#[test]
fn any_method_of_authentication_serves() {
    for replication in [
        "local replication all scram-sha-256",
        "local replication all md5",
        "local replication all peer",
        "local replication all reject",
        "",
    ] {
        let hba = &format!("local all all trust\n{replication}");
        let mut cluster = Cluster::prepare(&[]);
        set_hba(&cluster.primary, hba);
        cluster.start_all();
        wait_for_last_sender(&cluster.primary);
        cluster.primary.stop(Stop::Fast);
        let log = cluster.primary.log_since_start();
        assert!(log.contains(IS_ON_QUORUM), "{hba}:\n{log}");
        assert_checkpoint_committed(&cluster);
    }
}

/// Where there is no way in, that is said, once, and at the stop again, which ends all the same.
#[test]
fn no_way_in_is_said() {
    for (settings, reason) in [
        ("", "pg_hba.conf rejects"),
        (
            "unix_socket_directories = ''\nlisten_addresses = '127.0.0.1'\nport = 25432",
            "unix_socket_directories is empty",
        ),
    ] {
        let mut cluster = Cluster::prepare(&[]);
        cluster.primary.configure(settings);
        set_hba(&cluster.primary, "local all all reject");
        cluster.safekeepers.iter_mut().for_each(|s| s.start());
        cluster.primary.start_without_waiting();
        wait_until("it is said", SOON, || {
            let log = cluster.primary.log_since_start();
            log.contains("will not bring the shutdown checkpoint to the safekeepers")
                && log.contains(reason)
        });
        let begun = Instant::now();
        cluster.primary.stop(Stop::Fast);
        assert!(begun.elapsed() < A_MOMENT);
        let log = cluster.primary.log_since_start();
        assert!(log.contains("there is no last sender"), "{log}");
        assert_eq!(log.matches("will not bring").count(), 1, "{log}");
    }
}

fn set_hba(postgres: &Postgres, lines: &str) {
    let path = postgres.data().join("pg_hba.conf");
    std::fs::write(path, format!("{lines}\n")).expect("written");
}

/// Whoever shows a nonce that was not given to him, or one that was used, is a replication
/// connection like any other: refused where it must be, and no last sender.
#[test]
fn a_guessed_nonce_opens_nothing() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create table t (a int)");
    let last_sender = wait_for_last_sender(&cluster.primary);
    let tried = |name: &str| {
        let mut command = cluster.primary.program("psql");
        command.args(["-X", "-d"]);
        command.arg(format!("replication=true application_name='{name}'"));
        command.args(["-c", "IDENTIFY_SYSTEM"]);
        process::run(command)
    };
    for nonce in [&"0".repeat(32), &"f".repeat(32), "", "+1"] {
        let (ok, text) = tried(&format!("walproposer last sender {nonce}"));
        assert!(ok && text.contains("systemid"), "{text}");
    }
    set_hba(
        &cluster.primary,
        "local all all trust\nlocal replication all scram-sha-256",
    );
    cluster.primary.reload();
    wait_until("a password is asked for", SOON, || {
        !tried("walproposer last sender 00").0
    });
    assert_eq!(wait_for_last_sender(&cluster.primary), last_sender);
    cluster.primary.stop(Stop::Fast);
    assert_checkpoint_committed(&cluster);
}

/// A smart stop waits for its sessions, and their commits go on, whatever becomes of the worker
/// meanwhile. It can be turned into a fast one.
#[test]
fn a_worker_that_ends_during_a_smart_stop_is_started_again() {
    let mut cluster = Cluster::start_with("walproposer.shutdown_timeout = '1s'", &[]);
    cluster.primary.sql("create table t (a int)");
    wait_for_last_sender(&cluster.primary);
    let mut session = cluster.primary.client();
    session
        .batch_execute("insert into t values (1)")
        .expect("a commit");
    cluster.primary.begin_stop(Stop::Smart);
    for _ in 0..2 {
        let worker = wait_for("there is a worker", SOON, || cluster.primary.worker());
        signal_descendant(worker, libc::SIGTERM);
        wait_until("the worker is gone", SOON, || {
            cluster.primary.worker() != Some(worker)
        });
        session
            .batch_execute("insert into t values (1)")
            .expect("a commit");
    }
    cluster.primary.begin_stop(Stop::Fast);
    cluster.primary.wait_ended(SOON);
    let log = cluster.primary.log_since_start();
    assert!(!log.contains("gave up waiting"), "{log}");
    assert!(log.contains(IS_ON_QUORUM), "{log}");
    assert_checkpoint_committed(&cluster);
    cluster.primary.start();
    assert_eq!(cluster.primary.value("select count(*) from t"), "3");
    let end = cluster.wait_all_caught_up(SOON);
    cluster.assert_wal_equal(end);
}

/// All WAL sender processes but the last sender's are taken, and the last sender is one of them.
#[test]
fn the_last_sender_is_not_one_too_many() {
    let mut cluster = Cluster::start_with("max_wal_senders = 2", &[]);
    cluster.primary.sql("create table t (a int)");
    wait_for_last_sender(&cluster.primary);
    let mut command = cluster.primary.program("pg_receivewal");
    command
        .arg("--directory")
        .arg(cluster.dir.create("receiver"));
    let receiver = Process::start(
        "receiver",
        command,
        &cluster.dir.path().join("receiver.log"),
    );
    wait_until("the receiver streams", SOON, || {
        cluster
            .primary
            .value("select count(*) from pg_stat_replication")
            == "2"
    });
    cluster.primary.sql("insert into t values (1)");
    cluster.primary.stop(Stop::Fast);
    drop(receiver);
    assert_checkpoint_committed(&cluster);
    let log = cluster.primary.log();
    assert!(!log.contains("was terminated by signal"), "{log}");
}

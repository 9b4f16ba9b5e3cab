//! `safekeeper fetch-wal` as a `restore_command`: standbys, recovery to a point in time, pg_rewind.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use cluster_tests::Cluster;
use cluster_tests::place::Programs;
use cluster_tests::poll::{SOON, never_within, wait_until};
use cluster_tests::postgres::{Postgres, Stop};
use cluster_tests::process::{run, run_ok};

/// A base backup without WAL, long behind the primary, whose segments the primary has removed: it
/// becomes a hot standby by what the safekeepers hold, follows to the primary's very position, also
/// with one safekeeper down and one that stands still, and after a restart.
#[test]
fn a_base_backup_follows_by_its_restore_command_alone() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create table t (n int)");
    let mut standby = backup(&cluster, "standby");
    let needed = first_segment(&standby);
    fill_segments(&cluster);
    cluster.primary.sql("insert into t values (1)");
    // The slot follows the safekeepers once a second, and a checkpoint removes what it lets go.
    wait_until("the primary has removed what is needed", SOON, || {
        cluster.primary.sql("checkpoint");
        !cluster.primary.wal_dir().join(&needed).exists()
    });
    standby.touch("standby.signal");
    standby.start();
    let reaches_primary = |standby: &Postgres| {
        let end = cluster.primary.flush_lsn();
        let what = format!("the standby has replayed up to {end}");
        wait_until(&what, SOON, || standby.replay_lsn() >= end);
    };
    reaches_primary(&standby);
    for n in 2..5 {
        cluster.primary.sql(&format!("insert into t values ({n})"));
        reaches_primary(&standby);
        assert_eq!(standby.value("select count(*) from t"), n.to_string());
    }
    let log = standby.log();
    assert!(
        log.contains(&format!("restored log file \"{needed}\" from archive")),
        "{log}"
    );
    assert!(!log.contains("started streaming"), "{log}");

    // What is committed of the newest segment lies in its pg_wal, and is left alone.
    standby.stop(Stop::Fast);
    standby.start();
    reaches_primary(&standby);
    let newest = standby.value("select pg_walfile_name(pg_last_wal_receive_lsn())");
    assert_eq!(newest, "", "it has streamed");
    let before = log_lines(&standby, "is in pg_wal already");
    wait_until("it asks again", SOON, || {
        log_lines(&standby, "is in pg_wal already") > before
    });
    assert_eq!(standby.value("select count(*) from t"), "4");
    standby.stop(Stop::Fast);

    cluster.primary.sql("insert into t values (5)");
    cluster.wait_all_caught_up(SOON);
    let end = cluster.primary.flush_lsn();
    cluster.safekeepers[0].kill9();
    cluster.safekeepers[1].process().pause();
    standby.start();
    wait_until("the standby has it from the last one", SOON, || {
        standby.replay_lsn() >= end
    });
    assert_eq!(standby.value("select count(*) from t"), "5");
    standby.stop(Stop::Fast);

    let started = Instant::now();
    assert_eq!(fetch(&standby, &needed).0, 0, "a whole segment");
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "it waited for the others"
    );
    assert_eq!(fetch(&standby, "00000002.history").0, 1);
    assert!(
        started.elapsed() < Duration::from_secs(12),
        "it waited too long"
    );
    cluster.safekeepers[1].process().resume();
}

/// What nobody has is exit 1 and one line, and no file.
#[test]
fn a_file_that_nobody_has_is_not_there() {
    let mut cluster = Cluster::start();
    let mut standby = backup(&cluster, "standby");
    let before = names(&standby.wal_dir());
    for file in [
        "0000000100000000000000FF",
        "000000020000000000000001",
        "00000002.history",
        "00000001.history",
        "000000010000000000000001.partial",
        "000000010000000000000001.00000028.backup",
    ] {
        let (code, text) = fetch(&standby, file);
        assert_eq!((code, text.lines().count()), (1, 1), "{file}: {text}");
    }
    for safekeeper in &mut cluster.safekeepers {
        safekeeper.kill9();
    }
    let (code, text) = fetch(&standby, "000000010000000000000001");
    assert_eq!((code, text.lines().count()), (1, 1), "{text}");
    assert!(text.contains("could not connect"), "{text}");
    // A recovery that would take that for the end is stopped instead.
    standby.touch("recovery.signal");
    assert_eq!(fetch(&standby, "000000010000000000000001").0, 128);
    let log = standby.start_refused();
    assert!(
        log.contains("from archive: child process exited with exit code 128"),
        "{log}"
    );
    fs::remove_file(standby.data().join("walproposer.toml")).expect("it was copied");
    fs::remove_file(standby.data().join("recovery.signal")).expect("just made");
    let (code, text) = fetch(&standby, "000000010000000000000001");
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("--from HOST:PORT"), "{text}");
    assert_eq!(names(&standby.wal_dir()), before);
}

/// A clone at an earlier point has the same system identifier, and may not lead: nobody notices it,
/// nothing of it is acknowledged, and it does not start a second time. pg_rewind then makes it a
/// standby again, with WAL from the safekeepers.
#[test]
fn a_clone_of_an_earlier_point_leads_nobody_and_can_be_rewound() {
    let cluster = Cluster::start_with("wal_log_hints = on", &[]);
    cluster.primary.sql("create table t (who text)");
    let mut clone = backup(&cluster, "clone");
    cluster.primary.sql("insert into t values ('before')");
    let target = cluster.primary.lsn("select pg_current_wal_insert_lsn()");
    cluster.primary.sql("insert into t values ('after')");
    fill_segments(&cluster);
    let term = || {
        cluster
            .primary
            .value("select term from pg_stat_walproposer")
    };
    let reign = term();

    clone.configure(&format!("recovery_target_lsn = '{target}'"));
    clone.configure("recovery_target_action = 'promote'");
    clone.touch("recovery.signal");
    clone.start();
    wait_until("the clone is promoted", SOON, || {
        clone.value("select pg_is_in_recovery()") == "f"
    });
    assert_eq!(clone.value("select string_agg(who, ',') from t"), "before");
    let mut session = clone.client();
    let commit =
        std::thread::spawn(move || session.batch_execute("insert into t values ('clone')"));
    never_within("the clone's commit", Duration::from_secs(8), || {
        assert!(
            cluster
                .primary
                .try_sql("insert into t values ('meanwhile')")
                .is_ok()
        );
        commit.is_finished()
    });
    let state = clone.value("select state from pg_stat_walproposer");
    assert_ne!(state, "leading");
    assert_eq!(term(), reign, "the clone disturbed the reign");
    cluster.wait_streaming(3);
    clone.kill9();
    assert!(
        commit.join().expect("no panic").is_err(),
        "the clone acknowledged a commit"
    );
    let log = clone.start_refused();
    assert!(
        log.contains("this server must not start as a primary"),
        "{log}"
    );
    assert!(
        log.contains("Make a new base backup") || log.contains("Run pg_rewind"),
        "{log}"
    );
    assert_eq!(term(), reign, "a refused start disturbed the reign");

    rewind(&cluster, &clone);
    clone.configure("recovery_target_lsn = ''");
    clone.touch("standby.signal");
    clone.start();
    let end = cluster.primary.flush_lsn();
    wait_until("the clone is a standby", SOON, || clone.replay_lsn() >= end);
    let count = "select count(*) from t";
    assert_eq!(clone.value(count), cluster.primary.value(count));
    assert_eq!(
        clone.value("select count(*) from t where who = 'clone'"),
        "0"
    );
}

/// `pg_rewind -c` of a server that was killed.
fn rewind(cluster: &Cluster, target: &Postgres) {
    // As if it had run for long: what it needs of the old timeline lies on the safekeepers only.
    for name in names(&target.wal_dir()) {
        if name.len() == 24 && name.starts_with("00000001") {
            fs::remove_file(target.wal_dir().join(name)).expect("just seen");
        }
    }
    let mut rewind = target.program("pg_rewind");
    rewind.args(["--restore-target-wal", "--no-sync", "--target-pgdata"]);
    rewind.arg(target.data());
    rewind.arg(format!(
        "--source-server=host={} port=5432 user=postgres dbname=postgres",
        cluster.primary.socket_dir().display()
    ));
    let output = run_ok(rewind);
    assert!(
        output.contains("servers diverged at WAL location"),
        "{output}"
    );
    target.configure(&format!(
        "unix_socket_directories = '{}'",
        target.socket_dir().display()
    ));
    target.restore_by_fetch_wal();
}

/// A base backup without WAL, which gets it by fetch-wal.
fn backup(cluster: &Cluster, name: &str) -> Postgres {
    let backup = Postgres::base_backup_of(&cluster.primary, &cluster.dir, name);
    backup.restore_by_fetch_wal();
    backup
}

/// Three segments' worth of WAL, committed, and a checkpoint after each: the oldest are removed.
fn fill_segments(cluster: &Cluster) {
    for _ in 0..3 {
        cluster
            .primary
            .sql("create table filler as select g from generate_series(1, 1000) g");
        cluster
            .primary
            .sql("drop table filler; select pg_switch_wal()");
        cluster.wait_all_caught_up(SOON);
        cluster.primary.sql("checkpoint");
    }
}

fn first_segment(backup: &Postgres) -> String {
    let label = fs::read_to_string(backup.data().join("backup_label"));
    segment_of_label(&label.expect("it is a base backup"))
}

/// `START WAL LOCATION: 0/3000028 (file 000000010000000000000003)`
fn segment_of_label(label: &str) -> String {
    let name = label
        .split_once("(file ")
        .and_then(|(_, rest)| rest.split_once(')'));
    name.expect("a start").0.to_owned()
}

fn log_lines(postgres: &Postgres, text: &str) -> usize {
    postgres.log_since_start().matches(text).count()
}

/// fetch-wal as Postgres runs it: exit code and output. A file that is brought is removed again.
fn fetch(postgres: &Postgres, file: &str) -> (i32, String) {
    let mut command = Command::new("sh");
    let script = "cd \"$1\" && \"$2\" fetch-wal \"$3\" pg_wal/RECOVERYXLOG; echo \"exit $?\"";
    command.args(["-c", script, "sh"]).arg(postgres.data());
    command.arg(Programs::safekeeper()).arg(file);
    let (_, output) = run(command);
    // Both streams are joined, stdout first.
    let (first, text) = output.split_once('\n').expect("a line");
    let code = first
        .strip_prefix("exit ")
        .and_then(|code| code.parse().ok());
    let path = postgres.wal_dir().join("RECOVERYXLOG");
    let code = code.unwrap_or_else(|| panic!("no exit code in {output}"));
    assert_eq!(path.exists(), code == 0, "{file}: {output}");
    let _ = fs::remove_file(path);
    (code, text.to_owned())
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a directory").flatten();
    let mut names: Vec<_> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

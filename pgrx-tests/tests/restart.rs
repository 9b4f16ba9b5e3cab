//! A primary starts: after a crash, with WAL that its disk has lost, without a quorum, after another
//! one has reigned. (design §7.1)

use std::fs;
use std::time::Duration;

use cluster_tests::poll::{SOON, never_within, wait_until};
use cluster_tests::postgres::{Postgres, Stop};
use cluster_tests::process::run_ok;
use cluster_tests::safekeeper::Safekeeper;
use cluster_tests::{Cluster, safekeepers_setting};
use safekeeper_protocol::Lsn;

/// A disk that lied about its cache: the last part of the local WAL is gone after a power cut, while
/// the safekeepers have it. The start fetches it back, and recovery replays it. Several times, with
/// cuts at any place, within a page and across segments.
#[test]
fn wal_that_the_local_disk_lost_is_fetched_from_the_safekeepers() {
    let mut cluster = Cluster::start();
    // Nothing is to be written back to the tables: then the WAL is all there is of a row.
    cluster
        .primary
        .configure("checkpoint_timeout = '1h'\nmax_wal_size = '4GB'\nbgwriter_lru_maxpages = 0");
    cluster.primary.sql("create table t (n int, filler text)");
    let mut rows = 0;
    for lost in [100_u64, 8192, 70_000, 4 << 20] {
        cluster.primary.sql("checkpoint");
        for _ in 0..20 {
            cluster.primary.sql(&format!(
                "insert into t select g, repeat('x', 200) from generate_series({rows}, {}) g",
                rows + 999
            ));
            rows += 1000;
        }
        let end = cluster.wait_all_caught_up(SOON);
        cluster.primary.kill9();
        cluster.primary.start_without_wal(Lsn(end.0 - lost), end);
        assert_eq!(
            cluster.primary.value("select count(*) from t"),
            rows.to_string(),
            "after {lost} bytes were lost"
        );
        cluster.wait_streaming(3);
        // The handed-over term, not one of the worker's own.
        let log = cluster.primary.log_since_start();
        assert_eq!(log.matches("elected in term").count(), 2, "{log}");
    }
    let end = cluster.wait_all_caught_up(SOON);
    cluster.assert_wal_equal(end);
}

/// After a clean stop too: what the control file calls a shut-down server is recovered all the same.
#[test]
fn after_a_clean_stop_the_log_is_compared_all_the_same() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create table t (n int)");
    for n in 0..3 {
        cluster.primary.sql(&format!("insert into t values ({n})"));
        cluster.primary.stop(Stop::Fast);
        cluster.primary.start();
        cluster.wait_streaming(3);
    }
    assert_eq!(cluster.primary.value("select count(*) from t"), "3");
    let end = cluster.wait_all_caught_up(SOON);
    cluster.assert_wal_equal(end);
}

/// A backend is killed: the postmaster restarts its children, and asks the quorum again.
#[test]
fn a_crash_restart_of_the_postmaster_wins_a_term_of_its_own() {
    let cluster = Cluster::start();
    cluster.primary.sql("create table t (n int)");
    let term = || -> u64 {
        let value = cluster
            .primary
            .value("select term from pg_stat_walproposer");
        value.parse().expect("a number")
    };
    let before = term();
    let mut victim = cluster.primary.client();
    let pid: i32 = victim
        .query_one("select pg_backend_pid()", &[])
        .expect("it answers")
        .get(0);
    cluster_tests::process::signal_descendant(pid.unsigned_abs(), libc::SIGKILL);
    wait_until("the server is back", SOON, || {
        let log = cluster.primary.log();
        log.contains("all server processes terminated; reinitializing")
            && cluster.primary.try_sql("insert into t values (1)").is_ok()
    });
    assert!(term() > before, "no new term");
    assert_eq!(cluster.primary.value("select count(*) from t"), "1");
    cluster.wait_streaming(3);
}

/// No quorum: the start waits, says so, obeys a stop, and goes on by itself when there is one. A row
/// that was flushed here and never acknowledged is not shown before it is on the quorum.
#[test]
fn a_start_without_a_quorum_waits_and_shows_nothing() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create table t (who text)");
    cluster.primary.sql("insert into t values ('acknowledged')");
    cluster.wait_all_caught_up(SOON);
    cluster.safekeepers[1].kill9();
    cluster.safekeepers[2].kill9();
    let lost = cluster.commit_in_background("insert into t values ('never acknowledged')");
    cluster.wait_commits_waiting(1);
    cluster.primary.kill9();
    assert!(lost.wait(SOON).is_err());

    cluster.primary.start_without_waiting();
    wait_until("the log says what is missing", SOON, || {
        cluster
            .primary
            .log_since_start()
            .contains("waiting before recovery: no quorum: 1 members reachable, 2 needed")
    });
    never_within("a session", Duration::from_secs(2), || {
        cluster.primary.try_client().is_ok()
    });
    cluster.primary.stop(Stop::Fast);
    let log = cluster.primary.log_since_start();
    assert!(
        log.contains("stopped while waiting for the safekeepers"),
        "{log}"
    );

    cluster
        .primary
        .configure("walproposer.start_timeout = '2s'");
    let log = cluster.primary.start_refused();
    assert!(log.contains("walproposer.start_timeout is over"), "{log}");
    cluster.primary.configure("walproposer.start_timeout = 0");

    cluster.primary.start_without_waiting();
    cluster.safekeepers[1].start();
    wait_until("the server answers", SOON, || {
        cluster.primary.try_client().is_ok()
    });
    // Now it may be shown: it is on the quorum.
    assert_eq!(cluster.primary.value("select count(*) from t"), "2");
    let end = cluster.primary.flush_lsn();
    assert!(cluster.safekeepers[1].lsn(cluster.system_id, "flush_lsn") >= Lsn(end.0 - 8192));
}

/// The quorum is lost between the election and the commit of the recovered tail: sessions are held
/// at the door, until it is back. A superuser on the local socket gets in where that is allowed.
#[test]
fn sessions_are_held_until_the_recovered_wal_is_on_the_quorum() {
    let mut cluster = Cluster::start();
    cluster
        .primary
        .sql("create role app login; create table t (who text); grant select on t to app");
    cluster.primary.sql("insert into t values ('acknowledged')");
    cluster.wait_all_caught_up(SOON);
    // Enough for recovery to take a moment, in which the safekeepers are stopped.
    cluster
        .primary
        .configure("walproposer.hold_superusers = off");
    cluster.primary.sql("checkpoint");
    cluster
        .primary
        .sql("create table filler as select g, repeat('x', 500) from generate_series(1, 200000) g");
    cluster.wait_all_caught_up(SOON);
    for safekeeper in &cluster.safekeepers[1..] {
        safekeeper.process().pause();
    }
    let lost = cluster.commit_in_background("insert into t values ('never acknowledged')");
    cluster.wait_commits_waiting(1);
    cluster.primary.kill9();
    assert!(lost.wait(SOON).is_err());
    for safekeeper in &cluster.safekeepers[1..] {
        safekeeper.process().resume();
    }
    cluster.primary.start_without_waiting();
    wait_until("the start is elected", SOON, || {
        let log = cluster.primary.log_since_start();
        log.contains("the start was elected in term")
    });
    for safekeeper in &cluster.safekeepers[1..] {
        safekeeper.process().pause();
    }
    wait_until("sessions are held", SOON, || {
        let log = cluster.primary.log_since_start();
        assert!(
            !log.contains("sessions are let in"),
            "the tail was committed before the pause"
        );
        log.contains("sessions are held until")
    });
    let mut app = cluster.primary.config();
    app.user("app");
    let session = std::thread::spawn(move || {
        let mut client = app.connect(::postgres::NoTls)?;
        client.query_one("select count(*) from t", &[])
    });
    // The way in for maintenance; it sees what is here.
    assert_eq!(cluster.primary.value("select count(*) from t"), "2");
    never_within("the ordinary session", Duration::from_secs(3), || {
        session.is_finished()
    });
    for safekeeper in &cluster.safekeepers[1..] {
        safekeeper.process().resume();
    }
    wait_until("the session gets in", SOON, || session.is_finished());
    let row = session.join().expect("no panic").expect("a session");
    assert_eq!(row.get::<_, i64>(0), 2);
}

/// Another primary has written since: the start is refused, with both positions and what to do.
/// Neither refusal disturbs the reign.
#[test]
fn a_start_is_refused_where_another_primary_has_reigned() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create table t (who text)");
    cluster.wait_all_caught_up(SOON);
    cluster.primary.stop(Stop::Immediate);
    let behind = Postgres::copy_of(&cluster.primary, &cluster.dir, "behind");
    let mut second = Postgres::copy_of(&cluster.primary, &cluster.dir, "second");
    second.start();
    wait_until("the second leads", SOON, || {
        second.try_sql("insert into t values ('second')").is_ok()
    });
    let term = |postgres: &Postgres| postgres.value("select term from pg_stat_walproposer");
    let reign = term(&second);

    // All of its log is the quorum's: it can be a standby as it is. The other one writes meanwhile.
    let writing = std::sync::atomic::AtomicBool::new(true);
    let log = std::thread::scope(|scope| {
        scope.spawn(|| {
            while writing.load(std::sync::atomic::Ordering::Relaxed) {
                second.sql("insert into t values ('second')");
            }
        });
        let log = cluster.primary.start_refused();
        writing.store(false, std::sync::atomic::Ordering::Relaxed);
        log
    });
    for text in [
        "this server must not start as a primary",
        "ending at",
        "create \"standby.signal\"",
    ] {
        assert!(log.contains(text), "no {text:?} in:\n{log}");
    }
    // It has written by itself, loudly: diverged for good.
    let mut diverged = behind;
    diverged.configure("walproposer.start_without_quorum = on");
    diverged.start_without_waiting();
    wait_until("it runs alone", SOON, || {
        diverged.try_sql("select pg_switch_wal()").is_ok()
    });
    assert!(
        diverged
            .log_since_start()
            .contains("start_without_quorum is on")
    );
    diverged.sql("checkpoint");
    diverged.kill9();
    diverged.configure("walproposer.start_without_quorum = off");
    let log = diverged.start_refused();
    assert!(
        log.contains("this server must not start as a primary"),
        "{log}"
    );
    assert!(log.contains("written without a term from"), "{log}");

    second.sql("insert into t values ('second')");
    assert_eq!(term(&second), reign, "a refused start disturbed the reign");
}

/// pg_rewind and HA managers recover a crashed server in single-user mode before they rewind it. There
/// the extension asks nobody; the next start is refused as before.
#[test]
fn in_single_user_mode_a_refused_server_recovers_and_stays_refused() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create table t (who text)");
    cluster.wait_all_caught_up(SOON);
    cluster.primary.stop(Stop::Immediate);
    let mut second = Postgres::copy_of(&cluster.primary, &cluster.dir, "second");
    second.start();
    wait_until("the second leads", SOON, || {
        second.try_sql("insert into t values ('second')").is_ok()
    });
    let reign = second.value("select term from pg_stat_walproposer");
    for _ in 0..2 {
        let mut single = cluster.primary.program("postgres");
        single.args(["--single", "-F", "-D"]);
        single.arg(cluster.primary.data()).arg("template1");
        let output = run_ok(single);
        assert!(output.contains("checkpoint complete"), "{output}");
        let log = cluster.primary.start_refused();
        assert!(
            log.contains("this server must not start as a primary"),
            "{log}"
        );
    }
    second.sql("insert into t values ('second')");
    let now = second.value("select term from pg_stat_walproposer");
    assert_eq!(now, reign, "it disturbed the reign");
}

/// All safekeepers are lost, the primary is not. It goes on with new ones, as failover.md says.
#[test]
fn after_the_loss_of_all_safekeepers_new_ones_are_made() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create table t (n int)");
    cluster.wait_all_caught_up(SOON);
    cluster.primary.stop(Stop::Fast);
    cluster.safekeepers.iter_mut().for_each(Safekeeper::kill9);
    let history = cluster.primary.data().join("walproposer.history");
    fs::remove_file(history).expect("it led");
    let made = (4..=6).map(|id| Safekeeper::init(&cluster.dir, id));
    cluster.safekeepers = made.collect();
    let addresses = cluster.safekeepers.iter().map(Safekeeper::address);
    cluster.primary.configure(&safekeepers_setting(addresses));
    cluster.safekeepers.iter_mut().for_each(Safekeeper::start);
    cluster.primary.start();
    cluster.wait_streaming(3);
    cluster.primary.sql("insert into t values (1)");
    let end = cluster.wait_all_caught_up(SOON);
    cluster.assert_wal_equal(end);
}

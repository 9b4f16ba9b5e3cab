//! Nothing that interrupts a commit which waits for the quorum makes it look like a success: it is
//! neither acknowledged nor visible before the quorum has it, and then it is both. (G1, G8)
//!
//! In each test two of three safekeepers are dead while the commit waits.

use std::time::Duration;

use cluster_tests::poll::{SOON, never_within, wait_until};
use cluster_tests::postgres::{Stop, describe};
use cluster_tests::process::{self, signal_descendant};
use cluster_tests::{BackgroundCommit, Cluster};

/// How long a commit is watched for what must not happen.
const WATCHED: Duration = Duration::from_secs(2);

/// What the sessions under test are called.
const OTHERS: &str = "pid <> pg_backend_pid() and backend_type = 'client backend'";

fn without_a_quorum(settings: &str) -> Cluster {
    let mut cluster = Cluster::start_with(settings, &[]);
    cluster.primary.sql("create table t (a int)");
    cluster.wait_all_caught_up(SOON);
    cluster.safekeepers[1].kill9();
    cluster.safekeepers[2].kill9();
    cluster
}

/// Rows that another session sees.
fn rows(cluster: &Cluster) -> String {
    cluster.primary.value("select count(*) from t")
}

fn cancelled_waits(cluster: &Cluster) -> String {
    cluster
        .primary
        .value("select waits_cancelled from pg_stat_walproposer")
}

#[track_caller]
fn still_waits(cluster: &Cluster, commit: &BackgroundCommit) {
    never_within("an answer, or the row, without a quorum", WATCHED, || {
        commit.answered() || rows(cluster) != "0"
    });
    cluster.wait_commits_waiting(1);
    assert_eq!(cancelled_waits(cluster), "0");
}

#[track_caller]
fn quorum_comes_back(cluster: &mut Cluster) {
    cluster.safekeepers[1].start();
    wait_until("the row is there", SOON, || rows(cluster) == "1");
    assert_eq!(cancelled_waits(cluster), "0");
}

#[test]
fn a_cancel() {
    let mut cluster = without_a_quorum("");
    let commit = cluster.commit_in_background("insert into t values (1)");
    cluster.wait_commits_waiting(1);
    for _ in 0..3 {
        let cancel = format!("select pg_cancel_backend(pid) from pg_stat_activity where {OTHERS}");
        cluster.primary.sql(&cancel);
    }
    still_waits(&cluster, &commit);
    quorum_comes_back(&mut cluster);
    commit.wait(SOON).expect("a success, since it is one");
}

/// A procedure that commits has statement_timeout run on through its waits.
#[test]
fn statement_timeout_in_a_procedure() {
    let mut cluster = Cluster::start();
    cluster.primary.sql(
        "create table t (a int); create procedure p() language plpgsql as \
         $$ begin insert into t values (1); commit; insert into t values (2); commit; end $$",
    );
    cluster.safekeepers[1].kill9();
    cluster.safekeepers[2].kill9();
    let commit = cluster.commit_in_background_with("set statement_timeout = '500ms'", "call p()");
    cluster.wait_commits_waiting(1);
    still_waits(&cluster, &commit);
    quorum_comes_back(&mut cluster);
    // It takes effect as soon as the first commit is through.
    let error = commit.wait(SOON).expect_err("the rest is cancelled");
    let text = describe(&error);
    assert!(text.contains("statement timeout"), "{text}");
    assert_eq!(rows(&cluster), "1");
}

#[test]
fn a_termination() {
    let mut cluster = without_a_quorum("");
    let commit = cluster.commit_in_background("insert into t values (1); select 1");
    let waiting = cluster.commit_in_background("begin; insert into t values (1); commit; select 1");
    drop(commit);
    drop(waiting);
    cluster.wait_commits_waiting(2);
    let terminate =
        format!("select pg_terminate_backend(pid) from pg_stat_activity where {OTHERS}");
    cluster.primary.sql(&terminate);
    never_within("a row without a quorum", WATCHED, || rows(&cluster) != "0");
    cluster.wait_commits_waiting(2);
    cluster.safekeepers[1].start();
    wait_until("the rows are there", SOON, || rows(&cluster) == "2");
    // The signal was not lost.
    let sessions = format!("select count(*) from pg_stat_activity where {OTHERS}");
    wait_until("the sessions have ended", SOON, || {
        cluster.primary.value(&sessions) == "0"
    });
    assert_eq!(cancelled_waits(&cluster), "0");
}

/// A client that is killed while it waits. The server looks for that now and then, if it is told to.
#[test]
fn a_client_that_goes_away() {
    for settings in ["", "client_connection_check_interval = '100ms'"] {
        let mut cluster = without_a_quorum(settings);
        let mut psql = cluster.primary.program("psql");
        psql.args(["-X", "-c", "insert into t values (1)"]);
        let mut client = process::spawn(psql).expect("psql starts");
        cluster.wait_commits_waiting(1);
        client.kill().expect("our own child");
        client.wait().expect("our own child");
        never_within("the row without a quorum", WATCHED, || {
            rows(&cluster) != "0"
        });
        cluster.wait_commits_waiting(1);
        quorum_comes_back(&mut cluster);
        let sessions = format!("select count(*) from pg_stat_activity where {OTHERS}");
        wait_until("the session has ended", SOON, || {
            cluster.primary.value(&sessions) == "0"
        });
    }
}

/// PREPARE TRANSACTION, COMMIT PREPARED and ROLLBACK PREPARED, whatever level they ask for.
#[test]
fn two_phase_commits() {
    let mut cluster = Cluster::start_with("max_prepared_transactions = 5", &[]);
    cluster.primary.sql("create table t (a int)");
    let interrupt = [
        format!("select pg_cancel_backend(pid) from pg_stat_activity where {OTHERS}"),
        format!("select pg_terminate_backend(pid) from pg_stat_activity where {OTHERS}"),
    ];
    for statement in [
        "begin; insert into t values (1); prepare transaction 'x'",
        "rollback prepared 'x'",
        "begin; insert into t values (1); prepare transaction 'y'",
        "commit prepared 'y'",
    ] {
        let prepared = "select string_agg(gid, ',') from pg_prepared_xacts";
        let before = cluster.primary.value(prepared);
        cluster.safekeepers[1].kill9();
        cluster.safekeepers[2].kill9();
        let settings = "set synchronous_commit = off; set statement_timeout = '500ms'";
        let commit = cluster.commit_in_background_with(settings, statement);
        cluster.wait_commits_waiting(1);
        cluster.primary.sql(&interrupt[0]);
        never_within(statement, WATCHED, || {
            commit.answered() || rows(&cluster) != "0"
        });
        cluster.wait_commits_waiting(1);
        // Another one can't be made of a transaction that is being prepared or ended.
        if !before.is_empty() {
            assert_eq!(cluster.primary.value(prepared), before, "{statement}");
        }
        cluster.safekeepers[1].start();
        cluster.safekeepers[2].start();
        commit
            .wait(SOON)
            .unwrap_or_else(|e| panic!("{statement}: {}", describe(&e)));
        cluster.wait_streaming(3);
    }
    wait_until("the row is there", SOON, || rows(&cluster) == "1");
    assert_eq!(cancelled_waits(&cluster), "0");

    // An error leaves the session as it was: it can be cancelled, and terminated.
    let mut client = cluster.primary.client();
    for statement in [
        "commit prepared 'none'",
        "do $$ begin execute 'commit prepared ''none'''; exception when others then null; end $$",
        "begin; commit prepared 'none'",
    ] {
        let _ = client.batch_execute(statement);
        let _ = client.batch_execute("rollback");
        let error = client
            .batch_execute("set statement_timeout = '100ms'; select pg_sleep(60)")
            .expect_err("it takes too long");
        assert!(describe(&error).contains("57014"), "{}", describe(&error));
    }
    cluster.primary.sql(&interrupt[1]);
    assert!(client.batch_execute("select 1").is_err());
}

/// The commit of a transaction that prunes and notifies, of one with subtransactions, of one whose
/// level was lowered inside: each waits, and none is cancelled.
#[test]
fn transactions_of_all_kinds() {
    let mut cluster = without_a_quorum("");
    let statements = [
        "begin; savepoint a; insert into t values (1); release a; savepoint b; \
         insert into t values (2); rollback to b; commit",
        "begin; insert into t values (3); notify x, 'y'; set local synchronous_commit = off; commit",
        "create table u as select 1",
    ];
    let commits: Vec<_> = statements
        .iter()
        .map(|statement| cluster.commit_in_background(statement))
        .collect();
    cluster.wait_commits_waiting(3);
    let cancel = format!("select pg_cancel_backend(pid) from pg_stat_activity where {OTHERS}");
    cluster.primary.sql(&cancel);
    never_within("an answer or a row", WATCHED, || {
        commits.iter().any(BackgroundCommit::answered) || rows(&cluster) != "0"
    });
    cluster.wait_commits_waiting(3);
    cluster.safekeepers[1].start();
    for commit in commits {
        commit.wait(SOON).expect("the quorum has it");
    }
    assert_eq!(rows(&cluster), "2");
    assert_eq!(cancelled_waits(&cluster), "0");
}

/// Reading leaves WAL behind: rows that are dead are pruned from their page. That waits for nobody.
#[test]
fn a_read_that_prunes_does_not_wait() {
    let mut cluster = Cluster::start();
    cluster.primary.sql(
        "create table t (a int) with (autovacuum_enabled = off); \
         insert into t select 1 from generate_series(1, 200)",
    );
    for _ in 0..3 {
        cluster.primary.sql("update t set a = a + 1");
    }
    cluster.safekeepers[1].kill9();
    cluster.safekeepers[2].kill9();
    let before = cluster.primary.flush_lsn();
    let inserted = "select pg_current_wal_insert_lsn()";
    wait_until("reading has left WAL behind", SOON, || {
        cluster.primary.sql("select count(*) from t");
        cluster.primary.lsn(inserted) > before
    });
    cluster
        .primary
        .sql("select count(*) from t; select count(*) from pg_class");
}

/// Nobody can take the quorum out of the configuration of a server that runs.
#[test]
fn an_emptied_synchronous_standby_names() {
    let mut cluster = without_a_quorum("");
    let commit = cluster.commit_in_background("insert into t values (1)");
    cluster.wait_commits_waiting(1);
    cluster
        .primary
        .sql("alter system set synchronous_standby_names = ''");
    cluster.primary.configure("synchronous_standby_names = ''");
    cluster.primary.reload();
    wait_until("the configuration was read again", SOON, || {
        cluster
            .primary
            .log_since_start()
            .contains("received SIGHUP, reloading configuration files")
    });
    still_waits(&cluster, &commit);
    let second = cluster.commit_in_background("insert into t values (1)");
    cluster.wait_commits_waiting(2);
    assert!(!second.answered());
    cluster.safekeepers[1].start();
    commit.wait(SOON).expect("the quorum has it");
    second.wait(SOON).expect("the quorum has it");
    assert_eq!(
        cluster.primary.value("show synchronous_standby_names"),
        "walproposer"
    );
}

/// The worker is terminated while a commit waits: nothing is let go.
#[test]
fn a_worker_that_goes_away() {
    let mut cluster = without_a_quorum("");
    let commit = cluster.commit_in_background("insert into t values (1)");
    cluster.wait_commits_waiting(1);
    let worker = cluster.primary.worker().expect("it runs");
    signal_descendant(worker, libc::SIGTERM);
    still_waits(&cluster, &commit);
    quorum_comes_back(&mut cluster);
    commit.wait(SOON).expect("the quorum has it");
}

/// A fast stop ends the wait, once shutdown_timeout is over: unacknowledged, counted in the log, and
/// not shown by the next start before the quorum has it.
#[test]
fn a_fast_stop() {
    let mut cluster = without_a_quorum("walproposer.shutdown_timeout = '4s'");
    let commit = cluster.commit_in_background("insert into t values (1)");
    cluster.wait_commits_waiting(1);
    // It was there before, and sees what there is to be seen until it is ended.
    let mut watcher = cluster.primary.client();
    let begun = std::time::Instant::now();
    cluster.primary.begin_stop(Stop::Fast);
    while let Ok(row) = watcher.query_one("select count(*) from t", &[]) {
        assert_eq!(row.get::<_, i64>(0), 0);
    }
    never_within("an answer", Duration::from_secs(3), || commit.answered());
    let error = commit.wait(SOON).expect_err("no acknowledgement");
    assert!(
        error.is_closed() || error.as_db_error().is_some(),
        "{error}"
    );
    cluster.primary.wait_ended(SOON);
    let took = begun.elapsed();
    assert!(took >= Duration::from_secs(4), "{took:?}");
    assert!(took < Duration::from_secs(15), "{took:?}");
    let log = cluster.primary.log_since_start();
    for text in [
        "the server is stopping without the safekeepers' quorum",
        "gave up waiting for the safekeepers' quorum",
        "is not on the safekeepers' quorum",
    ] {
        assert!(log.contains(text), "no {text:?} in:\n{log}");
    }
    assert!(!log.contains("PANIC"), "{log}");
    cluster.primary.start_without_waiting();
    never_within("a session", WATCHED, || {
        cluster.primary.try_client().is_ok()
    });
    cluster.safekeepers[1].start();
    wait_until("the server answers", SOON, || {
        cluster.primary.try_client().is_ok()
    });
    assert_eq!(rows(&cluster), "1");
}

//! What a session sees of the extension: nothing, but that its commits wait for the quorum.

use cluster_tests::Cluster;
use cluster_tests::poll::SOON;
use cluster_tests::process;

/// An ERROR inside a utility command reaches the client as stock Postgres would send it.
#[test]
fn errors_of_commands_arrive_untouched() {
    let cluster = Cluster::start();
    let mut client = cluster.primary.client();
    let error = client
        .batch_execute(
            "do $$ begin raise exception 'x' using errcode = 'AB123', constraint = 'cons', \
             detail = 'd'; end $$",
        )
        .expect_err("it raises");
    let error = error.as_db_error().expect("an error of the server");
    assert_eq!(error.code().code(), "AB123");
    assert_eq!(error.constraint(), Some("cons"));
    assert_eq!(error.detail(), Some("d"));

    let error = client
        .batch_execute("create table t (a nosuchtype)")
        .expect_err("no such type");
    let error = error.as_db_error().expect("an error of the server");
    assert_eq!(error.code().code(), "42704");
    assert!(error.position().is_some(), "{error:?}");
    client
        .batch_execute("select 1")
        .expect("the session goes on");
}

/// Temporary and unlogged tables need no quorum, and nobody speaks of a cancelled wait.
#[test]
fn what_writes_no_wal_waits_for_nobody() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create unlogged table u (a int)");
    cluster.wait_all_caught_up(SOON);
    let mut client = cluster.primary.client();
    client
        .batch_execute("create temp table s (a int)")
        .expect("a temporary table");
    cluster.safekeepers[1].kill9();
    cluster.safekeepers[2].kill9();
    client
        .batch_execute("insert into s values (1)")
        .expect("no wait");
    client
        .batch_execute("insert into u values (1)")
        .expect("no wait");
    let cancelled = "select waits_cancelled from pg_stat_walproposer";
    assert_eq!(cluster.primary.value(cancelled), "0");
}

/// SQL on a replication connection commits like any other.
#[test]
fn sql_on_a_replication_connection_waits_too() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create table t (a int)");
    cluster.safekeepers[1].kill9();
    cluster.safekeepers[2].kill9();
    let mut psql = cluster.primary.program("psql");
    psql.args(["-X", "-q", "-d", "dbname=postgres replication=database"])
        .args(["-c", "set synchronous_commit = local"])
        .args(["-c", "insert into t values (1)"]);
    let mut child = process::spawn(psql).expect("psql starts");
    cluster.wait_commits_waiting(1);
    assert!(
        child.try_wait().expect("a child").is_none(),
        "acknowledged without a quorum"
    );
    cluster.safekeepers[1].start();
    assert!(child.wait().expect("a child").success());
}

/// Commits wait for the standby called walproposer. Nobody else may take the name.
#[test]
fn a_standby_cannot_pass_for_the_quorum() {
    let cluster = Cluster::start();
    for (dir, conninfo) in [
        ("plain", "application_name=walproposer"),
        ("mixed_case", "application_name=WalProposer"),
        ("options", "options='-c application_name=walproposer'"),
    ] {
        let mut command = cluster.primary.program("pg_receivewal");
        command
            .args(["--no-loop", "--synchronous", "-d", conninfo, "--directory"])
            .arg(cluster.dir.create(dir));
        let (ok, text) = process::run(command);
        assert!(!ok && text.contains("reserved"), "{conninfo}: {text}");
    }
}

//! `scripts/pre-promote`, run as Patroni runs its `pre_promote`: between the leader key and the
//! promotion. What Patroni would do after it is done here with its own commands.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use cluster_tests::Cluster;
use cluster_tests::ledger::Ledger;
use cluster_tests::place::{Programs, give_to_server_user};
use cluster_tests::poll::{SOON, wait_for, wait_until};
use cluster_tests::postgres::{Postgres, Stop};
use cluster_tests::process::{run, run_ok};

/// The primary dies under load. The script says yes, the manager promotes, and the new primary leads
/// in the prepared term with all that was acknowledged. Then the script says no to a second one.
#[test]
fn a_manager_promotes_after_the_script_has_said_yes() {
    let mut cluster = Cluster::start();
    let patroni = Patroni::of(&cluster);
    let ledger = Ledger::start(&cluster.primary, 4);
    let standby = cluster.start_standby("standby");
    wait_until("rows are acknowledged", SOON, || {
        ledger.acknowledged() > 200
    });
    cluster.primary.kill9();
    let acknowledged = ledger.stop();
    let (said_yes, output) = patroni.pre_promote(&standby, &["60"]);
    assert!(said_yes, "{output}");
    assert_eq!(output, "", "it has nothing to say");
    let prepared = term(&cluster);
    assert_eq!(standby.value("select pg_is_in_recovery()"), "t");
    promote(&standby);
    acknowledged.assert_all_in(&standby);
    standby.sql("create table after (n int)");
    assert_eq!(
        standby.value("select state from pg_stat_walproposer"),
        "leading"
    );
    assert_eq!(
        term(&cluster),
        prepared,
        "it does not lead in the prepared term"
    );

    let (said_yes, output) = patroni.pre_promote(&standby, &[]);
    assert!(!said_yes);
    assert!(output.contains("recovery is not in progress"), "{output}");
}

/// Standbys that do not stream (Patroni's tag `nostream`), but follow by their restore_command: one is
/// promoted with all that was acknowledged, the other follows it over the switch.
#[test]
fn a_standby_that_does_not_stream_is_promoted_and_followed() {
    let mut cluster = Cluster::start();
    let patroni = Patroni::of(&cluster);
    let ledger = Ledger::start(&cluster.primary, 4);
    let [promoted, other] = ["promoted", "other"].map(|name| {
        let mut standby = Postgres::base_backup_of(&cluster.primary, &cluster.dir, name);
        standby.restore_by_fetch_wal();
        standby.touch("standby.signal");
        standby.start();
        standby
    });
    wait_until("rows are acknowledged", SOON, || {
        ledger.acknowledged() > 500
    });
    cluster.primary.kill9();
    let acknowledged = ledger.stop();
    let (said_yes, output) = patroni.pre_promote(&promoted, &["60"]);
    assert!(said_yes, "{output}");
    let prepared = term(&cluster);
    promote(&promoted);
    acknowledged.assert_all_in(&promoted);
    promoted.sql("create table after (n int)");
    assert_eq!(
        term(&cluster),
        prepared,
        "it does not lead in the prepared term"
    );
    let end = promoted.flush_lsn();
    wait_until("the other follows over the switch", SOON, || {
        other.replay_lsn() >= end
    });
    acknowledged.assert_all_in(&other);
    other.sql("select * from after");
    assert!(!other.log().contains("started streaming"));
}

/// Without a quorum the script fails, and Patroni promotes nobody; the old primary, whose host is
/// back with the safekeepers', leads again as if nothing had been asked.
#[test]
fn without_a_quorum_the_script_says_no() {
    let mut cluster = Cluster::start();
    let patroni = Patroni::of(&cluster);
    cluster.primary.sql("create table t (n int)");
    let standby = cluster.start_standby("standby");
    cluster.primary.sql("insert into t values (1)");
    let end = cluster.wait_all_caught_up(SOON);
    wait_until("the standby has all", SOON, || standby.replay_lsn() >= end);
    cluster.primary.kill9();
    cluster.safekeepers[0].kill9();
    cluster.safekeepers[1].kill9();
    let (said_yes, output) = patroni.pre_promote(&standby, &["3"]);
    assert!(!said_yes, "{output}");
    assert!(
        output.contains("no quorum: 1 members reachable, 2 needed"),
        "{output}"
    );
    assert_eq!(standby.value("select pg_is_in_recovery()"), "t");

    cluster.safekeepers[0].start();
    cluster.safekeepers[1].start();
    cluster.primary.start();
    cluster.primary.sql("insert into t values (2)");
    let end = cluster.primary.flush_lsn();
    wait_until("the standby follows", SOON, || standby.replay_lsn() >= end);
    assert_eq!(standby.value("select count(*) from t"), "2");
}

/// A switchover as Patroni does it: a clean stop of the old primary, the script, the promotion; then
/// the old one is started as a standby.
#[test]
fn a_switchover_brings_the_old_primary_back_as_it_is() {
    let mut cluster = Cluster::start();
    let patroni = Patroni::of(&cluster);
    cluster.primary.sql("create table t (who text)");
    cluster.primary.sql("insert into t values ('old')");
    let standby = cluster.start_standby("standby");
    cluster.primary.stop(Stop::Fast);
    let (said_yes, output) = patroni.pre_promote(&standby, &["60"]);
    assert!(said_yes, "{output}");
    promote(&standby);
    standby.sql("insert into t values ('new')");
    let log = cluster.primary.start_refused();
    assert!(log.contains("create \"standby.signal\""), "{log}");
    cluster.follow_safekeepers(&cluster.primary);
    cluster.primary.start();
    wait_until("the old primary follows", SOON, || {
        cluster.primary.value("select count(*) from t") == "2"
    });
}

/// What can't be asked is no yes.
#[test]
fn the_script_fails_where_nobody_answers_and_names_wrong_usage() {
    let cluster = Cluster::start();
    let patroni = Patroni::of(&cluster);
    for arguments in [&["0"][..], &["x"], &["5", "5"], &[""]] {
        let (said_yes, output) = patroni.pre_promote(&cluster.primary, arguments);
        assert!(!said_yes, "{arguments:?}: {output}");
        assert!(output.contains("usage:"), "{arguments:?}: {output}");
    }
    let nobody = Postgres::base_backup_of(&cluster.primary, &cluster.dir, "nobody");
    let (said_yes, output) = patroni.pre_promote(&nobody, &["5"]);
    assert!(!said_yes);
    assert!(output.contains("No such file or directory"), "{output}");
    // A setting of the role must not cut it short; the extension may be missing.
    cluster
        .primary
        .sql("alter role postgres set statement_timeout = '1ms'");
    cluster
        .primary
        .sql("set statement_timeout = 0; drop extension walproposer");
    let (said_yes, output) = patroni.pre_promote(&cluster.primary, &["5"]);
    assert!(!said_yes);
    assert!(output.contains("does not exist"), "{output}");
}

/// The script where the server's user can read it.
struct Patroni {
    script: PathBuf,
}

impl Patroni {
    fn of(cluster: &Cluster) -> Patroni {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/pre-promote");
        let script = cluster.dir.path().join("pre-promote");
        fs::copy(source, &script).expect("the script is there, executable");
        give_to_server_user(&script);
        Patroni { script }
    }

    /// `pre_promote: env PGHOST=... PGUSER=... /path/pre-promote 60`: split into words, run without a
    /// shell. Whether it ended with 0, and what it said.
    fn pre_promote(&self, standby: &Postgres, arguments: &[&str]) -> (bool, String) {
        let mut command = Command::new("env");
        let psql = Programs::postgres("psql");
        command.arg(format!("PGHOST={}", standby.socket_dir().display()));
        command.args(["PGPORT=5432", "PGUSER=postgres"]);
        command.arg(format!("PSQL={}", psql.display()));
        command.arg(&self.script).args(arguments);
        run(command)
    }
}

/// As Patroni: it does not wait for pg_ctl, but looks into the control file.
fn promote(standby: &Postgres) {
    let mut command = standby.program("pg_ctl");
    command.args(["promote", "--no-wait", "--pgdata"]);
    command.arg(standby.data());
    run_ok(command);
    wait_for("the control file says it is in production", SOON, || {
        let mut command = standby.program("pg_controldata");
        command.arg(standby.data()).env("LC_ALL", "C");
        run_ok(command).contains("in production").then_some(())
    });
}

/// The highest that any running safekeeper has voted for.
fn term(cluster: &Cluster) -> u64 {
    let running = cluster.safekeepers.iter().filter(|s| s.runs());
    let terms = running.filter_map(|s| s.cluster(cluster.system_id)?["term"].as_u64());
    terms.max().expect("one runs")
}

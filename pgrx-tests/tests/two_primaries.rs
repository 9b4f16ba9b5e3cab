//! Two primaries of one cluster: the older term gets nothing acknowledged any more.

use std::time::Duration;

use cluster_tests::Cluster;
use cluster_tests::poll::{SOON, never_within, wait_until};
use cluster_tests::postgres::Postgres;

/// A primary's host stands still (a paused virtual machine). From a copy of its disk another
/// primary is started, leads and commits. Then the first goes on as if nothing had been.
#[test]
fn a_primary_that_stood_still_gets_nothing_acknowledged_after_another_led() {
    let mut cluster = Cluster::start_with("walproposer.on_deposed = wait", &[]);
    cluster.primary.sql("create table t (who text)");
    cluster.primary.sql("insert into t values ('before')");
    cluster.wait_all_caught_up(SOON);

    cluster.primary.process().pause();
    let mut second = Postgres::copy_of(&cluster.primary, &cluster.dir, "second");
    second.start();
    // While the first one's session may be alive, the second waits: that is not for ever.
    wait_until("the second leads", SOON, || {
        let active = second.try_sql("select members_active from pg_stat_walproposer");
        active.is_ok_and(|rows| rows[0][0].as_deref() == Some("3"))
    });
    second.sql("insert into t values ('second')");
    let term = |postgres: &Postgres| -> u64 {
        postgres
            .value("select term from pg_stat_walproposer")
            .parse()
            .expect("a number")
    };
    let second_term = term(&second);

    cluster.primary.process().resume();
    let deposed = cluster.commit_in_background("insert into t values ('first')");
    never_within(
        "the older primary's commit",
        Duration::from_secs(12),
        || deposed.answered(),
    );
    // It can't see beyond its own log, and must say that it no longer leads.
    wait_until("the view says so", SOON, || {
        let query = "select state, last_error from pg_stat_walproposer";
        let rows = cluster.primary.try_sql(query).unwrap_or_default();
        rows.first()
            .is_some_and(|row| row[0].as_deref() != Some("leading") && row[1].is_some())
    });
    assert_eq!(cluster.primary.value("select count(*) from t"), "1");

    // Nor after a restart: its own log has parted from the quorum's.
    cluster.primary.kill9();
    assert!(
        deposed.wait(SOON).is_err(),
        "the older primary acknowledged a commit"
    );
    let log = cluster.primary.start_refused();
    assert!(log.contains("Run pg_rewind"), "{log}");

    second.sql("insert into t values ('second again')");
    assert_eq!(term(&second), second_term, "the zombie disturbed the reign");
    let rows = second.value("select string_agg(who, ', ') from t");
    assert_eq!(rows, "before, second, second again");
    // What the safekeepers hold is the second one's WAL.
    let end = second.flush_lsn();
    for safekeeper in &cluster.safekeepers {
        wait_until("all is committed", SOON, || {
            safekeeper.lsn(cluster.system_id, "commit_lsn") >= end
        });
        let (_, theirs) = cluster.wal_dirs(safekeeper);
        let ours = cluster_tests::wal_compare::WalDir::new(second.wal_dir());
        ours.assert_equal(&theirs, ours.begin().max(theirs.begin()), end);
    }
}

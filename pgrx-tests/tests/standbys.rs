//! Hot standbys of the version under test: one that knows all safekeepers, and one that follows that.

use cluster_tests::Cluster;
use cluster_tests::ledger::Ledger;
use cluster_tests::poll::{SOON, wait_until};
use cluster_tests::postgres::{Postgres, Stop, text_rows};
use cluster_tests::wal_compare::{assert_files_equal, file_names};
use safekeeper_protocol::Lsn;

/// A snapshot on a standby of a standby holds back the primary's vacuum, through that standby, a safekeeper
/// and the primary's slot. The safekeeper in use is killed, then either standby; and at last the primary,
/// whose timeline ends. Both standbys have in the end what the new primary has, rows and bytes.
#[test]
fn a_standby_and_its_own_standby_follow_over_everything() {
    let mut cluster = Cluster::start_with(
        "wal_keep_size = '1GB'\nhot_standby_feedback = on\nwal_receiver_status_interval = '1s'\n\
         max_standby_streaming_delay = 0\nautovacuum = off",
        &[],
    );
    let heir = cluster.start_standby("heir");
    let mut standby = cluster.start_standby("standby");
    let mut cascaded = start_standby_of(&cluster, &standby, "cascaded");

    assert_snapshot_is_kept(&cluster, &standby, &cascaded);

    let mut ledger = Ledger::start(&cluster.primary, 4);
    let source = cluster.wait_source_of("standby");
    cluster.safekeepers[source].kill9();
    wait_replayed(&cascaded, cluster.primary.flush_lsn());
    assert_ne!(cluster.wait_source_of("standby"), source);
    cluster.safekeepers[source].start();
    standby.stop(Stop::Immediate);
    standby.start();
    wait_replayed(&cascaded, cluster.primary.flush_lsn());
    cascaded.kill9();
    cascaded.start();
    wait_replayed(&cascaded, cluster.primary.flush_lsn());

    cluster.wait_streaming(3);
    cluster.primary.kill9();
    assert_eq!(heir.value("select walproposer_promote(60)"), "t");
    ledger.send_to(&heir);
    heir.sql("select pg_switch_wal()");
    heir.sql("create table after_the_switch (n int)");
    let acknowledged = ledger.stop();
    acknowledged.assert_all_in(&heir);
    let end = heir.flush_lsn();
    for follower in [&standby, &cascaded] {
        wait_replayed(follower, end);
        let rows = "select count(*), sum(number) from ledger";
        assert_eq!(follower.sql(rows), heir.sql(rows), "{}", follower.name());
        follower.sql("select * from after_the_switch");
        let wal = follower.wal_dir();
        let equal = assert_files_equal(&wal, &heir.wal_dir(), end);
        assert!(equal >= 2, "{equal} of {:?}", file_names(&wal));
    }
}

/// While a session has a snapshot on `standby`, which `source` feeds, the primary may remove nothing that it
/// sees; afterwards it may.
#[track_caller]
fn assert_snapshot_is_kept(cluster: &Cluster, source: &Postgres, standby: &Postgres) {
    let primary = &cluster.primary;
    primary.sql("create table kept as select generate_series(1, 1000)");
    wait_replayed(standby, primary.flush_lsn());
    let mut session = standby.client();
    let count = "select count(*) from kept";
    let begin = format!("begin isolation level repeatable read; {count}");
    let kept = [[Some("1000".to_owned())]];
    assert_eq!(text_rows(&mut session, &begin).expect("rows"), kept);
    let slot_xmin = "select coalesce(max(xmin::text::bigint), 0) from pg_replication_slots";
    let slot_xmin = || -> u64 { primary.value(slot_xmin).parse().expect("a number") };
    // From then on what the source reports holds no more than this.
    let heard = "select count(backend_xmin) from pg_stat_replication";
    wait_until("the source hears of it", SOON, || {
        source.value(heard) == "1"
    });
    wait_until("the primary hears of it", SOON, || slot_xmin() > 0);
    let deleted = primary.value("delete from kept; select txid_current()");
    let deleted: u64 = deleted.parse().expect("a number");
    // The table may have empty pages at its end, and their truncation a lock in the session's way.
    primary.sql("vacuum (truncate off) kept");
    wait_replayed(standby, primary.flush_lsn());
    assert_eq!(text_rows(&mut session, count).expect("rows"), kept);
    assert!(slot_xmin() <= deleted);
    drop(session);
    wait_until("it is let go", SOON, || slot_xmin() > deleted);
    primary.sql("vacuum kept");
    assert_eq!(primary.value("select pg_relation_size('kept')"), "0");
}

/// Made of a base backup of a standby, and fed by that.
fn start_standby_of(cluster: &Cluster, standby: &Postgres, name: &str) -> Postgres {
    let mut cascaded = Postgres::base_backup_of(standby, &cluster.dir, name);
    cascaded.configure(&format!(
        "primary_conninfo = 'host={} port=5432 user=postgres application_name={name}'",
        standby.socket_dir().display()
    ));
    cascaded.touch("standby.signal");
    cascaded.start();
    cascaded
}

#[track_caller]
fn wait_replayed(standby: &Postgres, lsn: Lsn) {
    let what = format!("{} has replayed {lsn}", standby.name());
    wait_until(&what, SOON, || standby.replay_lsn() >= lsn);
}

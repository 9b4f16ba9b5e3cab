//! A standby becomes the primary through the quorum. (design §7.3)

use cluster_tests::Cluster;
use cluster_tests::ledger::Ledger;
use cluster_tests::poll::{SOON, wait_until};
use cluster_tests::postgres::Postgres;

/// The primary dies under load; a standby takes over with all that was acknowledged; another standby
/// follows it over the switch, from the safekeepers alone. Three times in a row.
#[test]
fn three_promotions_in_a_row_lose_nothing() {
    let mut cluster = Cluster::start();
    let ledger = Ledger::start(&cluster.primary, 4);
    let mut standbys: Vec<Postgres> = (1..=3)
        .map(|n| cluster.start_standby(&format!("standby{n}")))
        .collect();
    wait_until("rows are acknowledged", SOON, || {
        ledger.acknowledged() > 500
    });
    cluster.primary.kill9();
    let acknowledged = ledger.stop();
    println!("{} rows acknowledged", acknowledged.count());

    let mut dead = Vec::new();
    for n in 1..=3u32 {
        let promoted = standbys.remove(0);
        assert_eq!(
            promoted.value("select walproposer_promote(60)"),
            "t",
            "promotion {n}"
        );
        acknowledged.assert_all_in(&promoted);
        let tli = promoted.value("select timeline_id from pg_control_checkpoint()");
        println!("timeline {tli}");
        promoted.sql(&format!(
            "create table after_{n} (a int); insert into after_{n} values ({n})"
        ));
        assert_eq!(
            promoted.value("select tli from pg_stat_walproposer"),
            (n + 1).to_string()
        );
        for standby in &standbys {
            wait_until("the other standbys follow", SOON, || {
                standby
                    .try_sql(&format!("select a from after_{n}"))
                    .is_ok_and(|rows| rows.len() == 1)
            });
            acknowledged.assert_all_in(standby);
        }
        dead.push(promoted);
        if n < 3 {
            dead.last_mut().expect("just pushed").kill9();
        }
    }
    for safekeeper in &cluster.safekeepers {
        let (ok, report) = safekeeper.verify();
        assert!(ok, "{report}");
    }
}

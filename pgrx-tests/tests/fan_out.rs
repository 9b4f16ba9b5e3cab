//! Many consumers on one safekeeper: those that take nothing cost nothing.

use std::time::Duration;

use cluster_tests::Cluster;
use cluster_tests::poll::{SOON, wait_until};
use cluster_tests::walsender::WalSender;
use safekeeper_protocol::Lsn;

/// Forty consumers begin at the oldest WAL and read nothing, while 64 MB are written. Commits go on, one that
/// reads gets everything, and the daemon has hardly grown: a message is all that it holds for each.
#[test]
fn stalled_consumers_cost_no_memory_and_hold_nobody_up() {
    const STALLED: u64 = 40;
    let cluster = Cluster::start_with("wal_keep_size = '1GB'", &[]);
    let source = &cluster.safekeepers[0];
    let begin = Lsn(0x100_0000);
    let attach = || {
        let mut connection = WalSender::of_safekeeper(source);
        let said = connection.begin_copy(&format!("START_REPLICATION {begin}"));
        assert_eq!(said, ["W"]);
        connection
    };
    let write = || {
        for _ in 0..32 {
            let message = "select pg_logical_emit_message(true, '', repeat('x', 1000000))";
            cluster.primary.sql(message);
        }
        cluster.wait_all_caught_up(SOON)
    };
    // So that buffers which there are anyway have grown to their size.
    attach().wal_up_to(write());
    let before = source.process().resident_bytes();
    let stalled: Vec<_> = (0..STALLED).map(|_| attach()).collect();
    let end = write();
    let (_, wal) = attach().wal_up_to(end);
    assert!(wal.len() > 64_000_000);
    let what = "all of them stream";
    wait_until(what, Duration::from_secs(10), || {
        let cluster = source.cluster(cluster.system_id).expect("a status");
        cluster["standbys"]
            .as_array()
            .is_some_and(|all| all.len() as u64 >= STALLED)
    });
    let grown = source.process().resident_bytes().saturating_sub(before);
    assert!(
        grown < STALLED * 400_000,
        "{grown} bytes for {STALLED} consumers"
    );
    drop(stalled);
}

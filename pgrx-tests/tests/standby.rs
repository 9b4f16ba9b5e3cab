//! Stock consumers of a safekeeper: a hot standby and `pg_receivewal --synchronous`.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use cluster_tests::Cluster;
use cluster_tests::place::Programs;
use cluster_tests::poll::{SOON, never_within, wait_until};
use cluster_tests::postgres::Stop;
use cluster_tests::process::{Process, signal_descendant, spawn};
use cluster_tests::safekeeper::Safekeeper;
use cluster_tests::wal_compare::{WalDir, copy_received};
use safekeeper_protocol::Lsn;

/// Under load, the safekeeper they follow is killed and started again, and so is pg_receivewal.
/// In the end both hold what the primary wrote, byte for byte.
#[test]
fn standby_and_pg_receivewal_follow_through_restarts() {
    let mut cluster = Cluster::start_with("wal_keep_size = '16GB'", &[]);
    let mut receiver = Receiver::new(&cluster, 0);
    let standby = cluster.start_standby("standby");
    cluster.primary.pgbench_init(5);
    let mut load = cluster.primary.pgbench_command(4, Duration::from_secs(30));
    load.stdout(Stdio::null()).stderr(Stdio::null());
    let mut load = spawn(load).expect("could not start pgbench");

    let followed = |receiver: &Receiver| {
        let lsn = cluster.primary.flush_lsn();
        wait_until("pg_receivewal follows", SOON, || {
            receiver.end(&cluster.safekeepers[0]) >= lsn
        });
    };
    followed(&receiver);
    receiver.kill_and_restart();
    followed(&receiver);
    cluster.safekeepers[0].kill9();
    let lsn = cluster.primary.flush_lsn();
    wait_until("the standby goes on from another", SOON, || {
        standby.replay_lsn() >= lsn
    });
    cluster.safekeepers[0].start();
    assert!(
        load.wait().expect("our own child").success(),
        "pgbench failed"
    );

    let end = cluster.wait_all_caught_up(SOON);
    wait_until("the standby has all", SOON, || standby.replay_lsn() >= end);
    let sums = "select sum(abalance), (select count(*) from pgbench_history) from pgbench_accounts";
    assert_eq!(standby.sql(sums), cluster.primary.sql(sums));
    let begin = WalDir::new(standby.wal_dir()).begin();
    let ours = WalDir::new(cluster.primary.wal_dir());
    ours.assert_equal(&WalDir::new(standby.wal_dir()), begin, end);
    wait_until("pg_receivewal has all", SOON, || {
        receiver.end(&cluster.safekeepers[0]) >= end
    });
    let received = receiver.wal_dir(&cluster);
    ours.assert_equal(&received, received.begin(), end);
}

/// With `remote_apply` a commit is answered when the standby shows it, and not before.
#[test]
fn remote_apply_waits_for_the_standby_behind_the_safekeepers() {
    let cluster = Cluster::start();
    cluster.primary.sql("create table t (a int)");
    let standby = cluster.start_standby("standby");
    let end = cluster.wait_all_caught_up(SOON);
    wait_until("the standby follows", SOON, || standby.replay_lsn() >= end);
    let apply = "set synchronous_commit = remote_apply";
    for n in 1..=3 {
        cluster
            .primary
            .sql(&format!("{apply}; insert into t values ({n})"));
        assert_eq!(standby.value("select max(a) from t"), n.to_string());
    }
    standby.sql("select pg_wal_replay_pause()");
    wait_until("replay has paused", SOON, || {
        standby.value("select pg_get_wal_replay_pause_state()") == "paused"
    });
    let waiting = cluster.commit_in_background_with(apply, "insert into t values (4)");
    cluster.wait_commits_waiting(1);
    never_within("an answer", Duration::from_secs(3), || waiting.answered());
    standby.sql("select pg_wal_replay_resume()");
    waiting.wait(SOON).expect("the standby has replayed it");
    assert_eq!(standby.value("select max(a) from t"), "4");
}

/// Nothing is sent that would be answered, since heartbeats are a quarter of an hour apart and nobody else writes
/// WAL: whoever waits for a standby has the safekeepers asked.
#[test]
fn remote_apply_on_a_quiet_server_waits_for_no_heartbeat() {
    let settings = "walproposer.member_timeout = '1h'\nautovacuum = off";
    let cluster = Cluster::start_with(settings, &[]);
    cluster.primary.sql("create table t (a int)");
    let standby = cluster.start_standby("standby");
    // Every fifteen seconds it writes which transactions run.
    let primary = cluster.primary.process();
    for pid in primary.children_named("background writer") {
        signal_descendant(pid, libc::SIGSTOP);
    }
    let end = cluster.wait_all_caught_up(SOON);
    wait_until("the standby follows", SOON, || standby.replay_lsn() >= end);
    let apply = "set synchronous_commit = remote_apply";
    for n in 1..=20 {
        let insert = format!("insert into t values ({n})");
        let commit = cluster.commit_in_background_with(apply, &insert);
        commit.wait(SOON).expect("the standby replays it");
        assert_eq!(standby.value("select max(a) from t"), n.to_string());
    }
    // The standby that replays nothing for a while is asked all the while.
    standby.sql("select pg_wal_replay_pause()");
    wait_until("replay has paused", SOON, || {
        standby.value("select pg_get_wal_replay_pause_state()") == "paused"
    });
    let commit = cluster.commit_in_background_with(apply, "insert into t values (21)");
    cluster.wait_commits_waiting(1);
    standby.sql("select pg_wal_replay_resume()");
    commit.wait(SOON).expect("the standby replays it");
}

/// Without a quorum, the one safekeeper that is left holds WAL that is not committed. A standby and
/// a receiver that follow it see nothing of it, until it is.
#[test]
fn consumers_never_get_what_is_not_committed() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create table t (a int)");
    let receiver = Receiver::new(&cluster, 0);
    let standby = cluster.start_standby("standby");
    let end = cluster.wait_all_caught_up(SOON);
    wait_until("the standby follows", SOON, || standby.replay_lsn() >= end);

    cluster.safekeepers[1].kill9();
    cluster.safekeepers[2].kill9();
    let waiting = cluster.commit_in_background("insert into t select generate_series(1, 1000)");
    cluster.wait_commits_waiting(1);
    let left = &cluster.safekeepers[0];
    let position = |field| left.lsn(cluster.system_id, field);
    wait_until("the WAL is on the one that is left", SOON, || {
        position("flush_lsn") >= cluster.primary.flush_lsn()
    });
    let committed = position("commit_lsn");
    assert!(position("flush_lsn") > committed + 1000);
    never_within("uncommitted WAL is sent", Duration::from_secs(4), || {
        let received = standby.lsn("select coalesce(pg_last_wal_receive_lsn(), '0/0')");
        received > committed || receiver.end(left) > committed || waiting.answered()
    });
    assert_eq!(standby.value("select count(*) from t"), "0");
    // Whatever they say: no byte above commit_lsn is in their files either.
    for wal in [WalDir::new(standby.wal_dir()), receiver.wal_dir(&cluster)] {
        let path = wal.path().display();
        assert!(wal.ends_at(committed), "bytes above {committed} in {path}");
    }

    cluster.safekeepers[1].start();
    waiting.wait(SOON).expect("a quorum is back");
    wait_until("the standby sees it", SOON, || {
        standby.value("select count(*) from t") == "1000"
    });
}

/// A `pg_receivewal --synchronous` that follows one safekeeper.
struct Receiver {
    dir: PathBuf,
    log: PathBuf,
    address: std::net::SocketAddr,
    system_id: u64,
    process: Option<Process>,
}

impl Receiver {
    fn new(cluster: &Cluster, safekeeper: usize) -> Receiver {
        let mut receiver = Receiver {
            dir: cluster.dir.create("received"),
            log: cluster.dir.path().join("receiver.log"),
            address: cluster.safekeepers[safekeeper].address(),
            system_id: cluster.system_id,
            process: None,
        };
        receiver.start();
        receiver
    }

    fn start(&mut self) {
        let mut command = std::process::Command::new(Programs::postgres("pg_receivewal"));
        command
            .args(["--synchronous", "--no-password", "--directory"])
            .arg(&self.dir);
        command.args(["--host", &self.address.ip().to_string()]);
        command.args([
            "--port",
            &self.address.port().to_string(),
            "--username",
            "postgres",
        ]);
        self.process = Some(Process::start("pg_receivewal", command, &self.log));
    }

    fn kill_and_restart(&mut self) {
        self.process.take().expect("it runs").kill9();
        self.start();
    }

    /// How far it says it flushed, as the safekeeper knows it.
    fn end(&self, safekeeper: &Safekeeper) -> Lsn {
        let ours = safekeeper.consumer(self.system_id, "pg_receivewal");
        let lsn = ours.and_then(|s| s["flush_lsn"].as_str()?.parse().ok());
        lsn.unwrap_or(Lsn(0))
    }

    /// A copy of what it received, the unfinished segment under its final name.
    fn wal_dir(&self, cluster: &Cluster) -> WalDir {
        let copy = cluster.dir.path().join("received.copy");
        copy_received(&self.dir, &copy);
        WalDir::new(copy)
    }
}

/// A standby whose safekeepers all stop cleanly waits for them, and goes on.
#[test]
fn a_clean_stop_of_all_safekeepers_keeps_the_standby() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create table t (a int)");
    let mut standby = cluster.start_standby("standby");
    cluster.safekeepers.iter_mut().for_each(Safekeeper::stop);
    let waiting = cluster.commit_in_background("insert into t values (1)");
    cluster.safekeepers.iter_mut().for_each(Safekeeper::start);
    waiting.wait(SOON).expect("the quorum is back");
    wait_until("the standby sees it", SOON, || {
        standby.value("select count(*) from t") == "1"
    });
    standby.stop(Stop::Fast);
    cluster.primary.stop(Stop::Fast);
}

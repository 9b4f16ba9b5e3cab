//! A primary that another has replaced, by each value of `walproposer.on_deposed`. (design §7.4)
//!
//! It stands still past the failover, or is parted from the safekeepers; or only its worker finds
//! out, when it is started again. Writers write and readers read on it all the time. Whatever the
//! setting: nothing is acknowledged there any more, no row in flight is ever shown, and the other's
//! reign is not disturbed, not by the next start either.
//!
//! Each case is played several times, since what a signal or a cut meets is a matter of luck.
//! `SEED=n` repeats the choices of a run (not its timing).

use std::time::Duration;

use cluster_tests::ledger::{Acknowledged, Ledger};
use cluster_tests::link::Link;
use cluster_tests::poll::{SOON, let_run, never_within, wait_for, wait_until};
use cluster_tests::postgres::{Postgres, describe};
use cluster_tests::process::signal_descendant;
use cluster_tests::readers::Readers;
use cluster_tests::wal_compare::WalDir;
use cluster_tests::{Cluster, safekeepers_setting};
use postgres::Client;

const ROUNDS: usize = 2;

#[test]
fn a_paused_primary_shuts_down() {
    rounds(|random| Case::start("shutdown").pause(random).expect_shut_down());
}

#[test]
fn a_paused_primary_goes_read_only() {
    rounds(|random| Case::start("read_only").pause(random).expect_read_only());
}

#[test]
fn a_paused_primary_waits() {
    rounds(|random| Case::start("wait").pause(random).expect_waiting());
}

#[test]
fn a_parted_primary_shuts_down() {
    rounds(|random| Case::start("shutdown").part(random).expect_shut_down());
}

#[test]
fn a_parted_primary_goes_read_only() {
    rounds(|random| Case::start("read_only").part(random).expect_read_only());
}

#[test]
fn a_parted_primary_waits() {
    rounds(|random| Case::start("wait").part(random).expect_waiting());
}

/// The worker ends and is started again while the primary is parted from the safekeepers: nobody
/// tells it that it is deposed, for it leads nothing. It finds the other's WAL.
#[test]
fn a_worker_that_is_started_again_finds_its_successor() {
    rounds(|random| {
        Case::start("shutdown")
            .part_and_restart_worker(random)
            .expect_shut_down();
    });
    rounds(|random| {
        Case::start("read_only")
            .part_and_restart_worker(random)
            .expect_read_only();
    });
}

/// What is decided by a reload counts too, for one that has been deposed already.
#[test]
fn a_reload_decides_anew() {
    let case = Case::start("wait").pause(&mut random());
    case.wait_deposed();
    case.set("read_only");
    case.wait_read_only();
    wait_until("it is read-only", SOON, || {
        case.refusal("insert into other values (1)").is_some()
    });
    case.set("wait");
    wait_until("it is not read-only any more", SOON, || {
        let query = "create temporary table t (a int); drop table t";
        case.cluster
            .primary
            .try_sql(&format!("begin; {query}; rollback"))
            .is_ok()
    });
    case.set("shutdown");
    case.expect_shut_down();
}

/// Two servers start at once from the same files: one leads, the other is refused, or stops.
#[test]
fn the_loser_of_a_race_at_the_start_is_gone() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create table t (who text)");
    cluster.wait_all_caught_up(SOON);
    let mut rows = 0;
    for round in 0..ROUNDS {
        cluster.primary.kill9();
        let mut second =
            Postgres::copy_of(&cluster.primary, &cluster.dir, &format!("second{round}"));
        cluster.primary.start_without_waiting();
        second.start_without_waiting();
        let both = [&mut cluster.primary, &mut second];
        let loser = wait_for("one of them ends", SOON, {
            let mut both = both;
            move || both.iter_mut().position(|server| server.ended())
        });
        if loser == 0 {
            std::mem::swap(&mut cluster.primary, &mut second);
        }
        let log = second.log_since_start();
        let refused = log.contains("this server must not start as a primary");
        assert!(
            refused || log.contains("stopping this server immediately"),
            "{log}"
        );
        wait_until("the other one commits", SOON, || {
            cluster
                .primary
                .try_sql("insert into t values ('winner')")
                .is_ok()
        });
        rows += 1;
        assert_eq!(
            cluster.primary.value("select count(*) from t"),
            rows.to_string()
        );
    }
}

/// A worker is started again and again, safekeepers come and go: none of what it sees meanwhile is
/// taken for a successor.
#[test]
fn a_healthy_primary_stays() {
    let mut cluster = Cluster::start_with(
        "walproposer.on_deposed = shutdown\nwalproposer.member_timeout = '1s'",
        &[],
    );
    let ledger = Ledger::start(&cluster.primary, 4);
    let mut random = random();
    for round in 0..12 {
        let i = random.usize(..3);
        match random.u32(..3) {
            0 => cluster.safekeepers[i].kill9(),
            1 => cluster.safekeepers[i].process().pause(),
            _ => {}
        }
        if let Some(worker) = cluster.primary.worker() {
            signal_descendant(worker, libc::SIGTERM);
        }
        let_run(Duration::from_millis(random.u64(..2500)));
        for safekeeper in &mut cluster.safekeepers {
            match safekeeper.runs() {
                true => safekeeper.process().resume(),
                false => safekeeper.start(),
            }
        }
        let before = ledger.acknowledged();
        wait_until(&format!("commits go on, round {round}"), SOON, || {
            ledger.acknowledged() > before + 10
        });
        assert!(!cluster.primary.ended());
    }
    ledger.stop().assert_all_in(&cluster.primary);
}

/// The choices of one test; each prints its own.
fn random() -> fastrand::Rng {
    let given = std::env::var("SEED").ok();
    let given = given.map(|text| text.parse().expect("SEED is a number"));
    let seed = given.unwrap_or_else(|| fastrand::u64(..1_000_000));
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    println!("{test}: SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

fn rounds(mut round: impl FnMut(&mut fastrand::Rng)) {
    let mut random = random();
    for n in 0..ROUNDS {
        println!("round {n}");
        round(&mut random);
    }
}

/// A primary behind links, with clients at work; and later a second one, which has replaced it.
struct Case {
    ledger: Ledger,
    readers: Readers,
    second: Option<Second>,
    /// In a transaction that had written before the failover.
    in_the_middle: Client,
    links: Vec<Link>,
    cluster: Cluster,
}

struct Second {
    postgres: Postgres,
    term: String,
    /// What the first one had acknowledged before, and since.
    acknowledged_before: u64,
}

impl Case {
    fn start(on_deposed: &str) -> Case {
        let mut cluster = Cluster::prepare(&[]);
        let link =
            |safekeeper: &cluster_tests::safekeeper::Safekeeper| Link::to(safekeeper.address());
        let links: Vec<_> = cluster.safekeepers.iter().map(link).collect();
        cluster
            .primary
            .configure(&safekeepers_setting(links.iter().map(Link::address)));
        cluster.primary.configure(&format!(
            "walproposer.on_deposed = {on_deposed}\nwalproposer.member_timeout = '1s'\n\
             max_prepared_transactions = 5"
        ));
        cluster.start_all();
        cluster.primary.sql("create table other (a int)");
        let ledger = Ledger::start(&cluster.primary, 4);
        let readers = Readers::start([&cluster.primary]);
        cluster.primary.sql("insert into other values (1)");
        let mut in_the_middle = cluster.primary.client();
        in_the_middle
            .batch_execute("begin; insert into other values (2)")
            .expect("the primary leads");
        cluster
            .primary
            .sql("begin; insert into other values (3); prepare transaction 'p'");
        Case {
            ledger,
            readers,
            second: None,
            in_the_middle,
            links,
            cluster,
        }
    }

    /// The host stands still, and goes on when another has long replaced it.
    fn pause(mut self, random: &mut fastrand::Rng) -> Case {
        self.work(random);
        self.cluster.primary.process().pause();
        self.replace();
        let_run(Duration::from_millis(random.u64(..2000)));
        self.cluster.primary.process().resume();
        self
    }

    /// The host is parted from all safekeepers, and its clients are not from it.
    fn part(mut self, random: &mut fastrand::Rng) -> Case {
        self.work(random);
        self.links.iter().for_each(Link::cut_both);
        self.copy_and_replace(random);
        self.links.iter().for_each(Link::heal);
        self
    }

    fn part_and_restart_worker(mut self, random: &mut fastrand::Rng) -> Case {
        self.work(random);
        self.links.iter().for_each(Link::cut_both);
        let worker = self.cluster.primary.worker();
        let worker = worker.expect("the primary has a worker");
        signal_descendant(worker, libc::SIGTERM);
        wait_until("another worker runs", SOON, || {
            let present = self.cluster.primary.worker();
            present.is_some_and(|present| present != worker)
        });
        self.copy_and_replace(random);
        self.links.iter().for_each(Link::heal);
        self
    }

    fn copy_and_replace(&mut self, random: &mut fastrand::Rng) {
        let_run(Duration::from_millis(random.u64(..500)));
        self.cluster.primary.process().pause();
        let second = self.copy();
        self.cluster.primary.process().resume();
        self.replace_by(second);
        let_run(Duration::from_millis(random.u64(..2000)));
    }

    /// Lets the clients work for a while.
    fn work(&self, random: &mut fastrand::Rng) {
        wait_until("rows are acknowledged and shown", SOON, || {
            self.ledger.acknowledged() > 50 && self.readers.shown() > 50
        });
        let_run(Duration::from_millis(random.u64(..1500)));
    }

    /// The second one starts from a copy of the first one's files.
    fn replace(&mut self) {
        let second = self.copy();
        self.replace_by(second);
    }

    fn copy(&self) -> Postgres {
        let second = Postgres::copy_of(&self.cluster.primary, &self.cluster.dir, "second");
        let addresses = self.cluster.safekeepers.iter().map(|s| s.address());
        second.configure(&safekeepers_setting(addresses));
        second
    }

    fn replace_by(&mut self, mut second: Postgres) {
        second.start();
        wait_until("the second leads", SOON, || {
            second.try_sql("insert into other values (10)").is_ok()
        });
        self.second = Some(Second {
            term: second.value("select term from pg_stat_walproposer"),
            acknowledged_before: self.ledger.acknowledged(),
            postgres: second,
        });
    }

    fn set(&self, on_deposed: &str) {
        let primary = &self.cluster.primary;
        primary.configure(&format!("walproposer.on_deposed = {on_deposed}"));
        primary.reload();
    }

    fn wait_deposed(&self) {
        self.wait_logged("no commit is acknowledged here any more");
    }

    /// A write before this would wait for the quorum, for ever.
    fn wait_read_only(&self) {
        self.wait_logged("this server is read-only from here on");
    }

    fn wait_logged(&self, text: &str) {
        wait_until(&format!("the log says {text:?}"), SOON, || {
            self.cluster.primary.log_since_start().contains(text)
        });
    }

    /// SQLSTATE of what a statement on the first one fails with.
    fn refusal(&self, statement: &str) -> Option<String> {
        let error = self.cluster.primary.try_sql(statement).err()?;
        println!("{statement}: {}", describe(&error));
        Some(error.code()?.code().to_owned())
    }

    fn expect_shut_down(mut self) {
        wait_until("the server is gone", SOON, || self.cluster.primary.ended());
        let log = self.cluster.primary.log_since_start();
        for text in [
            "in term",
            "stopping this server immediately",
            "pg_rewind",
            "received immediate shutdown request",
        ] {
            assert!(log.contains(text), "no {text:?} in:\n{log}");
        }
        self.finish();
    }

    fn expect_read_only(mut self) {
        self.wait_deposed();
        self.wait_read_only();
        wait_until("a write is refused", SOON, || {
            self.refusal("insert into other values (1)").as_deref() == Some("25006")
        });
        for statement in [
            "set default_transaction_read_only = off; insert into other values (1)",
            "begin; set transaction read write; insert into other values (1)",
            "begin; savepoint s; select 1; rollback to s; insert into other values (1)",
            "create table another (a int)",
            "do $$ begin insert into other values (1); end $$",
            "select * from other for update",
            "copy other from stdin",
            "commit prepared 'p'",
            "rollback prepared 'p'",
            "select lo_create(0)",
        ] {
            let refusal = self.refusal(statement);
            assert_eq!(refusal.as_deref(), Some("25006"), "{statement}");
        }
        // What it had written before is refused when it is to be kept.
        let error = self.in_the_middle.batch_execute("commit");
        let error = error.expect_err("committed on a deposed primary");
        assert_eq!(
            error.code().map(|code| code.code()),
            Some("25006"),
            "{error:?}"
        );
        let reads = self.readers.reads();
        wait_until("reads go on", SOON, || self.readers.reads() > reads + 10);
        assert_eq!(
            self.cluster.primary.value("select count(*) from other"),
            "1"
        );
        assert!(!self.cluster.primary.ended());
        self.finish();
    }

    fn expect_waiting(self) {
        self.wait_deposed();
        let commit = self
            .cluster
            .commit_in_background("insert into other values (2)");
        let reads = self.readers.reads();
        never_within("a commit", Duration::from_secs(3), || commit.answered());
        wait_until("reads go on", SOON, || self.readers.reads() > reads + 10);
        wait_until("the view says so", SOON, || {
            let query = "select state, last_error from pg_stat_walproposer";
            let rows = self.cluster.primary.try_sql(query).unwrap_or_default();
            rows.first()
                .is_some_and(|row| row[0].as_deref() != Some("leading") && row[1].is_some())
        });
        self.finish();
    }

    /// Nothing was acknowledged or shown that the second does not have; the next start is refused;
    /// and the second has not noticed anything.
    fn finish(mut self) {
        let Second {
            postgres: second,
            term,
            acknowledged_before,
        } = self.second.take().expect("there is a second one");
        if !self.cluster.primary.ended() {
            self.cluster.primary.kill9();
        }
        let acknowledged: Acknowledged = self.ledger.stop();
        println!(
            "{} acknowledged, {} of them late; {} shown",
            acknowledged.count(),
            acknowledged.count() as u64 - acknowledged_before,
            self.readers.shown()
        );
        // Only what the quorum had, and the host had stood still before it could say so.
        acknowledged.assert_all_in(&second);
        self.readers.assert_all_in(&second);
        self.readers.stop();

        self.cluster.primary.take_ended();
        let log = self.cluster.primary.start_refused();
        for text in [
            "this server must not start as a primary",
            "ending at",
            "standby",
        ] {
            assert!(log.contains(text), "no {text:?} in:\n{log}");
        }
        second.sql("insert into other values (11)");
        let now = second.value("select term from pg_stat_walproposer");
        assert_eq!(now, term, "the second one's reign was disturbed");

        let end = second.flush_lsn();
        for safekeeper in &self.cluster.safekeepers {
            wait_until("all is committed", SOON, || {
                safekeeper.lsn(self.cluster.system_id, "commit_lsn") >= end
            });
            let (_, theirs) = self.cluster.wal_dirs(safekeeper);
            let ours = WalDir::new(second.wal_dir());
            ours.assert_equal(&theirs, ours.begin().max(theirs.begin()), end);
        }
    }
}

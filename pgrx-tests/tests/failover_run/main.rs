//! The long run: two Postgres hosts, three safekeepers, one fault after the other, and no row lost.
//!
//! Clients write through whoever is the primary, and remember what was acknowledged. Readers on both
//! hosts remember every row they were ever shown. In each cycle something happens to the primary
//! (`fault.rs`), and perhaps to a safekeeper as well; the standby is promoted by
//! `walproposer_promote()`; and the old primary comes back as its standby, in the cheapest way that
//! it can (`rejoin.rs`). Then all that was acknowledged, and all that was ever shown, must be there.
//!
//! `SEED=n` repeats the choices of a run (not its timing), `CYCLES=n` makes it longer, `FAULT=kill`
//! (or another one's name) makes it always the same. `scripts/failover-run` makes 200 cycles.

mod fault;
mod hosts;
mod rejoin;
mod report;

use std::time::{Duration, Instant};

use cluster_tests::ledger::Ledger;
use cluster_tests::poll::{SOON, let_run, wait_until};
use cluster_tests::readers::Readers;

use fault::{Fault, SafekeeperFault};
use hosts::Hosts;
use report::Report;

const WRITERS: usize = 4;

#[test]
fn failovers_lose_nothing() {
    let seed = number_from("SEED").unwrap_or_else(|| fastrand::u64(..1_000_000));
    let cycles = number_from("CYCLES").unwrap_or(6);
    println!("SEED={seed} CYCLES={cycles}");
    let mut run = Run::start(seed);
    for cycle in 1..=cycles {
        run.cycle(cycle);
    }
    run.finish();
}

struct Run {
    random: fastrand::Rng,
    ledger: Ledger,
    readers: Readers,
    report: Report,
    hosts: Hosts,
}

impl Run {
    fn start(seed: u64) -> Run {
        let hosts = Hosts::start();
        let ledger = Ledger::start(hosts.primary(), WRITERS);
        let readers = Readers::start([hosts.primary(), hosts.standby()]);
        Run {
            random: fastrand::Rng::with_seed(seed),
            ledger,
            readers,
            report: Report::default(),
            hosts,
        }
    }

    fn cycle(&mut self, cycle: u64) {
        let started = Instant::now();
        let (fault, safekeeper) = self.choose();
        print!(
            "cycle {cycle}: {fault:?} of {}",
            self.hosts.primary().name()
        );
        if let Some(safekeeper) = safekeeper {
            print!(", {safekeeper:?}");
        }
        println!();
        self.wait_until_acknowledged(20);
        let_run(Duration::from_millis(self.random.u64(..1500)));
        if let Some(fault) = safekeeper {
            self.hosts.harm(fault);
        }
        match fault {
            Fault::CrashBackend => self.crash_restart(),
            _ => self.fail_over(fault),
        }
        self.hosts.mend();
        self.hosts.wait_streaming();
        self.check();
        self.report.cycle(fault);
        println!(
            "cycle {cycle}: {:.1} s, {} rows acknowledged, {} shown",
            started.elapsed().as_secs_f32(),
            self.ledger.acknowledged(),
            self.readers.shown()
        );
    }

    fn choose(&mut self) -> (Fault, Option<SafekeeperFault>) {
        let fault = match std::env::var("FAULT") {
            Ok(name) => Fault::by_name(&name),
            Err(_) => Fault::choose(&mut self.random),
        };
        let safekeeper = SafekeeperFault::choose(&mut self.random);
        (fault, safekeeper)
    }

    /// One backend dies: the postmaster restarts all, and the same server goes on.
    fn crash_restart(&mut self) {
        self.hosts.kill_backend();
        self.wait_until_acknowledged(50);
    }

    fn fail_over(&mut self, fault: Fault) {
        let since = Instant::now();
        // They try there until it is the primary.
        self.ledger.send_to(self.hosts.standby());
        self.hosts.strike(fault);
        self.hosts.promote();
        let promoted = self.hosts.standby();
        wait_until("the promoted standby acknowledges a commit", SOON, || {
            self.ledger.first_by(promoted, since).is_some()
        });
        let first = self.ledger.first_by(promoted, since);
        let gap = first.expect("just seen").duration_since(since);
        self.report.failed_over(fault, gap);
        println!("    first acknowledged commit after {} ms", gap.as_millis());
        // The old one must not disturb what goes on.
        self.wait_until_acknowledged(20);
        self.hosts.lift(fault);
        if let Some(SafekeeperFault::Pause(_)) = self.hosts.harmed {
            // The new standby would wait for it, as the old one may have.
            self.hosts.mend();
        }
        let way = self.hosts.rejoin();
        println!("    the old primary is a standby again: {way}");
        self.report.rejoined(fault, way);
    }

    /// So many rows more.
    fn wait_until_acknowledged(&self, rows: u64) {
        let before = self.ledger.acknowledged();
        wait_until("commits go on", SOON, || {
            self.ledger.acknowledged() >= before + rows
        });
    }

    /// `committed_wal_is_never_lost`, `one_proposer_per_term`, and what was shown is there.
    fn check(&self) {
        let acknowledged = self.ledger.so_far();
        acknowledged.assert_one_server_per_term();
        acknowledged.assert_all_in(self.hosts.primary());
        self.readers.assert_all_in(self.hosts.primary());
    }

    fn finish(mut self) {
        let acknowledged = self.ledger.stop();
        self.hosts.assert_all_equal();
        for server in [self.hosts.primary(), self.hosts.standby()] {
            acknowledged.assert_all_in(server);
            self.readers.assert_all_in(server);
        }
        self.report
            .acknowledged(&acknowledged, self.readers.shown());
        self.readers.stop();
        println!("{}", self.report);
    }
}

fn number_from(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is not a number: {text}")),
    )
}

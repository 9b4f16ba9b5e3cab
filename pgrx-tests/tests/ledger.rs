//! No acknowledged row is ever lost, whatever dies.
//!
//! Clients write and remember what was acknowledged. Meanwhile safekeepers are killed and paused,
//! up to all three at a time; the worker is killed and ended, and now and then the whole server.
//! Then all is healed, and every acknowledged row must be in the primary, and in a server rebuilt
//! from nothing but the WAL of one safekeeper.
//!
//! `SEED=n` repeats the choices of a run (not its timing), `LEDGER_SECONDS=n` makes it longer.

use std::time::{Duration, Instant};

use cluster_tests::Cluster;
use cluster_tests::ledger::Ledger;
use cluster_tests::poll::{SOON, let_run, wait_until};
use cluster_tests::postgres::Postgres;
use cluster_tests::process::signal_descendant;

#[test]
fn acknowledged_rows_survive_kills_and_pauses() {
    let seed = number_from("SEED").unwrap_or_else(|| fastrand::u64(..1_000_000));
    let seconds = number_from("LEDGER_SECONDS").unwrap_or(60);
    println!("SEED={seed} LEDGER_SECONDS={seconds}");
    let mut cluster = Cluster::prepare(&[]);
    // As initdb left it: what a server knows that has seen none of the WAL.
    let mut rebuilt = Postgres::copy_of(&cluster.primary, &cluster.dir, "rebuilt");
    cluster
        .primary
        .configure("wal_keep_size = '16GB'\nmax_wal_size = '64MB'\nmin_wal_size = '32MB'");
    cluster.start_all();
    let ledger = Ledger::start(&cluster.primary, 6);

    let mut chaos = Chaos::new(&mut cluster, seed);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(seconds) {
        chaos.step();
    }
    chaos.heal();
    println!(
        "{} rows acknowledged; faults: {:?}",
        ledger.acknowledged(),
        chaos.faults
    );

    let before = ledger.acknowledged();
    wait_until("commits go on after all is healed", SOON, || {
        ledger.acknowledged() > before + 100
    });
    let acknowledged = ledger.stop();
    acknowledged.assert_all_in(&cluster.primary);
    cluster.wait_streaming(3);
    let end = cluster.wait_all_caught_up(SOON);
    cluster.assert_wal_equal(end);

    let wal_dir = cluster.safekeepers[fastrand::usize(..3)].wal_dir(cluster.system_id);
    // The first records tell of initdb's own max_connections; recovery wants no less.
    rebuilt.configure("max_connections = 100");
    rebuilt.configure(&format!(
        "shared_preload_libraries = ''\nrestore_command = 'cp {}/%f %p'",
        wal_dir.display()
    ));
    rebuilt.touch("recovery.signal");
    rebuilt.start();
    wait_until("all WAL is replayed", SOON, || {
        rebuilt.value("select pg_is_in_recovery()") == "f"
    });
    acknowledged.assert_all_in(&rebuilt);
}

/// Chooses faults, one after the other, some of which last.
struct Chaos<'a> {
    cluster: &'a mut Cluster,
    random: fastrand::Rng,
    paused: [bool; 3],
    faults: Vec<Fault>,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Kill(usize),
    Start(usize),
    Pause(usize),
    Resume(usize),
    KillWorker,
    EndWorker,
    PauseWorker,
    KillServer,
    SwitchWal,
}

impl Chaos<'_> {
    fn new(cluster: &mut Cluster, seed: u64) -> Chaos<'_> {
        let random = fastrand::Rng::with_seed(seed);
        Chaos {
            cluster,
            random,
            paused: [false; 3],
            faults: Vec::new(),
        }
    }

    fn step(&mut self) {
        let fault = self.choose();
        self.faults.push(fault);
        self.carry_out(fault);
        let_run(Duration::from_millis(self.random.u64(50..1500)));
    }

    /// Faults of safekeepers are most of it. One that is down or paused comes back twice as
    /// likely as another fails, else the cluster would be without a quorum for most of the time.
    fn choose(&mut self) -> Fault {
        let i = self.random.usize(..3);
        if !self.cluster.safekeepers[i].runs() {
            return Fault::Start(i);
        }
        if self.paused[i] {
            return Fault::Resume(i);
        }
        match self.random.u32(..20) {
            0..6 => Fault::Kill(i),
            6..11 => Fault::Pause(i),
            11..13 => Fault::KillWorker,
            13..15 => Fault::EndWorker,
            15..17 => Fault::PauseWorker,
            17 => Fault::KillServer,
            _ => Fault::SwitchWal,
        }
    }

    fn carry_out(&mut self, fault: Fault) {
        let safekeepers = &mut self.cluster.safekeepers;
        match fault {
            Fault::Kill(i) => safekeepers[i].kill9(),
            Fault::Start(i) => safekeepers[i].start(),
            Fault::Pause(i) => {
                safekeepers[i].process().pause();
                self.paused[i] = true;
            }
            Fault::Resume(i) => {
                safekeepers[i].process().resume();
                self.paused[i] = false;
            }
            // The postmaster then restarts all of its processes, and recovers.
            Fault::KillWorker => self.signal_worker(libc::SIGKILL),
            Fault::EndWorker => self.signal_worker(libc::SIGTERM),
            Fault::PauseWorker => {
                self.signal_worker(libc::SIGSTOP);
                let_run(Duration::from_millis(self.random.u64(100..3000)));
                self.signal_worker(libc::SIGCONT);
            }
            // It waits for a quorum before it recovers, which there may not be now.
            Fault::KillServer => {
                self.cluster.primary.kill9();
                self.cluster.primary.start_without_waiting();
            }
            // Fails while the server restarts. Does not wait for the quorum.
            Fault::SwitchWal => drop(self.cluster.primary.try_sql("select pg_switch_wal()")),
        }
    }

    /// It may be restarting, then there is none.
    fn signal_worker(&self, signal: i32) {
        if let Some(worker) = self.cluster.primary.worker() {
            signal_descendant(worker, signal);
        }
    }

    fn heal(&mut self) {
        for i in 0..3 {
            if !self.cluster.safekeepers[i].runs() {
                self.carry_out(Fault::Start(i));
            } else if self.paused[i] {
                self.carry_out(Fault::Resume(i));
            }
        }
    }
}

fn number_from(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is not a number: {text}")),
    )
}

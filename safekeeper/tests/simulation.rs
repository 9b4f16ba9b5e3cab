//! Whole clusters, simulated: real protocol and real storage code on a false disk, network, clock.
//!
//! Each seed is one cluster's life: a time of faults, then healing, then a demand for progress.
//! The judge (checker.rs) watches every step. A seed that fails is printed with the command that
//! replays it:
//!
//! ```text
//!   SEED=4711 TRACE=1 cargo test --release -p safekeeper --test simulation seeds -- --nocapture
//! ```
//!
//! `SEEDS=n` says how many fresh seeds to run (2,000 in release, 30 in a debug build), `FIRST=n`
//! from which on: without it each day has its own. What has failed once stays as a pinned seed.

// Under the feature, there is one test in this file: it breaks rules for the whole process.
#![cfg_attr(feature = "mutations", allow(dead_code, unused_imports))]

#[path = "simulation/chaos.rs"]
mod chaos;
#[path = "simulation/checker.rs"]
mod checker;
#[path = "simulation/cluster.rs"]
mod cluster;
#[path = "simulation/connections.rs"]
mod connections;
#[path = "simulation/consumer.rs"]
mod consumer;
#[path = "simulation/disk.rs"]
mod disk;
#[path = "simulation/donor.rs"]
mod donor;
#[path = "simulation/expected_log.rs"]
mod expected_log;
#[path = "simulation/faults.rs"]
mod faults;
#[path = "simulation/healing.rs"]
mod healing;
#[path = "simulation/membership.rs"]
mod membership;
#[cfg(feature = "mutations")]
#[path = "../protocol/tests/mutations/mod.rs"]
mod mutations;
#[path = "simulation/network.rs"]
mod network;
#[path = "simulation/node.rs"]
mod node;
#[path = "simulation/postgres.rs"]
mod postgres;
#[path = "simulation/random.rs"]
mod random;
#[path = "simulation/reign.rs"]
mod reign;
#[path = "simulation/safekeepers.rs"]
mod safekeepers;
#[path = "simulation/servers.rs"]
mod servers;
#[path = "simulation/standby.rs"]
mod standby;
#[path = "simulation/storage_model.rs"]
mod storage_model;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use safekeeper::keeper::STORAGE_FAILED;
use safekeeper_protocol::{ClusterIdentity, Lsn};
use safekeeper_wal::{PgVersion, SegmentSize, WalFormat};

use cluster::Cluster;
use faults::Tally;

/// The smallest that Postgres has, so that runs see many segments.
const SEGMENT_SIZE: u32 = 1 << 20;
const SYSTEM_ID: u64 = 7_000_000_000_000_000_007;
/// How long faults strike in one run, in simulated milliseconds.
const CHAOS_MS: u64 = 30_000;

fn cluster_identity() -> ClusterIdentity {
    ClusterIdentity {
        system_id: SYSTEM_ID,
        name: "main".into(),
        pg_major: 17,
        segment_size: SEGMENT_SIZE,
    }
}

fn wal_format() -> WalFormat {
    WalFormat {
        version: PgVersion::V17,
        segment_size: SegmentSize::MIN,
        system_id: SYSTEM_ID,
    }
}

/// What one run came to: enough to tell two runs apart.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ending {
    tally: Tally,
    n_events: u64,
    committed_lsn: Lsn,
    random: u64,
}

fn run_seed(seed: u64) -> Result<Ending, String> {
    silence_expected_panics();
    let trace = std::env::var_os("TRACE").is_some();
    let run = || {
        let mut cluster = Cluster::new(seed, trace);
        cluster.run(CHAOS_MS, |_| false);
        cluster.heal();
        Ending {
            tally: cluster.tally.clone(),
            n_events: cluster.n_events(),
            committed_lsn: cluster.checker.committed_lsn(),
            random: cluster.random.next(),
        }
    };
    catch_unwind(AssertUnwindSafe(run)).map_err(panic_text)
}

fn panic_text(panic: Box<dyn Any + Send>) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "panic".to_owned())
}

/// A simulated process that ends because its disk failed is no news.
fn silence_expected_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let text = panic.payload().downcast_ref::<String>();
            if !text.is_some_and(|text| text.starts_with(STORAGE_FAILED)) {
                usual(panic);
            }
        }));
    });
}

fn number_from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is not a number")),
    )
}

/// Runs seeds `first..first + n` on all cores; the tally of the runs, or the seeds that failed.
fn run_seeds(first: u64, n: u64) -> (Tally, Vec<(u64, String)>) {
    let next = AtomicU64::new(first);
    let n_threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let work = || {
        let (mut tally, mut failed) = (Tally::default(), Vec::new());
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + n || failed.len() >= 5 {
                return (tally, failed);
            }
            match run_seed(seed) {
                Ok(ending) => tally.add_run(&ending.tally),
                Err(text) => {
                    // At once: a long run may be ended before its own end.
                    eprintln!("seed {seed}: {text}");
                    failed.push((seed, text));
                }
            }
        }
    };
    let (mut tally, mut failed) = (Tally::default(), Vec::new());
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..n_threads).map(|_| scope.spawn(work)).collect();
        for thread in threads {
            let (runs, failures) = thread.join().expect("failures of a seed are caught");
            tally.merge(&runs);
            failed.extend(failures);
        }
    });
    failed.sort();
    (tally, failed)
}

#[cfg(not(feature = "mutations"))]
#[test]
fn every_invariant_holds_for_fresh_seeds() {
    let seconds = std::time::SystemTime::now()
        .duration_since(std::time::SystemTime::UNIX_EPOCH)
        .map_or(0, |t| t.as_secs());
    let (first, n) = match number_from_environment("SEED") {
        Some(seed) => (seed, 1),
        None => {
            let n = if cfg!(debug_assertions) { 30 } else { 2000 };
            let first = number_from_environment("FIRST").unwrap_or(seconds / 86_400 * 1_000_000);
            (first, number_from_environment("SEEDS").unwrap_or(n))
        }
    };
    let started = Instant::now();
    let (tally, failed) = run_seeds(first, n);
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "{n} seeds from {first} in {seconds:.1} s, {:.0} a minute; in how many runs:",
        n as f64 / seconds * 60.0
    );
    print!("{tally}");
    for (seed, text) in &failed {
        println!("seed {seed}: {text}");
        println!(
            "  SEED={seed} TRACE=1 cargo test --release -p safekeeper --test simulation seeds -- --nocapture"
        );
    }
    assert!(failed.is_empty(), "{} seeds failed", failed.len());
    // Few seeds can't be expected to show everything.
    if n >= 500 {
        let missing = tally.missing();
        assert!(
            missing.is_empty(),
            "never happened in {n} runs: {missing:?}"
        );
    }
}

#[cfg(not(feature = "mutations"))]
#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in [3, 17] {
        assert_eq!(run_seed(seed), run_seed(seed));
    }
}

/// Which seed notices first that a rule is broken; in the order of the seeds, whichever core was
/// quicker.
#[cfg(feature = "mutations")]
#[test]
fn every_mutation_is_caught() {
    use mutations::Verdict;
    use safekeeper_protocol::mutation::{Catcher, Keeper};

    let n = number_from_environment("SEEDS").unwrap_or(200);
    let find = |run: fn(u64) -> Result<(), String>| match first_failure(n, run) {
        Some((seed, text)) => Verdict::Caught {
            after: seed,
            by: text.chars().take(100).collect(),
        },
        None => Verdict::Missed { after: n },
    };
    let mut missed = mutations::unnoticed(Catcher::Simulation, "seeds", |_| {
        find(|seed| run_seed(seed).map(drop))
    });
    missed.extend(mutations::unnoticed(
        Catcher::Storage,
        "seeds",
        |mutation| match mutation.kept_by() {
            Keeper::Storage => find(|seed| {
                let run = catch_unwind(|| storage_model::run(seed));
                run.map(drop).map_err(panic_text)
            }),
            Keeper::Core | Keeper::Server => Verdict::MeansNothingHere,
        },
    ));
    assert!(missed.is_empty(), "not caught: {missed:?}");
}

/// The lowest of the seeds `1..=n` with which `run` fails.
#[cfg(feature = "mutations")]
fn first_failure(n: u64, run: fn(u64) -> Result<(), String>) -> Option<(u64, String)> {
    let (next, end) = (AtomicU64::new(1), AtomicU64::new(n + 1));
    let n_threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let work = || loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= end.load(Ordering::Relaxed) {
            return None;
        }
        if let Err(text) = run(seed) {
            end.fetch_min(seed, Ordering::Relaxed);
            return Some((seed, text));
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..n_threads).map(|_| scope.spawn(work)).collect();
        let found = threads.into_iter().filter_map(|thread| thread.join().ok()?);
        found.min()
    })
}

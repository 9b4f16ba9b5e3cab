//! Consumers on one safekeeper, and as many on a primary's own walsenders.
//!
//! *Following*: commits come at a fixed rate, each with a page of WAL, and every consumer gets all of it. The
//! rate is far below what the machine can, so that latencies are those of a commit and not of a queue; what
//! consumers do to them is seen against the run without any.
//!
//! *From the oldest WAL*: consumers begin where the WAL begins, as fast as they can, while nothing else
//! happens: throughput, and what a gigabyte costs the sender. Then ten of them while commits come, all
//! together at a rate that leaves the processors to the commits: so what is seen there is the disk and the page
//! cache.
//!
//! The sender's CPU time is that of the threads or processes that are there because of the consumers.

use std::time::{Duration, Instant};

use cluster_tests::poll::{SOON, wait_until};
use safekeeper_protocol::Lsn;

use crate::consumers::{Consumers, Pace};
use crate::options::Options;
use crate::pgbench;
use crate::processes::{Memory, RunTimes};
use crate::samples::Samples;
use crate::setups::{Kind, Setup, Setups};

pub const FOLLOWING: &str = "fan-out, following";
pub const OLDEST: &str = "fan-out, from the oldest";
pub const COUNTS: [usize; 3] = [1, 10, 50];

const MEGABYTE: f64 = (1 << 20) as f64;
const GIGABYTE: f64 = (1 << 30) as f64;
/// Commits in a second, each with so many bytes of WAL: 2 MB a second, times consumers.
const RATE: u32 = 250;
const COMMIT_BYTES: u32 = 8000;
/// For consumers that begin at the oldest WAL beside commits, all together.
const PACE: u64 = 100 << 20;

pub fn measure(options: &Options, setups: &mut Setups, samples: &mut Samples) {
    for round in 0..options.few_rounds(3) {
        for kind in options.order(round) {
            let Some(setup) = setups.get(kind) else {
                continue;
            };
            if kind == Kind::Local {
                continue;
            }
            follow(options, setup, round, samples);
            read_oldest(options, setup, round, samples);
        }
    }
}

fn follow(options: &Options, setup: &Setup, round: u32, samples: &mut Samples) {
    for count in [0].iter().chain(&COUNTS) {
        setup.settle();
        let begin = setup.primary.flush_lsn();
        let run = beside_commits(
            setup,
            options.time,
            *count,
            begin,
            Pace::Every(Duration::from_millis(5)),
        );
        samples.add(FOLLOWING, &count.to_string(), setup.kind, round, run);
    }
}

fn read_oldest(options: &Options, setup: &Setup, round: u32, samples: &mut Samples) {
    let begin = setup.primary.flush_lsn();
    setup.write_wal(options.bulk_megabytes / 2);
    setup.settle();
    let wal = setup.primary.flush_lsn() - begin;
    for count in COUNTS {
        let before = run_times(setup, &RunTimes::default());
        let begun = Instant::now();
        let consumers = Consumers::attach(setup.source(), count, begin, Pace::AtOnce);
        let times = run_times(setup, &before);
        let mut memory = Memory::default();
        let all = wal * count as u64;
        // A second is long enough, and many consumers take long.
        let enough = |received: u64| received >= all || begun.elapsed() > options.time * 2;
        wait_until("consumers have all", SOON, || {
            memory = memory.max(memory_of_source(setup));
            enough(consumers.received())
        });
        let seconds = begun.elapsed().as_secs_f64();
        let received = consumers.received() as f64;
        assert!(
            received > MEGABYTE,
            "consumers of {} got nothing",
            setup.kind
        );
        let cpu = run_times(setup, &before).since(&times);
        consumers.detach();
        let values = vec![
            ("mb_per_s", received / MEGABYTE / seconds),
            ("sender_s_per_gb", cpu / received * GIGABYTE),
            ("mb_per_cpu_s", received / MEGABYTE / cpu),
            ("source_resident_mb", memory.resident()),
        ];
        samples.add(OLDEST, &count.to_string(), setup.kind, round, values);
    }
    let run = beside_commits(setup, options.time, 10, begin, Pace::Limited(PACE));
    samples.add(OLDEST, "10 beside commits", setup.kind, round, run);
}

/// Commits at the fixed rate while so many consumers read.
fn beside_commits(
    setup: &Setup,
    time: Duration,
    count: usize,
    begin: Lsn,
    pace: Pace,
) -> Vec<(&'static str, f64)> {
    let before = run_times(setup, &RunTimes::default());
    let consumers = Consumers::attach(setup.source(), count, begin, pace);
    let run = pgbench::at_rate(setup, RATE, COMMIT_BYTES, time, || {
        (consumers.received(), run_times(setup, &before))
    });
    let memory = memory_of_source(setup);
    consumers.detach();
    let ((received_before, times), (received, times_after)) = run.marks;
    let received = (received - received_before) as f64;
    // An error is short: WAL that has been removed, say.
    let least = (count as f64) * f64::from(COMMIT_BYTES);
    assert!(received >= least, "consumers of {} got nothing", setup.kind);
    let cpu = times_after.since(&times);
    let mut values = vec![
        ("tps", run.tps),
        ("p50_ms", run.p50),
        ("p99_ms", run.p99),
        ("mb_per_s", received / MEGABYTE / time.as_secs_f64()),
        ("source_resident_mb", memory.resident()),
    ];
    if count > 0 {
        values.push(("sender_s_per_gb", cpu / received * GIGABYTE));
        values.push(("mb_per_cpu_s", received / MEGABYTE / cpu));
    }
    values
}

/// Of those that serve WAL, but for those that did before.
fn run_times(setup: &Setup, before: &RunTimes) -> RunTimes {
    RunTimes::of(setup.processes_of_source(), before)
}

fn memory_of_source(setup: &Setup) -> Memory {
    let each = setup.processes_of_source().into_iter().map(Memory::of);
    each.fold(Memory::default(), Memory::plus)
}

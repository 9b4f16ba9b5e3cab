//! One run of `pgbench -N`, and what it cost.
//!
//! Only a window within the run is measured: all clients have connected, and nobody has finished yet. Each transaction stands with its latency and the time of
//! its end in pgbench's log, which lies in memory; CPU times are read at both ends of the window.
//! pgbench's own CPU time is not counted.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cluster_tests::place::{TestDir, give_to_server_user};
use cluster_tests::process::run_ok;

use crate::processes::Busy;
use crate::setups::{MEMORY, Setup};

pub struct Run {
    pub tps: f64,
    /// Latencies in milliseconds.
    pub mean: f64,
    pub p50: f64,
    pub p99: f64,
    /// CPU seconds for 10,000 commits, of all processes of the setup; of the primary; of the
    /// processes that send WAL; of the members.
    pub cpu: f64,
    pub cpu_primary: f64,
    pub cpu_senders: f64,
    pub cpu_members: f64,
    /// Of all processors, whoever keeps them busy.
    pub busy_percent: f64,
}

impl Run {
    /// By the names that the report knows.
    pub fn values(&self) -> Vec<(&'static str, f64)> {
        vec![
            ("tps", self.tps),
            ("mean_ms", self.mean),
            ("p50_ms", self.p50),
            ("p99_ms", self.p99),
            ("cpu_s_per_10k", self.cpu),
            ("cpu_primary_s_per_10k", self.cpu_primary),
            ("cpu_senders_s_per_10k", self.cpu_senders),
            ("cpu_members_s_per_10k", self.cpu_members),
            ("busy_percent", self.busy_percent),
        ]
    }
}

/// Before the window: connections are made, caches filled.
const WARM_UP: Duration = Duration::from_secs(1);

pub fn run(setup: &Setup, clients: u32, time: Duration) -> Run {
    let logs = TestDir::new_in(Path::new(MEMORY));
    let whole = WARM_UP + time + Duration::from_secs(1);
    let mut command = setup.primary.pgbench_command(clients, whole);
    command.args(["--skip-some-updates", "--log", "--log-prefix"]);
    command.arg(logs.path().join("log"));

    let pgbench = thread::spawn(move || run_ok(command));
    thread::sleep(WARM_UP);
    let senders = setup.senders();
    let (begin, busy, cost_before) = (now(), Busy::now(), setup.cost(&senders));
    thread::sleep(time);
    let (end, busy_percent, cost_after) = (now(), busy.percent_since(), setup.cost(&senders));
    pgbench.join().expect("pgbench succeeds");
    assert!(
        setup.all_follow(),
        "a member of {} was lost during the run",
        setup.kind
    );

    let latencies = latencies_within(logs.path(), begin, end);
    let commits = latencies.len() as f64;
    assert!(commits > 0.0, "no commit in {time:?} on {}", setup.kind);
    let at = |share: f64| latencies[(commits * share) as usize];
    let cost = cost_after.since(cost_before);
    let per_10k = |seconds: f64| seconds / commits * 10_000.0;
    Run {
        tps: commits / (end - begin).as_secs_f64(),
        mean: latencies.iter().sum::<f64>() / commits,
        p50: at(0.5),
        p99: at(0.99),
        cpu: per_10k(cost.all()),
        cpu_primary: per_10k(cost.primary),
        cpu_senders: per_10k(cost.senders),
        cpu_members: per_10k(cost.members),
        busy_percent,
    }
}

/// A run of commits at a fixed rate, and what was marked at both ends of its window.
pub struct RateRun<T> {
    pub tps: f64,
    /// From when a commit was due, in milliseconds.
    pub p50: f64,
    pub p99: f64,
    pub marks: (T, T),
}

/// So many commits a second, from four clients, each with so many bytes of WAL.
pub fn at_rate<T>(
    setup: &Setup,
    rate: u32,
    bytes: u32,
    time: Duration,
    mark: impl Fn() -> T,
) -> RateRun<T> {
    let logs = TestDir::new_in(Path::new(MEMORY));
    let script = logs.path().join("script");
    let statement = format!("select pg_logical_emit_message(true, '', repeat('x', {bytes}));\n");
    fs::write(&script, statement).expect("our own directory");
    give_to_server_user(&script);
    let whole = WARM_UP + time + Duration::from_secs(1);
    let mut command = setup.primary.pgbench_command(4, whole);
    command.arg("--file").arg(&script);
    command.args(["--rate", &rate.to_string(), "--log", "--log-prefix"]);
    command.arg(logs.path().join("log"));

    let pgbench = thread::spawn(move || run_ok(command));
    thread::sleep(WARM_UP);
    let (begin, mark_before) = (now(), mark());
    thread::sleep(time);
    let (end, mark_after) = (now(), mark());
    pgbench.join().expect("pgbench succeeds");
    fs::remove_file(&script).expect("our own file");
    let latencies = latencies_within(logs.path(), begin, end);
    let commits = latencies.len() as f64;
    assert!(commits > 0.0, "no commit in {time:?} on {}", setup.kind);
    let at = |share: f64| latencies[(commits * share) as usize];
    RateRun {
        tps: commits / (end - begin).as_secs_f64(),
        p50: at(0.5),
        p99: at(0.99),
        marks: (mark_before, mark_after),
    }
}

/// Since the epoch, as pgbench's log has it.
fn now() -> Duration {
    let time = SystemTime::now().duration_since(UNIX_EPOCH);
    time.expect("the clock is past 1970")
}

/// In milliseconds, ascending.
fn latencies_within(logs: &Path, begin: Duration, end: Duration) -> Vec<f64> {
    let mut latencies = Vec::new();
    // One file for each of pgbench's threads.
    for entry in fs::read_dir(logs).expect("our own directory") {
        let path = entry.expect("our own directory").path();
        let text = fs::read_to_string(path).expect("our own file");
        let in_window = text.lines().filter_map(|line| {
            let (ended, latency) = parse(line).unwrap_or_else(|| panic!("pgbench wrote {line:?}"));
            (begin..end).contains(&ended).then_some(latency)
        });
        latencies.extend(in_window);
    }
    latencies.sort_by(f64::total_cmp);
    latencies
}

/// client, transaction, latency in microseconds, script, end in seconds and microseconds.
fn parse(line: &str) -> Option<(Duration, f64)> {
    let mut fields = line.split(' ').skip(2);
    let latency_us: f64 = fields.next()?.parse().ok()?;
    let seconds: u64 = fields.nth(1)?.parse().ok()?;
    let us: u64 = fields.next()?.parse().ok()?;
    let ended = Duration::from_secs(seconds) + Duration::from_micros(us);
    Some((ended, latency_us / 1000.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_log_is_understood() {
        let (ended, latency) = parse("0 199 2241 0 1175850568 995598").unwrap();
        assert_eq!(ended, Duration::from_micros(1_175_850_568_995_598));
        assert!((latency - 2.241).abs() < 1e-9);
        assert!(parse("0 199").is_none());
    }
}

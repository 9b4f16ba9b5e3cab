//! What is left of a run: `samples.json` with everything, and `table.md`, ratios first.
//!
//! A ratio is the median of those of the rounds, with the least and the greatest of them in
//! brackets. An absolute figure is the median of the rounds.

use std::fmt::Write as _;
use std::fs;

use cluster_tests::place::{Programs, TestDir};
use cluster_tests::process::{Environment, run_ok};
use serde::Serialize;

use crate::awake::KeepAwake;
use crate::fsync_time::{self, FlushTime};
use crate::options::Options;
use crate::samples::{Samples, Spread};
use crate::setups::Kind;
use crate::{bulk, catch_up, clients, fan_out, hosts, slow_member};

/// Where it was measured.
#[derive(Serialize)]
pub struct Machine {
    cpus: usize,
    cpu: String,
    kernel: String,
    postgres: String,
    /// Emulated hosts' processors can be kept awake.
    awake: bool,
    /// Of the disk that the servers lie on, before they are there.
    flush_ms: FlushTime,
}

impl Machine {
    pub fn look() -> Machine {
        let mut version = std::process::Command::new(Programs::postgres("postgres"));
        version.arg("--version");
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name"));
        let model = model.unwrap_or_default();
        Machine {
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            cpu: model.trim_matches([' ', '\t', ':']).to_owned(),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            postgres: run_ok(version).trim().to_owned(),
            awake: KeepAwake::begin().is_some(),
            flush_ms: fsync_time::measure(&TestDir::new(), Environment::new(), None),
        }
    }
}

pub fn write(options: &Options, machine: &Machine, samples: &Samples) {
    let out = &options.out;
    fs::create_dir_all(out).unwrap_or_else(|e| panic!("could not create {}: {e}", out.display()));
    let json = serde_json::json!({ "machine": machine, "samples": samples });
    let json = serde_json::to_string_pretty(&json).expect("numbers and strings");
    let text = text(options, machine, samples);
    for (name, content) in [("samples.json", json), ("table.md", text.clone())] {
        let path = out.join(name);
        fs::write(&path, content)
            .unwrap_or_else(|e| panic!("could not write {}: {e}", path.display()));
    }
    println!("{text}\nwritten to {}", out.display());
}

/// A column of ratios: its head, who over whom, and of what.
type Ratio = (&'static str, (Kind, Kind), &'static str);
/// A column of figures: its head, of what, and how many decimals.
type Figure = (&'static str, &'static str, usize);

const OURS_STOCK: (Kind, Kind) = (Kind::Ours, Kind::Stock);
const OURS_LOCAL: (Kind, Kind) = (Kind::Ours, Kind::Local);
const OURS_FILES: (Kind, Kind) = (Kind::Ours, Kind::OursFromFiles);

fn text(options: &Options, machine: &Machine, samples: &Samples) -> String {
    let mut text = String::new();
    let FlushTime { median, p99 } = machine.flush_ms;
    let _ = writeln!(
        text,
        "{}, {} × {}, Linux {}. An fdatasync of 8 kB on its disk: {median:.3} ms, p99 {p99:.3} ms. \
         Emulated hosts' processors are {}kept awake{}. Rounds: {}, of {} s.",
        machine.postgres,
        machine.cpus,
        machine.cpu,
        machine.kernel,
        if machine.awake { "" } else { "not " },
        if options.own_processors {
            ", and half of them are the primary's"
        } else {
            ""
        },
        options.rounds,
        options.time.as_secs(),
    );
    section(
        &mut text,
        samples,
        clients::PART,
        "One machine, one disk: `pgbench -N`, by clients",
        &[
            ("TPS ours/stock", OURS_STOCK, "tps"),
            ("TPS ours/local", OURS_LOCAL, "tps"),
            ("TPS ours/files", OURS_FILES, "tps"),
            ("p99 ours/stock", OURS_STOCK, "p99_ms"),
            ("CPU ours/stock", OURS_STOCK, "cpu_s_per_10k"),
        ],
        &[
            ("TPS", "tps", 0),
            ("mean ms", "mean_ms", 3),
            ("p50 ms", "p50_ms", 3),
            ("p99 ms", "p99_ms", 3),
            ("CPU s per 10,000 commits", "cpu_s_per_10k", 2),
            ("of it the primary", "cpu_primary_s_per_10k", 2),
            ("(its senders)", "cpu_senders_s_per_10k", 2),
            ("members", "cpu_members_s_per_10k", 2),
            ("processors busy %", "busy_percent", 0),
        ],
    );
    section(
        &mut text,
        samples,
        bulk::PART,
        "One machine, one disk: COPY",
        &[
            ("MB/s ours/stock", OURS_STOCK, "wal_mb_per_s"),
            ("MB/s ours/local", OURS_LOCAL, "wal_mb_per_s"),
            ("MB/s ours/files", OURS_FILES, "wal_mb_per_s"),
            ("CPU to send ours/stock", OURS_STOCK, "cpu_senders_s_per_gb"),
            ("CPU of all ours/stock", OURS_STOCK, "cpu_s_per_gb"),
        ],
        &[
            ("MB/s of WAL", "wal_mb_per_s", 0),
            ("of data", "data_mb_per_s", 0),
            ("CPU s per GB, all", "cpu_s_per_gb", 2),
            ("CPU s per GB to three, senders", "cpu_senders_s_per_gb", 2),
            ("senders resident MB", "senders_resident_mb", 1),
            ("(anonymous)", "senders_anonymous_mb", 1),
            ("shared buffers touched MB", "senders_shared_mb", 1),
            ("a member resident MB", "member_resident_mb", 1),
        ],
    );
    section(
        &mut text,
        samples,
        catch_up::PART,
        "One machine, one disk: a member that was away",
        &[
            ("MB/s ours/stock", OURS_STOCK, "mb_per_s"),
            ("streaming ours/stock", OURS_STOCK, "stream_mb_per_s"),
        ],
        &[
            ("MB/s from its start", "mb_per_s", 0),
            ("MB/s while it streams", "stream_mb_per_s", 0),
            ("s until the first flush", "until_first_s", 2),
            ("senders resident MB", "senders_resident_mb", 1),
            ("a member resident MB", "member_resident_mb", 1),
        ],
    );
    let fan_out_ratios = [
        ("MB per CPU second ours/stock", OURS_STOCK, "mb_per_cpu_s"),
        ("p50 ours/stock", OURS_STOCK, "p50_ms"),
    ];
    let fan_out_figures = [
        ("commits/s", "tps", 0),
        ("p50 ms", "p50_ms", 3),
        ("p99 ms", "p99_ms", 3),
        ("MB/s to all", "mb_per_s", 1),
        ("sender's CPU s per GB", "sender_s_per_gb", 2),
        ("MB per CPU second", "mb_per_cpu_s", 0),
        ("source resident MB", "source_resident_mb", 1),
    ];
    section(
        &mut text,
        samples,
        fan_out::FOLLOWING,
        "Consumers on one safekeeper, or on a primary, that follow commits at a fixed rate",
        &fan_out_ratios,
        &fan_out_figures,
    );
    section(
        &mut text,
        samples,
        fan_out::OLDEST,
        "The same that begin at the oldest WAL",
        &fan_out_ratios[..1],
        &fan_out_figures,
    );
    section(
        &mut text,
        samples,
        slow_member::PART,
        "Emulated hosts: one slow member, 8 clients, flushes of 1 ms elsewhere",
        &[
            ("TPS ours/stock", OURS_STOCK, "tps"),
            ("p99 ours/stock", OURS_STOCK, "p99_ms"),
        ],
        &[
            ("TPS", "tps", 0),
            ("mean ms", "mean_ms", 3),
            ("p50 ms", "p50_ms", 3),
            ("p99 ms", "p99_ms", 3),
        ],
    );
    section(
        &mut text,
        samples,
        hosts::PART,
        "Emulated hosts: F_primary / RTT / F_member, clients",
        &[
            ("TPS ours/stock", OURS_STOCK, "tps"),
            ("TPS ours/local", OURS_LOCAL, "tps"),
            ("TPS ours/files", OURS_FILES, "tps"),
        ],
        &[
            ("TPS", "tps", 0),
            ("mean ms", "mean_ms", 3),
            ("formula ms", "formula_ms", 3),
            ("mean/formula", "of_formula", 3),
            ("the same of p50", "p50_of_formula", 3),
            ("p50 ms", "p50_ms", 3),
            ("p99 ms", "p99_ms", 3),
            ("CPU s per 10,000 commits", "cpu_s_per_10k", 2),
            ("processors busy %", "busy_percent", 0),
        ],
    );
    text
}

/// Nothing, if the part was not measured. A column that nobody has a value for is left out.
fn section(
    text: &mut String,
    samples: &Samples,
    part: &str,
    title: &str,
    ratios: &[Ratio],
    figures: &[Figure],
) {
    let points = samples.points(part);
    if points.is_empty() {
        return;
    }
    let _ = writeln!(text, "\n### {title}\n");
    let measured = |kinds: &(Kind, Kind)| samples.has(part, kinds.0) && samples.has(part, kinds.1);
    let ratios: Vec<_> = ratios
        .iter()
        .filter(|(_, kinds, _)| measured(kinds))
        .collect();
    if !ratios.is_empty() {
        head(text, "", ratios.iter().map(|(head, ..)| *head));
        for point in &points {
            let cells = ratios.iter().map(|(_, kinds, value)| {
                let ratio = samples.ratio(part, point, *kinds, value);
                ratio.map_or_else(String::new, |Spread { median, min, max }| {
                    format!("{median:.2} ({min:.2}–{max:.2})")
                })
            });
            row(text, point, cells);
        }
        text.push('\n');
    }
    head(text, "", figures.iter().map(|(head, ..)| *head));
    for point in &points {
        for kind in [Kind::Local, Kind::Stock, Kind::OursFromFiles, Kind::Ours] {
            let values: Vec<_> = figures
                .iter()
                .map(|(_, value, _)| samples.spread(part, point, kind, value))
                .collect();
            if values.iter().all(Option::is_none) {
                continue;
            }
            let cells = values.iter().zip(figures).map(|(value, (_, _, decimals))| {
                value.map_or_else(String::new, |value| {
                    format!("{:.*}", *decimals, value.median)
                })
            });
            row(text, &format!("{point}: {kind}"), cells);
        }
    }
}

fn head<'a>(text: &mut String, first: &str, rest: impl Iterator<Item = &'a str> + Clone) {
    let rule = rest.clone().map(|_| "--:".to_owned());
    row(text, first, rest.map(str::to_owned));
    row(text, "---", rule);
}

fn row(text: &mut String, first: &str, rest: impl Iterator<Item = String>) {
    let cells: Vec<_> = rest.collect();
    let _ = writeln!(text, "| {first} | {} |", cells.join(" | "));
}

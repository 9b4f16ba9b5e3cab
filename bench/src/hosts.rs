//! Hosts of their own, emulated: what a commit costs when the primary's flush, the way to a member
//! and the member's flush take their times, against what theory says.
//!
//! ```text
//!   local-only   F_primary                        + execution
//!   stock        F_primary + RTT + F_member       + execution
//!   ours         max(F_primary, RTT + F_member)   + execution
//! ```
//!
//! All files lie in memory, flushes are lengthened by a sleep, links by a proxy: nothing is shared
//! but the CPUs, which are kept awake (`awake.rs`); on demand half of them are the primary's alone
//! (`processors.rs`). *Execution* is what the local-only setup takes in the
//! same round beyond F_primary. F_primary, RTT + F_member and their maximum are measured, not what was asked
//! for (`quorum_time.rs`).
//! At more than one client a local commit also waits for the flush that is under way, which
//! execution then contains; so there the formulas are rules of thumb.

use std::fmt::{self, Display};
use std::str::FromStr;
use std::time::Duration;

use crate::awake::KeepAwake;
use crate::fsync_time;
use crate::options::Options;
use crate::pgbench::{self, Run};
use crate::processors::Processors;
use crate::quorum_time::{self, QuorumTimes};
use crate::samples::Samples;
use crate::setups::{Hosts, Kind, Setup, Setups};
use crate::slow_link;
use cluster_tests::slow_disk::SlowDisk;

pub const PART: &str = "hosts";

/// In microseconds.
#[derive(Clone, Copy)]
pub struct Point {
    primary_flush: u64,
    round_trip: u64,
    member_flush: u64,
}

const fn point(primary_flush: u64, round_trip: u64, member_flush: u64) -> Point {
    Point {
        primary_flush,
        round_trip,
        member_flush,
    }
}

impl FromStr for Point {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Point, Self::Err> {
        let found = POINTS.into_iter().find(|point| point.to_string() == text);
        found.ok_or("not one of the points that are measured, such as 0.5/0/0.5")
    }
}

/// In milliseconds.
impl Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |us: u64| us as f64 / 1000.0;
        let (primary, member) = (ms(self.primary_flush), ms(self.member_flush));
        write!(f, "{primary}/{}/{member}", ms(self.round_trip))
    }
}

/// Members answer within the primary's flush, or they don't; a cloud's disks, a fast disk's hosts in
/// one rack, another zone. The first two are those of a quick run.
pub const POINTS: [Point; 5] = [
    point(2000, 500, 1000),
    point(2000, 0, 1000),
    point(500, 0, 500),
    point(1000, 1000, 1000),
    point(1000, 2000, 1000),
];

/// What was asked for, as it turned out to be, in milliseconds.
#[derive(Clone, Copy)]
struct Times {
    primary_flush: f64,
    quorum: QuorumTimes,
    /// Of each direction of a link.
    one_way: Duration,
}

impl Times {
    /// Milliseconds of a commit without its execution.
    fn formula(&self, kind: Kind) -> f64 {
        match kind {
            Kind::Local => self.primary_flush,
            // What is read from files has been flushed here.
            Kind::Stock | Kind::OursFromFiles => self.primary_flush + self.quorum.members,
            Kind::Ours => self.quorum.both,
        }
    }
}

pub fn measure(options: &Options, samples: &mut Samples) {
    let _awake = KeepAwake::begin();
    let processors = match options.own_processors {
        true => Processors::divide(),
        false => None,
    };
    // A setup's members have links or they don't.
    let (near, apart): (Vec<Point>, Vec<Point>) = options
        .points
        .iter()
        .partition(|point| point.round_trip == 0);
    for (hosts, points) in [(Hosts::Emulated, near), (Hosts::Apart, apart)] {
        if points.is_empty() {
            continue;
        }
        measure_there(options, hosts, &points, processors.as_ref(), samples);
    }
}

fn measure_there(
    options: &Options,
    hosts: Hosts,
    points: &[Point],
    processors: Option<&Processors>,
    samples: &mut Samples,
) {
    let mut setups = Setups::start(options, &options.setups, hosts);
    setups.iter().for_each(Setup::write_page_images);
    if let Some(processors) = processors {
        let primaries = setups.iter().map(|setup| setup.primary.process().id());
        primaries.for_each(|pid| processors.give_to_primary(pid));
    }
    let times: Vec<_> = points
        .iter()
        .map(|point| look(*point, &setups, processors))
        .collect();
    // Nothing here depends on a disk: short runs lie close together.
    for round in 0..options.few_rounds(3) {
        for (point, times) in points.iter().zip(&times) {
            for clients in options.clients.iter().filter(|clients| **clients <= 8) {
                let mut runs = Vec::new();
                for kind in options.order(round) {
                    let run = run(&mut setups, kind, *point, times, *clients, options.time);
                    runs.push((kind, run));
                }
                let name = format!("{point} ms, {clients}");
                add(samples, round, &name, times, &runs);
            }
        }
    }
}

fn look(point: Point, setups: &Setups, processors: Option<&Processors>) -> Times {
    let dir = setups.dir();
    let disk = |name: &str, us: u64| {
        let disk = SlowDisk::new(dir, name);
        disk.set(Duration::from_micros(us));
        disk
    };
    let primary = disk("primary", point.primary_flush);
    let member = disk("member", point.member_flush);
    let one_way = match point.round_trip {
        0 => None,
        us => Some(slow_link::calibrate(Duration::from_micros(us))),
    };
    let times = Times {
        primary_flush: fsync_time::measure(dir, primary.environment(), processors).median,
        quorum: quorum_time::measure(dir, &primary, &member, one_way, processors),
        one_way: one_way.unwrap_or_default(),
    };
    eprintln!(
        "hosts {point} ms: in fact F_primary {:.3}, RTT + F_member {:.3}, both at once {:.3} ms",
        times.primary_flush, times.quorum.members, times.quorum.both
    );
    times
}

fn run(
    setups: &mut Setups,
    kind: Kind,
    point: Point,
    times: &Times,
    clients: u32,
    time: Duration,
) -> Run {
    let setup = setups.get(kind).expect("all that are in the order");
    let links = || {
        setup
            .members
            .iter()
            .filter_map(|member| member.link.as_ref())
    };
    let is_apart = times.one_way > Duration::ZERO;
    slow_link::set_all(links(), times.one_way);
    if is_apart {
        setup.connect_anew();
    }
    setup.settle();
    setup.set_flush_time(
        Duration::from_micros(point.primary_flush),
        Duration::from_micros(point.member_flush),
    );
    let run = pgbench::run(setup, clients, time);
    slow_link::set_all(links(), Duration::ZERO);
    setup.set_flush_time(Duration::ZERO, Duration::ZERO);
    run
}

fn add(samples: &mut Samples, round: u32, point: &str, times: &Times, runs: &[(Kind, Run)]) {
    let local = runs.iter().find(|(kind, _)| *kind == Kind::Local);
    for (kind, run) in runs {
        let mut values = run.values();
        if let Some((_, local)) = local {
            let formula = |local: f64| times.formula(*kind) + local - times.primary_flush;
            values.push(("formula_ms", formula(local.mean)));
            values.push(("of_formula", run.mean / formula(local.mean)));
            values.push(("p50_of_formula", run.p50 / formula(local.p50)));
        }
        samples.add(PART, point, *kind, round, values);
    }
}

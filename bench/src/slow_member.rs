//! One member of three has a disk whose flushes last 100 ms. Nobody should notice: two others are a
//! quorum.
//!
//! On emulated hosts, whose other disks all flush in a millisecond: on a real disk p99 has reasons of
//! its own.

use std::time::Duration;

use crate::options::Options;
use crate::pgbench;
use crate::samples::Samples;
use crate::setups::{Hosts, Kind, Setups};

pub const PART: &str = "slow";
pub const ALIKE: &str = "all alike";
pub const ONE_SLOW: &str = "one at 100 ms";

const FLUSH: Duration = Duration::from_millis(1);
const SLOW_FLUSH: Duration = Duration::from_millis(100);
const CLIENTS: u32 = 8;

pub fn measure(options: &Options, samples: &mut Samples) {
    let kinds: Vec<_> = options
        .setups
        .iter()
        .copied()
        .filter(|kind| *kind != Kind::Local)
        .collect();
    let mut setups = Setups::start(options, &kinds, Hosts::Emulated);
    for setup in setups.iter() {
        setup.write_page_images();
        setup.set_flush_time(FLUSH, FLUSH);
    }
    for round in 0..options.few_rounds(5) {
        for kind in options.order(round) {
            let Some(setup) = setups.get(kind) else {
                continue;
            };
            for (point, flush) in [(ALIKE, FLUSH), (ONE_SLOW, SLOW_FLUSH)] {
                let slow = setup.members[2].disk.as_ref().expect("an emulated host");
                slow.set(FLUSH);
                setup.settle();
                slow.set(flush);
                let run = pgbench::run(setup, CLIENTS, options.time);
                slow.set(FLUSH);
                samples.add(PART, point, kind, round, run.values());
            }
        }
    }
}

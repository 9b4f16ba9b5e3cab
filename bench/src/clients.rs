//! Small transactions on one machine as it is: `pgbench -N` at 1, 8 and 32 clients.
//!
//! Everything shares the same cores and the same disk, so what decides is CPU time for a commit and
//! the number of flushes.

use crate::options::Options;
use crate::pgbench;
use crate::samples::Samples;
use crate::setups::{Setup, Setups};

pub const PART: &str = "clients";

pub fn measure(options: &Options, setups: &mut Setups, samples: &mut Samples) {
    setups.iter().for_each(Setup::write_page_images);
    for round in 0..options.rounds {
        for clients in &options.clients {
            for kind in options.order(round) {
                let Some(setup) = setups.get(kind) else {
                    continue;
                };
                setup.settle();
                let run = pgbench::run(setup, *clients, options.time);
                samples.add(PART, &clients.to_string(), kind, round, run.values());
            }
        }
    }
}

//! What a commit costs on safekeepers, beside what a user would pick instead. `scripts/bench` builds
//! what is measured, explains the settings, and runs this.
//!
//! The machine is never the same for long: the disk slows down after a burst of writes, and hosts
//! have neighbours. So whatever is compared runs within one round, each setup in turn for some
//! seconds, the order changing from round to round; and what counts are the ratios within a round.

mod bulk;
mod catch_up;
mod clients;
mod consumers;
mod fan_out;
mod fsync_time;
mod hosts;
mod options;
mod pgbench;
mod plot;
mod processes;
mod receiver;
mod report;
mod samples;
mod setups;
mod slow_link;
mod slow_member;

use std::path::Path;

use crate::options::{Options, Part};
use crate::report::Machine;
use crate::samples::Samples;
use crate::setups::{Hosts, Setups};

fn main() {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some(fsync_time::VERB) {
        let dir = arguments.next().expect("a directory");
        return fsync_time::print(Path::new(&dir));
    }

    let options = Options::from_environment();
    let mut samples = Samples::default();
    let machine = Machine::look();

    let on_one_machine = [Part::Clients, Part::Bulk, Part::CatchUp, Part::FanOut];
    if on_one_machine.iter().any(|part| options.wants(*part)) {
        let mut setups = Setups::start(&options, &options.setups, Hosts::OneMachine);
        if options.wants(Part::Clients) {
            clients::measure(&options, &mut setups, &mut samples);
        }
        if options.wants(Part::Bulk) {
            bulk::measure(&options, &mut setups, &mut samples);
        }
        if options.wants(Part::CatchUp) {
            catch_up::measure(&options, &mut setups, &mut samples);
        }
        if options.wants(Part::FanOut) {
            fan_out::measure(&options, &mut setups, &mut samples);
        }
    }
    if options.wants(Part::Slow) {
        slow_member::measure(&options, &mut samples);
    }
    if options.wants(Part::Hosts) {
        hosts::measure(&options, &mut samples);
    }

    report::write(&options, &machine, &samples);
    plot::write(&options.out, &samples);
}

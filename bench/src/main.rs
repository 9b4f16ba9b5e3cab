//! What a commit costs on safekeepers, beside what a user would pick instead. `scripts/bench` builds
//! what is measured, explains the settings, and runs this.
//!
//! The machine is never the same for long: the disk slows down after a burst of writes, and hosts
//! have neighbours. So whatever is compared runs within one round, each setup in turn for some
//! seconds, the order changing from round to round; and what counts are the ratios within a round.

mod awake;
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
mod processors;
mod quorum_time;
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
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [fsync_time::VERB, dir] => return fsync_time::print(Path::new(dir)),
        [quorum_time::VERB, dir, ref members @ ..] => {
            return quorum_time::print(Path::new(dir), members);
        }
        [quorum_time::ECHO_VERB, address, dir] => {
            return quorum_time::echo(address, Path::new(dir));
        }
        [] => {}
        _ => panic!("bench takes no arguments, see scripts/bench: {arguments:?}"),
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

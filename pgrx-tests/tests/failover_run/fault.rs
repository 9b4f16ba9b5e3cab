//! What may happen to a primary, and to a safekeeper beside it.

use cluster_tests::link::Link;
use cluster_tests::poll::{SOON, wait_until};
use cluster_tests::postgres::Stop;
use cluster_tests::process::signal_descendant;

use crate::hosts::Hosts;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// The host loses its power.
    Kill,
    /// It stands still past the failover, and goes on.
    Pause,
    /// It is parted from the safekeepers past the failover, and its clients are not from it.
    Part,
    /// A switchover: a clean stop.
    Stop,
    /// One backend dies, and the server recovers by itself.
    CrashBackend,
}

const ALL: [Fault; 5] = [
    Fault::Kill,
    Fault::Pause,
    Fault::Part,
    Fault::Stop,
    Fault::CrashBackend,
];

impl Fault {
    /// Power cuts are a third of it.
    pub fn choose(random: &mut fastrand::Rng) -> Fault {
        match random.u32(..9) {
            0..3 => Fault::Kill,
            3..5 => Fault::Pause,
            5..7 => Fault::Part,
            7 => Fault::Stop,
            _ => Fault::CrashBackend,
        }
    }

    pub fn by_name(name: &str) -> Fault {
        let is_it = |fault: &&Fault| format!("{fault:?}").eq_ignore_ascii_case(name);
        let fault = ALL.iter().find(is_it);
        *fault.unwrap_or_else(|| panic!("no fault is called {name:?}; there are {ALL:?}"))
    }
}

/// Of one safekeeper, from before the failover to after it.
#[derive(Clone, Copy, Debug)]
pub enum SafekeeperFault {
    Kill(usize),
    Pause(usize),
}

impl SafekeeperFault {
    /// In one cycle out of three.
    pub fn choose(random: &mut fastrand::Rng) -> Option<SafekeeperFault> {
        let safekeeper = random.usize(..3);
        match random.u32(..6) {
            0 => Some(SafekeeperFault::Kill(safekeeper)),
            1 => Some(SafekeeperFault::Pause(safekeeper)),
            _ => None,
        }
    }
}

impl Hosts {
    /// It begins.
    pub fn strike(&mut self, fault: Fault) {
        match fault {
            Fault::Kill => self.cluster.primary.kill9(),
            Fault::Pause => self.cluster.primary.process().pause(),
            Fault::Part => self.primary_links().iter().for_each(Link::cut_both),
            Fault::Stop => self.cluster.primary.stop(Stop::Fast),
            Fault::CrashBackend => self.kill_backend(),
        }
    }

    /// It ends, after the failover. The old primary is down then, whatever has to be done for it.
    pub fn lift(&mut self, fault: Fault) {
        match fault {
            Fault::Kill | Fault::Stop | Fault::CrashBackend => {}
            Fault::Pause => self.cluster.primary.process().resume(),
            Fault::Part => self.primary_links().iter().for_each(Link::heal),
        }
        if matches!(fault, Fault::Pause | Fault::Part) {
            let name = self.cluster.primary.name().to_owned();
            wait_until(&format!("{name}, deposed, stops by itself"), SOON, || {
                self.cluster.primary.ended()
            });
            self.cluster.primary.take_ended();
            let log = self.cluster.primary.log_since_start();
            let why = "stopping this server immediately";
            assert!(log.contains(why), "{name} ended for another reason:\n{log}");
        }
    }

    pub fn kill_backend(&self) {
        let mut victim = self.cluster.primary.client();
        let pid: i32 = victim
            .query_one("select pg_backend_pid()", &[])
            .expect("it answers")
            .get(0);
        signal_descendant(pid.unsigned_abs(), libc::SIGKILL);
    }

    pub fn harm(&mut self, fault: SafekeeperFault) {
        self.harmed = Some(fault);
        match fault {
            SafekeeperFault::Kill(i) => self.cluster.safekeepers[i].kill9(),
            SafekeeperFault::Pause(i) => self.cluster.safekeepers[i].process().pause(),
        }
    }

    pub fn mend(&mut self) {
        match self.harmed.take() {
            None => {}
            Some(SafekeeperFault::Kill(i)) => self.cluster.safekeepers[i].start(),
            Some(SafekeeperFault::Pause(i)) => self.cluster.safekeepers[i].process().resume(),
        }
    }
}

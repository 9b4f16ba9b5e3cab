//! The old primary comes back as a standby, in the cheapest way that it can.
//!
//! It is asked itself: a start as a primary must be refused, and the refusal says what to do. As it
//! is, if all of its log is the quorum's; by pg_rewind, which fetches from the safekeepers what its
//! own pg_wal does not hold any more; and if that fails by a new base backup, which is counted, with
//! the reason.

use std::fmt;
use std::process::Command;

use cluster_tests::place::Programs;
use cluster_tests::process::run;

use crate::hosts::Hosts;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    AsItIs,
    Rewound,
    /// And why not otherwise.
    BaseBackup(String),
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Way::AsItIs => f.write_str("as it is"),
            Way::Rewound => f.write_str("by pg_rewind"),
            Way::BaseBackup(why) => write!(f, "by a new base backup: {why}"),
        }
    }
}

impl Hosts {
    /// The promoted standby is the primary from here on, and the old primary, which is down, its
    /// standby.
    pub fn rejoin(&mut self) -> Way {
        self.swap();
        let log = self.standby_mut().start_refused();
        let way = if log.contains("create \"standby.signal\"") {
            Way::AsItIs
        } else if log.contains("Run pg_rewind") {
            self.rewind()
        } else {
            Way::BaseBackup(last_line(&log))
        };
        if let Way::BaseBackup(_) = way {
            self.rebuild_standby();
        }
        self.start_standby();
        self.wait_standby_follows();
        way
    }

    fn rewind(&mut self) -> Way {
        let restore = format!(
            "restore_command = '{} fetch-wal --from {} %f %p'",
            Programs::safekeeper().display(),
            self.safekeeper_list()
        );
        self.standby().configure(&restore);
        // Before PostgreSQL 16 it takes the source's timeline from the control file, where the end
        // of recovery has not put it yet.
        self.primary().sql("checkpoint");
        let mut command = Command::new(Programs::postgres("pg_rewind"));
        command.arg("--target-pgdata").arg(self.standby().data());
        command.arg("--source-server").arg(format!(
            "host={} port=5432 user=postgres dbname=postgres",
            self.primary().socket_dir().display()
        ));
        command.arg("--restore-target-wal");
        match run(command) {
            (true, _) => Way::Rewound,
            (false, text) => Way::BaseBackup(last_line(&text)),
        }
    }
}

fn last_line(text: &str) -> String {
    let last = text.lines().rev().find(|line| !line.trim().is_empty());
    last.unwrap_or("nothing was said").to_owned()
}

//! `pg_receivewal --synchronous`: the member of stock synchronous replication that stores WAL only.
//!
//! It has a slot, as whoever wants to lose no WAL gives it one. `--synchronous` makes it flush as
//! soon as it has written, and answer. It removes nothing, so the bench does between runs.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use cluster_tests::place::{Programs, TestDir};
use cluster_tests::process::{Environment, Process};

pub struct Receiver {
    name: String,
    data: PathBuf,
    log: PathBuf,
    /// Of the primary, or of the link to it.
    source: SocketAddr,
    environment: Environment,
    process: Option<Process>,
}

impl Receiver {
    /// One that will connect there, to a slot of its own name.
    pub fn new(
        dir: &TestDir,
        name: &str,
        source: SocketAddr,
        environment: Environment,
    ) -> Receiver {
        Receiver {
            name: name.to_owned(),
            data: dir.create(name),
            log: dir.path().join(format!("{name}.log")),
            source,
            environment,
            process: None,
        }
    }

    pub fn start(&mut self) {
        let conninfo = format!(
            "host={} port={} user=postgres application_name={}",
            self.source.ip(),
            self.source.port(),
            self.name
        );
        let mut command = Command::new(Programs::postgres("pg_receivewal"));
        command.args(["--synchronous", "--no-loop", "--slot", &self.name]);
        command
            .args(["--dbname", &conninfo, "--directory"])
            .arg(&self.data);
        command.envs(self.environment.iter().cloned());
        self.process = Some(Process::start(&self.name, command, &self.log));
    }

    pub fn kill9(&mut self) {
        let process = self.process.take();
        process
            .expect("only a running receiver can be killed")
            .kill9();
    }

    pub fn runs(&self) -> bool {
        self.process.is_some()
    }

    pub fn process(&self) -> &Process {
        self.process.as_ref().expect("the receiver does not run")
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Removes the segments that it has finished. It looks at the last one only, when it starts.
    pub fn remove_old_wal(&self) {
        let entries = fs::read_dir(&self.data).expect("a receiver has a directory");
        let mut segments: Vec<_> = entries
            .map(|entry| entry.expect("our own directory").path())
            .filter(|path| path.extension().is_none())
            .collect();
        segments.sort();
        segments.pop();
        for segment in segments {
            fs::remove_file(segment).expect("our own file");
        }
    }
}

//! One safekeeper: a data directory with an address, and the daemon that runs on it now and then.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use safekeeper_protocol::Lsn;
use serde_json::Value;

use crate::place::{Programs, TestDir, unused_address};
use crate::poll::{SOON, wait_for};
use crate::process::{Environment, Process, run, run_ok};

/// A safekeeper's data directory and daemon.
pub struct Safekeeper {
    pub id: u64,
    name: String,
    data: PathBuf,
    log: PathBuf,
    listen: SocketAddr,
    http: SocketAddr,
    process: Option<Process>,
    environment: Environment,
    settings: Vec<String>,
}

impl Safekeeper {
    /// `safekeeper init`.
    pub fn init(dir: &TestDir, id: u64) -> Safekeeper {
        let name = format!("safekeeper{id}");
        let safekeeper = Safekeeper {
            id,
            data: dir.path().join(&name),
            log: dir.path().join(format!("{name}.log")),
            name,
            listen: unused_address(),
            http: unused_address(),
            process: None,
            environment: Environment::new(),
            settings: Vec::new(),
        };
        let mut command = Safekeeper::program();
        command
            .args(["init", "--id", &id.to_string(), "--data-dir"])
            .arg(&safekeeper.data);
        run_ok(command);
        safekeeper
    }

    /// Variables of the daemon, from its next start on.
    pub fn set_environment(&mut self, variables: Environment) {
        self.environment = variables;
    }

    /// Arguments of `safekeeper run`, from its next start on.
    pub fn set_settings(&mut self, arguments: &[&str]) {
        self.settings = arguments.iter().map(|text| (*text).to_owned()).collect();
    }

    /// The daemon's program, without arguments.
    pub fn program() -> Command {
        Command::new(Programs::safekeeper())
    }

    /// Starts the daemon and waits until it answers.
    #[track_caller]
    pub fn start(&mut self) {
        assert!(self.process.is_none(), "{} runs already", self.name);
        self.process = Some(Process::start(&self.name, self.run_command(), &self.log));
        let name = self.name.clone();
        wait_for(&format!("{name} answers"), SOON, || {
            let process = self.process.as_mut().expect("it was just started");
            if let Some(status) = process.ended() {
                panic!("{name} did not start: {status}\n{}", process.log());
            }
            self.status()
        });
    }

    /// `safekeeper run` with this one's directory and addresses.
    pub fn run_command(&self) -> Command {
        let mut command = Safekeeper::program();
        command.args(["run", "--listen", &self.listen.to_string()]);
        command
            .args(["--http", &self.http.to_string(), "--data-dir"])
            .arg(&self.data)
            .args(&self.settings);
        command.envs(self.environment.iter().cloned());
        command
    }

    /// A replication slot that keeps WAL from now on.
    #[track_caller]
    pub fn create_slot(&self, slot: &str) {
        let (ip, port) = (self.listen.ip(), self.listen.port());
        let mut command = Command::new(Programs::postgres("psql"));
        command.arg(format!(
            "host={ip} port={port} user=postgres replication=true"
        ));
        command.args(["--no-psqlrc", "--quiet", "--command"]);
        command.arg(format!(
            "CREATE_REPLICATION_SLOT {slot} PHYSICAL (RESERVE_WAL)"
        ));
        run_ok(command);
    }

    /// SIGTERM, and a clean end.
    #[track_caller]
    pub fn stop(&mut self) {
        let mut process = self
            .process
            .take()
            .expect("only a running daemon can be stopped");
        process.signal(libc::SIGTERM);
        let status = process.wait(SOON);
        assert!(
            status.success(),
            "{} ended with {status}:\n{}",
            self.name,
            process.log()
        );
    }

    pub fn kill9(&mut self) {
        self.process
            .take()
            .expect("only a running daemon can be killed")
            .kill9();
    }

    pub fn runs(&self) -> bool {
        self.process.is_some()
    }

    /// The running daemon.
    pub fn process(&self) -> &Process {
        self.process.as_ref().expect("the daemon does not run")
    }

    /// Where it takes and serves WAL.
    pub fn address(&self) -> SocketAddr {
        self.listen
    }

    pub fn http_address(&self) -> SocketAddr {
        self.http
    }

    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Where a cluster's segments lie.
    pub fn wal_dir(&self, system_id: u64) -> PathBuf {
        self.data.join(system_id.to_string()).join("wal")
    }

    /// `/v1/status`, or `None` if there is no answer.
    pub fn status(&self) -> Option<Value> {
        self.http_get("/v1/status").map(|(status, body)| {
            assert_eq!(status, 200, "{}: {body}", self.name);
            serde_json::from_str(&body).unwrap_or_else(|e| panic!("not JSON: {e}: {body}"))
        })
    }

    /// HTTP status and body, or `None` if there is no answer.
    pub fn http_get(&self, path: &str) -> Option<(u16, String)> {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(5)))
            .http_status_as_error(false)
            .build()
            .into();
        let mut response = agent
            .get(format!("http://{}{path}", self.http))
            .call()
            .ok()?;
        let body = response.body_mut().read_to_string().ok()?;
        Some((response.status().as_u16(), body))
    }

    /// What the status says about a cluster.
    pub fn cluster(&self, system_id: u64) -> Option<Value> {
        let status = self.status()?;
        let clusters = status["clusters"].as_array()?;
        let is_it = |cluster: &&Value| match &cluster["system_id"] {
            Value::String(text) => *text == system_id.to_string(),
            number => number.as_u64() == Some(system_id),
        };
        clusters.iter().find(is_it).cloned()
    }

    /// What the status says about a client that streams WAL from here.
    pub fn consumer(&self, system_id: u64, application_name: &str) -> Option<Value> {
        let cluster = self.cluster(system_id)?;
        let mut consumers = cluster["standbys"].as_array()?.iter();
        consumers
            .find(|consumer| consumer["application_name"] == application_name)
            .cloned()
    }

    /// What the status says about a replication slot.
    pub fn slot(&self, system_id: u64, name: &str) -> Option<Value> {
        let cluster = self.cluster(system_id)?;
        let mut slots = cluster["slots"].as_array()?.iter();
        slots.find(|slot| slot["slot_name"] == name).cloned()
    }

    /// A position from the status, such as `flush_lsn`; 0/0 if it is not known.
    #[track_caller]
    pub fn lsn(&self, system_id: u64, field: &str) -> Lsn {
        let cluster = self.cluster(system_id).unwrap_or(Value::Null);
        let text = cluster[field].as_str();
        text.map_or(Lsn(0), |text| {
            text.parse()
                .unwrap_or_else(|_| panic!("not an LSN: {text}"))
        })
    }

    /// `safekeeper verify`: whether it passes, and what it says.
    pub fn verify(&self) -> (bool, String) {
        let mut command = Safekeeper::program();
        command.args(["verify", "--data-dir"]).arg(&self.data);
        run(command)
    }
}

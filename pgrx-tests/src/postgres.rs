//! One Postgres: a data directory, and the server that runs on it now and then.
//!
//! It listens on a Unix socket only, in a directory of its own, so every one has port 5432. The
//! server is our own child, started without pg_ctl: its end can be waited for, and "kill -9" means
//! the whole tree, as when a host loses its power.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use postgres::{Client, NoTls, SimpleQueryMessage};
use safekeeper_protocol::Lsn;
use safekeeper_wal::segment_name::{SegmentSize, segment_file_name};

use crate::place::{Programs, TestDir, copy_tree, give_to_server_user};
use crate::poll::{SOON, wait_for};
use crate::process::{Environment, Process, run_ok};

/// A data directory with its server, if that runs. See the head of this file.
pub struct Postgres {
    name: String,
    data: PathBuf,
    sockets: PathBuf,
    log: PathBuf,
    process: Option<Process>,
    /// Length of the log when the server was last started.
    log_before: usize,
    environment: Environment,
}

/// How to stop a server, as `pg_ctl stop -m` says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    Smart,
    Fast,
    Immediate,
}

impl Stop {
    fn ask(self, process: &Process) {
        process.signal(match self {
            Stop::Smart => libc::SIGTERM,
            Stop::Fast => libc::SIGINT,
            Stop::Immediate => libc::SIGQUIT,
        });
    }
}

impl Postgres {
    /// `initdb`, with more arguments if need be, and the settings that every test wants.
    pub fn init(dir: &TestDir, name: &str, initdb: &[&str]) -> Postgres {
        let postgres = Postgres::at(dir, name);
        let mut command = Command::new(Programs::postgres("initdb"));
        command.arg("--pgdata").arg(&postgres.data);
        command.args([
            "--auth=trust",
            "--username=postgres",
            "--no-sync",
            "--encoding=UTF8",
        ]);
        run_ok({
            command.args(["--locale=C"]).args(initdb);
            command
        });
        postgres.configure(BASE_SETTINGS);
        postgres.configure(&format!(
            "unix_socket_directories = '{}'",
            postgres.sockets.display()
        ));
        postgres
    }

    /// A copy of another one's files as they are now. The other should stand still.
    pub fn copy_of(other: &Postgres, dir: &TestDir, name: &str) -> Postgres {
        let copy = Postgres::at(dir, name);
        copy_tree(&other.data, &copy.data);
        // Else it takes the other one for a server that runs on these files.
        let _ = fs::remove_file(copy.data.join("postmaster.pid"));
        copy.configure(&format!(
            "unix_socket_directories = '{}'",
            copy.sockets.display()
        ));
        copy
    }

    /// `pg_basebackup` from a running server, without WAL: where that comes from is to be set.
    pub fn base_backup_of(other: &Postgres, dir: &TestDir, name: &str) -> Postgres {
        let backup = Postgres::at(dir, name);
        backup.back_up(other, "none");
        backup
    }

    /// The same with the WAL that it needs, streamed beside it.
    pub fn base_backup_with_wal_of(other: &Postgres, dir: &TestDir, name: &str) -> Postgres {
        let backup = Postgres::at(dir, name);
        backup.back_up(other, "stream");
        backup
    }

    /// The first in place of what is here. The server is down.
    pub fn rebuild_from(&self, other: &Postgres) {
        fs::remove_dir_all(&self.data).expect("our own files");
        self.back_up(other, "none");
    }

    fn back_up(&self, other: &Postgres, wal_method: &str) {
        let mut command = other.program("pg_basebackup");
        command.arg("--pgdata").arg(&self.data);
        command.args(["--wal-method", wal_method]);
        command.args(["--checkpoint=fast", "--no-sync"]);
        run_ok(command);
        self.configure(&format!(
            "unix_socket_directories = '{}'",
            self.sockets.display()
        ));
    }

    fn at(dir: &TestDir, name: &str) -> Postgres {
        Postgres {
            name: name.to_owned(),
            data: dir.path().join(name),
            sockets: dir.create(&format!("{name}.s")),
            log: dir.path().join(format!("{name}.log")),
            process: None,
            log_before: 0,
            environment: Environment::new(),
        }
    }

    /// Variables of the server, from its next start on.
    pub fn set_environment(&mut self, variables: Environment) {
        self.environment = variables;
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn data(&self) -> &Path {
        &self.data
    }

    pub fn wal_dir(&self) -> PathBuf {
        self.data.join("pg_wal")
    }

    /// What `host` is in a connection string.
    pub fn socket_dir(&self) -> &Path {
        &self.sockets
    }

    /// A disk that lied, or was never asked to flush: this WAL, of timeline 1 and in segments of 16 MB,
    /// is zeros now.
    fn lose_wal(&self, begin: Lsn, end: Lsn) {
        let size = u64::from(SegmentSize::DEFAULT.bytes());
        for segno in begin.0 / size..=(end.0 - 1) / size {
            let name = segment_file_name(1, segno, SegmentSize::DEFAULT);
            let from = begin.0.max(segno * size) - segno * size;
            let to = end.0.min((segno + 1) * size) - segno * size;
            let file = OpenOptions::new()
                .write(true)
                .open(self.wal_dir().join(&name));
            let file = file.unwrap_or_else(|e| panic!("{name}: {e}"));
            file.write_all_at(&vec![0; (to - from) as usize], from)
                .expect("written");
            file.sync_all().expect("fsynced");
        }
    }

    /// Starts a server whose disk has lost this WAL, and which must fetch it from the safekeepers.
    #[track_caller]
    pub fn start_without_wal(&mut self, begin: Lsn, end: Lsn) {
        self.lose_wal(begin, end);
        self.start();
        let log = self.log_since_start();
        assert!(
            log.contains("that the local disk had lost were fetched"),
            "{log}"
        );
    }

    /// Adds lines to postgresql.conf; a later line for the same name wins. In effect from the
    /// next start or reload.
    pub fn configure(&self, lines: &str) {
        let path = self.data.join("postgresql.conf");
        let mut text = fs::read_to_string(&path).expect("a data directory has a configuration");
        writeln!(text, "{lines}").expect("a string takes all");
        fs::write(&path, text).expect("could not write a configuration");
    }

    /// Gets WAL by `safekeeper fetch-wal`, from those that the extension has named.
    pub fn restore_by_fetch_wal(&self) {
        let program = Programs::safekeeper();
        self.configure(&format!(
            "restore_command = '{} fetch-wal %f %p'",
            program.display()
        ));
        self.configure("wal_retrieve_retry_interval = '200ms'");
    }

    /// Creates an empty file in the data directory, such as standby.signal.
    pub fn touch(&self, name: &str) {
        let path = self.data.join(name);
        fs::write(&path, "").expect("could not write into the data directory");
        give_to_server_user(&path);
    }

    /// Starts the server and waits until it answers.
    #[track_caller]
    pub fn start(&mut self) {
        self.start_without_waiting();
        let name = self.name.clone();
        wait_for(&format!("{name} answers"), SOON, || {
            let process = self.process.as_mut().expect("it was just started");
            if let Some(status) = process.ended() {
                panic!("{name} did not start: {status}\n{}", self.log_since_start());
            }
            self.try_client().ok()
        });
    }

    pub fn start_without_waiting(&mut self) {
        assert!(self.process.is_none(), "{} runs already", self.name);
        // They carry the process id of a dead server, which another process may have by now.
        for file in fs::read_dir(&self.sockets)
            .expect("our own directory")
            .flatten()
        {
            let _ = fs::remove_file(file.path());
        }
        self.log_before = self.log().len();
        let mut command = Command::new(Programs::postgres("postgres"));
        command.arg("-D").arg(&self.data);
        command.envs(self.environment.iter().cloned());
        self.process = Some(Process::start(&self.name, command, &self.log));
    }

    /// Starts a server that must refuse to, and returns what it says.
    #[track_caller]
    pub fn start_refused(&mut self) -> String {
        self.start_without_waiting();
        let mut process = self.process.take().expect("it was just started");
        let status = process.wait(SOON);
        let log = self.log_since_start();
        assert!(
            !status.success(),
            "{} ended without an error:\n{log}",
            self.name
        );
        log
    }

    #[track_caller]
    pub fn stop(&mut self, how: Stop) {
        let mut process = self
            .process
            .take()
            .expect("only a running server can be stopped");
        how.ask(&process);
        process.wait(SOON);
    }

    /// Asks for a stop, and does not wait for it: see [`Postgres::ended`].
    pub fn begin_stop(&self, how: Stop) {
        how.ask(self.process());
    }

    /// Waits for the end of a server that was asked to stop.
    #[track_caller]
    pub fn wait_ended(&mut self, limit: Duration) {
        let mut process = self.process.take().expect("it was running");
        process.wait(limit);
    }

    pub fn kill9(&mut self) {
        self.process
            .take()
            .expect("only a running server can be killed")
            .kill9();
    }

    /// The running server.
    pub fn process(&self) -> &Process {
        self.process.as_ref().expect("the server does not run")
    }

    /// It was started, and neither stopped nor killed.
    pub fn is_started(&self) -> bool {
        self.process.is_some()
    }

    /// Has it ended, or never been started?
    pub fn ended(&mut self) -> bool {
        self.process
            .as_mut()
            .is_none_or(|process| process.ended().is_some())
    }

    /// It has ended by itself: it may be started again.
    #[track_caller]
    pub fn take_ended(&mut self) {
        assert!(self.ended(), "{} runs", self.name);
        self.process = None;
    }

    pub fn reload(&self) {
        self.process().signal(libc::SIGHUP);
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    pub fn log_since_start(&self) -> String {
        let log = self.log();
        log.get(self.log_before..).unwrap_or(&log).to_owned()
    }

    /// How to connect, for threads of their own.
    pub fn config(&self) -> postgres::Config {
        let mut config = postgres::Config::new();
        config
            .host_path(&self.sockets)
            .port(5432)
            .user("postgres")
            .dbname("postgres");
        config.connect_timeout(SOON);
        config
    }

    pub fn try_client(&self) -> Result<Client, postgres::Error> {
        self.config().connect(NoTls)
    }

    #[track_caller]
    pub fn client(&self) -> Client {
        self.try_client()
            .unwrap_or_else(|e| panic!("could not connect to {}: {}", self.name, describe(&e)))
    }

    /// Runs statements, returns the rows of the last one that returned any, all values as text.
    #[track_caller]
    pub fn sql(&self, statements: &str) -> Vec<Row> {
        match self.try_sql(statements) {
            Ok(rows) => rows,
            Err(error) => panic!("{}: {statements}: {}", self.name, describe(&error)),
        }
    }

    pub fn try_sql(&self, statements: &str) -> Result<Vec<Row>, postgres::Error> {
        text_rows(&mut self.try_client()?, statements)
    }

    /// The only value of the only row; NULL is the empty string.
    #[track_caller]
    pub fn value(&self, query: &str) -> String {
        let rows = self.sql(query);
        assert!(
            rows.len() == 1 && rows[0].len() == 1,
            "not one value: {query}: {rows:?}"
        );
        rows.into_iter()
            .flatten()
            .next()
            .flatten()
            .unwrap_or_default()
    }

    #[track_caller]
    pub fn lsn(&self, query: &str) -> Lsn {
        let text = self.value(query);
        text.parse()
            .unwrap_or_else(|_| panic!("not an LSN: {text:?} from {query}"))
    }

    /// End of the WAL this server flushed.
    #[track_caller]
    pub fn flush_lsn(&self) -> Lsn {
        self.lsn("select pg_current_wal_flush_lsn()")
    }

    /// End of the WAL that this standby has replayed.
    #[track_caller]
    pub fn replay_lsn(&self) -> Lsn {
        self.lsn("select coalesce(pg_last_wal_replay_lsn(), '0/0')")
    }

    /// One of Postgres's programs, told where this server is.
    pub fn program(&self, name: &str) -> Command {
        let mut command = Command::new(Programs::postgres(name));
        command.env("PGHOST", &self.sockets).env("PGPORT", "5432");
        command
            .env("PGUSER", "postgres")
            .env("PGDATABASE", "postgres");
        command
    }

    /// Creates pgbench's tables.
    #[track_caller]
    pub fn pgbench_init(&self, scale: u32) {
        let mut command = self.program("pgbench");
        command.args(["--initialize", "--quiet", "--scale", &scale.to_string()]);
        run_ok(command);
    }

    /// Runs pgbench, returns transactions per second.
    #[track_caller]
    pub fn pgbench(&self, clients: u32, time: Duration) -> f64 {
        let output = run_ok(self.pgbench_command(clients, time));
        let tps = output.lines().find_map(|line| line.strip_prefix("tps = "));
        let tps = tps.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
        tps.unwrap_or_else(|| panic!("no tps in pgbench's output:\n{output}"))
    }

    /// The command for it, for those who want to start it and do other things meanwhile.
    pub fn pgbench_command(&self, clients: u32, time: Duration) -> Command {
        let mut command = self.program("pgbench");
        command.args(["--no-vacuum", "--client", &clients.to_string()]);
        command.args(["--jobs", "2", "--time", &time.as_secs().to_string()]);
        command
    }

    /// A line of `pg_controldata`, by what stands before the colon.
    #[track_caller]
    pub fn control_data(&self, name: &str) -> String {
        let mut command = self.program("pg_controldata");
        command.arg(&self.data).env("LC_ALL", "C");
        let output = run_ok(command);
        let line = output.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            (found == name).then(|| value.trim().to_owned())
        });
        line.unwrap_or_else(|| panic!("no {name:?} in:\n{output}"))
    }

    /// The background worker of the extension, if it runs.
    pub fn worker(&self) -> Option<u32> {
        self.process()
            .children_named("walproposer")
            .first()
            .copied()
    }
}

/// A row of text values, `None` for NULL.
pub type Row = Vec<Option<String>>;

/// Runs statements on a connection of the caller's. See [`Postgres::sql`].
pub fn text_rows(client: &mut Client, statements: &str) -> Result<Vec<Row>, postgres::Error> {
    let mut rows = Vec::new();
    for message in client.simple_query(statements)? {
        match message {
            SimpleQueryMessage::RowDescription(_) => rows.clear(),
            SimpleQueryMessage::Row(row) => {
                rows.push(
                    (0..row.len())
                        .map(|i| row.get(i).map(str::to_owned))
                        .collect(),
                );
            }
            _ => {}
        }
    }
    Ok(rows)
}

/// The library's own text is "db error" for whatever the server said.
pub fn describe(error: &postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => format!("{}: {} ({})", db.severity(), db.message(), db.code().code()),
        None => format!("{error:?}"),
    }
}

/// Small, so that many servers fit on one machine; nothing that weakens durability.
const BASE_SETTINGS: &str = "
listen_addresses = ''
port = 5432
max_connections = 50
shared_buffers = 64MB
max_wal_senders = 10
wal_keep_size = 0
log_line_prefix = '%m [%p] %b '
";

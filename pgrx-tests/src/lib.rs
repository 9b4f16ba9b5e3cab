//! Tests on real Postgres and real safekeepers: what a test can say.
//!
//! ```text
//!   Cluster ── Postgres      initdb, start, stop, kill -9, SQL, pgbench
//!      │  └─── Safekeeper ×3 init, run, kill -9, status
//!      │            ▲
//!      │          Link       delays, cuts, heals
//!      └────── TestDir       removed, or kept with its logs when the test fails
//! ```
//!
//! A test's first lines tell its story. It waits for conditions, never for a time ([`poll`]), looks
//! at the cluster as an operator does (SQL, the daemon's status, files), and leaves no process
//! behind. The programs under test are named by `SAFEKEEPER_BIN` and `PG_BINDIR`;
//! `scripts/cluster-tests` builds them and sets both.

pub mod ledger;
pub mod link;
pub mod place;
pub mod poll;
pub mod postgres;
pub mod process;
pub mod readers;
pub mod safekeeper;
pub mod slow_disk;
pub mod wal_compare;
pub mod walsender;

use std::net::SocketAddr;
use std::time::Duration;

use safekeeper_protocol::Lsn;

use crate::place::TestDir;
use crate::poll::{SOON, wait_for, wait_until};
use crate::postgres::Postgres;
use crate::safekeeper::Safekeeper;
use crate::wal_compare::WalDir;

/// Three safekeepers and a primary that commits on them.
///
/// Fields are dropped in this order: the processes end before their files go.
pub struct Cluster {
    pub primary: Postgres,
    pub safekeepers: Vec<Safekeeper>,
    pub system_id: u64,
    /// As whom consumers come, in libpq's words.
    pub consumer: String,
    pub dir: TestDir,
}

impl Cluster {
    /// All up, the extension created, the worker elected.
    pub fn start() -> Cluster {
        Cluster::start_with("", &[])
    }

    /// The same with more lines of postgresql.conf and more arguments of initdb.
    pub fn start_with(settings: &str, initdb: &[&str]) -> Cluster {
        let mut cluster = Cluster::prepare(initdb);
        cluster.primary.configure(settings);
        cluster.start_all();
        cluster
    }

    /// Safekeepers and primary initialised and configured, none started.
    pub fn prepare(initdb: &[&str]) -> Cluster {
        Cluster::prepare_named("primary", initdb)
    }

    /// The same with a primary of another name: it may not be the primary for long.
    pub fn prepare_named(name: &str, initdb: &[&str]) -> Cluster {
        let dir = TestDir::new();
        let safekeepers: Vec<_> = (1..=3).map(|id| Safekeeper::init(&dir, id)).collect();
        let primary = Postgres::init(&dir, name, initdb);
        primary.configure("shared_preload_libraries = 'walproposer'");
        let addresses = safekeepers.iter().map(Safekeeper::address);
        primary.configure(&safekeepers_setting(addresses));
        // The death of a peer is noticed sooner than an operator would want; tests have less time.
        primary.configure("walproposer.member_timeout = '5s'");
        let system_id = system_id(&primary);
        Cluster {
            primary,
            safekeepers,
            system_id,
            consumer: "user=postgres".to_owned(),
            dir,
        }
    }

    /// Starts what was prepared, and waits until all members follow.
    #[track_caller]
    pub fn start_all(&mut self) {
        self.safekeepers.iter_mut().for_each(Safekeeper::start);
        self.primary.start();
        self.primary.sql("create extension walproposer");
        self.wait_streaming(3);
    }

    /// A hot standby made of a base backup of the primary, fed by any of the safekeepers.
    #[track_caller]
    pub fn start_standby(&self, name: &str) -> Postgres {
        self.start_standby_of(&self.primary, name)
    }

    /// The same of any primary.
    #[track_caller]
    pub fn start_standby_of(&self, primary: &Postgres, name: &str) -> Postgres {
        let mut standby = Postgres::base_backup_of(primary, &self.dir, name);
        self.follow_safekeepers(&standby);
        standby.start();
        standby
    }

    /// From its next start on this server is a standby, fed by any of the safekeepers.
    pub fn follow_safekeepers(&self, standby: &Postgres) {
        standby.configure(&format!(
            "primary_conninfo = '{}'",
            self.conninfo(standby.name())
        ));
        standby.configure("wal_retrieve_retry_interval = '200ms'");
        standby.touch("standby.signal");
    }

    /// How a client of that name reaches any of the safekeepers, in libpq's words.
    pub fn conninfo(&self, application_name: &str) -> String {
        let list = |part: fn(&Safekeeper) -> String| {
            let parts: Vec<_> = self.safekeepers.iter().map(part).collect();
            parts.join(",")
        };
        format!(
            "host={} port={} {} application_name={application_name}",
            list(|s| s.address().ip().to_string()),
            list(|s| s.address().port().to_string()),
            self.consumer
        )
    }

    /// Waits until a client of that name streams from a safekeeper, and says from which.
    #[track_caller]
    pub fn wait_source_of(&self, application_name: &str) -> usize {
        let what = format!("{application_name} streams from a safekeeper");
        let streams = |s: &Safekeeper| s.consumer(self.system_id, application_name).is_some();
        wait_for(&what, SOON, || self.safekeepers.iter().position(streams))
    }

    /// Waits until a safekeeper has heard from that client that it flushed what is before `lsn`.
    #[track_caller]
    pub fn wait_flushed_by(&self, application_name: &str, lsn: Lsn) {
        let what = format!("{application_name} has flushed {lsn}");
        let flushed = |s: &Safekeeper| {
            let consumer = s.consumer(self.system_id, application_name)?;
            consumer["flush_lsn"].as_str()?.parse::<Lsn>().ok()
        };
        wait_until(&what, SOON, || {
            let flushed = self.safekeepers.iter().filter_map(flushed).max();
            flushed >= Some(lsn)
        });
    }

    /// Waits until that many members are active in the view.
    #[track_caller]
    pub fn wait_streaming(&self, members: usize) {
        let what = format!("{members} members active");
        wait_until(&what, SOON, || self.members_active() == Some(members));
    }

    /// What the view says of it; `None` while it can't be asked, or there is no reign.
    pub fn members_active(&self) -> Option<usize> {
        let rows = self
            .primary
            .try_sql("select members_active from pg_stat_walproposer");
        rows.ok()?.first()?.first()?.as_deref()?.parse().ok()
    }

    /// Waits until every running safekeeper has all that the primary flushed, and knows that it
    /// is committed. Returns that position.
    #[track_caller]
    pub fn wait_all_caught_up(&self, limit: Duration) -> Lsn {
        let lsn = self.primary.flush_lsn();
        for safekeeper in self.safekeepers.iter().filter(|s| s.runs()) {
            wait_until(
                &format!("safekeeper {} has {lsn} committed", safekeeper.id),
                limit,
                || safekeeper.lsn(self.system_id, "commit_lsn") >= lsn,
            );
        }
        lsn
    }

    /// The WAL of the primary and of a safekeeper.
    pub fn wal_dirs(&self, safekeeper: &Safekeeper) -> (WalDir, WalDir) {
        let theirs = WalDir::new(safekeeper.wal_dir(self.system_id));
        (WalDir::new(self.primary.wal_dir()), theirs)
    }

    /// Panics unless every running safekeeper holds the same bytes as pg_wal, from where both
    /// begin up to `end`, and passes `verify`.
    #[track_caller]
    pub fn assert_wal_equal(&self, end: Lsn) {
        for safekeeper in self.safekeepers.iter().filter(|s| s.runs()) {
            let (ours, theirs) = self.wal_dirs(safekeeper);
            ours.assert_equal(&theirs, ours.begin().max(theirs.begin()), end);
            let (ok, report) = safekeeper.verify();
            assert!(ok, "verify of safekeeper {}:\n{report}", safekeeper.id);
        }
    }

    /// One column of one member's row in `pg_stat_safekeeper`, found by its port: who listens
    /// there may not be known yet.
    #[track_caller]
    pub fn member(&self, id: u64, column: &str) -> String {
        let port = self.safekeepers[id as usize - 1].address().port();
        self.primary.value(&format!(
            "select {column} from pg_stat_safekeeper where port = {port}"
        ))
    }

    /// Waits until so many commits wait for the quorum: their WAL is written and flushed here.
    #[track_caller]
    pub fn wait_commits_waiting(&self, commits: u32) {
        let query = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'";
        let what = format!("{commits} commits wait for the quorum");
        wait_until(&what, SOON, || {
            self.primary.value(query) == commits.to_string()
        });
    }

    /// Runs a statement on a connection of its own, in the background: it may take for ever.
    pub fn commit_in_background(&self, statement: &str) -> BackgroundCommit {
        self.commit_in_background_with("", statement)
    }

    /// The same for a statement that must be sent by itself, after settings.
    pub fn commit_in_background_with(&self, settings: &str, statement: &str) -> BackgroundCommit {
        BackgroundCommit::start_with(
            self.primary.config(),
            settings.to_owned(),
            statement.to_owned(),
        )
    }
}

/// A statement under way on a connection of its own.
pub struct BackgroundCommit {
    thread: std::thread::JoinHandle<Result<(), ::postgres::Error>>,
}

impl BackgroundCommit {
    pub fn start(config: ::postgres::Config, statement: String) -> BackgroundCommit {
        BackgroundCommit::start_with(config, String::new(), statement)
    }

    fn start_with(
        config: ::postgres::Config,
        settings: String,
        statement: String,
    ) -> BackgroundCommit {
        let thread = std::thread::spawn(move || {
            let mut client = config.connect(::postgres::NoTls)?;
            client.batch_execute(&settings)?;
            client.batch_execute(&statement)
        });
        BackgroundCommit { thread }
    }

    /// Whether an answer came, a good or a bad one.
    pub fn answered(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the answer.
    #[track_caller]
    pub fn wait(self, limit: Duration) -> Result<(), ::postgres::Error> {
        wait_until("the commit is answered", limit, || self.answered());
        self.thread.join().expect("the thread does not panic")
    }
}

/// The line of postgresql.conf.
pub fn safekeepers_setting(addresses: impl IntoIterator<Item = SocketAddr>) -> String {
    let addresses: Vec<_> = addresses.into_iter().map(|a| a.to_string()).collect();
    format!("walproposer.safekeepers = '{}'", addresses.join(","))
}

/// From pg_controldata, so that the server need not run.
pub fn system_id(postgres: &Postgres) -> u64 {
    let mut command = postgres.program("pg_controldata");
    command.arg(postgres.data()).env("LC_ALL", "C");
    let output = process::run_ok(command);
    let line = output
        .lines()
        .find_map(|l| l.strip_prefix("Database system identifier:"));
    let id = line.and_then(|rest| rest.trim().parse().ok());
    id.unwrap_or_else(|| panic!("no system identifier in:\n{output}"))
}

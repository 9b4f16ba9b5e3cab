//! What is compared: the same server three times, and who has to have its WAL before a commit is
//! acknowledged.
//!
//! ```text
//!   local-only   nobody
//!   stock        ANY 2 of three pg_receivewal --synchronous, with slots
//!   ours         two of three safekeepers
//!   from files   the same, with walproposer.read_wal_buffers off
//! ```
//!
//! Each has a cluster of its own, all side by side; those that are not measured are idle. Server
//! settings are the same but for what makes the setup. Receivers and safekeepers are reached by
//! TCP, pgbench comes by the Unix socket.
//!
//! On *one machine* everything lies on the disk of /tmp. As *emulated hosts* everything lies on
//! tmpfs, and each host has a disk whose flushes last as long as we say ([`SlowDisk`]); the link to
//! each member may have a round trip ([`SlowLink`]). Both are zero to begin with.
//!
//! When a setup has started it has been seen to wait: with two members dead a commit is not
//! answered until they are back.

use std::fmt::{self, Display};
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;
use std::{fs, thread};

use cluster_tests::BackgroundCommit;
use cluster_tests::place::{TestDir, unused_address};
use cluster_tests::poll::{SOON, never_within, wait_until};
use cluster_tests::postgres::Postgres;
use cluster_tests::process::{Environment, Process};
use cluster_tests::safekeeper::Safekeeper;
use cluster_tests::safekeepers_setting;

use crate::options::Options;
use crate::processes::CpuTimes;
use crate::receiver::Receiver;
use crate::slow_link::SlowLink;
use cluster_tests::slow_disk::SlowDisk;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Local,
    Stock,
    Ours,
    OursFromFiles,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Local => "local",
            Kind::Stock => "stock",
            Kind::Ours => "ours",
            Kind::OursFromFiles => "files",
        }
    }
}

impl Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Kind, Self::Err> {
        let all = [Kind::Local, Kind::Stock, Kind::Ours, Kind::OursFromFiles];
        let found = all.into_iter().find(|kind| kind.name() == name);
        found.ok_or("one of local, stock, ours, files")
    }
}

/// Where the hosts are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hosts {
    /// All on this machine and its disk, as they are.
    OneMachine,
    /// Each with a disk of its own, all in one place.
    Emulated,
    /// The same, members at the other end of a link.
    Apart,
}

/// All setups that were asked for.
pub struct Setups {
    setups: Vec<Setup>,
    dir: TestDir,
}

impl Setups {
    /// All up, with pgbench's tables, and seen to wait for their members.
    pub fn start(options: &Options, kinds: &[Kind], hosts: Hosts) -> Setups {
        let dir = match hosts {
            Hosts::OneMachine => TestDir::new(),
            Hosts::Emulated | Hosts::Apart => TestDir::new_in(Path::new(MEMORY)),
        };
        let start = |kind: &Kind| {
            eprintln!("starting {kind} ({hosts:?})");
            let setup = Setup::start(*kind, &dir, hosts);
            setup.primary.pgbench_init(options.scale);
            setup
        };
        let setups = kinds.iter().map(start).collect();
        Setups { setups, dir }
    }

    /// If it was asked for.
    pub fn get(&mut self, kind: Kind) -> Option<&mut Setup> {
        self.setups.iter_mut().find(|setup| setup.kind == kind)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Setup> {
        self.setups.iter()
    }

    pub fn dir(&self) -> &TestDir {
        &self.dir
    }
}

/// A file system without a disk.
pub const MEMORY: &str = "/dev/shm";

/// A primary and its members. Fields are dropped in this order.
pub struct Setup {
    pub kind: Kind,
    pub primary: Postgres,
    pub members: Vec<Member>,
    /// `None` on one machine.
    disk: Option<SlowDisk>,
    /// Where the primary listens by TCP, if it does.
    listen: Option<SocketAddr>,
}

/// Who stores WAL.
pub struct Member {
    program: Program,
    /// `None` on one machine.
    pub disk: Option<SlowDisk>,
    pub link: Option<SlowLink>,
}

enum Program {
    Receiver(Receiver),
    Safekeeper(Safekeeper),
}

impl Setup {
    fn start(kind: Kind, dir: &TestDir, hosts: Hosts) -> Setup {
        let name = kind.name();
        let mut primary = Postgres::init(dir, name, &[]);
        primary.configure(SETTINGS);
        let disk = (hosts != Hosts::OneMachine).then(|| SlowDisk::new(dir, name));
        if let Some(disk) = &disk {
            primary.set_environment(disk.environment());
        }
        let mut setup = Setup {
            kind,
            primary,
            members: Vec::new(),
            disk,
            listen: None,
        };
        match kind {
            Kind::Local => setup.primary.start(),
            Kind::Stock => setup.start_stock(dir, hosts),
            Kind::Ours | Kind::OursFromFiles => setup.start_ours(dir, hosts),
        }
        if kind != Kind::Local {
            setup.assert_one_file_system();
            setup.assert_commits_wait();
        }
        setup
    }

    fn start_stock(&mut self, dir: &TestDir, hosts: Hosts) {
        // Postgres listens at one port on its socket and by TCP, and only this server listens.
        let listen = SocketAddr::new(unused_address().ip(), 5432);
        self.listen = Some(listen);
        let primary = &self.primary;
        primary.configure(&format!("listen_addresses = '{}'", listen.ip()));
        let names = [1, 2, 3].map(|id| format!("receiver{id}"));
        let list = names.join(", ");
        primary.configure(&format!("synchronous_standby_names = 'ANY 2 ({list})'"));
        let hba = primary.data().join("pg_hba.conf");
        let mut rules = fs::read_to_string(&hba).expect("initdb writes it");
        rules.push_str("host all all 127.0.0.0/8 trust\nhost replication all 127.0.0.0/8 trust\n");
        fs::write(&hba, rules).expect("our own file");
        self.primary.start();
        for name in names {
            let create = format!("select pg_create_physical_replication_slot('{name}', true)");
            self.primary.sql(&create);
            let link = (hosts == Hosts::Apart).then(|| SlowLink::to(listen));
            let source = link.as_ref().map_or(listen, SlowLink::address);
            let disk = (hosts != Hosts::OneMachine).then(|| SlowDisk::new(dir, &name));
            let receiver = Receiver::new(dir, &name, source, environment(disk.as_ref()));
            self.members.push(Member {
                program: Program::Receiver(receiver),
                disk,
                link,
            });
        }
        self.members.iter_mut().for_each(Member::start);
        self.wait_all_follow();
    }

    fn start_ours(&mut self, dir: &TestDir, hosts: Hosts) {
        // Two setups of this kind may lie in one directory, and safekeepers are named by their ids.
        let first = if self.kind == Kind::Ours { 1 } else { 11 };
        for id in first..first + 3 {
            let mut safekeeper = Safekeeper::init(dir, id);
            let disk = (hosts != Hosts::OneMachine)
                .then(|| SlowDisk::new(dir, &format!("safekeeper{id}")));
            safekeeper.set_environment(environment(disk.as_ref()));
            let link = (hosts == Hosts::Apart).then(|| SlowLink::to(safekeeper.address()));
            self.members.push(Member {
                program: Program::Safekeeper(safekeeper),
                disk,
                link,
            });
        }
        let addresses = self.members.iter().map(|member| match &member.program {
            Program::Safekeeper(safekeeper) => member
                .link
                .as_ref()
                .map_or(safekeeper.address(), SlowLink::address),
            Program::Receiver(_) => unreachable!("ours has safekeepers"),
        });
        let primary = &self.primary;
        primary.configure("shared_preload_libraries = 'walproposer'");
        primary.configure(&safekeepers_setting(addresses));
        if self.kind == Kind::OursFromFiles {
            primary.configure("walproposer.read_wal_buffers = off");
        }
        self.members.iter_mut().for_each(Member::start);
        self.primary.start();
        self.primary.sql("create extension walproposer");
        self.wait_all_follow();
    }

    fn assert_one_file_system(&self) {
        let device = |path: &Path| fs::metadata(path).expect("our own directory").dev();
        for member in &self.members {
            let (theirs, ours) = (device(&member.data()), device(self.primary.data()));
            assert_eq!(theirs, ours, "{} has another file system", member.name());
        }
    }

    /// Two members die, a commit waits; they come back, it is answered.
    fn assert_commits_wait(&mut self) {
        self.primary.sql("create table waits (i int)");
        self.members[..2].iter_mut().for_each(Member::kill9);
        let insert = "insert into waits values (1)".to_owned();
        let commit = BackgroundCommit::start(self.primary.config(), insert);
        let waiting = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'";
        wait_until("a commit waits for the quorum", SOON, || {
            self.primary.value(waiting) == "1"
        });
        let what = "a commit is answered without a quorum";
        never_within(what, Duration::from_millis(200), || commit.answered());
        self.members[..2].iter_mut().for_each(Member::start);
        commit.wait(SOON).expect("a commit that waited long enough");
        self.wait_all_follow();
    }

    pub fn wait_all_follow(&self) {
        let what = format!("all members of {} follow", self.kind);
        wait_until(&what, SOON, || self.all_follow());
    }

    /// Every member streams, and commits wait for a quorum of them.
    pub fn all_follow(&self) -> bool {
        let query = match self.kind {
            Kind::Local => return true,
            Kind::Stock => {
                "select count(*) = 3 from pg_stat_replication
                 where state = 'streaming' and sync_state = 'quorum'"
            }
            Kind::Ours | Kind::OursFromFiles => {
                "select members_active = 3 from pg_stat_walproposer
                 where exists (select from pg_stat_replication
                               where application_name = 'walproposer' and state = 'streaming'
                               and sync_state in ('sync', 'quorum'))"
            }
        };
        // While it can't be asked, or no row is there, they don't.
        let rows = self.primary.try_sql(query).unwrap_or_default();
        rows == [[Some("t".to_owned())]]
    }

    /// Waits until every member has flushed all that the primary has.
    pub fn wait_all_caught_up(&self) {
        let lsn = self.primary.flush_lsn();
        let what = format!("all members of {} have {lsn}", self.kind);
        // A slow member may be a gigabyte behind.
        wait_until(&what, 3 * SOON, || {
            self.members
                .iter()
                .all(|member| self.primary.lsn(&member.flush_lsn_query()) >= lsn)
        });
    }

    /// What stands in the WAL since the last checkpoint decides what a commit writes: a page goes
    /// there as a whole when it is first touched. So a checkpoint, and every page of pgbench's
    /// large table is touched; from here on commits are small, and all alike.
    pub fn write_page_images(&self) {
        self.primary.sql("checkpoint");
        self.primary
            .sql("update pgbench_accounts set abalance = abalance where aid % 20 = 0");
    }

    /// The same state before every run: members up to date, nothing old left to remove, nothing
    /// dirty in the kernel.
    pub fn settle(&self) {
        self.wait_all_follow();
        self.wait_all_caught_up();
        for member in &self.members {
            if let Program::Receiver(receiver) = &member.program {
                receiver.remove_old_wal();
            }
        }
        // SAFETY: no preconditions, cannot fail.
        unsafe { libc::sync() };
        thread::sleep(SETTLE);
    }

    /// Has the worker connect anew: how far members are it learns when it does.
    pub fn connect_anew(&self) {
        if !matches!(self.kind, Kind::Ours | Kind::OursFromFiles) {
            return;
        }
        let worker = "select pid from pg_stat_activity where backend_type = 'walproposer'";
        let before = self.primary.value(worker);
        self.primary
            .sql(&format!("select pg_terminate_backend({before})"));
        wait_until("another worker", SOON, || {
            let rows = self.primary.try_sql(worker).unwrap_or_default();
            !rows.is_empty() && rows != [[Some(before.clone())]]
        });
        self.wait_all_follow();
    }

    /// Sets how long a flush lasts, on the primary and on every member.
    pub fn set_flush_time(&self, primary: Duration, member: Duration) {
        let disks = self.members.iter().map(|member| &member.disk);
        for disk in disks {
            disk.as_ref().expect("an emulated host").set(member);
        }
        self.disk.as_ref().expect("an emulated host").set(primary);
    }

    /// The processes of the primary whose only work is to send WAL.
    pub fn senders(&self) -> Vec<u32> {
        match self.kind {
            Kind::Local => Vec::new(),
            Kind::Stock => self.primary.process().children_named("walsender"),
            Kind::Ours | Kind::OursFromFiles => self.primary.worker().into_iter().collect(),
        }
    }

    /// Where consumers of WAL go: to a safekeeper, or to the primary of the others.
    pub fn source(&self) -> SocketAddr {
        match self.members.first().map(|member| &member.program) {
            Some(Program::Safekeeper(safekeeper)) => safekeeper.address(),
            _ => self.listen.expect("a primary that is reached by TCP"),
        }
    }

    /// The processes that serve them.
    pub fn processes_of_source(&self) -> Vec<u32> {
        match self.members.first().map(|member| &member.program) {
            Some(Program::Safekeeper(safekeeper)) => vec![safekeeper.process().id()],
            _ => self.primary.process().children_named("walsender"),
        }
    }

    /// A logical message is a record and nothing else: WAL without tables.
    pub fn write_wal(&self, megabytes: u64) {
        self.primary.sql(&format!(
            "do $$ begin
                for i in 1..{megabytes} loop
                    perform pg_logical_emit_message(false, '', repeat('x', 1024 * 1024));
                end loop;
            end $$; create table flushes (); drop table flushes"
        ));
    }

    /// What it has cost up to now. These senders are taken for all there are.
    pub fn cost(&self, senders: &[u32]) -> Cost {
        let times = CpuTimes::now();
        let members = self.members.iter().filter(|member| member.runs());
        Cost {
            primary: times.of_tree(self.primary.process().id()),
            senders: senders.iter().map(|pid| times.of(*pid)).sum(),
            members: members.map(|member| times.of_tree(member.pid())).sum(),
        }
    }
}

/// CPU seconds of all processes of a setup.
#[derive(Clone, Copy)]
pub struct Cost {
    /// The server with whatever it has started, the senders too.
    pub primary: f64,
    /// Those processes of the primary that only send WAL.
    pub senders: f64,
    pub members: f64,
}

impl Cost {
    pub fn all(self) -> f64 {
        self.primary + self.members
    }

    pub fn since(self, earlier: Cost) -> Cost {
        Cost {
            primary: self.primary - earlier.primary,
            senders: self.senders - earlier.senders,
            members: self.members - earlier.members,
        }
    }
}

impl Member {
    pub fn start(&mut self) {
        match &mut self.program {
            Program::Receiver(receiver) => receiver.start(),
            Program::Safekeeper(safekeeper) => safekeeper.start(),
        }
    }

    pub fn kill9(&mut self) {
        match &mut self.program {
            Program::Receiver(receiver) => receiver.kill9(),
            Program::Safekeeper(safekeeper) => safekeeper.kill9(),
        }
    }

    pub fn runs(&self) -> bool {
        match &self.program {
            Program::Receiver(receiver) => receiver.runs(),
            Program::Safekeeper(safekeeper) => safekeeper.runs(),
        }
    }

    pub fn pid(&self) -> u32 {
        self.process().id()
    }

    /// What it has told the primary that it has flushed; 0/0 while it is away.
    pub fn flush_lsn_query(&self) -> String {
        let row = match &self.program {
            Program::Safekeeper(safekeeper) => {
                format!("pg_stat_safekeeper where id = {}", safekeeper.id)
            }
            Program::Receiver(receiver) => {
                let name = receiver.name();
                format!("pg_stat_replication where application_name = '{name}'")
            }
        };
        format!("select coalesce((select flush_lsn from {row}), '0/0')")
    }

    fn process(&self) -> &Process {
        match &self.program {
            Program::Receiver(receiver) => receiver.process(),
            Program::Safekeeper(safekeeper) => safekeeper.process(),
        }
    }

    fn name(&self) -> String {
        match &self.program {
            Program::Receiver(receiver) => receiver.name().to_owned(),
            Program::Safekeeper(safekeeper) => format!("safekeeper {}", safekeeper.id),
        }
    }

    fn data(&self) -> PathBuf {
        match &self.program {
            Program::Receiver(receiver) => receiver.data().to_owned(),
            Program::Safekeeper(safekeeper) => safekeeper.data().to_owned(),
        }
    }
}

fn environment(disk: Option<&SlowDisk>) -> Environment {
    disk.map(SlowDisk::environment).unwrap_or_default()
}

/// After a sync; what the disk still does by itself shall not be measured.
const SETTLE: Duration = Duration::from_millis(500);

/// Of every server. Background work that would fall into some runs and not into others is put off.
const SETTINGS: &str = "
max_connections = 100
shared_buffers = 512MB
min_wal_size = 1GB
max_wal_size = 8GB
checkpoint_timeout = 30min
autovacuum = off
full_page_writes = on
synchronous_commit = on
wal_sync_method = fdatasync
max_wal_senders = 60
wal_keep_size = 2GB
";

//! Two hosts with a Postgres each, three safekeepers, and links by which each host pushes WAL.
//!
//! `cluster.primary` is the primary; a failover swaps the two servers. Standbys stream from the
//! safekeepers without a link: the link to a dead one accepts connections and closes them, which is
//! not what a dead one does, and libpq would not go on to the next.

use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use cluster_tests::link::Link;
use cluster_tests::place::Programs;
use cluster_tests::poll::{SOON, wait_for, wait_until};
use cluster_tests::postgres::{Postgres, describe, text_rows};
use cluster_tests::safekeeper::Safekeeper;
use cluster_tests::wal_compare::WalDir;
use cluster_tests::{Cluster, safekeepers_setting};
use safekeeper_wal::history::TimelineHistory;
use safekeeper_wal::segment_name::SegmentSize;

use crate::fault::SafekeeperFault;

pub struct Hosts {
    standby: Postgres,
    /// Of the primary's host, and of the standby's.
    links: [Vec<Link>; 2],
    /// A safekeeper that is down, or stands still.
    pub harmed: Option<SafekeeperFault>,
    pub cluster: Cluster,
}

/// Checkpoints and removed WAL are part of the story; so are clients that hold on for a second and
/// no longer, which is what keeps a cycle short.
const SETTINGS: &str = "
walproposer.member_timeout = '2s'
max_wal_size = '64MB'
min_wal_size = '32MB'
checkpoint_timeout = '30s'
hot_standby = on
wal_receiver_timeout = '2s'
";

impl Hosts {
    pub fn start() -> Hosts {
        let mut cluster = Cluster::prepare_named("host1", &["--data-checksums"]);
        let links = [links_to(&cluster), links_to(&cluster)];
        cluster.primary.configure(SETTINGS);
        settle_in(&cluster.primary, &links[0], &cluster);
        cluster.start_all();
        let standby = Postgres::base_backup_of(&cluster.primary, &cluster.dir, "host2");
        let mut hosts = Hosts {
            standby,
            links,
            harmed: None,
            cluster,
        };
        hosts.start_standby();
        hosts.wait_standby_follows();
        hosts
    }

    pub fn primary(&self) -> &Postgres {
        &self.cluster.primary
    }

    pub fn standby(&self) -> &Postgres {
        &self.standby
    }

    pub fn primary_links(&self) -> &[Link] {
        &self.links[0]
    }

    /// Once the old primary is down, it is the standby.
    pub fn swap(&mut self) {
        std::mem::swap(&mut self.cluster.primary, &mut self.standby);
        self.links.swap(0, 1);
    }

    pub fn standby_mut(&mut self) -> &mut Postgres {
        &mut self.standby
    }

    pub fn rebuild_standby(&mut self) {
        self.standby.rebuild_from(&self.cluster.primary);
    }

    /// By its own function, again and again if need be.
    pub fn promote(&self) {
        let (sender, answers) = channel();
        let config = self.standby.config();
        thread::spawn(move || ask_for_promotion(&config, &sender));
        wait_for(
            &format!("{} is promoted", self.standby.name()),
            2 * SOON,
            || {
                while let Ok(answer) = answers.try_recv() {
                    match answer {
                        Ok(()) => return Some(()),
                        Err(why) => println!("    walproposer_promote: {why}"),
                    }
                }
                None
            },
        );
    }

    /// Whatever its files say of another host, it lives here and follows the safekeepers.
    pub fn start_standby(&mut self) {
        settle_in(&self.standby, &self.links[1], &self.cluster);
        self.cluster.follow_safekeepers(&self.standby);
        self.standby.start();
    }

    /// It has replayed what the primary has flushed by now.
    pub fn wait_standby_follows(&self) {
        let end = self.primary().flush_lsn();
        let what = format!("{} has replayed up to {end}", self.standby.name());
        wait_until(&what, SOON, || self.standby.replay_lsn() >= end);
    }

    pub fn wait_streaming(&self) {
        self.cluster.wait_streaming(3);
    }

    /// Byte for byte the same log everywhere, over all its timelines.
    pub fn assert_all_equal(&self) {
        self.wait_streaming();
        let end = self.cluster.wait_all_caught_up(SOON);
        self.wait_standby_follows();
        let history = self.timelines();
        println!(
            "timelines: {} before {}",
            history.ancestors.len(),
            history.tli
        );
        let dir = |path| WalDir::with_format(path, history.clone(), segment_size());
        let ours = dir(self.primary().wal_dir());
        for safekeeper in &self.cluster.safekeepers {
            let theirs = dir(safekeeper.wal_dir(self.cluster.system_id));
            ours.assert_equal(&theirs, ours.begin().max(theirs.begin()), end);
            let (ok, report) = safekeeper.verify();
            assert!(ok, "verify of safekeeper {}:\n{report}", safekeeper.id);
        }
        let first = dir(self.cluster.safekeepers[0].wal_dir(self.cluster.system_id));
        for safekeeper in &self.cluster.safekeepers[1..] {
            let theirs = dir(safekeeper.wal_dir(self.cluster.system_id));
            first.assert_equal(&theirs, first.begin().max(theirs.begin()), end);
        }
    }

    fn timelines(&self) -> TimelineHistory {
        let tli = self
            .primary()
            .value("select tli from pg_stat_walproposer")
            .parse()
            .expect("a timeline");
        let path = self.primary().wal_dir().join(format!("{tli:08X}.history"));
        match std::fs::read_to_string(&path) {
            Ok(text) => TimelineHistory::parse(tli, &text).expect("Postgres wrote it"),
            Err(_) => TimelineHistory::root(tli),
        }
    }
}

/// Again and again, until it is done or nobody listens.
fn ask_for_promotion(config: &::postgres::Config, answers: &Sender<Result<(), String>>) {
    let ask = || {
        let mut client = config.connect(::postgres::NoTls)?;
        text_rows(&mut client, "select walproposer_promote(60)")
    };
    loop {
        let answer = match ask() {
            Ok(rows) if rows[0][0].as_deref() == Some("t") => Ok(()),
            Ok(_) => Err("false".to_owned()),
            Err(error) => Err(describe(&error)),
        };
        let done = answer.is_ok();
        if answers.send(answer).is_err() || done {
            return;
        }
        thread::sleep(Duration::from_millis(200));
    }
}

fn segment_size() -> SegmentSize {
    SegmentSize::new(16 << 20).expect("a legal size")
}

fn links_to(cluster: &Cluster) -> Vec<Link> {
    let addresses = cluster.safekeepers.iter().map(Safekeeper::address);
    addresses.map(Link::to).collect()
}

/// What a server's configuration says of its host. Files that come from the other host, by
/// pg_basebackup or pg_rewind, say the other's.
///
/// Each has a restore_command, as the documentation wants it. It is not for pg_rewind alone: that
/// leaves the old primary's own last segment in pg_wal, dead tail and all, and a standby that finds
/// no segment of the newer timeline, because the new primary has removed it by then, replays it.
/// Recovery looks for the newer timeline first, and asks the safekeepers before pg_wal.
fn settle_in(server: &Postgres, links: &[Link], cluster: &Cluster) {
    let safekeepers = cluster.safekeepers.iter().map(Safekeeper::address);
    let safekeepers: Vec<_> = safekeepers.map(|address| address.to_string()).collect();
    server.configure(&format!(
        "restore_command = '{} fetch-wal --from {} %f %p'",
        Programs::safekeeper().display(),
        safekeepers.join(","),
    ));
    server.configure(&format!(
        "unix_socket_directories = '{}'",
        server.socket_dir().display()
    ));
    server.configure(&safekeepers_setting(links.iter().map(Link::address)));
}

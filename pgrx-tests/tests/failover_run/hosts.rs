//! Two hosts with a Postgres each, three safekeepers, and a link from each host to each safekeeper:
//! a host that is parted from the safekeepers is so in both roles.
//!
//! `cluster.primary` is the primary; a failover swaps the two servers.

use std::time::Duration;

use cluster_tests::link::Link;
use cluster_tests::poll::{SOON, wait_for, wait_until};
use cluster_tests::postgres::{Postgres, describe};
use cluster_tests::safekeeper::Safekeeper;
use cluster_tests::wal_compare::WalDir;
use cluster_tests::{Cluster, safekeepers_setting};
use safekeeper_wal::history::TimelineHistory;
use safekeeper_wal::segment_name::SegmentSize;

pub struct Hosts {
    standby: Postgres,
    /// Of the primary's host, and of the standby's.
    links: [Vec<Link>; 2],
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
wal_retrieve_retry_interval = '200ms'
";

impl Hosts {
    pub fn start() -> Hosts {
        let mut cluster = Cluster::prepare_named("host1", &["--data-checksums"]);
        let links = [links_to(&cluster), links_to(&cluster)];
        cluster.primary.configure(SETTINGS);
        settle_in(&cluster.primary, &links[0]);
        cluster.start_all();
        let standby = Postgres::base_backup_of(&cluster.primary, &cluster.dir, "host2");
        let mut hosts = Hosts {
            standby,
            links,
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
        let what = format!("{} is promoted", self.standby.name());
        wait_for(&what, 2 * SOON, || {
            match self.standby.try_sql("select walproposer_promote(60)") {
                Ok(rows) if rows[0][0].as_deref() == Some("t") => return Some(()),
                Ok(_) => println!("    walproposer_promote: false"),
                Err(error) => println!("    walproposer_promote: {}", describe(&error)),
            }
            cluster_tests::poll::let_run(Duration::from_millis(200));
            None
        });
    }

    /// Whatever its files say of another host, it lives here and follows the safekeepers.
    pub fn start_standby(&mut self) {
        let (standby, links) = (&mut self.standby, &self.links[1]);
        settle_in(standby, links);
        standby.touch("standby.signal");
        standby.start();
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

    /// For `--from` of `safekeeper fetch-wal`.
    pub fn safekeeper_list(&self) -> String {
        let addresses = self.cluster.safekeepers.iter().map(Safekeeper::address);
        let addresses: Vec<_> = addresses.map(|address| address.to_string()).collect();
        addresses.join(",")
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
fn settle_in(server: &Postgres, links: &[Link]) {
    let part = |part: fn(&Link) -> String| links.iter().map(part).collect::<Vec<_>>().join(",");
    server.configure(&format!(
        "unix_socket_directories = '{}'",
        server.socket_dir().display()
    ));
    server.configure(&safekeepers_setting(links.iter().map(Link::address)));
    server.configure(&format!(
        "primary_conninfo = 'host={} port={} application_name={}'",
        part(|link| link.address().ip().to_string()),
        part(|link| link.address().port().to_string()),
        server.name(),
    ));
}

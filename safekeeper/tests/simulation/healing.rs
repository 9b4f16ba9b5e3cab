//! The end of all faults, and the demand for progress.
//!
//! After the time of faults everything is healed and an operator comes: safekeepers that are lost
//! stay down, all others run. First the servers are left alone. If that is not enough they are
//! restarted, as a crashed server would be. If that is not enough either, since each of them has
//! diverged, a standby is made of a safekeeper's log and promoted. That one must commit new WAL
//! within a bound, and no change of members may be left half done.

use safekeeper_protocol::Lsn;

use super::checker::Event as Fact;
use super::cluster::{Cluster, Event};
use super::faults::{Fault, Mark};
use super::network::NodeIdx;
use super::node::Outcome;

impl Cluster {
    /// Ends all faults, and demands progress. Then everybody's log is looked at once more.
    pub fn heal(&mut self) {
        self.end_all_faults();
        let bound_ms = 30_000 + 3 * self.settings.member_timeout_ms;
        let progressed = self.wait_for_commit(5000 + 3 * self.settings.member_timeout_ms)
            || self.restart_servers(bound_ms / 2);
        if progressed {
            self.tally.add(Mark::HealedWithoutRebuild);
        } else {
            assert!(
                !self.has_always_been_alone(),
                "progress_within_a_bound: the only server there has ever been is locked out: {}",
                self.describe()
            );
            self.rebuild(bound_ms);
        }
        self.run(self.now_ms + bound_ms, Cluster::joint_is_left);
        assert!(
            self.joint_is_left(),
            "progress_within_a_bound: {bound_ms} ms after healing members are still changing: {}",
            self.describe()
        );
        self.look_at_everything();
        for node in 0..self.nodes.len() {
            self.keep_disk_marks(node);
        }
    }

    /// One server, whose WAL was committed, and which wrote none against advice: nobody can have
    /// written what it must not contradict.
    fn has_always_been_alone(&self) -> bool {
        let never = |fault| self.tally.count(Mark::Struck(fault)) == 0;
        self.servers.len() == 1
            && self.checker.committed_lsn().is_valid()
            && never(Fault::StartedAlone)
            && never(Fault::Rejoin)
    }

    fn end_all_faults(&mut self) {
        self.say(|| format!("healing: {}", self.describe()));
        self.is_healing = true;
        self.damages_next_append = false;
        self.network.unblock_all();
        for node in 0..self.nodes.len() {
            self.relieve(node);
            self.nodes[node].disk.disarm();
            self.nodes[node].stopped_until_ms = 0;
            let serves = self.nodes[node].keeper().is_some() || self.nodes[node].state().is_none();
            if self.nodes[node].is_up() && (self.nodes[node].is_lost || !serves) {
                self.end_node(node, false);
            }
            self.at(10, Event::StartNode { node });
        }
        for server in 0..self.servers.len() {
            self.servers[server].stopped_until_ms = 0;
            if let Some(process) = &mut self.servers[server].process {
                process.append_len_max = 1 << 20;
            }
        }
    }

    /// True once a server has committed WAL that it inserts from now on.
    fn wait_for_commit(&mut self, bound_ms: u64) -> bool {
        let ends: Vec<Lsn> = self
            .servers
            .iter()
            .map(|server| server.data.end())
            .collect();
        let progressed = |cluster: &Cluster| {
            let mut servers = cluster.servers.iter().zip(&ends);
            servers.any(|(server, end)| {
                server
                    .process
                    .as_ref()
                    .is_some_and(|p| p.wal.is_some() && p.commit_lsn > *end)
            })
        };
        self.run(self.now_ms + bound_ms, progressed);
        progressed(self)
    }

    /// One after the other, as if it had crashed, and alone.
    fn restart_servers(&mut self, bound_ms: u64) -> bool {
        for server in 0..self.servers.len() {
            for other in 0..self.servers.len() {
                self.crash_server(other);
                self.servers[other].is_given_up = true;
            }
            if self.servers[server].data.is_standby {
                continue;
            }
            self.servers[server].is_given_up = false;
            self.start_server(server);
            if self.wait_for_commit(bound_ms) {
                return true;
            }
        }
        false
    }

    /// A standby of the best log is promoted.
    fn rebuild(&mut self, bound_ms: u64) {
        for server in 0..self.servers.len() {
            self.crash_server(server);
            self.servers[server].is_given_up = true;
        }
        let sound = |node: &usize| !self.nodes[*node].is_lost && self.is_member(*node);
        let sound = (0..self.nodes.len()).filter(sound);
        let rank = |node: &usize| {
            let (history, _, flush_lsn) = self.nodes[*node].log()?;
            Some(safekeeper_protocol::Log::new(&history, flush_lsn).rank())
        };
        let best = sound.max_by_key(rank);
        let data = best.and_then(|node| self.data_from_node(node));
        // With no WAL anywhere it is still the first use.
        let data = data.unwrap_or_else(|| {
            let first = self.servers.iter().find(|server| !server.data.is_standby);
            let mut data = first.expect("a standby is made of a log").data.clone();
            data.history = Default::default();
            data
        });
        let server = self
            .place_for_server(data)
            .expect("all servers were given up");
        self.start_server(server);
        self.promote(server);
        let since_ms = self.now_ms;
        let progressed = self.wait_for_commit(bound_ms);
        let state = self.describe();
        let now_ms = since_ms + bound_ms;
        self.checker.observe(&Fact::Healed {
            since_ms,
            now_ms,
            bound_ms,
            progressed,
            state: &state,
        });
    }

    /// Reads what every sound safekeeper would send a consumer, from end to end.
    fn look_at_everything(&mut self) {
        for idx in 0..self.nodes.len() {
            if self.nodes[idx].is_lost {
                continue;
            }
            let Some((history, oldest_lsn, flush_lsn)) = self.nodes[idx].log() else {
                continue;
            };
            let id = self.nodes[idx].id.0;
            let mut begin = history
                .first()
                .map_or(oldest_lsn, |first| oldest_lsn.max(first.start_lsn));
            while let Outcome::Done(Some(bytes)) = self.nodes[idx].consume(begin, 1 << 20) {
                self.checker.observe(&Fact::Consumed {
                    node: id,
                    begin,
                    bytes: &bytes,
                });
                begin = begin + bytes.len() as u64;
            }
            let commit_lsn = self.nodes[idx].keeper().map(|keeper| keeper.commit_lsn());
            assert!(
                commit_lsn.is_none_or(|commit_lsn| begin >= commit_lsn),
                "consumer_sees_only_committed: safekeeper {id} can't be read from {begin} on"
            );
            if flush_lsn > oldest_lsn {
                let bytes = self.nodes[idx].log_bytes(&history, oldest_lsn, flush_lsn);
                let whose = format!("safekeeper {id} in the end");
                self.checker.observe(&Fact::Holds {
                    whose: &whose,
                    history: &history,
                    begin: oldest_lsn,
                    bytes: &bytes,
                });
            }
        }
    }

    pub fn keep_disk_marks(&mut self, node: NodeIdx) {
        let struck = self.nodes[node].disk.struck();
        for (n, mark) in [
            (struck.sectors_lost, Mark::SectorsLost),
            (struck.sectors_torn, Mark::SectorsTorn),
            (struck.names_lost, Mark::NamesLost),
            (struck.io_errors, Mark::IoError),
        ] {
            if n > 0 {
                self.tally.add(mark);
            }
        }
    }
}

//! Faults as they strike a cluster, what relieves them, and the end of all of them.
//!
//! After the time of faults everything is healed and an operator comes: safekeepers that are lost
//! stay down, all others run. First the servers are left alone. If that is not enough they are
//! restarted, as a crashed server would be. If that is not enough either, since each of them has
//! diverged, one is made from a safekeeper's log. That one must commit new WAL within a bound.

use safekeeper_protocol::Lsn;

use super::SEGMENT_SIZE;
use super::checker::Event as Fact;
use super::cluster::{Cluster, Event};
use super::disk::FaultRates;
use super::faults::{Fault, Mark};
use super::network::{Direction, NodeIdx, ServerIdx};
use super::node::{Node, Outcome};
use super::postgres::new_proposer_id;

impl Cluster {
    /// Lets one fault strike, and the next one later.
    pub fn strike(&mut self) {
        if self.is_healing {
            return;
        }
        let in_ms = self.random.range(1..2 * self.plan.pause_ms);
        self.at(in_ms, Event::Strike);
        let Some(fault) = self.plan.next_fault(&mut self.random) else {
            return;
        };
        let node = self.random.below(self.nodes.len() as u64) as usize;
        let server = self.random.below(self.servers.len() as u64) as usize;
        if self.strike_with(fault, node, server) {
            self.say(|| format!("fault {fault:?}, node {node}, server {server}"));
            self.tally.add(Mark::Struck(fault));
        }
    }

    /// False if there was nothing to strike.
    fn strike_with(&mut self, fault: Fault, node: NodeIdx, server: ServerIdx) -> bool {
        match fault {
            Fault::ConnectionLost => return self.lose_connection(server, node),
            Fault::DuplicateConnection => return self.duplicate_connection(server, node),
            Fault::SlowLink => {
                let slow_ms = self.random.range(20..2000);
                self.network.slow_ms.insert(node, slow_ms);
                self.relieve_later(node);
            }
            Fault::OneWayPartition => {
                let direction = if self.random.chance(500) {
                    Direction::ToNode
                } else {
                    Direction::ToServer
                };
                self.network.block(server, node, direction);
                self.relieve_later(node);
            }
            Fault::Partition => {
                // From one server or from all.
                let all = self.random.chance(500);
                for other in 0..self.servers.len() {
                    if all || other == server {
                        self.network.block(other, node, Direction::ToNode);
                        self.network.block(other, node, Direction::ToServer);
                    }
                }
                self.relieve_later(node);
            }
            Fault::NodeKilled | Fault::NodePowerCut if !self.nodes[node].is_up() => return false,
            Fault::NodeKilled => self.stop_node(node, false),
            Fault::NodePowerCut => self.stop_node(node, true),
            Fault::CrashInAction => {
                let n = [self.random.range(1..8), self.random.range(1..60)]
                    [self.random.below(2) as usize];
                self.nodes[node].disk.crash_after(n);
            }
            Fault::NodeStopped => {
                self.nodes[node].stopped_until_ms = self.now_ms + self.random.range(100..20_000);
            }
            Fault::ServerStopped => {
                self.servers[server].stopped_until_ms =
                    self.now_ms + self.random.range(100..20_000);
            }
            Fault::ClockJump => {
                let jump_ms = [
                    self.random.range(1..100),
                    self.random.range(1000..3_600_000),
                ];
                let jump_ms = jump_ms[self.random.below(2) as usize];
                if self.random.chance(500) {
                    self.nodes[node].clock_ahead_ms += jump_ms;
                } else {
                    self.servers[server].clock_ahead_ms += jump_ms;
                    self.with_proposer(server, |_, _, _| {});
                }
            }
            Fault::DiskError => {
                let mut rate = || {
                    if self.random.chance(500) {
                        self.random.below(200)
                    } else {
                        0
                    }
                };
                let rates = FaultRates {
                    read_error: rate(),
                    write_error: rate(),
                    sync_error: rate(),
                    rename_error: rate(),
                };
                self.nodes[node].disk.set_rates(rates);
                self.relieve_later(node);
            }
            Fault::DiskFull => {
                let room = self.random.below(u64::from(SEGMENT_SIZE));
                let disk = &self.nodes[node].disk;
                disk.set_capacity(disk.used() + room);
                self.relieve_later(node);
            }
            Fault::SlowDisk => {
                self.nodes[node].turn_ms = self.random.range(10..500);
                self.relieve_later(node);
            }
            Fault::WalBitFlip => return self.flip_wal(node),
            Fault::ControlBitFlip => return self.flip_control(node),
            Fault::NodeWiped => return self.wipe(node),
            Fault::ServerCrash => {
                if self.servers[server].process.is_none() {
                    return false;
                }
                self.crash_server(server);
                let in_ms = self.random.range(10..5000);
                self.at(in_ms, Event::StartServer { server });
            }
            Fault::WorkerRestart => {
                let runs = self.servers[server]
                    .process
                    .as_ref()
                    .is_some_and(|p| p.wal.is_some() && p.won.is_none());
                if !runs {
                    return false;
                }
                self.restart_worker(server);
            }
            Fault::Failover => return self.fail_over(node),
            Fault::Copy => return self.copy(server),
            Fault::DamagedAppend => self.damages_next_append = true,
            Fault::StartedAlone => {
                self.crash_server(server);
                if self.servers[server].is_given_up {
                    return false;
                }
                self.start_server_alone(server);
            }
        }
        true
    }

    fn relieve_later(&mut self, node: NodeIdx) {
        let in_ms = self.random.range(50..10_000);
        self.at(in_ms, Event::Relieve { node });
    }

    pub fn relieve(&mut self, node: NodeIdx) {
        self.network.slow_ms.remove(&node);
        for server in 0..self.servers.len() {
            self.network.unblock(server, node);
        }
        self.nodes[node].disk.set_rates(FaultRates::default());
        self.nodes[node].disk.set_capacity(u64::MAX);
        self.nodes[node].turn_ms = 0;
    }

    fn stop_node(&mut self, node: NodeIdx, power_cut: bool) {
        self.end_node(node, power_cut);
        let in_ms = self.random.range(5..5000);
        self.at(in_ms, Event::StartNode { node });
    }

    /// What is on its way in either direction may arrive in part.
    fn lose_connection(&mut self, server: ServerIdx, node: NodeIdx) -> bool {
        let Some(process) = &mut self.servers[server].process else {
            return false;
        };
        let Some(id) = process.connections[node] else {
            return false;
        };
        let kept = self.random.below(4) as usize;
        let now_ms = self.now_ms;
        if let Some(connection) = self.network.connections.get_mut(&id) {
            connection.to_node.messages.truncate(kept);
            connection.to_node.end(now_ms);
            connection.to_server.messages.truncate(kept);
            connection.to_server.end(now_ms);
        }
        self.at(1, Event::ToNode { connection: id });
        self.at(1, Event::ToServer { connection: id });
        true
    }

    /// The server takes its connection for dead, which it is not.
    fn duplicate_connection(&mut self, server: ServerIdx, node: NodeIdx) -> bool {
        let now_ms = self.now_ms + self.servers[server].clock_ahead_ms;
        let running = self.servers[server].process.as_mut();
        let Some(process) = running.filter(|process| process.won.is_none()) else {
            return false;
        };
        let Some(id) = process.connections[node].take() else {
            return false;
        };
        process
            .proposer
            .on_disconnected(safekeeper_protocol::PeerIdx(node), now_ms);
        if let Some(connection) = self.network.connections.get_mut(&id) {
            connection.server_open = false;
        }
        let in_ms = self.random.range(1..10);
        self.at(in_ms, Event::Dial { server, peer: node });
        let half_open_ms = self.random.range(10..10_000);
        let end_ms = self.now_ms + half_open_ms;
        if let Some(connection) = self.network.connections.get_mut(&id) {
            connection.to_node.end(end_ms);
        }
        self.at(half_open_ms, Event::ToNode { connection: id });
        self.with_proposer(server, |_, _, _| {});
        true
    }

    /// May this member be lost for good? Not before there is something to lose: a first
    /// configuration binds those it names, and nobody else can take their place.
    fn may_lose(&self, node: NodeIdx) -> bool {
        let lost = self.nodes.iter().filter(|node| node.is_lost).count();
        let minority = (self.nodes.len() - 1) / 2;
        self.checker.committed_lsn().is_valid() && !self.nodes[node].is_lost && lost < minority
    }

    /// Below the commit_lsn that is persisted, or behind the end of the log.
    fn flip_wal(&mut self, idx: NodeIdx) -> bool {
        let node = &self.nodes[idx];
        let (Some(state), Some((_, oldest_lsn, flush_lsn))) = (node.state(), node.log()) else {
            return false;
        };
        let bit = self.random.below(8) as u32;
        let (lsn, loses) = if self.random.chance(500) {
            let from = flush_lsn + (1 << 10);
            let segment_end = flush_lsn.segment_start(SEGMENT_SIZE) + u64::from(SEGMENT_SIZE);
            // The proposer may be writing there at this moment: not too near.
            if node
                .keeper()
                .is_some_and(|keeper| keeper.status().write_lsn.0 != flush_lsn)
                || from >= segment_end
            {
                return false;
            }
            (from + self.random.below(segment_end - from), false)
        } else {
            if !self.may_lose(idx) || state.commit_lsn <= oldest_lsn {
                return false;
            }
            (
                oldest_lsn + self.random.below(state.commit_lsn - oldest_lsn),
                true,
            )
        };
        let node = &self.nodes[idx];
        let path = Node::segment_path(lsn);
        if !self.is_checked(lsn) || node.disk.read(&path).is_none() {
            return false;
        }
        node.disk
            .flip_bit_at(&path, lsn.segment_offset(SEGMENT_SIZE) as usize, bit);
        self.nodes[idx].is_lost |= loses;
        true
    }

    fn flip_control(&mut self, idx: NodeIdx) -> bool {
        if !self.may_lose(idx) {
            return false;
        }
        let node = &mut self.nodes[idx];
        node.is_lost = node
            .disk
            .flip_bit(|path| path == Node::control_path())
            .is_some();
        node.is_lost
    }

    fn wipe(&mut self, idx: NodeIdx) -> bool {
        if !self.may_lose(idx) {
            return false;
        }
        self.end_node(idx, true);
        self.keep_disk_marks(idx);
        let mut random = self.random.fork();
        self.nodes[idx].wipe(&mut random);
        self.at(100, Event::StartNode { node: idx });
        true
    }

    fn fail_over(&mut self, idx: NodeIdx) -> bool {
        if self.nodes[idx].is_lost {
            return false;
        }
        let Some(data) = self.data_from_node(idx) else {
            return false;
        };
        let Some(server) = self.place_for_server(data) else {
            return false;
        };
        self.start_server(server);
        true
    }

    fn copy(&mut self, original: ServerIdx) -> bool {
        let (mut data, _) = self.servers[original].data.crashed(&mut self.random);
        if self.random.chance(700) {
            // Postgres notices that it lives in a copy, mostly.
            data.proposer_id = new_proposer_id(&mut self.random);
        }
        let Some(server) = self.place_for_server(data) else {
            return false;
        };
        self.start_server(server);
        true
    }

    // ---- the end --------------------------------------------------------------------------

    /// Ends all faults, and demands progress. Then everybody's log is looked at once more.
    pub fn heal(&mut self) {
        self.end_all_faults();
        let bound_ms = 30_000 + 3 * self.settings.member_timeout_ms;
        let progressed = self.wait_for_commit(5000 + 3 * self.settings.member_timeout_ms)
            || self.restart_servers(bound_ms / 2);
        if progressed {
            self.tally.add(Mark::HealedWithoutRebuild);
        } else {
            self.rebuild(bound_ms);
        }
        self.look_at_everything();
        for node in 0..self.nodes.len() {
            self.keep_disk_marks(node);
        }
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
                    .is_some_and(|process| process.commit_lsn > *end)
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
        let sound = (0..self.nodes.len()).filter(|node| !self.nodes[*node].is_lost);
        let rank = |node: &usize| {
            let (history, _, flush_lsn) = self.nodes[*node].log()?;
            Some(safekeeper_protocol::Log::new(&history, flush_lsn).rank())
        };
        let best = sound.max_by_key(rank);
        let data = best.and_then(|node| self.data_from_node(node));
        // With no WAL anywhere it is still the first use.
        let data = data.unwrap_or_else(|| {
            let mut data = self.servers[0].data.clone();
            data.history = Default::default();
            data
        });
        let server = self
            .place_for_server(data)
            .expect("all servers were given up");
        self.start_server(server);
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
                let bytes = self.nodes[idx].log_bytes(oldest_lsn, flush_lsn);
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

    fn keep_disk_marks(&mut self, node: NodeIdx) {
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

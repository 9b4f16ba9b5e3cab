//! Faults as they strike a cluster, and what relieves them.

use safekeeper::segment::Timelines;

use super::SEGMENT_SIZE;
use super::cluster::{Cluster, Event};
use super::disk::FaultRates;
use super::faults::{Fault, Mark};
use super::network::{Direction, NodeIdx, ServerIdx};
use super::node::Node;
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
                let postgres = &self.servers[server];
                if postgres.process.is_none() && postgres.standby.is_none() {
                    return false;
                }
                self.crash_server(server);
                let in_ms = self.random.range(10..5000);
                self.at(in_ms, Event::StartServer { server });
            }
            Fault::WorkerRestart if self.servers[server].standby.is_some() => {
                let promotes = self.servers[server].process.is_some();
                self.stop_promotion(server);
                return promotes;
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
            Fault::HandPromotion => return self.promote_by_hand(server),
            Fault::Rejoin => return self.strike_rejoin(server),
            Fault::MemberChange => return self.change_members(),
            Fault::MemberChangeGivenUp => return self.give_up_change(),
            Fault::Copy => return self.copy(server),
            Fault::DamagedAppend => self.damages_next_append = true,
            Fault::StartedAlone => {
                if self.servers[server].data.is_standby {
                    return false;
                }
                self.crash_server(server);
                if self.servers[server].is_given_up || self.servers[server].data.is_standby {
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
        let Some(id) = process.connections.get(node).copied().flatten() else {
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
        let Some(id) = process.connections.get_mut(node).and_then(Option::take) else {
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

    /// Below the commit_lsn that is persisted, or behind the end of the log.
    fn flip_wal(&mut self, idx: NodeIdx) -> bool {
        let may_lose = self.may_lose(idx);
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
            if !may_lose || state.commit_lsn <= oldest_lsn {
                return false;
            }
            (
                oldest_lsn + self.random.below(state.commit_lsn - oldest_lsn),
                true,
            )
        };
        let node = &self.nodes[idx];
        let path = node.segment_path(&Timelines::new(&state.history), lsn);
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
        // What is damaged beyond repair is lost already.
        if !self.nodes[idx].is_lost && !self.may_lose(idx) {
            return false;
        }
        self.end_node(idx, true);
        self.keep_disk_marks(idx);
        let mut random = self.random.fork();
        self.nodes[idx].wipe(&mut random);
        self.at(100, Event::StartNode { node: idx });
        true
    }

    /// A standby is promoted, now or soon, whatever the old primary does meanwhile. It is made
    /// first if there is none.
    fn fail_over(&mut self, node: NodeIdx) -> bool {
        let standby = (0..self.servers.len()).find(|idx| self.servers[*idx].standby.is_some());
        let server = match standby {
            Some(server) => server,
            None => {
                let Some(data) = self.data_from_node(node) else {
                    return false;
                };
                let Some(server) = self.place_for_server(data) else {
                    return false;
                };
                self.start_server(server);
                server
            }
        };
        for other in (0..self.servers.len()).filter(|other| *other != server) {
            match self.random.below(6) {
                0 => self.crash_server(other),
                1 => self.servers[other].stopped_until_ms = self.now_ms + 5000,
                2 => (0..self.nodes.len()).for_each(|node| {
                    self.network.block(other, node, Direction::ToNode);
                    self.relieve_later(node);
                }),
                _ => {}
            }
        }
        let in_ms = [1, self.random.range(1..3000)][self.random.below(2) as usize];
        self.at(in_ms, Event::Promote { server });
        true
    }

    /// One that was refused or deposed, or sometimes any, becomes a standby.
    fn strike_rejoin(&mut self, server: ServerIdx) -> bool {
        let refused = |idx: &ServerIdx| {
            let server = &self.servers[*idx];
            let states = ["deposed", "refused"];
            let process = server.process.as_ref();
            server.is_given_up || process.is_some_and(|p| states.contains(&p.proposer.state_name()))
        };
        match (0..self.servers.len()).find(refused) {
            Some(refused) => self.rejoin(refused),
            None => self.random.chance(200) && self.rejoin(server),
        }
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
}

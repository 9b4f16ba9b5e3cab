//! The servers of a cluster: started, crashed, restarted, copied, replaced.

use super::cluster::{Cluster, Event};
use super::faults::Mark;
use super::network::ServerIdx;
use super::postgres::{DataDir, Postgres};
use super::standby::Standby;

impl Cluster {
    pub fn next_proposer_id(&mut self) -> u64 {
        self.n_proposers += 1;
        self.n_proposers
    }

    pub fn start_server(&mut self, idx: ServerIdx) {
        let server = &mut self.servers[idx];
        if server.process.is_some() || server.standby.is_some() || server.is_given_up {
            return;
        }
        if server.data.is_standby {
            let node = self.random.below(self.nodes.len() as u64) as usize;
            server.standby = Some(Standby::start(&mut server.data, node));
            return self.say(|| format!("server {idx} starts as a standby"));
        }
        let (id, settings) = (self.next_proposer_id(), self.settings());
        let mut random = self.random.fork();
        let now_ms = self.server_clock(idx);
        self.servers[idx].start(id, settings, &mut random, now_ms);
        if let (true, Some(process)) = (self.is_healing, &mut self.servers[idx].process) {
            process.append_len_max = 1 << 20;
        }
        self.say(|| {
            format!(
                "server {idx} starts as proposer {id} with {} {:?}",
                self.servers[idx].data.end(),
                self.servers[idx].data.history.history
            )
        });
        // Nobody does by merely starting, but for a rule that is broken on purpose.
        let proposer = self.servers[idx]
            .process
            .as_ref()
            .map(|process| &process.proposer);
        if let Some(proposer) = proposer.filter(|proposer| proposer.is_leading()) {
            let end = self.servers[idx].data.end();
            let (term, start_lsn) = (proposer.term(), proposer.term_start_lsn().min(end));
            self.lead(idx, term, start_lsn);
        }
        self.dial_all(idx);
    }

    pub fn start_server_alone(&mut self, idx: ServerIdx) {
        let (id, settings) = (self.next_proposer_id(), self.settings());
        let mut random = self.random.fork();
        let now_ms = self.server_clock(idx);
        self.servers[idx].start_alone(id, settings, &mut random, now_ms);
        self.dial_all(idx);
    }

    pub fn restart_worker(&mut self, idx: ServerIdx) {
        self.close_all(idx);
        let (id, settings) = (self.next_proposer_id(), self.settings());
        let mut random = self.random.fork();
        let now_ms = self.server_clock(idx);
        self.say(|| format!("server {idx} restarts its worker as proposer {id}"));
        self.servers[idx].restart_worker(id, settings, &mut random, now_ms);
        self.dial_all(idx);
    }

    pub fn dial_all(&mut self, idx: ServerIdx) {
        let connections = self.servers[idx]
            .process
            .as_ref()
            .map(|p| p.connections.len());
        for peer in 0..connections.unwrap_or_default() {
            self.at(1, Event::Dial { server: idx, peer });
        }
        self.with_proposer(idx, |_, _, _| {});
    }

    pub fn close_all(&mut self, idx: ServerIdx) {
        let ids = self.servers[idx]
            .process
            .iter_mut()
            .flat_map(|process| &mut process.connections);
        let ids: Vec<u64> = ids.filter_map(Option::take).collect();
        for id in ids {
            self.server_closes(id);
        }
    }

    /// The server is gone, with what it had not flushed, or a part of that.
    pub fn crash_server(&mut self, idx: ServerIdx) {
        self.close_all(idx);
        if let Some(process) = &self.servers[idx].process
            && process.promotes_to.is_some()
        {
            // Postgres was just about to; nobody has heard whether it did.
            let proposer = process.id;
            self.tally.add(Mark::PromotionDied);
            if self.random.chance(500) {
                self.switch_timeline(idx, proposer);
            }
        }
        let server = &mut self.servers[idx];
        if server.process.is_none() && server.standby.is_none() {
            return;
        }
        let (data, lost) = server.data.crashed(&mut self.random);
        server.data = data;
        server.standby = None;
        let Some(process) = server.process.take() else {
            return;
        };
        let pushed = process.pushes_early && process.proposer.is_leading();
        if process.won.is_some() {
            self.tally.add(Mark::DiedBeforeHandOver);
        }
        self.say(|| format!("server {idx} crashes, {lost} bytes lost"));
        if lost > 0 && pushed {
            self.tally.add(Mark::LocalTailLost);
        }
    }

    pub fn server_clock(&self, idx: ServerIdx) -> u64 {
        self.now_ms + self.servers[idx].clock_ahead_ms
    }

    pub fn insert(&mut self, idx: ServerIdx) {
        let len = match self.random.below(100) {
            0 => self.random.range(50_000..200_000),
            1..=9 => self.random.range(300..30_000),
            _ => self.random.below(300),
        };
        if self.servers[idx].standby.is_some() {
            self.stream(idx);
        } else if self.servers[idx].insert(len as u32) {
            if self.random.chance(3) {
                self.servers[idx].switch_segment();
                self.tally.add(Mark::SegmentSwitched);
            }
            self.flush_later(idx);
            self.with_proposer(idx, |_, _, _| {});
        }
        let in_ms = self.random.range(1..2 * self.plan.insert_ms);
        self.at(in_ms, Event::Insert { server: idx });
    }

    pub fn flush_later(&mut self, idx: ServerIdx) {
        let in_ms = self.random.range(1..30);
        if let Some(process) = &self.servers[idx].process {
            let proposer = process.id;
            self.at(
                in_ms,
                Event::FlushLocal {
                    server: idx,
                    proposer,
                },
            );
        }
    }

    /// In the place of a server that is gone, or as one more. None if there are enough.
    pub fn place_for_server(&mut self, data: DataDir) -> Option<ServerIdx> {
        let free = self
            .servers
            .iter()
            .position(|server| server.is_given_up && server.process.is_none());
        let idx = match free {
            Some(idx) => idx,
            None if self.servers.len() < 3 => {
                let idx = self.servers.len();
                self.servers.push(Postgres::new(data.clone()));
                self.at(1, Event::Insert { server: idx });
                if self.servers.len() == 3 {
                    self.tally.add(Mark::ThreeServers);
                }
                idx
            }
            None => return None,
        };
        let (stopped_until_ms, clock_ahead_ms) = (
            self.servers[idx].stopped_until_ms,
            self.servers[idx].clock_ahead_ms,
        );
        self.servers[idx] = Postgres {
            stopped_until_ms,
            clock_ahead_ms,
            ..Postgres::new(data)
        };
        Some(idx)
    }

    /// Everybody's state, for whoever reads about a failure.
    pub fn describe(&self) -> String {
        let nodes = self.nodes.iter().map(|node| {
            let state = node
                .state()
                .map(|state| format!("term {} {}", state.term, state.history));
            let end = node
                .log()
                .map(|(_, oldest, flush)| format!("{oldest}..{flush}"));
            format!(
                "safekeeper {} up {} lost {} {state:?} {end:?}",
                node.id,
                node.is_up(),
                node.is_lost
            )
        });
        let servers = self.servers.iter().enumerate().map(|(idx, server)| {
            let process = server.process.as_ref();
            let state =
                process.map(|p| (p.proposer.state_name(), p.proposer.wait_reason().cloned()));
            format!(
                "server {idx} {state:?} {} {}",
                server.data.history.history,
                server.data.end()
            )
        });
        nodes.chain(servers).collect::<Vec<_>>().join("; ")
    }
}

//! The safekeepers of a cluster: started and ended, fed with what arrives, watched as they answer.
//!
//! What leaves a safekeeper is looked at here, before it is sent: everything an answer says must be
//! on stable storage, and be what the proposer of that term wrote.

use safekeeper_protocol::{AcceptorMessage, Lsn, Tli};

use super::checker::Event as Fact;
use super::cluster::{Cluster, Event};
use super::faults::Mark;
use super::network::{Connection, Direction, NodeIdx};
use super::node::{Answers, Ended, Node, Outcome, encode};

impl Cluster {
    pub fn start_node(&mut self, idx: NodeIdx) {
        let node = &mut self.nodes[idx];
        if node.is_up() || (self.is_healing && node.is_lost) {
            return;
        }
        let errors_before = node.disk.struck();
        if !node.start() {
            return self.node_died(idx);
        }
        self.say(|| format!("node {idx} started"));
        let node = &mut self.nodes[idx];
        let process = node.process.as_ref().expect("just started");
        let status = process.clusters.status();
        let Some(error) = status
            .clusters
            .iter()
            .find_map(|cluster| cluster.error.clone())
        else {
            self.look_at_recovered(idx);
            return;
        };
        self.tally.add(Mark::NotServed);
        self.say(|| format!("node {idx} does not serve: {error}"));
        let node = &self.nodes[idx];
        let had_errors = node.disk.struck().io_errors > errors_before.io_errors;
        assert!(
            node.is_lost || had_errors,
            "progress_within_a_bound: safekeeper {} does not serve a log that nothing has damaged: \
             {error}",
            node.id
        );
        if had_errors {
            // Its operator tries again.
            let delay_ms = self.random.range(100..2000);
            self.nodes[idx].end(false);
            self.at(delay_ms, Event::StartNode { node: idx });
        }
    }

    /// What recovery found is what was written, and at least what was promised.
    pub fn look_at_recovered(&mut self, idx: NodeIdx) {
        let node = &self.nodes[idx];
        let Some((history, oldest_lsn, flush_lsn)) = node.log() else {
            return;
        };
        if node.is_lost {
            if let Some(process) = &mut self.nodes[idx].process {
                process.looked_at = flush_lsn;
            }
            return;
        }
        if flush_lsn > oldest_lsn {
            let bytes = node.log_bytes(&history, oldest_lsn, flush_lsn);
            let whose = format!("safekeeper {} as recovered", node.id);
            self.checker.observe(&Fact::Holds {
                whose: &whose,
                history: &history,
                begin: oldest_lsn,
                bytes: &bytes,
            });
        }
    }

    /// The process has ended, or the machine has.
    pub fn node_died(&mut self, idx: NodeIdx) {
        let power_cut = self.random.chance(500);
        self.end_node(idx, power_cut);
        let delay_ms = self.random.range(5..3000);
        self.at(delay_ms, Event::StartNode { node: idx });
    }

    pub fn end_node(&mut self, idx: NodeIdx, power_cut: bool) {
        self.say(|| format!("node {idx} ends, power cut: {power_cut}"));
        let node = &mut self.nodes[idx];
        node.end(power_cut);
        node.busy_until_ms = 0;
        let ids: Vec<u64> = self.connections_where(|c| c.node == idx && c.node_open);
        for id in ids {
            self.node_closes(id);
        }
    }

    pub fn connections_where(&self, wanted: impl Fn(&Connection) -> bool) -> Vec<u64> {
        let all = self.network.connections.iter();
        all.filter(|(_, connection)| wanted(connection))
            .map(|(id, _)| *id)
            .collect()
    }

    /// The safekeeper's end is closed; the server learns it after what is on its way.
    pub fn node_closes(&mut self, id: u64) {
        // After a power cut nobody tells the server; it finds out by itself, or much later.
        let in_ms = if self.random.chance(200) {
            20_000
        } else {
            self.latency(id)
        };
        let end_ms = self.now_ms + in_ms;
        let Some(connection) = self.network.connections.get_mut(&id) else {
            return;
        };
        connection.node_open = false;
        connection.to_node.messages.clear();
        connection.to_server.end(end_ms);
        let end_ms = connection.to_server.end_ms.unwrap_or(end_ms);
        self.at_ms(end_ms, Event::ToServer { connection: id });
    }

    pub fn deliver_to_node(&mut self, id: u64) {
        let now_ms = self.now_ms;
        let Some(connection) = self.network.connections.get_mut(&id) else {
            return;
        };
        let (server, idx) = (connection.server, connection.node);
        if !connection.node_open {
            connection.to_node.messages.clear();
            return self.forget_if_closed(id);
        }
        if self.network.is_blocked(server, idx, Direction::ToNode) {
            return self.at(150, Event::ToNode { connection: id });
        }
        let node = &mut self.nodes[idx];
        if node.busy_until_ms > now_ms {
            let in_ms = node.busy_until_ms - now_ms;
            return self.at(in_ms, Event::ToNode { connection: id });
        }
        let connection = self
            .network
            .connections
            .get_mut(&id)
            .expect("looked up above");
        let frames = connection.to_node.arrived(now_ms);
        if !frames.is_empty() {
            node.busy_until_ms = now_ms + node.turn_ms;
            match node.take(id, &frames, now_ms) {
                Outcome::Died => return self.node_died(idx),
                Outcome::Done(answers) => self.answer(id, idx, answers),
            }
        }
        let Some(connection) = self.network.connections.get(&id) else {
            return;
        };
        if connection.node_open && connection.to_node.is_over(now_ms) {
            match self.nodes[idx].disconnect(id) {
                Outcome::Died => self.node_died(idx),
                Outcome::Done(()) => self.node_closes(id),
            }
        }
    }

    pub fn answer(&mut self, id: u64, idx: NodeIdx, answers: Answers) {
        for message in &answers.messages {
            self.look_at_answer(idx, message);
            let in_ms = self.latency(id);
            let Some(connection) = self.network.connections.get_mut(&id) else {
                return;
            };
            let arrives_ms = connection
                .to_server
                .send(self.now_ms + in_ms, encode(message));
            self.at_ms(arrives_ms, Event::ToServer { connection: id });
        }
        self.look_at_published(idx);
        let Some(ended) = answers.end else { return };
        self.say(|| format!("node {idx} ends connection {id}: {ended:?}"));
        match ended {
            Ended::DamagedWal => self.tally.add(Mark::DamagedWalRefused),
            Ended::NoSpace => self.tally.add(Mark::NoSpace),
            Ended::Refused => {}
        }
        match self.nodes[idx].disconnect(id) {
            Outcome::Died => self.node_died(idx),
            Outcome::Done(()) => self.node_closes(id),
        }
    }

    /// An answer leaves a safekeeper: is all it says on stable storage, and true?
    pub fn look_at_answer(&mut self, idx: NodeIdx, message: &AcceptorMessage) {
        self.say(|| format!("node {idx} answers {message:?}"));
        let (term, flush_lsn) = match message {
            AcceptorMessage::Greeting(m) => (m.term, m.flush_lsn),
            AcceptorMessage::ConfigureResponse(m) => (m.term, m.flush_lsn),
            AcceptorMessage::VoteResponse(m) => (m.term, m.flush_lsn),
            AcceptorMessage::AppendResponse(m) => (m.term, m.flush_lsn),
            AcceptorMessage::ReadResponse(_) => return,
        };
        let node = &mut self.nodes[idx];
        let (Some(keeper), id) = (node.keeper(), node.id.0) else {
            return;
        };
        if !matches!(message, AcceptorMessage::AppendResponse(_)) {
            let persisted = node.state().map(|state| state.term);
            let durable = node.disk.is_durable(&Node::control_path());
            // Bits may have been flipped in it meanwhile.
            if !node.is_lost {
                self.checker.observe(&Fact::Promised {
                    node: id,
                    term,
                    persisted,
                    durable,
                });
            }
        }
        let node = &mut self.nodes[idx];
        let looked_at = node
            .process
            .as_ref()
            .map_or(Lsn::INVALID, |process| process.looked_at);
        let begin = if looked_at.is_valid() {
            looked_at
        } else if node.is_lost {
            // Some of what is there has decayed since it was acknowledged.
            flush_lsn
        } else {
            keeper.status().oldest_lsn.0
        };
        if flush_lsn < looked_at {
            self.tally.add(Mark::Truncated);
        }
        if flush_lsn > begin && begin.is_valid() {
            let view = keeper.view();
            let history = &view.state.history;
            let Some(bytes) = self.checker.known(history, begin, flush_lsn) else {
                panic!(
                    "no_answer_before_flush: safekeeper {id} with {history} acknowledges {flush_lsn}, which nobody sent"
                );
            };
            let holds = self.nodes[idx].holds(history, begin, &bytes);
            self.checker.observe(&Fact::Acknowledged {
                node: id,
                begin,
                end: flush_lsn,
                holds,
            });
        }
        if let Some(process) = &mut self.nodes[idx].process {
            process.looked_at = flush_lsn;
        }
    }

    pub fn look_at_published(&mut self, idx: NodeIdx) {
        let node = &mut self.nodes[idx];
        let (Some(keeper), Some(process)) = (node.keeper(), &mut node.process) else {
            return;
        };
        let (before, commit_lsn) = (process.commit_lsn, keeper.commit_lsn());
        process.commit_lsn = commit_lsn;
        let view = keeper.view();
        self.checker.observe(&Fact::Published {
            node: node.id.0,
            before,
            commit_lsn,
            tli: view.newest_tli(commit_lsn),
            root: view.state.history.first().map_or(Tli(1), |first| first.tli),
        });
    }

    pub fn housekeep(&mut self, idx: NodeIdx) {
        let oldest = |node: &Node| node.keeper().map(|keeper| keeper.status().oldest_lsn.0);
        let before = oldest(&self.nodes[idx]);
        if self.nodes[idx].is_up() {
            match self.nodes[idx].housekeep(self.wal_keep_size) {
                Outcome::Died => self.node_died(idx),
                Outcome::Done(()) if oldest(&self.nodes[idx]) > before && before.is_some() => {
                    self.tally.add(Mark::SegmentsRemoved);
                }
                Outcome::Done(()) => {}
            }
        }
        let in_ms = self.random.range(500..1500);
        self.at(in_ms, Event::Housekeep { node: idx });
    }
}

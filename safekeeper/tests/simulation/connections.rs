//! Connections from a server's point of view: dialled, opened, read from, closed, forgotten.
//!
//! The two ends of a connection learn of its end at different times; it is forgotten when both have.

use safekeeper_protocol::PeerIdx;
use safekeeper_protocol::codec::decode_acceptor_message;

use super::cluster::{Cluster, Event};
use super::network::{Direction, ServerIdx};
use super::postgres::Process;

impl Cluster {
    pub fn latency(&mut self, id: u64) -> u64 {
        let node = self
            .network
            .connections
            .get(&id)
            .map_or(0, |connection| connection.node);
        let slow_ms = self.network.slow_ms.get(&node).copied().unwrap_or_default();
        self.random.range(1..6)
            + if slow_ms > 0 {
                self.random.below(slow_ms)
            } else {
                0
            }
    }

    pub fn dial(&mut self, server: ServerIdx, peer: usize) {
        let Some(process) = &self.servers[server].process else {
            return;
        };
        // Between the start's proposer and the worker nobody dials.
        if process.connections.get(peer) != Some(&None) || process.won.is_some() {
            return;
        }
        let node = &self.nodes[peer];
        let reachable = node.is_up()
            && node.stopped_until_ms <= self.now_ms
            && self.network.is_open(server, peer);
        if !reachable {
            let in_ms = self.random.range(50..600);
            return self.at(in_ms, Event::Dial { server, peer });
        }
        let id = self.network.connect(server, peer, process.id);
        let process = self.servers[server]
            .process
            .as_mut()
            .expect("looked up above");
        process.connections[peer] = Some(id);
        let in_ms = self.latency(id);
        self.at(in_ms, Event::Connected { connection: id });
    }

    pub fn connected(&mut self, id: u64) {
        let Some(connection) = self.network.connections.get(&id) else {
            return;
        };
        let (server, peer) = (connection.server, PeerIdx(connection.node));
        if connection.server_open && self.process_of(server, connection.proposer).is_some() {
            self.with_proposer(server, |proposer, now_ms, out| {
                proposer.on_connected(peer, now_ms, out)
            });
        }
    }

    pub fn process_of(&mut self, server: ServerIdx, proposer: u64) -> Option<&mut Process> {
        self.servers[server]
            .process
            .as_mut()
            .filter(|process| process.id == proposer)
    }

    pub fn deliver_to_server(&mut self, id: u64) {
        let now_ms = self.now_ms;
        let Some(connection) = self.network.connections.get_mut(&id) else {
            return;
        };
        let (server, peer) = (connection.server, connection.node);
        let proposer = connection.proposer;
        if !connection.server_open {
            connection.to_server.messages.clear();
            return self.forget_if_closed(id);
        }
        if self.network.is_blocked(server, peer, Direction::ToServer) {
            return self.at(150, Event::ToServer { connection: id });
        }
        let connection = self
            .network
            .connections
            .get_mut(&id)
            .expect("looked up above");
        let messages = connection.to_server.arrived(now_ms);
        let is_over = connection.to_server.is_over(now_ms);
        for bytes in messages {
            let still = self
                .process_of(server, proposer)
                .is_some_and(|p| p.connections.get(peer) == Some(&Some(id)));
            if !still {
                return;
            }
            let (message, _) = decode_acceptor_message(&bytes).expect("encoded by a keeper");
            self.with_proposer(server, |proposer, now_ms, out| {
                proposer.on_message(PeerIdx(peer), &message, now_ms, out);
            });
        }
        if !is_over {
            return;
        }
        let now_ms = now_ms + self.servers[server].clock_ahead_ms;
        if let Some(process) = self.process_of(server, proposer)
            && process.connections.get(peer) == Some(&Some(id))
        {
            process.connections[peer] = None;
            process.proposer.on_disconnected(PeerIdx(peer), now_ms);
            self.server_closes(id);
            self.with_proposer(server, |_, _, _| {});
            let in_ms = self.random.range(5..300);
            self.at(in_ms, Event::Dial { server, peer });
        }
    }

    /// The server's end is closed. What it sent is still on its way; then the safekeeper learns it.
    pub fn server_closes(&mut self, id: u64) {
        let in_ms = match self.random.below(10) {
            0 => self.random.range(1000..15_000),
            _ => self.latency(id),
        };
        let end_ms = self.now_ms + in_ms;
        let Some(connection) = self.network.connections.get_mut(&id) else {
            return;
        };
        connection.server_open = false;
        connection.to_server.messages.clear();
        connection.to_node.end(end_ms);
        let end_ms = connection.to_node.end_ms.unwrap_or(end_ms);
        self.at_ms(end_ms, Event::ToNode { connection: id });
        self.forget_if_closed(id);
    }

    pub fn forget_if_closed(&mut self, id: u64) {
        let connections = &mut self.network.connections;
        if connections
            .get(&id)
            .is_some_and(|c| !c.node_open && !c.server_open)
        {
            connections.remove(&id);
        }
    }
}

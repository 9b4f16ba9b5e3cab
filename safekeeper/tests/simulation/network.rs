//! Connections between servers and safekeepers, and what may happen to them.
//!
//! A connection is what TCP makes of a bad network: bytes come in order, or late, or never; what
//! is lost is the connection. Its two ends learn that at different times, so that one side can
//! dial again, and lead anew, while bytes of the old connection are still on their way.
//!
//! ```text
//!   server ── to_node ──►  node         a blocked direction keeps what was sent, and delivers it
//!          ◄── to_server ──             if it opens again before somebody gives up
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Index of a server, and of a node.
pub type ServerIdx = usize;
pub type NodeIdx = usize;

/// One direction of a connection.
#[derive(Debug, Default)]
pub struct Stream {
    /// With the time at which each arrives, which does not fall.
    pub messages: VecDeque<(u64, Vec<u8>)>,
    /// Nothing more comes; the receiver learns it then.
    pub end_ms: Option<u64>,
}

impl Stream {
    /// Adds a message, or nothing after the end. Returns when it arrives.
    pub fn send(&mut self, arrives_ms: u64, bytes: Vec<u8>) -> u64 {
        let after = self.messages.back().map_or(0, |(ms, _)| *ms);
        let arrives_ms = arrives_ms.max(after);
        if self.end_ms.is_none() {
            self.messages.push_back((arrives_ms, bytes));
        }
        arrives_ms
    }

    /// Everything that has arrived.
    pub fn arrived(&mut self, now_ms: u64) -> Vec<Vec<u8>> {
        let n = self
            .messages
            .iter()
            .take_while(|(ms, _)| *ms <= now_ms)
            .count();
        self.messages.drain(..n).map(|(_, bytes)| bytes).collect()
    }

    pub fn end(&mut self, at_ms: u64) {
        let after = self.messages.back().map_or(0, |(ms, _)| *ms);
        self.end_ms = Some(self.end_ms.unwrap_or(u64::MAX).min(at_ms.max(after)));
    }

    /// All has been delivered and the end has been reached.
    pub fn is_over(&self, now_ms: u64) -> bool {
        self.messages.is_empty() && self.end_ms.is_some_and(|end_ms| end_ms <= now_ms)
    }
}

#[derive(Debug)]
pub struct Connection {
    pub server: ServerIdx,
    pub node: NodeIdx,
    /// The proposer that dialled; one that follows it on the same server is another.
    pub proposer: u64,
    pub to_node: Stream,
    pub to_server: Stream,
    /// The end still uses it.
    pub server_open: bool,
    pub node_open: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    ToNode,
    ToServer,
}

#[derive(Debug, Default)]
pub struct Network {
    pub connections: BTreeMap<u64, Connection>,
    blocked: BTreeSet<(ServerIdx, NodeIdx, Direction)>,
    /// Messages take so much longer, on links of this node.
    pub slow_ms: BTreeMap<NodeIdx, u64>,
    n_connections: u64,
}

impl Network {
    /// A new connection; its number is never used again.
    pub fn connect(&mut self, server: ServerIdx, node: NodeIdx, proposer: u64) -> u64 {
        self.n_connections += 1;
        let connection = Connection {
            server,
            node,
            proposer,
            to_node: Stream::default(),
            to_server: Stream::default(),
            server_open: true,
            node_open: true,
        };
        self.connections.insert(self.n_connections, connection);
        self.n_connections
    }

    pub fn block(&mut self, server: ServerIdx, node: NodeIdx, direction: Direction) {
        self.blocked.insert((server, node, direction));
    }

    pub fn unblock_all(&mut self) {
        self.blocked.clear();
    }

    pub fn unblock(&mut self, server: ServerIdx, node: NodeIdx) {
        for direction in [Direction::ToNode, Direction::ToServer] {
            self.blocked.remove(&(server, node, direction));
        }
    }

    pub fn is_blocked(&self, server: ServerIdx, node: NodeIdx, direction: Direction) -> bool {
        self.blocked.contains(&(server, node, direction))
    }

    /// Both directions work.
    pub fn is_open(&self, server: ServerIdx, node: NodeIdx) -> bool {
        !self.is_blocked(server, node, Direction::ToNode)
            && !self.is_blocked(server, node, Direction::ToServer)
    }
}

//! A whole cluster in one thread: servers, safekeepers, the network between them, and one queue of
//! events in simulated time. The same seed gives the same run, to the last byte.
//!
//! ```text
//!   queue ──► event ──► a server's Proposer ──► messages ──► Network ──┐
//!     ▲                 a node's Keeper     ◄── messages ◄─────────────┤
//!     └──────────────── what is to happen later ◄──────────────────────┘
//!                            │
//!                            ▼ everything worth knowing
//!                         Checker, Tally
//! ```
//!
//! Time is in milliseconds. This file is the queue; what each event does is told in safekeepers.rs,
//! servers.rs, standby.rs, reign.rs, donor.rs, membership.rs, connections.rs and consumer.rs, what goes
//! wrong in chaos.rs, and how it ends in healing.rs.

use std::collections::BTreeMap;
use std::ops::Range;

use safekeeper_protocol::{Configuration, Lsn};

use super::SEGMENT_SIZE;
use super::checker::Checker;
use super::consumer::Consumer;
use super::faults::{Mark, Plan, Tally};
use super::network::{Network, NodeIdx, ServerIdx};
use super::node::Node;
use super::postgres::{DataDir, Postgres, Settings};
use super::random::Random;

/// Something that is going to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Dial {
        server: ServerIdx,
        peer: usize,
    },
    Connected {
        connection: u64,
    },
    ToNode {
        connection: u64,
    },
    ToServer {
        connection: u64,
    },
    Tick {
        server: ServerIdx,
        proposer: u64,
    },
    Insert {
        server: ServerIdx,
    },
    FlushLocal {
        server: ServerIdx,
        proposer: u64,
    },
    HistoryPersisted {
        server: ServerIdx,
        proposer: u64,
    },
    ReadDonor {
        server: ServerIdx,
        proposer: u64,
    },
    /// A standby is to be promoted.
    Promote {
        server: ServerIdx,
    },
    /// Postgres has ended recovery.
    Promoted {
        server: ServerIdx,
        proposer: u64,
    },
    /// Recovery is over, or after that: the worker comes.
    Recover {
        server: ServerIdx,
        proposer: u64,
    },
    Housekeep {
        node: NodeIdx,
    },
    StartNode {
        node: NodeIdx,
    },
    StartServer {
        server: ServerIdx,
    },
    Consume,
    Strike,
    /// What chaos began with this node or its links comes to its end.
    Relieve {
        node: NodeIdx,
    },
}

pub struct Cluster {
    pub now_ms: u64,
    queue: BTreeMap<(u64, u64), Event>,
    n_events: u64,
    pub random: Random,
    pub nodes: Vec<Node>,
    pub servers: Vec<Postgres>,
    pub network: Network,
    pub checker: Checker,
    pub tally: Tally,
    pub plan: Plan,
    pub settings: Settings,
    pub is_healing: bool,
    /// WAL that each safekeeper keeps for consumers, in bytes.
    pub wal_keep_size: u64,
    /// Of the next append to be sent, one bit is flipped on the way.
    pub damages_next_append: bool,
    /// Beginnings of records that a crash cut short: no checksum covers them any more, and nobody
    /// will read them.
    pub unchecked: Vec<Range<Lsn>>,
    pub n_proposers: u64,
    pub consumer: Consumer,
    pub n_elections: u64,
    /// Ends of recovery on a new timeline, and those of them that led.
    pub n_promotions: u64,
    pub n_promoted: u64,
    /// Configurations that were sent to somebody and may still count.
    pub configurations: Vec<Configuration>,
    trace: bool,
}

impl Cluster {
    pub fn new(seed: u64, trace: bool) -> Cluster {
        let mut random = Random::new(seed);
        let n_nodes = [1, 3, 3, 3, 3, 5][random.below(6) as usize];
        let n_spares = random.below(3);
        let nodes = 1..=n_nodes + n_spares;
        let nodes = nodes.map(|id| Node::new(id, &mut random)).collect();
        // Sometimes the log begins just below the end of a segment.
        let len = if random.chance(300) {
            980_000 + random.below(60_000)
        } else {
            random.below(5000)
        };
        let data = DataDir::init(&mut random, Lsn(3 * u64::from(SEGMENT_SIZE)), len as u32);
        let plan = Plan::draw(&mut random);
        let settings = Settings {
            n_nodes: n_nodes as usize,
            member_timeout_ms: random.range(500..5000),
        };
        let wal_keep_size = if random.chance(300) {
            100_000
        } else {
            u64::MAX
        };
        let mut cluster = Cluster {
            now_ms: 0,
            queue: BTreeMap::new(),
            n_events: 0,
            random,
            nodes,
            servers: vec![Postgres::new(data)],
            network: Network::default(),
            checker: Checker::default(),
            tally: Tally::default(),
            plan,
            settings,
            is_healing: false,
            wal_keep_size,
            damages_next_append: false,
            unchecked: Vec::new(),
            n_proposers: 0,
            consumer: Consumer::new(0, Lsn(3 * u64::from(SEGMENT_SIZE))),
            n_elections: 0,
            n_promotions: 0,
            n_promoted: 0,
            configurations: Vec::new(),
            trace,
        };
        cluster.tally.add(match n_nodes {
            1 => Mark::OneMember,
            3 => Mark::ThreeMembers,
            _ => Mark::FiveMembers,
        });
        for node in 0..cluster.nodes.len() {
            cluster.start_node(node);
            cluster.at(1000, Event::Housekeep { node });
        }
        cluster.at(10, Event::StartServer { server: 0 });
        cluster.at(20, Event::Insert { server: 0 });
        cluster.at(500, Event::Consume);
        cluster.at(1500, Event::Strike);
        cluster
    }

    pub fn at(&mut self, in_ms: u64, event: Event) {
        self.at_ms(self.now_ms + in_ms, event);
    }

    /// At a time, or now if that has passed.
    pub fn at_ms(&mut self, ms: u64, event: Event) {
        self.n_events += 1;
        self.queue
            .insert((ms.max(self.now_ms), self.n_events), event);
    }

    /// Lets things happen until `until_ms`, or until `done` says so.
    pub fn run(&mut self, until_ms: u64, done: impl Fn(&Cluster) -> bool) {
        while let Some((&(ms, n), &event)) = self.queue.first_key_value() {
            if ms > until_ms || done(self) {
                break;
            }
            self.queue.remove(&(ms, n));
            self.now_ms = ms;
            match self.stopped_until(event) {
                Some(later_ms) => self.at_ms(later_ms, event),
                None => self.handle(event),
            }
        }
        if !done(self) {
            self.now_ms = until_ms;
        }
    }

    pub fn say(&self, text: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>7} {}", self.now_ms, text());
        }
    }

    pub fn n_events(&self) -> u64 {
        self.n_events
    }

    /// Its machine is stopped: it happens when that goes on.
    fn stopped_until(&self, event: Event) -> Option<u64> {
        let node = |node: NodeIdx| self.nodes[node].stopped_until_ms;
        let server = |server: ServerIdx| self.servers[server].stopped_until_ms;
        let of_connection = |connection: u64| self.network.connections.get(&connection);
        let until_ms = match event {
            Event::ToNode { connection } => of_connection(connection).map_or(0, |c| node(c.node)),
            Event::ToServer { connection } | Event::Connected { connection } => {
                of_connection(connection).map_or(0, |c| server(c.server))
            }
            Event::Housekeep { node: idx } => node(idx),
            Event::Dial { server: idx, .. }
            | Event::Tick { server: idx, .. }
            | Event::Insert { server: idx }
            | Event::FlushLocal { server: idx, .. }
            | Event::HistoryPersisted { server: idx, .. }
            | Event::ReadDonor { server: idx, .. }
            | Event::Promote { server: idx }
            | Event::Promoted { server: idx, .. }
            | Event::Recover { server: idx, .. } => server(idx),
            Event::StartNode { .. }
            | Event::StartServer { .. }
            | Event::Consume
            | Event::Strike
            | Event::Relieve { .. } => 0,
        };
        (until_ms > self.now_ms).then_some(until_ms)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Dial { server, peer } => self.dial(server, peer),
            Event::Connected { connection } => self.connected(connection),
            Event::ToNode { connection } => self.deliver_to_node(connection),
            Event::ToServer { connection } => self.deliver_to_server(connection),
            Event::Tick { server, proposer } => {
                if let Some(process) = self.process_of(server, proposer) {
                    process.next_tick_ms = u64::MAX;
                    self.with_proposer(server, |proposer, now_ms, out| {
                        proposer.on_tick(now_ms, out)
                    });
                }
            }
            Event::Insert { server } => self.insert(server),
            Event::FlushLocal { server, proposer } => {
                if self.process_of(server, proposer).is_some() {
                    self.servers[server].data.flush_lsn = self.servers[server].data.end();
                    self.pump(server);
                }
            }
            Event::HistoryPersisted { server, proposer } => {
                self.history_persisted(server, proposer)
            }
            Event::ReadDonor { server, proposer } => self.read_donor(server, proposer),
            Event::Promote { server } => {
                self.promote(server);
            }
            Event::Promoted { server, proposer } => self.promoted(server, proposer),
            Event::Recover { server, proposer } => self.recover(server, proposer),
            Event::Housekeep { node } => self.housekeep(node),
            Event::StartNode { node } => self.start_node(node),
            Event::StartServer { server } => self.start_server(server),
            Event::Consume => self.consume(),
            Event::Strike => self.strike(),
            Event::Relieve { node } => self.relieve(node),
        }
    }
}

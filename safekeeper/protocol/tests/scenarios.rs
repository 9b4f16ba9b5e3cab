//! Runs `scenarios/*.txt`: one hard case of the protocol a file, told in a dozen words.
//!
//! ```text
//! # what the case is about
//! cluster 3                         three safekeepers, 1 to 3, never configured
//! start A [history=1@1000000,3/2@1000080] [end=1000100] [unled=1000080] [tli=2]
//!         [before-recovery | standby] [peers=1,2] [copy=B | like=2]
//!                                   a Postgres with this log (term 3 is on timeline 2), connected
//!                                   to the listed safekeepers; its bytes are B's, or those of 2
//! recovered A                       A's start, which leads, hands its term to the worker
//! replay A / promote A [tli=3] [at=1000100]
//!                                   standby A has replayed what it was to / has left recovery
//! insert A 20                       A's local log grows by so many (hexadecimal) bytes
//! deliver A->2 [n]                  hand over what is on its way there, or the first n messages
//! settle [quietly]                  deliver everything, and pull WAL, until nothing moves
//! cut A 2 / heal A 2                the connection breaks / is made anew
//! tick A 1000                       a second passes; A is told (safekeepers have the same clock)
//! crash 2 / restart 2 / wipe 2      kill -9, what is flushed stays / make its directory anew
//! node 4 / dial A 4                 one more safekeeper / A connects to it too
//! members A 2,3,4 [from=1000000]    A begins to change the members; logs of new ones begin there
//! give up A                         it gives that up
//! replayed 2 1000100                the standbys of 2 report that they have replayed so far
//! ask A                             somebody waits for them on A
//! forge A->2 3 1000100              a heartbeat of term 3 with this commit_lsn gets on the way
//! stop A                            Postgres is gone
//! differ A 1000080                  from now on A's comparison with a donor finds this difference
//! unreadable A / readable A         A's comparison with a donor can't be made / can again
//! hold 2 / flush 2                  2 flushes only when it must, or is told to / flushes from now on
//! show                              state of everybody
//! ```
//!
//! Below each command stand, after `|`, the messages that were handed over and what came of them.
//! `REWRITE=1 cargo test --test scenarios` writes them anew; the diff is to be reviewed.
//!
//! Every byte of WAL carries the name of the Postgres that wrote it, and each command ends with a
//! check that no two safekeepers hold different bytes at one position under one term, and that
//! nothing committed was lost.

// Under the feature, there is one test in this file: it breaks rules for the whole process.
#[cfg(feature = "mutations")]
mod mutations;

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use safekeeper_protocol::codec::{
    decode_acceptor_message, decode_proposer_message, encode_acceptor_message,
    encode_proposer_message,
};
use safekeeper_protocol::*;

const SEGMENT_SIZE: u32 = 1 << 20;
const MEMBER_TIMEOUT_MS: u64 = 10_000;

/// WAL as runs of bytes: start position to the name of its writer; `end` closes the last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Bytes(BTreeMap<u64, char>);

impl Bytes {
    fn write(&mut self, begin: u64, len: u64, writer: char) {
        for lsn in begin..begin + len {
            self.0.insert(lsn, writer);
        }
    }

    fn truncate(&mut self, end: u64) {
        self.0.split_off(&end);
    }
}

struct Node {
    incarnation: u128,
    acceptor: Option<Acceptor>,
    durable: AcceptorState,
    durable_bytes: Bytes,
    durable_end: Lsn,
    bytes: Bytes,
    /// Flushes only when it must.
    holds: bool,
}

struct Server {
    proposer: Proposer,
    /// Safekeepers of its list, in order: a `PeerIdx` is a place in it.
    peers: Vec<u64>,
    bytes: Bytes,
    end: Lsn,
    history: TermHistory,
    differ: Option<Lsn>,
    unreadable: bool,
    /// What it was started with, for the proposer that goes on after recovery.
    settings: ProposerSettings,
    local: LocalLog,
    /// A standby is to end recovery on this timeline, there.
    promotion: Option<(Tli, Lsn)>,
}

impl Server {
    fn peer(&self, id: u64) -> PeerIdx {
        let place = self.peers.iter().position(|peer| *peer == id);
        PeerIdx(place.expect("a safekeeper of its list"))
    }

    fn id(&self, peer: PeerIdx) -> u64 {
        self.peers[peer.0]
    }
}

/// One connection, while it lasts. A session id is never used twice.
struct Connection {
    session: Session,
    to_acceptor: VecDeque<(ProposerMessage, Vec<char>)>,
    to_proposer: VecDeque<AcceptorMessage>,
}

#[derive(Default)]
struct World {
    /// What each server's local history file says of the members.
    configurations: BTreeMap<char, Configuration>,
    nodes: BTreeMap<u64, Node>,
    servers: BTreeMap<char, Server>,
    connections: BTreeMap<(char, u64), Connection>,
    now_ms: u64,
    sessions: u64,
    committed: BTreeMap<u64, char>,
    /// Members have changed: how many hold a byte is not how many there are.
    changed: bool,
    out: String,
}

fn cluster_identity() -> ClusterIdentity {
    ClusterIdentity {
        system_id: 7,
        name: "main".into(),
        pg_major: 15,
        segment_size: SEGMENT_SIZE,
    }
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text, 16).unwrap_or_else(|_| panic!("{text:?} is no hexadecimal number"))
}

/// `1@1000000,3@1000100`, with the timeline after the term where it is not 1: `3/2@1000100`.
fn history(text: &str) -> TermHistory {
    let entries = text.split(',').filter(|word| !word.is_empty()).map(|word| {
        let (term, start) = word.split_once('@').expect("term@start");
        let (term, tli) = term.split_once('/').unwrap_or((term, "1"));
        TermEntry {
            term: Term(term.parse().expect("a number")),
            tli: Tli(tli.parse().expect("a number")),
            start_lsn: Lsn(hex(start)),
        }
    });
    TermHistory::new(entries.collect()).expect("a history")
}

impl World {
    fn run(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["cluster", n] => {
                for id in 1..=n.parse().expect("a number of safekeepers") {
                    self.make_node(id, u128::from(id));
                }
            }
            ["start", name, ..] => self.start(letter(name), &words[2..]),
            ["stop", name] => {
                let name = letter(name);
                self.servers.remove(&name);
                for id in 1..=9 {
                    self.cut(name, id);
                }
            }
            ["insert", name, len] => {
                let (name, len) = (letter(name), hex(len));
                let server = self.servers.get_mut(&name).expect("a started server");
                server.bytes.write(server.end.0, len, name);
                server.end = server.end + len;
            }
            ["deliver", route] => self.deliver(route, usize::MAX),
            ["deliver", route, n] => self.deliver(route, n.parse().expect("a count")),
            ["settle"] => self.settle(),
            ["settle", "quietly"] => {
                self.settle();
                self.out.clear();
            }
            ["cut", name, id] => self.cut(letter(name), id.parse().expect("a safekeeper")),
            ["heal", name, id] => self.connect(letter(name), id.parse().expect("a safekeeper")),
            ["tick", name, ms] => {
                self.now_ms += ms.parse::<u64>().expect("milliseconds");
                let (mut actions, now_ms) = (Vec::new(), self.now_ms);
                self.server(letter(name))
                    .proposer
                    .on_tick(now_ms, &mut actions);
                self.carry_out(letter(name), actions);
            }
            ["crash", id] => self.crash(id.parse().expect("a safekeeper")),
            ["restart", id] => self.restart(id.parse().expect("a safekeeper")),
            ["wipe", id] => {
                let id = id.parse().expect("a safekeeper");
                self.crash(id);
                let incarnation = self.nodes[&id].incarnation + 100;
                self.make_node(id, incarnation);
            }
            ["differ", name, lsn] => self.server(letter(name)).differ = Some(Lsn(hex(lsn))),
            ["unreadable", name] => self.server(letter(name)).unreadable = true,
            ["readable", name] => self.server(letter(name)).unreadable = false,
            ["node", id] => {
                self.changed = true;
                let id: u64 = id.parse().expect("a number");
                self.make_node(id, u128::from(id));
            }
            ["dial", name, id] => {
                let id: u64 = id.parse().expect("a safekeeper");
                let server = self.server(letter(name));
                server.peers.push(id);
                server.proposer.add_peer(address(id));
                self.connect(letter(name), id);
            }
            ["members", name, ids] => self.change_members(letter(name), ids, "0"),
            ["members", name, ids, from] => {
                let from = from.strip_prefix("from=").expect("from=LSN");
                self.change_members(letter(name), ids, from);
            }
            ["give", "up", name] => {
                let (mut actions, now_ms) = (Vec::new(), self.now_ms);
                let proposer = &mut self.server(letter(name)).proposer;
                let outcome = proposer.give_up_change(now_ms, &mut actions);
                self.note_refusal(name, outcome);
                self.carry_out(letter(name), actions);
            }
            ["recovered", name] => self.recovered(letter(name)),
            ["replay", name] => {
                let mut actions = Vec::new();
                self.server(letter(name)).proposer.on_replayed(&mut actions);
                self.carry_out(letter(name), actions);
            }
            ["promote", name, ..] => self.promote(letter(name), &words[2..]),
            ["replayed", id, lsn] => {
                let acceptor = self.node(id).acceptor.as_mut().expect("it is up");
                acceptor.set_feedback(StandbyFeedback {
                    apply_lsn: Lsn(hex(lsn)),
                    ..StandbyFeedback::default()
                });
            }
            ["ask", name] => self.server(letter(name)).proposer.ask_for_feedback(),
            ["forge", route, term, commit] => {
                let (name, id) = route.split_once("->").expect("from->to");
                let append = Append {
                    configuration_version: ConfigurationVersion {
                        term: Term(u64::MAX),
                        generation: 1,
                    },
                    term: Term(term.parse().expect("a number")),
                    tli: Tli(1),
                    begin_lsn: Lsn(hex(commit)),
                    len: 0,
                    commit_lsn: Lsn(hex(commit)),
                    truncate_lsn: Lsn::INVALID,
                    reply_requested: true,
                };
                let pair = (letter(name), id.parse().expect("a safekeeper"));
                let connection = self.connections.get_mut(&pair).expect("a connection");
                let message = ProposerMessage::Append(append);
                connection.to_acceptor.push_back((message, Vec::new()));
            }
            ["hold", id] => self.node(id).holds = true,
            ["flush", id] => {
                self.node(id).holds = false;
                self.flush(id.parse().expect("a safekeeper"));
            }
            ["show"] => self.show(),
            _ => panic!("unknown command {line:?}"),
        }
        self.check();
    }

    fn server(&mut self, name: char) -> &mut Server {
        self.servers.get_mut(&name).expect("a started server")
    }

    fn node(&mut self, id: &str) -> &mut Node {
        let id = id.parse().expect("a safekeeper");
        self.nodes.get_mut(&id).expect("a safekeeper")
    }

    fn make_node(&mut self, id: u64, incarnation: u128) {
        let durable = AcceptorState::unconfigured(cluster_identity());
        let acceptor = Acceptor::new(
            MemberId(id),
            Incarnation(incarnation),
            durable.clone(),
            Lsn::INVALID,
        );
        self.nodes.insert(
            id,
            Node {
                incarnation,
                acceptor: Some(acceptor),
                durable,
                durable_bytes: Bytes::default(),
                durable_end: Lsn::INVALID,
                bytes: Bytes::default(),
                holds: false,
            },
        );
    }

    fn start(&mut self, name: char, words: &[&str]) {
        let mut local = LocalLog {
            history: TermHistory::default(),
            tli: Tli(1),
            end_lsn: Lsn(0x10_0100),
            unled_from: None,
            timeline_files: Vec::new(),
            configuration: Configuration::default(),
        };
        let mut standing = Standing::Running;
        let mut written_by = name;
        let mut like = None;
        let mut peers: Vec<u64> = self.nodes.keys().copied().collect();
        for word in words {
            match word.split_once('=') {
                Some(("history", text)) => local.history = history(text),
                Some(("end", text)) => local.end_lsn = Lsn(hex(text)),
                Some(("unled", text)) => local.unled_from = Some(Lsn(hex(text))),
                // A data directory copied from that server.
                Some(("copy", text)) => written_by = letter(text),
                Some(("like", id)) => like = Some(self.node(id).durable_bytes.clone()),
                Some(("tli", text)) => local.tli = Tli(text.parse().expect("a number")),
                Some(("peers", text)) => {
                    let ids = text.split(',').map(|id| id.parse().expect("a safekeeper"));
                    peers = ids.collect();
                }
                None if *word == "before-recovery" => standing = Standing::BeforeRecovery,
                None if *word == "standby" => standing = Standing::Standby,
                _ => panic!("unknown word {word:?}"),
            }
        }
        let addresses = peers.iter().map(|id| address(*id));
        let settings = ProposerSettings {
            proposer_id: ProposerId(name as u128),
            cluster: cluster_identity(),
            peers: addresses.collect(),
            member_timeout_ms: MEMBER_TIMEOUT_MS,
            seed: 1,
        };
        if !local.history.is_empty() {
            // The file that holds the history holds this too.
            local.configuration = self
                .configurations
                .get(&written_by)
                .cloned()
                .unwrap_or_default();
        }
        let mut bytes = Bytes::default();
        let base = local.end_lsn.segment_start(SEGMENT_SIZE).0;
        bytes.write(base, local.end_lsn.0 - base, written_by);
        if let Some(mut like) = like {
            like.truncate(local.end_lsn.0);
            bytes.0.extend(like.0);
        }
        let (end, history) = (local.end_lsn, local.history.clone());
        let proposer = Proposer::new(settings.clone(), local.clone(), standing, self.now_ms);
        self.servers.insert(
            name,
            Server {
                proposer,
                peers: peers.clone(),
                bytes,
                end,
                history,
                differ: None,
                unreadable: false,
                settings,
                local,
                promotion: None,
            },
        );
        for id in peers {
            self.connect(name, id);
        }
    }

    /// Crash recovery has ended: the worker goes on with the term that the start has won.
    fn recovered(&mut self, name: char) {
        let ids = self.servers[&name].peers.clone();
        for id in &ids {
            self.cut(name, *id);
        }
        let (mut actions, now_ms) = (Vec::new(), self.now_ms);
        let server = self.server(name);
        let won = server.proposer.hand_over().expect("a start that leads");
        let local = LocalLog {
            end_lsn: server.end,
            ..server.local.clone()
        };
        let settings = server.settings.clone();
        server.proposer = Proposer::elected(settings, local, won, now_ms, &mut actions);
        self.carry_out(name, actions);
        for id in ids {
            self.connect(name, id);
        }
    }

    fn promote(&mut self, name: char, words: &[&str]) {
        let (mut actions, now_ms) = (Vec::new(), self.now_ms);
        let server = self.server(name);
        let (mut tli, mut at) = server.promotion.take().expect("it was asked to");
        for word in words {
            match word.split_once('=') {
                Some(("tli", text)) => tli = Tli(text.parse().expect("a number")),
                Some(("at", text)) => at = Lsn(hex(text)),
                _ => panic!("unknown word {word:?}"),
            }
        }
        let file = TimelineFile {
            tli,
            content: format!("1\t{at}\tno recovery target\n").into_bytes(),
        };
        let proposer = &mut server.proposer;
        proposer.on_promoted(tli, at, vec![file], now_ms, &mut actions);
        self.carry_out(name, actions);
    }

    fn change_members(&mut self, name: char, ids: &str, from: &str) {
        self.changed = true;
        let members = ids.split(',').map(|id| {
            let id: u64 = id.parse().expect("a safekeeper");
            let PeerAddress { host, port } = address(id);
            Member {
                id: MemberId(id),
                incarnation: Incarnation(self.nodes[&id].incarnation),
                host,
                port,
            }
        });
        let (members, from): (Vec<Member>, Lsn) = (members.collect(), Lsn(hex(from)));
        let (mut actions, now_ms) = (Vec::new(), self.now_ms);
        let proposer = &mut self.server(name).proposer;
        let outcome = proposer.change_members(members, from, now_ms, &mut actions);
        self.note_refusal(&name.to_string(), outcome);
        self.carry_out(name, actions);
    }

    fn note_refusal(&mut self, name: &str, outcome: Result<(), ChangeRefusal>) {
        if let Err(refusal) = outcome {
            let _ = writeln!(self.out, "|   {name} refuses: {refusal}");
        }
    }

    fn connect(&mut self, name: char, id: u64) {
        let listed = self.servers[&name].peers.contains(&id);
        let up = self.nodes[&id].acceptor.is_some();
        if !listed || !up || self.connections.contains_key(&(name, id)) {
            return;
        }
        self.sessions += 1;
        let session = Session {
            id: self.sessions,
            proposer_id: ProposerId(name as u128),
        };
        let (to_acceptor, to_proposer) = (VecDeque::new(), VecDeque::new());
        self.connections.insert(
            (name, id),
            Connection {
                session,
                to_acceptor,
                to_proposer,
            },
        );
        let (mut actions, now_ms) = (Vec::new(), self.now_ms);
        let server = self.server(name);
        let peer = server.peer(id);
        server.proposer.on_connected(peer, now_ms, &mut actions);
        self.carry_out(name, actions);
    }

    fn cut(&mut self, name: char, id: u64) {
        let Some(connection) = self.connections.remove(&(name, id)) else {
            return;
        };
        let node = self.nodes.get_mut(&id).expect("a safekeeper");
        if let Some(acceptor) = &mut node.acceptor {
            acceptor.on_disconnected(connection.session);
        }
        let now_ms = self.now_ms;
        if let Some(server) = self.servers.get_mut(&name) {
            let peer = server.peer(id);
            server.proposer.on_disconnected(peer, now_ms);
        }
    }

    fn crash(&mut self, id: u64) {
        let names: Vec<char> = self.servers.keys().copied().collect();
        for name in names {
            self.cut(name, id);
        }
        let node = self.nodes.get_mut(&id).expect("a safekeeper");
        node.acceptor = None;
        node.bytes = node.durable_bytes.clone();
    }

    fn restart(&mut self, id: u64) {
        let node = self.nodes.get_mut(&id).expect("a safekeeper");
        node.acceptor = Some(Acceptor::new(
            MemberId(id),
            Incarnation(node.incarnation),
            node.durable.clone(),
            node.durable_end,
        ));
        let names: Vec<char> = self.servers.keys().copied().collect();
        for name in names {
            self.connect(name, id);
        }
    }

    /// `A->2` or `2->A`.
    fn deliver(&mut self, route: &str, n: usize) {
        let (from, to) = route.split_once("->").expect("from->to");
        for _ in 0..n {
            let moved = match from.parse::<u64>() {
                Ok(id) => self.deliver_to_proposer(letter(to), id),
                Err(_) => self.deliver_to_acceptor(letter(from), to.parse().expect("a number")),
            };
            if !moved {
                break;
            }
        }
    }

    fn settle(&mut self) {
        loop {
            let pairs: Vec<(char, u64)> = self.connections.keys().copied().collect();
            let mut moved = false;
            for (name, id) in pairs {
                while self.deliver_to_acceptor(name, id) {
                    moved = true;
                }
                while self.deliver_to_proposer(name, id) {
                    moved = true;
                }
                moved |= self.pull(name, id);
            }
            if !moved {
                break;
            }
        }
    }

    fn pull(&mut self, name: char, id: u64) -> bool {
        let now_ms = self.now_ms;
        let Some(server) = self.servers.get_mut(&name) else {
            return false;
        };
        let (peer, end) = (server.peer(id), server.end);
        let mut wal = LocalWal {
            end_lsn: end,
            flush_lsn: end,
        };
        let mut source = &server.bytes;
        // What a standby has not received yet, a member that follows has.
        let next = server.proposer.next_lsn(peer).unwrap_or(Lsn::INVALID);
        let donors = server.proposer.donors_for(next);
        let has_it = |donor: &&PeerIdx| {
            let donor = &self.nodes[&server.id(**donor)];
            next >= end && donor.durable_bytes.0.contains_key(&next.0)
        };
        if let Some(donor) = donors.iter().find(has_it) {
            let donor = &self.nodes[&server.id(*donor)];
            (wal.end_lsn, source) = (donor.durable_end, &donor.durable_bytes);
        }
        let Some(append) = server.proposer.next_append(peer, wal, now_ms) else {
            return false;
        };
        let range = append.begin_lsn.0..append.begin_lsn.0 + u64::from(append.len);
        let wal = range.map(|lsn| source.0.get(&lsn).copied().expect("a byte of WAL"));
        let wal: Vec<char> = wal.collect();
        let connection = self.connections.get_mut(&(name, id)).expect("a connection");
        connection
            .to_acceptor
            .push_back((ProposerMessage::Append(append), wal));
        true
    }

    fn deliver_to_acceptor(&mut self, name: char, id: u64) -> bool {
        let Some(connection) = self.connections.get_mut(&(name, id)) else {
            return false;
        };
        let Some((message, wal)) = connection.to_acceptor.pop_front() else {
            return false;
        };
        let session = connection.session;
        through_the_wire_to_acceptor(&message);
        let _ = writeln!(self.out, "| {name}->{id} {}", brief_proposer(&message));

        if !matches!(
            message,
            ProposerMessage::Append(_) | ProposerMessage::Read(_)
        ) {
            self.flush_for(name, id);
        }
        let now_ms = self.now_ms;
        let node = self.nodes.get_mut(&id).expect("a safekeeper");
        let acceptor = node.acceptor.as_mut().expect("connected, so running");
        let mut actions = Vec::new();
        let handled = match &message {
            ProposerMessage::Greeting(m) => acceptor.on_greeting(m, now_ms, &mut actions),
            ProposerMessage::Configure(m) => acceptor.on_configure(m, &mut actions),
            ProposerMessage::VoteRequest(m) => acceptor.on_vote_request(m, &mut actions),
            ProposerMessage::Elected(m) => acceptor.on_elected(session, m, now_ms, &mut actions),
            ProposerMessage::Append(m) => acceptor.on_append(session, m, now_ms, &mut actions),
            ProposerMessage::Read(m) => acceptor.on_read(m, &mut actions),
        };
        if let Err(refusal) = handled {
            let _ = writeln!(self.out, "|   refused: {refusal}");
            self.cut(name, id);
            return true;
        }
        self.carry_out_acceptor(name, id, actions, &wal);
        if !self.nodes[&id].holds {
            self.flush_for(name, id);
        }
        true
    }

    /// Flush what is open, on behalf of the connection that leads if it is still there.
    fn flush(&mut self, id: u64) {
        let acceptor = self.nodes[&id].acceptor.as_ref().expect("running");
        let mut connections = self.connections.iter();
        let leading = connections.find(|((_, to), c)| *to == id && acceptor.leads(c.session));
        let name = leading.map_or('-', |((name, _), _)| *name);
        self.flush_for(name, id);
    }

    /// Flush what is open, on the thread that serves `name`: answers go there.
    fn flush_for(&mut self, name: char, id: u64) {
        let node = self.nodes.get_mut(&id).expect("a safekeeper");
        let acceptor = node.acceptor.as_mut().expect("running");
        if !acceptor.needs_flush() {
            return;
        }
        let mut actions = Vec::new();
        let end = acceptor.write_lsn();
        acceptor.on_flushed(end, &mut actions);
        node.durable_bytes = node.bytes.clone();
        node.durable_end = end;
        self.carry_out_acceptor(name, id, actions, &[]);
    }

    fn carry_out_acceptor(
        &mut self,
        name: char,
        id: u64,
        actions: Vec<AcceptorAction>,
        wal: &[char],
    ) {
        let node = self.nodes.get_mut(&id).expect("a safekeeper");
        for action in actions {
            match action {
                AcceptorAction::Write { begin_lsn, .. } => {
                    for (i, writer) in wal.iter().enumerate() {
                        node.bytes.write(begin_lsn.0 + i as u64, 1, *writer);
                    }
                }
                AcceptorAction::Persist(state) => {
                    let _ = writeln!(
                        self.out,
                        "|   {id} persists term {} {}",
                        state.term, state.history
                    );
                    node.durable = state;
                }
                AcceptorAction::Truncate { end_lsn, .. } => {
                    let _ = writeln!(self.out, "|   {id} truncates to {end_lsn}");
                    node.bytes.truncate(end_lsn.0);
                    node.durable_bytes = node.bytes.clone();
                    node.durable_end = end_lsn;
                }
                AcceptorAction::ReplaceTimelineFiles(files) if files.is_empty() => {}
                AcceptorAction::ReplaceTimelineFiles(files) => {
                    let tlis = files.iter().map(|file| format!(" {}", file.tli));
                    let tlis: String = tlis.collect();
                    let _ = writeln!(self.out, "|   {id} has the history files of{tlis}");
                }
                AcceptorAction::Commit(lsn) => {
                    let _ = writeln!(self.out, "|   {id} commits {lsn}");
                }
                AcceptorAction::Send(message) => {
                    if let Some(connection) = self.connections.get_mut(&(name, id)) {
                        connection.to_proposer.push_back(message);
                    }
                }
                AcceptorAction::Read(_) => unreachable!("scenarios do not read"),
            }
        }
    }

    fn deliver_to_proposer(&mut self, name: char, id: u64) -> bool {
        let Some(connection) = self.connections.get_mut(&(name, id)) else {
            return false;
        };
        let Some(message) = connection.to_proposer.pop_front() else {
            return false;
        };
        through_the_wire_to_proposer(&message);
        let _ = writeln!(self.out, "| {id}->{name} {}", brief_acceptor(&message));
        let (mut actions, now_ms) = (Vec::new(), self.now_ms);
        let server = self.server(name);
        let peer = server.peer(id);
        server
            .proposer
            .on_message(peer, &message, now_ms, &mut actions);
        self.carry_out(name, actions);
        true
    }

    fn carry_out(&mut self, name: char, actions: Vec<ProposerAction>) {
        for action in actions {
            let mut more = Vec::new();
            let now_ms = self.now_ms;
            match action {
                ProposerAction::Send { to, message } => {
                    let connection = self
                        .connections
                        .get_mut(&(name, self.servers[&name].id(to)));
                    if let Some(connection) = connection {
                        connection.to_acceptor.push_back((message, Vec::new()));
                    }
                }
                ProposerAction::Disconnect { peer, reason } => {
                    let id = self.servers[&name].id(peer);
                    let _ = writeln!(self.out, "|   {name} disconnects {id}: {reason}");
                    self.cut(name, id);
                }
                ProposerAction::Compare {
                    donor,
                    term,
                    begin_lsn,
                    end_lsn,
                } => {
                    let id = self.servers[&name].id(donor);
                    let _ = writeln!(
                        self.out,
                        "|   {name} compares {begin_lsn}..{end_lsn} with {id}"
                    );
                    let outcome = match self.stands_in(id, term) {
                        true => self.compare(name, id, begin_lsn, end_lsn),
                        false => Compared::Unavailable {
                            reason: "donor's term moved on".into(),
                        },
                    };
                    self.server(name)
                        .proposer
                        .on_compared(outcome, now_ms, &mut more);
                }
                ProposerAction::Complete {
                    donor,
                    term,
                    begin_lsn,
                    end_lsn,
                } => {
                    let id = self.servers[&name].id(donor);
                    let _ = writeln!(
                        self.out,
                        "|   {name} completes {begin_lsn}..{end_lsn} from {id}"
                    );
                    let node = &self.nodes[&id];
                    let range = node.bytes.0.range(begin_lsn.0..end_lsn.0);
                    let missing: Vec<(u64, char)> = range.map(|(lsn, w)| (*lsn, *w)).collect();
                    let stands = self.stands_in(id, term);
                    let server = self.server(name);
                    let outcome = if server.unreadable || !stands {
                        let reason = "connection refused".into();
                        let end_lsn = begin_lsn;
                        Completed::Partly { end_lsn, reason }
                    } else {
                        server.bytes.0.extend(missing);
                        server.end = end_lsn;
                        Completed::Whole
                    };
                    server.proposer.on_completed(outcome, now_ms, &mut more);
                }
                ProposerAction::NothingToRecover => {
                    let _ = writeln!(self.out, "|   {name} has nothing to recover");
                }
                ProposerAction::Replay { end_lsn } => {
                    let _ = writeln!(self.out, "|   {name} is to replay up to {end_lsn}");
                    let server = self.servers.get_mut(&name).expect("a started server");
                    server.bytes.0.extend(self.committed.range(..end_lsn.0));
                    server.end = end_lsn;
                }
                ProposerAction::Promote { tli, switch_lsn } => {
                    let _ = writeln!(
                        self.out,
                        "|   {name} is to promote to timeline {tli} at {switch_lsn}"
                    );
                    self.server(name).promotion = Some((tli, switch_lsn));
                }
                ProposerAction::PersistHistory {
                    history,
                    configuration,
                } => {
                    let _ = writeln!(self.out, "|   {name} persists {history}");
                    self.configurations.insert(name, configuration);
                    let server = self.server(name);
                    server.history = history;
                    server.proposer.on_history_persisted(now_ms, &mut more);
                }
                ProposerAction::Lead { term, start_lsn } => {
                    let _ = writeln!(self.out, "|   {name} leads term {term} from {start_lsn}");
                }
                ProposerAction::Commit(lsn) => {
                    let _ = writeln!(self.out, "|   {name} commits {lsn}");
                    let committed: Vec<(u64, char)> = self
                        .log_of(name)
                        .range(..lsn.0)
                        .map(|(lsn, writer)| (*lsn, *writer))
                        .collect();
                    for (lsn, writer) in committed {
                        let before = self.committed.insert(lsn, writer);
                        assert!(
                            before.is_none_or(|before| before == writer),
                            "committed byte at {} changed",
                            Lsn(lsn)
                        );
                    }
                }
                ProposerAction::Wait(reason) => {
                    let _ = writeln!(self.out, "|   {name} waits: {reason}");
                }
                ProposerAction::Deposed { term } => {
                    let _ = writeln!(self.out, "|   {name} is deposed by term {term}");
                }
            }
            self.carry_out(name, more);
        }
    }

    /// The log that this server leads: its own, or while it is a standby that of the members.
    fn log_of(&self, name: char) -> BTreeMap<u64, char> {
        let server = &self.servers[&name];
        if server.proposer.is_leading() {
            return server.bytes.0.clone();
        }
        let followers = self
            .nodes
            .values()
            .filter(|node| node.durable.history == *server.proposer.history());
        let longest = followers.max_by_key(|node| node.durable_bytes.0.len());
        longest
            .map(|node| node.durable_bytes.0.clone())
            .unwrap_or_default()
    }

    /// A read is answered only in the term it was asked in (W4).
    fn stands_in(&self, id: u64, term: Term) -> bool {
        let acceptor = self.nodes[&id].acceptor.as_ref();
        acceptor.is_some_and(|acceptor| acceptor.term() == term)
    }

    fn compare(&self, name: char, donor: u64, begin: Lsn, end: Lsn) -> Compared {
        if self.servers[&name].unreadable {
            let reason = "connection refused".into();
            return Compared::Unavailable { reason };
        }
        if let Some(at) = self.servers[&name].differ {
            return Compared::Differs { at };
        }
        let (ours, theirs) = (&self.servers[&name].bytes, &self.nodes[&donor].bytes);
        for lsn in begin.0..end.0 {
            if ours.0.get(&lsn) != theirs.0.get(&lsn) {
                return Compared::Differs { at: Lsn(lsn) };
            }
        }
        Compared::Equal
    }

    fn show(&mut self) {
        for (id, node) in &self.nodes {
            let line = match &node.acceptor {
                None => "down".to_string(),
                Some(acceptor) => format!(
                    "term {} log {} flush {} commit {} configuration {}",
                    acceptor.term(),
                    acceptor.history(),
                    acceptor.flush_lsn(),
                    acceptor.commit_lsn(),
                    acceptor.configuration(),
                ),
            };
            let _ = writeln!(self.out, "| {id}: {line}");
        }
        for (name, server) in &self.servers {
            let peers = server.peers.iter().map(|id| {
                let status = server.proposer.peer_status(server.peer(*id));
                format!(" {id} {} {}", status.state, status.flush_lsn)
            });
            let _ = writeln!(
                self.out,
                "| {name}: {}{} term {} log {} end {} commit {};{}",
                server.proposer.state_name(),
                server
                    .proposer
                    .change_step()
                    .map_or(String::new(), |step| format!(" ({step})")),
                server.proposer.term(),
                server.history,
                server.end,
                server.proposer.commit_lsn(),
                peers.collect::<Vec<_>>().join(","),
            );
        }
    }

    /// Same term, same position, same byte; and every committed byte is on a majority.
    fn check(&self) {
        let labelled = |node: &Node, lsn: u64| {
            let writer = node.durable_bytes.0.get(&lsn)?;
            Some((node.durable.history.last_log_term(Lsn(lsn)), *writer))
        };
        let nodes: Vec<&Node> = self.nodes.values().collect();
        for (i, a) in nodes.iter().enumerate() {
            for b in &nodes[..i] {
                for lsn in a.durable_bytes.0.keys() {
                    if let (Some(x), Some(y)) = (labelled(a, *lsn), labelled(b, *lsn)) {
                        assert!(
                            x.0 != y.0 || x.1 == y.1,
                            "{:?} and {:?} at {}",
                            x,
                            y,
                            Lsn(*lsn)
                        );
                    }
                }
            }
        }
        for (lsn, writer) in &self.committed {
            let holders = nodes
                .iter()
                .filter(|node| node.durable_bytes.0.get(lsn) == Some(writer))
                .count();
            let enough = holders >= majority(nodes.len()) || holders + 1 >= nodes.len() - 1;
            assert!(
                holders >= 1 && (enough || self.changed),
                "committed byte at {} is on {holders} safekeepers",
                Lsn(*lsn)
            );
        }
    }
}

fn address(id: u64) -> PeerAddress {
    PeerAddress {
        host: format!("sk{id}"),
        port: 5454,
    }
}

fn letter(name: &str) -> char {
    assert!(
        name.len() == 1,
        "a server's name is one letter, not {name:?}"
    );
    name.chars().next().expect("one letter")
}

fn brief_proposer(message: &ProposerMessage) -> String {
    match message {
        ProposerMessage::Greeting(_) => "greeting".into(),
        ProposerMessage::Configure(m) => format!("configure {} term {}", m.configuration, m.term),
        ProposerMessage::VoteRequest(m) => format!("vote? term {}", m.term),
        ProposerMessage::Elected(m) => format!("elected {} start {}", m.history, m.start_lsn),
        ProposerMessage::Append(m) if m.len == 0 => {
            format!("heartbeat term {} commit {}", m.term, m.commit_lsn)
        }
        ProposerMessage::Append(m) => {
            format!(
                "append term {} {} +{:X} commit {}",
                m.term, m.begin_lsn, m.len, m.commit_lsn
            )
        }
        ProposerMessage::Read(m) => format!("read {} {:X}", m.begin_lsn, m.len),
    }
}

fn brief_acceptor(message: &AcceptorMessage) -> String {
    match message {
        AcceptorMessage::Greeting(m) => {
            format!(
                "greeting term {} log {} flush {}",
                m.term, m.history, m.flush_lsn
            )
        }
        AcceptorMessage::ConfigureResponse(m) => {
            format!("configured {} term {}", m.configuration, m.term)
        }
        AcceptorMessage::VoteResponse(m) => {
            let answer = if m.granted { "granted" } else { "refused" };
            format!(
                "vote {answer} term {} log {} flush {}",
                m.term, m.history, m.flush_lsn
            )
        }
        AcceptorMessage::AppendResponse(m) => {
            let applied = match m.feedback.apply_lsn {
                Lsn::INVALID => String::new(),
                lsn => format!(", standbys have replayed {lsn}"),
            };
            format!("flushed {} term {}{applied}", m.flush_lsn, m.term)
        }
        AcceptorMessage::ReadResponse(m) => format!("read {}", m.begin_lsn),
    }
}

/// Every message of every scenario goes through the codec too.
fn through_the_wire_to_acceptor(message: &ProposerMessage) {
    let mut bytes = Vec::new();
    encode_proposer_message(message, &mut bytes);
    if let ProposerMessage::Append(append) = message {
        bytes.resize(bytes.len() + append.len as usize, b'w');
    }
    let (decoded, _) = decode_proposer_message(&bytes).expect("our own encoding");
    assert_eq!(&decoded, message);
}

fn through_the_wire_to_proposer(message: &AcceptorMessage) {
    let mut bytes = Vec::new();
    encode_acceptor_message(message, &mut bytes);
    let (decoded, _) = decode_acceptor_message(&bytes).expect("our own encoding");
    assert_eq!(&decoded, message);
}

/// The scenario with its output written anew.
fn play(text: &str) -> String {
    let mut world = World {
        now_ms: 1_000_000,
        ..World::default()
    };
    let mut played = String::new();
    for line in text.lines().filter(|line| !line.starts_with('|')) {
        played.push_str(line);
        played.push('\n');
        let command = line.split('#').next().unwrap_or_default().trim();
        if !command.is_empty() {
            world.out.clear();
            world.run(command);
            played.push_str(&world.out);
        }
    }
    played
}

fn scenarios() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&dir)
        .expect("tests/scenarios")
        .map(|entry| entry.expect("a directory entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "txt"))
        .collect();
    paths.sort();
    assert!(
        paths.len() >= 10,
        "scenarios are missing from {}",
        dir.display()
    );
    paths
}

#[cfg(not(feature = "mutations"))]
#[test]
fn every_scenario_ends_as_it_is_written() {
    let rewrite = std::env::var_os("REWRITE").is_some();
    let mut failed = Vec::new();
    for path in scenarios() {
        let text = std::fs::read_to_string(&path).expect("a readable scenario");
        let played = play(&text);
        if played == text {
            continue;
        }
        if rewrite {
            std::fs::write(&path, played).expect("a writable scenario");
            continue;
        }
        let differs = text
            .lines()
            .zip(played.lines())
            .find(|(want, got)| want != got);
        let (want, got) = differs.unwrap_or(("(its end)", "(more lines, or fewer)"));
        failed.push(format!(
            "{}:\n  expected {want}\n  got      {got}",
            path.display()
        ));
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// A scenario notices a broken rule if it ends otherwise, or does not end.
#[cfg(feature = "mutations")]
#[test]
fn every_mutation_is_caught() {
    use mutations::Verdict;
    use safekeeper_protocol::mutation::{Catcher, Keeper};

    let missed = mutations::unnoticed(Catcher::Scenarios, "scenarios", |mutation| {
        if mutation.kept_by() != Keeper::Core {
            return Verdict::MeansNothingHere;
        }
        let paths = scenarios();
        let notices = |path: &&PathBuf| {
            let text = std::fs::read_to_string(path).expect("a readable scenario");
            let played = std::panic::catch_unwind(|| play(&text));
            played.is_err() || played.is_ok_and(|played| played != text)
        };
        let noticed: Vec<&PathBuf> = paths.iter().filter(notices).collect();
        let after = paths.len() as u64;
        match noticed.first().and_then(|path| path.file_stem()) {
            Some(name) => Verdict::Caught {
                after,
                by: format!("{} of them: {}", noticed.len(), name.display()),
            },
            None => Verdict::Missed { after },
        }
    });
    assert!(missed.is_empty(), "not caught: {missed:?}");
}

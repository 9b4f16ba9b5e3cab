//! One state of the model: three safekeepers, two servers, what is on its way between them.
//!
//! ```text
//!   Server 0 ─┬─ Link ─┬─► Safekeeper 0        a Link holds   requests ─►  (with their WAL)
//!             ├─ Link ─┼─► Safekeeper 1                       ◄─ answers   (only if they are late)
//!   Server 1 ─┴─ Link ─┴─► Safekeeper 2                       old         (a connection the server
//!                                                                           has given up, the
//!                                                                           safekeeper not yet)
//! ```
//!
//! A log is a list of [`Writer`]s: the entry at place `i` lies at `LOG_START + i`, is one byte
//! long, and says which run of which server wrote it. Two logs that hold different bytes at one
//! position hold different writers there.
//!
//! A step changes two or three of these parts; the others are shared with the state before it,
//! together with their hashes. Nothing here knows a rule of the protocol.

use std::collections::{HashMap, VecDeque};
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex};

use safekeeper_protocol::*;

pub const SAFEKEEPERS: usize = 3;
pub const SERVERS: usize = 2;
/// Highest term that any scope explores, and one more, for arrays by term.
pub const TERMS: usize = 6;
/// A segment start, so that a first use begins the log here.
pub const LOG_START: Lsn = Lsn(0x10_0000);

/// Who wrote an entry. `run` counts the starts of the server: what a crash took and another run
/// writes anew at the same place is another entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Writer {
    pub server: u8,
    pub run: u8,
}

/// Of the log that all begin with.
pub const ANCESTOR: Writer = Writer { server: 9, run: 0 };

pub type Entries = Vec<Writer>;

pub fn lsn(entries: usize) -> Lsn {
    LOG_START + entries as u64
}

/// Entries below a position.
pub fn place(lsn: Lsn) -> usize {
    usize::try_from(lsn.0.saturating_sub(LOG_START.0)).expect("a few entries")
}

/// A safekeeper: its process and its disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Safekeeper {
    pub acceptor: Acceptor,
    pub incarnation: Incarnation,
    /// The control file.
    pub durable: AcceptorState,
    /// A log was begun: its start is on disk, even if no entry is.
    pub begun: bool,
    pub entries: Entries,
    /// How many of them survive a power cut.
    pub flushed: usize,
}

/// What the host of a proposer has been asked to do and has not done yet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Task {
    Compare {
        donor: usize,
        term: Term,
        begin: usize,
        end: usize,
    },
    Complete {
        donor: usize,
        term: Term,
        begin: usize,
        end: usize,
    },
    /// The missing entries are written, their fsync is under way.
    Completed,
    Persist {
        history: TermHistory,
        configuration: Configuration,
    },
    /// A standby is to replay up to here.
    Replay { end: usize },
    /// A standby that has replayed so is to end recovery.
    Promote { tli: u32 },
    /// It has, where it was; its worker has not told yet.
    Promoted { tli: u32, switch: usize },
}

/// A Postgres: its process, if it runs, and its data directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Server {
    pub proposer: Option<Proposer>,
    pub task: Option<Task>,
    /// Recovery is over: backends insert WAL, whether or not the worker leads.
    pub up: bool,
    /// Its worker was told so, and is gone; only a start of the server brings another.
    pub deposed: bool,
    /// It replays what safekeepers show; its history file is void.
    pub standby: bool,
    /// The term that the start has won, until its worker takes it over.
    pub won: Option<WonTerm>,
    /// Timeline on which it writes, or that it replays.
    pub tli: u32,
    /// Entries from there on were written without a term.
    pub unled_from: Option<usize>,
    pub run: u8,
    /// Of the worker, for its seed.
    pub starts: u8,
    /// Safekeepers of its list, in order: a `PeerIdx` is a place in it.
    pub list: Vec<usize>,
    /// The local history file.
    pub history: TermHistory,
    pub configuration: Configuration,
    pub entries: Entries,
    /// How many of them certainly survive a crash. The others may: the server flushes when it likes.
    pub flushed: usize,
}

impl Server {
    /// Of a safekeeper that it has a link to, hence of its list.
    pub fn peer(&self, safekeeper: usize) -> PeerIdx {
        let place = self.list.iter().position(|&listed| listed == safekeeper);
        PeerIdx(place.expect("a listed safekeeper"))
    }
}

/// A connection that the server has given up, and whose last words are still on their way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Old {
    pub slot: u64,
    pub requests: VecDeque<(ProposerMessage, Entries)>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Link {
    /// The server has it open.
    pub open: bool,
    /// The safekeeper has ended it, or has died.
    pub ended: bool,
    /// Which of this link's two session ids it has.
    pub slot: u64,
    pub requests: VecDeque<(ProposerMessage, Entries)>,
    /// Only those that came too late to be heard at once.
    pub answers: VecDeque<AcceptorMessage>,
    pub old: Option<Old>,
}

/// How often each fault may still strike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Faults {
    /// kill -9 of a server, with the loss of any part of its unflushed WAL.
    pub server_crashes: u8,
    /// The worker dies, its server goes on.
    pub worker_crashes: u8,
    pub safekeeper_crashes: u8,
    /// A connection breaks; what was sent may still arrive.
    pub cuts: u8,
    /// A candidacy is given up while its requests may yet be answered.
    pub timeouts: u8,
    /// A safekeeper's directory is made anew.
    pub wipes: u8,
    /// Somebody wants a standby promoted.
    pub promotions: u8,
    /// The same, without asking the quorum.
    pub by_hand: u8,
    /// A server is started by override, without the quorum.
    pub overrides: u8,
    /// A stopped server becomes a standby.
    pub rejoins: u8,
    /// Somebody wants other members.
    pub changes: u8,
    /// And wants them no more.
    pub give_ups: u8,
}

/// What no participant can see, and the properties need.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Observed {
    /// Terms in which somebody led, by bit.
    pub led: u8,
    /// The log as far as it was ever announced as committed.
    pub committed: Entries,
    /// How far it was announced in each term.
    pub committed_in: [u8; TERMS],
    pub violation: Option<Violation>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Violation {
    TwoLeaders,
    CommittedChanged,
    CommitWentBack,
    OtherBytes,
    AnsweredBeforeDurable,
    LockedOut,
    Endless,
    Refused(String),
    Panicked(String),
}

/// A part of the state that steps share until one changes it. Its hash is made once, and equal
/// parts are kept once: there are far fewer of them than states.
#[derive(Clone, Debug)]
pub struct Shared<T> {
    value: Arc<T>,
    /// `None` between a change and the end of the step.
    hash: Option<u64>,
}

impl<T: Clone + Hash + PartialEq> Shared<T> {
    pub fn new(value: T) -> Shared<T> {
        Shared {
            value: Arc::new(value),
            hash: None,
        }
    }

    pub fn edit(&mut self) -> &mut T {
        self.hash = None;
        Arc::make_mut(&mut self.value)
    }

    pub fn is_changed(&self) -> bool {
        self.hash.is_none()
    }

    fn seal(&mut self, pool: &Pool<T>) {
        if self.hash.is_none() {
            let mut hasher = Mixer::default();
            self.value.hash(&mut hasher);
            let hash = hasher.finish();
            self.value = pool.the_one(hash, &self.value);
            self.hash = Some(hash);
        }
    }
}

/// All values of one kind of part that were ever seen, by hash.
#[derive(Debug)]
pub struct Pool<T>([Mutex<HashMap<u64, Arc<T>>>; 64]);

impl<T> Default for Pool<T> {
    fn default() -> Pool<T> {
        Pool(std::array::from_fn(|_| Mutex::default()))
    }
}

impl<T: PartialEq> Pool<T> {
    /// Two parts of one hash would be taken for one state: that must not pass unnoticed.
    fn the_one(&self, hash: u64, value: &Arc<T>) -> Arc<T> {
        let shard = &self.0[hash as usize % self.0.len()];
        let mut known = shard.lock().expect("a pool that nobody panics in");
        let one = known.entry(hash).or_insert_with(|| Arc::clone(value));
        assert!(
            **one == **value,
            "two different parts with the hash {hash:x}"
        );
        Arc::clone(one)
    }
}

#[derive(Debug, Default)]
pub struct Pools {
    safekeepers: Pool<Safekeeper>,
    servers: Pool<Server>,
    links: Pool<Link>,
    observed: Pool<Observed>,
}

impl<T> std::ops::Deref for Shared<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> Hash for Shared<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash.expect("sealed at the end of the step"));
    }
}

impl<T: PartialEq> PartialEq for Shared<T> {
    fn eq(&self, other: &Shared<T>) -> bool {
        Arc::ptr_eq(&self.value, &other.value) || self.value == other.value
    }
}

/// Words of a state are small numbers, and there are many: multiply and rotate, mix at the end.
#[derive(Default)]
pub struct Mixer(u64);

impl Mixer {
    fn word(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}

impl Hasher for Mixer {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.word(u64::from_le_bytes(word));
        }
    }
    fn write_u8(&mut self, word: u8) {
        self.word(u64::from(word));
    }
    fn write_u16(&mut self, word: u16) {
        self.word(u64::from(word));
    }
    fn write_u32(&mut self, word: u32) {
        self.word(u64::from(word));
    }
    fn write_u64(&mut self, word: u64) {
        self.word(word);
    }
    fn write_usize(&mut self, word: usize) {
        self.word(word as u64);
    }
    fn finish(&self) -> u64 {
        let mixed = (self.0 ^ self.0 >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        mixed ^ mixed >> 32
    }
}

#[derive(Clone, Debug, Hash, PartialEq)]
pub struct World {
    pub safekeepers: [Shared<Safekeeper>; SAFEKEEPERS],
    pub servers: [Shared<Server>; SERVERS],
    pub links: [[Shared<Link>; SAFEKEEPERS]; SERVERS],
    pub observed: Shared<Observed>,
    pub faults: Faults,
}

impl World {
    /// The end of a step: times and random numbers are forgotten, hashes made.
    pub fn seal(&mut self, pools: &Pools) {
        for server in &mut self.servers {
            if server.is_changed()
                && let Some(proposer) = &mut server.edit().proposer
            {
                proposer.forget_time();
            }
            server.seal(&pools.servers);
        }
        for safekeeper in &mut self.safekeepers {
            safekeeper.seal(&pools.safekeepers);
        }
        for link in self.links.iter_mut().flatten() {
            link.seal(&pools.links);
        }
        self.observed.seal(&pools.observed);
    }

    /// The session of a link's connection, if `slot` is that of the connection.
    pub fn session(server: usize, slot: u64) -> Session {
        Session {
            id: server as u64 * 2 + slot,
            proposer_id: ProposerId(server as u128 + 1),
        }
    }

    /// The first violation wins: what comes after it may only follow from it.
    pub fn accuse(&mut self, violation: Violation) {
        if self.observed.violation.is_none() {
            self.observed.edit().violation = Some(violation);
        }
    }
}

//! A primary server, as far as the quorum can see it: a data directory with WAL and a local
//! history, and while it runs a real `Proposer` in the place of the worker.
//!
//! ```text
//!   Down ──start──► Starting ──won, completed──► Recovering ──► Running ──crash──► Down
//!                   BeforeRecovery               the term is     inserts, flushes; the worker may
//!                                                handed over     die and stand again (Standing::Running)
//! ```
//!
//! What wins before recovery is a proposer in the postmaster, and ends with that. The worker comes
//! after recovery has written its records, and goes on in the same term, once.
//!
//! WAL is real: records written by `synthetic`, found again at start by decoding. A crash keeps
//! what was flushed and any part of the rest. WAL may be pushed before it is flushed, so the
//! quorum may be ahead of the data directory afterwards. The local history file is replaced whole;
//! a crash while it is being replaced leaves the old one or the new one.
//!
//! A server may also be a standby, and become a primary on a timeline of its own: see standby.rs.
//! WAL is one run of bytes here over all timelines; only the page headers tell them apart, and what
//! the history files say. Not here: backends, and what replay would do.

use std::ops::Range;

use safekeeper_protocol::mutation::{Mutation, is_on};
use safekeeper_protocol::{
    Configuration, LocalLog, LocalWal, Lsn, PeerAddress, Proposer, ProposerAction, ProposerId,
    ProposerSettings, Standing, TermHistory, TimelineFile, Tli, WonTerm,
};
use safekeeper_wal::synthetic::WalBuilder;
use safekeeper_wal::{TimelineHistory, TimelineSwitch, WalDecoder};

use super::membership::ChangeUnderWay;
use super::random::Random;
use super::standby::Standby;
use super::{SEGMENT_SIZE, cluster_identity, wal_format};

/// What is on the server's own disk, or on its way there.
#[derive(Clone, Debug)]
pub struct DataDir {
    pub proposer_id: ProposerId,
    /// WAL from `base` on, inserted; flushed up to `flush_lsn`.
    pub wal: Vec<u8>,
    pub base: Lsn,
    pub flush_lsn: Lsn,
    pub history: LocalHistory,
    /// A replacement of it that is not yet durable.
    pub next_history: Option<LocalHistory>,
    /// The timeline it is on, and its ancestors.
    pub timelines: TimelineHistory,
    /// Their history files, newest first.
    pub timeline_files: Vec<TimelineFile>,
    /// `standby.signal` is there; the local history file is void.
    pub is_standby: bool,
    /// And no reign has come of it yet.
    pub promoted_by_hand: bool,
    /// Its timeline came from a promotion that asked nobody.
    pub by_hand: bool,
    /// Number of the promotion that its timeline came from, unique in a run; copies share it.
    pub promotion: u64,
}

/// The local history file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalHistory {
    pub history: TermHistory,
    pub configuration: Configuration,
    pub unled_from: Option<Lsn>,
}

/// One server.
pub struct Postgres {
    pub data: DataDir,
    pub process: Option<Process>,
    /// While it runs as one. Its process is then what promotes it.
    pub standby: Option<Standby>,
    /// It does nothing before.
    pub stopped_until_ms: u64,
    /// Its clock runs ahead by so much.
    pub clock_ahead_ms: u64,
    /// Takes no part any more until it is made anew.
    pub is_given_up: bool,
}

/// A postmaster and its worker.
pub struct Process {
    /// Number of the proposer, unique in a run.
    pub id: u64,
    /// Number of the proposer that won this reign, or would: another one's if it was handed over.
    pub reign: u64,
    /// Won before recovery, for the worker. Until that has come no proposer acts.
    pub won: Option<WonTerm>,
    pub proposer: Proposer,
    /// The connection to each peer, if there is one that the proposer uses.
    pub connections: Vec<Option<u64>>,
    /// WAL goes to the members before it is flushed here.
    pub pushes_early: bool,
    /// Most WAL that is put into one message.
    pub append_len_max: u64,
    /// Recovery is over: WAL is inserted.
    pub wal: Option<WalBuilder>,
    pub next_tick_ms: u64,
    /// The judge knows what was inserted below.
    pub told_lsn: Lsn,
    /// What this proposer has called committed.
    pub commit_lsn: Lsn,
    /// Something is being read from a donor.
    pub reading: Option<Reading>,
    /// A promotion waits until just this has been replayed.
    pub replay_to: Option<Lsn>,
    /// It has, and Postgres is about to begin this timeline.
    pub promotes_to: Option<Tli>,
    /// A change of members that is under way.
    pub change: Option<ChangeUnderWay>,
}

/// A stretch that is read from a donor, to compare or to complete.
#[derive(Clone, Debug)]
pub struct Reading {
    pub donor: usize,
    pub term: safekeeper_protocol::Term,
    pub next: Lsn,
    pub end: Lsn,
    pub completes: bool,
}

impl DataDir {
    /// As initdb and some use without the extension leave it: `len` bytes of WAL, more or less.
    pub fn init(random: &mut Random, base: Lsn, len: u32) -> DataDir {
        let mut wal = WalBuilder::new(wal_format(), 1, base);
        wal.noop(40);
        wal.noop(len);
        wal.noop(40);
        DataDir {
            proposer_id: new_proposer_id(random),
            flush_lsn: wal.position(),
            wal: wal.bytes().to_vec(),
            base,
            history: LocalHistory::default(),
            next_history: None,
            timelines: TimelineHistory::root(1),
            timeline_files: Vec::new(),
            is_standby: false,
            promoted_by_hand: false,
            by_hand: false,
            promotion: 0,
        }
    }

    pub fn tli(&self) -> Tli {
        Tli(self.timelines.tli)
    }

    pub fn end(&self) -> Lsn {
        self.base + self.wal.len() as u64
    }

    pub fn bytes(&self, begin: Lsn, end: Lsn) -> &[u8] {
        &self.wal[(begin - self.base) as usize..(end - self.base) as usize]
    }

    /// What a crash, or a copy made at this moment, holds. Returns how much WAL is gone.
    pub fn crashed(&self, random: &mut Random) -> (DataDir, u64) {
        let mut copy = self.clone();
        let unflushed = self.end() - self.flush_lsn;
        let kept = match random.below(3) {
            0 => 0,
            1 => unflushed,
            _ => random.below(unflushed + 1),
        };
        copy.wal
            .truncate((self.flush_lsn + kept - self.base) as usize);
        if let Some(next) = copy.next_history.take().filter(|_| random.chance(500)) {
            copy.history = next;
        }
        if copy.is_standby {
            copy.history = LocalHistory::default();
        }
        (copy, unflushed - kept)
    }

    /// Ends the WAL behind its last whole record, and flushes it: what the server does first when
    /// it starts. Returns where that record begins.
    pub fn find_end(&mut self) -> Option<Lsn> {
        let decoder = self.decoded();
        self.wal
            .truncate((decoder.record_end() - self.base) as usize);
        self.flush_lsn = self.end();
        decoder.last_record()
    }

    /// A decoder that has taken in all of it, as far as it makes sense.
    pub fn decoded(&self) -> WalDecoder {
        let mut decoder = WalDecoder::new(wal_format(), self.base);
        decoder.expect_timelines(self.timelines.clone());
        let _ = decoder.feed(&self.wal);
        decoder
    }

    /// Drops the WAL behind `lsn`, and the timelines that begin there or later.
    pub fn cut_to(&mut self, lsn: Lsn) {
        self.wal.truncate((lsn - self.base) as usize);
        self.flush_lsn = self.flush_lsn.min(lsn);
        while let Some(switch) = self.timelines.ancestors.pop_if(|last| last.end_lsn >= lsn) {
            self.timelines.tli = switch.tli;
        }
        let newest = self.tli();
        self.timeline_files.retain(|file| file.tli <= newest);
    }

    /// A new timeline begins where its WAL ends; the history file is what Postgres writes.
    pub fn begin_timeline(&mut self, tli: Tli, promotion: u64) {
        let mut ancestors = self.timelines.ancestors.clone();
        ancestors.push(TimelineSwitch {
            tli: self.timelines.tli,
            end_lsn: self.end(),
            reason: "no recovery target specified".into(),
        });
        let tli = tli.0;
        let history = TimelineHistory { tli, ancestors };
        let content = history.to_string().into_bytes();
        self.take_timeline(history, content);
        self.promotion = promotion;
    }

    /// It is on this timeline from now on, whose file is `content`.
    pub fn take_timeline(&mut self, history: TimelineHistory, content: Vec<u8>) {
        let tli = Tli(history.tli);
        self.timelines = history;
        self.timeline_files.insert(0, TimelineFile { tli, content });
    }

    /// WAL read from a donor is at the end of ours by now, and flushed.
    pub fn complete(&mut self, bytes: &[u8]) {
        self.wal.extend_from_slice(bytes);
        self.flush_lsn = self.end();
    }

    fn local_log(&self, standing: Standing) -> LocalLog {
        let history = if is_on(Mutation::NoLocalHistory) {
            TermHistory::default()
        } else {
            self.history.history.clone()
        };
        let by_flush = standing == Standing::Running && is_on(Mutation::WorkerStandsByFlushLsn);
        LocalLog {
            history,
            tli: self.tli(),
            end_lsn: if by_flush { self.flush_lsn } else { self.end() },
            unled_from: self.history.unled_from,
            timeline_files: self.timeline_files.clone(),
            configuration: self.history.configuration.clone(),
        }
    }
}

/// Where the safekeeper of this index is dialled.
pub fn peer_address(idx: usize) -> PeerAddress {
    PeerAddress {
        host: format!("sk{}", idx + 1),
        port: 5454,
    }
}

pub fn new_proposer_id(random: &mut Random) -> ProposerId {
    ProposerId(u128::from(random.next()) << 64 | u128::from(random.next()))
}

impl Postgres {
    pub fn new(data: DataDir) -> Postgres {
        Postgres {
            data,
            process: None,
            standby: None,
            stopped_until_ms: 0,
            clock_ahead_ms: 0,
            is_given_up: false,
        }
    }

    /// Starts the postmaster: the election before recovery begins.
    pub fn start(&mut self, id: u64, settings: Settings, random: &mut Random, now_ms: u64) {
        let last_record = self.data.find_end();
        let skips =
            is_on(Mutation::ElectionBeforeRecoverySkipped) && !self.data.history.history.is_empty();
        let standing = if skips {
            Standing::Running
        } else {
            Standing::BeforeRecovery
        };
        let mut process = self.new_process(id, settings, standing, random, now_ms);
        process.wal = skips.then(|| builder(self.data.tli(), self.data.end(), last_record));
        self.process = Some(process);
        if skips {
            self.insert(80);
            self.restart_worker(id, settings, random, now_ms);
        }
    }

    /// Starts it against all advice without a quorum: its WAL is marked as unled.
    pub fn start_alone(&mut self, id: u64, settings: Settings, random: &mut Random, now_ms: u64) {
        let last_record = self.data.find_end();
        let end = self.data.end();
        let unled_from = self
            .data
            .history
            .unled_from
            .map_or(end, |unled| unled.min(end));
        self.data.history.unled_from = Some(unled_from);
        let mut process = self.new_process(id, settings, Standing::Running, random, now_ms);
        process.wal = Some(builder(self.data.tli(), end, last_record));
        self.process = Some(process);
        // The record of the end of recovery is there before anybody can connect.
        self.insert(100);
        self.restart_worker(id, settings, random, now_ms);
    }

    /// The worker dies, and another one stands for election. The server goes on.
    pub fn restart_worker(
        &mut self,
        id: u64,
        settings: Settings,
        random: &mut Random,
        now_ms: u64,
    ) {
        let Some(old) = self.process.take() else {
            return;
        };
        self.data.next_history = None;
        let standing = match self.standby {
            Some(_) => Standing::Standby,
            None => Standing::Running,
        };
        let mut process = self.new_process(id, settings, standing, random, now_ms);
        process.wal = old.wal;
        process.pushes_early = old.pushes_early;
        self.process = Some(process);
    }

    /// After recovery the worker comes, and goes on with the reign that the start has won. It has
    /// no connection yet.
    pub fn start_worker(
        &mut self,
        id: u64,
        settings: Settings,
        random: &mut Random,
        now_ms: u64,
    ) -> Vec<ProposerAction> {
        let Some(won) = self.process.as_mut().and_then(|old| old.won.take()) else {
            return Vec::new();
        };
        let mut actions = Vec::new();
        let peers = self.proposer_settings(settings, random);
        let local = self.data.local_log(Standing::Running);
        let proposer = Proposer::elected(peers, local, won, now_ms, &mut actions);
        let process = self.process.as_mut().expect("it has handed its term over");
        process.id = id;
        process.proposer = proposer;
        process.connections = vec![None; settings.n_nodes];
        process.next_tick_ms = u64::MAX;
        actions
    }

    fn proposer_settings(&self, settings: Settings, random: &mut Random) -> ProposerSettings {
        let peers = (0..settings.n_nodes).map(peer_address);
        ProposerSettings {
            proposer_id: self.data.proposer_id,
            cluster: cluster_identity(),
            peers: peers.collect(),
            member_timeout_ms: settings.member_timeout_ms,
            seed: random.next(),
        }
    }

    pub fn new_process(
        &self,
        id: u64,
        settings: Settings,
        standing: Standing,
        random: &mut Random,
        now_ms: u64,
    ) -> Process {
        let proposer_settings = self.proposer_settings(settings, random);
        let local = self.standby_log(self.data.local_log(standing));
        let won = won_by_the_file(&self.data.history).filter(|_| {
            standing == Standing::BeforeRecovery && is_on(Mutation::TermFromHistoryFile)
        });
        let proposer = match won {
            Some(won) => Proposer::elected(proposer_settings, local, won, now_ms, &mut Vec::new()),
            None => Proposer::new(proposer_settings, local, standing, now_ms),
        };
        Process {
            id,
            reign: id,
            won: None,
            proposer,
            connections: vec![None; settings.n_nodes],
            pushes_early: random.chance(700),
            append_len_max: [500, 5000, 100_000, 1 << 20][random.below(4) as usize],
            wal: None,
            next_tick_ms: u64::MAX,
            told_lsn: Lsn::INVALID,
            commit_lsn: Lsn::INVALID,
            reading: None,
            replay_to: None,
            promotes_to: None,
            change: None,
        }
    }

    /// Won before recovery: recovery runs, and the server opens. Returns where a record stands that
    /// a crash cut short, if there is one.
    pub fn recover(&mut self, random: &mut Random) -> Option<Range<Lsn>> {
        let last_record = self.data.find_end();
        let process = self
            .process
            .as_mut()
            .filter(|process| process.wal.is_none())?;
        let mut wal = builder(self.data.tli(), self.data.end(), last_record);
        let mut cut_short = None;
        let page = u64::from(safekeeper_wal::PAGE_SIZE);
        let on_page = self.data.end().0 % page;
        // A record that the crash cut short is overwritten from the next page on, and its first
        // part stays for ever.
        if random.chance(200) && on_page > 0 && on_page + 64 < page {
            let (lost, overwrite) = wal.overwritten(3 * page as u32, 0);
            cut_short = Some(lost..overwrite.start_lsn);
        }
        process.wal = Some(wal);
        self.take_inserted();
        self.insert(80);
        cut_short
    }

    /// Inserts a record with so many bytes of data; false if the server is not running.
    pub fn insert(&mut self, data_len: u32) -> bool {
        let Some(wal) = self
            .process
            .as_mut()
            .and_then(|process| process.wal.as_mut())
        else {
            return false;
        };
        wal.noop(data_len);
        self.take_inserted();
        true
    }

    /// Switches to the next segment, if the server is running and not at the start of one.
    pub fn switch_segment(&mut self) {
        let Some(wal) = self
            .process
            .as_mut()
            .and_then(|process| process.wal.as_mut())
        else {
            return;
        };
        if wal.position().segment_offset(SEGMENT_SIZE) != 0 {
            wal.switch();
            self.take_inserted();
        }
    }

    fn take_inserted(&mut self) {
        let wal = self
            .process
            .as_mut()
            .and_then(|process| process.wal.as_mut());
        let bytes = wal.expect("a running server").take_bytes();
        self.data.wal.extend_from_slice(&bytes);
    }

    /// What can be pushed.
    pub fn local_wal(&self) -> LocalWal {
        let pushes_early = self
            .process
            .as_ref()
            .is_some_and(|process| process.pushes_early);
        LocalWal {
            end_lsn: if pushes_early {
                self.data.end()
            } else {
                self.data.flush_lsn
            },
            flush_lsn: self.data.flush_lsn,
        }
    }
}

/// What a local history file must never be taken for.
fn won_by_the_file(file: &LocalHistory) -> Option<WonTerm> {
    let last = file.history.last()?;
    Some(WonTerm {
        term: last.term,
        history: file.history.clone(),
        configuration: file.configuration.clone(),
        sent_lsn: Lsn::INVALID,
    })
}

/// What all servers of a run have in common.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub n_nodes: usize,
    pub member_timeout_ms: u64,
}

pub fn builder(tli: Tli, end: Lsn, last_record: Option<Lsn>) -> WalBuilder {
    WalBuilder::new(wal_format(), tli.0, end).following(last_record.unwrap_or(Lsn::INVALID))
}

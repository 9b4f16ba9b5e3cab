//! Drives the proposer: carries out its actions, and keeps the pipelines to the members full.
//!
//! ```text
//!                     ┌───────────── Proposer (safekeeper-protocol) ─────────────┐
//!   messages ────────►│ on_message, on_tick            actions, next_append      │
//!                     └───────────────────────────────────┬──────────────────────┘
//!   Peer (socket) ◄── header + WAL ◄── WalSource (pg_wal) │ Commit ──► WalSenderSlot, shared memory
//!                                  ◄── Feed (a donor)     │ PersistHistory ──► local history file
//! ```
//!
//! One turn of [`Pusher::turn`] takes what has arrived, lets time pass, and sends what can be sent;
//! then the worker sleeps. Nothing here blocks, except for one fsync of the history file at an
//! election.
//!
//! Not here: signals, sleeping, shutdown (`worker.rs`).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pgrx::{PgSqlErrorCode, pg_sys};
use safekeeper_protocol::{
    Append, ClusterIdentity, Compared, Configuration, LocalLog, LocalWal, Lsn, PeerIdx, Proposer,
    ProposerAction, ProposerGreeting, ProposerId, ProposerSettings, Standing, Term, TermHistory,
    TimelineFile, Tli,
};
use safekeeper_wal::{
    PgVersion, SegmentSize, TimelineHistory, WalFormat, canonical_end, history_file_name,
};

use crate::compare::{Comparison, ComparisonEvent, Stretch};
use crate::connect::Dial;
use crate::donor::DonorRequest;
use crate::feed::{Feed, FeedPanicked};
use crate::lag::Lag;
use crate::local_history::{self, LocalHistory};
use crate::peer::{DialEvent, Peer};
use crate::postgres;
use crate::settings::{self, Settings};
use crate::shmem::{self, Status};
use crate::slot::{Slot, position_to_keep};
use crate::threads::Waker;
use crate::wait_set::Socket;
use crate::wal_sender_slot::{Positions, WalSenderSlot};
use crate::wal_source::{WalRead, WalSource};

/// Appends for one member in one turn, so that a member that catches up does not hold up the
/// others' commits: 4 MiB take about a millisecond to copy.
const APPENDS_PER_TURN: usize = 4;
/// Reads from one socket in one turn, for the same reason.
const READS_PER_TURN: usize = 16;
/// The replication slot is moved, or tried for, this often at most.
const SLOT_PAUSE_MS: u64 = 1000;

pub struct Pusher {
    proposer: Proposer,
    members: Vec<Member>,
    source: WalSource,
    comparison: Option<Comparison>,
    actions: Vec<ProposerAction>,

    greeting: ProposerGreeting,
    data_dir: PathBuf,
    local: LocalHistory,
    tli: u32,

    wal_sender: WalSenderSlot,
    positions: Positions,
    /// Of the quorum: from the first time WAL goes out to its commit.
    lag: Lag,
    is_streaming: bool,
    /// The last turn ended before all that could be sent was.
    more_to_send: bool,

    slot: Option<Slot>,
    slot_name: std::ffi::CString,
    slot_obstacle: String,
    slot_due_ms: u64,

    waker: Waker,
    started: Instant,
    status: Box<Status>,
    /// The last reason for not leading that was logged.
    logged_wait: String,
    deposed_by: Option<Term>,
}

/// One address of `walproposer.safekeepers`.
struct Member {
    peer: Peer,
    feed: Feed,
    lag: Lag,
}

impl Pusher {
    /// Reads what the data directory says. Postgres has recovered and accepts writes.
    pub fn new(settings: &Settings, wal_sender: WalSenderSlot, waker: Waker) -> Pusher {
        let system_id = postgres::system_id();
        let segment_size = SegmentSize::new(postgres::wal_segment_size())
            .expect("Postgres has checked its own segment size");
        let version = PgVersion::from_version_num(pg_sys::PG_VERSION_NUM)
            .expect("built for a version that is known");
        let cluster = ClusterIdentity {
            system_id,
            name: settings.cluster_name.clone(),
            pg_major: version.major(),
            segment_size: segment_size.bytes(),
        };
        let data_dir = postgres::data_directory();
        let local = load_local_history(&data_dir, system_id);
        let tli = postgres::insertion_tli();
        let pg_wal = data_dir.join("pg_wal");
        let (timelines, timeline_files) = load_timelines(&pg_wal, tli);
        let local_end_lsn = canonical_end(postgres::insert_lsn(), segment_size);
        let format = WalFormat {
            version,
            segment_size,
            system_id,
        };
        let log = LocalLog {
            history: local.history.clone(),
            tli: Tli(tli),
            end_lsn: local_end_lsn,
            unled_from: local.unled_from,
            timeline_files,
            configuration: local.configuration.clone(),
        };
        let started = Instant::now();
        let proposer_settings = ProposerSettings {
            proposer_id: local.proposer_id,
            cluster: cluster.clone(),
            peers: settings.safekeepers.clone(),
            member_timeout_ms: millis(settings.member_timeout),
            seed: random_u64(),
        };
        let user = settings
            .conninfo
            .user
            .clone()
            .unwrap_or_else(postgres::os_user);
        let member = |address: &safekeeper_protocol::PeerAddress| Member {
            peer: Peer::new(Dial {
                address: address.clone(),
                user: user.clone(),
                timeout: settings.conninfo.connect_timeout,
            }),
            feed: Feed::default(),
            lag: Lag::default(),
        };
        let last_removed = postgres::last_removed_segno;
        Pusher {
            proposer: Proposer::new(proposer_settings, log, Standing::Running, 0),
            members: settings.safekeepers.iter().map(member).collect(),
            source: WalSource::new(pg_wal, format, timelines, local_end_lsn, last_removed),
            comparison: None,
            actions: Vec::new(),
            greeting: ProposerGreeting {
                proposer_id: local.proposer_id,
                cluster,
            },
            data_dir,
            local,
            tli,
            wal_sender,
            positions: Positions::default(),
            lag: Lag::default(),
            is_streaming: false,
            more_to_send: false,
            slot: None,
            slot_name: settings.slot_name.clone(),
            slot_obstacle: String::new(),
            slot_due_ms: 0,
            waker,
            started,
            status: Box::new(Status::EMPTY),
            logged_wait: String::new(),
            deposed_by: None,
        }
    }

    /// Takes what has arrived on the sockets of `readable`, lets time pass, sends what can be sent,
    /// and publishes how things stand.
    pub fn turn(&mut self, readable: &[usize]) {
        self.poll_dials();
        for &at in readable {
            self.receive(at);
        }
        self.poll_comparison();
        let now_ms = self.now_ms();
        if now_ms >= self.next_tick_ms() {
            self.proposer.on_tick(now_ms, &mut self.actions);
        }
        self.carry_out();
        self.send_all();
        self.keep_slot();
        self.follow_reign();
        self.publish();
    }

    /// The connections to wait on.
    pub fn sockets(&self) -> Vec<Socket> {
        let socket = |(peer, member): (usize, &Member)| {
            let (fd, wants_write) = member.peer.socket()?;
            let connection = member.peer.reconnects();
            Some(Socket {
                peer,
                connection,
                fd,
                wants_write,
            })
        };
        self.members.iter().enumerate().filter_map(socket).collect()
    }

    /// How long nothing will have to be done if nothing happens.
    pub fn idle_ms(&self) -> u64 {
        if self.more_to_send {
            return 0;
        }
        let dials = self.members.iter().map(|member| member.peer.next_dial_ms());
        let feeds = self
            .members
            .iter()
            .map(|member| member.feed.next_attempt_ms());
        let next_ms = dials.chain(feeds).fold(self.next_tick_ms(), u64::min);
        next_ms.saturating_sub(self.now_ms())
    }

    fn next_tick_ms(&self) -> u64 {
        self.proposer
            .next_tick_ms(|peer| self.members[peer.0].peer.can_take_append())
    }

    /// For whoever waits for the slot at shutdown. WAL is kept by it all the same.
    pub fn release_slot(&mut self) {
        self.slot_due_ms = u64::MAX;
        if let Some(slot) = self.slot.take() {
            slot.release();
        }
    }

    pub fn on_reload(&self) {
        if self.is_streaming {
            self.wal_sender.on_reload();
        }
    }
}

/// Connections: what comes in, what fails.
impl Pusher {
    fn poll_dials(&mut self) {
        let now_ms = self.now_ms();
        for at in 0..self.members.len() {
            let peer = &mut self.members[at].peer;
            if let Err(error) = peer.dial_if_due(now_ms, &self.waker) {
                postgres::error(
                    PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES,
                    format!("could not start a thread: {error}"),
                    "",
                );
            }
            match peer.poll_dial(now_ms) {
                DialEvent::Nothing => {}
                DialEvent::Connected => {
                    self.proposer
                        .on_connected(PeerIdx(at), now_ms, &mut self.actions);
                    self.carry_out();
                }
                DialEvent::Failed(reason) => self.close(at, &reason),
                DialEvent::Panicked(text) => thread_panicked(&text),
            }
        }
    }

    fn receive(&mut self, at: usize) {
        for _ in 0..READS_PER_TURN {
            let may_be_more = match self.members[at].peer.receive() {
                Ok(more) => more,
                Err(error) => return self.close(at, &error.to_string()),
            };
            loop {
                match self.members[at].peer.next_message() {
                    Ok(Some(message)) => self.on_message(at, &message),
                    Ok(None) => break,
                    Err(error) => return self.close(at, &error.to_string()),
                }
            }
            if !may_be_more {
                return;
            }
        }
    }

    fn on_message(&mut self, at: usize, message: &safekeeper_protocol::AcceptorMessage) {
        use safekeeper_protocol::AcceptorMessage::{AppendResponse, Greeting};
        match message {
            Greeting(greeting) if self.members[at].peer.on_greeted() => {
                let address = &self.members[at].peer.dial().address;
                let id = greeting.member_id;
                postgres::log(format!("connected to safekeeper {id} at {address}"));
            }
            AppendResponse(response) => {
                let now = self.started.elapsed();
                self.members[at].lag.acknowledged(response.flush_lsn, now);
            }
            _ => {}
        }
        let now_ms = self.now_ms();
        self.proposer
            .on_message(PeerIdx(at), message, now_ms, &mut self.actions);
        self.carry_out();
    }

    /// Ends a member's connection; it is dialled again after a pause.
    fn close(&mut self, at: usize, reason: &str) {
        let now_ms = self.now_ms();
        let member = &mut self.members[at];
        let was_up = member.peer.is_up();
        if member.peer.close(reason, now_ms) {
            let address = &member.peer.dial().address;
            let what = if was_up {
                "lost connection to"
            } else {
                "could not connect to"
            };
            postgres::log(format!("{what} safekeeper {address}: {reason}"));
        }
        member.feed.stop();
        member.lag.forget();
        if was_up {
            self.proposer.on_disconnected(PeerIdx(at), now_ms);
        }
    }
}

/// The proposer's actions, in the order given.
impl Pusher {
    fn carry_out(&mut self) {
        while !self.actions.is_empty() {
            for action in std::mem::take(&mut self.actions) {
                self.carry_out_one(action);
            }
        }
    }

    fn carry_out_one(&mut self, action: ProposerAction) {
        let now_ms = self.now_ms();
        match action {
            ProposerAction::Send { to, message } => self.members[to.0].peer.send(&message),
            ProposerAction::Disconnect { peer, reason } => self.close(peer.0, &reason),
            ProposerAction::Compare {
                donor,
                term,
                begin_lsn,
                end_lsn,
            } => self.begin_comparison(Stretch {
                donor,
                term,
                begin_lsn,
                end_lsn,
            }),
            // Only a proposer that stands before recovery may ask for it.
            ProposerAction::Complete { .. } => postgres::error(
                PgSqlErrorCode::ERRCODE_INTERNAL_ERROR,
                "cannot complete the local WAL of a running server",
                "",
            ),
            ProposerAction::PersistHistory {
                history,
                configuration,
            } => {
                self.local.history = history;
                self.local.configuration = configuration;
                self.local.unled_from = None;
                self.store_local_history();
                self.proposer
                    .on_history_persisted(now_ms, &mut self.actions);
            }
            // Only a new worker knows where the local log ends by now.
            ProposerAction::StandAgain => postgres::error(
                PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                "the safekeepers' configuration changed; standing for election again",
                "",
            ),
            ProposerAction::Lead { term, start_lsn } => {
                self.logged_wait.clear();
                self.status.elected_at = postgres::timestamp();
                postgres::log(format!(
                    "elected in term {term}, which begins at {start_lsn}"
                ));
            }
            ProposerAction::Commit(commit_lsn) => self.commit(commit_lsn),
            ProposerAction::Wait(reason) => {
                let reason = reason.to_string();
                if self.logged_wait != reason {
                    postgres::log(format!("not elected: {reason}"));
                    self.logged_wait = reason;
                }
            }
            ProposerAction::Deposed { term } => {
                self.deposed_by = Some(term);
                postgres::warning(
                    format!(
                        "another primary was elected in term {term}: no commit is acknowledged here any more"
                    ),
                    "Stop this server, and have it rejoin as a standby.",
                );
            }
        }
    }

    fn store_local_history(&mut self) {
        let stored =
            local_history::store(&self.data_dir, self.greeting.cluster.system_id, &self.local);
        if let Err(error) = stored {
            postgres::error(PgSqlErrorCode::ERRCODE_IO_ERROR, error.to_string(), "");
        }
    }

    fn commit(&mut self, commit_lsn: Lsn) {
        let now = self.started.elapsed();
        self.lag.acknowledged(commit_lsn, now);
        // Backends look here when their wait ends: so this comes first.
        shmem::set_commit_lsn(commit_lsn);
        self.positions.commit_lsn = commit_lsn;
        self.release_commits(now);
    }

    /// Shows the positions, and releases the commits that the quorum has.
    fn release_commits(&mut self, now: Duration) {
        self.follow_reign();
        let lag = self
            .lag
            .current(now)
            .and_then(|lag| i64::try_from(lag.as_micros()).ok());
        self.positions.lag_us = lag.unwrap_or(-1);
        self.positions.apply_lsn = self.lowest_apply_lsn();
        self.wal_sender.advance(&self.positions);
    }

    /// Of all standbys behind the members that follow.
    fn lowest_apply_lsn(&self) -> Lsn {
        let peers = (0..self.members.len()).map(PeerIdx);
        let applied = peers.map(|peer| self.proposer.peer_status(peer).feedback.apply_lsn);
        applied
            .filter(|lsn| lsn.is_valid())
            .min()
            .unwrap_or(Lsn::INVALID)
    }

    /// Commits wait for our positions while we lead, and for nothing that we could give otherwise.
    fn follow_reign(&mut self) {
        let is_leading = self.proposer.is_leading();
        if is_leading && !self.is_streaming {
            self.wal_sender.begin_streaming();
        } else if !is_leading && self.is_streaming {
            self.wal_sender.stop_streaming();
        }
        self.is_streaming = is_leading;
    }

    fn begin_comparison(&mut self, stretch: Stretch) {
        let end_lsn = stretch.end_lsn;
        if postgres::flushed_lsn() < end_lsn {
            postgres::flush_wal(end_lsn);
        }
        let oldest_lsn = match self.source.oldest_lsn(end_lsn) {
            Ok(oldest_lsn) => oldest_lsn,
            Err(error) => {
                let reason = format!("could not list pg_wal: {error}");
                return self.end_comparison(Compared::Unavailable { reason });
            }
        };
        let begin_lsn = stretch.begin_lsn.max(oldest_lsn);
        if begin_lsn >= end_lsn {
            return self.end_comparison(Compared::Equal);
        }
        let request = self.donor_request(stretch.donor, stretch.term, begin_lsn, end_lsn);
        match crate::donor::Donor::start(request, self.waker.clone()) {
            Ok(donor) => {
                let stretch = Stretch {
                    begin_lsn,
                    ..stretch
                };
                self.comparison = Some(Comparison::new(donor, stretch));
            }
            Err(error) => self.end_comparison(Compared::Unavailable {
                reason: error.to_string(),
            }),
        }
    }

    fn poll_comparison(&mut self) {
        let Some(comparison) = &self.comparison else {
            return;
        };
        let stretch = comparison.stretch;
        match comparison.poll(&mut self.source) {
            ComparisonEvent::Nothing => {}
            ComparisonEvent::Ended(outcome) => self.end_comparison(outcome),
            ComparisonEvent::Removed { oldest_lsn } => self.begin_comparison(Stretch {
                begin_lsn: oldest_lsn.max(stretch.begin_lsn),
                ..stretch
            }),
            ComparisonEvent::Panicked(text) => thread_panicked(&text),
        }
    }

    fn end_comparison(&mut self, outcome: Compared) {
        self.comparison = None;
        let now_ms = self.now_ms();
        self.proposer
            .on_compared(outcome, now_ms, &mut self.actions);
    }

    fn donor_request(&self, donor: PeerIdx, term: Term, begin: Lsn, end: Lsn) -> DonorRequest {
        DonorRequest {
            dial: self.members[donor.0].peer.dial().clone(),
            greeting: self.greeting.clone(),
            configuration_version: self.proposer.configuration().version,
            term,
            begin_lsn: begin,
            end_lsn: end,
        }
    }
}

/// Sending.
impl Pusher {
    fn send_all(&mut self) {
        self.more_to_send = false;
        let flushed_lsn = postgres::flushed_lsn();
        for at in 0..self.members.len() {
            if let Err(reason) = self.send(at, flushed_lsn) {
                self.close(at, &reason);
            }
        }
    }

    fn send(&mut self, at: usize, flushed_lsn: Lsn) -> Result<(), String> {
        let peer = PeerIdx(at);
        for _ in 0..APPENDS_PER_TURN {
            self.members[at]
                .peer
                .flush()
                .map_err(|error| error.to_string())?;
            if !self.members[at].peer.can_take_append() {
                return Ok(());
            }
            let Some(next_lsn) = self.proposer.next_lsn(peer) else {
                return Ok(());
            };
            let (end_lsn, from_files) = self.at_hand(at, next_lsn, flushed_lsn)?;
            let now_ms = self.now_ms();
            let wal = LocalWal {
                end_lsn,
                flush_lsn: flushed_lsn,
            };
            let Some(append) = self.proposer.next_append(peer, wal, now_ms) else {
                return Ok(());
            };
            self.send_append(at, &append, from_files)?;
        }
        self.more_to_send = true;
        self.members[at]
            .peer
            .flush()
            .map_err(|error| error.to_string())
    }

    /// End of the WAL from `lsn` on that can be sent now, and whether it is in `pg_wal`.
    fn at_hand(&mut self, at: usize, lsn: Lsn, flushed_lsn: Lsn) -> Result<(Lsn, bool), String> {
        if lsn >= flushed_lsn {
            return Ok((lsn, true));
        }
        if self.source.has(lsn).map_err(|error| error.to_string())? {
            self.members[at].feed.stop();
            return Ok((flushed_lsn, true));
        }
        let now_ms = self.now_ms();
        let mut feed = std::mem::take(&mut self.members[at].feed);
        let available = feed.available(lsn, now_ms, &self.waker, |attempt| {
            let donors = self.proposer.donors_for(lsn);
            let none =
                || format!("WAL from {lsn} on has left pg_wal, and no safekeeper has it to give");
            let &donor = donors.get(attempt % donors.len().max(1)).ok_or_else(none)?;
            let end_lsn = self.proposer.peer_status(donor).flush_lsn;
            Ok(self.donor_request(donor, self.proposer.term(), lsn, end_lsn))
        });
        self.members[at].feed = feed;
        match available {
            Ok(end_lsn) => Ok((end_lsn, false)),
            Err(FeedPanicked(text)) => thread_panicked(&text),
        }
    }

    fn send_append(&mut self, at: usize, append: &Append, from_files: bool) -> Result<(), String> {
        let Member { peer, feed, lag } = &mut self.members[at];
        let source = &mut self.source;
        peer.send_append(append, |wal| {
            // A heartbeat: nothing need be at hand.
            if wal.is_empty() {
                return Ok(());
            }
            if !from_files {
                let copied = feed.copy(append.begin_lsn, wal);
                return copied
                    .then_some(())
                    .ok_or("WAL from a donor is not at hand".to_owned());
            }
            match source.read(append.begin_lsn, wal) {
                Ok(WalRead::Filled) => Ok(()),
                Ok(WalRead::Gone) => Err(format!(
                    "WAL from {} on was removed meanwhile",
                    append.begin_lsn
                )),
                Err(error) => Err(error.to_string()),
            }
        })?;
        let len = u64::from(append.len);
        if len > 0 {
            let (end_lsn, now) = (append.begin_lsn + len, self.started.elapsed());
            lag.sent(end_lsn, now);
            self.lag.sent(end_lsn, now);
            self.positions.sent_lsn = self.positions.sent_lsn.max(end_lsn);
            let counter = match from_files {
                true => &mut self.status.bytes_from_files,
                false => &mut self.status.bytes_from_donor,
            };
            *counter += len;
        }
        Ok(())
    }
}

/// The replication slot, and what others see.
impl Pusher {
    fn keep_slot(&mut self) {
        let now_ms = self.now_ms();
        if now_ms < self.slot_due_ms || !self.proposer.is_leading() {
            return;
        }
        self.slot_due_ms = now_ms + SLOT_PAUSE_MS;
        let commit_lsn = self.proposer.commit_lsn();
        let Some(slot) = &mut self.slot else {
            return self.acquire_slot();
        };
        if !commit_lsn.is_valid() {
            return;
        }
        let members = (0..self.members.len()).map(PeerIdx);
        let following = members.filter(|&peer| self.proposer.next_lsn(peer).is_some());
        let flushed = following.map(|peer| self.proposer.peer_status(peer).flush_lsn);
        let floor = slot.restart_lsn();
        let keep = position_to_keep(flushed, commit_lsn, floor, settings::max_member_lag());
        slot.advance(keep);
    }

    fn acquire_slot(&mut self) {
        match Slot::acquire(&self.slot_name) {
            Ok(slot) => {
                self.slot = Some(slot);
                self.slot_obstacle.clear();
            }
            Err(obstacle) => {
                let obstacle = obstacle.to_string();
                if self.slot_obstacle != obstacle {
                    postgres::log(format!(
                        "WAL is not kept for safekeepers that lag: {obstacle}"
                    ));
                    self.slot_obstacle = obstacle;
                }
            }
        }
    }

    fn publish(&mut self) {
        let proposer = &self.proposer;
        let status = &mut *self.status;
        let configuration = proposer.configuration();
        status.state.set(proposer.state_name());
        status.term = proposer.term().0;
        status.generation = configuration.version.generation;
        status.tli = self.tli;
        status.sent_lsn = self.positions.sent_lsn;
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        status.members_configured = count(configuration.members.len());
        status.quorum_size = match configuration.is_none() {
            true => 0,
            false => count(configuration.quorum_size()),
        };
        let now = self.started.elapsed();
        let mut active = 0;
        status.n_peers = self.members.len();
        for (at, (row, member)) in status.peers.iter_mut().zip(&self.members).enumerate() {
            let of_peer = proposer.peer_status(PeerIdx(at));
            active += u32::from(proposer.next_lsn(PeerIdx(at)).is_some());
            let dial = member.peer.dial();
            row.id = of_peer.member_id.map_or(0, |id| id.0);
            row.host.set(&dial.address.host);
            row.port = dial.address.port;
            row.state.set(of_peer.state);
            row.term = of_peer.term.0;
            row.sent_lsn = of_peer.sent_lsn;
            row.flush_lsn = of_peer.flush_lsn;
            row.commit_lsn = of_peer.commit_lsn;
            let lag = member
                .lag
                .current(now)
                .and_then(|lag| i64::try_from(lag.as_micros()).ok());
            row.flush_lag_us = lag.unwrap_or(-1);
            row.reconnects = member.peer.reconnects();
            let fed = member.feed.error();
            row.last_error.set(if fed.is_empty() {
                member.peer.last_error()
            } else {
                fed
            });
        }
        status.members_active = active;
        let deposed = self
            .deposed_by
            .map(|term| format!("deposed by a primary elected in term {term}"));
        let waiting = proposer.wait_reason().map(ToString::to_string);
        let reason = deposed
            .or(waiting)
            .unwrap_or_else(|| self.slot_obstacle.clone());
        status.last_error.set(&reason);
        shmem::publish(status);
    }

    fn now_ms(&self) -> u64 {
        millis(self.started.elapsed())
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A thread of ours met a defect: end the worker; the postmaster starts a new one.
fn thread_panicked(text: &str) -> ! {
    postgres::error(
        PgSqlErrorCode::ERRCODE_INTERNAL_ERROR,
        format!("a thread of the walproposer failed: {text}"),
        "",
    )
}

fn load_local_history(data_dir: &Path, system_id: u64) -> LocalHistory {
    let new_id = ProposerId(postgres::random_u128());
    match local_history::load(data_dir, system_id, new_id) {
        Ok(Some(local)) => local,
        Ok(None) => LocalHistory {
            proposer_id: new_id,
            history: TermHistory::default(),
            configuration: Configuration::default(),
            unled_from: None,
        },
        Err(error) => postgres::error(
            PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
            error.to_string(),
            "",
        ),
    }
}

/// Postgres's history of timeline `tli`, and the files that tell it, newest first.
fn load_timelines(pg_wal: &Path, tli: u32) -> (TimelineHistory, Vec<TimelineFile>) {
    let unreadable = |name: &str, error: &dyn std::fmt::Display| -> ! {
        postgres::error(
            PgSqlErrorCode::ERRCODE_IO_ERROR,
            format!("could not read file \"pg_wal/{name}\": {error}"),
            "",
        )
    };
    let read = |tli: u32| {
        let name = history_file_name(tli);
        match std::fs::read(pg_wal.join(&name)) {
            Ok(content) => Some(content),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => unreadable(&name, &error),
        }
    };
    let Some(content) = read(tli) else {
        return (TimelineHistory::root(tli), Vec::new());
    };
    let text = String::from_utf8_lossy(&content).into_owned();
    let history = match TimelineHistory::parse(tli, &text) {
        Ok(history) => history,
        Err(error) => unreadable(&history_file_name(tli), &error),
    };
    let mut files = vec![TimelineFile {
        tli: Tli(tli),
        content,
    }];
    for ancestor in history.ancestors.iter().rev() {
        let tli = Tli(ancestor.tli);
        files.extend(read(ancestor.tli).map(|content| TimelineFile { tli, content }));
    }
    (history, files)
}

fn random_u64() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}

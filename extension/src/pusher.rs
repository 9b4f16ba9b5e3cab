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
//! The parts: `connections.rs` what comes in, `actions.rs` what the proposer wants done, `sending.rs`
//! what goes out, `standing.rs` the replication slot and the views, `handing_over.rs` the end. Not here: signals, sleeping,
//! shutdown (`worker.rs`).

mod actions;
mod connections;
mod handing_over;
mod sending;
mod standing;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pgrx::{PgSqlErrorCode, pg_sys};
use safekeeper_protocol::{
    ClusterIdentity, LocalLog, PeerAddress, PeerIdx, Proposer, ProposerAction, ProposerGreeting,
    ProposerSettings, Standing, Term, Tli, WonTerm,
};
use safekeeper_wal::{PgVersion, SegmentSize, WalFormat, canonical_end};

use crate::compare::Comparison;
use crate::connect::Dial;
use crate::feed::Feed;
use crate::lag::Lag;
use crate::local_history::LocalHistory;
use crate::local_log::{load_local_history, load_timelines, unled_from};
use crate::peer::Peer;
use crate::postgres;
use crate::settings::Settings;
use crate::shmem::{self, Status};
use crate::slot::Slot;
use crate::threads::Waker;
use crate::wait_set::Socket;
use crate::wal_sender_slot::{Positions, WalSenderSlot};
use crate::wal_source::WalSource;

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
    segment_size: SegmentSize,

    /// None in the last sender: no commit waits any more.
    wal_sender: Option<WalSenderSlot>,
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
    /// Reads what the data directory says. Postgres has recovered and accepts writes; or it has
    /// stopped doing so, and there is no WAL sender slot to be given.
    pub fn new(settings: &Settings, wal_sender: Option<WalSenderSlot>, waker: Waker) -> Pusher {
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
            unled_from: unled_from(&local, &timelines, segment_size),
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
        let member = |address: &PeerAddress| Member {
            peer: Peer::new(Dial {
                address: address.clone(),
                user: user.clone(),
                timeout: settings.conninfo.connect_timeout,
            }),
            feed: Feed::default(),
            lag: Lag::default(),
        };
        let last_removed = postgres::last_removed_segno;
        let mut actions = Vec::new();
        let proposer = match shmem::take_won_term().filter(|won| fits(won, &log)) {
            Some(won) => Proposer::elected(proposer_settings, log, won, 0, &mut actions),
            None => Proposer::new(proposer_settings, log, Standing::Running, 0),
        };
        Pusher {
            proposer,
            members: settings.safekeepers.iter().map(member).collect(),
            source: WalSource::new(pg_wal, format, timelines, local_end_lsn, last_removed),
            comparison: None,
            actions,
            greeting: ProposerGreeting {
                proposer_id: local.proposer_id,
                cluster,
            },
            data_dir,
            local,
            tli,
            segment_size,
            positions: Positions::default(),
            lag: Lag::default(),
            is_streaming: false,
            more_to_send: false,
            slot: None,
            slot_name: settings.slot_name.clone(),
            slot_obstacle: String::new(),
            slot_due_ms: if wal_sender.is_some() { 0 } else { u64::MAX },
            wal_sender,
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
        let in_need = |(at, member): &(usize, &Member)| {
            self.proposer.next_lsn(PeerIdx(*at)).is_some() && member.peer.can_take_append()
        };
        let feeds = self.members.iter().enumerate().filter(in_need);
        let feeds = feeds.map(|(_, member)| member.feed.next_attempt_ms());
        let next_ms = dials.chain(feeds).fold(self.next_tick_ms(), u64::min);
        next_ms.saturating_sub(self.now_ms())
    }

    fn next_tick_ms(&self) -> u64 {
        self.proposer
            .next_tick_ms(|peer| self.members[peer.0].peer.can_take_append())
    }

    /// Since the worker started.
    fn now_ms(&self) -> u64 {
        millis(self.started.elapsed())
    }

    /// For whoever waits for the slot at shutdown. WAL is kept by it all the same.
    pub fn release_slot(&mut self) {
        self.slot_due_ms = u64::MAX;
        if let Some(slot) = self.slot.take() {
            slot.release();
        }
    }

    pub fn on_reload(&self) {
        if let Some(wal_sender) = self.wal_sender.as_ref().filter(|_| self.is_streaming) {
            wal_sender.on_reload();
        }
    }
}

/// Recovery has come to where the start has won its term, on the same timeline. If not, what it
/// recovered is not the log that was elected: then an election tells whether it may lead.
fn fits(won: &WonTerm, log: &LocalLog) -> bool {
    let reign = won.history.last();
    let fits = reign.is_some_and(|reign| log.end_lsn >= reign.start_lsn && log.tli == reign.tli);
    if !fits {
        postgres::warning(
            format!(
                "recovery ended at {} on timeline {}, which is not the log that was elected: {}",
                log.end_lsn, log.tli, won.history
            ),
            "Sessions are held until the quorum has confirmed what was recovered.",
        );
    }
    fits
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

fn random_u64() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}

//! Drives the proposer: carries out its actions, and keeps the pipelines to the members full.
//!
//! ```text
//!                     ┌───────────── Proposer (safekeeper-protocol) ─────────────┐
//!   messages ────────►│ on_message, on_tick            actions, next_append      │
//!                     └───────────────────────────────────┬──────────────────────┘
//!   Peer (socket) ◄── header + WAL ◄── WalReader (here)   │ Commit ──► WalSenderSlot, shared memory
//!                                  ◄── Feed (a donor)     │ PersistHistory ──► local history file
//! ```
//!
//! One turn of [`Pusher::turn`] takes what has arrived, lets time pass, and sends what can be sent;
//! then the worker sleeps. Nothing here blocks, except for one fsync of the history file at an
//! election.
//!
//! A standby that is to be promoted has one too, which brings the quorum to where its log ends and
//! hands the won term to the worker (`promoter.rs`): it releases no commits and keeps no slot. So has the
//! last sender of a stop, for the WAL behind the worker's end (`stop/last_sender.rs`).
//!
//! The parts: `connections.rs` what comes in, `actions.rs` what the proposer wants done, `sending.rs`
//! what goes out, `standing.rs` the replication slot and the views, `promotion.rs` what only a
//! standby's does, `deposed.rs` the end of a reign by another's, `handing_over.rs` that by a stop. Not
//! here: signals, sleeping, shutdown (`worker.rs`, `stop.rs`).

mod actions;
mod connections;
mod deposed;
mod handing_over;
mod promotion;
mod sending;
mod standing;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pgrx::PgSqlErrorCode;
use safekeeper_protocol::{
    ClusterIdentity, LocalLog, Lsn, PeerAddress, PeerIdx, Proposer, ProposerAction,
    ProposerGreeting, ProposerSettings, Standing, Tli, WonTerm,
};
use safekeeper_wal::{WalFormat, canonical_end};

use crate::compare::Comparison;
use crate::early_push::EarlyPush;
use crate::feed::Feed;
use crate::lag::Lag;
use crate::local_history::LocalHistory;
use crate::local_log::{load_local_history, load_timelines, unled_from, wal_format};
use crate::local_wal::WalReader;
use crate::peer::Peer;
use crate::postgres;
use crate::replay_wait::ReplayWait;
use crate::settings::{Settings, settings};
use crate::shmem::{self, Status};
use crate::slot::Slot;
use crate::standby_xmin::MemberXmins;
use crate::threads::Waker;
use crate::wait_set::Socket;
use crate::wal_buffers::WalBuffers;
use crate::wal_sender_slot::{Positions, WalSenderSlot};
use crate::wal_source::WalSource;

use promotion::LastLook;

pub use promotion::{PromotionStep, Replayed};

pub struct Pusher {
    proposer: Proposer,
    members: Vec<Member>,
    local_wal: WalReader<WalBuffers>,
    early_push: EarlyPush,
    replay_wait: ReplayWait,
    comparison: Option<Comparison>,
    actions: Vec<ProposerAction>,
    /// Empty; its memory is used again.
    spare_actions: Vec<ProposerAction>,
    /// What a standby has to do next to be promoted.
    promotion_step: Option<PromotionStep>,
    last_look: LastLook,

    greeting: ProposerGreeting,
    data_dir: PathBuf,
    local: LocalHistory,
    tli: u32,
    format: WalFormat,
    /// Of a standby: its own log ended here when it was asked. What has come since is the quorum's,
    /// on whatever timeline, and there to be had from the donors.
    standby_end_lsn: Option<Lsn>,

    /// None on a standby, where no commit waits, and in the last sender: none does any more.
    wal_sender: Option<WalSenderSlot>,
    positions: Positions,
    /// Of the quorum: from the first time WAL goes out to its commit.
    lag: Lag,
    is_streaming: bool,
    /// The last turn ended before all that could be sent was.
    more_to_send: bool,
    /// Flushed here, when the last turn looked.
    flush_lsn: Lsn,
    /// The last turn left WAL unsent that is flushed here, because of a pause.
    left_flushed: bool,
    /// News of the last commit goes out by itself from then on.
    news_due_ms: u64,
    /// To the last member of the nearest majority and back.
    round_trip: Duration,
    /// WAL was sent, or a commit came, since the views were written.
    wal_moved: bool,
    published_ms: u64,

    slot: Option<Slot>,
    slot_name: std::ffi::CString,
    slot_obstacle: String,
    slot_due_ms: u64,

    waker: Waker,
    member_timeout_ms: u64,
    started: Instant,
    status: Box<Status>,
    /// The last reason for not leading that was logged.
    logged_wait: String,
    /// Another primary reigns, or has reigned: how we know.
    deposed: Option<String>,
}

/// One address of `walproposer.safekeepers`.
struct Member {
    peer: Peer,
    feed: Feed,
    lag: Lag,
    /// The last `commit_lsn` that was sent.
    told_lsn: Lsn,
    told_ms: u64,
    standby_xmins: MemberXmins,
}

impl Pusher {
    /// Reads what the data directory says. Postgres has recovered and accepts writes; or it has
    /// stopped doing so, and there is no WAL sender slot to be given.
    pub fn new(settings: &Settings, wal_sender: Option<WalSenderSlot>, waker: Waker) -> Pusher {
        let found = Found {
            standing: Standing::Running,
            tli: postgres::insertion_tli(),
            end_lsn: postgres::insert_lsn(),
        };
        Pusher::with(settings, wal_sender, waker, found)
    }

    /// On a standby, to promote it.
    pub fn for_standby(settings: &Settings, waker: Waker) -> Pusher {
        let (replayed, received) = (postgres::replayed(), postgres::received());
        let tli = replayed.tli;
        // What was received of a later timeline lies beyond the end of this one.
        let received = Some(received.lsn).filter(|_| received.tli == tli);
        let found = Found {
            standing: Standing::Standby,
            tli,
            end_lsn: received.map_or(replayed.lsn, |lsn| lsn.max(replayed.lsn)),
        };
        Pusher::with(settings, None, waker, found)
    }

    fn with(
        settings: &Settings,
        wal_sender: Option<WalSenderSlot>,
        waker: Waker,
        found: Found,
    ) -> Pusher {
        let format = wal_format();
        let cluster = ClusterIdentity {
            system_id: format.system_id,
            name: settings.cluster_name.clone(),
            pg_major: format.version.major(),
            segment_size: format.segment_size.bytes(),
        };
        let data_dir = postgres::data_directory();
        let local = load_local_history(&data_dir, format.system_id);
        let Found { standing, tli, .. } = found;
        let pg_wal = data_dir.join("pg_wal");
        let (timelines, timeline_files) = load_timelines(&pg_wal, tli);
        let local_end_lsn = canonical_end(found.end_lsn, format.segment_size);
        let log = LocalLog {
            history: local.history.clone(),
            tli: Tli(tli),
            end_lsn: local_end_lsn,
            unled_from: match standing {
                Standing::Standby => None,
                _ => unled_from(&local, &timelines, format.segment_size),
            },
            timeline_files,
            configuration: local.configuration.clone(),
        };
        let proposer_settings = ProposerSettings {
            proposer_id: local.proposer_id,
            cluster: cluster.clone(),
            peers: settings.safekeepers.clone(),
            member_timeout_ms: millis(settings.member_timeout),
            seed: postgres::random_u128() as u64,
        };
        let mut actions = Vec::new();
        let won = match standing {
            Standing::Running => shmem::take_won_term().filter(|won| fits(won, &log)),
            _ => None,
        };
        let proposer = match won {
            Some(won) => Proposer::elected(proposer_settings, log, won, 0, &mut actions),
            None => Proposer::new(proposer_settings, log, standing, 0),
        };
        let last_removed = postgres::last_removed_segno;
        let files = WalSource::new(pg_wal, format, timelines, local_end_lsn, last_removed);
        let buffers = match standing {
            Standing::Running => attach_buffers(format),
            _ => None,
        };
        Pusher {
            proposer,
            members: members(settings),
            local_wal: WalReader::new(buffers, files),
            early_push: EarlyPush::new(shmem::latest_hint(), processors()),
            replay_wait: ReplayWait::default(),
            comparison: None,
            actions,
            spare_actions: Vec::new(),
            promotion_step: None,
            last_look: LastLook::default(),
            greeting: ProposerGreeting {
                proposer_id: local.proposer_id,
                cluster,
            },
            data_dir,
            local,
            tli,
            format,
            standby_end_lsn: (standing == Standing::Standby).then_some(local_end_lsn),
            positions: Positions::default(),
            lag: Lag::default(),
            is_streaming: false,
            more_to_send: false,
            flush_lsn: Lsn::INVALID,
            left_flushed: false,
            news_due_ms: 0,
            round_trip: Duration::ZERO,
            wal_moved: false,
            published_ms: 0,
            slot: None,
            slot_name: settings.slot_name.clone(),
            slot_obstacle: String::new(),
            slot_due_ms: if wal_sender.is_some() { 0 } else { u64::MAX },
            wal_sender,
            waker,
            member_timeout_ms: millis(settings.member_timeout),
            started: Instant::now(),
            status: Box::new(Status::EMPTY),
            logged_wait: String::new(),
            deposed: None,
        }
    }

    /// Takes what has arrived on the sockets of `readable`, lets time pass, sends what can be sent,
    /// and publishes how things stand.
    pub fn turn(&mut self, readable: &[usize]) {
        self.status.wakeups += 1;
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
        self.ask_for_replay();
        self.send_all();
        self.keep_slot();
        self.follow_reign();
        self.publish_if_due();
    }

    /// The connections to wait on.
    pub fn sockets(&self) -> impl Iterator<Item = Socket> {
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
        self.members.iter().enumerate().filter_map(socket)
    }

    /// WAL can be pushed before it is flushed.
    pub fn has_buffers(&self) -> bool {
        self.local_wal.buffers.is_some()
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
        let news_ms = self.next_news_ms().unwrap_or(u64::MAX);
        let due = [self.next_tick_ms(), self.publish_due_ms(), news_ms];
        let next_ms = dials.chain(feeds).chain(due).fold(u64::MAX, u64::min);
        let look_ms = self
            .early_push()
            .and_then(|early_push| early_push.next_look_ms(&self.situation()));
        let ask_ms = self.replay_wait.next_look_ms(self.started.elapsed());
        let looks = look_ms.into_iter().chain(ask_ms);
        looks.fold(next_ms.saturating_sub(self.now_ms()), u64::min)
    }

    fn next_tick_ms(&self) -> u64 {
        self.proposer
            .next_tick_ms(|peer| self.members[peer.0].peer.can_take_append())
    }

    /// Since this pusher began.
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

    pub fn on_reload(&mut self) {
        let conninfo = settings().conninfo;
        for Member { peer, .. } in &mut self.members {
            let address = peer.dial().address.clone();
            peer.dial_by(conninfo.dial(&address, postgres::os_user));
        }
        if let Some(wal_sender) = self.wal_sender.as_ref().filter(|_| self.is_streaming) {
            wal_sender.on_reload();
        }
        self.obey_on_deposed();
    }
}

/// The local log as Postgres has it when a proposer begins.
struct Found {
    standing: Standing,
    tli: u32,
    end_lsn: Lsn,
}

/// That this process may use.
fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

fn members(settings: &Settings) -> Vec<Member> {
    let member = |address: &PeerAddress| Member {
        peer: Peer::new(settings.conninfo.dial(address, postgres::os_user)),
        feed: Feed::default(),
        lag: Lag::default(),
        told_lsn: Lsn::INVALID,
        told_ms: 0,
        standby_xmins: MemberXmins::default(),
    };
    settings.safekeepers.iter().map(member).collect()
}

/// Some of what is compared moves: one look may hit two moments, several will not.
const ATTACH_ATTEMPTS: usize = 3;

/// The server's WAL buffers, if they are where this version expects them.
fn attach_buffers(format: WalFormat) -> Option<WalBuffers> {
    let mut attached = WalBuffers::attach(format);
    for _ in 1..ATTACH_ATTEMPTS {
        if attached.is_err() {
            attached = WalBuffers::attach(format);
        }
    }
    if let Err(reason) = &attached {
        postgres::warning(
            format!(
                "WAL is pushed from files, after it is flushed, since this server's WAL buffers cannot be read: \
                 {reason}"
            ),
            "Commits take longer, and are as safe. A later version of this extension may know this server.",
        );
    }
    attached.ok()
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

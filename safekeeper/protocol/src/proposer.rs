//! Postgres's half of the protocol: greet, win, stream.
//!
//! ```text
//!                 first use                          bytes        bytes, then     local      before recovery
//!                ┌► Configuring ─┐                 with donor    what is missing  history    a last look
//!                │               ▼
//!   Greeting ────┼─► Looking ──► Voting ──────────► Settling ───► Persisting ─────────────► Confirming
//!      ▲  │      │    bytes                            │ standby                 │               │
//!      │  ▼                                            ▼                         ▼               ▼
//!    Waiting ◄── a passing reason              Promoting: majority,            Leading ◄─────────┘
//!                                              replay, history, Postgres ────►   │
//!    Refused: bytes differ                                                       ▼
//!                                                                             Deposed
//! ```
//!
//! It looks before it leaps: greetings alone, which disturb nobody, show whether this log can lead
//! and whether another proposer is alive. Only then it asks for votes and raises the term. A
//! candidacy that fails for a passing reason greets again after a random pause; one that must not
//! succeed waits, and looks again every second.
//!
//! While leading, WAL is *pulled*: the host asks [`Proposer::next_append`] for each connection that
//! can take more, and nothing is queued here that could be read again from Postgres.
//!
//! Acknowledgements count by member id, incarnation and term, so that they survive a reconnect of
//! the same safekeeper and nothing else. A vote counts only on the connection and for the term that
//! asked for it. Time is milliseconds of any clock that does not go backwards; random numbers come
//! from the seed.

mod candidacy;
mod first_use;
mod membership;
mod promotion;
mod reign;
mod status;

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use crate::codec::MESSAGE_LEN_MAX;
use crate::election::{Claim, Divergence, LocalLog, Standing, Verdict, decide};
use crate::mutation::{Mutation, is_on};
use crate::{
    AcceptorGreeting, AcceptorMessage, Append, AppendResponse, ClusterIdentity, Configuration,
    ConfigurationVersion, Configure, ConfigureResponse, Elected, Incarnation, Lineage, Log, Lsn,
    Member, MemberId, PeerIdx, ProposerAction, ProposerGreeting, ProposerId, ProposerMessage,
    StandbyFeedback, Term, TermEntry, TermHistory, TimelineFile, VoteRequest, VoteResponse,
    common_end,
};

use candidacy::{Settling, Stretch};
use membership::Change;
use promotion::Promotion;

pub use membership::ChangeRefusal;
pub use status::PeerStatus;

/// Where to dial a safekeeper.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerAddress {
    pub host: String,
    pub port: u16,
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProposerSettings {
    pub proposer_id: ProposerId,
    pub cluster: ClusterIdentity,
    /// `walproposer.safekeepers`, in order; a [`PeerIdx`] is a place in it.
    pub peers: Vec<PeerAddress>,
    /// A member that has not answered for so long is given up and dialled again; a rival not heard
    /// for so long is dead.
    pub member_timeout_ms: u64,
    /// For the pauses between candidacies.
    pub seed: u64,
}

/// Why there is no reign yet. The host shows it, and before recovery acts on it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum WaitReason {
    /// Fewer members than a majority have greeted.
    NoQuorum { greeted: usize, needed: usize },
    /// At first use every listed safekeeper must be reachable once; these are not.
    FirstUse { missing: Vec<PeerAddress> },
    /// Another proposer was heard within `member_timeout`, by a member of the highest term or by a
    /// majority.
    Rival { term: Term },
    /// This server's log cannot continue the quorum's: it must not write.
    Diverged(Divergence),
    /// The logs agree by their histories, and yet differ in bytes.
    BytesDiffer { at: Lsn },
    /// The list and the safekeepers' configuration contradict one another.
    Membership(String),
    /// The donor could not be read; tried again.
    Donor(String),
    /// The timeline this server has begun, or would begin, is not free.
    Timeline(String),
}

impl fmt::Display for WaitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WaitReason::NoQuorum { greeted, needed } => {
                write!(f, "no quorum: {greeted} members reachable, {needed} needed")
            }
            WaitReason::FirstUse { missing } => {
                f.write_str("first use needs every safekeeper once, not reachable:")?;
                missing
                    .iter()
                    .try_for_each(|address| write!(f, " {address}"))
            }
            WaitReason::Rival { term } => write!(f, "another proposer, of term {term}, is alive"),
            WaitReason::Diverged(divergence) => divergence.fmt(f),
            WaitReason::BytesDiffer { at } => write!(
                f,
                "local WAL differs from the quorum's at {at} although both are of the same term"
            ),
            WaitReason::Membership(what) | WaitReason::Timeline(what) => f.write_str(what),
            WaitReason::Donor(what) => write!(f, "could not read from the donor: {what}"),
        }
    }
}

/// Outcome of comparing the local log's bytes with the donor's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compared {
    Equal,
    /// First position at which they differ.
    Differs {
        at: Lsn,
    },
    /// Could not be compared: the connection broke, or the donor's term moved on.
    Unavailable {
        reason: String,
    },
}

/// Outcome of appending the donor's WAL to the local log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Completed {
    /// The local log ends where the donor's does, fsynced.
    Whole,
    /// It ends with a record at `end_lsn`, fsynced: the connection broke, or the donor's term
    /// moved on.
    Partly { end_lsn: Lsn, reason: String },
}

/// A reign that goes from one process of a server to the next: from its start to its worker, from
/// its worker to whoever sends the last WAL of a stop. Valid for this start only, and once: handed
/// over in memory, never in a file (S7).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WonTerm {
    pub term: Term,
    pub history: TermHistory,
    pub configuration: Configuration,
    /// Highest end of WAL that was sent to anybody in this term; [`Lsn::INVALID`] if none was.
    pub sent_lsn: Lsn,
}

/// How far the local WAL reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalWal {
    /// WAL can be read and sent up to here.
    pub end_lsn: Lsn,
    /// On the local disk up to here: WAL above it may have to be fetched back after a crash, so
    /// the members keep it.
    pub flush_lsn: Lsn,
}

/// Most WAL on its way to one member and not yet written there, in bytes: a few full messages, so
/// that one fsync of the member does not empty the pipe.
const WINDOW: u64 = 16 * 1024 * 1024;
/// How long to wait before looking again when nothing has happened.
const LOOK_AGAIN_MS: u64 = 1000;
/// A failed candidacy pauses for 50 to this many milliseconds, so that two rivals part.
const PAUSE_MS_MAX: u64 = 500;
/// Heartbeats in one `member_timeout`: a lost one or two do not end a session.
const HEARTBEATS_PER_TIMEOUT: u64 = 4;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Phase {
    /// Collecting greetings; after the deadline those that have not come are done without.
    Greeting {
        deadline_ms: u64,
    },
    /// Writing the first configuration, `confirmed` once every member holds the provisional one.
    Configuring {
        term: Term,
        configuration: Configuration,
        deadline_ms: u64,
    },
    /// Comparing bytes with the best log that has greeted.
    Looking {
        stretch: Stretch,
        since_ms: u64,
    },
    Voting {
        deadline_ms: u64,
    },
    Settling(Settling),
    Persisting {
        history: TermHistory,
    },
    /// Before recovery: greeting a majority once more.
    Confirming {
        deadline_ms: u64,
    },
    Promoting(Promotion),
    Leading,
    /// Greets again at `until_ms`; or at the next greeting of a peer, if `eager`.
    Waiting {
        until_ms: u64,
        eager: bool,
    },
    /// The local log is not the quorum's and can't become it: never stands again.
    Refused,
    Deposed,
}

/// What is known over one connection; forgotten with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Link {
    greeting: Option<AcceptorGreeting>,
    /// A greeting was sent and not answered.
    greeting_due: bool,
    /// Likewise a configuration.
    configure_due: bool,
    /// The current candidacy has asked here.
    vote_asked: bool,
    configured: Option<ConfigurationVersion>,
    /// Log of the voter, if it granted the current candidacy's vote here.
    vote: Option<Log>,
    /// Set once this term's Elected was sent.
    stream: Option<Stream>,
    last_heard_ms: u64,
    last_sent_ms: u64,
    /// The next Append is to ask for an answer.
    ask: bool,
    commit_told: Lsn,
    feedback: StandbyFeedback,
    term: Term,
    commit_lsn: Lsn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Stream {
    /// Elected was answered: the acceptor follows.
    following: bool,
    /// Where Elected told it to go on.
    start_lsn: Lsn,
    sent_lsn: Lsn,
    write_lsn: Lsn,
}

/// Consensus state of one Postgres server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Proposer {
    settings: ProposerSettings,
    local: LocalLog,
    standing: Standing,
    phase: Phase,
    /// Of the candidacy or the reign; lower than everything seen while greeting.
    term: Term,
    configuration: Configuration,
    change: Option<Change>,
    history: TermHistory,
    commit_lsn: Lsn,
    links: Vec<Option<Link>>,
    /// What of the local log has been found equal to the quorum's, and different from it.
    compared: Option<Stretch>,
    differed: Option<Stretch>,
    n_looks: usize,
    /// Highest end of WAL that was sent to anybody in this term.
    sent_lsn: Lsn,
    /// What members have acknowledged: kept over reconnects, for this term and incarnation only.
    acknowledged: BTreeMap<(MemberId, Incarnation), Lsn>,
    /// The local WAL's end on the local disk, as last told.
    local_flush_lsn: Lsn,
    /// Of a first configuration that would be written by this proposer.
    lineage: Lineage,
    wait_reason: Option<WaitReason>,
    random: u64,
}

type Actions = Vec<ProposerAction>;

impl Proposer {
    pub fn new(
        settings: ProposerSettings,
        local: LocalLog,
        standing: Standing,
        now_ms: u64,
    ) -> Proposer {
        let links = settings.peers.iter().map(|_| None).collect();
        let mut random = settings.seed | 1;
        let drawn = [0; 2].map(|_| u128::from(next_random(&mut random)));
        Proposer {
            lineage: Lineage(settings.proposer_id.0 ^ drawn[0] << 64 ^ drawn[1]),
            configuration: local.configuration.clone(),
            settings,
            local,
            standing,
            phase: Phase::Greeting {
                deadline_ms: now_ms + LOOK_AGAIN_MS,
            },
            term: Term::NONE,
            change: None,
            history: TermHistory::default(),
            commit_lsn: Lsn::INVALID,
            links,
            compared: None,
            differed: None,
            sent_lsn: Lsn::INVALID,
            n_looks: 0,
            acknowledged: BTreeMap::new(),
            local_flush_lsn: Lsn::INVALID,
            wait_reason: None,
            random,
        }
    }

    /// Goes on with the reign that another process of this server has handed over: the start, which
    /// has won it before recovery, or the worker, at a stop. `local` is the log as it stands now.
    pub fn elected(
        settings: ProposerSettings,
        local: LocalLog,
        won: WonTerm,
        now_ms: u64,
        out: &mut Actions,
    ) -> Proposer {
        let mut proposer = Proposer::new(settings, local, Standing::Running, now_ms);
        proposer.term = won.term;
        proposer.history = won.history;
        proposer.configuration = won.configuration;
        proposer.sent_lsn = won.sent_lsn;
        proposer.remember_history();
        proposer.lead(now_ms, out);
        proposer
    }

    /// What [`Self::elected`] needs, once this proposer leads; which it does no more then, since
    /// there must not be two in one term.
    pub fn hand_over(&mut self) -> Option<WonTerm> {
        if !self.is_leading() {
            return None;
        }
        self.end_reign(Phase::Refused);
        Some(WonTerm {
            term: self.term,
            history: self.history.clone(),
            configuration: self.configuration.clone(),
            sent_lsn: self.sent_lsn,
        })
    }

    /// One more safekeeper to dial: it may become a member. Returns its place.
    pub fn add_peer(&mut self, address: PeerAddress) -> PeerIdx {
        self.settings.peers.push(address);
        self.links.push(None);
        PeerIdx(self.links.len() - 1)
    }

    /// A connection to a peer is open and ready for messages.
    pub fn on_connected(&mut self, peer: PeerIdx, now_ms: u64, out: &mut Actions) {
        self.links[peer.0] = Some(Link {
            last_heard_ms: now_ms,
            ..Link::default()
        });
        self.greet(peer, now_ms, out);
    }

    pub fn on_disconnected(&mut self, peer: PeerIdx, now_ms: u64) {
        self.links[peer.0] = None;
        // A candidacy that can't succeed any more need not wait for its deadline.
        let hopeless = match self.phase {
            Phase::Configuring { .. } => true,
            Phase::Voting { .. } => !self.configuration.has_quorum(|member| self.hears(member)),
            _ => false,
        };
        if hopeless {
            self.pause(now_ms);
        }
    }

    pub fn on_message(
        &mut self,
        peer: PeerIdx,
        message: &AcceptorMessage,
        now_ms: u64,
        out: &mut Actions,
    ) {
        let Some(link) = &mut self.links[peer.0] else {
            return;
        };
        link.last_heard_ms = now_ms;
        match message {
            AcceptorMessage::Greeting(greeting) => self.on_greeting(peer, greeting, now_ms, out),
            AcceptorMessage::ConfigureResponse(response) => {
                self.on_configure_response(peer, response, now_ms, out);
            }
            AcceptorMessage::VoteResponse(response) => {
                self.on_vote_response(peer, response, now_ms, out);
            }
            AcceptorMessage::AppendResponse(response) => {
                self.on_append_response(peer, response, now_ms, out);
            }
            // Answers to Read arrive on connections of their own, which the host drives.
            AcceptorMessage::ReadResponse(_) => {
                self.disconnect(peer, "answer to a question that was not asked", out);
            }
        }
    }

    /// Let time pass: give up the silent, look again, go on after a pause.
    pub fn on_tick(&mut self, now_ms: u64, out: &mut Actions) {
        for peer in self.peer_indexes() {
            let Some(link) = &self.links[peer.0] else {
                continue;
            };
            let silent_ms = now_ms.saturating_sub(link.last_heard_ms);
            if link.expects_answer() && silent_ms >= self.settings.member_timeout_ms {
                self.disconnect(peer, &format!("no answer for {silent_ms} ms"), out);
            }
        }
        match self.phase {
            Phase::Waiting { until_ms, .. } if now_ms >= until_ms => self.greet_anew(now_ms, out),
            Phase::Voting { deadline_ms }
            | Phase::Configuring { deadline_ms, .. }
            | Phase::Confirming { deadline_ms }
                if now_ms >= deadline_ms =>
            {
                self.pause(now_ms);
            }
            Phase::Greeting { deadline_ms } if now_ms >= deadline_ms => self.evaluate(now_ms, out),
            Phase::Settling(Settling {
                retry_ms: Some(retry_ms),
                ..
            }) if now_ms >= retry_ms => {
                self.settle_again(now_ms, out);
            }
            _ => {}
        }
    }

    /// When there is something to do at the latest if nothing else happens: by [`Self::on_tick`],
    /// or by [`Self::next_append`] for the peers that `can_send`. A peer whose socket is full is
    /// left out: its heartbeat can't go out, and to come back for it at once would be a busy loop.
    pub fn next_tick_ms(&self, can_send: impl Fn(PeerIdx) -> bool) -> u64 {
        let of_phase = match self.phase {
            Phase::Waiting { until_ms, .. } => until_ms,
            Phase::Greeting { deadline_ms }
            | Phase::Voting { deadline_ms }
            | Phase::Confirming { deadline_ms }
            | Phase::Configuring { deadline_ms, .. } => deadline_ms,
            Phase::Settling(Settling {
                retry_ms: Some(retry_ms),
                ..
            }) => retry_ms,
            _ => u64::MAX,
        };
        let of_links = self.peer_indexes().filter_map(|peer| {
            let link = self.links[peer.0].as_ref()?;
            let timeout = if link.expects_answer() {
                link.last_heard_ms + self.settings.member_timeout_ms
            } else {
                u64::MAX
            };
            let heartbeat = if self.next_lsn(peer).is_some() && can_send(peer) {
                link.last_sent_ms + self.heartbeat_ms()
            } else {
                u64::MAX
            };
            Some(timeout.min(heartbeat))
        });
        of_links.min().unwrap_or(u64::MAX).min(of_phase)
    }

    fn is_member(&self, greeting: &AcceptorGreeting) -> bool {
        self.configuration
            .member(greeting.member_id, greeting.incarnation)
            .is_some()
    }

    fn peer_indexes(&self) -> impl Iterator<Item = PeerIdx> + use<> {
        (0..self.links.len()).map(PeerIdx)
    }

    /// This connection is the one that counts for a member.
    fn speaks_for_member(&self, peer: PeerIdx) -> bool {
        self.member_links().any(|(member, _)| member == peer)
    }

    /// Connected members, one link for each.
    fn member_links(&self) -> impl Iterator<Item = (PeerIdx, &Link)> {
        self.links_of(|greeting| self.is_member(greeting))
    }

    /// One link for each safekeeper that `counts`: two addresses may lead to one, and it must not
    /// count twice nor lead itself astray.
    fn links_of(
        &self,
        counts: impl Fn(&AcceptorGreeting) -> bool,
    ) -> impl Iterator<Item = (PeerIdx, &Link)> {
        let id_of = move |link: &Option<Link>| {
            let greeting = link.as_ref()?.greeting.as_ref()?;
            counts(greeting).then_some((greeting.member_id, greeting.incarnation))
        };
        self.links
            .iter()
            .enumerate()
            .filter_map(move |(idx, link)| {
                let id = id_of(link)?;
                let first = self.links[..idx]
                    .iter()
                    .all(|earlier| id_of(earlier) != Some(id));
                first.then_some((PeerIdx(idx), link.as_ref()?))
            })
    }

    fn greet(&mut self, peer: PeerIdx, now_ms: u64, out: &mut Actions) {
        let greeting = ProposerGreeting {
            proposer_id: self.settings.proposer_id,
            cluster: self.settings.cluster.clone(),
        };
        if let Some(link) = &mut self.links[peer.0] {
            link.greeting_due = true;
            link.last_sent_ms = now_ms;
            let message = ProposerMessage::Greeting(greeting);
            out.push(ProposerAction::Send { to: peer, message });
        }
    }

    fn greet_anew(&mut self, now_ms: u64, out: &mut Actions) {
        self.phase = Phase::Greeting {
            deadline_ms: now_ms + LOOK_AGAIN_MS,
        };
        self.greet_all(now_ms, out);
    }

    /// Ask everybody anew. What was known is stale, and would be taken for news.
    fn greet_all(&mut self, now_ms: u64, out: &mut Actions) {
        for peer in self.peer_indexes() {
            if let Some(link) = &mut self.links[peer.0] {
                link.vote = None;
                link.stream = None;
                link.configured = None;
                link.configure_due = false;
                if link.greeting_due {
                    continue;
                }
                link.greeting = None;
                // Silence before the question is not the answer's delay.
                link.last_heard_ms = now_ms;
                self.greet(peer, now_ms, out);
            }
        }
    }

    fn send_configure(
        &mut self,
        peer: PeerIdx,
        term: Term,
        configuration: &Configuration,
        now_ms: u64,
        out: &mut Actions,
    ) {
        if let Some(link) = &mut self.links[peer.0] {
            link.last_sent_ms = now_ms;
            link.configure_due = true;
            let configure = Configure {
                term,
                configuration: configuration.clone(),
            };
            let message = ProposerMessage::Configure(configure);
            out.push(ProposerAction::Send { to: peer, message });
        }
    }

    fn disconnect(&mut self, peer: PeerIdx, reason: &str, out: &mut Actions) {
        self.links[peer.0] = None;
        out.push(ProposerAction::Disconnect {
            peer,
            reason: reason.to_string(),
        });
    }

    /// End a candidacy that may succeed at the next attempt.
    fn pause(&mut self, now_ms: u64) {
        let pause_ms = 50 + next_random(&mut self.random) % (PAUSE_MS_MAX - 50);
        self.phase = Phase::Waiting {
            until_ms: now_ms + pause_ms,
            eager: false,
        };
    }

    fn wait(&mut self, reason: WaitReason, now_ms: u64, out: &mut Actions) {
        // Greetings that come meanwhile are looked at, and must not put off the next round: else
        // one safekeeper that reconnects all the time keeps what the others said for ever.
        let until_ms = match self.phase {
            Phase::Waiting { until_ms, .. } => until_ms,
            _ => now_ms + LOOK_AGAIN_MS,
        };
        self.phase = Phase::Waiting {
            until_ms,
            eager: true,
        };
        self.tell(reason, out);
    }

    /// There is nothing to wait for.
    fn refuse(&mut self, reason: WaitReason, now_ms: u64, out: &mut Actions) {
        self.wait(reason, now_ms, out);
        self.end_reign(Phase::Refused);
    }

    fn tell(&mut self, reason: WaitReason, out: &mut Actions) {
        if self.wait_reason.as_ref() != Some(&reason) {
            self.wait_reason = Some(reason.clone());
            out.push(ProposerAction::Wait(reason));
        }
    }
}

/// xorshift64*: good enough to part two rivals.
fn next_random(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 1
}

impl Link {
    /// This member, in this incarnation, has greeted here.
    fn is_of(&self, member: &Member) -> bool {
        self.greeting
            .as_ref()
            .is_some_and(|greeting| greeting.is_of(member))
    }

    /// Silence on this connection means something: an answer is due, or will be by heartbeat.
    fn expects_answer(&self) -> bool {
        self.greeting_due || self.configure_due || self.stream.is_some()
    }
}

//! Postgres's half of the protocol: greet, win, stream.
//!
//! ```text
//!                      ┌───────────────── higher term seen, or donor lost ◄──────────────┐
//!                      ▼                                                                 │
//!   Greeting ──► (Configuring) ──► Voting ──► Comparing ──► Completing ──► Persisting ───┤
//!      ▲  │        first use                    bytes        local log      local        │
//!      │  ▼                                   with donor   (before recovery) history     ▼
//!    Waiting                Refused: bytes differ                                     Leading ──► Deposed
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
            WaitReason::Membership(what) => f.write_str(what),
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

/// How far the local WAL reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalWal {
    /// WAL can be read and sent up to here.
    pub end_lsn: Lsn,
    /// On the local disk up to here: WAL above it may have to be fetched back after a crash, so
    /// the members keep it.
    pub flush_lsn: Lsn,
}

/// What the view shows of one peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerStatus {
    pub member_id: Option<MemberId>,
    pub state: &'static str,
    pub term: Term,
    /// Next byte to send; what it holds before streaming begins.
    pub sent_lsn: Lsn,
    pub flush_lsn: Lsn,
    pub commit_lsn: Lsn,
    pub feedback: StandbyFeedback,
    pub last_heard_ms: u64,
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
    Voting {
        deadline_ms: u64,
    },
    /// Asks again, or another donor of the same log, at `retry_ms` if the donor failed.
    Comparing {
        claim: Claim,
        missing: Option<(Lsn, Lsn)>,
        donor: PeerIdx,
        retry_ms: Option<u64>,
    },
    Completing {
        claim: Claim,
    },
    Persisting {
        history: TermHistory,
    },
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
    commit_told: Lsn,
    feedback: StandbyFeedback,
    term: Term,
    commit_lsn: Lsn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Stream {
    /// Elected was answered: the acceptor follows.
    following: bool,
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
    history: TermHistory,
    commit_lsn: Lsn,
    links: Vec<Option<Link>>,
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
            history: TermHistory::default(),
            commit_lsn: Lsn::INVALID,
            links,
            acknowledged: BTreeMap::new(),
            local_flush_lsn: Lsn::INVALID,
            wait_reason: None,
            random,
        }
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
                self.on_append_response(peer, response, out);
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
            Phase::Waiting { until_ms, .. } if now_ms >= until_ms => {
                self.phase = Phase::Greeting {
                    deadline_ms: now_ms + LOOK_AGAIN_MS,
                };
                self.greet_all(now_ms, out);
            }
            Phase::Voting { deadline_ms } | Phase::Configuring { deadline_ms, .. }
                if now_ms >= deadline_ms =>
            {
                self.pause(now_ms);
            }
            Phase::Greeting { deadline_ms } if now_ms >= deadline_ms => self.evaluate(now_ms, out),
            Phase::Comparing {
                retry_ms: Some(retry_ms),
                ..
            } if now_ms >= retry_ms => {
                self.compare_again(now_ms, out);
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
            | Phase::Configuring { deadline_ms, .. } => deadline_ms,
            Phase::Comparing {
                retry_ms: Some(retry_ms),
                ..
            } => retry_ms,
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

    // ---- greeting -------------------------------------------------------------------------

    fn on_greeting(
        &mut self,
        peer: PeerIdx,
        greeting: &AcceptorGreeting,
        now_ms: u64,
        out: &mut Actions,
    ) {
        let Some(link) = &mut self.links[peer.0] else {
            return;
        };
        link.greeting_due = false;
        link.term = greeting.term;
        link.commit_lsn = greeting.commit_lsn;
        link.greeting = Some(greeting.clone());
        match self.phase {
            Phase::Leading => self.welcome(peer, now_ms, out),
            Phase::Greeting { .. } | Phase::Waiting { eager: true, .. } => {
                self.evaluate(now_ms, out);
            }
            // Late, but its vote may be the one that is missing.
            Phase::Voting { .. } => self.ask_for_vote(peer, now_ms, out),
            _ => {}
        }
    }

    /// Do the greetings show that this proposer may stand for election?
    fn evaluate(&mut self, now_ms: u64, out: &mut Actions) {
        match self.look_before_the_leap() {
            Ok(None) => self.ask_for_votes(now_ms, out),
            Ok(Some(configuration)) => self.configure_all(configuration, now_ms, out),
            // Too few so far; more may be on their way.
            Err(WaitReason::NoQuorum { .. } | WaitReason::FirstUse { .. }) if matches!(self.phase, Phase::Greeting { deadline_ms } if now_ms < deadline_ms) =>
                {}
            Err(reason) => self.wait(reason, now_ms, out),
        }
    }

    /// `Ok(None)` to ask for votes, `Ok(Some)` to write this first configuration.
    fn look_before_the_leap(&mut self) -> Result<Option<Configuration>, WaitReason> {
        self.adopt_configuration()?;
        if self.configuration.is_none() || self.configuration.is_provisional() {
            return self.first_configuration().map(Some);
        }
        if !self.configuration.has_quorum(|member| self.hears(member)) {
            let greeted = self.member_links().count();
            let needed = self.configuration.quorum_size();
            return Err(WaitReason::NoQuorum { greeted, needed });
        }
        if let Some(term) = self.rival() {
            return Err(WaitReason::Rival { term });
        }
        let greetings = self
            .member_links()
            .filter_map(|(_, link)| link.greeting.as_ref());
        let logs = greetings.map(|greeting| Log::new(&greeting.history, greeting.flush_lsn));
        let donor = logs.max_by_key(Log::rank).unwrap_or_default();
        match self.decide(&donor) {
            Verdict::Lead(claim) | Verdict::Complete { claim, .. } => {
                self.next_term()
                    .and_then(|term| self.new_history(&claim, term))?;
                Ok(None)
            }
            Verdict::Refuse(divergence) => Err(WaitReason::Diverged(divergence)),
        }
    }

    /// A member that has greeted us on a connection that is open.
    fn hears(&self, member: &Member) -> bool {
        self.member_links().any(|(_, link)| link.is_of(member))
    }

    /// The highest term, if another proposer may be alive: a member of that term has heard it
    /// within member_timeout, or those that have heard none are no quorum. A minority of an older
    /// term may go on hearing a proposer that can't commit any more; it keeps nobody from leading.
    fn rival(&self) -> Option<Term> {
        let timeout_ms = self.settings.member_timeout_ms;
        let greetings = || {
            self.member_links()
                .filter_map(|(_, link)| link.greeting.as_ref())
        };
        let is_heard_by = |g: &AcceptorGreeting| u64::from(g.rival_heard_ms) < timeout_ms;
        let highest = greetings().map(|greeting| greeting.term).max()?;
        let heard = greetings().any(|greeting| greeting.term == highest && is_heard_by(greeting));
        let quiet = self
            .configuration
            .has_quorum(|member| greetings().any(|g| g.is_of(member) && !is_heard_by(g)));
        (heard || !quiet).then_some(highest)
    }

    /// One above every term that matters: what a member of another quorum says does not.
    fn next_term(&self) -> Result<Term, WaitReason> {
        let members = self.member_links().map(|(_, link)| link.term);
        let local = self.local.history.last().map(|entry| entry.term);
        let highest = members
            .chain(local)
            .chain([self.term])
            .max()
            .unwrap_or(Term::NONE);
        let at_the_end =
            || WaitReason::Membership("a safekeeper is at the end of terms".to_string());
        highest.next().ok_or_else(at_the_end)
    }

    /// The history of a reign that would begin by this claim.
    fn new_history(&self, claim: &Claim, term: Term) -> Result<TermHistory, WaitReason> {
        let entry = TermEntry {
            term,
            tli: self.local.tli,
            start_lsn: claim.start_lsn,
        };
        let history = claim.history.succeeded_by(entry);
        history.map_err(|invalid| WaitReason::Membership(invalid.to_string()))
    }

    /// The highest version of our lineage: of the one we know, or else of the only one there is.
    /// A provisional one that we know binds nobody but those who hold it.
    fn adopt_configuration(&mut self) -> Result<(), WaitReason> {
        let known = !self.configuration.is_none() && !self.configuration.is_provisional();
        let mut adopted = if known {
            self.configuration.clone()
        } else {
            Configuration::default()
        };
        for greeting in self
            .links
            .iter()
            .flatten()
            .filter_map(|link| link.greeting.as_ref())
        {
            let theirs = &greeting.configuration;
            if theirs.is_none() {
                continue;
            }
            if !adopted.is_none() && theirs.lineage != adopted.lineage {
                if known {
                    continue;
                }
                return Err(WaitReason::Membership(format!(
                    "safekeeper {} holds configuration {theirs}, another one holds {adopted}: they were \
                     first configured by different servers; remove the stranger from the list",
                    greeting.member_id
                )));
            }
            if theirs.version > adopted.version {
                adopted = theirs.clone();
            }
        }
        self.configuration = adopted;
        Ok(())
    }

    /// First use: every listed safekeeper, each once, and none bound to another list.
    fn first_configuration(&self) -> Result<Configuration, WaitReason> {
        let mut members: Vec<Member> = Vec::new();
        let mut missing = Vec::new();
        let mut highest = Term::NONE;
        for (address, link) in self.settings.peers.iter().zip(&self.links) {
            let Some(greeting) = link.as_ref().and_then(|link| link.greeting.as_ref()) else {
                missing.push(address.clone());
                continue;
            };
            if let Some(twin) = members
                .iter()
                .find(|member| member.id == greeting.member_id)
            {
                return Err(WaitReason::Membership(format!(
                    "{address} and {}:{} are both safekeeper {}: each needs an id of its own",
                    twin.host, twin.port, twin.id
                )));
            }
            highest = highest.max(greeting.term);
            members.push(Member {
                id: greeting.member_id,
                incarnation: greeting.incarnation,
                host: address.host.clone(),
                port: address.port,
            });
        }
        if !missing.is_empty() {
            return Err(WaitReason::FirstUse { missing });
        }
        if members.len() > Configuration::MEMBERS_MAX {
            return Err(WaitReason::Membership(format!(
                "{} safekeepers are listed, at most {} are supported",
                members.len(),
                Configuration::MEMBERS_MAX
            )));
        }
        let Some(term) = highest.next() else {
            return Err(WaitReason::Membership(
                "a safekeeper is at the end of terms".to_string(),
            ));
        };
        let version = ConfigurationVersion {
            term,
            generation: ConfigurationVersion::PROVISIONAL,
        };
        let begun = self.configuration.is_provisional();
        let ours = Configuration {
            lineage: if begun {
                self.configuration.lineage
            } else {
                self.lineage
            },
            version,
            members,
            new_members: None,
        };
        if begun && !ours.same_members(&self.configuration) {
            return Err(WaitReason::Membership(format!(
                "a first configuration {} was begun with other safekeepers than the list names: restore \
                 the list, or make those safekeepers anew with `safekeeper init`",
                self.configuration
            )));
        }
        Ok(ours)
    }

    // ---- first configuration --------------------------------------------------------------

    fn configure_all(&mut self, configuration: Configuration, now_ms: u64, out: &mut Actions) {
        let term = configuration.version.term;
        for peer in self.peer_indexes() {
            self.send_configure(peer, term, &configuration, now_ms, out);
        }
        let deadline_ms = now_ms + self.settings.member_timeout_ms;
        self.phase = Phase::Configuring {
            term,
            configuration,
            deadline_ms,
        };
    }

    fn on_configure_response(
        &mut self,
        peer: PeerIdx,
        response: &ConfigureResponse,
        now_ms: u64,
        out: &mut Actions,
    ) {
        let held = response.configuration.version;
        if let Some(link) = &mut self.links[peer.0] {
            link.configured = Some(held);
            link.configure_due = false;
            link.term = response.term;
            if let Some(greeting) = &mut link.greeting {
                greeting.term = response.term;
                greeting.configuration = response.configuration.clone();
            }
        }
        match &self.phase {
            Phase::Leading => self.welcome(peer, now_ms, out),
            Phase::Configuring {
                term,
                configuration,
                ..
            } => {
                if response.term > *term || held > configuration.version {
                    return self.pause(now_ms);
                }
                let (term, configuration) = (*term, configuration.clone());
                self.advance_configuring(term, configuration, now_ms, out);
            }
            _ => {}
        }
    }

    /// Provisional on every member, then confirmed on every member: two proposers with different
    /// lists that share a safekeeper can't both get past the first step.
    fn advance_configuring(
        &mut self,
        term: Term,
        configuration: Configuration,
        now_ms: u64,
        out: &mut Actions,
    ) {
        let on_all = self.links.iter().all(|link| {
            link.as_ref()
                .is_some_and(|link| link.configured == Some(configuration.version))
        });
        if !on_all {
            return;
        }
        if configuration.is_provisional() {
            let version = ConfigurationVersion {
                term,
                generation: 1,
            };
            self.configure_all(
                Configuration {
                    version,
                    ..configuration
                },
                now_ms,
                out,
            );
        } else {
            self.configuration = configuration;
            self.ask_for_votes(now_ms, out);
        }
    }

    // ---- candidacy ------------------------------------------------------------------------

    fn ask_for_votes(&mut self, now_ms: u64, out: &mut Actions) {
        match self.next_term() {
            Ok(term) => self.term = term,
            Err(reason) => return self.wait(reason, now_ms, out),
        }
        self.acknowledged.clear();
        self.phase = Phase::Voting {
            deadline_ms: now_ms + self.settings.member_timeout_ms,
        };
        for peer in self.peer_indexes() {
            if let Some(link) = &mut self.links[peer.0] {
                link.vote_asked = false;
                link.vote = None;
                link.stream = None;
            }
            self.ask_for_vote(peer, now_ms, out);
        }
    }

    fn ask_for_vote(&mut self, peer: PeerIdx, now_ms: u64, out: &mut Actions) {
        let request = VoteRequest {
            configuration_version: self.configuration.version,
            term: self.term,
        };
        if !self.speaks_for_member(peer) {
            return;
        }
        let Some(link) = self.links[peer.0].as_mut().filter(|link| !link.vote_asked) else {
            return;
        };
        link.vote_asked = true;
        link.last_sent_ms = now_ms;
        let message = ProposerMessage::VoteRequest(request);
        out.push(ProposerAction::Send { to: peer, message });
    }

    fn on_vote_response(
        &mut self,
        peer: PeerIdx,
        response: &VoteResponse,
        now_ms: u64,
        out: &mut Actions,
    ) {
        let (term, counting) = (self.term, matches!(self.phase, Phase::Voting { .. }));
        let Some(link) = &mut self.links[peer.0] else {
            return;
        };
        link.term = response.term;
        let granted = response.granted && response.term == term;
        // What the greeting said of it is older.
        if let Some(greeting) = &mut link.greeting {
            if !is_on(Mutation::DonorRankedByTerm) {
                greeting.term = response.term;
            }
            greeting.history = response.history.clone();
            greeting.flush_lsn = response.flush_lsn;
        }
        if granted {
            link.vote = Some(Log::new(&response.history, response.flush_lsn));
        }
        match self.phase {
            Phase::Leading => self.welcome(peer, now_ms, out),
            Phase::Voting { .. } if granted => self.count_votes(now_ms, out),
            // Answer to a candidacy that is over.
            _ if response.term < term
                && response.configuration_version <= self.configuration.version => {}
            // A higher term, or an equal one given to another (W5); or our configuration is too
            // old. This candidacy is lost: look again.
            _ if counting => self.pause(now_ms),
            _ => {}
        }
    }

    fn count_votes(&mut self, now_ms: u64, out: &mut Actions) {
        let votes = self.votes();
        let voted = |member: &Member| {
            votes.iter().any(|(peer, _)| {
                self.links[peer.0]
                    .as_ref()
                    .is_some_and(|link| link.is_of(member))
            })
        };
        if !self.configuration.has_quorum(voted) {
            return;
        }
        let rank = |vote: &&(PeerIdx, &Log)| self.rank(vote.0, vote.1);
        let Some(&(donor, log)) = votes.iter().max_by_key(rank) else {
            return;
        };
        let (claim, missing) = match self.decide(log) {
            Verdict::Lead(claim) => (claim, None),
            Verdict::Complete { missing, claim } => (claim, Some(missing)),
            Verdict::Refuse(divergence) => {
                return self.wait(WaitReason::Diverged(divergence), now_ms, out);
            }
        };
        let term = self.term;
        if let Some((begin_lsn, end_lsn)) = claim.compare {
            self.phase = Phase::Comparing {
                claim,
                missing,
                donor,
                retry_ms: None,
            };
            out.push(ProposerAction::Compare {
                donor,
                term,
                begin_lsn,
                end_lsn,
            });
        } else {
            self.complete_or_claim(donor, claim, missing, now_ms, out);
        }
    }

    /// The connected members that granted this candidacy's vote, with their logs.
    /// By what the donor is chosen: the term of the log's last byte, then its end.
    fn rank(&self, peer: PeerIdx, log: &Log) -> (Term, Lsn) {
        let greeting = self.links[peer.0]
            .as_ref()
            .and_then(|link| link.greeting.as_ref());
        match greeting {
            Some(greeting) if is_on(Mutation::DonorRankedByTerm) => (greeting.term, log.end_lsn),
            _ => log.rank(),
        }
    }

    fn votes(&self) -> Vec<(PeerIdx, &Log)> {
        self.member_links()
            .filter_map(|(peer, link)| Some((peer, link.vote.as_ref()?)))
            .collect()
    }

    /// Answer to [`ProposerAction::Compare`].
    pub fn on_compared(&mut self, outcome: Compared, now_ms: u64, out: &mut Actions) {
        let Phase::Comparing {
            claim,
            missing,
            donor,
            retry_ms,
        } = &mut self.phase
        else {
            return;
        };
        match outcome {
            Compared::Equal => {
                let (claim, missing, donor) = (claim.clone(), *missing, *donor);
                self.complete_or_claim(donor, claim, missing, now_ms, out);
            }
            Compared::Differs { at } => {
                // Our bytes will not change: asking for votes again would raise the term every
                // second and end the reign of whoever rightly leads.
                self.wait(WaitReason::BytesDiffer { at }, now_ms, out);
                self.phase = Phase::Refused;
            }
            // The term is won, and stays won; a new one would help nobody.
            Compared::Unavailable { reason } => {
                *retry_ms = Some(now_ms + LOOK_AGAIN_MS);
                self.tell(WaitReason::Donor(reason), out);
            }
        }
    }

    /// The same donor again, or the next voter whose log is as good; without one, all anew.
    fn compare_again(&mut self, now_ms: u64, out: &mut Actions) {
        let best = self.votes().iter().map(|(_, log)| log.rank()).max();
        let equals: Vec<PeerIdx> = self
            .votes()
            .iter()
            .filter(|(_, log)| Some(log.rank()) == best)
            .map(|(peer, _)| *peer)
            .collect();
        let term = self.term;
        let Phase::Comparing {
            claim,
            donor,
            retry_ms,
            ..
        } = &mut self.phase
        else {
            return;
        };
        let next = equals.iter().find(|&peer| peer > donor).or(equals.first());
        match (next, claim.compare) {
            (Some(&next), Some((begin_lsn, end_lsn))) => {
                (*donor, *retry_ms) = (next, None);
                out.push(ProposerAction::Compare {
                    donor: next,
                    term,
                    begin_lsn,
                    end_lsn,
                });
            }
            _ => self.pause(now_ms),
        }
    }

    fn complete_or_claim(
        &mut self,
        donor: PeerIdx,
        claim: Claim,
        missing: Option<(Lsn, Lsn)>,
        now_ms: u64,
        out: &mut Actions,
    ) {
        match missing {
            Some((begin_lsn, end_lsn)) => {
                self.phase = Phase::Completing { claim };
                let term = self.term;
                out.push(ProposerAction::Complete {
                    donor,
                    term,
                    begin_lsn,
                    end_lsn,
                });
            }
            None => self.claim(claim, now_ms, out),
        }
    }

    /// Answer to [`ProposerAction::Complete`]: the local log ends where the donor's does, fsynced.
    pub fn on_completed(&mut self, now_ms: u64, out: &mut Actions) {
        let Phase::Completing { claim } = &self.phase else {
            return;
        };
        let claim = claim.clone();
        self.local.end_lsn = claim.start_lsn;
        self.claim(claim, now_ms, out);
    }

    /// The history goes to the local disk before a byte is pushed under it.
    fn claim(&mut self, claim: Claim, now_ms: u64, out: &mut Actions) {
        match self.new_history(&claim, self.term) {
            Ok(history) => {
                self.phase = Phase::Persisting {
                    history: history.clone(),
                };
                let configuration = self.configuration.clone();
                out.push(ProposerAction::PersistHistory {
                    history,
                    configuration,
                });
            }
            Err(reason) => self.wait(reason, now_ms, out),
        }
    }

    /// Answer to [`ProposerAction::PersistHistory`]: the reign begins.
    pub fn on_history_persisted(&mut self, now_ms: u64, out: &mut Actions) {
        let Phase::Persisting { history } = &self.phase else {
            return;
        };
        self.history = history.clone();
        self.local.history = history.clone();
        self.local.configuration = self.configuration.clone();
        self.local.unled_from = None;
        self.phase = Phase::Leading;
        self.wait_reason = None;
        out.push(ProposerAction::Lead {
            term: self.term,
            start_lsn: self.term_start_lsn(),
        });
        for peer in self.peer_indexes() {
            self.welcome(peer, now_ms, out);
        }
    }

    // ---- reign ----------------------------------------------------------------------------

    /// Bring a greeted peer under the reign: configuration first if it lacks it, then Elected.
    fn welcome(&mut self, peer: PeerIdx, now_ms: u64, out: &mut Actions) {
        let Some(greeting) = self.links[peer.0]
            .as_ref()
            .and_then(|link| link.greeting.as_ref())
        else {
            return;
        };
        let (term, version) = (greeting.term, greeting.configuration.version);
        // A stranger's term is not ours to heed: it was won, if it was, in another quorum.
        if !self.speaks_for_member(peer) {
            return;
        }
        if term > self.term {
            return self.depose(term, out);
        }
        if version > self.configuration.version {
            return self.stand_again(out);
        }
        if version < self.configuration.version {
            let configuration = self.configuration.clone();
            self.send_configure(peer, self.term, &configuration, now_ms, out);
        } else {
            self.elect(peer, now_ms, out);
        }
    }

    /// Send Elected, unless the peer is no member or has it already on this connection.
    fn elect(&mut self, peer: PeerIdx, now_ms: u64, out: &mut Actions) {
        let Some(link) = &self.links[peer.0] else {
            return;
        };
        let Some(greeting) = &link.greeting else {
            return;
        };
        if !self.speaks_for_member(peer) || link.stream.is_some() {
            return;
        }
        let theirs = Log::new(&greeting.history, greeting.flush_lsn);
        let ours = Log::new(&self.history, Lsn(u64::MAX));
        let log_start = self
            .history
            .first()
            .map_or(Lsn::INVALID, |entry| entry.start_lsn);
        let start_lsn = common_end(&theirs, &ours).unwrap_or(log_start);
        let elected = Elected {
            configuration_version: self.configuration.version,
            term: self.term,
            history: self.history.clone(),
            start_lsn,
            timeline_files: self.timeline_files(),
        };
        if let Some(link) = &mut self.links[peer.0] {
            link.stream = Some(Stream {
                following: false,
                sent_lsn: start_lsn,
                write_lsn: start_lsn,
            });
            link.last_sent_ms = now_ms;
            link.last_heard_ms = now_ms;
        }
        out.push(ProposerAction::Send {
            to: peer,
            message: ProposerMessage::Elected(elected),
        });
    }

    /// The newest ones, as far as a message holds them.
    fn timeline_files(&self) -> Vec<TimelineFile> {
        let files = self
            .local
            .timeline_files
            .iter()
            .take(TimelineFile::COUNT_MAX);
        let mut len = 0;
        files
            .take_while(|file| {
                len += file.content.len();
                file.content.len() <= TimelineFile::LEN_MAX && len <= MESSAGE_LEN_MAX / 2
            })
            .cloned()
            .collect()
    }

    fn on_append_response(&mut self, peer: PeerIdx, response: &AppendResponse, out: &mut Actions) {
        if !self.is_leading() {
            return;
        }
        if response.term > self.term {
            return self.depose(response.term, out);
        }
        if response.configuration_version > self.configuration.version {
            return self.stand_again(out);
        }
        let Some(link) = &mut self.links[peer.0] else {
            return;
        };
        link.term = response.term;
        link.commit_lsn = response.commit_lsn;
        link.feedback = response.feedback;
        let (Some(greeting), Some(stream)) = (&link.greeting, &mut link.stream) else {
            return self.disconnect(peer, "acknowledgement before election", out);
        };
        if response.term < self.term {
            return self.disconnect(peer, "acknowledgement of an older term", out);
        }
        if !stream.following && response.flush_lsn != stream.sent_lsn {
            let reason = format!(
                "follows from {} instead of {}",
                response.flush_lsn, stream.sent_lsn
            );
            return self.disconnect(peer, &reason, out);
        }
        if response.write_lsn > stream.sent_lsn || response.flush_lsn > response.write_lsn {
            return self.disconnect(peer, "acknowledges WAL that was not sent", out);
        }
        stream.following = true;
        stream.write_lsn = stream.write_lsn.max(response.write_lsn);
        let (id, incarnation) = (greeting.member_id, greeting.incarnation);
        let acknowledged = self.acknowledged.entry((id, incarnation)).or_default();
        *acknowledged = response.flush_lsn.max(*acknowledged);
        self.advance_commit(out);
    }

    /// What a majority of all members has flushed in this term; one that has not taken this
    /// term's Elected counts as nothing. Only from the term's start on: older WAL on a majority
    /// may still lose to a log of a newer term that a minority holds (Raft §5.4.2).
    fn advance_commit(&mut self, out: &mut Actions) {
        let reached = self
            .configuration
            .quorum_lsn(|member| self.flushed(member.id, member.incarnation));
        let own = reached >= self.term_start_lsn() || is_on(Mutation::CommitWithoutTermStart);
        if own && reached > self.commit_lsn {
            self.commit_lsn = reached;
            out.push(ProposerAction::Commit(reached));
        }
    }

    /// [`Lsn::INVALID`] for one that has acknowledged nothing in this term.
    fn flushed(&self, id: MemberId, incarnation: Incarnation) -> Lsn {
        self.acknowledged
            .get(&(id, incarnation))
            .copied()
            .unwrap_or(Lsn::INVALID)
    }

    /// The next Append for this peer: WAL if there is some to send and the window is open, else a
    /// heartbeat if one is due or `commit_lsn` has moved, else nothing. It counts as sent: a host
    /// that can't deliver it must disconnect.
    ///
    /// A host that has no WAL at hand at [`Self::next_lsn`] passes that as the end of its WAL.
    pub fn next_append(&mut self, peer: PeerIdx, wal: LocalWal, now_ms: u64) -> Option<Append> {
        if !self.is_leading() {
            return None;
        }
        self.local_flush_lsn = self.local_flush_lsn.max(wal.flush_lsn);
        let heartbeat_ms = self.heartbeat_ms();
        let truncate_lsn = self.truncate_lsn();
        let link = self.links[peer.0].as_mut()?;
        let stream = link.stream.as_mut().filter(|stream| stream.following)?;

        let begin_lsn = stream.sent_lsn;
        let tli = self.history.tli_at(begin_lsn)?;
        let len = if begin_lsn.saturating_distance_from(stream.write_lsn) < WINDOW {
            let next_tli = self
                .history
                .entries()
                .iter()
                .find(|e| e.start_lsn > begin_lsn && e.tli != tli);
            let end = next_tli.map_or(wal.end_lsn, |entry| entry.start_lsn.min(wal.end_lsn));
            end.saturating_distance_from(begin_lsn)
                .min(u64::from(Append::LEN_MAX))
        } else {
            0
        };
        let heartbeat_due = now_ms >= link.last_sent_ms + heartbeat_ms;
        if len == 0 && !heartbeat_due && link.commit_told >= self.commit_lsn {
            return None;
        }
        stream.sent_lsn = begin_lsn + len;
        // News of a commit that carries no WAL and wants no answer is no sign of life of the
        // member: it must not put off the heartbeat that asks for one.
        if len > 0 || heartbeat_due {
            link.last_sent_ms = now_ms;
        }
        link.commit_told = self.commit_lsn;
        Some(Append {
            configuration_version: self.configuration.version,
            term: self.term,
            tli,
            begin_lsn,
            len: u32::try_from(len).expect("at most LEN_MAX"),
            commit_lsn: self.commit_lsn,
            truncate_lsn,
            reply_requested: len == 0 && heartbeat_due,
        })
    }

    /// Where this peer's next byte lies; `None` if it does not follow.
    pub fn next_lsn(&self, peer: PeerIdx) -> Option<Lsn> {
        let stream = self.links[peer.0]
            .as_ref()?
            .stream
            .filter(|stream| stream.following)?;
        self.is_leading().then_some(stream.sent_lsn)
    }

    /// Connected peers that have flushed WAL beyond `lsn` in this term, the most advanced first.
    /// Any of them may feed another: what an acceptor of this term has flushed is our own log.
    pub fn donors_for(&self, lsn: Lsn) -> Vec<PeerIdx> {
        let mut donors: Vec<(Lsn, PeerIdx)> = self
            .member_links()
            .filter(|(_, link)| link.stream.is_some_and(|stream| stream.following))
            .filter_map(|(peer, link)| {
                let greeting = link.greeting.as_ref()?;
                Some((self.flushed(greeting.member_id, greeting.incarnation), peer))
            })
            .filter(|(flush_lsn, _)| *flush_lsn > lsn)
            .collect();
        donors.sort_by(|a, b| b.cmp(a));
        donors.into_iter().map(|(_, peer)| peer).collect()
    }

    // ---- what others may know -------------------------------------------------------------

    pub fn is_leading(&self) -> bool {
        matches!(self.phase, Phase::Leading)
    }

    pub fn term(&self) -> Term {
        self.term
    }

    /// Where the current reign's own WAL begins; [`Lsn::INVALID`] before the first one.
    pub fn term_start_lsn(&self) -> Lsn {
        self.history
            .last()
            .map_or(Lsn::INVALID, |entry| entry.start_lsn)
    }

    pub fn commit_lsn(&self) -> Lsn {
        self.commit_lsn
    }

    pub fn configuration(&self) -> &Configuration {
        &self.configuration
    }

    pub fn history(&self) -> &TermHistory {
        &self.history
    }

    pub fn wait_reason(&self) -> Option<&WaitReason> {
        self.wait_reason.as_ref()
    }

    pub fn state_name(&self) -> &'static str {
        match self.phase {
            Phase::Greeting { .. } => "greeting",
            Phase::Configuring { .. } => "configuring",
            Phase::Voting { .. } => "voting",
            Phase::Comparing { .. } => "comparing",
            Phase::Completing { .. } => "completing",
            Phase::Persisting { .. } => "persisting",
            Phase::Leading => "leading",
            Phase::Waiting { .. } => "waiting",
            Phase::Refused => "refused",
            Phase::Deposed => "deposed",
        }
    }

    pub fn peer_status(&self, peer: PeerIdx) -> PeerStatus {
        let Some(link) = &self.links[peer.0] else {
            return PeerStatus {
                member_id: None,
                state: "disconnected",
                term: Term::NONE,
                sent_lsn: Lsn::INVALID,
                flush_lsn: Lsn::INVALID,
                commit_lsn: Lsn::INVALID,
                feedback: StandbyFeedback::default(),
                last_heard_ms: 0,
            };
        };
        let member_id = link.greeting.as_ref().map(|greeting| greeting.member_id);
        let greeted_lsn = link.greeting.as_ref().map_or(Lsn::INVALID, |g| g.flush_lsn);
        PeerStatus {
            member_id,
            state: self.link_state(link),
            term: link.term,
            sent_lsn: link.stream.map_or(greeted_lsn, |stream| stream.sent_lsn),
            flush_lsn: match (&link.greeting, link.stream) {
                (Some(g), Some(_)) => self.flushed(g.member_id, g.incarnation),
                _ => greeted_lsn,
            },
            commit_lsn: link.commit_lsn,
            feedback: link.feedback,
            last_heard_ms: link.last_heard_ms,
        }
    }

    fn link_state(&self, link: &Link) -> &'static str {
        match (&link.greeting, link.stream, &link.vote) {
            (None, _, _) => "greeting",
            (Some(greeting), _, _)
                if !self.configuration.is_none() && !self.is_member(greeting) =>
            {
                "not a member"
            }
            (_, Some(stream), _) if !stream.following => "elected",
            (_, Some(stream), _) if stream.sent_lsn < self.commit_lsn => "catchup",
            (_, Some(_), _) => "streaming",
            (_, None, Some(_)) => "voted",
            (_, None, None) => "idle",
        }
    }

    /// Forget all times and random numbers (every deadline may have passed, nobody was silent for
    /// long), and what only the view shows. Two proposers that are equal then will do the same,
    /// sooner or later; a model checker compares them so. A host has no use for it.
    pub fn forget_time(&mut self) {
        match &mut self.phase {
            Phase::Greeting { deadline_ms }
            | Phase::Configuring { deadline_ms, .. }
            | Phase::Voting { deadline_ms }
            | Phase::Waiting {
                until_ms: deadline_ms,
                ..
            }
            | Phase::Comparing {
                retry_ms: Some(deadline_ms),
                ..
            } => *deadline_ms = 0,
            Phase::Comparing { retry_ms: None, .. }
            | Phase::Completing { .. }
            | Phase::Persisting { .. }
            | Phase::Leading
            | Phase::Refused
            | Phase::Deposed => {}
        }
        for link in self.links.iter_mut().flatten() {
            (link.last_heard_ms, link.last_sent_ms) = (0, 0);
            link.commit_lsn = Lsn::INVALID;
        }
        self.wait_reason = None;
        self.random = 1;
    }

    // ---- helpers --------------------------------------------------------------------------

    fn decide(&self, donor: &Log) -> Verdict {
        decide(
            &self.local,
            self.standing,
            donor,
            self.settings.cluster.segment_size,
        )
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

    /// Connected members, one link for each: two addresses may lead to one safekeeper, and it
    /// must not count twice nor lead itself astray.
    fn member_links(&self) -> impl Iterator<Item = (PeerIdx, &Link)> {
        let id_of = |link: &Option<Link>| {
            let greeting = link.as_ref()?.greeting.as_ref()?;
            self.is_member(greeting)
                .then_some((greeting.member_id, greeting.incarnation))
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

    fn heartbeat_ms(&self) -> u64 {
        self.settings.member_timeout_ms / HEARTBEATS_PER_TIMEOUT
    }

    /// What every member, and the local disk, has flushed; [`Lsn::INVALID`] while a member is
    /// unheard in this term.
    fn truncate_lsn(&self) -> Lsn {
        let members = self.configuration.all_members();
        let lowest = members
            .map(|member| self.flushed(member.id, member.incarnation))
            .min();
        let lowest = lowest.unwrap_or(Lsn::INVALID).min(self.local_flush_lsn);
        lowest.min(self.commit_lsn)
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

    /// A higher term exists: whatever this server writes from now on, no quorum will take it.
    fn depose(&mut self, term: Term, out: &mut Actions) {
        self.end_reign(Phase::Deposed);
        out.push(ProposerAction::Deposed { term });
    }

    /// The members changed without us, in a term below ours that we did not see.
    fn stand_again(&mut self, out: &mut Actions) {
        self.end_reign(Phase::Refused);
        out.push(ProposerAction::StandAgain);
    }

    fn end_reign(&mut self, phase: Phase) {
        self.phase = phase;
        for link in self.links.iter_mut().flatten() {
            link.stream = None;
        }
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

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

use crate::election::{Claim, Divergence, LocalLog, Standing, Verdict, decide};
use crate::{
    AcceptorGreeting, AcceptorMessage, Append, AppendResponse, ClusterIdentity, Configuration,
    ConfigurationVersion, Configure, ConfigureResponse, Elected, Incarnation, Log, Lsn, Member,
    MemberId, PeerIdx, ProposerAction, ProposerGreeting, ProposerId, ProposerMessage,
    StandbyFeedback, Term, TermEntry, TermHistory, VoteRequest, VoteResponse, common_end,
};

/// Where to dial a safekeeper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAddress {
    pub host: String,
    pub port: u16,
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

#[derive(Clone, Debug)]
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WaitReason {
    /// Fewer members than a majority have greeted.
    NoQuorum { greeted: usize, needed: usize },
    /// At first use every listed safekeeper must be reachable once; these are not.
    FirstUse { missing: Vec<PeerAddress> },
    /// Another proposer of the current term was heard within `member_timeout`.
    Rival { term: Term, heard_ms: u32 },
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
            WaitReason::Rival { term, heard_ms } => write!(
                f,
                "another proposer of term {term} is alive, heard {heard_ms} ms ago"
            ),
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

#[derive(Clone, Debug)]
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
    Comparing {
        claim: Claim,
        missing: Option<(Lsn, Lsn)>,
        donor: PeerIdx,
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
#[derive(Clone, Debug, Default)]
struct Link {
    greeting: Option<AcceptorGreeting>,
    /// A greeting was sent and not answered.
    greeting_due: bool,
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

#[derive(Clone, Copy, Debug)]
struct Stream {
    /// Elected was answered: the acceptor follows.
    following: bool,
    sent_lsn: Lsn,
    write_lsn: Lsn,
}

/// What a member has acknowledged: kept over reconnects, for this term and incarnation only.
#[derive(Clone, Copy, Debug)]
struct Acknowledged {
    incarnation: Incarnation,
    flush_lsn: Lsn,
}

/// Consensus state of one Postgres server.
#[derive(Clone, Debug)]
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
    acknowledged: BTreeMap<MemberId, Acknowledged>,
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
        let random = settings.seed | 1;
        Proposer {
            settings,
            local,
            standing,
            phase: Phase::Greeting {
                deadline_ms: now_ms + LOOK_AGAIN_MS,
            },
            term: Term::NONE,
            configuration: Configuration::default(),
            history: TermHistory::default(),
            commit_lsn: Lsn::INVALID,
            links,
            acknowledged: BTreeMap::new(),
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
            Phase::Voting { .. } => {
                let connected: Vec<MemberId> = self
                    .member_links()
                    .filter_map(|(_, link)| Some(link.greeting.as_ref()?.member_id))
                    .collect();
                !self.configuration.has_quorum(|id| connected.contains(&id))
            }
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
            _ => {}
        }
    }

    /// When [`Self::on_tick`] (and, while leading, [`Self::next_append`]) has something to do at
    /// the latest, if nothing else happens.
    pub fn next_tick_ms(&self) -> u64 {
        let of_phase = match self.phase {
            Phase::Waiting { until_ms, .. } => until_ms,
            Phase::Greeting { deadline_ms }
            | Phase::Voting { deadline_ms }
            | Phase::Configuring { deadline_ms, .. } => deadline_ms,
            _ => u64::MAX,
        };
        let of_links = self.links.iter().flatten().map(|link| {
            let timeout = if link.expects_answer() {
                link.last_heard_ms + self.settings.member_timeout_ms
            } else {
                u64::MAX
            };
            let heartbeat = if link.stream.is_some() {
                link.last_sent_ms + self.heartbeat_ms()
            } else {
                u64::MAX
            };
            timeout.min(heartbeat)
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
        let members: Vec<&AcceptorGreeting> = self
            .member_links()
            .filter_map(|(_, link)| link.greeting.as_ref())
            .collect();
        let greeted = |id| members.iter().any(|greeting| greeting.member_id == id);
        if !self.configuration.has_quorum(greeted) {
            let needed = self.configuration.quorum_size();
            return Err(WaitReason::NoQuorum {
                greeted: members.len(),
                needed,
            });
        }

        let term = members
            .iter()
            .map(|greeting| greeting.term)
            .max()
            .unwrap_or(Term::NONE);
        let heard_ms = members
            .iter()
            .filter(|greeting| greeting.term == term)
            .map(|greeting| greeting.rival_heard_ms)
            .min()
            .unwrap_or(AcceptorGreeting::NEVER_HEARD);
        if u64::from(heard_ms) < self.settings.member_timeout_ms {
            return Err(WaitReason::Rival { term, heard_ms });
        }

        let logs = members
            .iter()
            .map(|greeting| Log::new(&greeting.history, greeting.flush_lsn));
        let donor = logs.max_by_key(Log::rank).unwrap_or_default();
        match self.decide(&donor) {
            Verdict::Lead(_) | Verdict::Complete { .. } => Ok(None),
            Verdict::Refuse(divergence) => Err(WaitReason::Diverged(divergence)),
        }
    }

    /// The highest version among the greetings and what we had.
    fn adopt_configuration(&mut self) -> Result<(), WaitReason> {
        for link in self.links.iter().flatten() {
            let Some(greeting) = &link.greeting else {
                continue;
            };
            let theirs = &greeting.configuration;
            if theirs.version > self.configuration.version {
                self.configuration = theirs.clone();
            } else if theirs.version == self.configuration.version
                && !theirs.same_members(&self.configuration)
            {
                return Err(WaitReason::Membership(format!(
                    "safekeeper {} holds configuration {theirs}, another one holds {}: they were first \
                     configured with different lists",
                    greeting.member_id, self.configuration
                )));
            }
        }
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
        let Some(term) = highest.next() else {
            return Err(WaitReason::Membership(
                "a safekeeper is at the end of terms".to_string(),
            ));
        };
        let version = ConfigurationVersion {
            term,
            generation: ConfigurationVersion::PROVISIONAL,
        };
        let ours = Configuration {
            version,
            members,
            new_members: None,
        };
        if self.configuration.is_provisional() && !ours.same_members(&self.configuration) {
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
            link.term = response.term;
            if let Some(greeting) = &mut link.greeting {
                greeting.term = response.term;
                greeting.configuration = response.configuration.clone();
            }
        }
        match &self.phase {
            Phase::Leading if response.term > self.term => self.depose(response.term, out),
            Phase::Leading => self.elect(peer, now_ms, out),
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
        let highest = self.links.iter().flatten().map(|link| link.term).max();
        let Some(term) = highest.unwrap_or(Term::NONE).max(self.term).next() else {
            let reason = "a safekeeper is at the end of terms".to_string();
            return self.wait(WaitReason::Membership(reason), now_ms, out);
        };
        self.term = term;
        self.acknowledged.clear();
        self.phase = Phase::Voting {
            deadline_ms: now_ms + self.settings.member_timeout_ms,
        };
        let request = VoteRequest {
            configuration_version: self.configuration.version,
            term: self.term,
        };
        for peer in self.member_peers() {
            if let Some(link) = &mut self.links[peer.0] {
                link.vote = None;
                link.stream = None;
                link.last_sent_ms = now_ms;
                let message = ProposerMessage::VoteRequest(request);
                out.push(ProposerAction::Send { to: peer, message });
            }
        }
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
        if granted {
            link.vote = Some(Log::new(&response.history, response.flush_lsn));
            // What the greeting said of its log may be older.
            if let Some(greeting) = &mut link.greeting {
                greeting.term = response.term;
                greeting.history = response.history.clone();
                greeting.flush_lsn = response.flush_lsn;
            }
        }
        match self.phase {
            Phase::Leading if response.term > term => self.depose(response.term, out),
            Phase::Leading if granted => self.elect(peer, now_ms, out),
            Phase::Voting { .. } if granted => self.count_votes(now_ms, out),
            // A higher term, or an equal one given to another (W5); or our configuration is too
            // old. This candidacy is lost: look again.
            _ if counting => self.pause(now_ms),
            _ => {}
        }
    }

    fn count_votes(&mut self, now_ms: u64, out: &mut Actions) {
        let votes: Vec<(PeerIdx, MemberId, &Log)> = self
            .member_links()
            .filter_map(|(peer, link)| {
                Some((peer, link.greeting.as_ref()?.member_id, link.vote.as_ref()?))
            })
            .collect();
        let won = self
            .configuration
            .has_quorum(|id| votes.iter().any(|(_, voter, _)| *voter == id));
        if !won {
            return;
        }
        let Some(&(donor, _, log)) = votes.iter().max_by_key(|(_, _, log)| log.rank()) else {
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

    /// Answer to [`ProposerAction::Compare`].
    pub fn on_compared(&mut self, outcome: Compared, now_ms: u64, out: &mut Actions) {
        let Phase::Comparing {
            claim,
            missing,
            donor,
        } = &self.phase
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
            Compared::Unavailable { reason } => self.wait(WaitReason::Donor(reason), now_ms, out),
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
        let entry = TermEntry {
            term: self.term,
            tli: self.local.tli,
            start_lsn: claim.start_lsn,
        };
        match claim.history.with(entry) {
            Ok(history) => {
                self.phase = Phase::Persisting {
                    history: history.clone(),
                };
                out.push(ProposerAction::PersistHistory(history));
            }
            // A local timeline below the log's: this server can't have written it.
            Err(invalid) => {
                self.wait(WaitReason::Membership(invalid.to_string()), now_ms, out);
            }
        }
    }

    /// Answer to [`ProposerAction::PersistHistory`]: the reign begins.
    pub fn on_history_persisted(&mut self, now_ms: u64, out: &mut Actions) {
        let Phase::Persisting { history } = &self.phase else {
            return;
        };
        self.history = history.clone();
        self.local.history = history.clone();
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
        if term > self.term {
            return self.depose(term, out);
        }
        if version > self.configuration.version {
            // Another proposer changed the members in a term below ours that we did not see.
            // Stand again, with that configuration.
            return self.pause(now_ms);
        }
        if self.is_member(greeting) && version < self.configuration.version {
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
        let speaks_for_member = self.member_links().any(|(member, _)| member == peer);
        if !speaks_for_member || link.stream.is_some() {
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
            timeline_files: self.local.timeline_files.clone(),
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

    fn on_append_response(
        &mut self,
        peer: PeerIdx,
        response: &AppendResponse,
        now_ms: u64,
        out: &mut Actions,
    ) {
        if !self.is_leading() {
            return;
        }
        if response.term > self.term {
            return self.depose(response.term, out);
        }
        if response.configuration_version > self.configuration.version {
            return self.pause(now_ms);
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
        self.acknowledge(id, incarnation, response.flush_lsn);
        self.advance_commit(out);
    }

    fn acknowledge(&mut self, id: MemberId, incarnation: Incarnation, flush_lsn: Lsn) {
        let entry = self.acknowledged.entry(id).or_insert(Acknowledged {
            incarnation,
            flush_lsn,
        });
        if entry.incarnation == incarnation {
            entry.flush_lsn = entry.flush_lsn.max(flush_lsn);
        } else {
            *entry = Acknowledged {
                incarnation,
                flush_lsn,
            };
        }
    }

    /// What a majority of all members has flushed in this term; one that has not taken this
    /// term's Elected counts as nothing. Only from the term's start on: older WAL on a majority
    /// may still lose to a log of a newer term that a minority holds (Raft §5.4.2).
    fn advance_commit(&mut self, out: &mut Actions) {
        let reached = self.configuration.quorum_lsn(|id| self.flushed(id));
        if reached >= self.term_start_lsn() && reached > self.commit_lsn {
            self.commit_lsn = reached;
            out.push(ProposerAction::Commit(reached));
        }
    }

    /// [`Lsn::INVALID`] for a member that has acknowledged nothing in this term, or whose
    /// acknowledgement came from another incarnation than the configuration names.
    fn flushed(&self, id: MemberId) -> Lsn {
        self.acknowledged
            .get(&id)
            .filter(|known| self.configuration.member(id, known.incarnation).is_some())
            .map_or(Lsn::INVALID, |known| known.flush_lsn)
    }

    /// The next Append for this peer, with WAL that is readable up to `wal_end`: WAL if there is
    /// some to send and the window is open, else a heartbeat if one is due or `commit_lsn` has
    /// moved, else nothing. It counts as sent: a host that can't deliver it must disconnect.
    ///
    /// A host that has no WAL at hand at [`Self::next_lsn`] passes that as `wal_end`.
    pub fn next_append(&mut self, peer: PeerIdx, wal_end: Lsn, now_ms: u64) -> Option<Append> {
        if !self.is_leading() {
            return None;
        }
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
            let end = next_tli.map_or(wal_end, |entry| entry.start_lsn.min(wal_end));
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
                Some((self.flushed(link.greeting.as_ref()?.member_id), peer))
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
            flush_lsn: match (member_id, link.stream) {
                (Some(id), Some(_)) => self.flushed(id),
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

    /// Connected members, one link for each id: two addresses may lead to one safekeeper, and it
    /// must not count twice nor lead itself astray.
    fn member_links(&self) -> impl Iterator<Item = (PeerIdx, &Link)> {
        let id_of = |link: &Option<Link>| {
            let greeting = link.as_ref()?.greeting.as_ref()?;
            self.is_member(greeting).then_some(greeting.member_id)
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

    fn member_peers(&self) -> Vec<PeerIdx> {
        self.member_links().map(|(peer, _)| peer).collect()
    }

    fn heartbeat_ms(&self) -> u64 {
        self.settings.member_timeout_ms / HEARTBEATS_PER_TIMEOUT
    }

    /// What every member has flushed; [`Lsn::INVALID`] while one is unheard in this term.
    fn truncate_lsn(&self) -> Lsn {
        let lowest = self
            .configuration
            .all_members()
            .map(|member| self.flushed(member.id))
            .min();
        lowest.unwrap_or(Lsn::INVALID).min(self.commit_lsn)
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
        self.phase = Phase::Deposed;
        out.push(ProposerAction::Deposed { term });
    }

    /// End a candidacy that may succeed at the next attempt.
    fn pause(&mut self, now_ms: u64) {
        let pause_ms = 50 + self.random() % (PAUSE_MS_MAX - 50);
        self.phase = Phase::Waiting {
            until_ms: now_ms + pause_ms,
            eager: false,
        };
    }

    fn wait(&mut self, reason: WaitReason, now_ms: u64, out: &mut Actions) {
        self.phase = Phase::Waiting {
            until_ms: now_ms + LOOK_AGAIN_MS,
            eager: true,
        };
        if self.wait_reason.as_ref() != Some(&reason) {
            self.wait_reason = Some(reason.clone());
            out.push(ProposerAction::Wait(reason));
        }
    }

    /// xorshift64*: good enough to part two rivals.
    fn random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 1
    }
}

impl Link {
    /// Silence on this connection means something: an answer is due, or will be by heartbeat.
    fn expects_answer(&self) -> bool {
        self.greeting_due || self.stream.is_some()
    }
}

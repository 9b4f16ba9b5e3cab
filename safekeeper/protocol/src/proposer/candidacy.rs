//! From greetings to a won term.
//!
//! Greetings show whether this log can lead, and whether somebody else does; they disturb nobody.
//! Then its bytes are compared with the best log that has greeted, since a server that was restored
//! or ran alone may hold other bytes under the same terms. Only then the term is raised. What the
//! votes show may differ from what the greetings showed; so everything is decided anew by them.

use super::*;
use crate::{Tli, majority};

/// What the greetings make of this proposer's chances.
enum Prospect {
    /// No quorum yet: write this first configuration.
    FirstUse(Configuration),
    /// No quorum yet, and it is not for a start to make one.
    NothingToRecover,
    /// Ask for votes.
    Stand,
    /// Compare bytes first.
    Compare(Look),
}

struct Look {
    donor: PeerIdx,
    /// In which the donor greeted.
    term: Term,
    stretch: Stretch,
}

/// Bytes that were or are to be compared: from `begin_lsn` to the end of this part of the donor's
/// log. Logs of the same history hold the same bytes, so one comparison counts for all of them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Stretch {
    pub(super) begin_lsn: Lsn,
    pub(super) log: Log,
}

/// On the way from the votes to a claim.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Settling {
    /// Still to be compared.
    pub(super) stretch: Option<Stretch>,
    /// Still to be completed from the donor.
    pub(super) missing: Option<(Lsn, Lsn)>,
    pub(super) claim: Claim,
    pub(super) donor: PeerIdx,
    /// The donor's log; a voter with the same one will do as well.
    pub(super) log: Log,
    /// The donor failed: asked again, or another one, then.
    pub(super) retry_ms: Option<u64>,
}

impl Proposer {
    pub(super) fn on_greeting(
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
            Phase::Leading | Phase::Promoting(_) => self.welcome(peer, now_ms, out),
            Phase::Greeting { .. } | Phase::Waiting { eager: true, .. } => {
                self.evaluate(now_ms, out);
            }
            Phase::Confirming { .. } => self.confirm(now_ms, out),
            Phase::Settling(_) if self.speaks_for_member(peer) && greeting.term > self.term => {
                self.pause(now_ms);
            }
            // Late, but its vote may be the one that is missing.
            Phase::Voting { .. } => self.ask_for_vote(peer, now_ms, out),
            _ => {}
        }
    }

    /// Do the greetings show that this proposer may stand for election?
    pub(super) fn evaluate(&mut self, now_ms: u64, out: &mut Actions) {
        match self.look_before_the_leap() {
            Ok(Prospect::FirstUse(configuration)) => self.configure_all(configuration, now_ms, out),
            Ok(Prospect::NothingToRecover) => {
                self.end_reign(Phase::Refused);
                out.push(ProposerAction::NothingToRecover);
            }
            Ok(Prospect::Stand) => self.ask_for_votes(now_ms, out),
            Ok(Prospect::Compare(look)) => self.look(look, now_ms, out),
            // Too few so far; more may be on their way.
            Err(WaitReason::NoQuorum { .. } | WaitReason::FirstUse { .. }) if matches!(self.phase, Phase::Greeting { deadline_ms } if now_ms < deadline_ms) =>
                {}
            Err(reason) => self.wait(reason, now_ms, out),
        }
    }

    fn look_before_the_leap(&mut self) -> Result<Prospect, WaitReason> {
        self.adopt_configuration()?;
        if self.configuration.is_none() || self.configuration.is_provisional() {
            return match self.standing {
                Standing::Running => self.first_configuration().map(Prospect::FirstUse),
                Standing::BeforeRecovery | Standing::Standby => self.no_quorum_yet(),
            };
        }
        if !self.configuration.has_quorum(|member| self.hears(member)) {
            let (greeted, needed) = self
                .configuration
                .short_of_quorum(|member| self.hears(member));
            return Err(WaitReason::NoQuorum { greeted, needed });
        }
        let greetings = self
            .member_links()
            .filter_map(|(peer, link)| Some((peer, link.greeting.as_ref()?)));
        let logs: Vec<(PeerIdx, Term, Log)> = greetings
            .map(|(peer, g)| (peer, g.term, Log::new(&g.history, g.flush_lsn)))
            .collect();
        let best = logs.iter().map(|(_, _, log)| log.rank()).max();
        let donors: Vec<&(PeerIdx, Term, Log)> = logs
            .iter()
            .filter(|(_, _, log)| Some(log.rank()) == best)
            .collect();
        // Another one each time: the first may be one that can't be read from.
        let Some((donor, term, log)) = donors.get(self.n_looks % donors.len().max(1)) else {
            return Ok(Prospect::Stand);
        };
        let claim = match self.decide(log) {
            Verdict::Lead(claim) | Verdict::Complete { claim, .. } => claim,
            Verdict::Refuse(divergence) => return Err(WaitReason::Diverged(divergence)),
        };
        // A promotion means to depose.
        if let Some(term) = self.rival().filter(|_| self.standing != Standing::Standby) {
            return Err(WaitReason::Rival { term });
        }
        self.next_term()
            .and_then(|term| self.new_history(&claim, term))?;
        Ok(match self.to_compare(&claim, log) {
            None => Prospect::Stand,
            Some(stretch) => Prospect::Compare(Look {
                donor: *donor,
                term: *term,
                stretch,
            }),
        })
    }

    /// The first configuration is written by a server that runs: every listed safekeeper must be
    /// there for it, and to recover only a majority of them.
    fn no_quorum_yet(&self) -> Result<Prospect, WaitReason> {
        let greeted = self.links.iter().flatten();
        let greeted = greeted.filter(|link| link.greeting.is_some()).count();
        let needed = majority(self.links.len());
        if greeted < needed {
            return Err(WaitReason::NoQuorum { greeted, needed });
        }
        // A standby came from somewhere: those who know of it have not answered yet, and to end its
        // recovery because some spare safekeepers were faster would fork it.
        if self.standing == Standing::Standby {
            let reason = "no safekeeper that has answered belongs to a quorum";
            return Err(WaitReason::Membership(reason.to_string()));
        }
        Ok(Prospect::NothingToRecover)
    }

    /// What of the local log has not been found equal to the donor's yet.
    fn to_compare(&self, claim: &Claim, donor: &Log) -> Option<Stretch> {
        let (begin_lsn, end_lsn) = claim.compare?;
        let log = Log::new(&donor.history, end_lsn);
        let stretch = Stretch { begin_lsn, log };
        (self.compared.as_ref() != Some(&stretch)).then_some(stretch)
    }

    /// A server whose bytes are others must find out without raising the term: it would end the
    /// reign of whoever rightly leads, at every start (a copy that was restored to an earlier
    /// point, for one). The donor answers as long as it stands in the term it has greeted with.
    fn look(&mut self, look: Look, now_ms: u64, out: &mut Actions) {
        self.n_looks = self.n_looks.wrapping_add(1);
        out.push(ProposerAction::Compare {
            donor: look.donor,
            term: look.term,
            begin_lsn: look.stretch.begin_lsn,
            end_lsn: look.stretch.log.end_lsn,
        });
        self.phase = Phase::Looking {
            stretch: look.stretch,
            since_ms: now_ms,
        };
    }

    fn on_looked(
        &mut self,
        stretch: Stretch,
        since_ms: u64,
        outcome: Compared,
        now_ms: u64,
        out: &mut Actions,
    ) {
        match outcome {
            Compared::Equal => {
                self.compared = Some(stretch);
                if now_ms < since_ms + LOOK_AGAIN_MS {
                    self.ask_for_votes(now_ms, out);
                } else {
                    self.greet_anew(now_ms, out);
                }
            }
            // The donor may have been cut between its greeting and the read, in the same term. It
            // greets again, and if it still claims that log, the difference is one.
            Compared::Differs { at } if self.differed.as_ref() == Some(&stretch) => {
                self.refuse(WaitReason::BytesDiffer { at }, now_ms, out);
            }
            Compared::Differs { .. } => {
                self.differed = Some(stretch);
                self.greet_anew(now_ms, out);
            }
            Compared::Unavailable { reason } => self.wait(WaitReason::Donor(reason), now_ms, out),
        }
    }

    /// A member that has greeted us on a connection that is open.
    pub(super) fn hears(&self, member: &Member) -> bool {
        self.member_links().any(|(_, link)| link.is_of(member))
    }

    /// The highest term, if another proposer may be alive: a member of that term has heard it
    /// within member_timeout, or those that have heard none are no quorum. A minority of an older
    /// term may go on hearing a proposer that can't commit any more; it keeps nobody from leading.
    pub(super) fn rival(&self) -> Option<Term> {
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
    pub(super) fn next_term(&self) -> Result<Term, WaitReason> {
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
    pub(super) fn new_history(&self, claim: &Claim, term: Term) -> Result<TermHistory, WaitReason> {
        let newest = self.newest_tli().max(claim.history.newest_tli());
        let tli = match self.standing {
            Standing::Standby => self.new_timeline(newest)?,
            _ => self.local.tli,
        };
        // A server that was promoted by hand has begun its timeline without asking anybody.
        let by_hand = self.local.unled_from.is_some();
        let is_known =
            self.local.history.contains_tli(tli) || !by_hand && claim.history.contains_tli(tli);
        if tli <= newest && !is_known {
            return Err(WaitReason::Timeline(format!(
                "timeline {tli}, which this server has begun, was taken before by a promotion that \
                 was given up; the newest one is {newest}"
            )));
        }
        let entry = TermEntry {
            term,
            tli,
            start_lsn: claim.start_lsn,
        };
        let history = claim.history.succeeded_by(entry);
        let history = history.map_err(|invalid| WaitReason::Membership(invalid.to_string()))?;
        Ok(history.with_newest_tli(newest))
    }

    /// Of all reigns that we or a member ever heard of. A promotion goes on only when a majority
    /// has taken its Elected, and then its timeline is among those that any later majority tells.
    fn newest_tli(&self) -> Tli {
        let greetings = self
            .member_links()
            .filter_map(|(_, link)| link.greeting.as_ref());
        let told = greetings.map(|greeting| greeting.history.newest_tli());
        let own = self.local.history.newest_tli();
        told.max().unwrap_or_default().max(own)
    }

    /// Above every timeline known to the quorum and to the server that is promoted (W3).
    fn new_timeline(&self, newest: Tli) -> Result<Tli, WaitReason> {
        let files = self.local.timeline_files.iter().map(|file| file.tli);
        let highest = files.chain([newest, self.local.tli]).max();
        let none_left = || WaitReason::Timeline("no timeline is left after the last".to_string());
        highest.and_then(Tli::next).ok_or_else(none_left)
    }

    pub(super) fn ask_for_votes(&mut self, now_ms: u64, out: &mut Actions) {
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

    pub(super) fn ask_for_vote(&mut self, peer: PeerIdx, now_ms: u64, out: &mut Actions) {
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
        // It would refuse; and a refusal for that reason is not the end of this candidacy.
        let later = |greeting: &AcceptorGreeting| {
            greeting.configuration.version > request.configuration_version
        };
        if link.greeting.as_ref().is_some_and(later) {
            return;
        }
        link.vote_asked = true;
        link.last_sent_ms = now_ms;
        let message = ProposerMessage::VoteRequest(request);
        out.push(ProposerAction::Send { to: peer, message });
    }

    pub(super) fn on_vote_response(
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
            Phase::Leading | Phase::Promoting(_) => self.welcome(peer, now_ms, out),
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

    pub(super) fn count_votes(&mut self, now_ms: u64, out: &mut Actions) {
        let votes = self.votes();
        let voted = |member: &Member| {
            votes.iter().any(|(peer, _)| {
                self.links[peer.0]
                    .as_ref()
                    .is_some_and(|link| link.is_of(member))
            })
        };
        let deciding = match &self.configuration {
            joint if is_on(Mutation::VotesOfOneSet) => &Configuration {
                new_members: None,
                ..joint.clone()
            },
            configuration => configuration,
        };
        if !deciding.has_quorum(voted) {
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
        let log = log.clone();
        self.phase = Phase::Settling(Settling {
            stretch: self.to_compare(&claim, &log),
            claim,
            missing,
            log,
            donor,
            retry_ms: None,
        });
        self.settle(now_ms, out);
    }

    /// By what the donor is chosen: the term of the log's last byte, then its end.
    pub(super) fn rank(&self, peer: PeerIdx, log: &Log) -> (Term, Lsn) {
        let greeting = self.links[peer.0]
            .as_ref()
            .and_then(|link| link.greeting.as_ref());
        match greeting {
            Some(greeting) if is_on(Mutation::DonorRankedByTerm) => (greeting.term, log.end_lsn),
            _ => log.rank(),
        }
    }

    pub(super) fn votes(&self) -> Vec<(PeerIdx, &Log)> {
        self.member_links()
            .filter_map(|(peer, link)| Some((peer, link.vote.as_ref()?)))
            .collect()
    }

    /// The next step from the votes to the claim: compare, then complete, then claim.
    fn settle(&mut self, now_ms: u64, out: &mut Actions) {
        let Phase::Settling(settling) = &mut self.phase else {
            return;
        };
        settling.retry_ms = None;
        let (donor, term) = (settling.donor, self.term);
        if let Some(stretch) = &settling.stretch {
            out.push(ProposerAction::Compare {
                donor,
                term,
                begin_lsn: stretch.begin_lsn,
                end_lsn: stretch.log.end_lsn,
            });
        } else if let Some((begin_lsn, end_lsn)) = settling.missing {
            out.push(ProposerAction::Complete {
                donor,
                term,
                begin_lsn,
                end_lsn,
            });
        } else {
            let claim = settling.claim.clone();
            self.local.end_lsn = self.local.end_lsn.max(claim.start_lsn);
            self.claim(claim, now_ms, out);
        }
    }

    /// Answer to [`ProposerAction::Compare`].
    pub fn on_compared(&mut self, outcome: Compared, now_ms: u64, out: &mut Actions) {
        if let Phase::Looking { stretch, since_ms } = &self.phase {
            let (stretch, since_ms) = (stretch.clone(), *since_ms);
            return self.on_looked(stretch, since_ms, outcome, now_ms, out);
        }
        let Phase::Settling(settling) = &mut self.phase else {
            return;
        };
        if settling.stretch.is_none() {
            return;
        }
        match outcome {
            Compared::Equal => {
                self.compared = settling.stretch.take();
                self.settle(now_ms, out);
            }
            // Our bytes will not change: asking for votes again would raise the term every second
            // and end the reign of whoever rightly leads.
            Compared::Differs { at } => self.refuse(WaitReason::BytesDiffer { at }, now_ms, out),
            Compared::Unavailable { reason } => self.try_another_donor(reason, now_ms, out),
        }
    }

    /// Answer to [`ProposerAction::Complete`].
    pub fn on_completed(&mut self, outcome: Completed, now_ms: u64, out: &mut Actions) {
        let Phase::Settling(settling) = &mut self.phase else {
            return;
        };
        let (None, Some((begin_lsn, end_lsn))) = (&settling.stretch, &mut settling.missing) else {
            return;
        };
        match outcome {
            Completed::Whole => {
                settling.missing = None;
                self.settle(now_ms, out);
            }
            Completed::Partly {
                end_lsn: reached,
                reason,
            } => {
                // What has been appended is our own WAL, and stays.
                *begin_lsn = reached.clamp(*begin_lsn, *end_lsn);
                self.local.end_lsn = *begin_lsn;
                self.try_another_donor(reason, now_ms, out);
            }
        }
    }

    /// The term is won, and a new one would help nobody; unless another proposer has won a higher
    /// one by now, which a greeting tells.
    fn try_another_donor(&mut self, reason: String, now_ms: u64, out: &mut Actions) {
        if let Phase::Settling(settling) = &mut self.phase {
            settling.retry_ms = Some(now_ms + LOOK_AGAIN_MS);
        }
        self.tell(WaitReason::Donor(reason), out);
        for peer in self.peer_indexes() {
            self.greet(peer, now_ms, out);
        }
    }

    /// The same donor again, or the next voter that holds the same log; without one, all anew.
    pub(super) fn settle_again(&mut self, now_ms: u64, out: &mut Actions) {
        let Phase::Settling(settling) = &self.phase else {
            return;
        };
        let equals: Vec<PeerIdx> = self
            .votes()
            .iter()
            .filter(|(_, log)| **log == settling.log)
            .map(|(peer, _)| *peer)
            .collect();
        let next = equals.iter().find(|&peer| *peer > settling.donor);
        let Some(&next) = next.or(equals.first()) else {
            return self.pause(now_ms);
        };
        if let Phase::Settling(settling) = &mut self.phase {
            settling.donor = next;
        }
        self.settle(now_ms, out);
    }

    /// The history goes to the local disk before a byte is pushed under it.
    fn claim(&mut self, claim: Claim, now_ms: u64, out: &mut Actions) {
        match self.new_history(&claim, self.term) {
            Ok(history) if self.standing == Standing::Standby => {
                self.history = history;
                self.bring_majority(now_ms, out);
            }
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

    /// Answer to [`ProposerAction::PersistHistory`].
    pub fn on_history_persisted(&mut self, now_ms: u64, out: &mut Actions) {
        match &self.phase {
            Phase::Persisting { history } => self.history = history.clone(),
            Phase::Promoting(Promotion::Persisting) => return self.promote(out),
            _ => return,
        }
        self.remember_history();
        if self.standing == Standing::BeforeRecovery {
            self.phase = Phase::Confirming {
                deadline_ms: now_ms + self.settings.member_timeout_ms,
            };
            self.greet_all(now_ms, out);
        } else {
            self.lead(now_ms, out);
        }
    }

    /// What the local history file says by now.
    pub(super) fn remember_history(&mut self) {
        self.local.history = self.history.clone();
        self.local.configuration = self.configuration.clone();
        self.local.unled_from = None;
    }

    /// Completing may have taken long, and a server that starts in a term that is dead by then
    /// writes WAL that it can only throw away (W6). So a majority is asked once more.
    fn confirm(&mut self, now_ms: u64, out: &mut Actions) {
        if self.member_links().any(|(_, link)| link.term > self.term) {
            return self.pause(now_ms);
        }
        if self.configuration.has_quorum(|member| self.hears(member)) {
            self.lead(now_ms, out);
        }
    }

    /// The reign begins.
    pub(super) fn lead(&mut self, now_ms: u64, out: &mut Actions) {
        self.phase = Phase::Leading;
        self.wait_reason = None;
        out.push(ProposerAction::Lead {
            term: self.term,
            start_lsn: self.term_start_lsn(),
        });
        self.finish_change_of_others(now_ms, out);
        for peer in self.peer_indexes() {
            self.welcome(peer, now_ms, out);
        }
    }

    pub(super) fn decide(&self, donor: &Log) -> Verdict {
        decide(
            &self.local,
            self.standing,
            donor,
            self.settings.cluster.segment_size,
        )
    }
}

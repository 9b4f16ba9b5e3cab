//! From greetings to a won term.
//!
//! Greetings show whether this log can lead, and whether somebody else does; they disturb nobody.
//! Then its bytes are compared with the best log that has greeted, since a server that was restored
//! or ran alone may hold other bytes under the same terms. Only then the term is raised. What the
//! votes show may differ from what the greetings showed; so everything is decided anew by them.

use super::*;

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
    pub(super) fn evaluate(&mut self, now_ms: u64, out: &mut Actions) {
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
    pub(super) fn look_before_the_leap(&mut self) -> Result<Option<Configuration>, WaitReason> {
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
        let entry = TermEntry {
            term,
            tli: self.local.tli,
            start_lsn: claim.start_lsn,
        };
        let history = claim.history.succeeded_by(entry);
        history.map_err(|invalid| WaitReason::Membership(invalid.to_string()))
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

    pub(super) fn count_votes(&mut self, now_ms: u64, out: &mut Actions) {
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
    pub(super) fn compare_again(&mut self, now_ms: u64, out: &mut Actions) {
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

    pub(super) fn complete_or_claim(
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
    pub(super) fn claim(&mut self, claim: Claim, now_ms: u64, out: &mut Actions) {
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

    pub(super) fn decide(&self, donor: &Log) -> Verdict {
        decide(
            &self.local,
            self.standing,
            donor,
            self.settings.cluster.segment_size,
        )
    }
}

//! What others may know of a proposer.

use super::*;

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

impl Proposer {
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
            Phase::Looking { .. } => "comparing",
            Phase::Voting { .. } => "voting",
            Phase::Settling(Settling {
                stretch: Some(_), ..
            }) => "comparing",
            Phase::Settling(_) => "completing",
            Phase::Persisting { .. } => "persisting",
            Phase::Confirming { .. } => "confirming",
            Phase::Promoting(_) => "promoting",
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
                if !self.configuration.is_none()
                    && !greeting.configuration.is_none()
                    && greeting.configuration.lineage != self.configuration.lineage =>
            {
                "of another quorum"
            }
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
            | Phase::Confirming { deadline_ms }
            | Phase::Looking {
                since_ms: deadline_ms,
                ..
            }
            | Phase::Waiting {
                until_ms: deadline_ms,
                ..
            }
            | Phase::Settling(Settling {
                retry_ms: Some(deadline_ms),
                ..
            }) => *deadline_ms = 0,
            Phase::Settling(_)
            | Phase::Persisting { .. }
            | Phase::Promoting(_)
            | Phase::Leading
            | Phase::Refused
            | Phase::Deposed => {}
        }
        for link in self.links.iter_mut().flatten() {
            (link.last_heard_ms, link.last_sent_ms) = (0, 0);
            link.commit_lsn = Lsn::INVALID;
        }
        self.wait_reason = None;
        self.n_looks = 0;
        self.random = 1;
    }
}

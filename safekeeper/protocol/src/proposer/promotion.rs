//! A standby becomes the primary, step by step, each the condition of the next (design §7.3).
//!
//! ```text
//!   Completing   a majority follows this term up to its start   the old primary is fenced since
//!                                                               the votes; nothing is shown early
//!   Replaying    the standby has replayed just up to there      a position reached before may have
//!                                                               held other bytes (S9)
//!   Persisting   the new history is on its disk                 so that its WAL is led from the
//!                                                               first byte on the new timeline
//!   Promoting    Postgres ends recovery                         and must have switched just there
//!   Leading
//! ```
//!
//! The term begins where the donor's log ended, on a timeline above every one that was known, so
//! the history of the reign is settled before Postgres has written its timeline history file. The
//! file follows in a second Elected of the same term, ahead of the first byte on the new timeline.
//!
//! A promotion that dies leaves an empty reign. The next candidate, the old primary included, finds
//! every log as it was.

use super::*;
use crate::Tli;

/// The step that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Promotion {
    Completing,
    Replaying,
    Persisting,
    Promoting,
}

impl Proposer {
    /// Won: bring a majority to the start of the term. What members lack is a donor's to give,
    /// since a standby holds committed WAL only.
    pub(super) fn bring_majority(&mut self, now_ms: u64, out: &mut Actions) {
        self.phase = Phase::Promoting(Promotion::Completing);
        self.wait_reason = None;
        for peer in self.peer_indexes() {
            self.welcome(peer, now_ms, out);
        }
        if is_on(Mutation::PromotedBeforeCompletion) {
            self.replay(out);
        }
    }

    /// The log is committed up to the term's start, in this term: then it is the one to replay.
    pub(super) fn replay_if_complete(&mut self, out: &mut Actions) {
        let completing = self.phase == Phase::Promoting(Promotion::Completing);
        if completing && self.commit_lsn >= self.term_start_lsn() {
            self.replay(out);
        }
    }

    fn replay(&mut self, out: &mut Actions) {
        self.phase = Phase::Promoting(Promotion::Replaying);
        out.push(ProposerAction::Replay {
            end_lsn: self.term_start_lsn(),
        });
    }

    /// Answer to [`ProposerAction::Replay`]: all of it, and nothing beyond, has been replayed.
    pub fn on_replayed(&mut self, out: &mut Actions) {
        if self.phase != Phase::Promoting(Promotion::Replaying) {
            return;
        }
        self.phase = Phase::Promoting(Promotion::Persisting);
        out.push(ProposerAction::PersistHistory {
            history: self.history.clone(),
            configuration: self.configuration.clone(),
        });
    }

    pub(super) fn promote(&mut self, out: &mut Actions) {
        self.remember_history();
        self.phase = Phase::Promoting(Promotion::Promoting);
        out.push(ProposerAction::Promote {
            tli: self.history.last().map_or(Tli(0), |last| last.tli),
            switch_lsn: self.term_start_lsn(),
        });
    }

    /// Answer to [`ProposerAction::Promote`]: the server is on timeline `tli`, which begins at
    /// `switch_lsn`; `timeline_files` are its history files, newest first.
    pub fn on_promoted(
        &mut self,
        tli: Tli,
        switch_lsn: Lsn,
        timeline_files: Vec<TimelineFile>,
        now_ms: u64,
        out: &mut Actions,
    ) {
        if self.phase != Phase::Promoting(Promotion::Promoting) {
            return;
        }
        let expected = self.history.last().map(|last| (last.tli, last.start_lsn));
        if expected != Some((tli, switch_lsn)) {
            let (tli_wanted, lsn_wanted) = expected.unwrap_or_default();
            let reason = WaitReason::Timeline(format!(
                "the server was promoted to timeline {tli} at {switch_lsn}, while the quorum was \
                 prepared for timeline {tli_wanted} at {lsn_wanted}: what was committed in between \
                 was lost sight of"
            ));
            return self.refuse(reason, now_ms, out);
        }
        self.local.tli = tli;
        self.local.timeline_files = timeline_files;
        self.standing = Standing::Running;
        self.repeat_elected(out);
        self.lead(now_ms, out);
    }

    /// Brings the longer timeline history to those that follow already. It cuts nothing.
    fn repeat_elected(&self, out: &mut Actions) {
        for (to, link) in self.member_links() {
            if let Some(stream) = link.stream {
                let message = ProposerMessage::Elected(self.elected_from(stream.start_lsn));
                out.push(ProposerAction::Send { to, message });
            }
        }
    }
}

//! Carries out the proposer's actions, in the order given.
//!
//! The order is a promise (`action.rs` in safekeeper-protocol): what follows `PersistHistory` does
//! not happen before the history is on stable storage. An action that fails ends the worker.

use std::time::Duration;

use pgrx::PgSqlErrorCode;
use safekeeper_protocol::{Compared, Lsn, PeerIdx, ProposerAction, Term};
use safekeeper_wal::canonical_end;

use super::{Pusher, thread_panicked};
use crate::compare::{Comparison, ComparisonEvent, Stretch};
use crate::donor::DonorRequest;
use crate::local_log::store_local_history;
use crate::{postgres, shmem, wal_sender_slot};

/// Most of the commits of a busy server are followed by more WAL within this time.
const NEWS_MS: u64 = 2;

impl Pusher {
    pub(super) fn carry_out(&mut self) {
        while !self.actions.is_empty() {
            let spare = std::mem::take(&mut self.spare_actions);
            let mut actions = std::mem::replace(&mut self.actions, spare);
            for action in actions.drain(..) {
                self.carry_out_one(action);
            }
            self.spare_actions = actions;
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
            ProposerAction::Replay { end_lsn } => self.begin_replay(end_lsn),
            ProposerAction::Promote { tli, switch_lsn } => self.begin_switch(tli, switch_lsn),
            // Only a proposer that stands before recovery may ask for them.
            ProposerAction::NothingToRecover | ProposerAction::Complete { .. } => postgres::error(
                PgSqlErrorCode::ERRCODE_INTERNAL_ERROR,
                "unexpected request to recover WAL",
                "",
            ),
            ProposerAction::PersistHistory {
                history,
                configuration,
            } => {
                self.local.history = history;
                self.local.configuration = configuration;
                self.local.unled_from = None;
                store_local_history(&self.local);
                self.proposer
                    .on_history_persisted(now_ms, &mut self.actions);
            }
            // A promoted standby's worker will lead in this term; the last sender goes on in one that
            // began long ago.
            ProposerAction::Lead { .. } if self.wal_sender.is_none() => {}
            ProposerAction::Lead { term, start_lsn } => {
                self.logged_wait.clear();
                self.on_elected_again();
                self.status.elected_at = postgres::timestamp();
                postgres::log(format!(
                    "elected in term {term}, which begins at {start_lsn}"
                ));
                // Whatever sessions could see by now was recovered, and lies below.
                // Behind a page that is full there is a header's worth that nobody has inserted yet.
                let end_lsn = canonical_end(postgres::insert_lsn(), self.format.segment_size);
                postgres::flush_wal(end_lsn);
                if shmem::set_gate(end_lsn) {
                    postgres::log(format!(
                        "sessions are held until the WAL up to {end_lsn} is on the quorum"
                    ));
                }
            }
            ProposerAction::Commit(commit_lsn) => self.commit(commit_lsn),
            ProposerAction::Wait(reason) => {
                self.look_for_a_successor(&reason);
                let reason = reason.to_string();
                if self.logged_wait != reason {
                    postgres::log(format!("not elected: {reason}"));
                    self.logged_wait = reason;
                }
            }
            ProposerAction::Deposed { term } => self.on_deposed(term),
        }
    }

    fn commit(&mut self, commit_lsn: Lsn) {
        // On a standby nobody waits, and positions are not of what this server writes.
        if self.standby_end_lsn.is_some() {
            return;
        }
        let now = self.started.elapsed();
        self.lag.acknowledged(commit_lsn, now);
        if let Some(time) = self.lag.last() {
            let situation = self.situation();
            self.early_push.answered(time, &situation);
        }
        self.wal_moved = true;
        // Backends look here when their wait ends: so this comes first.
        shmem::set_commit_lsn(commit_lsn);
        self.positions.commit_lsn = commit_lsn;
        self.news_due_ms = match wal_sender_slot::somebody_waits_for_replay() {
            true => 0,
            false => self.now_ms() + NEWS_MS,
        };
        self.release_commits(now);
        if shmem::open_gate_at(commit_lsn) {
            postgres::log("the recovered WAL is on the quorum: sessions are let in");
        }
    }

    /// A member has answered: its standbys may have replayed what a commit waits for.
    pub(super) fn on_feedback(&mut self, now: Duration) {
        if self.wal_sender.is_some() && self.lowest_apply_lsn() > self.positions.apply_lsn {
            self.release_commits(now);
        }
    }

    /// Has members asked how far their standbys are, if a commit waits for that and no answer is due anyway.
    pub(super) fn ask_for_replay(&mut self) {
        let it = self.situation();
        let apply_lsn = self.lowest_apply_lsn();
        // Whoever is still committing begins to wait any moment, or has just ceased to.
        let may_wait = self.wal_sender.is_some()
            && it.commit_lsn >= it.sent_lsn
            && apply_lsn.is_valid()
            && apply_lsn < it.commit_lsn
            && (it.hint.committing > 0 || wal_sender_slot::somebody_waits_for_replay());
        let is_due = self.replay_wait.is_due(may_wait, apply_lsn, it.now);
        if is_due && wal_sender_slot::somebody_waits_for_replay() {
            self.proposer.ask_for_feedback();
        }
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
        if let Some(wal_sender) = &self.wal_sender {
            wal_sender.advance(&self.positions);
        }
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
    pub(super) fn follow_reign(&mut self) {
        let Some(wal_sender) = &self.wal_sender else {
            return;
        };
        let is_leading = self.proposer.is_leading();
        if is_leading && !self.is_streaming {
            wal_sender.begin_streaming();
        } else if !is_leading && self.is_streaming {
            wal_sender.stop_streaming();
        }
        self.is_streaming = is_leading;
    }

    fn begin_comparison(&mut self, stretch: Stretch) {
        let end_lsn = stretch.end_lsn;
        if self.standby_end_lsn.is_none() && postgres::flushed_lsn() < end_lsn {
            postgres::flush_wal(end_lsn);
        }
        let begun = Comparison::begin(stretch, &self.local_wal.files, self.waker.clone(), |part| {
            self.donor_request(part.donor, part.term, part.begin_lsn, part.end_lsn)
        });
        match begun {
            Ok(comparison) => self.comparison = Some(comparison),
            Err(outcome) => self.end_comparison(outcome),
        }
    }

    pub(super) fn poll_comparison(&mut self) {
        let Some(comparison) = &self.comparison else {
            return;
        };
        let stretch = comparison.stretch;
        match comparison.poll(&mut self.local_wal.files) {
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

    pub(super) fn donor_request(
        &self,
        donor: PeerIdx,
        term: Term,
        begin: Lsn,
        end: Lsn,
    ) -> DonorRequest {
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

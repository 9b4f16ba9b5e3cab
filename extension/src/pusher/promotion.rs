//! What only a standby's pusher does: the steps of a promotion that Postgres has a part in.
//!
//! The proposer asks for them one at a time (`protocol/src/proposer/promotion.rs`); the promoter
//! looks what is to be done, and how far it is.
//!
//! ```text
//!   Replay   recovery has come to just where the quorum's log ends, over the quorum's bytes
//!   Switch   recovery has ended, on the timeline that the quorum was told of
//! ```
//!
//! A position is not a proof. A standby that streams from anybody but the safekeepers may reach the
//! right number over other bytes (S9), and may hold more WAL than it has replayed, which the end of
//! recovery would replay too. So what has come since the promotion was asked for is compared once
//! more, in the won term, and `pg_wal` is looked through for WAL behind the end.

use safekeeper_protocol::election::COMPARE_LEN_MAX;
use safekeeper_protocol::{Compared, Lsn, Member, PeerIdx, Tli, WonTerm};
use safekeeper_wal::{SegmentFiles, WalDecoder, canonical_end, find_end_with};

use super::{Pusher, thread_panicked};
use crate::compare::{Comparison, ComparisonEvent, Stretch};
use crate::local_log::load_timelines;
use crate::postgres;
use crate::wal_source::WalSource;

/// What the proposer waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromotionStep {
    Replay { end_lsn: Lsn },
    Switch { tli: Tli, switch_lsn: Lsn },
}

/// How far recovery is with [`PromotionStep::Replay`].
#[derive(Debug, PartialEq, Eq)]
pub enum Replayed {
    /// Not yet; how far it is.
    Waiting(String),
    Whole,
    /// This standby holds what the quorum does not.
    Wrong(String),
}

/// The comparison of what has been replayed since the promotion was asked for.
#[derive(Default)]
pub(super) struct LastLook {
    running: Option<(Comparison, WalSource)>,
    /// Another donor each time.
    attempts: usize,
    due_ms: u64,
    /// Replay was seen to be here, and all up to here to be the quorum's.
    equal_up_to: Option<Lsn>,
}

/// After a donor has failed.
const LOOK_AGAIN_MS: u64 = 1000;

impl Pusher {
    pub(super) fn begin_replay(&mut self, end_lsn: Lsn) {
        self.promotion_step = Some(PromotionStep::Replay { end_lsn });
        postgres::log(format!(
            "promotion: a majority follows term {} up to {end_lsn}; replaying up to there",
            self.proposer.term()
        ));
    }

    pub(super) fn begin_switch(&mut self, tli: Tli, switch_lsn: Lsn) {
        self.promotion_step = Some(PromotionStep::Switch { tli, switch_lsn });
    }

    pub fn promotion_step(&self) -> Option<PromotionStep> {
        self.promotion_step
    }

    /// Looks how far recovery is.
    pub fn replayed(&mut self, end_lsn: Lsn) -> Replayed {
        let replayed = canonical_end(postgres::replayed().lsn, self.format.segment_size);
        if replayed > end_lsn {
            return Replayed::Wrong(format!(
                "it has replayed WAL up to {replayed}, and the quorum's log ends at {end_lsn}"
            ));
        }
        if replayed < end_lsn {
            let paused = match postgres::replay_is_paused() {
                true => ", and replay is paused",
                false => "",
            };
            return Replayed::Waiting(format!(
                "it has replayed WAL up to {replayed} of {end_lsn}{paused}"
            ));
        }
        match self.look_once_more(end_lsn) {
            Some(Compared::Equal) => self.still_whole(end_lsn),
            Some(Compared::Differs { at }) => Replayed::Wrong(format!(
                "the WAL it has replayed differs from the quorum's at {at}"
            )),
            Some(Compared::Unavailable { reason }) => Replayed::Waiting(format!(
                "what it has replayed could not be compared with the quorum's: {reason}"
            )),
            None => Replayed::Waiting("what it has replayed is being compared".to_owned()),
        }
    }

    /// It was whole, and may be no more: a standby that streams from a primary gets whatever that
    /// writes. And the quorum that was won may be another's by now (W6).
    pub fn still_whole(&self, end_lsn: Lsn) -> Replayed {
        if let Some(reason) = self.is_beyond(end_lsn) {
            return Replayed::Wrong(reason);
        }
        if !self.hears_a_quorum() {
            return Replayed::Waiting("no quorum answers any more".to_owned());
        }
        self.look_beyond(end_lsn)
    }

    /// Says how far, if more has come than the quorum has.
    pub fn is_beyond(&self, end_lsn: Lsn) -> Option<String> {
        let positions = [postgres::replayed().lsn, postgres::received().lsn];
        let canonical = positions.map(|lsn| canonical_end(lsn, self.format.segment_size));
        let furthest = canonical.into_iter().max().filter(|&lsn| lsn > end_lsn)?;
        Some(format!(
            "it has received WAL up to {furthest}, and the quorum's log ends at {end_lsn}"
        ))
    }

    /// A majority follows, and has said so a moment ago: nobody else can have been elected unless he
    /// meant to depose us.
    pub fn hears_a_quorum(&self) -> bool {
        let recent_ms = self.now_ms().saturating_sub(self.member_timeout_ms / 2);
        let follows = |member: &Member| {
            (0..self.members.len()).map(PeerIdx).any(|peer| {
                let status = self.proposer.peer_status(peer);
                status.member_id == Some(member.id)
                    && self.proposer.next_lsn(peer).is_some()
                    && status.last_heard_ms >= recent_ms
            })
        };
        self.proposer.configuration().has_quorum(follows)
    }

    /// The outcome, when there is one. What can't be compared is tried again after a pause.
    fn look_once_more(&mut self, end_lsn: Lsn) -> Option<Compared> {
        if self.last_look.equal_up_to == Some(end_lsn) {
            return Some(Compared::Equal);
        }
        let is_due = self.now_ms() >= self.last_look.due_ms;
        let outcome = match &mut self.last_look.running {
            None if !is_due => return None,
            None => self.begin_last_look(end_lsn).err()?,
            Some((comparison, source)) => match comparison.poll(source) {
                ComparisonEvent::Nothing => return None,
                ComparisonEvent::Ended(outcome) => outcome,
                ComparisonEvent::Removed { oldest_lsn } => Compared::Unavailable {
                    reason: format!("the donor keeps WAL from {oldest_lsn} on only"),
                },
                ComparisonEvent::Panicked(text) => thread_panicked(&text),
            },
        };
        self.last_look.running = None;
        self.last_look.due_ms = self.now_ms() + LOOK_AGAIN_MS;
        self.last_look.equal_up_to = (outcome == Compared::Equal).then_some(end_lsn);
        Some(outcome)
    }

    fn begin_last_look(&mut self, end_lsn: Lsn) -> Result<(), Compared> {
        let begin_lsn = self.standby_end_lsn.unwrap_or(Lsn::INVALID);
        let begin_lsn = begin_lsn.max(Lsn(end_lsn.0.saturating_sub(COMPARE_LEN_MAX)));
        if begin_lsn >= end_lsn {
            return Err(Compared::Equal);
        }
        let pg_wal = self.data_dir.join("pg_wal");
        let (timelines, _) = load_timelines(&pg_wal, postgres::replayed().tli);
        let last_removed = postgres::last_removed_segno;
        let source = WalSource::new(pg_wal, self.format, timelines, end_lsn, last_removed);
        let donors = self.proposer.donors_for(Lsn(end_lsn.0 - 1));
        let Some(&donor) = donors.get(self.last_look.attempts % donors.len().max(1)) else {
            let reason = "no safekeeper is connected that has it".to_owned();
            return Err(Compared::Unavailable { reason });
        };
        self.last_look.attempts += 1;
        let stretch = Stretch {
            donor,
            term: self.proposer.term(),
            begin_lsn,
            end_lsn,
        };
        let comparison = Comparison::begin(stretch, &source, self.waker.clone(), |part| {
            self.donor_request(part.donor, part.term, part.begin_lsn, part.end_lsn)
        })?;
        self.last_look.running = Some((comparison, source));
        Ok(())
    }

    /// Is there WAL behind the end, which recovery would go on with when it is told to end?
    fn look_beyond(&self, end_lsn: Lsn) -> Replayed {
        let size = self.format.segment_size;
        let pg_wal = self.data_dir.join("pg_wal");
        let (timelines, _) = load_timelines(&pg_wal, postgres::replayed().tli);
        let last_byte = Lsn(end_lsn.0.saturating_sub(1));
        let mut decoder = WalDecoder::new(self.format, last_byte.segment_start(size.bytes()));
        decoder.expect_timelines(timelines.clone());
        decoder.allow_stale_switch_padding();
        let mut files = SegmentFiles::new(&pg_wal, timelines, size);
        match find_end_with(decoder, |lsn, buffer| files.read(lsn, buffer), |_| {}) {
            Ok(found) if found.end > end_lsn => Replayed::Wrong(format!(
                "its pg_wal holds WAL up to {}, and the quorum's log ends at {end_lsn}",
                found.end
            )),
            Ok(_) => Replayed::Whole,
            Err(error) => Replayed::Waiting(error.to_string()),
        }
    }

    /// Answer to [`PromotionStep::Replay`].
    pub fn on_replayed(&mut self) {
        self.promotion_step = None;
        self.proposer.on_replayed(&mut self.actions);
        self.carry_out();
    }

    /// Answer to [`PromotionStep::Switch`]: recovery has ended. The term, for the worker; or why it
    /// can't have it.
    pub fn on_promoted(&mut self) -> Result<WonTerm, String> {
        self.promotion_step = None;
        let tli = postgres::insertion_tli();
        let (timelines, files) = load_timelines(&self.data_dir.join("pg_wal"), tli);
        let begin = timelines.begin(tli).unwrap_or(Lsn::INVALID);
        let switch_lsn = canonical_end(begin, self.format.segment_size);
        let now_ms = self.now_ms();
        self.proposer
            .on_promoted(Tli(tli), switch_lsn, files, now_ms, &mut self.actions);
        self.carry_out();
        let why = || "the reign was lost meanwhile".to_owned();
        self.proposer
            .hand_over()
            .ok_or_else(|| self.wait_reason().unwrap_or_else(why))
    }

    /// Why the proposer waits, if it does.
    pub fn wait_reason(&self) -> Option<String> {
        let deposed = self.deposed.clone();
        deposed.or_else(|| self.proposer.wait_reason().map(ToString::to_string))
    }

    /// Final: nothing that may happen would let this standby be promoted in this attempt.
    pub fn is_hopeless(&self) -> bool {
        matches!(self.proposer.state_name(), "refused" | "deposed")
    }

    /// The timeline that the won term has taken, if one was won.
    pub fn claimed_tli(&self) -> Option<Tli> {
        self.proposer.history().last().map(|reign| reign.tli)
    }
}

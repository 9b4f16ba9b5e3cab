//! Which log may lead: the rules of design §4.4 as one pure function.
//!
//! A candidate holds votes of a majority. The *donor* is the log with the highest
//! `(last_log_term, end)` among them; it holds everything that may be committed. The candidate has
//! a log of its own, on Postgres's disk, and Postgres will go on writing at its end. So the
//! question is not which log wins (the donor's does) but whether this server's own log can
//! continue it:
//!
//! ```text
//!   a  local rank >= donor's                     lead from the local end
//!   b  the donor's bytes are a prefix of ours    lead from the donor's end; our tail is proposed again
//!   c  ours are a prefix of the donor's, and     before recovery only: complete the local log
//!      what we lack is our own WAL               from the donor, then lead from the donor's end
//!   d  anything else                             refuse
//! ```
//!
//! In (a) the local log may be shorter in bytes: a newer term of our own outranks a dead run's
//! longer tail, and completing from that tail would label its bytes with a term they were not
//! written in (S2). (b) and (c) exist because of empty reigns: a promotion that was given up must
//! not lock out the server whose log is byte for byte the committed one (L1).
//!
//! WAL written without a term ("unled": by the override, or after a promotion by hand) confers no
//! rank. Such a log counts only up to where the unled part begins, and leads only if the donor
//! ends at or before that point and agrees below it (S4, S5). A server that was promoted by hand
//! has no history at all, since that of a standby is void: it leads only if the donor ends just
//! where it was promoted.
//!
//! A standby's log is never ranked. It holds what the quorum has told, if nobody else wrote to it:
//! so it must be a prefix of the donor's, by position and by bytes (S8).

use alloc::vec::Vec;
use core::fmt;

use crate::mutation::{Mutation, is_on};
use crate::{Configuration, Log, Lsn, TermHistory, TimelineFile, Tli, common_end};

/// The proposer's own log, as Postgres's data directory holds it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LocalLog {
    /// From the local history file; empty if there is none, and then the log counts as one of
    /// term 0. May run ahead of `end_lsn`: a crash can take the log's tail, not the file's.
    pub history: TermHistory,
    /// Timeline on which Postgres writes, or will write.
    pub tli: Tli,
    /// A record end in its canonical form: the decoded and fsynced end before the server runs,
    /// the insert position while it runs. Not the flush position: what was pushed had been
    /// inserted, and a healthy primary would lock itself out (L3).
    pub end_lsn: Lsn,
    /// Where WAL begins that was written without a term.
    pub unled_from: Option<Lsn>,
    /// Postgres's history files of `tli` and its ancestors, newest first.
    pub timeline_files: Vec<TimelineFile>,
    /// The configuration in the local history file; none before the first reign. A quorum of
    /// another lineage is not ours.
    pub configuration: Configuration,
}

/// What the server can still do about its log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// In the postmaster, before crash recovery: WAL may yet be appended to `pg_wal`.
    BeforeRecovery,
    /// A standby that is to be promoted: it receives what it lacks like any other, and writes
    /// nothing yet.
    Standby,
    /// The server writes; its log is what it is.
    Running,
}

/// How a candidate with a majority's votes goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Lead(Claim),
    /// Append `missing` from the donor to the local log and fsync it; then the claim holds.
    Complete {
        missing: (Lsn, Lsn),
        claim: Claim,
    },
    Refuse(Divergence),
}

/// The reign that would begin: `history` plus an entry of the new term at `start_lsn`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Claim {
    pub history: TermHistory,
    pub start_lsn: Lsn,
    /// The last stretch that both logs hold under the same terms, at most
    /// [`COMPARE_LEN_MAX`] bytes, to be compared byte by byte before the claim is made.
    pub compare: Option<(Lsn, Lsn)>,
}

/// Bytes of the common log that are compared with the donor's before a reign begins. It finds the
/// server that ran for a while without the extension and wrote other bytes at the same positions,
/// which no term tells. One segment of the default size: read in some 20 ms.
pub const COMPARE_LEN_MAX: u64 = 16 * 1024 * 1024;

/// Both logs of a refusal, for the operator.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Divergence {
    pub local: Log,
    pub unled_from: Option<Lsn>,
    pub donor: Log,
    /// Last common point; `None` if the logs share nothing.
    pub common: Option<Lsn>,
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "local log {}", self.local)?;
        if let Some(unled_from) = self.unled_from {
            write!(f, " (written without a term from {unled_from} on)")?;
        }
        write!(f, " cannot continue the quorum's log {}", self.donor)?;
        match self.common {
            Some(common) => write!(f, "; they agree up to {common}"),
            None => f.write_str("; they share nothing"),
        }
    }
}

/// Decide between the local log and the donor's. `segment_size` is in bytes.
pub fn decide(local: &LocalLog, standing: Standing, donor: &Log, segment_size: u32) -> Verdict {
    if standing == Standing::Standby {
        return decide_for_standby(local, donor, segment_size);
    }
    let end_lsn = local
        .unled_from
        .map_or(local.end_lsn, |unled| unled.min(local.end_lsn));
    let ours = Log::new(&local.history, end_lsn);
    let common = common_end(&ours, donor);
    let claim = |history: &TermHistory, start_lsn| Claim {
        history: history.clone(),
        start_lsn,
        compare: stretch(&ours, common, segment_size),
    };

    let donor_is_prefix = donor.end_lsn <= ours.end_lsn && donor.is_prefix_of(&ours);
    if donor.is_empty() && ours.is_empty() {
        // First use: the log begins with the segment that holds the local end.
        return Verdict::Lead(claim(
            &ours.history,
            local.end_lsn.segment_start(segment_size),
        ));
    }
    let outranks = ours.rank() >= donor.rank();
    if outranks && (local.unled_from.is_none() || donor_is_prefix) {
        if is_on(Mutation::LocalHistoryNotClipped) {
            return Verdict::Lead(claim(&local.history, ours.end_lsn));
        }
        return Verdict::Lead(claim(&ours.history, ours.end_lsn));
    }
    if donor_is_prefix {
        return Verdict::Lead(claim(&donor.history, donor.end_lsn));
    }
    let may_complete = standing == Standing::BeforeRecovery
        && local.unled_from.is_none()
        && ours.end_lsn < donor.end_lsn
        && ours.is_prefix_of(donor)
        && donor
            .runs()
            .filter(|run| run.end > ours.end_lsn)
            .all(|run| local.history.contains_term(run.term));
    if may_complete {
        let claim = claim(&donor.history, donor.end_lsn);
        return Verdict::Complete {
            missing: (ours.end_lsn, donor.end_lsn),
            claim,
        };
    }
    let promoted_by_hand = local.history.is_empty() && local.unled_from == Some(donor.end_lsn);
    if promoted_by_hand && !donor.is_empty() {
        return Verdict::Lead(Claim {
            history: donor.history.clone(),
            start_lsn: donor.end_lsn,
            compare: stretch(donor, Some(donor.end_lsn), segment_size),
        });
    }
    refuse(local, donor, common)
}

/// Histories say nothing here, only positions and bytes.
fn decide_for_standby(local: &LocalLog, donor: &Log, segment_size: u32) -> Verdict {
    // Below the log's begin everything is on the timeline that the log began on, or older ones.
    let tli = donor.history.tli_at(local.end_lsn);
    let tli = tli.or(donor.history.first().map(|first| first.tli));
    if local.end_lsn > donor.end_lsn || tli < Some(local.tli) {
        return refuse(local, donor, None);
    }
    Verdict::Lead(Claim {
        history: donor.history.clone(),
        start_lsn: donor.end_lsn,
        compare: stretch(donor, Some(local.end_lsn), segment_size),
    })
}

fn refuse(local: &LocalLog, donor: &Log, common: Option<Lsn>) -> Verdict {
    Verdict::Refuse(Divergence {
        local: Log::new(&local.history, local.end_lsn),
        unled_from: local.unled_from,
        donor: donor.clone(),
        common,
    })
}

/// The bytes to compare: the last ones below the common point, not reaching below the begin of
/// `log`. They begin with a segment, where a reader of WAL finds its feet, unless segments are so
/// large that this could double the work.
fn stretch(log: &Log, common: Option<Lsn>, segment_size: u32) -> Option<(Lsn, Lsn)> {
    let (end, log_begin) = (common?, log.runs().next()?.begin);
    let mut begin = Lsn(end.0.saturating_sub(COMPARE_LEN_MAX));
    if u64::from(segment_size) <= COMPARE_LEN_MAX {
        begin = begin.segment_start(segment_size);
    }
    let begin = begin.max(log_begin);
    (begin < end).then_some((begin, end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Term, TermEntry};

    const SEGMENT: u32 = 1 << 20;

    fn history(text: &str) -> TermHistory {
        let entries = text.split_whitespace().map(|word| {
            let (term, start) = word.split_once('@').expect("term@start");
            TermEntry {
                term: Term(term.parse().expect("a number")),
                tli: Tli(1),
                start_lsn: Lsn(start.parse().expect("a number")),
            }
        });
        TermHistory::new(entries.collect()).expect("a history")
    }

    fn local(text: &str, end: u64) -> LocalLog {
        LocalLog {
            history: history(text),
            tli: Tli(1),
            end_lsn: Lsn(end),
            unled_from: None,
            timeline_files: Vec::new(),
            configuration: Configuration::default(),
        }
    }

    fn donor(text: &str, end: u64) -> Log {
        Log::new(&history(text), Lsn(end))
    }

    /// `a` and `b` lead (with start and history), `c` completes, `d` refuses.
    fn verdict(local: &LocalLog, standing: Standing, donor: &Log) -> std::string::String {
        use std::format;
        match decide(local, standing, donor, SEGMENT) {
            Verdict::Lead(claim) => format!("lead {} after {}", claim.start_lsn.0, claim.history),
            Verdict::Complete { missing, claim } => {
                format!(
                    "complete {}..{} after {}",
                    missing.0.0, missing.1.0, claim.history
                )
            }
            Verdict::Refuse(_) => "refuse".into(),
        }
    }

    #[test]
    fn every_row_of_the_rules() {
        use Standing::{BeforeRecovery as Before, Running};
        for (name, ours, our_end, standing, theirs, their_end, want) in [
            (
                "first use",
                "",
                3_000_000,
                Running,
                "",
                0,
                "lead 2097152 after (none)",
            ),
            (
                "history written, nothing delivered",
                "1@10",
                50,
                Running,
                "",
                0,
                "lead 50 after 1@0/A",
            ),
            (
                "a: equal",
                "1@10",
                50,
                Running,
                "1@10",
                50,
                "lead 50 after 1@0/A",
            ),
            (
                "a: longer",
                "1@10",
                60,
                Running,
                "1@10",
                50,
                "lead 60 after 1@0/A",
            ),
            (
                "a: newer own term, shorter in bytes (S2)",
                "1@10 2@30",
                30,
                Before,
                "1@10",
                50,
                "lead 30 after 1@0/A 2@0/1E",
            ),
            (
                "b: a promotion that was given up (L1)",
                "1@10",
                60,
                Running,
                "1@10 2@50",
                50,
                "lead 50 after 1@0/A 2@0/32",
            ),
            (
                "b: two of them",
                "1@10",
                50,
                Before,
                "1@10 2@50 3@50",
                50,
                "lead 50 after 1@0/A 2@0/32 3@0/32",
            ),
            (
                "b: elected, no bytes, history lost",
                "",
                50,
                Running,
                "1@10",
                10,
                "lead 10 after 1@0/A",
            ),
            (
                "c: own tail lost",
                "1@10",
                40,
                Before,
                "1@10",
                50,
                "complete 40..50 after 1@0/A",
            ),
            (
                "c: own second term lost, history clipped (S3)",
                "1@10 2@45",
                40,
                Before,
                "1@10 2@45",
                50,
                "complete 40..50 after 1@0/A 2@0/2D",
            ),
            (
                "d: quorum ahead of a running server",
                "1@10",
                40,
                Running,
                "1@10",
                50,
                "refuse",
            ),
            (
                "d: another's reign left WAL",
                "1@10",
                40,
                Before,
                "1@10 2@45",
                50,
                "refuse",
            ),
            ("d: diverged", "1@10", 60, Before, "1@10 2@45", 50, "refuse"),
            (
                "d: no history, quorum has WAL",
                "",
                60,
                Running,
                "1@10",
                50,
                "refuse",
            ),
            (
                "d: other beginnings",
                "1@10",
                60,
                Running,
                "2@20",
                50,
                "refuse",
            ),
        ] {
            let got = verdict(&local(ours, our_end), standing, &donor(theirs, their_end));
            assert_eq!(got, want, "{name}");
        }
    }

    #[test]
    fn unled_wal_confers_no_rank() {
        use Standing::{BeforeRecovery as Before, Running};
        for (name, our_end, unled, standing, theirs, their_end, want) in [
            (
                "quorum ends below",
                90,
                50,
                Running,
                "1@10",
                40,
                "lead 50 after 1@0/A",
            ),
            (
                "quorum ends just there",
                90,
                50,
                Running,
                "1@10",
                50,
                "lead 50 after 1@0/A",
            ),
            ("quorum went on", 90, 50, Running, "1@10", 60, "refuse"),
            (
                "quorum went on, before recovery",
                90,
                50,
                Before,
                "1@10",
                60,
                "refuse",
            ),
            (
                "quorum had another reign",
                90,
                50,
                Running,
                "1@10 2@40",
                45,
                "refuse",
            ),
            (
                "an empty one",
                90,
                50,
                Running,
                "1@10 2@40",
                40,
                "lead 40 after 1@0/A 2@0/28",
            ),
        ] {
            let ours = LocalLog {
                unled_from: Some(Lsn(unled)),
                ..local("1@10", our_end)
            };
            assert_eq!(
                verdict(&ours, standing, &donor(theirs, their_end)),
                want,
                "{name}"
            );
        }
    }

    #[test]
    fn compares_the_last_common_stretch_and_no_dead_tail() {
        let compare = |ours: &str, our_end, theirs: &str, their_end| match decide(
            &local(ours, our_end),
            Standing::Running,
            &donor(theirs, their_end),
            SEGMENT,
        ) {
            Verdict::Lead(claim) => claim.compare.map(|(begin, end)| (begin.0, end.0)),
            other => panic!("{other:?}"),
        };
        assert_eq!(compare("1@10", 60, "1@10", 50), Some((10, 50)));
        // Beyond 30 the donor holds a dead run's bytes, which differ rightly.
        assert_eq!(compare("1@10 2@30", 60, "1@10", 50), Some((10, 30)));
        assert_eq!(compare("", 60, "", 0), None);
        let long = 10 * u64::from(SEGMENT) + COMPARE_LEN_MAX + 5;
        let begin = 10 * u64::from(SEGMENT);
        assert_eq!(compare("1@10", long, "1@10", long), Some((begin, long)));
    }
}

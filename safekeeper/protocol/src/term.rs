//! `Term` and `TermHistory`: which proposer's reign each byte of WAL belongs to.
//!
//! WAL carries no term of its own. Beside every log lies a history that says where each reign
//! began, and a byte belongs to the last entry that starts at or before it:
//!
//! ```text
//!   history   (1, tli 1, 0/1000000)   (3, tli 1, 0/1400000)   (4, tli 1, 0/1400000)
//!   log       |------- term 1 -------||------------- term 4 -------------|
//! ```
//!
//! Term 3 of the picture is an *empty reign*: won, and given up before a byte was written. Since
//! it owns no byte, comparing two histories byte by byte passes over it without a special case.
//!
//! The rule everything rests on (Raft §5.3, log matching): a term has one proposer, and a proposer
//! has one log. So if two logs hold a byte at the same position under the same term, they hold the
//! same bytes everywhere below it. [`common_end`] is that rule as a function.

use alloc::vec::Vec;
use core::fmt;

use crate::Lsn;

/// Number of a proposer's reign. Grows by elections only; 0 is "before the first reign".
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Term(pub u64);

impl Term {
    pub const NONE: Term = Term(0);

    /// The term a candidate asks for after having seen this one, or `None` at the end of numbers,
    /// which only damaged or hostile state can bring near.
    pub fn next(self) -> Option<Term> {
        self.0.checked_add(1).map(Term)
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A Postgres timeline number. 0 is not a timeline.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tli(pub u32);

impl Tli {
    /// `None` after the last one.
    pub fn next(self) -> Option<Tli> {
        self.0.checked_add(1).map(Tli)
    }
}

impl fmt::Display for Tli {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Tli {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Where a reign begins in the log, and on which timeline it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TermEntry {
    pub term: Term,
    pub tli: Tli,
    pub start_lsn: Lsn,
}

/// The reigns of one log, oldest first: terms grow strictly, start positions and timelines never
/// fall. Every constructor keeps to that, so whoever holds a `TermHistory` may rely on it.
///
/// It also remembers the newest timeline of all reigns that ever were, those included that have
/// left it since they owned no byte. A promotion picks a number above: two timelines of one number
/// could not be told apart, least of all by `pg_rewind`, which takes them for one (W3).
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct TermHistory {
    entries: Vec<TermEntry>,
    newest_tli: Tli,
}

/// Entries that are no history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InvalidHistory {
    /// Terms that do not grow, positions or timelines that fall.
    Backwards {
        earlier: TermEntry,
        later: TermEntry,
    },
    /// More than [`TermHistory::LEN_MAX`].
    TooLong { len: usize },
}

impl fmt::Display for InvalidHistory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InvalidHistory::Backwards { earlier, later } => write!(
                f,
                "term history goes backwards: term {} on timeline {} from {} is followed by term {} on timeline {} from {}",
                earlier.term,
                earlier.tli,
                earlier.start_lsn,
                later.term,
                later.tli,
                later.start_lsn
            ),
            InvalidHistory::TooLong { len } => {
                write!(
                    f,
                    "term history of {len} entries, at most {} are supported",
                    TermHistory::LEN_MAX
                )
            }
        }
    }
}

impl core::error::Error for InvalidHistory {}

impl TermHistory {
    /// At most this many entries travel or are stored: 4096 reigns of 20 bytes. Elections happen
    /// at restarts and failovers, and empty reigns are dropped by the next; once a day, that is
    /// eleven years.
    pub const LEN_MAX: usize = 4096;

    pub fn new(entries: Vec<TermEntry>) -> Result<TermHistory, InvalidHistory> {
        if entries.len() > TermHistory::LEN_MAX {
            return Err(InvalidHistory::TooLong { len: entries.len() });
        }
        for pair in entries.windows(2) {
            let (earlier, later) = (pair[0], pair[1]);
            if later.term <= earlier.term
                || later.start_lsn < earlier.start_lsn
                || later.tli < earlier.tli
            {
                return Err(InvalidHistory::Backwards { earlier, later });
            }
        }
        let newest_tli = entries.last().map_or(Tli(0), |last| last.tli);
        Ok(TermHistory {
            entries,
            newest_tli,
        })
    }

    /// This history, with the memory of another: no timeline up to `tli` is new.
    pub fn with_newest_tli(mut self, tli: Tli) -> TermHistory {
        self.newest_tli = self.newest_tli.max(tli);
        self
    }

    /// Highest timeline of any reign that ever was; `Tli(0)` if there was none.
    pub fn newest_tli(&self) -> Tli {
        self.newest_tli
    }

    pub fn entries(&self) -> &[TermEntry] {
        &self.entries
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn first(&self) -> Option<TermEntry> {
        self.entries.first().copied()
    }

    pub fn last(&self) -> Option<TermEntry> {
        self.entries.last().copied()
    }

    /// Term of the last entry that starts at or before `end_lsn`, the log's end. It counts even if
    /// the reign owns no byte yet: who has taken its Elected stands in it. [`Term::NONE`] if the
    /// log is older than the history.
    pub fn last_log_term(&self, end_lsn: Lsn) -> Term {
        self.entries
            .iter()
            .rev()
            .find(|entry| entry.start_lsn <= end_lsn)
            .map_or(Term::NONE, |entry| entry.term)
    }

    /// The entries of a log that ends at `end_lsn`. A history can run ahead of its log when a
    /// crash took the log's tail; what it says of bytes that are gone must not outlive them (S3).
    /// For comparing logs: it remembers no timelines but its own.
    pub fn clipped_to(&self, end_lsn: Lsn) -> TermHistory {
        let keep = self
            .entries
            .partition_point(|entry| entry.start_lsn <= end_lsn);
        let entries = self.entries[..keep].to_vec();
        TermHistory {
            newest_tli: entries.last().map_or(Tli(0), |last| last.tli),
            entries,
        }
    }

    /// This history with one more reign at its end, and without those that end up owning no byte:
    /// given-up promotions and restarts of an idle server would pile up, and a timeline that died
    /// with its empty reign must not stand above the one that goes on (L1).
    pub fn succeeded_by(&self, entry: TermEntry) -> Result<TermHistory, InvalidHistory> {
        let mut entries = self.entries.clone();
        entries.push(entry);
        let starts: Vec<Lsn> = entries.iter().skip(1).map(|next| next.start_lsn).collect();
        let mut next_start = starts.into_iter();
        entries.retain(|entry| next_start.next().is_none_or(|next| entry.start_lsn < next));
        Ok(TermHistory::new(entries)?.with_newest_tli(self.newest_tli))
    }

    /// Timeline on which the byte at `lsn` was written, or `None` below the first entry.
    pub fn tli_at(&self, lsn: Lsn) -> Option<Tli> {
        self.entries
            .iter()
            .rev()
            .find(|entry| entry.start_lsn <= lsn)
            .map(|entry| entry.tli)
    }

    pub fn contains_tli(&self, tli: Tli) -> bool {
        self.entries.iter().any(|entry| entry.tli == tli)
    }

    pub fn contains_term(&self, term: Term) -> bool {
        self.entries
            .binary_search_by_key(&term, |entry| entry.term)
            .is_ok()
    }

    /// The stretches of WAL that a log ending at `end_lsn` holds, each with its term: empty
    /// reigns left out, the last one ending with the log.
    pub fn runs(&self, end_lsn: Lsn) -> impl Iterator<Item = Run> + '_ {
        self.entries
            .iter()
            .enumerate()
            .filter_map(move |(i, entry)| {
                let next_start = self
                    .entries
                    .get(i + 1)
                    .map_or(end_lsn, |next| next.start_lsn);
                let run = Run {
                    term: entry.term,
                    begin: entry.start_lsn,
                    end: next_start.min(end_lsn),
                };
                (run.begin < run.end).then_some(run)
            })
    }
}

impl fmt::Debug for TermHistory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `1@0/1000000 4@0/1400000`, with the timeline after the term where it is not 1: `5/2@0/1500000`.
impl fmt::Display for TermHistory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.entries.is_empty() {
            return f.write_str("(none)");
        }
        for (i, entry) in self.entries.iter().enumerate() {
            if i > 0 {
                f.write_str(" ")?;
            }
            write!(f, "{}", entry.term)?;
            if entry.tli != Tli(1) {
                write!(f, "/{}", entry.tli)?;
            }
            write!(f, "@{}", entry.start_lsn)?;
        }
        if self
            .entries
            .last()
            .is_some_and(|last| last.tli < self.newest_tli)
        {
            write!(f, " (timeline {} was)", self.newest_tli)?;
        }
        Ok(())
    }
}

/// WAL of one term, `begin..end`, never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub term: Term,
    pub begin: Lsn,
    pub end: Lsn,
}

/// A log as elections compare it: its history, clipped to its end, and that end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Log {
    pub history: TermHistory,
    pub end_lsn: Lsn,
}

impl Log {
    pub fn new(history: &TermHistory, end_lsn: Lsn) -> Log {
        Log {
            history: history.clipped_to(end_lsn),
            end_lsn,
        }
    }

    /// `(last_log_term, end)`: what logs are ranked by, and never by anything before it.
    pub fn rank(&self) -> (Term, Lsn) {
        (self.history.last_log_term(self.end_lsn), self.end_lsn)
    }

    /// No reign has written or been recorded here.
    pub fn is_empty(&self) -> bool {
        self.history.is_empty()
    }

    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.history.runs(self.end_lsn)
    }

    /// Every byte of this log is in `other` too, under the same term.
    pub fn is_prefix_of(&self, other: &Log) -> bool {
        self.runs().next().is_none() || common_end(self, other) == Some(self.end_lsn)
    }
}

impl fmt::Display for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ending at {}", self.history, self.end_lsn)
    }
}

/// The last common point of two logs: the position up to which they hold the same bytes under the
/// same terms. `None` if they share nothing, which includes that one of them holds no bytes.
///
/// Logs of one cluster begin at the same place; two that do not have nothing that could be
/// compared.
pub fn common_end(one: &Log, other: &Log) -> Option<Lsn> {
    let mut common = None;
    for (a, b) in one.runs().zip(other.runs()) {
        if a.term != b.term || a.begin != b.begin {
            break;
        }
        common = Some(a.end.min(b.end));
        if a.end != b.end {
            break;
        }
    }
    common
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use alloc::vec;

    /// `"1@10 3@20"`: terms and start positions, all on timeline 1.
    fn history(text: &str) -> TermHistory {
        let entries = text
            .split_whitespace()
            .map(|word| {
                let (term, start) = word.split_once('@').expect("term@start");
                TermEntry {
                    term: Term(term.parse().expect("a number")),
                    tli: Tli(1),
                    start_lsn: Lsn(start.parse().expect("a number")),
                }
            })
            .collect();
        TermHistory::new(entries).expect("a history")
    }

    fn log(text: &str, end: u64) -> Log {
        Log::new(&history(text), Lsn(end))
    }

    #[test]
    fn a_history_only_goes_forward() {
        let entry = |term, tli, start| TermEntry {
            term: Term(term),
            tli: Tli(tli),
            start_lsn: Lsn(start),
        };
        for (earlier, later) in [
            (entry(2, 1, 10), entry(2, 1, 20)),
            (entry(2, 1, 10), entry(1, 1, 20)),
            (entry(2, 1, 10), entry(3, 1, 9)),
            (entry(2, 2, 10), entry(3, 1, 20)),
        ] {
            let refused = TermHistory::new(vec![earlier, later]);
            assert_eq!(refused, Err(InvalidHistory::Backwards { earlier, later }));
        }
        assert!(TermHistory::new(vec![entry(2, 1, 10), entry(3, 1, 10)]).is_ok());
    }

    #[test]
    fn last_log_term_is_that_of_the_last_reign_begun_at_or_before_the_end() {
        let h = history("1@10 3@20 4@20");
        for (end, term) in [(9, 0), (10, 1), (19, 1), (20, 4), (99, 4)] {
            assert_eq!(h.last_log_term(Lsn(end)), Term(term), "end {end}");
        }
        assert_eq!(TermHistory::default().last_log_term(Lsn(5)), Term::NONE);
    }

    #[test]
    fn clipping_forgets_reigns_beyond_the_end() {
        let h = history("1@10 3@20 4@30");
        assert_eq!(h.clipped_to(Lsn(30)), h);
        assert_eq!(h.clipped_to(Lsn(29)), history("1@10 3@20"));
        assert_eq!(h.clipped_to(Lsn(9)), TermHistory::default());
    }

    #[test]
    fn a_new_reign_takes_the_place_of_empty_ones() {
        let entry = |term, tli, start| TermEntry {
            term: Term(term),
            tli: Tli(tli),
            start_lsn: Lsn(start),
        };
        let given_up = TermHistory::new(vec![entry(1, 1, 10), entry(2, 2, 30)]).expect("a history");
        let succeeded = given_up
            .succeeded_by(entry(3, 1, 30))
            .map(|h| h.to_string());
        assert_eq!(succeeded, Ok("1@0/A 3@0/1E (timeline 2 was)".to_string()));
        let first = history("1@10")
            .succeeded_by(entry(2, 1, 10))
            .map(|h| h.to_string());
        assert_eq!(first, Ok("2@0/A".to_string()));
        assert!(
            given_up.succeeded_by(entry(3, 1, 40)).is_err(),
            "timeline 2 owns bytes by now"
        );
        let full = (1..=TermHistory::LEN_MAX as u64)
            .map(|n| entry(n, 1, n))
            .collect();
        let full = TermHistory::new(full).expect("just not too long");
        let len = TermHistory::LEN_MAX + 1;
        assert_eq!(
            full.succeeded_by(entry(9999, 1, 9999)),
            Err(InvalidHistory::TooLong { len })
        );
    }

    #[test]
    fn common_end_by_cases() {
        // (one, its end, other, its end, common end)
        for (a, a_end, b, b_end, want) in [
            ("", 0, "", 0, None),
            ("1@10", 50, "", 0, None),
            ("1@10", 10, "1@10", 50, None),
            ("1@10", 50, "1@10", 50, Some(50)),
            ("1@10", 50, "1@10", 40, Some(40)),
            ("1@10 2@30", 50, "1@10 2@30", 40, Some(40)),
            // The second log went on in term 1 where the first began term 2.
            ("1@10 2@30", 50, "1@10", 40, Some(30)),
            ("1@10 2@30", 50, "1@10 3@30", 40, Some(30)),
            ("1@10 2@30", 50, "1@10 2@20", 40, Some(20)),
            // Same last term, but the one before differs in length: impossible by log matching,
            // and yet no more than the stretch that agrees may be called common.
            ("1@10 3@30", 50, "1@10 3@40", 60, Some(30)),
            ("1@10", 50, "2@10", 50, None),
            // Empty reigns own no byte.
            ("1@10 2@30 3@30", 50, "1@10 3@30", 50, Some(50)),
            ("1@10 2@30", 30, "1@10", 30, Some(30)),
            ("1@10 2@30", 30, "1@10 3@30", 45, Some(30)),
            ("5@10 7@10", 20, "7@10", 30, Some(20)),
            // Other beginnings: nothing to compare.
            ("1@10", 50, "1@20", 50, None),
        ] {
            let (one, other) = (log(a, a_end), log(b, b_end));
            assert_eq!(common_end(&one, &other), want.map(Lsn), "{one} | {other}");
            assert_eq!(common_end(&other, &one), want.map(Lsn), "{other} | {one}");
        }
    }

    #[test]
    fn a_prefix_needs_equal_terms_not_only_fewer_bytes() {
        for (a, a_end, b, b_end, want) in [
            ("", 0, "1@10", 50, true),
            ("1@10", 10, "2@10", 50, true),
            ("1@10", 40, "1@10", 50, true),
            ("1@10", 50, "1@10", 40, false),
            ("1@10 2@40", 40, "1@10", 50, true),
            ("1@10 2@30", 40, "1@10", 50, false),
            ("2@10", 40, "1@10", 50, false),
        ] {
            let (one, other) = (log(a, a_end), log(b, b_end));
            assert_eq!(one.is_prefix_of(&other), want, "{one} | {other}");
        }
    }

    #[test]
    fn ranks_by_term_before_length() {
        assert!(log("1@10 2@20", 20).rank() > log("1@10", 99).rank());
        assert!(log("1@10", 99).rank() > log("1@10", 98).rank());
        assert!(log("", 99).rank() < log("1@10", 10).rank());
    }

    #[test]
    fn prints_briefly() {
        assert_eq!(
            history("1@16777216 4@16777300").to_string(),
            "1@0/1000000 4@0/1000054"
        );
        assert_eq!(TermHistory::default().to_string(), "(none)");
    }
}

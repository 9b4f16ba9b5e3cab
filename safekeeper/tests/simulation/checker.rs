//! The judge: is told what happens, and ends the run when a promise is broken.
//!
//! It sees what nobody in the cluster can see at once: every byte ever written in a term, every
//! reign, everything committed, and what is on the platters. Each function is one invariant of
//! ARCHITECTURE.md, under its name, and is the only one that fails by that name.
//!
//! Two things are remembered. `terms`: the WAL of each term, from the first who sent or held it;
//! whoever else holds bytes of that term must hold the same. `committed`: the WAL that a proposer
//! called committed, which every later reign must begin with.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Bound;

use safekeeper_protocol::{Lsn, Run, Term, TermHistory, Tli};
use safekeeper_wal::TimelineHistory;

use super::SEGMENT_SIZE;
use super::disk::Holds;

/// Something happened that an invariant speaks of.
pub enum Event<'a> {
    /// A proposer's reign begins; `log` is all its local WAL up to `start_lsn`.
    Led {
        proposer: u64,
        term: Term,
        base: Lsn,
        log: &'a [u8],
    },
    /// A proposer calls its WAL committed up to `base + log.len()`.
    Committed {
        proposer: u64,
        history: &'a TermHistory,
        before: Lsn,
        base: Lsn,
        log: &'a [u8],
    },
    /// A reign writes WAL on this timeline, which came from this promotion.
    WroteOn { tli: Tli, promotion: u64 },
    /// Somebody sends or holds these bytes of a log with this history.
    Holds {
        whose: &'a str,
        history: &'a TermHistory,
        begin: Lsn,
        bytes: &'a [u8],
    },
    /// A safekeeper acknowledges these bytes; how its disk holds them.
    Acknowledged {
        node: u64,
        begin: Lsn,
        end: Lsn,
        holds: Holds,
    },
    /// A safekeeper answers a message that changes its control file.
    Promised {
        node: u64,
        term: Term,
        persisted: Option<Term>,
        durable: bool,
    },
    /// A safekeeper process tells commit_lsn, and what it told before.
    Published {
        node: u64,
        before: Lsn,
        commit_lsn: Lsn,
        /// The newest timeline it shows, and the one its log began on.
        tli: Tli,
        root: Tli,
    },
    /// A consumer was sent these bytes.
    Consumed {
        node: u64,
        begin: Lsn,
        bytes: &'a [u8],
    },
    /// Everything was healed at `since_ms`, and this is where commits stand at `now_ms`.
    Healed {
        since_ms: u64,
        now_ms: u64,
        bound_ms: u64,
        progressed: bool,
        state: &'a str,
    },
}

#[derive(Debug, Default)]
pub struct Checker {
    leaders: BTreeMap<Term, Leader>,
    terms: BTreeMap<Term, Stretch>,
    committed: Stretch,
    /// Terms in which something was committed, and how far.
    commits: BTreeMap<Term, Lsn>,
    /// Timelines of which something was committed, with their begin.
    committed_timelines: BTreeMap<Tli, Lsn>,
    /// Timelines on which a reign has written, and the promotion each came from.
    promotions: BTreeMap<Tli, u64>,
}

#[derive(Debug)]
struct Leader {
    proposer: u64,
    log: Stretch,
}

/// Bytes at a position.
#[derive(Debug, Default)]
struct Stretch {
    begin: Lsn,
    bytes: Vec<u8>,
}

impl Stretch {
    fn end(&self) -> Lsn {
        self.begin + self.bytes.len() as u64
    }

    /// The part of it within `begin..end`.
    fn part(&self, begin: Lsn, end: Lsn) -> &[u8] {
        let from = begin
            .saturating_distance_from(self.begin)
            .min(self.bytes.len() as u64);
        let to = end
            .saturating_distance_from(self.begin)
            .min(self.bytes.len() as u64);
        &self.bytes[from as usize..to.max(from) as usize]
    }

    /// First position at which it differs from `bytes` at `begin`, where both are.
    fn first_difference(&self, begin: Lsn, bytes: &[u8]) -> Option<Lsn> {
        let from = begin.max(self.begin);
        let to = self.end().min(begin + bytes.len() as u64);
        if from >= to {
            return None;
        }
        let theirs = &bytes[(from - begin) as usize..(to - begin) as usize];
        let ours = self.part(from, to);
        if ours == theirs {
            return None;
        }
        let same = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
        Some(from + same as u64)
    }
}

impl Checker {
    pub fn observe(&mut self, event: &Event<'_>) {
        match *event {
            Event::Led {
                proposer,
                term,
                base,
                log,
            } => {
                self.one_proposer_per_term(proposer, term);
                let log = Stretch {
                    begin: base,
                    bytes: log.to_vec(),
                };
                self.committed_wal_is_never_lost(term, &log);
                self.leaders.insert(term, Leader { proposer, log });
            }
            Event::Committed {
                proposer,
                history,
                before,
                base,
                log,
            } => {
                let term = history.last().map_or(Term::NONE, |last| last.term);
                let end = base + log.len() as u64;
                commit_never_goes_back(&format!("proposer {proposer}"), before, end);
                self.one_proposer_per_term(proposer, term);
                let new = before.max(base);
                self.commit(term, new, &log[(new - base) as usize..]);
                self.timelines_committed(history, end);
            }
            Event::WroteOn { tli, promotion } => self.new_timelines_are_unique(tli, promotion),
            Event::Holds {
                whose,
                history,
                begin,
                bytes,
            } => {
                self.same_term_same_lsn_same_byte(whose, history, begin, bytes);
            }
            Event::Acknowledged {
                node,
                begin,
                end,
                holds,
            } => {
                acknowledged_corruption_never(node, begin, end, holds);
                no_answer_before_flush(node, begin, end, holds);
            }
            Event::Promised {
                node,
                term,
                persisted,
                durable,
            } => {
                no_promise_before_flush(node, term, persisted, durable);
            }
            Event::Published {
                node,
                before,
                commit_lsn,
                tli,
                root,
            } => {
                self.no_timeline_is_shown_before_it_is_committed(node, tli, root);
                commit_never_goes_back(&format!("safekeeper {node}"), before, commit_lsn);
                self.nothing_is_published_before_it_is_committed(node, commit_lsn);
            }
            Event::Consumed { node, begin, bytes } => {
                self.consumer_sees_only_committed(node, begin, bytes);
            }
            Event::Healed {
                since_ms,
                now_ms,
                bound_ms,
                progressed,
                state,
            } => {
                progress_within_a_bound(since_ms, now_ms, bound_ms, progressed, state);
            }
        }
    }

    pub fn committed_lsn(&self) -> Lsn {
        self.committed.end()
    }

    pub fn committed_begin(&self) -> Lsn {
        self.committed.begin
    }

    /// How much of this WAL, on these timelines, is committed WAL: none of it, or up to somewhere.
    pub fn shared_with(&self, base: Lsn, wal: &[u8], timelines: &TimelineHistory) -> Option<Lsn> {
        if self.committed.bytes.is_empty() || base > self.committed.end() {
            return None;
        }
        let end = self.committed.end().min(base + wal.len() as u64);
        let end = self
            .committed
            .first_difference(base, wal)
            .unwrap_or(end)
            .min(end);
        // Bytes alone don't tell timelines apart: a record may be the same on both.
        let theirs = self.committed_timelines.iter();
        let ours = timelines
            .ancestors
            .iter()
            .map(|ancestor| ancestor.tli)
            .chain([timelines.tli]);
        let ours: BTreeMap<Tli, Lsn> = ours
            .filter_map(|tli| Some((Tli(tli), timelines.begin(tli)?)))
            .collect();
        let root = |begin: &Lsn| *begin <= self.committed.begin;
        let parts = theirs
            .filter(|(tli, begin)| !root(begin) && ours.get(tli) != Some(begin))
            .map(|(_, begin)| *begin)
            .chain(ours.iter().filter_map(|(tli, begin)| {
                let known = self.committed_timelines.get(tli) == Some(begin);
                (!root(begin) && !known).then_some(*begin)
            }));
        Some(parts.min().unwrap_or(end).min(end))
    }

    /// What `history` says was written at `begin..end`, as far as it is known, run by run.
    pub fn known(&self, history: &TermHistory, begin: Lsn, end: Lsn) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        for run in history.runs(end).filter(|run| run.end > begin) {
            let written = self.terms.get(&run.term)?;
            bytes.extend_from_slice(written.part(run.begin.max(begin), run.end));
        }
        (bytes.len() as u64 == end.saturating_distance_from(begin)).then_some(bytes)
    }

    /// `bytes` at `begin` are committed in `term`, as what is below has been.
    fn commit(&mut self, term: Term, begin: Lsn, bytes: &[u8]) {
        if self.committed.bytes.is_empty() {
            self.committed.begin = begin;
        }
        if let Some(lsn) = self.committed.first_difference(begin, bytes) {
            panic!("committed_wal_is_never_lost: term {term} commits other bytes at {lsn}");
        }
        let (end, known) = (begin + bytes.len() as u64, self.committed.end());
        if end > known {
            let new = &bytes[(known - begin) as usize..];
            self.committed.bytes.extend_from_slice(new);
        }
        let reached = self.commits.entry(term).or_default();
        *reached = end.max(*reached);
        // By answers that were on their way, something can be committed after a later reign began.
        for (later, leader) in self
            .leaders
            .range((Bound::Excluded(term), Bound::Unbounded))
        {
            begins_with_committed(*later, &leader.log, begin, bytes);
        }
    }

    /// WAL up to `end` of a log with this history is committed.
    fn timelines_committed(&mut self, history: &TermHistory, end: Lsn) {
        for entry in history
            .entries()
            .iter()
            .filter(|entry| entry.start_lsn < end)
        {
            self.committed_timelines
                .entry(entry.tli)
                .or_insert(entry.start_lsn);
        }
    }

    // ---- the invariants -------------------------------------------------------------------

    /// A majority votes once in a term.
    fn one_proposer_per_term(&self, proposer: u64, term: Term) {
        if let Some(leader) = self.leaders.get(&term) {
            assert!(
                leader.proposer == proposer,
                "one_proposer_per_term: {} and {proposer} in term {term}",
                leader.proposer
            );
        }
    }

    /// Every reign begins with all that was committed in the terms before it.
    fn committed_wal_is_never_lost(&self, term: Term, log: &Stretch) {
        let earlier = self.commits.range(..term).map(|(_, lsn)| *lsn);
        if let Some(committed) = earlier.max() {
            let bytes = self.committed.part(log.begin, committed);
            begins_with_committed(term, log, log.begin.max(self.committed.begin), bytes);
        }
    }

    /// Wherever two logs hold WAL of one term at one position, it is the same byte.
    fn same_term_same_lsn_same_byte(
        &mut self,
        whose: &str,
        history: &TermHistory,
        begin: Lsn,
        bytes: &[u8],
    ) {
        let end = begin + bytes.len() as u64;
        for Run {
            term,
            begin: run_begin,
            end: run_end,
        } in history.runs(end)
        {
            let from = run_begin.max(begin);
            if from >= run_end {
                continue;
            }
            let part = &bytes[(from - begin) as usize..(run_end - begin) as usize];
            let written = self.terms.entry(term).or_insert_with(|| Stretch {
                begin: from,
                bytes: Vec::new(),
            });
            if let Some(lsn) = written.first_difference(from, part) {
                panic!(
                    "same_term_same_lsn_same_byte: {whose} with {history} holds another byte of \
                     term {term} at {lsn}"
                );
            }
            if from < written.begin {
                // Known from the middle on until now.
                let missing = &part[..(written.begin - from).min(part.len() as u64) as usize];
                if from + missing.len() as u64 == written.begin {
                    written.bytes.splice(0..0, missing.iter().copied());
                    written.begin = from;
                }
            }
            // A safekeeper that was cut off in the padding behind a switch record finds the rest of
            // it when it recovers: its segments were zeroed. It goes on at the next segment, and
            // nobody need have sent those zeros.
            let is_padding = from.segment_offset(SEGMENT_SIZE) == 0
                && from.saturating_distance_from(written.end()) < u64::from(SEGMENT_SIZE);
            if is_padding && from > written.end() {
                let len = (from - written.begin) as usize;
                written.bytes.resize(len, 0);
            }
            let known = written.end();
            if from <= known && run_end > known {
                written
                    .bytes
                    .extend_from_slice(&part[(known - from) as usize..]);
            }
        }
    }

    /// A safekeeper's commit_lsn is what some proposer has called committed.
    fn nothing_is_published_before_it_is_committed(&self, node: u64, commit_lsn: Lsn) {
        assert!(
            commit_lsn <= self.committed.end(),
            "consumer_sees_only_committed: safekeeper {node} publishes {commit_lsn}, committed is {}",
            self.committed.end()
        );
    }

    /// A timeline is there for consumers once something of it is committed: one that dies must
    /// never have been seen.
    fn no_timeline_is_shown_before_it_is_committed(&self, node: u64, tli: Tli, root: Tli) {
        assert!(
            tli == root || self.committed_timelines.contains_key(&tli),
            "consumer_sees_only_committed: safekeeper {node} shows timeline {tli}, of which nothing \
             is committed"
        );
    }

    /// A timeline has one promotion: a number that is used twice names two logs.
    fn new_timelines_are_unique(&mut self, tli: Tli, promotion: u64) {
        let first = *self.promotions.entry(tli).or_insert(promotion);
        assert!(
            first == promotion,
            "new_timelines_are_unique: promotions {first} and {promotion} have both written on \
             timeline {tli}"
        );
    }

    fn consumer_sees_only_committed(&self, node: u64, begin: Lsn, bytes: &[u8]) {
        let end = begin + bytes.len() as u64;
        assert!(
            end <= self.committed.end(),
            "consumer_sees_only_committed: safekeeper {node} sent up to {end}, committed is {}",
            self.committed.end()
        );
        if let Some(lsn) = self.committed.first_difference(begin, bytes) {
            panic!("consumer_sees_only_committed: safekeeper {node} sent another byte at {lsn}");
        }
    }
}

/// The other half of `committed_wal_is_never_lost`: these bytes are in the log.
fn begins_with_committed(term: Term, log: &Stretch, begin: Lsn, bytes: &[u8]) {
    let end = begin + bytes.len() as u64;
    assert!(
        end <= log.end(),
        "committed_wal_is_never_lost: {end} was committed before term {term}, whose log ends at {}",
        log.end()
    );
    if let Some(lsn) = log.first_difference(begin, bytes) {
        panic!(
            "committed_wal_is_never_lost: {end} was committed before term {term}, whose log holds \
             another byte at {lsn}"
        );
    }
}

/// In a running process commit_lsn only grows.
fn commit_never_goes_back(whose: &str, before: Lsn, now: Lsn) {
    assert!(
        before <= now,
        "commit_never_goes_back: {whose} had {before} and has {now}"
    );
}

/// Acknowledged WAL is what the proposer of its term wrote.
fn acknowledged_corruption_never(node: u64, begin: Lsn, end: Lsn, holds: Holds) {
    assert!(
        holds.readable,
        "acknowledged_corruption_never: safekeeper {node} acknowledged {begin}..{end} and holds \
         other bytes"
    );
}

/// Acknowledged WAL is on stable storage.
fn no_answer_before_flush(node: u64, begin: Lsn, end: Lsn, holds: Holds) {
    assert!(
        holds.durable,
        "no_answer_before_flush: safekeeper {node} acknowledged {begin}..{end}, which is not on \
         stable storage"
    );
}

/// So is the term that an answer speaks of.
fn no_promise_before_flush(node: u64, term: Term, persisted: Option<Term>, durable: bool) {
    assert!(
        durable && persisted >= Some(term),
        "no_answer_before_flush: safekeeper {node} answered in term {term}, its control file has \
         {persisted:?} and is {}durable",
        if durable { "" } else { "not " }
    );
}

/// With everything healed, WAL is committed again before long.
fn progress_within_a_bound(
    since_ms: u64,
    now_ms: u64,
    bound_ms: u64,
    progressed: bool,
    state: &str,
) {
    let waited_ms = now_ms - since_ms;
    let mut text = String::new();
    let _ = write!(
        text,
        "progress_within_a_bound: nothing committed {waited_ms} ms after healing"
    );
    assert!(progressed || waited_ms < bound_ms, "{text}: {state}");
}

//! When WAL is pushed before it is flushed: hints of committing backends, and what the worker makes
//! of them.
//!
//! ```text
//!   backend   hint ─── inserts commit record ─── flushes ──────────────► waits for the quorum
//!                │                │
//!   worker       └─ wakes ─ spins ┴─ pushes ─────── members flush ─ answer ─► releases it
//! ```
//!
//! The server wakes WAL senders when WAL was flushed. To be earlier, the worker must be told by the
//! backend, in the last place where an extension is called before the commit record: a little too
//! early. What is sent then would go without the record, and a second message would be needed. So the
//! worker looks until a record has come, for as long as has paid off lately, and leaves the processor
//! to others between two looks. If none comes, the server's own wake-up, after the flush, is mostly soon
//! enough; should the disk be slow, it looks again after a millisecond, then two, four and so on.
//!
//! Commits that come while the members flush would have to wait for that anyway: they gather, and go
//! out together when the quorum has answered. Not where the way is long compared to a flush: there they
//! gather at the members, while these flush. What is flushed here is never held back.
//!
//! WAL that is not waited for flows too: when much of it has gathered, it is pushed as it is found,
//! and looked for every few milliseconds while it flows. When nothing is written, nobody looks.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pgrx::pg_sys;
use safekeeper_protocol::Lsn;

use crate::postgres;

/// In shared memory; all zeroes at first.
#[repr(C)]
pub struct CommitHints {
    count: AtomicU64,
    /// The highest that was given.
    lsn: AtomicU64,
    /// The worker's, while it wants to be woken.
    latch: AtomicPtr<pg_sys::Latch>,
    /// There is a worker that will look.
    is_heard: AtomicBool,
}

/// What was said last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hint {
    /// Hints since the server started.
    pub count: u64,
    /// A commit record follows behind this position.
    pub lsn: Lsn,
}

impl CommitHints {
    /// A commit record is about to be inserted. By the backend that does it.
    pub fn give(&self) {
        if !self.is_heard.load(Ordering::Relaxed) {
            return;
        }
        self.lsn
            .fetch_max(postgres::insert_lsn().0, Ordering::Relaxed);
        // Either the worker sees this when it looks next, or we see that it wants to be woken.
        self.count.fetch_add(1, Ordering::SeqCst);
        let latch = self.latch.load(Ordering::SeqCst);
        if !latch.is_null() {
            // SAFETY: a latch in the array of the server's processes, which is never freed. If it is
            // another process's by now, that one wakes up once for nothing.
            unsafe { pg_sys::SetLatch(latch) };
        }
    }

    /// From here on hints wake this process, the worker.
    pub fn listen(&self) {
        // SAFETY: our own latch; where it is does not change.
        self.latch
            .store(unsafe { pg_sys::MyLatch }, Ordering::SeqCst);
        self.is_heard.store(true, Ordering::Relaxed);
    }

    /// Something else will wake the worker soon, and then it looks.
    pub fn be_quiet(&self) {
        self.latch.store(std::ptr::null_mut(), Ordering::SeqCst);
    }

    /// The worker ends.
    pub fn ignore(&self) {
        self.is_heard.store(false, Ordering::Relaxed);
        self.be_quiet();
    }

    pub fn latest(&self) -> Hint {
        let count = self.count.load(Ordering::SeqCst);
        let lsn = Lsn(self.lsn.load(Ordering::Relaxed));
        Hint { count, lsn }
    }
}

/// The worker's side.
pub struct EarlyPush {
    /// Hints that were acted upon.
    seen: u64,
    patience: Patience,
    /// WAL flows: look for it until then.
    flows_until: Duration,
    last: Option<Pushed>,
    answers: AnswerTimes,
    missed: Option<Missed>,
}

/// A hint whose record has not come in time.
struct Missed {
    lsn: Lsn,
    /// Until the next look for it.
    pause_ms: u64,
}

/// WAL that was pushed early, to the end of a record.
struct Pushed {
    end_lsn: Lsn,
    at: Duration,
}

/// How things stand when the question is whether to push. Times are since some moment.
#[derive(Clone, Copy, Debug)]
pub struct Situation {
    pub now: Duration,
    pub hint: Hint,
    pub sent_lsn: Lsn,
    pub commit_lsn: Lsn,
    /// To the last member of the nearest majority and back.
    pub round_trip: Duration,
}

/// So much makes it worth pushing WAL for which nobody waits: a message that costs little for what it
/// carries.
const BULK: u64 = 128 * 1024;
/// While it flows, it is looked for so often.
const POLL_MS: u64 = 2;
/// A record that has been awaited for so long, in pauses that double, will not come: its transaction
/// has failed.
const PAUSE_MS_MAX: u64 = 512;
/// When nothing has come for so long, it has ceased to flow.
const FLOWS_FOR: Duration = Duration::from_millis(20);

impl EarlyPush {
    pub fn new(hint: Hint) -> EarlyPush {
        EarlyPush {
            seen: hint.count,
            patience: Patience::new(),
            flows_until: Duration::ZERO,
            last: None,
            answers: AnswerTimes::default(),
            missed: None,
        }
    }

    /// Is WAL to be pushed now that may not be flushed yet? `insert_lsn` asks how far it has come.
    pub fn is_due(&mut self, it: Situation, insert_lsn: impl Fn() -> Lsn) -> bool {
        let gathered = insert_lsn().saturating_distance_from(it.sent_lsn);
        if gathered >= BULK {
            self.seen = it.hint.count;
            self.flows_until = it.now + FLOWS_FOR;
            return true;
        }
        let hints = it.hint.count - self.seen;
        if self.members_are_busy(&it) {
            return false;
        }
        if hints == 0 {
            return self.has_come_late(&it, insert_lsn());
        }
        self.seen = it.hint.count;
        self.missed = None;
        // Some of several have come. Others that only lack the processor may still join them: where it
        // is free, this takes no time.
        if hints > 1 && gathered > 0 {
            std::thread::yield_now();
            return true;
        }
        let has_come = self.patience.spin_until(|| insert_lsn() > it.hint.lsn);
        if !has_come {
            let (lsn, pause_ms) = (it.hint.lsn, 1);
            self.missed = Some(Missed { lsn, pause_ms });
        }
        has_come
    }

    fn has_come_late(&mut self, it: &Situation, insert_lsn: Lsn) -> bool {
        let Some(missed) = &mut self.missed else {
            return false;
        };
        let has_come = insert_lsn > missed.lsn;
        missed.pause_ms *= 2;
        if has_come || missed.pause_ms > PAUSE_MS_MAX {
            self.missed = None;
        }
        // It may have been flushed, and sent for that.
        has_come && insert_lsn > it.sent_lsn
    }

    pub fn pushed(&mut self, end_lsn: Lsn, now: Duration) {
        self.last = Some(Pushed { end_lsn, at: now });
    }

    /// An answer of the quorum is due, which will wake the worker, and until which there is nothing
    /// to be done.
    pub fn members_are_busy(&self, it: &Situation) -> bool {
        self.last.as_ref().is_some_and(|last| {
            let is_answered =
                it.commit_lsn >= last.end_lsn || it.now >= last.at + self.answers.last;
            !is_answered && !self.answers.are_far(it.round_trip)
        })
    }

    /// The quorum has answered, so long after it was sent something.
    pub fn answered(&mut self, time: Duration, now: Duration) {
        self.answers.add(time, now);
    }

    /// When to look again though nobody calls; `None` if that need not be.
    pub fn next_look_ms(&self, now: Duration) -> Option<u64> {
        let flows = (now < self.flows_until).then_some(POLL_MS);
        flows.or(self.missed.as_ref().map(|missed| missed.pause_ms))
    }
}

/// How long the quorum takes to answer.
#[derive(Default)]
struct AnswerTimes {
    last: Duration,
    /// The shortest in this period, and in the one before.
    least: Option<Duration>,
    least_before: Option<Duration>,
    period_began: Duration,
}

/// What is measured of a shorter way there and back is mostly the members' own time.
const LONG_WAY: Duration = Duration::from_micros(300);

impl AnswerTimes {
    const PERIOD: Duration = Duration::from_secs(1);

    fn add(&mut self, time: Duration, now: Duration) {
        self.last = time;
        if now >= self.period_began + AnswerTimes::PERIOD {
            self.period_began = now;
            self.least_before = self.least.take();
        }
        self.least = Some(self.least.map_or(time, |least| least.min(time)));
    }

    /// The way there and back takes at least half as long as a flush.
    fn are_far(&self, round_trip: Duration) -> bool {
        let least = self.least.into_iter().chain(self.least_before).min();
        round_trip >= LONG_WAY && least.is_some_and(|least| round_trip >= least / 3)
    }
}

/// How long a look may last: what pays off.
struct Patience {
    limit: Duration,
}

impl Patience {
    const MAX: Duration = Duration::from_micros(100);
    /// Longer after a look in which the record has come, half as long after one in vain.
    const STEP: Duration = Duration::from_micros(10);

    fn new() -> Patience {
        Patience {
            limit: Patience::MAX,
        }
    }

    /// Looks at least once. Other processes run between two looks, or the record would come late on a
    /// machine with few processors.
    fn spin_until(&mut self, has_come: impl Fn() -> bool) -> bool {
        if has_come() {
            return true;
        }
        let began = Instant::now();
        while began.elapsed() < self.limit {
            std::thread::yield_now();
            if has_come() {
                self.limit = (self.limit + Patience::STEP).min(Patience::MAX);
                return true;
            }
        }
        self.limit = (self.limit / 2).max(Patience::STEP);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    const NOTHING: Hint = Hint {
        count: 7,
        lsn: Lsn(1000),
    };

    fn at(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    fn situation(hint: Hint, now: Duration) -> Situation {
        Situation {
            now,
            hint,
            sent_lsn: Lsn(1000),
            commit_lsn: Lsn(1000),
            round_trip: at(50),
        }
    }

    #[test]
    fn wal_that_nobody_waits_for_is_pushed_when_much_has_gathered() {
        let mut early = EarlyPush::new(NOTHING);
        assert!(!early.is_due(situation(NOTHING, at(0)), || Lsn(1000 + BULK - 1)));
        assert_eq!(early.next_look_ms(at(0)), None);
        assert!(early.is_due(situation(NOTHING, at(5)), || Lsn(1000 + BULK)));
        assert_eq!(early.next_look_ms(at(6)), Some(POLL_MS));
        assert_eq!(early.next_look_ms(at(5) + FLOWS_FOR), None);
    }

    #[test]
    fn a_hint_counts_once_and_when_its_record_has_come() {
        let mut early = EarlyPush::new(NOTHING);
        let one = Hint {
            count: 8,
            lsn: Lsn(2000),
        };
        assert!(early.is_due(situation(one, at(0)), || Lsn(2001)));
        assert!(!early.is_due(situation(one, at(1)), || Lsn(2001)));
        let late = Hint { count: 9, ..one };
        assert!(!early.is_due(situation(late, at(2)), || Lsn(2000)));
        assert_eq!(early.next_look_ms(at(2)), Some(1));
        assert!(!early.is_due(situation(late, at(3)), || Lsn(2000)));
        assert_eq!(early.next_look_ms(at(3)), Some(2));
        assert!(early.is_due(situation(late, at(4)), || Lsn(2001)));
        assert_eq!(early.next_look_ms(at(4)), None);
        // One that never comes is given up.
        let failed = Hint { count: 10, ..one };
        let looks = (0..100).take_while(|&us| {
            assert!(!early.is_due(situation(failed, at(us)), || Lsn(2000)));
            early.next_look_ms(at(us)).is_some()
        });
        assert_eq!(looks.count(), 10);
        // Of two one has come.
        let two = Hint { count: 12, ..one };
        assert!(early.is_due(situation(two, at(4)), || Lsn(1500)));
    }

    #[test]
    fn while_the_members_flush_commits_gather() {
        let mut early = EarlyPush::new(NOTHING);
        early.answered(at(300), at(900));
        early.pushed(Lsn(1100), at(1000));
        let one = Hint {
            count: 8,
            lsn: Lsn(2000),
        };
        let come = || Lsn(2001);
        assert!(!early.is_due(situation(one, at(1299)), come));
        let answered = Situation {
            commit_lsn: Lsn(1100),
            ..situation(one, at(1200))
        };
        assert!(early.is_due(answered, come), "the hint has waited");
        // An answer that is late is not waited for.
        early.pushed(Lsn(2001), at(1200));
        let next = Hint { count: 9, ..one };
        assert!(!early.is_due(situation(next, at(1499)), come));
        assert!(early.is_due(situation(next, at(1500)), come));
    }

    #[test]
    fn members_are_far_if_the_way_takes_half_as_long_as_a_flush() {
        let mut answers = AnswerTimes::default();
        answers.add(at(3000), at(0));
        answers.add(at(4500), at(10)); // it came during a flush
        assert!(answers.are_far(at(1000)));
        assert!(!answers.are_far(at(999)));
        // What was the least long ago is forgotten.
        answers.add(at(6000), at(1_000_000));
        assert!(answers.are_far(at(1000)));
        answers.add(at(6000), at(2_000_000));
        assert!(!answers.are_far(at(1000)));
        answers = AnswerTimes::default();
        answers.add(at(300), at(0));
        assert!(!answers.are_far(at(299)), "no way is that long");
    }

    #[test]
    fn patience_grows_when_it_pays_off_and_shrinks_when_not() {
        let mut patience = Patience::new();
        for _ in 0..20 {
            assert!(!patience.spin_until(|| false));
        }
        assert_eq!(patience.limit, Patience::STEP);
        // Not there at the first look, there at the second.
        let looks = Cell::new(0);
        let second = || looks.replace(looks.get() + 1) == 1;
        for _ in 0..20 {
            looks.set(0);
            patience.limit = patience.limit.max(Duration::from_micros(50));
            assert!(patience.spin_until(second));
        }
        assert_eq!(patience.limit, Patience::MAX);
    }
}

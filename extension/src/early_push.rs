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
//! out together when the quorum has answered; so does what is flushed here meanwhile. They wait no
//! longer than the last answer took, nor than a tenth of a second. Not where the way is long compared to
//! a flush: there they gather at the members, while these flush.
//!
//! Sessions that one answer has released, and that do nothing but commit, come back at about the same
//! time. The first of them, pushed at once, would make the others wait for a flush of its own; and each
//! message takes time of the processors here and of each member's. So where sessions mostly come
//! back soon, and two for each processor are committing, they gather until as many have come as were
//! released: for two milliseconds at most. Where they don't come back within that time, since the answer did
//! not release them or their clients are far, it is left out for a while.
//!
//! Both may take a millisecond longer, of which time-outs are made.
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
    /// Of these, those whose transaction is over,
    ended: AtomicU64,
    /// and those of sessions that had committed just before.
    prompt: AtomicU64,
    /// The highest that was given.
    lsn: AtomicU64,
    /// The worker's, while it wants to be woken,
    latch: AtomicPtr<pg_sys::Latch>,
    /// from this count on.
    wake_at: AtomicU64,
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
    /// Hints whose transaction is not over: mostly sessions that wait for the quorum.
    pub committing: u64,
    /// Hints of sessions that had committed just before, since the server started.
    pub prompt: u64,
}

impl CommitHints {
    /// A commit record is about to be inserted. By the backend that does it; if this is heard, it also
    /// says when its transaction is over.
    pub fn give(&self, is_prompt: bool) -> bool {
        if !self.is_heard.load(Ordering::Relaxed) {
            return false;
        }
        if is_prompt {
            self.prompt.fetch_add(1, Ordering::Relaxed);
        }
        self.lsn
            .fetch_max(postgres::insert_lsn().0, Ordering::Relaxed);
        // Either the worker sees this when it looks next, or we see that it wants to be woken.
        let count = self.count.fetch_add(1, Ordering::SeqCst) + 1;
        let latch = self.latch.load(Ordering::SeqCst);
        if !latch.is_null() && count >= self.wake_at.load(Ordering::SeqCst) {
            // SAFETY: a latch in the array of the server's processes, which is never freed. If it is
            // another process's by now, that one wakes up once for nothing.
            unsafe { pg_sys::SetLatch(latch) };
        }
        true
    }

    /// A transaction is over for which so many were given.
    pub fn end(&self, count: u64) {
        self.ended.fetch_add(count, Ordering::Relaxed);
    }

    /// From here on hints wake this process, the worker, if there have been so many.
    pub fn listen_from(&self, count: u64) {
        self.wake_at.store(count, Ordering::SeqCst);
        // SAFETY: our own latch; where it is does not change.
        self.latch
            .store(unsafe { pg_sys::MyLatch }, Ordering::SeqCst);
        self.is_heard.store(true, Ordering::Relaxed);
    }

    /// The worker ends.
    pub fn ignore(&self) {
        self.is_heard.store(false, Ordering::Relaxed);
        self.latch.store(std::ptr::null_mut(), Ordering::SeqCst);
    }

    pub fn latest(&self) -> Hint {
        let ended = self.ended.load(Ordering::Relaxed);
        let count = self.count.load(Ordering::SeqCst);
        let lsn = Lsn(self.lsn.load(Ordering::Relaxed));
        Hint {
            count,
            lsn,
            committing: count.saturating_sub(ended),
            prompt: self.prompt.load(Ordering::Relaxed),
        }
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
    /// Hints there had been at that.
    pushed_hints: u64,
    answers: AnswerTimes,
    gathering: Option<Gathering>,
    vain: Vain,
    missed: Option<Missed>,
    returns: Returns,
    /// Sessions that have to be committing at once for others to be waited for.
    crowd: u64,
}

/// Commits are waited for that may come soon.
#[derive(Clone, Copy)]
struct Gathering {
    until: Duration,
    /// From this many hints on,
    from: u64,
    /// until there have been so many.
    hints: u64,
}

/// Nothing need be sent before something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// It lasts so long at most.
    pub time: Duration,
    /// It ends when there have been so many hints; `u64::MAX`: an answer ends it.
    pub hints: u64,
}

/// A record that was announced, and has not been pushed: it did not come in time, or nobody could take it.
struct Missed {
    /// It ends behind this.
    lsn: Lsn,
    /// Before the next look for it.
    pause: Duration,
    next_look: Duration,
}

impl Missed {
    fn new(lsn: Lsn, now: Duration) -> Missed {
        Missed {
            lsn,
            pause: PAUSE_MIN,
            next_look: now + PAUSE_MIN,
        }
    }
}

/// WAL that was pushed early: all that there was.
struct Pushed {
    /// Mostly the end of a record; if it is not, no answer is one to all of it.
    end_lsn: Lsn,
    at: Duration,
    /// That had come since the push before.
    hints: u64,
}

/// How things stand when the question is whether to push. Times are since some moment.
#[derive(Clone, Copy, Debug)]
pub struct Situation {
    pub now: Duration,
    pub hint: Hint,
    pub sent_lsn: Lsn,
    /// Of this server.
    pub flush_lsn: Lsn,
    pub commit_lsn: Lsn,
    /// To the last member of the nearest majority and back.
    pub round_trip: Duration,
}

impl Situation {
    /// What ends here goes out in any case, if not now then after a pause.
    fn needs_no_look(&self) -> Lsn {
        self.sent_lsn.max(self.flush_lsn)
    }
}

/// So much makes it worth pushing WAL for which nobody waits: a message that costs little for what it
/// carries.
const BULK: u64 = 128 * 1024;
/// While it flows, it is looked for so often.
const POLL_MS: u64 = 2;
/// The first pause in waiting for a record; each is twice as long as the one before.
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// A record that has not come after a pause of this length will not come: its transaction has failed.
const PAUSE_MAX: Duration = Duration::from_millis(512);
/// When nothing has come for so long, it has ceased to flow.
const FLOWS_FOR: Duration = Duration::from_millis(20);

/// An answer is waited for so long at most: the last one may have taken as long as an outage.
const ANSWER_MAX: Duration = Duration::from_millis(100);
/// Those whom an answer has released are waited for so long at most.
const GATHERING_MAX: Duration = Duration::from_millis(2);
/// So many sessions committing at once, for each processor, are worth waiting for others.
const CROWD_PER_PROCESSOR: u64 = 2;
/// Whoever commits again within this time after a commit has come back soon.
pub const SOON: Duration = Duration::from_millis(5);

impl EarlyPush {
    /// On a machine with so many processors.
    pub fn new(hint: Hint, processors: usize) -> EarlyPush {
        EarlyPush {
            seen: hint.count,
            patience: Patience::new(),
            flows_until: Duration::ZERO,
            last: None,
            pushed_hints: hint.count,
            answers: AnswerTimes::default(),
            gathering: None,
            vain: Vain::default(),
            missed: None,
            returns: Returns::new(hint),
            crowd: processors as u64 * CROWD_PER_PROCESSOR,
        }
    }

    /// Is WAL to be pushed now that may not be flushed yet? `insert_lsn` asks how far it has come.
    pub fn is_due(&mut self, it: Situation, insert_lsn: impl Fn() -> Lsn) -> bool {
        let gathered = insert_lsn().saturating_distance_from(it.needs_no_look());
        if gathered >= BULK {
            self.seen = it.hint.count;
            self.flows_until = it.now + FLOWS_FOR;
            return true;
        }
        let hints = it.hint.count - self.seen;
        if self.pause(&it).is_some() {
            return false;
        }
        if hints == 0 {
            return self.has_come_late(&it, insert_lsn());
        }
        self.seen = it.hint.count;
        self.missed = None;
        // Some of several may have come. Others that only lack the processor can still join them: where it
        // is free, this takes no time.
        if hints > 1 && insert_lsn() > it.sent_lsn {
            std::thread::yield_now();
            if insert_lsn() <= it.hint.lsn {
                self.missed = Some(Missed::new(it.hint.lsn, it.now));
            }
            return true;
        }
        let has_come = self.patience.spin_until(|| insert_lsn() > it.hint.lsn);
        if !has_come {
            self.missed = Some(Missed::new(it.hint.lsn, it.now));
        }
        has_come
    }

    fn has_come_late(&mut self, it: &Situation, insert_lsn: Lsn) -> bool {
        let Some(missed) = &mut self.missed else {
            return false;
        };
        let has_come = insert_lsn > missed.lsn;
        if it.now >= missed.next_look {
            missed.pause *= 2;
            missed.next_look = it.now + missed.pause;
        }
        if has_come || missed.pause > PAUSE_MAX {
            self.missed = None;
        }
        // It may have been flushed, and sent for that.
        has_come && insert_lsn > it.needs_no_look()
    }

    /// What was due, up to `due_lsn`, has been sent to those who could take it, up to `sent_lsn`.
    pub fn pushed(&mut self, it: &Situation, due_lsn: Lsn, sent_lsn: Lsn) {
        if sent_lsn <= it.sent_lsn {
            // Nobody could, unless it had been sent with a push before. Sockets that have room again wake the
            // worker; then it looks.
            if due_lsn > sent_lsn {
                self.missed = Some(Missed::new(it.needs_no_look(), it.now));
            }
            return;
        }
        // The rest, from within a record, is not to wait for an answer to the first part.
        self.last = (sent_lsn >= due_lsn).then_some(Pushed {
            end_lsn: sent_lsn,
            at: it.now,
            hints: it.hint.count - self.pushed_hints,
        });
        self.pushed_hints = it.hint.count;
        if let Some(gathering) = self.gathering.take() {
            self.vain.ended(&gathering, it);
        }
    }

    /// What little has come since the last push is not to be sent yet, even if it is flushed: the members flush,
    /// or more is coming.
    pub fn holds_back(&self, it: &Situation) -> bool {
        let flushed = it.flush_lsn.saturating_distance_from(it.sent_lsn);
        flushed < BULK && self.pause(it).is_some()
    }

    /// Nothing is to be looked for now but bulk.
    pub fn pause(&self, it: &Situation) -> Option<Pause> {
        if let Some(time) = self.members_are_busy_for(it) {
            let hints = u64::MAX;
            return Some(Pause { time, hints });
        }
        let Gathering { until, hints, .. } = self.gathering?;
        let time = until.checked_sub(it.now)?;
        let is_over = time.is_zero() || it.hint.count >= hints;
        (!is_over).then_some(Pause { time, hints })
    }

    /// An answer of the quorum is due, which will wake the worker, and until which there is nothing
    /// to be done; for so long at most.
    fn members_are_busy_for(&self, it: &Situation) -> Option<Duration> {
        let last = self.last.as_ref()?;
        let answer = self.answers.last.min(ANSWER_MAX);
        let left = (last.at + answer).checked_sub(it.now)?;
        let is_answered = it.commit_lsn >= last.end_lsn || left.is_zero();
        (!is_answered && !self.answers.are_far(it.round_trip)).then_some(left)
    }

    /// A hint has come that was not looked at yet.
    pub fn has_hint(&self, it: &Situation) -> bool {
        it.hint.count != self.seen
    }

    /// The quorum has answered, so long after it was sent something; how things stand now.
    pub fn answered(&mut self, time: Duration, it: &Situation) {
        self.answers.add(time, it.now);
        self.returns.look(it.hint);
        let Some(last) = &self.last else { return };
        let is_answered = it.commit_lsn >= last.end_lsn;
        let is_crowd = it.hint.committing >= self.crowd && self.returns.are_prompt;
        // One after another is over, and what it held back is sent: nobody is to be held back longer and longer.
        let is_open = |now: Gathering| it.now < now.until || it.hint.count > now.from;
        let is_gathering = self.gathering.is_some_and(is_open);
        // At most those that were pushed. Of the others that are committing some come with the next push, about
        // so many, and some wait for something else.
        let waiting = it.hint.count - self.pushed_hints + u64::from(self.missed.is_some());
        let released = last.hints.min(it.hint.committing.saturating_sub(waiting));
        let is_worth_it = is_answered && is_crowd && !is_gathering && released > 0;
        if is_worth_it && !self.answers.are_far(it.round_trip) && self.vain.allows_another() {
            let from = it.hint.count;
            self.gathering = Some(Gathering {
                until: it.now + GATHERING_MAX,
                from,
                hints: from + released,
            });
        }
    }

    /// When to look again though nobody calls; `None` if that need not be.
    pub fn next_look_ms(&self, it: &Situation) -> Option<u64> {
        let now = it.now;
        let flows = (now < self.flows_until).then_some(POLL_MS);
        // After a pause there is a look in any case.
        let missed = self.missed.as_ref().filter(|_| self.pause(it).is_none());
        flows.or(missed.map(|missed| ceil_ms(missed.next_look.saturating_sub(now))))
    }
}

/// Gatherings in which not even half of those came who were waited for. The next ones are left out: one, two, four
/// and so on.
#[derive(Default)]
struct Vain {
    left_out: u32,
    to_leave_out: u32,
}

impl Vain {
    const MAX: u32 = 64;

    fn ended(&mut self, gathering: &Gathering, it: &Situation) {
        let joined = it.hint.count - gathering.from;
        if joined * 2 >= gathering.hints - gathering.from {
            *self = Vain::default();
        } else if it.now >= gathering.until {
            self.left_out = (self.left_out * 2).clamp(1, Vain::MAX);
            self.to_leave_out = self.left_out;
        }
    }

    fn allows_another(&mut self) -> bool {
        let allows = self.to_leave_out == 0;
        self.to_leave_out = self.to_leave_out.saturating_sub(1);
        allows
    }
}

/// For a time-out that must not end too early.
pub fn ceil_ms(time: Duration) -> u64 {
    u64::try_from(time.as_micros().div_ceil(1000)).unwrap_or(u64::MAX)
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

/// Do sessions mostly commit again soon? From some hundred hints to the next.
struct Returns {
    seen: Hint,
    are_prompt: bool,
}

impl Returns {
    const HINTS: u64 = 100;

    fn new(hint: Hint) -> Returns {
        Returns {
            seen: hint,
            are_prompt: false,
        }
    }

    fn look(&mut self, hint: Hint) {
        let count = hint.count - self.seen.count;
        if count >= Returns::HINTS {
            self.are_prompt = (hint.prompt - self.seen.prompt) * 2 >= count;
            self.seen = hint;
        }
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
        committing: 0,
        prompt: 0,
    };

    fn at(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    fn situation(hint: Hint, now: Duration) -> Situation {
        Situation {
            now,
            hint,
            sent_lsn: Lsn(1000),
            flush_lsn: Lsn(1000),
            commit_lsn: Lsn(1000),
            round_trip: at(50),
        }
    }

    fn look(early: &EarlyPush, now: Duration) -> Option<u64> {
        early.next_look_ms(&situation(NOTHING, now))
    }

    #[test]
    fn what_is_flushed_is_not_looked_for() {
        let mut early = EarlyPush::new(NOTHING, 2);
        // A worker that has just begun has sent nothing.
        let all_flushed = Situation {
            sent_lsn: Lsn(0),
            flush_lsn: Lsn(9 * BULK),
            ..situation(NOTHING, at(0))
        };
        assert!(!early.is_due(all_flushed, || Lsn(9 * BULK)));
        assert_eq!(early.next_look_ms(&all_flushed), None);
        // Nobody can take what two commits have written, and what is flushed soon.
        let two = Hint {
            count: NOTHING.count + 2,
            ..NOTHING
        };
        let mut it = Situation {
            hint: two,
            ..all_flushed
        };
        assert!(early.is_due(it, || Lsn(9 * BULK)));
        early.pushed(&it, Lsn(2001), it.sent_lsn);
        let mut looks = 0;
        while let Some(ms) = early.next_look_ms(&it) {
            it.now += Duration::from_millis(ms.max(1));
            assert!(!early.is_due(it, || Lsn(9 * BULK)));
            looks += 1;
        }
        assert!((5..20).contains(&looks), "{looks}");
    }

    #[test]
    fn a_pause_has_no_looks() {
        let mut early = EarlyPush::new(NOTHING, 2);
        early.answered(at(9000), &situation(NOTHING, at(0)));
        let two = Hint {
            count: NOTHING.count + 2,
            lsn: Lsn(2000),
            ..NOTHING
        };
        let it = situation(two, at(1000));
        assert!(early.is_due(it, || Lsn(1500)), "one of two");
        early.pushed(&it, Lsn(1500), Lsn(1500));
        let later = Situation {
            sent_lsn: Lsn(1500),
            ..situation(two, at(5000))
        };
        assert_eq!(early.pause(&later).expect("paused").time, at(5000));
        assert_eq!(early.next_look_ms(&later), None);
        // What is flushed waits, but not much of it, nor as long as an outage has lasted.
        assert!(early.holds_back(&later));
        let much = Situation {
            flush_lsn: Lsn(1500 + BULK),
            ..later
        };
        assert!(!early.holds_back(&much));
        early.answers.last = Duration::from_secs(60);
        let after = Situation {
            now: it.now + ANSWER_MAX,
            ..later
        };
        assert!(!early.holds_back(&after));
    }

    #[test]
    fn wal_that_nobody_waits_for_is_pushed_when_much_has_gathered() {
        let mut early = EarlyPush::new(NOTHING, 2);
        assert!(!early.is_due(situation(NOTHING, at(0)), || Lsn(1000 + BULK - 1)));
        assert_eq!(look(&early, at(0)), None);
        assert!(early.is_due(situation(NOTHING, at(5)), || Lsn(1000 + BULK)));
        assert_eq!(look(&early, at(6)), Some(POLL_MS));
        assert_eq!(look(&early, at(5) + FLOWS_FOR), None);
    }

    #[test]
    fn a_hint_counts_once_and_when_its_record_has_come() {
        let mut early = EarlyPush::new(NOTHING, 2);
        let one = Hint {
            count: 8,
            lsn: Lsn(2000),
            ..NOTHING
        };
        assert!(early.is_due(situation(one, at(0)), || Lsn(2001)));
        assert!(!early.is_due(situation(one, at(1)), || Lsn(2001)));
        let late = Hint { count: 9, ..one };
        assert!(!early.is_due(situation(late, at(2)), || Lsn(2000)));
        assert_eq!(look(&early, at(2)), Some(1));
        // Other reasons to look do not use it up.
        for us in 3..100 {
            assert!(!early.is_due(situation(late, at(us)), || Lsn(2000)));
            assert_eq!(look(&early, at(us)), Some(1));
        }
        assert!(!early.is_due(situation(late, at(1002)), || Lsn(2000)));
        assert_eq!(look(&early, at(1002)), Some(2));
        assert!(early.is_due(situation(late, at(1003)), || Lsn(2001)));
        assert_eq!(look(&early, at(1003)), None);
        // One that never comes is given up, after a second.
        let failed = Hint { count: 10, ..one };
        let ms = |ms: u64| at(1000 * ms);
        let given_up = (2..5000).find(|&now| {
            assert!(!early.is_due(situation(failed, ms(now)), || Lsn(2000)));
            look(&early, ms(now)).is_none()
        });
        assert!(
            given_up.is_some_and(|now| (1000..1100).contains(&now)),
            "{given_up:?}"
        );
        // Of two, what there is, and then the rest.
        let two = Hint { count: 12, ..one };
        assert!(early.is_due(situation(two, ms(6000)), || Lsn(1500)));
        let sent = Situation {
            sent_lsn: Lsn(1500),
            ..situation(two, ms(6001))
        };
        assert!(!early.is_due(sent, || Lsn(1500)));
        assert!(early.is_due(sent, || Lsn(2001)));
    }

    #[test]
    fn what_nobody_could_take_is_looked_for_again() {
        let mut early = EarlyPush::new(NOTHING, 2);
        early.answered(at(300), &situation(NOTHING, at(0)));
        let one = Hint {
            count: 8,
            lsn: Lsn(2000),
            ..NOTHING
        };
        let come = || Lsn(2001);
        let it = situation(one, at(1000));
        assert!(early.is_due(it, come));
        early.pushed(&it, Lsn(2001), it.sent_lsn);
        assert_eq!(early.pause(&it), None);
        assert_eq!(early.next_look_ms(&it), Some(1));
        assert!(early.is_due(situation(one, at(1100)), come));
    }

    #[test]
    fn while_the_members_flush_commits_gather() {
        let mut early = EarlyPush::new(NOTHING, 2);
        early.answered(at(300), &situation(NOTHING, at(900)));
        early.pushed(&situation(NOTHING, at(1000)), Lsn(1100), Lsn(1100));
        let one = Hint {
            count: 8,
            lsn: Lsn(2000),
            ..NOTHING
        };
        let come = || Lsn(2001);
        assert!(!early.is_due(situation(one, at(1299)), come));
        let answered = Situation {
            commit_lsn: Lsn(1100),
            ..situation(one, at(1200))
        };
        assert!(early.is_due(answered, come), "the hint has waited");
        // An answer that is late is not waited for.
        early.pushed(&situation(one, at(1200)), Lsn(2001), Lsn(2001));
        let next = Hint { count: 9, ..one };
        assert!(!early.is_due(situation(next, at(1499)), come));
        assert!(early.is_due(situation(next, at(1500)), come));
    }

    /// `committing` sessions, after so many hints, half of them given soon after a commit.
    fn crowd(committing: u64, count: u64) -> Hint {
        Hint {
            count,
            lsn: Lsn(2000),
            committing,
            prompt: count / 2,
        }
    }

    /// What there is is due, and goes out.
    fn push(early: &mut EarlyPush, hint: Hint, us: u64) {
        let it = situation(hint, at(us));
        assert!(early.is_due(it, || Lsn(2001)));
        early.pushed(&it, Lsn(2001), Lsn(2001));
    }

    /// All that was pushed is committed.
    fn answered(hint: Hint, us: u64) -> Situation {
        Situation {
            commit_lsn: Lsn(2001),
            sent_lsn: Lsn(2001),
            ..situation(hint, at(us))
        }
    }

    #[test]
    fn those_who_come_back_soon_gather_where_many_commit() {
        let mut early = EarlyPush::new(crowd(0, 0), 2);
        // Three commits go out together, and are answered when a fourth is there.
        push(&mut early, crowd(3, 100), 0);
        push(&mut early, crowd(3, 103), 1000);
        let four = answered(crowd(4, 104), 1300);
        early.answered(at(300), &four);
        assert!(!early.is_due(four, || Lsn(3000)), "those three come soon");
        let pause = early.pause(&four).expect("paused");
        assert_eq!((pause.time, pause.hints), (GATHERING_MAX, 107));
        // They end it, or time does.
        assert!(early.pause(&answered(crowd(4, 106), 1400)).is_some());
        assert_eq!(early.pause(&answered(crowd(4, 107), 1400)), None);
        assert_eq!(early.pause(&answered(crowd(4, 106), 3300)), None);
        assert!(early.is_due(answered(crowd(4, 107), 1400), || Lsn(3000)));
        // Nobody is waited for when few commit,
        push(&mut early, crowd(3, 110), 4000);
        let three = answered(crowd(3, 111), 4300);
        early.answered(at(300), &three);
        assert_eq!(early.pause(&three), None);
        // nor when most take their time.
        push(&mut early, crowd(3, 213), 5000);
        let seldom = Hint {
            prompt: 55 + 51,
            ..crowd(9, 214)
        };
        let seldom = answered(seldom, 5300);
        early.answered(at(300), &seldom);
        assert_eq!(early.pause(&seldom), None);
    }

    #[test]
    fn who_was_not_pushed_is_not_waited_for() {
        let mut early = EarlyPush::new(crowd(0, 0), 2);
        // The record of one of four has not come when they are pushed.
        let it = situation(crowd(4, 104), at(1000));
        assert!(early.is_due(it, || Lsn(1999)));
        early.pushed(&it, Lsn(1999), Lsn(1999));
        let answered = Situation {
            commit_lsn: Lsn(1999),
            sent_lsn: Lsn(1999),
            ..situation(crowd(4, 104), at(1300))
        };
        early.answered(at(300), &answered);
        let pause = early.pause(&answered);
        assert_eq!(pause.map(|pause| pause.hints), Some(107));
    }

    #[test]
    fn who_waits_for_something_else_is_not_waited_for() {
        let mut early = EarlyPush::new(crowd(0, 0), 2);
        push(&mut early, crowd(30, 101), 0);
        // Of thirty that are committing three were pushed now, the others long ago.
        push(&mut early, crowd(30, 104), 1000);
        let answered = answered(crowd(30, 104), 1300);
        early.answered(at(300), &answered);
        let pause = early.pause(&answered);
        assert_eq!(pause.map(|pause| pause.hints), Some(107));
    }

    #[test]
    fn what_was_cut_off_does_not_wait_for_an_answer() {
        let mut early = EarlyPush::new(NOTHING, 2);
        early.answered(at(300), &situation(NOTHING, at(900)));
        let it = situation(NOTHING, at(1000));
        early.pushed(&it, Lsn(5000), Lsn(4000));
        assert_eq!(early.pause(&it), None);
        early.pushed(&it, Lsn(5000), Lsn(5000));
        assert!(early.pause(&it).is_some());
    }

    #[test]
    fn gatherings_in_vain_are_left_out_more_and_more() {
        let mut early = EarlyPush::new(crowd(0, 0), 2);
        let (mut count, mut us) = (100, 0);
        // Is there one after a push and its answer, which releases eight? Eight others come while the members
        // flush, so many then.
        let mut gathers = |come: u64| {
            push(&mut early, crowd(16, count), us);
            us += 300;
            count += 8;
            let answered = answered(crowd(16, count), us);
            early.answered(at(300), &answered);
            us += 2500;
            count += come;
            early.pause(&answered).is_some()
        };
        let mut left_out = || (0..).take_while(|_| !gathers(1)).count();
        assert_eq!(left_out(), 0);
        assert_eq!([left_out(), left_out(), left_out()], [1, 2, 4]);
        let most = (0..8).map(|_| left_out()).max();
        assert_eq!(most, Some(Vain::MAX as usize));
        // Half of them are enough for it to be worth while.
        while !gathers(4) {}
        assert!(gathers(1), "that one was worth while");
        assert!(!gathers(1), "this one was not");
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

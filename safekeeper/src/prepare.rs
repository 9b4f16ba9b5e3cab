//! Preparing segments: made ahead of the log by a thread of their own, so that a write finds its
//! file there, zeroed (or, for bulk, allocated) and synced.
//!
//! ```text
//!   the log is in          ready          being made
//!   ...0007                ...0008        ...0009 (as prepare.tmp)
//!              enter() ──►                    ▲
//!                                             spare.*.tmp: segments nobody needs any more
//! ```
//!
//! Filling a segment takes as long as writing it does, and it is the same disk. It is worth it all
//! the same: the commits in between do not wait for it, and a write that allocates nothing needs
//! no journal when it is synced. While WAL comes in bulk it is not: then the disk is what it waits for,
//! flushes are few, and the next segments are only allocated.
//!
//! Two threads, one rule: **names of segments are given only under the lock, and only to what is
//! still wanted**. Zeroing goes on outside the lock, under a name that means nothing. When the log
//! is faster, it makes its own segment and the thread's goes to a later one; when it takes
//! another turn (a new timeline, a truncation), what is ready and not wanted is removed first.
//!
//! A crash leaves ready segments, which are zero, and `*.tmp`; recovery removes both.
//!
//! The thread ends when the [`Preparation`] is told to stop, which its owner does before joining.

use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use safekeeper_wal::SegNo;

use crate::disk::StorageError;
use crate::segment::{SegmentDir, SegmentId};

/// Segments kept ready ahead of the log. One is the minimum; with two, a burst of writes that
/// fills one while the disk is busy still finds the next.
const N_AHEAD: u64 = 2;

/// Segments that are ready or being made, shared by the log's owner and the preparing thread.
#[derive(Debug)]
pub struct Preparation {
    segments: SegmentDir,
    plan: Mutex<Plan>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Plan {
    /// The segment that the log will enter next; none while that is not known.
    next: Option<SegmentId>,
    /// So many segments from `next` on are there under their names.
    n_ready: u64,
    /// Grows whenever `next` is set other than by entering a ready one.
    turn: u64,
    pace: Pace,
    /// Files of removed segments, to be filled again. No more than `N_AHEAD`.
    spares: Vec<PathBuf>,
    n_spares_made: u64,
    /// There was no space; not tried again before something has changed.
    no_space: bool,
    /// Why the thread has given up.
    failed: Option<StorageError>,
    stop: bool,
}

impl Preparation {
    pub fn new(segments: SegmentDir) -> Preparation {
        Preparation {
            segments,
            plan: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    pub fn segments(&self) -> &SegmentDir {
        &self.segments
    }

    /// The log enters `id`: when this returns, the segment is there. A lack of space can be
    /// survived, nothing has changed then.
    pub fn enter(&self, id: SegmentId) -> Result<(), StorageError> {
        let now = Instant::now();
        let mut plan = self.lock();
        plan.pace.entered(now);
        if plan.next != Some(id) || plan.n_ready == 0 {
            self.forget_locked(&mut plan)?;
            let is_bulk = plan.pace.is_bulk(now);
            let spare = plan.spares.pop();
            drop(plan);
            // On a full disk a spare is what there is: it keeps its blocks.
            let is_allocated = is_bulk && spare.is_none();
            let tmp = spare.unwrap_or_else(|| self.segments.dir().join("enter.tmp"));
            self.make(&tmp, is_allocated)?;
            self.segments.install(&tmp, id)?;
            self.go_on_at(SegmentId {
                segno: id.segno + 1,
                ..id
            });
            return Ok(());
        }
        plan.next = Some(SegmentId {
            segno: id.segno + 1,
            ..id
        });
        plan.n_ready -= 1;
        plan.no_space = false;
        self.changed.notify_all();
        Ok(())
    }

    /// Nothing is known of where the log goes on. Removes what is ready; the directory is synced
    /// by the caller, before it relies on it.
    pub fn forget(&self) -> Result<(), StorageError> {
        self.forget_locked(&mut self.lock())
    }

    /// The log will enter `next` after the segment it is in.
    pub fn go_on_at(&self, next: SegmentId) {
        let mut plan = self.lock();
        plan.next = Some(next);
        plan.n_ready = 0;
        plan.turn += 1;
        plan.no_space = false;
        self.changed.notify_all();
    }

    /// Takes a segment that nobody needs any more: away from its name first, so that a reader
    /// can tell. The directory is synced by the caller.
    pub fn recycle(&self, id: SegmentId) -> Result<(), StorageError> {
        let mut plan = self.lock();
        let path = self.segments.path(id);
        if plan.spares.len() as u64 >= N_AHEAD {
            self.segments.disk().remove(&path)?;
        } else {
            let name = format!("spare.{}.tmp", plan.n_spares_made);
            let spare = self.segments.dir().join(name);
            self.segments.disk().rename(&path, &spare)?;
            plan.spares.push(spare);
            plan.n_spares_made += 1;
        }
        plan.no_space = false;
        self.changed.notify_all();
        Ok(())
    }

    /// What the thread failed at, once: the process must end.
    pub fn take_failure(&self) -> Option<StorageError> {
        self.lock().failed.take()
    }

    /// Body of the thread.
    pub fn run(&self) {
        // A file that was not wanted any more when it was finished.
        let mut made: Option<PathBuf> = None;
        while let Some(work) = self.wait_for_work(made.is_some()) {
            let result = self.prepare(work, &mut made);
            let mut plan = self.lock();
            match result {
                Ok(()) => {}
                Err(error) if error.is_no_space() => plan.no_space = true,
                Err(error) => {
                    plan.failed = Some(error);
                    return;
                }
            }
        }
    }

    pub fn stop(&self) {
        self.lock().stop = true;
        self.changed.notify_all();
    }

    fn make(&self, tmp: &Path, is_allocated: bool) -> Result<(), StorageError> {
        match is_allocated {
            true => self.segments.make_allocated(tmp),
            false => self.segments.make_zeroed(tmp),
        }
    }

    fn prepare(&self, work: Work, made: &mut Option<PathBuf>) -> Result<(), StorageError> {
        let tmp = match made.take() {
            Some(tmp) => tmp,
            None => {
                let tmp = work
                    .spare
                    .unwrap_or_else(|| self.segments.dir().join("prepare.tmp"));
                self.make(&tmp, work.is_bulk)?;
                tmp
            }
        };
        let mut plan = self.lock();
        if plan.turn != work.turn || plan.wanted() != Some(work.id) {
            *made = Some(tmp);
            return Ok(());
        }
        self.segments.install(&tmp, work.id)?;
        plan.n_ready += 1;
        Ok(())
    }

    /// The next segment to make, or none at the end of the thread.
    fn wait_for_work(&self, has_made: bool) -> Option<Work> {
        let mut plan = self.lock();
        loop {
            if plan.stop {
                return None;
            }
            if let Some(id) = plan.wanted() {
                let spare = if has_made { None } else { plan.spares.pop() };
                return Some(Work {
                    id,
                    turn: plan.turn,
                    is_bulk: plan.pace.is_bulk(Instant::now()),
                    spare,
                });
            }
            let woken = self.changed.wait(plan);
            plan = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn forget_locked(&self, plan: &mut Plan) -> Result<(), StorageError> {
        if let Some(next) = plan.next.take() {
            for segno in next.segno..next.segno + plan.n_ready {
                let id = SegmentId { segno, ..next };
                self.segments.disk().remove(&self.segments.path(id))?;
            }
        }
        plan.n_ready = 0;
        plan.turn += 1;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Plan> {
        // A panic ends the process; until it has, the plan is as good as it was.
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A segment to make, as the plan is when it is wanted.
struct Work {
    id: SegmentId,
    turn: u64,
    is_bulk: bool,
    /// The file to make it of, if there is one.
    spare: Option<PathBuf>,
}

/// When segments were entered: the last one, and the one before.
#[derive(Debug, Default)]
struct Pace {
    last: Option<Instant>,
    before: Option<Instant>,
}

/// One segment in less than this is bulk: commits alone fill one of 16 MB in seconds.
const BULK: Duration = Duration::from_millis(300);

impl Pace {
    fn entered(&mut self, now: Instant) {
        self.before = self.last.replace(now);
    }

    /// The last segment was full in no time, or the one at hand is about to be.
    fn is_bulk(&self, now: Instant) -> bool {
        let (Some(before), Some(last)) = (self.before, self.last) else {
            return false;
        };
        last - before < BULK && now.saturating_duration_since(last) < BULK
    }
}

impl Plan {
    /// The segment that is to be made ready next, if one is due.
    fn wanted(&self) -> Option<SegmentId> {
        let next = self.next.filter(|_| !self.no_space)?;
        let segno: SegNo = next.segno + self.n_ready;
        (self.n_ready < N_AHEAD).then_some(SegmentId { segno, ..next })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bulk_is_told_from_commits_by_how_fast_segments_are_entered() {
        let begin = Instant::now();
        let mut pace = Pace::default();
        assert!(!pace.is_bulk(begin), "none has been entered");
        let mut bulk_after = |ms: u64, wait_ms: u64| {
            let now = begin + Duration::from_millis(ms);
            pace.entered(now);
            pace.is_bulk(now + Duration::from_millis(wait_ms))
        };
        assert!(!bulk_after(100, 0), "the first");
        assert!(!bulk_after(5000, 0), "commits");
        assert!(bulk_after(5050, 0), "two in 50 ms");
        assert!(bulk_after(5100, 200), "and another, asked a bit later");
        assert!(
            !bulk_after(5150, 400),
            "nothing for longer than a segment takes"
        );
        assert!(!bulk_after(9000, 0), "commits again");
    }
}

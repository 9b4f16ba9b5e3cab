//! What the processes that take part in a stop know of each other, in shared memory.
//!
//! | | written by | read by |
//! |---|---|---|
//! | `nonce` | worker, for one connection | whoever is being authenticated |
//! | `sender`, with its latch | the last sender | worker |
//! | `worker`, with its latch | worker | the last sender |
//! | `lingered_ms` | worker, at its end | the last sender |
//! | `waits_ended` | worker or last sender | committing backends |

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU64, Ordering};
use std::time::Duration;

use pgrx::pg_sys;

use crate::postgres;

/// All zeroes are its value when the server starts.
#[repr(C)]
pub struct StopShared {
    nonce: [AtomicU64; 2],
    nonce_is_valid: AtomicBool,
    sender: Presence,
    worker: Presence,
    lingered_ms: AtomicU64,
    waits_ended: AtomicBool,
}

/// Whether a process is there, and how to wake it.
#[repr(C)]
struct Presence {
    pid: AtomicI32,
    latch: AtomicPtr<pg_sys::Latch>,
}

impl Presence {
    fn enter(&self) {
        // SAFETY: variables of this process; the latch lies in shared memory.
        let (pid, latch) = unsafe { (pg_sys::MyProcPid, pg_sys::MyLatch) };
        self.latch.store(latch, Ordering::Relaxed);
        self.pid.store(pid, Ordering::Release);
    }

    fn leave(&self) {
        // SAFETY: a variable of this process. If it is another one that is there, it stays.
        let (pid, order) = (unsafe { pg_sys::MyProcPid }, Ordering::AcqRel);
        let _ = self.pid.compare_exchange(pid, 0, order, Ordering::Relaxed);
    }

    fn is_this_process(&self) -> bool {
        // SAFETY: a variable of this process.
        self.pid.load(Ordering::Acquire) == unsafe { pg_sys::MyProcPid }
    }

    fn is_there(&self) -> bool {
        self.pid.load(Ordering::Acquire) != 0
    }

    fn wake(&self) {
        let latch = self.latch.load(Ordering::Acquire);
        if !latch.is_null() {
            // SAFETY: a latch of a process slot, which stays; if the process is another one by
            // now, it is woken for nothing.
            unsafe { postgres::SetLatch(latch) };
        }
    }
}

impl StopShared {
    /// Whoever shows `nonce` next is let in as the last sender. One at a time.
    pub fn offer(&self, nonce: u128) {
        self.withdraw();
        let [high, low] = [(nonce >> 64) as u64, nonce as u64];
        self.nonce[0].store(high, Ordering::Relaxed);
        self.nonce[1].store(low, Ordering::Relaxed);
        self.nonce_is_valid.store(true, Ordering::Release);
    }

    pub fn withdraw(&self) {
        self.nonce_is_valid.store(false, Ordering::Release);
    }

    /// Whether `shown` is the nonce: `true` once. How long it takes tells nothing of how much of it
    /// is right.
    pub fn redeem(&self, shown: u128) -> bool {
        if !self.nonce_is_valid.load(Ordering::Acquire) {
            return false;
        }
        let [high, low] = [0, 1].map(|i: usize| self.nonce[i].load(Ordering::Relaxed));
        let difference = shown ^ (u128::from(high) << 64 | u128::from(low));
        let taken = (Ordering::AcqRel, Ordering::Relaxed);
        difference == 0
            && self
                .nonce_is_valid
                .compare_exchange(true, false, taken.0, taken.1)
                .is_ok()
    }

    /// This process is the last sender from here on, and outlives workers; `false` if there is one
    /// already, which a worker has called that has ended before it came.
    pub fn enter_sender(&self) -> bool {
        let entered = !self.has_sender();
        if entered {
            self.sender.enter();
        }
        entered
    }

    pub fn leave_sender(&self) {
        self.sender.leave();
        self.worker.wake();
    }

    /// Two may have come at the same moment.
    pub fn is_sender(&self) -> bool {
        self.sender.is_this_process()
    }

    pub fn has_sender(&self) -> bool {
        self.sender.is_there()
    }

    /// If the server is stopping while a worker begins, it is by a smart stop: waits are answered
    /// again.
    pub fn enter_worker(&self) {
        self.waits_ended.store(false, Ordering::Release);
        self.worker.enter();
        self.sender.wake();
    }

    pub fn leave_worker(&self) {
        self.worker.leave();
        self.sender.wake();
    }

    pub fn has_worker(&self) -> bool {
        self.worker.is_there()
    }

    /// How long the worker has waited for sessions at this stop.
    pub fn lingered(&self) -> Duration {
        Duration::from_millis(self.lingered_ms.load(Ordering::Acquire))
    }

    pub fn set_lingered(&self, time: Duration) {
        let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.lingered_ms.store(ms, Ordering::Release);
    }

    /// The server stops, and no wait for the quorum will be answered: `true` if that is news.
    pub fn set_waits_ended(&self) -> bool {
        !self.waits_ended.swap(true, Ordering::AcqRel)
    }

    pub fn waits_have_ended(&self) -> bool {
        self.waits_ended.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonce_is_good_once_and_no_other_is() {
        // SAFETY: all zeroes are valid.
        let shared: StopShared = unsafe { std::mem::zeroed() };
        let nonce = 0x0123_4567_89ab_cdef_0011_2233_4455_6677;
        assert!(!shared.redeem(0), "none was offered");
        shared.offer(nonce);
        for wrong in [0, nonce ^ 1, nonce ^ 1 << 127, u128::MAX] {
            assert!(!shared.redeem(wrong));
        }
        assert!(shared.redeem(nonce), "a wrong one must not use it up");
        assert!(!shared.redeem(nonce), "twice");
        shared.offer(nonce);
        shared.withdraw();
        assert!(!shared.redeem(nonce), "withdrawn");
    }
}

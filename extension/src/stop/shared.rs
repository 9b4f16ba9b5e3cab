//! What the processes that take part in a stop know of each other, in shared memory.
//!
//! | | written by | read by |
//! |---|---|---|
//! | `nonce` | worker, for one connection | whoever is being authenticated |
//! | `sender`, `sender_latch` | the last sender | worker, to wake or to dismiss it |
//! | `worker` | worker | the last sender |
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
    sender: AtomicI32,
    sender_latch: AtomicPtr<pg_sys::Latch>,
    worker: AtomicI32,
    lingered_ms: AtomicU64,
    waits_ended: AtomicBool,
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

    /// This process is the last sender from here on.
    pub fn enter_sender(&self) {
        // SAFETY: variables of this process; the latch lies in shared memory.
        let (pid, latch) = unsafe { (pg_sys::MyProcPid, pg_sys::MyLatch) };
        self.sender_latch.store(latch, Ordering::Relaxed);
        self.sender.store(pid, Ordering::Release);
    }

    pub fn is_sender(&self) -> bool {
        // SAFETY: a variable of this process.
        self.sender.load(Ordering::Acquire) == unsafe { pg_sys::MyProcPid }
    }

    pub fn leave_sender(&self) {
        // SAFETY: a variable of this process.
        let pid = unsafe { pg_sys::MyProcPid };
        let _ = self
            .sender
            .compare_exchange(pid, 0, Ordering::AcqRel, Ordering::Relaxed);
    }

    pub fn has_sender(&self) -> bool {
        self.sender.load(Ordering::Acquire) != 0
    }

    /// A worker has begun, with a last sender of its own to come: an earlier worker's leaves. If the
    /// server is stopping, it is by a smart stop, and waits are answered again.
    pub fn enter_worker(&self) {
        self.waits_ended.store(false, Ordering::Release);
        // SAFETY: a variable of this process.
        self.worker
            .store(unsafe { pg_sys::MyProcPid }, Ordering::Release);
        self.sender.store(0, Ordering::Release);
        self.wake_sender();
    }

    pub fn leave_worker(&self) {
        self.worker.store(0, Ordering::Release);
        self.wake_sender();
    }

    pub fn has_worker(&self) -> bool {
        self.worker.load(Ordering::Acquire) != 0
    }

    fn wake_sender(&self) {
        let latch = self.sender_latch.load(Ordering::Acquire);
        if !latch.is_null() {
            // SAFETY: a latch of a process slot, which stays; if the process is another one by
            // now, it is woken for nothing.
            unsafe { postgres::SetLatch(latch) };
        }
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
    pub fn end_waits(&self) -> bool {
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

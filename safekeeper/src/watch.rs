//! `Watch`: a number that only grows, and threads that wait for it to.
//!
//! The keeper publishes `commit_lsn` on one, and consumers wait there without ever taking the
//! keeper's lock. Reading is one atomic load. Advancing takes the lock only if somebody waits, so
//! that the hot path pays nothing for consumers that are not there.
//!
//! ```text
//!   publisher   store value ── fence ── anybody waiting? ── lock ── notify all
//!   waiter      lock ── say "waiting" ── fence ── value still old? ── wait (releases the lock)
//! ```
//!
//! One of the two sees the other: either the publisher sees the waiter and wakes it, or the waiter
//! sees the new value and does not go to sleep.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A growing number, such as an LSN. Shared by reference or `Arc`.
#[derive(Debug, Default)]
pub struct Watch {
    value: AtomicU64,
    closed: AtomicBool,
    n_waiting: AtomicUsize,
    lock: Mutex<()>,
    changed: Condvar,
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// The number is above the one waited at; this is it.
    Advanced(u64),
    TimedOut,
    /// It will not grow any more.
    Closed,
}

impl Watch {
    pub fn new(value: u64) -> Watch {
        Watch {
            value: AtomicU64::new(value),
            ..Watch::default()
        }
    }

    pub fn get(&self) -> u64 {
        self.value.load(Ordering::SeqCst)
    }

    /// Raises the number; a lower one changes nothing.
    pub fn advance(&self, value: u64) {
        if self.value.fetch_max(value, Ordering::SeqCst) < value {
            self.wake();
        }
    }

    /// Ends all waits, present and future.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.wake();
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Waits until the number is above `seen`, at most for `timeout`.
    pub fn wait_beyond(&self, seen: u64, timeout: Duration) -> Waited {
        let deadline = Instant::now() + timeout;
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.n_waiting.fetch_add(1, Ordering::SeqCst);
        let waited = loop {
            let value = self.get();
            if value > seen {
                break Waited::Advanced(value);
            }
            if self.is_closed() {
                break Waited::Closed;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break Waited::TimedOut;
            }
            let woken = self.changed.wait_timeout(guard, left);
            guard = woken.unwrap_or_else(PoisonError::into_inner).0;
        };
        self.n_waiting.fetch_sub(1, Ordering::SeqCst);
        waited
    }

    fn wake(&self) {
        if self.n_waiting.load(Ordering::SeqCst) > 0 {
            // Taken and released: a waiter that has looked at the old value is asleep by then.
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn only_grows() {
        let watch = Watch::new(5);
        watch.advance(3);
        assert_eq!(watch.get(), 5);
        watch.advance(9);
        assert_eq!(watch.get(), 9);
        assert_eq!(watch.wait_beyond(8, LONG), Waited::Advanced(9));
    }

    #[test]
    fn a_wait_for_nothing_times_out() {
        let watch = Watch::new(5);
        assert_eq!(watch.wait_beyond(5, Duration::ZERO), Waited::TimedOut);
        let begun = Instant::now();
        let short = Duration::from_millis(20);
        assert_eq!(watch.wait_beyond(5, short), Waited::TimedOut);
        assert!(begun.elapsed() >= short);
    }

    #[test]
    fn no_step_is_missed_between_two_threads() {
        // Each waits for the other's every step: a wake-up that gets lost lets both time out.
        let (ping, pong) = (Arc::new(Watch::new(0)), Arc::new(Watch::new(0)));
        let steps = 20_000;
        let other = {
            let (ping, pong) = (ping.clone(), pong.clone());
            thread::spawn(move || {
                for step in 0..steps {
                    assert_eq!(ping.wait_beyond(step, LONG), Waited::Advanced(step + 1));
                    pong.advance(step + 1);
                }
            })
        };
        for step in 0..steps {
            ping.advance(step + 1);
            assert_eq!(pong.wait_beyond(step, LONG), Waited::Advanced(step + 1));
        }
        other.join().expect("the other side saw every step");
    }

    #[test]
    fn closing_ends_every_wait() {
        let watch = Arc::new(Watch::new(1));
        let waiters: Vec<_> = (0..4)
            .map(|_| {
                let watch = watch.clone();
                thread::spawn(move || watch.wait_beyond(1, LONG))
            })
            .collect();
        watch.close();
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap(), Waited::Closed);
        }
        assert_eq!(watch.wait_beyond(1, LONG), Waited::Closed);
        assert_eq!(watch.wait_beyond(0, LONG), Waited::Advanced(1));
    }
}

//! How long WAL takes from being sent to being acknowledged.
//!
//! A ring of samples `(lsn, when)`: when WAL up to `lsn` went out. An acknowledgement of a position
//! passes over all samples up to it, and the newest of these gives the lag. When the ring is full,
//! the newest sample is replaced: then old samples are too far apart rather than lost, and a member
//! that hangs costs no memory. (The idea is that of `LagTracker` in `walsender.c`.)

use std::collections::VecDeque;
use std::time::Duration;

use safekeeper_protocol::Lsn;

/// At a sample per commit, some tens of milliseconds of a busy server; beyond that lag is coarse.
const SAMPLES_MAX: usize = 512;

/// The lag of one receiver of WAL. Times are milliseconds or any finer unit of one clock, given as
/// [`Duration`] since its start.
#[derive(Default)]
pub struct Lag {
    samples: VecDeque<(Lsn, Duration)>,
    last: Option<Duration>,
}

impl Lag {
    /// WAL up to `lsn` went out at `now`.
    pub fn sent(&mut self, lsn: Lsn, now: Duration) {
        let full = self.samples.len() == SAMPLES_MAX;
        match self.samples.back_mut() {
            Some((newest, _)) if lsn <= *newest => {}
            Some(newest) if full => *newest = (lsn, now),
            _ => self.samples.push_back((lsn, now)),
        }
    }

    /// WAL up to `lsn` was acknowledged at `now`.
    pub fn acknowledged(&mut self, lsn: Lsn, now: Duration) {
        while let Some(&(sample_lsn, at)) = self.samples.front() {
            if sample_lsn > lsn {
                break;
            }
            self.last = Some(now.saturating_sub(at));
            self.samples.pop_front();
        }
    }

    /// The last one measured; `None` before the first.
    pub fn last(&self) -> Option<Duration> {
        self.last
    }

    /// The last one measured; `None` before the first. If more has been waiting for longer than
    /// that, the wait so far.
    pub fn current(&self, now: Duration) -> Option<Duration> {
        let waiting = self.samples.front().map(|&(_, at)| now.saturating_sub(at));
        self.last.max(waiting)
    }

    /// The connection ended: what is on its way will not be acknowledged.
    pub fn forget(&mut self) {
        *self = Lag::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn the_newest_sample_that_was_passed_counts() {
        let mut lag = Lag::default();
        assert_eq!(lag.current(at(5)), None);
        lag.sent(Lsn(10), at(0));
        lag.sent(Lsn(20), at(4));
        lag.sent(Lsn(15), at(5)); // not new
        lag.acknowledged(Lsn(9), at(6));
        assert_eq!(lag.current(at(6)), Some(at(6)));
        lag.acknowledged(Lsn(25), at(7));
        assert_eq!(lag.current(at(100)), Some(at(3)));
        lag.sent(Lsn(30), at(100));
        assert_eq!(lag.current(at(150)), Some(at(50)));
        lag.forget();
        assert_eq!(lag.current(at(150)), None);
    }

    #[test]
    fn a_receiver_that_hangs_costs_no_memory() {
        let mut lag = Lag::default();
        for i in 0..10_000 {
            lag.sent(Lsn(i + 1), at(i));
        }
        assert_eq!(lag.samples.len(), SAMPLES_MAX);
        assert_eq!(lag.current(at(20_000)), Some(at(20_000)));
        lag.acknowledged(Lsn(10_000), at(20_000));
        assert!(lag.samples.is_empty());
        assert_eq!(lag.current(at(20_000)), Some(at(10_001)));
    }
}

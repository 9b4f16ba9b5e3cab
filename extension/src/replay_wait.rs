//! When members are asked how far their standbys have replayed (`remote_apply`).
//!
//! A standby says at once what it has replayed; its safekeeper passes that on with the next answer. On a quiet
//! server that would be a heartbeat's, up to a second later. So while a commit may wait for it, the members
//! are asked: after a millisecond, and then each time after a quarter of what it has taken so far. A
//! standby that lags far behind, or whose replay is paused, so costs few messages.

use std::time::Duration;

use safekeeper_protocol::Lsn;

use crate::early_push::ceil_ms;

/// About what the fastest of standbys take to receive a record, flush and replay it.
const PAUSE_MIN: Duration = Duration::from_millis(1);

/// Times are since some moment.
#[derive(Default)]
pub struct ReplayWait {
    waited_for: Option<Wait>,
}

struct Wait {
    since: Duration,
    /// How far standbys had replayed then.
    apply_lsn: Lsn,
    next_look: Duration,
}

impl ReplayWait {
    /// Somebody may wait for more than `apply_lsn` to be replayed, or nobody does. Is it time to ask?
    pub fn is_due(&mut self, somebody_may_wait: bool, apply_lsn: Lsn, now: Duration) -> bool {
        if !somebody_may_wait {
            self.waited_for = None;
            return false;
        }
        match &mut self.waited_for {
            Some(wait) if wait.apply_lsn == apply_lsn => {
                let is_due = now >= wait.next_look;
                if is_due {
                    wait.next_look = now + PAUSE_MIN.max((now - wait.since) / 4);
                }
                is_due
            }
            _ => {
                self.waited_for = Some(Wait {
                    since: now,
                    apply_lsn,
                    next_look: now + PAUSE_MIN,
                });
                false
            }
        }
    }

    /// Until it may be time; `None` if nobody waits.
    pub fn next_look_ms(&self, now: Duration) -> Option<u64> {
        let wait = self.waited_for.as_ref()?;
        Some(ceil_ms(wait.next_look.saturating_sub(now)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn who_waits_long_asks_seldom() {
        let mut wait = ReplayWait::default();
        let asked = |wait: &mut ReplayWait, lsn: Lsn, from: u64, to: u64| {
            let due = (from..to).filter(|now| wait.is_due(true, lsn, ms(*now)));
            due.collect::<Vec<_>>()
        };
        assert_eq!(
            asked(&mut wait, Lsn(7), 0, 16),
            [1, 2, 3, 4, 5, 7, 9, 12, 15]
        );
        let in_an_hour = asked(&mut wait, Lsn(7), 16, 3_600_000).len();
        assert!((40..80).contains(&in_an_hour), "{in_an_hour}");
        // Standbys go on: the next step is soon to be heard of.
        assert_eq!(
            asked(&mut wait, Lsn(8), 3_600_000, 3_600_003),
            [3_600_001, 3_600_002]
        );
    }

    #[test]
    fn nobody_asks_when_nobody_waits() {
        let mut wait = ReplayWait::default();
        assert!(!wait.is_due(true, Lsn(7), ms(0)));
        assert_eq!(wait.next_look_ms(ms(0)), Some(1));
        assert!(!wait.is_due(false, Lsn(7), ms(5)));
        assert_eq!(wait.next_look_ms(ms(5)), None);
        assert!(!wait.is_due(true, Lsn(7), ms(5)), "another wait");
    }
}

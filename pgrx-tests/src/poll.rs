//! Waiting for a condition, never for a time.

use std::thread;
use std::time::{Duration, Instant};

/// How long anything may take that should take a moment. Generous: the machine may be busy, and
/// a test that passes never waits so long.
pub const SOON: Duration = Duration::from_secs(60);

/// Asks again and again until there is an answer. Panics after `limit`, naming what was awaited.
#[track_caller]
pub fn wait_for<T>(what: &str, limit: Duration, mut question: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = question() {
            return answer;
        }
        assert!(start.elapsed() < limit, "waited {limit:?} in vain: {what}");
        thread::sleep(PAUSE);
    }
}

/// The same for a condition.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    wait_for(what, limit, || condition().then_some(()));
}

/// For things that must *not* happen: asks until `time` is over, panics as soon as it does.
#[track_caller]
pub fn never_within(what: &str, time: Duration, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while start.elapsed() < time {
        assert!(!condition(), "must not happen: {what}");
        thread::sleep(PAUSE);
    }
}

/// Lets the cluster run as it is for a while: for faults that last, not for waiting.
pub fn let_run(time: Duration) {
    thread::sleep(time);
}

/// Between two questions: little against any time that a test reports, much against its cost.
const PAUSE: Duration = Duration::from_millis(20);

//! A member that was away: how fast it catches up, while nothing else happens.
//!
//! It is killed, WAL is written, it starts again, and time runs until it has flushed what the
//! primary has, as the primary hears it. `mb_per_s` counts from its start, so with the time until it
//! is connected;
//! `stream_mb_per_s` from when the first of the new WAL was flushed there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cluster_tests::poll::SOON;
use cluster_tests::postgres::text_rows;
use safekeeper_protocol::Lsn;

use crate::bulk::Peak;
use crate::options::Options;
use crate::samples::Samples;
use crate::setups::{Kind, Setup, Setups};

pub const PART: &str = "catch-up";
pub const POINT: &str = "one of three";

const MEGABYTE: f64 = (1 << 20) as f64;
/// The one that is away.
const AWAY: usize = 2;

pub fn measure(options: &Options, setups: &mut Setups, samples: &mut Samples) {
    for round in 0..options.few_rounds(5) {
        for kind in options.order(round) {
            if kind == Kind::Local {
                continue;
            }
            let Some(setup) = setups.get(kind) else {
                continue;
            };
            setup.primary.sql("checkpoint");
            setup.settle();
            let values = catch_up(setup, options.bulk_megabytes);
            samples.add(PART, POINT, kind, round, values);
        }
    }
}

fn catch_up(setup: &mut Setup, megabytes: u64) -> Vec<(&'static str, f64)> {
    setup.members[AWAY].kill9();
    let begin = setup.primary.flush_lsn();
    setup.write_wal(megabytes);
    let end = setup.primary.flush_lsn();
    let begun = Instant::now();
    setup.members[AWAY].start();
    let ended = AtomicBool::new(false);
    let setup = &*setup;
    let query = setup.members[AWAY].flush_lsn_query();
    let mut client = setup.primary.client();
    let mut flush_lsn = || -> Lsn {
        let rows = text_rows(&mut client, &query).expect("the primary answers");
        let value = rows[0][0].as_ref().expect("the query has no NULL");
        value.parse().expect("an LSN")
    };
    let (streaming, caught_up, peak) = thread::scope(|scope| {
        let watching = scope.spawn(|| Peak::watch(setup, &ended));
        let mut streaming = None;
        let mut caught_up = None;
        while caught_up.is_none() && begun.elapsed() < 3 * SOON {
            let flushed = flush_lsn();
            if streaming.is_none() && flushed > begin {
                streaming = Some((begun.elapsed(), flushed));
            }
            if flushed >= end {
                caught_up = Some(begun.elapsed());
            }
            thread::sleep(Duration::from_millis(5));
        }
        ended.store(true, Ordering::Relaxed);
        (
            streaming,
            caught_up,
            watching.join().expect("reading /proc does not panic"),
        )
    });
    let caught_up = caught_up.expect("a member that was away catches up");
    let (first, flushed) = streaming.expect("it has flushed something before it had all");
    let rate = |bytes: u64, time: Duration| bytes as f64 / MEGABYTE / time.as_secs_f64();
    let mut values = vec![
        ("mb_per_s", rate(end - begin, caught_up)),
        ("until_first_s", first.as_secs_f64()),
    ];
    // All at once is no stream.
    if flushed < end {
        values.push(("stream_mb_per_s", rate(end - flushed, caught_up - first)));
    }
    values.extend(peak.values());
    values
}

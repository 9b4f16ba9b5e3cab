//! Bulk load on one machine: one COPY of a few hundred megabytes, to the end of its commit.
//!
//! What it measures beside the throughput: CPU time of those processes of the primary that send WAL,
//! until all three members have everything; and memory meanwhile, of the same and of the members.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cluster_tests::place::{TestDir, give_to_server_user};

use crate::options::Options;
use crate::processes::Memory;
use crate::samples::Samples;
use crate::setups::{MEMORY, Setup, Setups};

pub const PART: &str = "bulk";
pub const POINT: &str = "COPY";

const MEGABYTE: f64 = (1 << 20) as f64;
const GIGABYTE: f64 = (1 << 30) as f64;

pub fn measure(options: &Options, setups: &mut Setups, samples: &mut Samples) {
    let dir = TestDir::new_in(Path::new(MEMORY));
    let rows = Rows::write(&dir, options.bulk_megabytes << 20);
    for round in 0..options.few_rounds(5) {
        for kind in options.order(round) {
            let Some(setup) = setups.get(kind) else {
                continue;
            };
            setup.primary.sql("create table bulk (id int, filler text)");
            setup.primary.sql("checkpoint");
            setup.settle();
            let values = copy(setup, &rows);
            samples.add(PART, POINT, kind, round, values);
            setup.primary.sql("drop table bulk");
        }
    }
}

fn copy(setup: &Setup, rows: &Rows) -> Vec<(&'static str, f64)> {
    let statement = format!("copy bulk from '{}'", rows.file.display());
    let senders = setup.senders();
    let cost = setup.cost(&senders);
    let before = setup.primary.lsn("select pg_current_wal_insert_lsn()");
    let ended = AtomicBool::new(false);
    let (seconds, memory) = thread::scope(|scope| {
        let watching = scope.spawn(|| Peak::watch(setup, &ended));
        let begun = Instant::now();
        setup.primary.sql(&statement);
        let seconds = begun.elapsed().as_secs_f64();
        setup.wait_all_caught_up();
        ended.store(true, Ordering::Relaxed);
        let memory = watching.join().expect("reading /proc does not panic");
        (seconds, memory)
    });
    let after = setup.primary.lsn("select pg_current_wal_insert_lsn()");
    let wal = (after - before) as f64;
    let cost = setup.cost(&senders).since(cost);
    let per_gigabyte = |seconds: f64| seconds / wal * GIGABYTE;
    assert!(setup.all_follow(), "a member of {} was lost", setup.kind);
    let mut values = vec![
        ("wal_mb_per_s", wal / MEGABYTE / seconds),
        ("data_mb_per_s", rows.bytes as f64 / MEGABYTE / seconds),
        ("cpu_s_per_gb", per_gigabyte(cost.all())),
        ("cpu_senders_s_per_gb", per_gigabyte(cost.senders)),
    ];
    values.extend(memory.values());
    values
}

/// The most memory that was seen, of the senders together and of the largest member.
#[derive(Default)]
pub struct Peak {
    senders: Memory,
    member: Memory,
}

impl Peak {
    /// Looks until it is told to end.
    pub fn watch(setup: &Setup, ended: &AtomicBool) -> Peak {
        let mut peak = Peak::default();
        let mut senders = Vec::new();
        for look in 0.. {
            // Finding them costs more than looking at them, and they seldom change.
            if look % 10 == 0 {
                senders = setup.senders();
            }
            let together = senders.iter().map(|pid| Memory::of(*pid));
            peak.senders = peak
                .senders
                .max(together.fold(Memory::default(), Memory::plus));
            for member in setup.members.iter().filter(|member| member.runs()) {
                peak.member = peak.member.max(Memory::of(member.pid()));
            }
            if ended.load(Ordering::Relaxed) {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
        peak
    }

    /// By the names that the report knows.
    pub fn values(&self) -> Vec<(&'static str, f64)> {
        vec![
            ("senders_resident_mb", self.senders.resident()),
            ("senders_anonymous_mb", self.senders.anonymous),
            ("senders_shared_mb", self.senders.shared),
            ("member_resident_mb", self.member.resident()),
            ("member_anonymous_mb", self.member.anonymous),
        ]
    }
}

/// A file in COPY's text format, in memory.
struct Rows {
    file: PathBuf,
    bytes: u64,
}

impl Rows {
    fn write(dir: &TestDir, bytes: u64) -> Rows {
        const FILLER: usize = 990;
        let file = dir.path().join("rows");
        let mut out = BufWriter::new(fs::File::create(&file).expect("our own directory"));
        let mut written = 0;
        for id in 0.. {
            // Of a different letter each, that no page looks like the other.
            let letter = char::from(b'a' + (id % 26) as u8);
            let row = format!("{id}\t{}\n", letter.to_string().repeat(FILLER));
            out.write_all(row.as_bytes()).expect("there is room");
            written += row.len() as u64;
            if written >= bytes {
                break;
            }
        }
        out.flush().expect("there is room");
        give_to_server_user(&file);
        Rows {
            file,
            bytes: written,
        }
    }
}

//! What storage costs on the hot path: one log, real files, no network.
//!
//! * `commit`: a small record and a flush. Nearly all of it is the disk's fdatasync.
//! * `append`: WAL in pieces as they come from a bulk load, a flush for each MiB.
//!
//! The checks alone are safekeeper-wal's bench `decode`. The directory is made where `TMPDIR` says:
//! put it on the disk that is to be measured.

use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};

use safekeeper::control_file::ControlFile;
use safekeeper::disk::{Disk, RealDisk};
use safekeeper::wal_storage::WalStorage;
use safekeeper_protocol::{AcceptorState, ClusterIdentity, Lsn, Term, TermEntry, TermHistory, Tli};
use safekeeper_wal::synthetic::WalBuilder;

const SEGMENT: u32 = 16 << 20;
const START: Lsn = Lsn(SEGMENT as u64);
const MIB: usize = 1 << 20;

fn cluster() -> ClusterIdentity {
    ClusterIdentity {
        system_id: 1,
        name: "bench".to_owned(),
        pg_major: 15,
        segment_size: SEGMENT,
    }
}

/// An empty log, and the WAL to come: it goes on for ever.
struct Log {
    storage: WalStorage,
    wal: WalBuilder,
    _dir: tempfile::TempDir,
}

impl Log {
    fn new() -> Log {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let disk: Arc<dyn Disk> = Arc::new(RealDisk::new(dir.path()));
        let first = TermEntry {
            term: Term(1),
            tli: Tli(1),
            start_lsn: START,
        };
        let state = AcceptorState {
            history: TermHistory::new(vec![first]).expect("a history"),
            ..AcceptorState::unconfigured(cluster())
        };
        ControlFile::create(disk.clone(), &state).expect("a new cluster");
        let mut storage = WalStorage::open(disk, &cluster(), &state).expect("an empty log");
        storage.truncate(Tli(1), START).expect("a log begins");
        storage.prepare_in_background().expect("a thread");
        let wal = WalBuilder::new(storage.format(), 1, START);
        Log {
            storage,
            wal,
            _dir: dir,
        }
    }

    /// The next record, and where it begins.
    fn next(&mut self, len: u32) -> (Lsn, Vec<u8>) {
        let begin = self.wal.position();
        self.wal.noop(len);
        (begin, self.wal.take_bytes())
    }

    fn append(&mut self, begin: Lsn, bytes: &[u8]) {
        self.storage.write(Tli(1), begin, bytes).expect("written");
        let flush_lsn = self.storage.flush().expect("flushed");
        self.storage.remove_before(flush_lsn).expect("removed");
    }
}

fn commit(c: &mut Criterion) {
    let mut log = Log::new();
    c.bench_function("commit", |b| {
        b.iter_custom(|n| {
            let mut spent = std::time::Duration::ZERO;
            for _ in 0..n {
                let (begin, bytes) = log.next(400);
                let begun = std::time::Instant::now();
                log.append(begin, &bytes);
                spent += begun.elapsed();
            }
            spent
        });
    });
}

fn append(c: &mut Criterion) {
    let mut log = Log::new();
    let mut group = c.benchmark_group("append");
    group.throughput(Throughput::Bytes(MIB as u64));
    group.sample_size(30);
    group.bench_function("1 MiB and a flush", |b| {
        b.iter_custom(|n| {
            let mut spent = std::time::Duration::ZERO;
            for _ in 0..n {
                let begin = log.wal.position();
                while log.wal.position() - begin < MIB as u64 {
                    log.wal.noop(8_000);
                }
                let bytes = log.wal.take_bytes();
                let begun = std::time::Instant::now();
                log.append(begin, &bytes);
                spent += begun.elapsed();
            }
            spent
        });
    });
    group.finish();
}

criterion_group!(benches, commit, append);
criterion_main!(benches);

//! Our reading of WAL against Postgres's own, over more than a gigabyte of it.
//!
//! A stock server writes WAL of every kind. Then the decoder and `pg_waldump` read the same files,
//! and must agree on every record: where it begins, where the one before it began, its length, its
//! transaction, its resource manager; and on where the log ends. Both check each record's CRC, so a
//! record that only one of them believes shows as a difference. No safekeeper takes part.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use cluster_tests::place::{Programs, TestDir, give_to_server_user};
use cluster_tests::poll::{SOON, wait_until};
use cluster_tests::postgres::{Postgres, Stop};
use cluster_tests::process::spawn;
use cluster_tests::wal_compare::WalDir;
use safekeeper_protocol::Lsn;
use safekeeper_wal::decoder::WalDecoder;
use safekeeper_wal::end_of_log::{SegmentFiles, find_end_with};
use safekeeper_wal::format::WalFormat;
use safekeeper_wal::history::TimelineHistory;
use safekeeper_wal::page::PgVersion;
use safekeeper_wal::record::Record;
use safekeeper_wal::segment_name::{SegmentSize, parse_segment_file_name};

const MIB: u64 = 1 << 20;

#[test]
fn a_gigabyte_of_wal_reads_as_pg_waldump_reads_it() {
    let mut server = Server::start(16, TestDir::new());
    server.bulk(6);
    server.large_records(&[1, 2, 3, 8, 16, 33, 64]);
    server.pgbench(Duration::from_secs(10));
    for _ in 0..4 {
        server.crash_under_load();
    }
    let mut switches = 0;
    while switches < 3 || server.wal_written() < 1100 * MIB {
        server.bulk(1);
        server.switch();
        switches += 1;
    }
    let seen = server.finish_and_compare();
    assert!(seen.bytes >= 1024 * MIB, "{seen:?}");
    assert!(seen.switches >= 3 && seen.largest >= 64 << 20, "{seen:?}");
    assert!(
        seen.overwritten >= 1,
        "no crash in the middle of a record: {seen:?}"
    );
}

#[test]
fn wal_in_segments_of_1_mb_reads_as_pg_waldump_reads_it() {
    let mut server = Server::start(1, TestDir::new());
    server.large_records(&[1, 2, 3]);
    server.bulk(1);
    server.switch();
    for _ in 0..3 {
        server.crash_under_load();
    }
    let seen = server.finish_and_compare();
    assert!(seen.switches >= 1 && seen.bytes > 30 * MIB, "{seen:?}");
    assert!(
        seen.overwritten >= 1,
        "no crash in the middle of a record: {seen:?}"
    );
}

/// A server that keeps all the WAL it writes.
struct Server {
    postgres: Postgres,
    archive: PathBuf,
    segment_size: SegmentSize,
    // Dropped last, after the server that lives in it.
    _dir: TestDir,
}

/// What the comparison met.
#[derive(Debug, Default)]
struct Seen {
    records: u64,
    bytes: u64,
    switches: u64,
    overwritten: u64,
    largest: u32,
}

impl Server {
    fn start(segment_mb: u32, dir: TestDir) -> Server {
        let mut postgres =
            Postgres::init(&dir, "server", &[&format!("--wal-segsize={segment_mb}")]);
        let archive = dir.create("archive");
        // Little WAL is kept, so that segments are recycled and hold old bytes behind their end.
        postgres.configure(&format!(
            "fsync = off\nwal_level = logical\nmax_wal_size = '160MB'\nmin_wal_size = '64MB'\n\
             archive_mode = on\narchive_command = 'cp %p {}/%f'",
            archive.display()
        ));
        postgres.start();
        postgres.pgbench_init(5);
        postgres.sql("create table bulk (a int, b text)");
        let segment_size = SegmentSize::new(segment_mb << 20).expect("a legal size");
        Server {
            postgres,
            archive,
            segment_size,
            _dir: dir,
        }
    }

    fn wal_written(&self) -> u64 {
        // The first segment begins at 16 MB or less.
        self.postgres.flush_lsn().0 - 16 * MIB
    }

    /// About 40 MB each by COPY, which writes full pages, and by INSERT.
    fn bulk(&self, times: u32) {
        let copy = self.archive.with_file_name("bulk.copy");
        let copy = copy.display();
        if times > 0 {
            let rows = "select g, repeat(md5(g::text), 8) from generate_series(1, 100000) g";
            self.postgres.sql(&format!("copy ({rows}) to '{copy}'"));
        }
        for _ in 0..times {
            self.postgres.sql(&format!("copy bulk from '{copy}'"));
            self.postgres.sql(
                "insert into bulk select g, repeat('q', 300) from generate_series(1, 100000) g",
            );
            self.postgres.sql("truncate bulk");
        }
    }

    fn large_records(&self, megabytes: &[u32]) {
        for mb in megabytes {
            // One in a transaction, one of an odd length, and a row stored out of line.
            self.postgres.sql(&format!(
                "select pg_logical_emit_message(true, 'x', repeat('0123456789abcdef', {mb} << 16));
                 select pg_logical_emit_message(false, 'y', repeat('y', ({mb} << 20) - 77));
                 insert into bulk select {mb}, string_agg(md5(g::text), '')
                     from generate_series(1, 32768) g"
            ));
        }
    }

    fn switch(&self) {
        self.postgres
            .sql("select pg_switch_wal(); checkpoint; select pg_switch_wal()");
    }

    fn pgbench(&self, time: Duration) {
        self.postgres.pgbench(8, time);
    }

    /// Kills the server while clients write, and while a record of many pages is on its way to
    /// disk: its rest is lost, and recovery marks the place as overwritten.
    fn crash_under_load(&mut self) {
        let mut load = self.postgres.pgbench_command(4, Duration::from_secs(600));
        load.stdout(Stdio::null()).stderr(Stdio::null());
        let mut load = spawn(load).expect("could not start pgbench");
        let mut client = self.postgres.client();
        let mut position = || -> Lsn {
            let row = client
                .query_one("select pg_current_wal_insert_lsn()::text", &[])
                .expect("a position");
            row.get::<_, &str>(0).parse().expect("an LSN")
        };
        let before = position();
        wait_until("pgbench writes", SOON, || position() > before + 200_000);
        let config = self.postgres.config();
        let message = thread::spawn(move || {
            let mut client = config.connect(postgres::NoTls).expect("could not connect");
            // Ends with an error when the server is killed, as it must.
            let _ = client.batch_execute(
                "select pg_logical_emit_message(true, 'crash', repeat('z', 200000000))",
            );
        });
        // Its whole length is reserved first and filled then, much slower than we can ask.
        let deadline = Instant::now() + SOON;
        let mut last = position();
        loop {
            let now = position();
            if now - last > 100_000_000 {
                break;
            }
            assert!(Instant::now() < deadline, "the message is never written");
            last = now;
        }
        self.postgres.kill9();
        message.join().expect("the thread does not panic");
        load.wait().expect("pgbench ends when its server is gone");
        self.postgres.start();
    }

    /// Stops the server, brings all its WAL into one directory and reads it in both ways.
    fn finish_and_compare(mut self) -> Seen {
        self.postgres.pgbench(4, Duration::from_secs(1));
        // A clean stop archives what is complete, and waits for it.
        self.postgres.stop(Stop::Fast);
        for entry in fs::read_dir(self.postgres.wal_dir())
            .expect("pg_wal is there")
            .flatten()
        {
            let name = entry.file_name();
            let is_segment =
                |name: &str| parse_segment_file_name(name, self.segment_size).is_some();
            let target = self.archive.join(&name);
            if name.to_str().is_some_and(is_segment) && !target.exists() {
                fs::copy(entry.path(), &target).expect("could not copy a segment");
                give_to_server_user(&target);
            }
        }
        let history = TimelineHistory::root(1);
        let archive = WalDir::with_format(self.archive.clone(), history, self.segment_size);
        let seen = compare(&self.archive, archive.begin(), self.segment_size);
        println!("{seen:?}");
        seen
    }
}

/// Reads the WAL of a directory from `begin` on in both ways. Panics at the first difference.
fn compare(dir: &Path, begin: Lsn, segment_size: SegmentSize) -> Seen {
    let first = fs::read_dir(dir)
        .expect("the archive is there")
        .flatten()
        .map(|e| e.path())
        .min();
    let first = fs::read(first.expect("there is WAL")).expect("a segment can be read");
    // The long page header at a segment's start says what the bytes behind it are.
    let magic = u16::from_le_bytes([first[0], first[1]]);
    let system_id = u64::from_le_bytes(first[24..32].try_into().expect("eight bytes"));
    let format = WalFormat {
        version: PgVersion::from_page_magic(magic).expect("a version we know"),
        segment_size,
        system_id,
    };
    let history = TimelineHistory::root(1);
    let mut decoder = WalDecoder::new(format, begin);
    decoder.expect_timelines(history.clone());
    // A crash can leave a switch record whose padding was never written: old bytes stand there.
    decoder.allow_stale_switch_padding();
    let mut files = SegmentFiles::new(dir, history, segment_size);
    let mut dump = Waldump::start(dir, begin);
    let mut seen = Seen::default();
    let end = find_end_with(
        decoder,
        |lsn, buffer| files.read(lsn, buffer),
        |record| {
            let theirs = dump.next_record();
            assert_eq!(
                theirs.as_ref(),
                Some(&Line::of(record)),
                "after {} equal records",
                seen.records
            );
            seen.records += 1;
            seen.switches += u64::from(record.header.is_switch());
            seen.overwritten += u64::from(record.header.is_overwrite_contrecord());
            seen.largest = seen.largest.max(record.header.total_len);
        },
    );
    let end = end.expect("the files can be read");
    assert_eq!(
        dump.next_record(),
        None,
        "we stop at {} ({})",
        end.end,
        end.reason
    );
    seen.bytes = end.end - begin;
    seen
}

/// What both sides can tell of a record.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    start_lsn: Lsn,
    prev_lsn: Lsn,
    total_len: u32,
    xid: u32,
    rmgr: String,
}

impl Line {
    fn of(record: &Record) -> Line {
        let header = &record.header;
        let rmgr = RMGR_NAMES
            .get(usize::from(header.rmgr_id))
            .copied()
            .unwrap_or("unknown");
        Line {
            start_lsn: record.start_lsn,
            prev_lsn: header.prev_lsn,
            total_len: header.total_len,
            xid: header.xid,
            rmgr: rmgr.to_owned(),
        }
    }

    /// `rmgr: Heap  len (rec/tot): 54/ 150, tx: 730, lsn: 0/01500028, prev 0/014FFFC8, desc: …`
    fn parse(text: &str) -> Option<Line> {
        let after = |label: &str| {
            text.find(label)
                .map(|at| text[at + label.len()..].trim_start())
        };
        let until_comma = |label: &str| after(label)?.split(',').next();
        Some(Line {
            rmgr: text
                .strip_prefix("rmgr: ")?
                .split_whitespace()
                .next()?
                .to_owned(),
            total_len: until_comma("len (rec/tot): ")?
                .split('/')
                .nth(1)?
                .trim()
                .parse()
                .ok()?,
            xid: until_comma("tx: ")?.trim().parse().ok()?,
            start_lsn: until_comma(" lsn: ")?.parse().ok()?,
            prev_lsn: until_comma(" prev ")?.parse().ok()?,
        })
    }
}

/// In the order of their numbers. (`access/rmgrlist.h`)
const RMGR_NAMES: [&str; 22] = [
    "XLOG",
    "Transaction",
    "Storage",
    "CLOG",
    "Database",
    "Tablespace",
    "MultiXact",
    "RelMap",
    "Standby",
    "Heap2",
    "Heap",
    "Btree",
    "Hash",
    "Gin",
    "Gist",
    "Sequence",
    "SPGist",
    "BRIN",
    "CommitTs",
    "ReplicationOrigin",
    "Generic",
    "LogicalMessage",
];

/// `pg_waldump` at work, from a position to the end of the log.
struct Waldump {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Waldump {
    fn start(dir: &Path, begin: Lsn) -> Waldump {
        let mut command = Command::new(Programs::postgres("pg_waldump"));
        command
            .arg("--path")
            .arg(dir)
            .args(["--timeline", "1", "--start", &begin.to_string()]);
        // What it says at the log's end, which it takes for an error, is not of interest.
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = spawn(command).expect("could not start pg_waldump");
        let stdout = child.stdout.take().expect("it is piped");
        Waldump {
            child,
            lines: BufReader::with_capacity(1 << 20, stdout),
        }
    }

    fn next_record(&mut self) -> Option<Line> {
        let mut line = Vec::new();
        loop {
            line.clear();
            if self
                .lines
                .read_until(b'\n', &mut line)
                .expect("the pipe can be read")
                == 0
            {
                return None;
            }
            // A description may hold line breaks; only lines that begin a record are of interest.
            if let Some(record) = Line::parse(&String::from_utf8_lossy(&line)) {
                return Some(record);
            }
        }
    }
}

impl Drop for Waldump {
    fn drop(&mut self) {
        // It may still have much to say, if the comparison failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! `safekeeper tail` beside `pg_waldump`, and over the loss of whom it follows.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use cluster_tests::Cluster;
use cluster_tests::place::{Programs, unused_address};
use cluster_tests::poll::{SOON, wait_until};
use cluster_tests::process::Process;
use cluster_tests::wal_compare::WalDir;
use safekeeper_protocol::Lsn;
use safekeeper_wal::{SegmentSize, segment_file_name};

/// The same records, with the same lengths, transactions, positions and blocks, from a safekeeper and
/// from the primary itself.
#[test]
fn tail_prints_what_pg_waldump_prints() {
    let address = unused_address();
    let settings = format!(
        "wal_keep_size = '1GB'\nlisten_addresses = '{}'\nautovacuum = off",
        address.ip()
    );
    let cluster = Cluster::start_with(&settings, &[]);
    let begin = WalDir::new(cluster.safekeepers[0].wal_dir(cluster.system_id)).begin();
    cluster.primary.pgbench_init(1);
    cluster.primary.sql("select pg_switch_wal()");
    cluster.primary.sql("checkpoint");
    cluster.primary.pgbench(2, Duration::from_secs(2));
    cluster.primary.sql("vacuum analyze");
    // Longer than the messages it comes in.
    cluster
        .primary
        .sql("select pg_logical_emit_message(true, 'x', repeat('long', 1000000))");
    let end = cluster.wait_all_caught_up(SOON);
    let expected = waldump(&cluster.primary.wal_dir(), begin, end);
    assert!(expected.len() > 1000, "{} records", expected.len());
    for from in [
        cluster.safekeepers[1].address().to_string(),
        format!("{}:5432", address.ip()),
    ] {
        let range = ["--start", &begin.to_string(), "--end", &end.to_string()].map(str::to_owned);
        let lines = tail(&from, &range);
        assert_eq!(lines.len(), expected.len(), "{from}");
        for (line, expected) in lines.iter().zip(&expected) {
            assert_says_the_same(line, expected);
        }
        let summary = tail(&from, &[&range[..], &["--summary".to_owned()]].concat());
        let all = summary.last().expect("a last line");
        let mut words = all.split_whitespace();
        assert_eq!(words.next(), Some("all"));
        assert_eq!(words.next(), Some(expected.len().to_string().as_str()));
        // In the middle of the log, and of a record.
        let middle = end.segment_start(8192) + 4096;
        let tail_of = tail(&from, &["--start".to_owned(), middle.to_string()]);
        let begins_behind = |line: &&String| lsn_of(line, "lsn: ") >= middle;
        let behind: Vec<_> = expected.iter().filter(begins_behind).collect();
        assert!(tail_of.len() >= behind.len());
        for (line, expected) in tail_of.iter().zip(behind) {
            assert_says_the_same(line, expected);
        }
    }
}

/// It follows one safekeeper after another, and the log to its next timeline: no record is missed, none
/// comes twice.
#[test]
fn tail_follows_over_a_lost_safekeeper_and_a_promotion() {
    let mut cluster = Cluster::start_with("wal_keep_size = '1GB'", &[]);
    let begin = WalDir::new(cluster.safekeepers[0].wal_dir(cluster.system_id)).begin();
    let addresses: Vec<_> = cluster
        .safekeepers
        .iter()
        .map(|safekeeper| safekeeper.address().to_string())
        .collect();
    let mut command = Command::new(Programs::safekeeper());
    command.args(["tail", "--follow", "--start", &begin.to_string()]);
    command.args(["--from", &addresses.join(",")]);
    let log = cluster.dir.path().join("tail.log");
    let tail = Process::start("tail", command, &log);
    let standby = cluster.start_standby("standby");
    cluster.primary.pgbench_init(1);
    cluster.primary.pgbench(2, Duration::from_secs(1));
    let end = cluster.wait_all_caught_up(SOON);
    wait_until("tail has come so far", SOON, || printed_to(&tail) >= end);

    cluster.safekeepers[0].kill9();
    cluster.primary.pgbench(2, Duration::from_secs(1));
    let end = cluster.primary.flush_lsn();
    wait_until("it goes on elsewhere", SOON, || printed_to(&tail) >= end);

    cluster.primary.kill9();
    assert_eq!(standby.value("select walproposer_promote(60)"), "t");
    standby.pgbench(2, Duration::from_secs(1));
    let end = standby.flush_lsn();
    wait_until("it goes on on the next timeline", SOON, || {
        printed_to(&tail) >= end
    });

    let text = tail.log();
    assert!(text.contains("goes on at"), "{text}");
    assert!(text.contains("timeline 2 begins at"), "{text}");
    let records: Vec<_> = text
        .lines()
        .filter(|line| line.starts_with("rmgr: "))
        .collect();
    for pair in records.windows(2) {
        assert_eq!(
            lsn_of(pair[1], "prev "),
            lsn_of(pair[0], "lsn: "),
            "{}\n{}",
            pair[0],
            pair[1]
        );
    }
    assert!(lsn_of(records[0], "lsn: ") < begin + 100);
}

/// Nobody is there: exit code 3. WAL that was never written, and words that are none: 1 and 2.
#[test]
fn tail_says_why_it_cannot() {
    let cluster = Cluster::start();
    let here = cluster.safekeepers[0].address().to_string();
    let nobody = unused_address().to_string();
    for (arguments, code) in [
        (vec!["--from", &nobody, "--start", "0/1000000"], 3),
        (vec!["--from", &here], 2),
        (vec!["--from", &here, "--start", "zero"], 2),
        (
            vec!["--from", &here, "--start", "0/1000000", "--timeline", "7"],
            1,
        ),
    ] {
        let mut command = Command::new(Programs::safekeeper());
        let output = command
            .arg("tail")
            .args(&arguments)
            .output()
            .expect("it runs");
        assert_eq!(output.status.code(), Some(code), "{arguments:?}");
        assert!(!output.stderr.is_empty(), "{arguments:?}");
    }
}

fn tail(from: &str, arguments: &[String]) -> Vec<String> {
    let mut command = Command::new(Programs::safekeeper());
    command.args(["tail", "--user", "postgres", "--from", from]);
    command.args(arguments);
    lines_of(command)
}

fn waldump(wal: &Path, begin: Lsn, end: Lsn) -> Vec<String> {
    let size = SegmentSize::DEFAULT;
    let segment = segment_file_name(1, begin.segno(size.bytes()), size);
    let mut command = Command::new(Programs::postgres("pg_waldump"));
    command.arg("--path").arg(wal);
    command.args(["--start", &begin.to_string(), "--end", &end.to_string()]);
    command.arg(segment);
    let last = segment_file_name(1, Lsn(end.0 - 1).segno(size.bytes()), size);
    command.arg(last);
    lines_of(command)
}

fn lines_of(mut command: Command) -> Vec<String> {
    let output = command.output().expect("it runs");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {complaint}");
    let text = String::from_utf8(output.stdout).expect("it is text");
    text.lines().map(str::to_owned).collect()
}

#[track_caller]
fn assert_says_the_same(line: &str, expected: &str) {
    let parts = |line: &str| -> (String, String, String) {
        let (header, desc) = line.split_once(", desc: ").expect("it has a description");
        let blocks = desc.find(", blkref #").map_or("", |at| &desc[at..]);
        let name = desc.split([' ', ',']).next().unwrap_or_default();
        (
            header.to_owned(),
            name.to_owned(),
            blocks.trim_end().to_owned(),
        )
    };
    let (ours, theirs) = (parts(line), parts(expected));
    assert_eq!(ours.0, theirs.0);
    assert_eq!(ours.2, theirs.2, "{expected}");
    assert!(ours.1 == theirs.1 || ours.1 == "info", "{line}\n{expected}");
}

fn lsn_of(line: &str, name: &str) -> Lsn {
    let at = line.find(name).expect("it is there") + name.len();
    let text = line[at..].split(',').next().expect("there is one");
    text.parse().expect("a position")
}

/// Where the last record that was printed begins, and what it is long, at least.
fn printed_to(tail: &Process) -> Lsn {
    let text = tail.log();
    let whole = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
    let last = whole.lines().rfind(|line| line.starts_with("rmgr: "));
    last.map_or(Lsn::INVALID, |line| {
        let tot = line.split("len (rec/tot):").nth(1).and_then(|rest| {
            let tot = rest.split('/').nth(1)?.split(',').next()?;
            tot.trim().parse::<u64>().ok()
        });
        let end = lsn_of(line, "lsn: ") + tot.expect("a length");
        // Records begin at multiples of eight.
        Lsn(end.0.next_multiple_of(8))
    })
}

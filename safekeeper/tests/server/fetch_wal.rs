//! `fetch-wal` against a daemon: what it brings, what it leaves alone, and what it says.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use safekeeper::fetch_wal::{FetchError, FetchRequest, fetch_wal};
use safekeeper_protocol::*;
use safekeeper_wal::{SegmentSize, segment_file_name};

use super::client::{LOG_START, SEGMENT};
use super::{Daemon, promoted, some_wal, wait_for};

/// A data directory in recovery.
struct Recovery {
    dir: tempfile::TempDir,
    from: Vec<String>,
}

impl Recovery {
    /// It asks these; addresses or lists of them.
    fn of(from: &[&str]) -> Recovery {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(dir.path().join("pg_wal")).expect("made");
        let from = from.iter().map(|text| (*text).to_owned()).collect();
        Recovery { dir, from }
    }

    fn path(&self) -> PathBuf {
        self.pg_wal().join("RECOVERYXLOG")
    }

    fn pg_wal(&self) -> PathBuf {
        self.dir.path().join("pg_wal")
    }

    fn touch(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.dir.path().join(name), bytes).expect("written");
    }

    /// What is brought. On an error there must be no file, and nothing is left behind in any case.
    fn fetch(&self, file: &str) -> Result<Vec<u8>, FetchError> {
        let before = names(&self.pg_wal());
        let request = FetchRequest {
            file,
            from: &self.from,
            cluster: None,
            user: Some("me"),
        };
        let fetched = fetch_wal(&request, &self.path()).map(|()| {
            let bytes = std::fs::read(self.path()).expect("it is there");
            std::fs::remove_file(self.path()).expect("ours");
            bytes
        });
        assert_eq!(names(&self.pg_wal()), before, "after {file}: {fetched:?}");
        fetched
    }

    /// The exit code, and what is said with it.
    fn refused(&self, file: &str) -> (u8, String) {
        let error = self.fetch(file).expect_err(file);
        (error.exit_code(&self.path()), error.message().to_owned())
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("a directory");
    let names = entries.map(|entry| entry.expect("an entry").file_name().into_string());
    let mut names: Vec<_> = names.map(|name| name.expect("UTF-8")).collect();
    names.sort();
    names
}

fn segment_name(tli: u32, lsn: Lsn) -> String {
    let size = SegmentSize::new(SEGMENT as u32).expect("a size");
    segment_file_name(tli, lsn.0 / SEGMENT, size)
}

/// `bytes` and zeros up to the size of a segment.
fn filled_up(bytes: &[u8]) -> Vec<u8> {
    let mut whole = bytes.to_vec();
    whole.resize(SEGMENT as usize, 0);
    whole
}

#[test]
fn segments_and_histories_are_brought_as_far_as_they_are_committed() {
    let daemon = Daemon::start();
    let wal = some_wal(2 * SEGMENT + SEGMENT / 2);
    let switch = wal.position();
    drop(daemon.with_log(&wal));
    let recovery = Recovery::of(&[&daemon.address().to_string()]);
    let segments = |n: u64| LOG_START + n * SEGMENT;
    let newest = segments(2);
    let size = SEGMENT as usize;

    assert!(recovery.fetch(&segment_name(1, segments(0))) == Ok(wal.bytes()[..size].to_vec()));
    assert!(
        recovery.fetch(&segment_name(1, segments(1))) == Ok(wal.bytes()[size..2 * size].to_vec())
    );
    let part = filled_up(wal.bytes_from(newest));
    assert!(recovery.fetch(&segment_name(1, newest)) == Ok(part));
    let (before, after) = (LOG_START - Lsn(SEGMENT), segments(3));
    for file in [
        &segment_name(1, after),
        &segment_name(2, newest),
        // No segment at all for this size.
        "000000010000000000001000",
        "FFFFFFFFFFFFFFFFFFFFFFFF",
        "00000001FFFFFFFF00000FFF",
        "000000000000000000000001",
        "00000001.history",
        "00000002.history",
        "000000010000000000000002.00000028.backup",
        "000000010000000000000002.partial",
        "00000001000000000000000g",
    ] {
        assert_eq!(recovery.refused(file).0, 1, "{file}");
    }
    let (code, text) = recovery.refused(&segment_name(1, Lsn(before)));
    assert_eq!(code, 1);
    assert!(text.contains("has already been removed"), "{text}");

    // Another reigns on timeline 2.
    let (mut successor, history) = promoted(&daemon, switch);
    let mut more = wal.clone();
    more.set_tli(2);
    more.noop(30_000);
    successor
        .append(switch, more.bytes_from(switch))
        .expect("appended");
    assert_eq!(recovery.refused("00000002.history").0, 1, "not committed");
    successor.commit(more.position());
    assert_eq!(recovery.fetch("00000002.history"), Ok(history));
    assert_eq!(recovery.refused("00000003.history").0, 1);
    // Whole segments of the older timeline, and the one in which it ended, under either name.
    assert!(
        recovery.fetch(&segment_name(1, segments(1))) == Ok(wal.bytes()[size..2 * size].to_vec())
    );
    let ended = filled_up(wal.bytes_from(newest));
    assert!(recovery.fetch(&segment_name(1, newest)) == Ok(ended));
    let part = filled_up(more.bytes_from(newest));
    assert!(recovery.fetch(&segment_name(2, newest)) == Ok(part));
}

#[test]
fn a_part_does_not_replace_a_file_that_begins_with_it() {
    let daemon = Daemon::start();
    let wal = some_wal(SEGMENT / 2);
    drop(daemon.with_log(&wal));
    let recovery = Recovery::of(&[&daemon.address().to_string()]);
    let name = segment_name(1, LOG_START);
    let beside = format!("pg_wal/{name}");
    let part = filled_up(wal.bytes());
    let longer = {
        let mut longer = wal.clone();
        longer.noop(3000);
        filled_up(longer.bytes())
    };
    for (local, is_kept) in [
        (&part, true),
        (&longer, true),
        // Shorter; other bytes; a segment that is to be used again.
        (&filled_up(&wal.bytes()[..5000]), false),
        (&filled_up(&[7; 5000]), false),
        (&vec![], false),
    ] {
        recovery.touch(&beside, local);
        if is_kept {
            let (code, text) = recovery.refused(&name);
            assert_eq!(code, 1);
            assert!(text.contains("in pg_wal already"), "{text}");
        } else {
            assert!(recovery.fetch(&name) == Ok(part.clone()));
        }
        assert!(std::fs::read(recovery.dir.path().join(&beside)).expect("there") == *local);
    }
    // pg_rewind names the file itself.
    let path = recovery.pg_wal().join(&name);
    let request = FetchRequest {
        file: &name,
        from: &recovery.from,
        ..FetchRequest::default()
    };
    assert_eq!(fetch_wal(&request, &path), Ok(()));
    assert!(std::fs::read(&path).expect("there") == part);
}

#[test]
fn who_is_silent_or_gone_does_not_hold_up_the_others() {
    let daemon = Daemon::start();
    let wal = some_wal(SEGMENT + SEGMENT / 2);
    drop(daemon.with_log(&wal));
    // The kernel accepts for it.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let silent = silent
        .local_addr()
        .map(|address| (silent, address.to_string()));
    let (_silent, silent) = silent.expect("bound");
    let good = daemon.address().to_string();
    let recovery = Recovery::of(&[&silent, "127.0.0.1:1", &good]);
    let (whole, part) = (LOG_START, LOG_START + SEGMENT);
    let started = Instant::now();
    assert!(recovery.fetch(&segment_name(1, whole)).is_ok());
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "it waited for the others"
    );
    assert!(recovery.fetch(&segment_name(1, part)).is_ok());
    assert_eq!(recovery.refused(&segment_name(1, part + SEGMENT)).0, 1);
    assert!(started.elapsed() < Duration::from_secs(9));

    // One of three is no majority: a recovery that would end here must not take its word.
    recovery.touch("recovery.signal", b"");
    assert!(recovery.fetch(&segment_name(1, whole)).is_ok());
    for file in [
        segment_name(1, part),
        segment_name(1, part + SEGMENT),
        "00000002.history".into(),
    ] {
        let (code, text) = recovery.refused(&file);
        assert_eq!(code, 128, "{file}: {text}");
        assert!(text.contains("127.0.0.1:1: could not connect"), "{text}");
        assert!(text.contains("no answer within"), "{text}");
    }
    // Two of three are.
    let recovery = Recovery::of(&[
        &good,
        "127.0.0.1:1",
        &good.replace("127.0.0.1", "localhost"),
    ]);
    recovery.touch("recovery.signal", b"");
    assert!(recovery.fetch(&segment_name(1, part)).is_ok());
    assert_eq!(recovery.refused(&segment_name(1, part + SEGMENT)).0, 1);
    // A standby asks again.
    recovery.touch("standby.signal", b"");
    let nobody = Recovery::of(&["127.0.0.1:1"]);
    assert_eq!(nobody.refused(&segment_name(1, part)).0, 1);
    let nobody_named = Recovery::of(&[]);
    let (code, text) = nobody_named.refused(&segment_name(1, part));
    assert_eq!(code, 2);
    assert!(text.contains("--from"), "{text}");
    nobody_named.touch("recovery.signal", b"");
    assert_eq!(nobody_named.refused(&segment_name(1, part)).0, 128);
}

/// The one that has most of the newest segment breaks off in the middle of it. A standby takes what
/// another one has, and asks again; a recovery that would end there must not.
#[test]
fn a_recovery_does_not_end_short_of_what_was_offered() {
    let (more, less) = (Daemon::start(), Daemon::start());
    let (long, short) = (some_wal(3 * SEGMENT / 4), some_wal(SEGMENT / 4));
    drop(more.with_log(&long));
    drop(less.with_log(&short));
    let breaks_off = relay_of(
        more.address(),
        usize::try_from(SEGMENT / 2).expect("it fits"),
    );
    let recovery = Recovery::of(&[&breaks_off.to_string(), &less.address().to_string()]);
    let file = segment_name(1, LOG_START);
    recovery.touch("standby.signal", b"");
    assert!(recovery.fetch(&file) == Ok(filled_up(short.bytes())));
    std::fs::remove_file(recovery.dir.path().join("standby.signal")).expect("ours");
    recovery.touch("recovery.signal", b"");
    let (code, text) = recovery.refused(&file);
    assert_eq!(code, 128, "{text}");
    assert!(text.contains(&breaks_off.to_string()), "{text}");
}

/// Passes on what a client says, and of the answer so many bytes; then it hangs up.
fn relay_of(target: std::net::SocketAddr, answer_len: usize) -> std::net::SocketAddr {
    use std::io::{Read, copy};
    use std::net::{Shutdown, TcpStream};
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        while let Ok((client, _)) = listener.accept() {
            let server = TcpStream::connect(target).expect("a daemon");
            let (mut from, mut to) = (
                client.try_clone().expect("one"),
                server.try_clone().expect("one"),
            );
            std::thread::spawn(move || copy(&mut from, &mut to));
            let _ = copy(&mut (&server).take(answer_len as u64), &mut &client);
            let _ = client.shutdown(Shutdown::Both);
        }
    });
    address
}

#[test]
fn wal_that_was_there_once_is_not_the_end_of_wal() {
    let daemon = Daemon::with(|config| config.wal_keep_size = 0);
    let wal = some_wal(4 * SEGMENT);
    let mut proposer = daemon.with_log(&wal);
    proposer.truncate_lsn = wal.position();
    proposer.commit(wal.position());
    wait_for("old segments to be removed", || {
        daemon.cluster_status("main").oldest_lsn.0 > LOG_START
    });
    let recovery = Recovery::of(&[&daemon.address().to_string()]);
    let name = segment_name(1, LOG_START);
    assert_eq!(recovery.refused(&name).0, 1);
    recovery.touch("recovery.signal", b"");
    let (code, text) = recovery.refused(&name);
    assert_eq!(code, 128, "{text}");
    assert!(text.contains("has already been removed"), "{text}");
    // A backup that brought it along needs nobody.
    recovery.touch(&format!("pg_wal/{name}"), b"");
    assert_eq!(recovery.refused(&name).0, 1);
}

#[test]
fn another_clusters_wal_is_not_taken() {
    let daemon = Daemon::start();
    let wal = some_wal(SEGMENT);
    drop(daemon.with_log(&wal));
    let recovery = Recovery::of(&[&daemon.address().to_string()]);
    std::fs::create_dir(recovery.dir.path().join("global")).expect("made");
    recovery.touch("global/pg_control", &1u64.to_ne_bytes());
    assert!(recovery.fetch(&segment_name(1, LOG_START)).is_ok());
    recovery.touch("global/pg_control", &2u64.to_ne_bytes());
    let (code, text) = recovery.refused(&segment_name(1, LOG_START));
    assert_eq!(code, 1);
    assert!(
        text.contains("system identifier 1, this server's is 2"),
        "{text}"
    );
    let request = FetchRequest {
        file: "00000002.history",
        from: &recovery.from,
        cluster: Some("other"),
        user: None,
    };
    let refused = fetch_wal(&request, &recovery.path()).expect_err("no such cluster");
    assert!(
        refused.message().contains("\"other\" does not exist"),
        "{refused:?}"
    );
}

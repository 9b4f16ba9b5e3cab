//! Physical replication slots: commands, words, and what stays of them.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use safekeeper::slot_file;
use safekeeper::status::{LsnText, SlotStatus};
use safekeeper_protocol::*;
use safekeeper_wal::synthetic::WalBuilder;

use super::client::{Client, LOG_START, PgError, Proposer, Row, SEGMENT, StreamMessage};
use super::{Daemon, cluster, promoted, some_wal, wait_for};

fn client(daemon: &Daemon) -> Client {
    Client::connect(daemon.address(), &[("application_name", "sb1")]).expect("connected")
}

fn slot_file_of(daemon: &Daemon) -> PathBuf {
    daemon.data_dir().join("1").join("slots")
}

fn slot(daemon: &Daemon, name: &str) -> Option<SlotStatus> {
    let slots = daemon.cluster_status("main").slots;
    slots.into_iter().find(|slot| slot.slot_name == name)
}

fn restart_lsn(daemon: &Daemon, name: &str) -> Option<Lsn> {
    slot(daemon, name)
        .expect("a slot")
        .restart_lsn
        .map(|lsn| lsn.0)
}

fn row(cells: &[Option<&str>]) -> Vec<Row> {
    vec![cells.iter().map(|cell| cell.map(str::to_owned)).collect()]
}

fn error_of<T: std::fmt::Debug>(result: Result<T, PgError>, what: &str) -> (String, String) {
    let error = result.expect_err(what);
    (error.sqlstate, error.message)
}

/// Reports `lsn` as flushed, and waits until that has been taken in.
fn report(standby: &mut Client, lsn: Lsn) {
    standby.standby_reply([lsn, lsn, lsn], true);
    while !matches!(
        standby.stream_message(),
        Ok(StreamMessage::Keepalive { .. })
    ) {}
}

/// More WAL on what the proposer has appended, committed.
fn append_more(proposer: &mut Proposer, wal: &mut WalBuilder, len: u64) {
    let begin = wal.position();
    while wal.position() < begin + len {
        wal.noop(100_000);
    }
    for (n, part) in wal.bytes_from(begin).chunks(100_000).enumerate() {
        let lsn = begin + n as u64 * 100_000;
        proposer.append(lsn, part).expect("appended");
    }
    proposer.commit(wal.position());
}

#[test]
fn slot_commands_answer_as_a_primary_does() {
    let daemon = Daemon::with(|config| config.max_replication_slots = 3);
    let wal = some_wal(10_000);
    let _proposer = daemon.with_log(&wal);
    let mut client = client(&daemon);
    let made = |name| row(&[Some(name), Some("0/0"), None, None]);
    let end = wal.position().to_string();

    for (command, rows) in [
        ("CREATE_REPLICATION_SLOT \"a\" PHYSICAL", made("a")),
        (
            "READ_REPLICATION_SLOT a",
            row(&[Some("physical"), None, None]),
        ),
        (
            "CREATE_REPLICATION_SLOT \"b\" PHYSICAL (RESERVE_WAL)",
            made("b"),
        ),
        (
            "READ_REPLICATION_SLOT \"b\"",
            row(&[Some("physical"), Some(&end), Some("1")]),
        ),
        (
            "CREATE_REPLICATION_SLOT c TEMPORARY PHYSICAL RESERVE_WAL",
            made("c"),
        ),
        ("READ_REPLICATION_SLOT nobody", row(&[None, None, None])),
    ] {
        assert_eq!(client.query(command), Ok(rows), "{command}");
    }
    let error = client
        .query("CREATE_REPLICATION_SLOT d PHYSICAL")
        .expect_err("the limit");
    let expected = PgError {
        sqlstate: "53400".into(),
        message: "all replication slots are in use".into(),
        detail: String::new(),
        hint: "Free one or increase max_replication_slots.".into(),
    };
    assert_eq!(error, expected);
    wait_for("the temporary one to be gone, after an error", || {
        slot(&daemon, "c").is_none()
    });
    for (command, sqlstate, message) in [
        (
            "CREATE_REPLICATION_SLOT a PHYSICAL",
            "42710",
            "replication slot \"a\" already exists",
        ),
        (
            "CREATE_REPLICATION_SLOT \"\" PHYSICAL",
            "42602",
            "replication slot name \"\" is too short",
        ),
        (
            "CREATE_REPLICATION_SLOT \"A b\" PHYSICAL",
            "42602",
            "replication slot name \"A b\" contains invalid character",
        ),
        (
            "DROP_REPLICATION_SLOT nobody WAIT",
            "42704",
            "replication slot \"nobody\" does not exist",
        ),
        (
            "START_REPLICATION SLOT nobody 0/0",
            "42704",
            "replication slot \"nobody\" does not exist",
        ),
        (
            "CREATE_REPLICATION_SLOT l LOGICAL pgoutput",
            "0A000",
            "a safekeeper does not decode WAL for logical replication",
        ),
        (
            "ALTER_REPLICATION_SLOT a (FAILOVER)",
            "0A000",
            "cannot execute SQL commands in WAL sender for physical replication",
        ),
        (
            "CREATE_REPLICATION_SLOT d PHYSICAL (TWO_PHASE)",
            "42601",
            "conflicting or redundant options",
        ),
    ] {
        let error = error_of(client.query(command), command);
        assert_eq!(error, (sqlstate.into(), message.into()), "{command}");
    }
    assert_eq!(client.query("DROP_REPLICATION_SLOT a"), Ok(vec![]));
    assert_eq!(client.query("DROP_REPLICATION_SLOT \"b\" WAIT"), Ok(vec![]));
    assert_eq!(daemon.cluster_status("main").slots, []);
}

#[test]
fn words_follow_the_version_of_the_cluster() {
    let daemon = Daemon::with(|config| config.max_replication_slots = 1);
    let mut shape = cluster(1, "main");
    shape.pg_major = 18;
    let _proposer = Proposer::lead(daemon.address(), shape);
    let mut client = client(&daemon);
    client
        .query("CREATE_REPLICATION_SLOT a PHYSICAL")
        .expect("made");
    let error = client
        .query("CREATE_REPLICATION_SLOT b PHYSICAL")
        .expect_err("the limit");
    assert_eq!(
        error.hint,
        "Free one or increase \"max_replication_slots\"."
    );
    let error = error_of(client.query("ALTER_REPLICATION_SLOT a (FAILOVER)"), "17");
    let expected = "cannot use ALTER_REPLICATION_SLOT with a physical replication slot";
    assert_eq!(error, ("0A000".into(), expected.into()));
    let error = error_of(client.query("ALTER_REPLICATION_SLOT b (FAILOVER)"), "none");
    assert_eq!(error.0, "42704");
}

#[test]
fn a_slot_serves_one_connection_and_can_be_waited_for() {
    let daemon = Daemon::start();
    let wal = some_wal(10_000);
    let _proposer = daemon.with_log(&wal);
    let mut user = client(&daemon);
    user.query("CREATE_REPLICATION_SLOT s PHYSICAL")
        .expect("made");
    let start = format!("START_REPLICATION SLOT s {LOG_START}");
    user.start(&start).expect("streaming");
    let shown = slot(&daemon, "s").expect("a slot");
    assert!(
        shown.active
            && shown
                .active_by
                .expect("who")
                .starts_with("sb1 at 127.0.0.1:")
    );

    let mut other = client(&daemon);
    for command in [start.as_str(), "DROP_REPLICATION_SLOT s"] {
        let error = other.query(command).expect_err("in use");
        assert_eq!(error.sqlstate, "55006", "{error:?}");
        let message = "replication slot \"s\" is active for PID ";
        assert!(error.message.starts_with(message), "{error:?}");
        assert!(error.detail.contains("sb1 at 127.0.0.1:"), "{error:?}");
    }
    // One that waits and goes away, and one that waits and gets it.
    let mut impatient = client(&daemon);
    impatient.send(b'Q', b"DROP_REPLICATION_SLOT s WAIT\0");
    drop(impatient);
    daemon.wait_for_connections(3);
    other.send(b'Q', b"DROP_REPLICATION_SLOT s WAIT\0");
    user.send(b'c', b"");
    user.until_ready().expect("the stream has ended");
    assert_eq!(other.until_ready(), Ok(vec![]));
    assert_eq!(slot(&daemon, "s"), None);
}

#[test]
fn temporary_slots_end_with_their_session() {
    let mut daemon = Daemon::start();
    let wal = some_wal(10_000);
    let _proposer = daemon.with_log(&wal);
    let mut owner = client(&daemon);
    owner
        .query("CREATE_REPLICATION_SLOT t TEMPORARY PHYSICAL (RESERVE_WAL)")
        .expect("made");
    assert!(!slot_file_of(&daemon).exists(), "it is in no file");
    let shown = slot(&daemon, "t").expect("a slot");
    assert!(shown.temporary && shown.active);
    let mut other = client(&daemon);
    let error = other.query("DROP_REPLICATION_SLOT t").expect_err("not its");
    assert_eq!(error.sqlstate, "55006");
    owner
        .start(&format!("START_REPLICATION SLOT t {LOG_START}"))
        .expect("streaming");
    owner.stream_until(LOG_START, wal.position());
    drop(owner);
    wait_for("the end of the slot", || slot(&daemon, "t").is_none());
    let mut owner = client(&daemon);
    owner
        .query("CREATE_REPLICATION_SLOT t TEMPORARY PHYSICAL")
        .expect("made again");
    daemon.restart();
    assert_eq!(slot(&daemon, "t"), None);
}

#[test]
fn a_slot_keeps_wal_for_who_is_away_and_follows_its_reports() {
    let mut daemon = Daemon::with(|config| config.wal_keep_size = 0);
    let mut wal = some_wal(3 * SEGMENT);
    let mut proposer = daemon.with_log(&wal);
    proposer.truncate_lsn = wal.position();
    let mut standby = client(&daemon);
    standby
        .query("CREATE_REPLICATION_SLOT s PHYSICAL")
        .expect("made");
    assert_eq!(slot(&daemon, "s").expect("a slot").wal_status, None);
    standby
        .start(&format!("START_REPLICATION SLOT s {LOG_START}"))
        .expect("streaming");
    let kept = LOG_START + SEGMENT + 4096;
    standby.stream_until(LOG_START, kept);
    report(&mut standby, kept);
    assert_eq!(restart_lsn(&daemon, "s"), Some(kept));
    drop(standby);
    append_more(&mut proposer, &mut wal, 2 * SEGMENT);
    proposer.truncate_lsn = wal.position();
    proposer.commit(wal.position());
    let needed = kept.segment_start(SEGMENT as u32);
    let oldest = |daemon: &Daemon| daemon.cluster_status("main").oldest_lsn.0;
    wait_for("what it does not need to be removed", || {
        oldest(&daemon) == needed
    });
    // The first report was reserved at once; a restart keeps it, and with it the WAL.
    drop(proposer);
    daemon.restart();
    let shown = slot(&daemon, "s").expect("a slot");
    assert_eq!(shown.restart_lsn, Some(LsnText(kept)));
    assert_eq!((shown.active, shown.temporary), (false, false));
    let status = daemon.http("/metrics");
    let metric = format!(
        "safekeeper_slot_restart_lsn{{cluster=\"main\",slot=\"s\"}} {}",
        kept.0
    );
    assert!(status.contains(&metric), "{status}");
    let mut standby = client(&daemon);
    standby
        .start(&format!("START_REPLICATION SLOT s {kept}"))
        .expect("streaming");
    assert!(standby.stream_until(kept, wal.position()) == wal.bytes_from(kept));
    // How far it has come is on disk now and then. Set back, as after a restore, the disk knows within a second.
    let on_disk = || {
        let path = slot_file_of(&daemon);
        let slots = slot_file::decode(&std::fs::read(&path).expect("a file"), &path);
        slots.expect("slots")[0].restart_lsn
    };
    report(&mut standby, wal.position());
    wait_for("the position to be saved", || on_disk() == wal.position());
    let begun = Instant::now();
    report(&mut standby, kept);
    wait_for("the earlier one to be saved", || on_disk() == kept);
    assert!(begun.elapsed() < Duration::from_secs(8), "now and then");
    report(&mut standby, wal.position());
    let mut proposer = Proposer::lead(daemon.address(), cluster(1, "main"));
    proposer.truncate_lsn = wal.position();
    proposer.commit(wal.position());
    wait_for(
        "positions to be saved, and WAL to be removed by them",
        || oldest(&daemon) > needed,
    );
}

/// A daemon of its own process on a data directory, to be killed.
struct Process {
    child: Child,
    address: SocketAddr,
}

impl Process {
    fn run(data_dir: &Path) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_safekeeper"));
        command.arg("run").arg("--data-dir").arg(data_dir);
        command.args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
        let mut child = command.stderr(Stdio::piped()).spawn().expect("it starts");
        let mut log = BufReader::new(child.stderr.take().expect("piped"));
        let mut line = String::new();
        let address = loop {
            line.clear();
            assert!(log.read_line(&mut line).expect("a log") > 0, "it has ended");
            if let Some((_, rest)) = line.split_once("ready listen=") {
                let (address, _) = rest.split_once(' ').expect("an address");
                break address.parse().expect("an address");
            }
        };
        // Nobody else reads what it says.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Process { child, address }
    }

    fn kill9(mut self) {
        self.child.kill().expect("ours");
        self.child.wait().expect("ours");
    }
}

#[test]
fn slots_survive_kill_9_and_say_nothing_newer_than_was_true() {
    let mut daemon = Daemon::start();
    daemon.stop();
    let process = Process::run(&daemon.data_dir());
    let wal = some_wal(100_000);
    let mut proposer = Proposer::lead(process.address, cluster(1, "main"));
    proposer.append_all(&wal, 50_000);
    proposer.commit(wal.position());
    let mut client = Client::connect(process.address, &[]).expect("connected");
    for command in [
        "CREATE_REPLICATION_SLOT reserved PHYSICAL (RESERVE_WAL)",
        "CREATE_REPLICATION_SLOT moved PHYSICAL",
        "CREATE_REPLICATION_SLOT dropped PHYSICAL",
        "CREATE_REPLICATION_SLOT passing TEMPORARY PHYSICAL",
        "DROP_REPLICATION_SLOT dropped",
    ] {
        client.query(command).expect("done");
    }
    client
        .start(&format!("START_REPLICATION SLOT moved {LOG_START}"))
        .expect("streaming");
    let first = LOG_START + 8192;
    client.stream_until(LOG_START, wal.position());
    report(&mut client, first);
    client.hot_standby_feedback(700, 0);
    report(&mut client, wal.position());
    process.kill9();

    daemon.run();
    let slots = daemon.cluster_status("main").slots;
    let shown: Vec<_> = slots
        .iter()
        .map(|slot| (slot.slot_name.as_str(), slot.restart_lsn, slot.active))
        .collect();
    let moved = slots[0].restart_lsn;
    let reserved = Some(LsnText(wal.position()));
    assert_eq!(
        shown,
        [("moved", moved, false), ("reserved", reserved, false)]
    );
    let moved = moved.expect("reserved by the first report").0;
    assert!(first <= moved && moved <= wal.position(), "{moved}");
    assert_eq!(slots[0].xmin, Some(700), "it was the first");
}

#[test]
fn a_slot_that_is_dropped_stays_dropped() {
    let mut daemon = Daemon::start();
    let wal = some_wal(10_000);
    let _proposer = daemon.with_log(&wal);
    let mut client = client(&daemon);
    for name in ["a", "b", "c"] {
        client
            .query(&format!(
                "CREATE_REPLICATION_SLOT {name} PHYSICAL (RESERVE_WAL)"
            ))
            .expect("made");
    }
    client.query("DROP_REPLICATION_SLOT b").expect("dropped");
    daemon.restart();
    let names = |daemon: &Daemon| -> Vec<String> {
        let slots = daemon.cluster_status("main").slots;
        slots.into_iter().map(|slot| slot.slot_name).collect()
    };
    assert_eq!(names(&daemon), ["a", "c"]);
    assert_eq!(restart_lsn(&daemon, "a"), Some(wal.position()));
}

#[test]
fn a_slot_keeps_the_xmin_of_a_standby_that_is_away() {
    let mut daemon = Daemon::start();
    let wal = some_wal(10_000);
    let mut proposer = daemon.with_log(&wal);
    let mut standby = client(&daemon);
    standby
        .query("CREATE_REPLICATION_SLOT s PHYSICAL")
        .expect("made");
    let start = format!("START_REPLICATION SLOT s {LOG_START}");
    standby.start(&start).expect("streaming");
    standby.stream_until(LOG_START, wal.position());
    standby.hot_standby_feedback(1234, 5);
    report(&mut standby, wal.position());
    let xmin = |proposer: &mut Proposer| proposer.commit(wal.position()).feedback.xmin;
    assert_eq!(xmin(&mut proposer), 5 << 32 | 1234);
    // Never backwards.
    standby.hot_standby_feedback(1000, 5);
    report(&mut standby, wal.position());
    assert_eq!(slot(&daemon, "s").expect("a slot").xmin, Some(1234));
    drop(standby);
    wait_for("the standby's end", || {
        !slot(&daemon, "s").expect("a slot").active
    });
    assert_eq!(xmin(&mut proposer), 5 << 32 | 1234);
    drop(proposer);
    daemon.restart();
    let mut proposer = Proposer::lead(daemon.address(), cluster(1, "main"));
    assert_eq!(xmin(&mut proposer), 5 << 32 | 1234);
    let mut standby = client(&daemon);
    standby.start(&start).expect("streaming");
    standby.stream_until(LOG_START, wal.position());
    standby.hot_standby_feedback(0, 0);
    report(&mut standby, wal.position());
    assert_eq!(xmin(&mut proposer), 0, "it needs none any more");
    standby.hot_standby_feedback(1300, 5);
    report(&mut standby, wal.position());
    assert_eq!(xmin(&mut proposer), 5 << 32 | 1300);
    drop(standby);
    let mut client = client(&daemon);
    client
        .query("DROP_REPLICATION_SLOT s WAIT")
        .expect("dropped");
    assert_eq!(xmin(&mut proposer), 0);
}

#[test]
fn a_timeline_switch_leaves_slots_as_they_are() {
    let daemon = Daemon::start();
    let wal = some_wal(10_000);
    let _old = daemon.with_log(&wal);
    let mut standby = client(&daemon);
    standby
        .query("CREATE_REPLICATION_SLOT s PHYSICAL (RESERVE_WAL)")
        .expect("made");
    let start = format!("START_REPLICATION SLOT s {LOG_START} TIMELINE 1");
    standby.start(&start).expect("streaming");
    standby.stream_until(LOG_START, wal.position());
    let switch = wal.position();
    let (mut proposer, _) = promoted(&daemon, switch);
    let mut newer = wal.clone();
    newer.set_tli(2);
    newer.noop(500);
    let bytes = newer.bytes_from(switch).to_vec();
    proposer.append(switch, &bytes).expect("appended");
    proposer.commit(newer.position());
    while standby.stream_message().is_ok() {}
    standby.send(b'c', b"");
    let rows = standby.until_ready().expect("the next timeline");
    assert_eq!(rows, row(&[Some("2"), Some(&switch.to_string())]));
    assert!(!slot(&daemon, "s").expect("a slot").active);
    standby
        .start(&format!("START_REPLICATION SLOT s {switch} TIMELINE 2"))
        .expect("streaming");
    standby.stream_until(switch, newer.position());
    report(&mut standby, newer.position());
    standby.send(b'c', b"");
    standby.until_ready().expect("ended");
    let rows = standby.query("READ_REPLICATION_SLOT s").expect("a row");
    let end = newer.position().to_string();
    assert_eq!(rows, row(&[Some("physical"), Some(&end), Some("2")]));
}

#[test]
fn a_damaged_slot_file_is_loud_and_all_else_is_served() {
    let mut daemon = Daemon::with(|config| config.wal_keep_size = 0);
    let wal = some_wal(3 * SEGMENT);
    let mut proposer = daemon.with_log(&wal);
    let mut user = client(&daemon);
    user.query("CREATE_REPLICATION_SLOT s PHYSICAL (RESERVE_WAL)")
        .expect("made");
    daemon.stop();
    let path = slot_file_of(&daemon);
    let good = std::fs::read(&path).expect("a file");
    let mut bad = good.clone();
    bad[20] ^= 1;
    std::fs::write(&path, &bad).expect("damaged");
    drop(proposer);
    daemon.run();
    let error = daemon.cluster_status("main").slots_error.expect("loud");
    assert!(
        error.contains("slots\" is damaged: its checksum is wrong"),
        "{error}"
    );
    let mut user = client(&daemon);
    for command in [
        "CREATE_REPLICATION_SLOT t PHYSICAL",
        "CREATE_REPLICATION_SLOT t TEMPORARY PHYSICAL",
        "DROP_REPLICATION_SLOT s",
        "READ_REPLICATION_SLOT s",
        "START_REPLICATION SLOT s 0/200000",
    ] {
        let error = user.query(command).expect_err("refused");
        assert_eq!(error.sqlstate, "XX001", "{command}: {error:?}");
        assert_eq!(
            error.detail,
            daemon.cluster_status("main").slots_error.expect("loud")
        );
    }
    // Consumers without a slot, and proposers, don't mind; and WAL is kept for whoever has one.
    user.start(&format!("START_REPLICATION {LOG_START}"))
        .expect("streaming");
    assert!(user.stream_until(LOG_START, wal.position()) == wal.bytes());
    drop(user);
    proposer = Proposer::lead(daemon.address(), cluster(1, "main"));
    proposer.truncate_lsn = wal.position();
    proposer.commit(wal.position());
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        assert_eq!(daemon.cluster_status("main").oldest_lsn.0, LOG_START);
        std::thread::park_timeout(Duration::from_millis(100));
    }
    assert!(
        std::fs::read(&path).expect("a file") == bad,
        "left as it was"
    );
    std::fs::write(&path, &good).expect("mended");
    daemon.restart();
    assert_eq!(restart_lsn(&daemon, "s"), Some(wal.position()));
}

#[test]
fn nothing_reserved_where_nothing_is_known_to_be_committed() {
    let daemon = Daemon::start();
    let _proposer = Proposer::lead(daemon.address(), cluster(1, "main"));
    let mut client = client(&daemon);
    client
        .query("CREATE_REPLICATION_SLOT s PHYSICAL (RESERVE_WAL)")
        .expect("made");
    let restart_lsn = restart_lsn(&daemon, "s");
    assert_eq!(restart_lsn, Some(LOG_START), "the log's begin");
}

//! The daemon's network side: a server in this process, and hand-made clients.

#[path = "server/client.rs"]
mod client;
#[path = "server/fetch_wal.rs"]
mod fetch_wal;
#[path = "server/retention.rs"]
mod retention;
#[path = "server/security.rs"]
mod security;
#[path = "server/slots.rs"]
mod slots;
#[path = "server/tls.rs"]
mod tls;

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use client::{Client, LOG_START, Proposer, SEGMENT, StreamMessage, builder, cluster, entry};
use safekeeper::config::Config;
use safekeeper::identity::{DataDir, random_incarnation};
use safekeeper::server::Server;
use safekeeper::status::{ClusterStatus, Status};
use safekeeper_protocol::*;

/// A data directory and the daemon that runs on it.
struct Daemon {
    dir: tempfile::TempDir,
    config: Config,
    server: Option<Server>,
}

impl Daemon {
    fn start() -> Daemon {
        Daemon::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Config)) -> Daemon {
        Daemon::member(1, change)
    }

    fn member(id: u64, change: impl FnOnce(&mut Config)) -> Daemon {
        let dir = tempfile::tempdir().expect("a directory");
        let incarnation = random_incarnation().expect("random bytes");
        DataDir::init(&dir.path().join("d"), MemberId(id), incarnation).expect("initialized");
        let mut config = Config {
            listen: "127.0.0.1:0".into(),
            http: "127.0.0.1:0".into(),
            ..Config::default()
        };
        change(&mut config);
        let mut daemon = Daemon {
            dir,
            config,
            server: None,
        };
        daemon.run();
        daemon
    }

    fn data_dir(&self) -> std::path::PathBuf {
        self.dir.path().join("d")
    }

    fn run(&mut self) {
        let data_dir = DataDir::open(&self.data_dir()).expect("opened");
        self.server = Some(Server::start(data_dir, self.config.clone()).expect("started"));
    }

    fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop();
        }
    }

    fn restart(&mut self) {
        self.stop();
        self.run();
    }

    fn address(&self) -> SocketAddr {
        self.server.as_ref().expect("running").address()
    }

    /// As many as that, and no more, have a thread.
    fn wait_for_connections(&self, n: u32) {
        let metric = format!("safekeeper_connections {n}\n");
        wait_for(metric.trim_end(), || {
            self.http("/metrics").contains(&metric)
        });
    }

    fn http(&self, path: &str) -> String {
        let address = self.server.as_ref().expect("running").http_address();
        let mut socket = TcpStream::connect(address).expect("connected");
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).expect("sent");
        let mut response = String::new();
        socket.read_to_string(&mut response).expect("read");
        response
    }

    fn status(&self) -> Status {
        let response = self.http("/v1/status");
        let (head, body) = response.split_once("\r\n\r\n").expect("a body");
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        serde_json::from_str(body).expect("a status")
    }

    fn cluster_status(&self, name: &str) -> ClusterStatus {
        let clusters = self.status().clusters;
        let found = clusters.into_iter().find(|cluster| cluster.name == name);
        found.unwrap_or_else(|| panic!("no cluster {name}"))
    }

    /// With the log of `system_id` elected, appended and committed.
    fn with_log(&self, wal: &safekeeper_wal::synthetic::WalBuilder) -> Proposer {
        let mut proposer = Proposer::lead(self.address(), cluster(1, "main"));
        let response = proposer.append_all(wal, 100_000);
        assert_eq!(response.flush_lsn, wal.position());
        let committed = proposer.commit(wal.position());
        assert_eq!(committed.commit_lsn, wal.position());
        proposer
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop();
    }
}

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// A bit more than `len` bytes of records.
fn some_wal(len: u64) -> safekeeper_wal::synthetic::WalBuilder {
    let mut wal = builder(1, 1, LOG_START);
    let mut size = 50;
    while wal.position() < LOG_START + len {
        wal.noop(size);
        size = size * 7 % 20_000;
    }
    wal
}

#[test]
fn a_proposer_configures_is_elected_and_appends() {
    let daemon = Daemon::start();
    let mut wal = some_wal(300_000);
    let mut proposer = Proposer::connect(daemon.address(), cluster(1, "main"));
    let greeting = proposer.greet();
    assert_eq!(greeting.member_id, MemberId(1));
    assert!(greeting.configuration.is_none());
    assert_eq!(greeting.rival_heard_ms, AcceptorGreeting::NEVER_HEARD);
    assert!(
        !daemon.data_dir().join("1").exists(),
        "a greeting leaves no trace"
    );
    drop(proposer);

    let mut proposer = Proposer::lead(daemon.address(), cluster(1, "main"));
    let whole = wal.position();
    let record = wal.noop(1000);
    // The last record in two pieces: only whole ones are acknowledged.
    let half = (whole - wal.start()) as usize + 500;
    let response = proposer
        .append(wal.start(), &wal.bytes()[..half])
        .expect("appended");
    assert_eq!(response.flush_lsn, whole);
    let rest = wal.bytes()[half..].to_vec();
    let response = proposer
        .append(wal.start() + half as u64, &rest)
        .expect("appended");
    assert_eq!(response.flush_lsn, record.end_lsn);
    assert_eq!(response.commit_lsn, Lsn::INVALID);
    // A commit_lsn beyond what is flushed here counts as far as it is.
    let response = proposer.commit(record.end_lsn + 1000);
    assert_eq!(response.commit_lsn, record.end_lsn);

    let status = daemon.cluster_status("main");
    assert_eq!(status.flush_lsn.0, record.end_lsn);
    assert_eq!(status.commit_lsn.0, record.end_lsn);
    assert_eq!(status.oldest_lsn.0, LOG_START);
    assert_eq!(status.term, 2);
    assert_eq!(status.configuration.version, "1.1");
    assert_eq!(status.term_history.len(), 1);
    let address = proposer.client.socket.local_addr().expect("an address");
    assert_eq!(status.proposer, Some(address.to_string()));
    drop(proposer);
    wait_for("the proposer's end", || {
        daemon.cluster_status("main").proposer.is_none()
    });
}

#[test]
fn appends_that_arrive_together_are_answered_by_one_flush() {
    let daemon = Daemon::start();
    let mut proposer = Proposer::lead(daemon.address(), cluster(1, "main"));
    let wal = some_wal(3_000_000);
    let response = proposer.append_all(&wal, 1 << 20);
    assert_eq!(response.flush_lsn, wal.position());
    let metrics = daemon.http("/metrics");
    let written = format!(
        "safekeeper_write_wal_bytes_total{{cluster=\"main\"}} {}",
        wal.bytes().len()
    );
    assert!(metrics.contains(&written), "{metrics}");
    assert!(
        metrics.contains("safekeeper_flush_wal_seconds_bucket"),
        "{metrics}"
    );
}

#[test]
fn a_restart_keeps_what_was_promised() {
    let mut daemon = Daemon::start();
    let wal = some_wal(100_000);
    let proposer = daemon.with_log(&wal);
    let history = proposer.history.clone();
    daemon.restart();
    assert!(proposer.client.socket.peer_addr().is_ok());
    let mut again = Proposer::connect(daemon.address(), cluster(1, "main"));
    let greeting = again.greet();
    assert_eq!(greeting.term, Term(2));
    assert_eq!(greeting.history, history);
    assert_eq!(greeting.flush_lsn, wal.position());
    assert_eq!(greeting.commit_lsn, wal.position());
    assert_eq!(greeting.configuration.version.generation, 1);

    let mut again = Proposer::lead(daemon.address(), cluster(1, "main"));
    assert_eq!(again.term, Term(3));
    let mut more = wal.clone();
    more.noop(5000);
    let response = again
        .append(wal.position(), more.bytes_from(wal.position()))
        .expect("appended");
    assert_eq!(response.flush_lsn, more.position());
}

#[test]
fn a_stopping_server_says_so() {
    let mut daemon = Daemon::start();
    let wal = some_wal(10_000);
    let mut proposer = daemon.with_log(&wal);
    let mut standby = Client::connect(daemon.address(), &[]).expect("connected");
    standby
        .start(&format!("START_REPLICATION {LOG_START}"))
        .expect("streaming");
    standby.stream_until(LOG_START, wal.position());
    let mut idle = Client::connect(daemon.address(), &[]).expect("connected");
    daemon.stop();
    for client in [&mut proposer.client, &mut standby, &mut idle] {
        let words = client.last_words().expect("last words");
        assert_eq!(words.sqlstate, "57P01");
    }
}

#[test]
fn clusters_live_side_by_side_and_consumers_choose() {
    let daemon = Daemon::start();
    let wal = some_wal(10_000);
    let error = Client::connect(daemon.address(), &[])
        .expect("connected")
        .query("IDENTIFY_SYSTEM")
        .expect_err("no cluster yet");
    assert_eq!(error.sqlstate, "55000");

    let _one = daemon.with_log(&wal);
    let mut only = Client::connect(daemon.address(), &[]).expect("connected");
    let rows = only.query("IDENTIFY_SYSTEM").expect("the only one");
    assert_eq!(rows[0][0].as_deref(), Some("1"));

    let _two = Proposer::lead(daemon.address(), cluster(2, "other"));
    let error = only.query("IDENTIFY_SYSTEM").expect_err("ambiguous");
    assert!(error.hint.contains("main, other"), "{error:?}");
    for (name, system_id) in [("main", "1"), ("other", "2"), ("2", "2")] {
        let options = format!("-c cluster={name}");
        let mut client =
            Client::connect(daemon.address(), &[("options", &options)]).expect("connected");
        let rows = client.query("IDENTIFY_SYSTEM").expect("chosen");
        assert_eq!(rows[0][0].as_deref(), Some(system_id), "{name}");
    }
    let error = Client::connect(daemon.address(), &[("options", "--cluster=none")])
        .expect_err("no such cluster");
    assert_eq!(error.sqlstate, "3D000");
    assert_eq!(daemon.status().clusters.len(), 2);
}

#[test]
fn proposers_of_another_shape_are_refused_by_name_and_value() {
    let daemon = Daemon::start();
    let _main = Proposer::lead(daemon.address(), cluster(1, "main"));
    let shape = |change: fn(&mut ClusterIdentity)| {
        let mut shape = cluster(1, "main");
        change(&mut shape);
        shape
    };
    for (shape, text) in [
        (shape(|c| c.pg_major = 16), "PostgreSQL version is 16"),
        (
            shape(|c| c.segment_size = 2 << 20),
            "wal_segment_size is 2097152",
        ),
        (shape(|c| c.name = "x".into()), "cluster name is x"),
        (
            shape(|c| c.system_id = 9),
            "\"main\" belongs to system identifier 1",
        ),
        (
            shape(|c| (c.system_id, c.pg_major) = (9, 14)),
            "version 14 is not supported",
        ),
        (
            shape(|c| (c.system_id, c.name) = (9, "a b".into())),
            "\"a b\"",
        ),
    ] {
        let mut proposer = Proposer::connect(daemon.address(), shape);
        let error = proposer.try_greet().expect_err(text);
        assert_eq!(error.sqlstate, "22023", "{error:?}");
        assert!(error.message.contains(text), "{error:?}");
        assert_eq!(proposer.client.receive(), None, "the connection is closed");
    }
    assert_eq!(daemon.status().clusters.len(), 1);
}

#[test]
fn a_deposed_proposer_gets_nothing_acknowledged() {
    let daemon = Daemon::start();
    let wal = some_wal(10_000);
    let mut old = daemon.with_log(&wal);
    let mut new = Proposer::connect(daemon.address(), cluster(1, "main"));
    new.id = ProposerId(8);
    let greeting = new.greet();
    assert!(
        greeting.rival_heard_ms < 20_000,
        "the old one is alive here"
    );
    new.term = Term(3);
    assert!(new.vote().granted);

    let mut more = wal.clone();
    more.noop(100);
    let response = old
        .append(wal.position(), more.bytes_from(wal.position()))
        .expect("answered");
    assert_eq!(response.term, Term(3));
    assert_eq!(response.flush_lsn, wal.position());
    assert_eq!(daemon.cluster_status("main").write_lsn.0, wal.position());
    // Nor does a vote for a lower term count.
    old.term = Term(3);
    assert!(!old.vote().granted);
}

#[test]
fn damaged_wal_is_refused_before_it_is_acknowledged() {
    let daemon = Daemon::start();
    let wal = some_wal(10_000);
    let mut proposer = daemon.with_log(&wal);
    let mut more = wal.clone();
    more.noop(1000);
    let good = more.bytes_from(wal.position()).to_vec();
    let mut damaged = good.clone();
    damaged[700] ^= 4;
    let error = proposer
        .append(wal.position(), &damaged)
        .expect_err("refused");
    assert_eq!(error.sqlstate, "XX001");
    assert_eq!(proposer.client.receive(), None);

    let status = daemon.cluster_status("main");
    assert_eq!(status.damaged_appends, 1);
    assert_eq!(status.flush_lsn.0, wal.position());
    let mut again = Proposer::lead(daemon.address(), cluster(1, "main"));
    let response = again.append(wal.position(), &good).expect("appended");
    assert_eq!(response.flush_lsn, more.position());
}

#[test]
fn a_gap_and_wal_without_an_election_are_refused() {
    let daemon = Daemon::start();
    let wal = some_wal(10_000);
    let mut proposer = daemon.with_log(&wal);
    let mut more = wal.clone();
    more.noop(1000);
    let bytes = more.bytes_from(wal.position()).to_vec();
    let error = proposer
        .append(wal.position() + 8, &bytes[8..])
        .expect_err("a gap");
    assert_eq!(error.sqlstate, "08P01");

    let mut other = Proposer::connect(daemon.address(), cluster(1, "main"));
    let error = {
        other.send_append(wal.position(), &bytes);
        other.receive().expect_err("no greeting")
    };
    assert!(error.message.contains("greeting"), "{error:?}");

    let mut other = Proposer::connect(daemon.address(), cluster(1, "main"));
    other.greet();
    other.term = Term(2);
    let error = other
        .append(wal.position(), &bytes)
        .expect_err("not elected");
    assert_eq!(error.sqlstate, "55000");
    assert_eq!(daemon.cluster_status("main").flush_lsn.0, wal.position());
}

#[test]
fn an_election_that_cannot_be_carried_out_leaves_the_acceptor_as_the_disk_knows_it() {
    let daemon = Daemon::start();
    let mut proposer = Proposer::connect(daemon.address(), cluster(1, "main"));
    let greeting = proposer.greet();
    proposer.configure_first(&greeting);
    proposer.term = Term(2);
    assert!(proposer.vote().granted);
    // A log begins at the start of a segment.
    let nowhere = LOG_START + 4096;
    proposer.history = TermHistory::new(vec![entry(2, 1, nowhere)]).expect("a history");
    proposer.send_elected(nowhere, Vec::new());
    let error = proposer.append_response().expect_err("refused");
    assert_eq!(error.sqlstate, "55000");
    assert!(error.message.contains("0/201000"), "{error:?}");
    drop(proposer);

    let mut again = Proposer::connect(daemon.address(), cluster(1, "main"));
    let greeting = again.greet();
    assert_eq!((greeting.term, greeting.flush_lsn), (Term(2), Lsn::INVALID));
    assert!(greeting.history.is_empty());
    let wal = some_wal(1000);

    // The same where the first part of a record was written before.
    let mut proposer = Proposer::lead(daemon.address(), cluster(1, "main"));
    let response = proposer
        .append(LOG_START, &wal.bytes()[..100])
        .expect("appended");
    assert_eq!(response.flush_lsn, LOG_START);
    drop(proposer);
    let mut proposer = Proposer::connect(daemon.address(), cluster(1, "main"));
    proposer.term = proposer.greet().term.next().expect("a term");
    assert!(proposer.vote().granted);
    let mine = entry(proposer.term.0, 1, nowhere);
    proposer.history = TermHistory::new(vec![mine]).expect("a history");
    proposer.send_elected(nowhere, Vec::new());
    let error = proposer.append_response().expect_err("refused");
    assert_eq!(error.sqlstate, "55000", "{error:?}");
    daemon.with_log(&wal);
}

#[test]
fn what_was_taken_passes_verification() {
    let mut daemon = Daemon::start();
    let wal = some_wal(2 * SEGMENT);
    drop(daemon.with_log(&wal));
    daemon.stop();
    let report = safekeeper::verify::verify(&daemon.data_dir()).expect("a report");
    assert!(report.is_sound(), "{report}");
    assert_eq!(report.clusters[0].end_lsn, wal.position());
}

#[test]
fn garbage_ends_a_connection_and_nothing_else() {
    let daemon = Daemon::with(|config| config.max_connections = 400);
    let mut state = 0x2545_F491_4F6C_DD1Du64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    // Right after connecting.
    for len in (0..200).chain([10_000, 200_000]) {
        let mut client = Client::raw(daemon.address());
        let bytes: Vec<u8> = (0..len).map(|_| random() as u8).collect();
        // It may be thrown out before it has said everything.
        let _ = client.socket.write_all(&bytes);
    }
    // As commands, and as messages of a proposer.
    for push in [false, true] {
        for n in 0..100u64 {
            let mut client = Client::connect(daemon.address(), &[]).expect("connected");
            if push {
                client.start("START_WAL_PUSH").expect("pushing");
            }
            let bytes: Vec<u8> = (0..random() % 500).map(|_| random() as u8).collect();
            if n % 2 == 0 {
                let _ = client.socket.write_all(&bytes);
            } else {
                client.send(if push { b'd' } else { b'Q' }, &bytes);
            }
        }
    }
    let oversized = |client: &mut Client, tag: &[u8]| {
        client.send_raw(&[tag, &[0x7F, 0xFF, 0xFF, 0xFF]].concat());
        let words = client.last_words().expect("last words");
        assert_eq!(words.sqlstate, "08P01", "{words:?}");
    };
    oversized(&mut Client::raw(daemon.address()), b"");
    oversized(
        &mut Client::connect(daemon.address(), &[]).expect("connected"),
        b"Q",
    );
    let mut push = Proposer::connect(daemon.address(), cluster(1, "main"));
    oversized(&mut push.client, b"d");

    // And the daemon is as it was.
    let _leads = Proposer::lead(daemon.address(), cluster(1, "main"));
    wait_for("all threads to end", || {
        daemon
            .http("/metrics")
            .contains("safekeeper_connections 1\n")
    });
}

#[test]
fn a_half_handshake_is_given_up() {
    let daemon = Daemon::start();
    let mut client = Client::raw(daemon.address());
    client.send_raw(&[0, 0, 0]);
    let started = Instant::now();
    assert_eq!(client.last_words().expect("last words").sqlstate, "08006");
    assert!(started.elapsed() < Duration::from_secs(15));
}

#[test]
fn who_gives_no_command_is_sent_away_and_who_gave_one_may_stay() {
    let patience = Duration::from_secs(1);
    let daemon = Daemon::with(|config| config.first_command_timeout = patience);
    let mut user = Client::connect(daemon.address(), &[]).expect("connected");
    user.query("SELECT 1").expect_err("refused, but a command");
    let mut silent = Client::connect(daemon.address(), &[]).expect("connected");
    assert_eq!(silent.last_words().expect("last words").sqlstate, "57P05");
    user.query("SELECT 1").expect_err("refused, as before");
}

#[test]
fn encryption_is_declined_and_later_protocols_are_negotiated() {
    let daemon = Daemon::start();
    let mut client = Client::raw(daemon.address());
    for code in [5679u32, 5680] {
        client.send_raw(&[8u32.to_be_bytes(), (1234 << 16 | code).to_be_bytes()].concat());
        let mut answer = [0];
        client.socket.read_exact(&mut answer).expect("an answer");
        assert_eq!(&answer, b"N");
    }
    let mut body = (3u32 << 16 | 2).to_be_bytes().to_vec();
    body.extend(b"user\0u\0_pq_.new\0on\0\0");
    client.send_raw(&[&(body.len() as u32 + 4).to_be_bytes(), body.as_slice()].concat());
    let (tag, body) = client.receive().expect("an answer");
    assert_eq!(tag, b'v');
    assert_eq!(&body[..8], &[0, 3, 0, 0, 0, 0, 0, 1]);
    assert_eq!(&body[8..], b"_pq_.new\0");
    client.until_ready().expect("ready");
}

#[test]
fn too_many_connections_are_turned_away() {
    let daemon = Daemon::with(|config| config.max_connections = 1);
    let first = Client::connect(daemon.address(), &[]).expect("connected");
    let error = Client::connect(daemon.address(), &[]).expect_err("one too many");
    assert_eq!(error.sqlstate, "53300");
    drop(first);
    daemon.wait_for_connections(0);
    Client::connect(daemon.address(), &[]).expect("there is room again");
}

#[test]
fn commands_answer_as_a_primary_does() {
    let daemon = Daemon::start();
    let wal = some_wal(10_000);
    let _proposer = daemon.with_log(&wal);
    let mut client = Client::connect(daemon.address(), &[]).expect("connected");
    let text = |text: &str| Some(text.to_owned());
    let rows = client.query("IDENTIFY_SYSTEM").expect("a row");
    let end = wal.position().to_string();
    assert_eq!(rows, [vec![text("1"), text("1"), text(&end), None]]);
    for (name, value) in [
        ("wal_segment_size", "1MB"),
        ("data_directory_mode", "0700"),
        ("server_version_num", "150000"),
    ] {
        let rows = client.query(&format!("SHOW {name}")).expect("a row");
        assert_eq!(rows, [vec![text(value)]], "{name}");
    }
    let rows = client.query("READ_REPLICATION_SLOT \"s\"").expect("a row");
    assert_eq!(rows, [vec![None, None, None]]);
    for (command, sqlstate) in [
        ("", "0A000"),
        ("SHOW nonsense", "42704"),
        ("SELECT 1", "0A000"),
        ("TIMELINE_HISTORY 1", "58P01"),
        ("START_REPLICATION SLOT \"s\" 0/200000", "42704"),
        ("START_REPLICATION 0/200000 TIMELINE 3", "XX000"),
        ("START_REPLICATION", "42601"),
        ("IDENTIFY_SYSTEM please", "42601"),
    ] {
        let error = client.query(command).expect_err(command);
        assert_eq!(error.sqlstate, sqlstate, "{command}: {error:?}");
    }
    // The extended protocol: one error, and quiet until Sync.
    client.send(b'P', b"\0SELECT 1\0\0\0");
    client.send(b'B', b"\0\0\0\0\0\0\0\0");
    client.send(b'S', b"");
    assert_eq!(client.until_ready().expect_err("refused").sqlstate, "08P01");
    assert!(client.query("IDENTIFY_SYSTEM").is_ok());
}

#[test]
fn a_consumer_gets_the_bytes_and_never_one_that_is_not_committed() {
    let daemon = Daemon::start();
    let mut wal = builder(1, 1, LOG_START);
    let mut ends = Vec::new();
    for i in 0..60u32 {
        ends.push(wal.noop(i * 997 % 60_000).end_lsn);
        if i == 20 {
            ends.push(wal.switch().end_lsn);
        }
    }
    let mut proposer = Proposer::lead(daemon.address(), cluster(1, "main"));
    let mut standby = Client::connect(daemon.address(), &[]).expect("connected");
    standby
        .start(&format!("START_REPLICATION {LOG_START} TIMELINE 1"))
        .expect("streaming");
    proposer.append_all(&wal, 200_000);
    let mut begin = LOG_START;
    for end in ends {
        proposer.commit(end);
        let got = standby.stream_until(begin, end);
        assert_eq!(
            begin + got.len() as u64,
            end,
            "not a byte more than is committed"
        );
        let at = (begin - LOG_START) as usize;
        assert!(
            got == wal.bytes()[at..at + got.len()],
            "{begin}..{end} differs"
        );
        begin = end;
    }
    // Whoever comes later gets it in long messages.
    let mut late = Client::connect(daemon.address(), &[]).expect("connected");
    late.start("START_REPLICATION PHYSICAL 0/200000")
        .expect("streaming");
    assert!(late.stream_until(LOG_START, wal.position()) == wal.bytes());
    // Either side may end it.
    late.send(b'c', b"");
    let mut tags = String::new();
    while let Some((tag, _)) = late.receive() {
        tags.push(char::from(tag));
        if tag == b'Z' {
            break;
        }
    }
    assert_eq!(tags, "cCCZ");
    assert!(late.query("IDENTIFY_SYSTEM").is_ok());
}

#[test]
fn a_consumer_ahead_of_commit_lsn_waits() {
    let daemon = Daemon::start();
    let wal = some_wal(10_000);
    let mut proposer = daemon.with_log(&wal);
    let mut more = wal.clone();
    let middle = more.noop(100).end_lsn;
    more.noop(100);
    let mut standby = Client::connect(daemon.address(), &[]).expect("connected");
    standby
        .start(&format!("START_REPLICATION {middle}"))
        .expect("streaming");
    // A keepalive shows that it is served, and has nothing.
    standby.standby_reply([middle; 3], true);
    let keepalive = StreamMessage::Keepalive {
        end: wal.position(),
        reply_requested: false,
    };
    assert_eq!(standby.stream_message(), Ok(keepalive));
    let bytes = more.bytes_from(wal.position()).to_vec();
    proposer.append(wal.position(), &bytes).expect("appended");
    proposer.commit(more.position());
    let got = standby.stream_until(middle, more.position());
    assert_eq!(got, more.bytes_from(middle));
}

/// However fast one reports and wishes for answers, it gets its WAL.
#[test]
fn a_consumer_that_never_stops_reporting_is_served() {
    let daemon = Daemon::start();
    let wal = some_wal(10_000);
    let mut proposer = daemon.with_log(&wal);
    let (begin, mut more) = (wal.position(), wal.clone());
    let mut standby = Client::connect(daemon.address(), &[]).expect("connected");
    standby
        .start(&format!("START_REPLICATION {begin}"))
        .expect("streaming");
    let reports = report_that_wants_an_answer().repeat(1000);
    let mut socket = standby.socket.try_clone().expect("another handle");
    // It ends with the socket, which is shut below or when this test fails.
    let flood = std::thread::spawn(move || while socket.write_all(&reports).is_ok() {});
    let shut = Shut(standby.socket.try_clone().expect("another handle"));
    let answer = standby.stream_message();
    assert!(
        matches!(answer, Ok(StreamMessage::Keepalive { .. })),
        "{answer:?}"
    );
    for _ in 0..20 {
        let from = more.position();
        more.noop(100);
        let bytes = more.bytes_from(from).to_vec();
        proposer.append(from, &bytes).expect("appended");
        proposer.commit(more.position());
        standby.stream_until(from, more.position());
    }
    drop(shut);
    flood.join().expect("no panic");
}

/// Reports that come together have one answer, behind all that they say.
#[test]
fn many_wishes_have_few_answers() {
    const N: usize = 6400;
    let daemon = Daemon::start();
    let wal = some_wal(10_000);
    let _proposer = daemon.with_log(&wal);
    let mut standby = Client::connect(daemon.address(), &[]).expect("connected");
    standby
        .start(&format!("START_REPLICATION {}", wal.position()))
        .expect("streaming");
    standby.send_raw(&report_that_wants_an_answer().repeat(N));
    standby.send(b'c', b"");
    let mut n_answers = 0;
    while standby.stream_message().is_ok() {
        n_answers += 1;
    }
    assert!((1..N / 10).contains(&n_answers), "{n_answers}");
    standby.until_ready().expect("the stream has ended");
}

fn report_that_wants_an_answer() -> Vec<u8> {
    let mut report = [&b"d\0\0\0\x26r"[..], &[0; 33]].concat();
    *report.last_mut().expect("a byte") = 1;
    report
}

/// Shuts it, whatever happens.
struct Shut(TcpStream);

impl Drop for Shut {
    fn drop(&mut self) {
        // It may be closed already by the daemon.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

#[test]
fn a_silent_consumer_is_asked_and_then_dropped() {
    let daemon = Daemon::with(|config| {
        config.wal_sender_timeout = Some(Duration::from_millis(600));
    });
    let wal = some_wal(10_000);
    let _proposer = daemon.with_log(&wal);
    let mut standby = Client::connect(daemon.address(), &[]).expect("connected");
    let start = format!("START_REPLICATION {}", wal.position());
    standby.start(&start).expect("streaming");
    for _ in 0..3 {
        let keepalive = StreamMessage::Keepalive {
            end: wal.position(),
            reply_requested: true,
        };
        assert_eq!(standby.stream_message(), Ok(keepalive));
        standby.standby_reply([wal.position(); 3], false);
    }
    let words = standby.last_words().expect("last words");
    assert!(words.message.contains("replication timeout"), "{words:?}");
}

/// One that takes nothing is dropped when the timeout is over; one that takes little at a time is not, though
/// what it says in between waits behind what it is sent.
#[test]
fn a_consumer_that_takes_nothing_is_dropped() {
    let timeout = Duration::from_secs(1);
    let daemon = Daemon::with(|config| config.wal_sender_timeout = Some(timeout));
    // Far more than the sockets of both sides hold.
    let wal = some_wal(32 * SEGMENT);
    let _proposer = daemon.with_log(&wal);
    let start = format!("START_REPLICATION {LOG_START}");
    let [mut slow, mut stalled] = ["slow", "stalled"].map(|name| {
        let client = Client::connect(daemon.address(), &[("application_name", name)]);
        let mut client = client.expect("connected");
        client.start(&start).expect("streaming");
        client
    });
    let streaming = || -> Vec<String> {
        let standbys = daemon.cluster_status("main").standbys;
        standbys.into_iter().map(|s| s.application_name).collect()
    };
    assert_eq!(streaming().len(), 2);
    let begun = Instant::now();
    let mut taken = LOG_START;
    // It reads at its leisure.
    while begun.elapsed() < 5 * timeout && streaming().contains(&"stalled".to_owned()) {
        slow.standby_reply([taken; 3], false);
        let StreamMessage::Wal { begin, wal, .. } = slow.stream_message().expect("WAL") else {
            continue;
        };
        assert_eq!(begin, taken);
        taken = begin + wal.len() as u64;
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(streaming(), ["slow"]);
    // What was on its way is all that comes; it may end with an error.
    let _ = stalled.socket.read_to_end(&mut Vec::new());
    let rest = slow.stream_until(taken, wal.position());
    assert_eq!(rest, wal.bytes_from(taken));
}

#[test]
fn what_standbys_report_reaches_the_proposer_and_the_status() {
    let daemon = Daemon::start();
    let wal = some_wal(10_000);
    let mut proposer = daemon.with_log(&wal);
    let mut standby =
        Client::connect(daemon.address(), &[("application_name", "sb1")]).expect("connected");
    standby
        .start(&format!("START_REPLICATION {LOG_START}"))
        .expect("streaming");
    standby.stream_until(LOG_START, wal.position());
    let (flushed, applied) = (wal.position(), LOG_START + 800);
    standby.hot_standby_feedback(1234, 5);
    standby.standby_reply([flushed, flushed, applied], true);
    standby.stream_message().expect("the reply's reply");
    let response = proposer.commit(wal.position());
    assert_eq!(
        response.feedback,
        StandbyFeedback {
            apply_lsn: applied,
            xmin: 5 << 32 | 1234,
            catalog_xmin: 0
        }
    );
    let shown = &daemon.cluster_status("main").standbys[0];
    assert_eq!(shown.application_name, "sb1");
    assert_eq!(shown.state, "streaming");
    assert_eq!((shown.flush_lsn.0, shown.apply_lsn.0), (flushed, applied));
    drop(standby);
    wait_for("the standby's end", || {
        daemon.cluster_status("main").standbys.is_empty()
    });
    let response = proposer.commit(wal.position());
    assert_eq!(response.feedback, StandbyFeedback::default());
}

#[test]
fn removed_wal_is_refused_in_words_that_tools_know() {
    let daemon = Daemon::with(|config| config.wal_keep_size = 0);
    let wal = some_wal(4 * SEGMENT);
    let mut proposer = daemon.with_log(&wal);
    proposer.truncate_lsn = wal.position();
    proposer.commit(wal.position());
    let newest = wal.position().segment_start(SEGMENT as u32);
    wait_for("old segments to be removed", || {
        daemon.cluster_status("main").oldest_lsn.0 > LOG_START
    });
    let oldest = daemon.cluster_status("main").oldest_lsn.0;
    assert!(oldest <= newest);
    let mut standby = Client::connect(daemon.address(), &[]).expect("connected");
    standby
        .start(&format!("START_REPLICATION {LOG_START}"))
        .expect("a stream that fails");
    let error = standby.until_ready().expect_err("removed");
    assert_eq!(error.sqlstate, "58P01");
    assert_eq!(
        error.message,
        "requested WAL segment 000000010000000000000002 has already been removed"
    );
    // The connection is of use still, and what is kept is served.
    standby
        .start(&format!("START_REPLICATION {oldest}"))
        .expect("streaming");
    assert!(standby.stream_until(oldest, wal.position()) == wal.bytes_from(oldest));

    // A proposer that reads there is told where the log begins.
    let read = ProposerMessage::Read(Read {
        configuration_version: proposer.version,
        term: proposer.term,
        begin_lsn: LOG_START,
        len: 100,
    });
    proposer.send(&read, &[]);
    match proposer.receive() {
        Ok(AcceptorMessage::ReadResponse(response)) => {
            assert_eq!((response.len, response.oldest_lsn), (0, oldest));
        }
        other => panic!("unexpected {other:?}"),
    }
}

#[test]
fn who_lags_too_far_holds_no_wal_back() {
    let daemon = Daemon::with(|config| {
        config.wal_keep_size = 0;
        config.max_wal_keep = Some(2 * SEGMENT);
    });
    let mut wal = some_wal(SEGMENT);
    let mut proposer = daemon.with_log(&wal);
    let mut standby = Client::connect(daemon.address(), &[]).expect("connected");
    standby
        .start(&format!("START_REPLICATION {LOG_START}"))
        .expect("streaming");
    standby.stream_until(LOG_START, wal.position());
    // It reports nothing, and a member is away: truncate_lsn stays where it was.
    let begin = wal.position();
    while wal.position() < LOG_START + 5 * SEGMENT {
        wal.noop(100_000);
    }
    for (n, part) in wal.bytes_from(begin).chunks(100_000).enumerate() {
        let lsn = begin + n as u64 * 100_000;
        proposer.append(lsn, part).expect("appended");
    }
    proposer.commit(wal.position());
    let kept = Lsn(wal.position().0 - 2 * SEGMENT).segment_start(SEGMENT as u32);
    wait_for("the oldest WAL to be removed", || {
        daemon.cluster_status("main").oldest_lsn.0 >= kept
    });
    assert_eq!(daemon.cluster_status("main").oldest_lsn.0, kept);
    let mut other = Client::connect(daemon.address(), &[]).expect("connected");
    other
        .start(&format!("START_REPLICATION {LOG_START}"))
        .expect("a stream that fails");
    let error = other.until_ready().expect_err("removed");
    assert_eq!(error.sqlstate, "58P01");
}

#[test]
fn a_donor_is_read_while_the_term_is_its_own() {
    let daemon = Daemon::start();
    let wal = some_wal(100_000);
    let mut proposer = daemon.with_log(&wal);
    let read = |proposer: &mut Proposer, term, begin_lsn: Lsn, len| {
        let read = ProposerMessage::Read(Read {
            configuration_version: proposer.version,
            term,
            begin_lsn,
            len,
        });
        proposer.send(&read, &[]);
        match proposer.receive_wal() {
            Ok((AcceptorMessage::ReadResponse(response), bytes)) => (response, bytes),
            other => panic!("unexpected {other:?}"),
        }
    };
    let at = LOG_START + 12_345;
    let (response, bytes) = read(&mut proposer, Term(2), at, 50_000);
    assert_eq!(response.begin_lsn, at);
    assert!(bytes == wal.bytes_from(at)[..50_000]);
    let (_, bytes) = read(&mut proposer, Term(2), at, Append::LEN_MAX);
    assert!(bytes == wal.bytes_from(at), "up to the end of the log");
    for term in [1, 3] {
        let (response, bytes) = read(&mut proposer, Term(term), at, 100);
        assert_eq!((response.term, bytes.len()), (Term(2), 0));
    }
    let (_, bytes) = read(&mut proposer, Term(2), wal.position() + 1000, 100);
    assert!(bytes.is_empty());
}

/// A proposer that is elected on timeline 2, which begins at `switch`, and the history file it told.
fn promoted(daemon: &Daemon, switch: Lsn) -> (Proposer, Vec<u8>) {
    let mut promoted = Proposer::connect(daemon.address(), cluster(1, "main"));
    promoted.id = ProposerId(8);
    promoted.greet();
    promoted.term = Term(3);
    let vote = promoted.vote();
    promoted.commit_lsn = vote.commit_lsn;
    promoted.history = vote
        .history
        .succeeded_by(entry(3, 2, switch))
        .expect("a history");
    let content = format!("1\t{switch}\tno recovery target specified\n").into_bytes();
    let file = TimelineFile {
        tli: Tli(2),
        content: content.clone(),
    };
    promoted.elect(switch, vec![file]);
    (promoted, content)
}

#[test]
fn a_timeline_that_has_ended_is_followed_by_the_next() {
    let daemon = Daemon::start();
    let wal = some_wal(100_000);
    let _old = daemon.with_log(&wal);
    let switch = wal.position();
    let mut behind = Client::connect(daemon.address(), &[]).expect("connected");
    behind
        .start(&format!("START_REPLICATION {LOG_START} TIMELINE 1"))
        .expect("streaming");
    behind.stream_until(LOG_START, switch);

    let (mut promoted, content) = promoted(&daemon, switch);
    let mut more = wal.clone();
    more.set_tli(2);
    let first = more.noop(30_000).end_lsn;
    let bytes = more.bytes_from(switch).to_vec();
    promoted.append(switch, &bytes).expect("appended");

    // Nothing of timeline 2 is committed: nobody sees it.
    let mut client = Client::connect(daemon.address(), &[]).expect("connected");
    let rows = client.query("IDENTIFY_SYSTEM").expect("a row");
    assert_eq!(rows[0][1].as_deref(), Some("1"));
    let error = client.query("TIMELINE_HISTORY 2").expect_err("not shown");
    assert_eq!(error.sqlstate, "58P01");

    promoted.commit(first);
    // The one that follows timeline 1 is told that it has ended, and where to go.
    let (tag, _) = behind.stream_message().expect_err("the end of the copy");
    assert_eq!(tag, b'c');
    behind.send(b'c', b"");
    let rows = behind.until_ready().expect("the next timeline");
    let next = vec![Some("2".to_owned()), Some(switch.to_string())];
    assert_eq!(rows, std::slice::from_ref(&next));
    let rows = behind.query("TIMELINE_HISTORY 2").expect("a file");
    assert_eq!(rows[0][0].as_deref(), Some("00000002.history"));
    assert_eq!(rows[0][1].as_deref(), std::str::from_utf8(&content).ok());
    let segment = switch.segment_start(SEGMENT as u32);
    behind
        .start(&format!("START_REPLICATION {segment} TIMELINE 2"))
        .expect("streaming");
    assert!(behind.stream_until(segment, first) == more.bytes_from(segment));

    // Historic from the start: streamed to its end, or nothing to stream at all.
    client
        .start(&format!("START_REPLICATION {LOG_START} TIMELINE 1"))
        .expect("streaming");
    assert!(client.stream_until(LOG_START, switch) == wal.bytes());
    assert_eq!(client.stream_message().expect_err("the end").0, b'c');
    client.send(b'c', b"");
    assert_eq!(
        client.until_ready().expect("the next"),
        std::slice::from_ref(&next)
    );
    let rows = client.query(&format!("START_REPLICATION {switch} TIMELINE 1"));
    assert_eq!(rows.expect("the next"), [next]);
    let error = client
        .query(&format!("START_REPLICATION {} TIMELINE 1", switch + 8))
        .expect_err("not in the history");
    assert!(error.detail.contains("forked from timeline 1"), "{error:?}");
}

#[test]
fn a_corrupt_cluster_is_listed_and_the_others_are_served() {
    let mut daemon = Daemon::start();
    let wal = some_wal(300_000);
    drop(daemon.with_log(&wal));
    drop(Proposer::lead(daemon.address(), cluster(2, "other")));
    daemon.stop();
    flip_bit(&daemon.data_dir().join("1/control"), 30);
    daemon.run();
    let clusters = daemon.status().clusters;
    assert!(clusters[0].error.is_some(), "{clusters:?}");
    assert_eq!(clusters[1].error, None);
    let ready = daemon.http("/readyz");
    assert!(ready.starts_with("HTTP/1.1 503"), "{ready}");
    assert!(daemon.http("/healthz").starts_with("HTTP/1.1 200"));
    let mut proposer = Proposer::connect(daemon.address(), cluster(1, "main"));
    let error = proposer.try_greet().expect_err("not served");
    assert!(error.message.contains("is not served"), "{error:?}");
    drop(Proposer::lead(daemon.address(), cluster(2, "other")));
}

fn flip_bit(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).expect("read");
    bytes[at] ^= 1;
    std::fs::write(path, bytes).expect("written");
}

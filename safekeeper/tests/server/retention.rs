//! What is kept, what goes, who is told, and what is brought from a peer instead.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};

use safekeeper_protocol::*;
use safekeeper_wal::synthetic::WalBuilder;
use safekeeper_wire::channel::Channel;
use safekeeper_wire::pgwire::{ColumnType, Output};
use safekeeper_wire::startup::ssl_request;

use super::client::{Client, LOG_START, PgError, Proposer, SEGMENT, StreamMessage};
use super::{Daemon, cluster, some_wal, wait_for};

fn client(daemon: &Daemon) -> Client {
    Client::connect(daemon.address(), &[("application_name", "sb1")]).expect("connected")
}

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

fn wal_status(daemon: &Daemon) -> Option<String> {
    daemon.cluster_status("main").slots[0].wal_status.clone()
}

/// One that is used, by a standby that reports nothing more after a while.
fn with_slot_at(daemon: &Daemon, lsn: Lsn, end: Lsn) -> Client {
    let mut standby = client(daemon);
    standby
        .query("CREATE_REPLICATION_SLOT s PHYSICAL")
        .expect("made");
    standby
        .start(&format!("START_REPLICATION SLOT s {LOG_START}"))
        .expect("streaming");
    standby.stream_until(LOG_START, end);
    standby.standby_reply([lsn; 3], true);
    while !matches!(
        standby.stream_message(),
        Ok(StreamMessage::Keepalive { .. })
    ) {}
    standby
}

fn assert_lost(daemon: &Daemon) {
    let mut user = client(daemon);
    let error = user
        .query(&format!("START_REPLICATION SLOT s {LOG_START}"))
        .expect_err("lost");
    let expected = PgError {
        sqlstate: "55000".into(),
        message: "can no longer access replication slot \"s\"".into(),
        detail: "This replication slot has been invalidated due to \"wal_removed\".".into(),
        hint: String::new(),
    };
    assert_eq!(error, expected);
    let rows = user.query("READ_REPLICATION_SLOT s").expect("a row");
    assert_eq!(rows, [vec![Some("physical".to_owned()), None, None]]);
    assert_eq!(wal_status(daemon).as_deref(), Some("lost"));
    let metrics = daemon.http("/metrics");
    let lost = "safekeeper_slot_lost{cluster=\"main\",slot=\"s\"} 1";
    assert!(metrics.contains(lost), "{metrics}");
}

#[test]
fn a_slot_that_needs_more_than_may_be_kept_is_lost_for_ever() {
    let mut daemon = Daemon::with(|config| {
        config.wal_keep_size = SEGMENT;
        config.max_wal_keep = Some(3 * SEGMENT);
    });
    let mut wal = some_wal(SEGMENT / 2);
    let mut proposer = daemon.with_log(&wal);
    let mut standby = with_slot_at(&daemon, LOG_START + 8192, wal.position());
    standby.hot_standby_feedback(700, 0);
    wait_for("its xmin to be known", || {
        daemon.cluster_status("main").slots[0].xmin == Some(700)
    });
    assert_eq!(wal_status(&daemon).as_deref(), Some("reserved"));
    append_more(&mut proposer, &mut wal, 2 * SEGMENT);
    proposer.truncate_lsn = wal.position();
    assert_eq!(proposer.commit(wal.position()).feedback.xmin, 700);
    wait_for("more to be kept than anybody else needs", || {
        wal_status(&daemon).as_deref() == Some("extended")
    });
    assert_eq!(daemon.cluster_status("main").oldest_lsn.0, LOG_START);
    append_more(&mut proposer, &mut wal, 2 * SEGMENT);
    wait_for("the slot to be lost", || {
        wal_status(&daemon).as_deref() == Some("lost")
    });
    let words = standby.last_words().expect("last words");
    let text = "terminating connection due to administrator command";
    assert_eq!(
        (words.sqlstate.as_str(), words.message.as_str()),
        ("57P01", text)
    );
    assert_lost(&daemon);
    assert_eq!(proposer.commit(wal.position()).feedback.xmin, 0);
    wait_for("WAL to be removed", || {
        daemon.cluster_status("main").oldest_lsn.0 > LOG_START
    });
    let metrics = daemon.http("/metrics");
    let taken = "safekeeper_removed_needed_wal_bytes_total{cluster=\"main\"} 0";
    assert!(!metrics.contains(taken), "{metrics}");

    drop(proposer);
    daemon.restart();
    assert_lost(&daemon);
    client(&daemon)
        .query("DROP_REPLICATION_SLOT s")
        .expect("dropped");
    assert_eq!(daemon.cluster_status("main").slots, []);
}

/// Whatever the disk has, it is less than what is asked for.
#[test]
fn without_space_the_oldest_wal_goes_but_for_the_newest_segment() {
    let daemon = Daemon::with(|config| {
        config.wal_keep_size = 100 * SEGMENT;
        config.min_free_space = u64::MAX;
    });
    let mut wal = some_wal(SEGMENT / 2);
    let mut proposer = daemon.with_log(&wal);
    let mut standby = with_slot_at(&daemon, LOG_START + 8192, wal.position());
    append_more(&mut proposer, &mut wal, 4 * SEGMENT);
    assert_eq!(standby.last_words().expect("last words").sqlstate, "57P01");
    let newest = wal.position().segment_start(SEGMENT as u32);
    wait_for("all to be removed", || {
        daemon.cluster_status("main").oldest_lsn.0 + SEGMENT >= newest
    });
    assert_lost(&daemon);
    let status = daemon.cluster_status("main");
    assert!(status.oldest_lsn.0 <= newest);
    assert_eq!(status.over_bound.as_deref(), Some("min_free_space"));
    // It goes on all the same.
    append_more(&mut proposer, &mut wal, SEGMENT);
    let mut user = client(&daemon);
    let begin = wal.position().segment_start(8192);
    user.start(&format!("START_REPLICATION {begin}"))
        .expect("streaming");
    assert!(user.stream_until(begin, wal.position()) == wal.bytes_from(begin));
}

fn member(daemon: &Daemon, id: u64) -> Member {
    let mut proposer = Proposer::connect(daemon.address(), cluster(1, "main"));
    let greeting = proposer.greet();
    assert_eq!(greeting.member_id, MemberId(id));
    Member {
        id: greeting.member_id,
        incarnation: greeting.incarnation,
        host: daemon.address().ip().to_string(),
        port: daemon.address().port(),
    }
}

fn member_at(id: u64, address: SocketAddr) -> Member {
    Member {
        id: MemberId(id),
        incarnation: Incarnation(7),
        host: address.ip().to_string(),
        port: address.port(),
    }
}

/// A daemon that keeps nothing that nobody needs, and has removed all of `wal` but its last segments.
fn forgetful(wal: &WalBuilder, peers: &[Member]) -> (Daemon, Proposer, Lsn) {
    let daemon = Daemon::with(|config| config.wal_keep_size = 0);
    configure(&daemon, 1, peers);
    let mut proposer = daemon.with_log(wal);
    proposer.truncate_lsn = wal.position();
    proposer.commit(wal.position());
    wait_for("old segments to be removed", || {
        daemon.cluster_status("main").oldest_lsn.0 > LOG_START + 2 * SEGMENT
    });
    let oldest_lsn = daemon.cluster_status("main").oldest_lsn.0;
    (daemon, proposer, oldest_lsn)
}

fn configure(daemon: &Daemon, id: u64, peers: &[Member]) {
    let mut members = vec![member(daemon, id)];
    members.extend_from_slice(peers);
    let mut proposer = Proposer::connect(daemon.address(), cluster(1, "main"));
    proposer.greet();
    proposer.configure_members(members);
}

fn assert_removed(daemon: &Daemon, start: &str) {
    let mut user = client(daemon);
    user.start(start).expect("a stream that fails");
    let error = user.until_ready().expect_err("removed");
    assert_eq!(
        (error.sqlstate.as_str(), error.message.as_str()),
        (
            "58P01",
            "requested WAL segment 000000010000000000000002 has already been removed"
        )
    );
}

#[test]
fn what_only_a_peer_still_has_is_brought_from_there() {
    let wal = some_wal(4 * SEGMENT);
    let mut peer = Daemon::member(2, |_| {});
    let (daemon, _proposer, oldest_lsn) = forgetful(&wal, &[member(&peer, 2)]);
    configure(&peer, 2, &[member(&daemon, 1)]);
    let of_peer = peer.with_log(&wal);

    let mut user = client(&daemon);
    user.query("CREATE_REPLICATION_SLOT s PHYSICAL")
        .expect("made");
    for start in [
        LOG_START,
        LOG_START + 100,
        LOG_START + (SEGMENT - 8),
        LOG_START + 8192,
        Lsn(oldest_lsn.0 - 8),
    ] {
        user.start(&format!("START_REPLICATION SLOT s {start} TIMELINE 1"))
            .expect("streaming");
        assert!(
            user.stream_until(start, wal.position()) == wal.bytes_from(start),
            "from {start}"
        );
        user.send(b'c', b"");
        user.until_ready().expect("ended");
    }
    let metrics = daemon.http("/metrics");
    let relayed = metrics
        .lines()
        .find_map(|line| line.strip_prefix("safekeeper_relayed_wal_bytes_total{cluster=\"main\"} "))
        .expect("a counter");
    let from_start = |start: Lsn| oldest_lsn - start;
    let most = 4 * from_start(LOG_START) + 8;
    let relayed: u64 = relayed.parse().expect("a number");
    assert!(
        relayed > from_start(LOG_START) && relayed <= most,
        "{relayed} of {most}"
    );

    // A consumer that asks for somebody else, or asks all by itself, is told what there is here.
    for name in ["safekeeper relay", "fetch-wal"] {
        let named = [("application_name", name)];
        let mut user = Client::connect(daemon.address(), &named).expect("connected");
        user.start(&format!("START_REPLICATION {LOG_START}"))
            .expect("a stream that fails");
        assert_eq!(user.until_ready().expect_err("removed").sqlstate, "58P01");
    }
    drop(of_peer);
    peer.stop();
    assert_removed(&daemon, &format!("START_REPLICATION {LOG_START}"));
}

#[test]
fn wal_that_no_peer_has_or_none_that_may_be_believed_is_not_relayed() {
    let wal = some_wal(4 * SEGMENT);
    let other = Daemon::member(2, |_| {});
    let mut of_other = Proposer::lead(other.address(), cluster(2, "other"));
    let other_wal = {
        let mut wal = super::builder(2, 1, LOG_START);
        wal.noop(1000);
        wal
    };
    of_other.append_all(&other_wal, 1 << 20);
    of_other.commit(other_wal.position());
    // A peer that lacks it, too, and would ask us.
    let (lacking, _of_lacking, _) = forgetful(&wal, &[]);
    let mut damaged = wal.bytes().to_vec();
    damaged[20_000] ^= 1;
    let liar = FakePeer::start(damaged, 1);
    let lying = FakePeer::start(wal.bytes().to_vec(), 99);
    let short = FakePeer::start(wal.bytes()[..SEGMENT as usize].to_vec(), 1);
    let peers = [
        member_at(2, other.address()),
        member_at(3, lacking.address()),
        member_at(4, liar),
        member_at(5, lying),
        member_at(6, short),
    ];
    let (daemon, _proposer, _) = forgetful(&wal, &peers);
    assert_removed(&daemon, &format!("START_REPLICATION {LOG_START}"));
}

#[test]
fn a_peer_that_goes_away_is_followed_by_the_next() {
    let wal = some_wal(4 * SEGMENT);
    let second = Daemon::member(3, |_| {});
    let end = 3 * SEGMENT as usize;
    // It says that it has all, sends a little less than a page more than a segment, and is gone.
    let first = FakePeer::start_with(wal.bytes()[..end].to_vec(), 1, SEGMENT as usize + 8000);
    let peers = [member_at(2, first), member(&second, 3)];
    let (daemon, _proposer, oldest_lsn) = forgetful(&wal, &peers);
    assert!(oldest_lsn <= LOG_START + end as u64);
    let _of_second = {
        configure(&second, 3, &[]);
        second.with_log(&wal)
    };
    let mut user = client(&daemon);
    user.start(&format!("START_REPLICATION {LOG_START}"))
        .expect("streaming");
    assert!(user.stream_until(LOG_START, wal.position()) == wal.bytes());
}

/// Answers one connection after another as a safekeeper would, with whatever bytes it is given.
struct FakePeer {
    wal: Vec<u8>,
    system_id: u64,
    sends: usize,
}

impl FakePeer {
    fn start(wal: Vec<u8>, system_id: u64) -> SocketAddr {
        let sends = wal.len();
        FakePeer::start_with(wal, system_id, sends)
    }

    fn start_with(wal: Vec<u8>, system_id: u64, sends: usize) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let address = listener.local_addr().expect("an address");
        let peer = FakePeer {
            wal,
            system_id,
            sends,
        };
        // It ends with the test's process.
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                // The other side hangs up when it has seen enough.
                let _ = peer.serve(socket);
            }
        });
        address
    }

    fn serve(&self, mut socket: TcpStream) -> std::io::Result<()> {
        let mut output = Output::default();
        let mut channel = Channel::from(socket.try_clone()?);
        loop {
            let mut len = [0; 4];
            socket.read_exact(&mut len)?;
            let mut packet = vec![0; u32::from_be_bytes(len) as usize - 4];
            socket.read_exact(&mut packet)?;
            if packet != ssl_request()[4..] {
                break;
            }
            socket.write_all(b"N")?;
        }
        output.authentication_ok();
        output.ready_for_query();
        output.send(&mut channel)?;
        loop {
            let mut head = [0; 5];
            socket.read_exact(&mut head)?;
            let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            let mut body = vec![0; len - 4];
            socket.read_exact(&mut body)?;
            let text = String::from_utf8_lossy(&body).into_owned();
            let Some(rest) = text.strip_prefix("START_REPLICATION PHYSICAL ") else {
                let system_id = self.system_id.to_string();
                let end = (LOG_START + self.wal.len() as u64).to_string();
                output.one_row(&[
                    ("systemid", ColumnType::Text, Some(system_id.as_bytes())),
                    ("timeline", ColumnType::Int4, Some(b"1")),
                    ("xlogpos", ColumnType::Text, Some(end.as_bytes())),
                    ("dbname", ColumnType::Text, None),
                ]);
                output.command_complete("IDENTIFY_SYSTEM");
                output.ready_for_query();
                output.send(&mut channel)?;
                continue;
            };
            let begin: Lsn = rest
                .split(' ')
                .next()
                .expect("a start")
                .parse()
                .expect("an LSN");
            output.copy_both();
            output.send(&mut channel)?;
            let mut at = (begin - LOG_START) as usize;
            while at < self.sends {
                let end = self.sends.min(at + 100_000);
                let position = LOG_START + at as u64;
                output.copy_data(|out| {
                    out.push(b'w');
                    out.extend_from_slice(&position.0.to_be_bytes());
                    out.extend_from_slice(&[0; 16]);
                    out.extend_from_slice(&self.wal[at..end]);
                });
                output.send(&mut channel)?;
                at = end;
            }
            socket.flush()?;
            return Ok(());
        }
    }
}

//! Against a peer that says what a test wants.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread::JoinHandle;

use super::*;

const PATIENCE: Duration = Duration::from_millis(400);

/// The same, that says no more and hangs up.
fn peer_that_hangs_up(script: Vec<u8>) -> (String, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let thread = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().expect("a client");
        let _ = socket.write_all(&script);
        let _ = socket.shutdown(std::net::Shutdown::Write);
        // To close with something unread would take back what was said.
        let _ = socket.read_to_end(&mut Vec::new());
    });
    (address, thread)
}

/// A peer that accepts one connection, says `script` at once, and then reads until the end.
/// The address, and what it was told.
fn peer(script: Vec<u8>) -> (String, JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let thread = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().expect("a client");
        let (mut heard, limit) = (Vec::new(), Some(Duration::from_secs(10)));
        socket.set_read_timeout(limit).expect("a timeout");
        // The client may leave in the middle of it.
        let _ = socket.write_all(&script);
        let _ = socket.read_to_end(&mut heard);
        heard
    });
    (address, thread)
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let len = body.len() as u32 + 4;
    [&[tag], len.to_be_bytes().as_slice(), body].concat()
}

fn welcome() -> Vec<u8> {
    [
        message(b'R', &[0; 4]),
        message(b'S', b"server_version\x0015.0\0"),
        message(b'K', &[0; 8]),
        message(b'Z', b"I"),
    ]
    .concat()
}

fn row(values: &[Option<&str>]) -> Vec<u8> {
    let mut body = (values.len() as u16).to_be_bytes().to_vec();
    for value in values {
        let len = value.map_or(-1, |value| value.len() as i32);
        body.extend(len.to_be_bytes());
        body.extend(value.unwrap_or_default().bytes());
    }
    message(b'D', &body)
}

/// A result of one row, to its end.
fn result(values: &[Option<&str>]) -> Vec<u8> {
    [
        message(b'T', &[0, 0]),
        row(values),
        message(b'C', b"X\0"),
        message(b'Z', b"I"),
    ]
    .concat()
}

fn wal(begin: u64, bytes: &[u8]) -> Vec<u8> {
    let mut body = vec![b'w'];
    body.extend(begin.to_be_bytes());
    body.extend([0; 16]);
    body.extend(bytes);
    message(b'd', &body)
}

fn config(address: String) -> WalClientConfig {
    WalClientConfig {
        address,
        credentials: Credentials::trusted("me"),
        application_name: "test".into(),
        cluster: Some("a b".into()),
        timeout: PATIENCE,
    }
}

/// What comes of a script that goes on behind the welcome.
fn asked<T>(script: &[u8], question: impl FnOnce(WalClient) -> Asked<T>) -> Asked<T> {
    let (address, thread) = peer([welcome().as_slice(), script].concat());
    let answer = WalClient::connect(&config(address)).and_then(question);
    thread.join().expect("no panic");
    answer
}

fn refused<T: std::fmt::Debug>(answer: Asked<T>) -> String {
    answer.expect_err("refused").to_string()
}

#[test]
fn a_session_from_greeting_to_the_end_of_a_timeline() {
    let script = [
        welcome(),
        result(&[Some("7"), Some("2"), Some("0/5000100"), None]),
        result(&[Some("1GB")]),
        message(b'N', b"Mnotice\0\0"),
        result(&[Some("00000002.history"), Some("1\t0/300\tx\n")]),
        message(b'W', &[0, 0, 0]),
        wal(0x100, b"abc"),
        message(
            b'd',
            &[&b"k"[..], &[0, 0, 0, 0, 0, 0, 1, 3], &[0; 8], &[1]].concat(),
        ),
        wal(0x103, b"d"),
        message(b'c', b""),
        message(b'T', &[0, 0]),
        row(&[Some("2"), Some("0/104")]),
        message(b'C', b"START_STREAMING\0"),
        message(b'C', b"START_REPLICATION\0"),
        message(b'Z', b"I"),
    ];
    let (address, thread) = peer(script.concat());
    let mut client = WalClient::connect(&config(address)).expect("connected");
    let identity = client.identify_system().expect("identified");
    let expected = SystemIdentity {
        system_id: 7,
        tli: Tli(2),
        end_lsn: Lsn(0x500_0100),
    };
    assert_eq!(identity, expected);
    assert_eq!(client.segment_size().expect("a size").bytes(), 1 << 30);
    let history = client.timeline_history(Tli(2)).expect("a history");
    assert_eq!(history, "1\t0/300\tx\n");

    let mut stream = client.start_replication(Lsn(0x100), Tli(1)).expect("begun");
    let mut next = || stream.next_event(PATIENCE).expect("sound");
    let wal = |begin, bytes: &[u8]| {
        Some(WalEvent::Wal {
            begin_lsn: Lsn(begin),
            wal: bytes.to_vec(),
        })
    };
    assert_eq!(next(), wal(0x100, b"abc"));
    let keepalive = WalEvent::Keepalive {
        end_lsn: Lsn(0x103),
        reply_requested: true,
    };
    assert_eq!(next(), Some(keepalive));
    assert_eq!(next(), wal(0x103, b"d"));
    let end = TimelineEnd {
        end_lsn: Lsn(0x104),
        next_tli: Tli(2),
    };
    assert_eq!(next(), Some(WalEvent::TimelineEnd(end)));
    assert_eq!(next(), Some(WalEvent::TimelineEnd(end)));
    assert!(stream.into_client().is_some());

    let heard = thread.join().expect("no panic");
    let heard = String::from_utf8_lossy(&heard);
    for text in [
        "user\0me\0",
        "application_name\0test\0",
        "replication\0true\0",
        "options\0-c cluster=a\\ b\0",
        "IDENTIFY_SYSTEM\0",
        "TIMELINE_HISTORY 2\0",
        "START_REPLICATION PHYSICAL 0/100 TIMELINE 1\0",
    ] {
        assert!(heard.contains(text), "{text:?} in {heard:?}");
    }
}

#[test]
fn what_no_server_says_is_an_error_and_no_panic() {
    let (silence, cut_off) = ("no answer", "cut off");
    let identify = |mut client: WalClient| client.identify_system();
    for (script, what) in [
        (vec![], silence),
        (b"D\0\0".to_vec(), silence),
        (vec![b'D', 0xFF, 0xFF, 0xFF, 0xFF], "invalid message length"),
        (vec![b'D', 0, 0, 0, 3], "invalid message length"),
        (message(b'Z', b"I"), "has no row"),
        (message(b'D', b""), cut_off),
        (message(b'D', &[0, 1]), cut_off),
        (message(b'D', &[0, 1, 0, 0, 0, 9, b'1']), cut_off),
        (message(b'D', &[0, 1, 0x7F, 0xFF, 0xFF, 0xFF]), cut_off),
        (message(b'D', &[0, 1, 0, 0, 0, 1, 0xFF]), "no text"),
        (message(b'D', &[0, 0, 9]), "goes on"),
        (result(&[]), "no value 1"),
        (result(&[None, None, None]), "no value 1"),
        (result(&[Some("x"), Some("1"), Some("0/1")]), "\"x\""),
        (result(&[Some("1"), Some("-1"), Some("0/1")]), "\"-1\""),
        (
            result(&[Some("1"), Some("1"), Some("nowhere")]),
            "\"nowhere\"",
        ),
        (
            [row(&[Some("1")]), row(&[Some("1")])].concat(),
            "more than one row",
        ),
        (message(b'G', b""), "0x47"),
        (
            message(b'E', b"C58P01\0Mgone\nfor good\0Dsince then\0\0"),
            "gone for good (since then)",
        ),
        (message(b'E', b""), ""),
    ] {
        let text = refused(asked(&script, identify));
        assert!(text.contains(what), "{what:?} in {text:?} after {script:?}");
    }
    for (text, is_size) in [
        ("16MB", true),
        ("3MB", false),
        ("2GB", false),
        ("4294967296GB", false),
        ("16", false),
    ] {
        let size = asked(&result(&[Some(text)]), |mut client| client.segment_size());
        assert_eq!(size.is_ok(), is_size, "{text}");
    }
}

#[test]
fn a_session_survives_an_error_that_is_not_the_connections() {
    let script = [
        message(b'E', b"SERROR\0C58P01\0Mno such file\0\0"),
        message(b'Z', b"I"),
        result(&[Some("x"), Some("text")]),
    ];
    let history = asked(&script.concat(), |mut client| {
        match client.timeline_history(Tli(2)) {
            Err(ClientError::Server(said)) => assert_eq!(said.sqlstate, "58P01"),
            other => panic!("{other:?}"),
        }
        client.timeline_history(Tli(3))
    });
    assert_eq!(history.expect("answered"), "text");
}

#[test]
fn a_stream_must_go_on_where_it_was() {
    let begin = message(b'W', &[0, 0, 0]);
    let cut_off = message(b'd', &[b'w', 0, 0]);
    let beyond = [wal(u64::MAX, b"ab")].concat();
    for (script, start, what) in [
        (wal(0x101, b"a"), 0x100, "where that of 0/100 was due"),
        (wal(0xFF, b"a"), 0x100, "where that of 0/100 was due"),
        (wal(0x100, b""), 0x100, "without any"),
        (cut_off, 0x100, "cut off"),
        (beyond, u64::MAX, "beyond the last position"),
        (message(b'd', b"k"), 0x100, "stream message of 1 bytes"),
        (message(b'd', b""), 0x100, "stream message of 0 bytes"),
        (message(b'd', b"x123"), 0x100, "stream message of 4 bytes"),
        (message(b'D', b""), 0x100, "0x44"),
        (message(b'E', b"C58P01\0Mremoved\0\0"), 0x100, "removed"),
        // It ended, and does not say where; or elsewhere than it did.
        (
            [message(b'c', b""), message(b'Z', b"I")].concat(),
            0x100,
            "without a reason",
        ),
        (
            [
                message(b'c', b""),
                row(&[Some("2"), Some("0/101")]),
                message(b'Z', b"I"),
            ]
            .concat(),
            0x100,
            "ends at 0/101",
        ),
    ] {
        let event = asked(&[begin.as_slice(), &script].concat(), |client| {
            let mut stream = client.start_replication(Lsn(start), Tli(1))?;
            stream.next_event(PATIENCE)
        });
        let text = refused(event);
        assert!(text.contains(what), "{what:?} in {text:?}");
    }
    // There is nothing on this timeline any more.
    let at_its_end = [row(&[Some("2"), Some("0/100")]), message(b'Z', b"I")].concat();
    let script = [message(b'T', &[0, 0]), at_its_end].concat();
    let event = asked(&script, |client| {
        let mut stream = client.start_replication(Lsn(0x100), Tli(1))?;
        stream.next_event(PATIENCE)
    });
    assert!(matches!(event, Ok(Some(WalEvent::TimelineEnd(end))) if end.next_tli == Tli(2)));
}

/// All that can be asked, of one peer.
fn ask_everything(address: String) -> Asked<Vec<u8>> {
    let mut client = WalClient::connect(&config(address))?;
    client.identify_system()?;
    client.segment_size()?;
    client.timeline_history(Tli(2))?;
    let mut stream = client.start_replication(Lsn(0x100), Tli(1))?;
    let mut bytes = Vec::new();
    loop {
        let position = stream.position();
        match stream.next_event(PATIENCE)? {
            Some(WalEvent::Wal { begin_lsn, wal }) => {
                assert_eq!(begin_lsn, position);
                assert!(!wal.is_empty());
                assert_eq!(stream.position(), position + wal.len() as u64);
                bytes.extend(wal);
            }
            Some(WalEvent::Keepalive { .. }) => {}
            Some(WalEvent::TimelineEnd(end)) => {
                assert_eq!(end.end_lsn, stream.position());
                return Ok(bytes);
            }
            None => return Err(ClientError::TimedOut(PATIENCE)),
        }
    }
}

/// A whole session's answers.
fn session() -> Vec<u8> {
    let script = [
        welcome(),
        result(&[Some("7"), Some("2"), Some("0/5000100"), None]),
        result(&[Some("16MB")]),
        result(&[Some("00000002.history"), Some("1\t0/300\tx\n")]),
        message(b'W', &[0, 0, 0]),
        wal(0x100, b"abc"),
        wal(0x103, &[7; 300]),
        message(b'c', b""),
        row(&[Some("2"), Some("0/22F")]),
        message(b'Z', b"I"),
    ];
    script.concat()
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(300))]

    /// Whatever is changed in it, or wherever it breaks off: an answer or an error, in time.
    #[test]
    fn damaged_answers_do_no_harm(
        changes in proptest::collection::vec((0usize..10_000, 0u8..=255), 1..4),
        len in 0usize..1500,
    ) {
        let mut script = session();
        for (at, byte) in changes {
            let at = at % script.len();
            script[at] = byte;
        }
        script.truncate(len.max(script.len() / 2));
        let (address, thread) = peer_that_hangs_up(script);
        let started = Instant::now();
        let _ = ask_everything(address);
        assert!(started.elapsed() < Duration::from_secs(5));
        thread.join().expect("no panic");
    }
}

#[test]
fn an_undamaged_session_is_taken_in() {
    let (address, thread) = peer_that_hangs_up(session());
    assert_eq!(ask_everything(address).expect("sound").len(), 303);
    thread.join().expect("no panic");
}

#[test]
fn nobody_waits_for_ever() {
    let started = Instant::now();
    // Nothing is said at all; nothing in answer; half a message.
    let (address, thread) = peer(vec![]);
    let text = refused(WalClient::connect(&config(address)));
    assert!(text.contains("no answer within 0.4 s"), "{text}");
    thread.join().expect("no panic");
    let text = refused(WalClient::connect(&config("127.0.0.1:1".into())));
    assert!(text.contains("could not connect"), "{text}");
    let text = refused(WalClient::connect(&config("nowhere".into())));
    assert!(text.contains("host name"), "{text}");
    assert!(started.elapsed() < Duration::from_secs(5));

    // In a stream silence is no error.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let (over, wait) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().expect("a client");
        let begin = [welcome(), message(b'W', &[0, 0, 0])].concat();
        socket.write_all(&begin).expect("said");
        // Settings without end give no more time.
        while wait.try_recv().is_err() {
            let _ = socket.write_all(&message(b'S', b"a\0b\0"));
            std::thread::park_timeout(Duration::from_millis(5));
        }
    });
    let client = WalClient::connect(&config(address)).expect("connected");
    let mut stream = client.start_replication(Lsn(0x100), Tli(1)).expect("begun");
    let event = stream.next_event(PATIENCE).expect("no error");
    assert_eq!(event, None);
    stream.report(Lsn(3), Lsn(2), Lsn(1)).expect("told");
    assert!(stream.into_client().is_none());
    over.send(()).expect("it runs");
    thread.join().expect("no panic");
}

#[test]
fn a_password_that_is_asked_for_is_named() {
    for (script, what) in [
        (
            message(b'R', b"\0\0\0\x0aSCRAM-SHA-256\0\0"),
            "none is known",
        ),
        (message(b'R', &[0, 0, 0, 5, 1, 2, 3, 4]), "MD5"),
        (message(b'R', &[0]), "invalid authentication"),
        (message(b'W', &[0]), "in the handshake"),
        (
            message(b'E', b"C3D000\0Mno such cluster\0\0"),
            "no such cluster",
        ),
    ] {
        let (address, thread) = peer(script);
        let text = refused(WalClient::connect(&config(address)));
        assert!(text.contains(what), "{what:?} in {text:?}");
        thread.join().expect("no panic");
    }
}

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use rustls::ConnectionTrafficSecrets;

use super::*;
use crate::certificates::{Authority, Issued, Subject};
use crate::tls::{ServerTls, ServerTlsFiles, SslMode};

const GOOD: Subject<'_> = Subject {
    common_name: "server",
    hosts: &["localhost", "127.0.0.1"],
    is_expired: false,
};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn server(issued: &Issued, client_ca: Option<&Path>) -> ServerTls {
    server_with_crl(issued, client_ca, None)
}

fn server_with_crl(issued: &Issued, client_ca: Option<&Path>, crl: Option<&Path>) -> ServerTls {
    ServerTls::load(&ServerTlsFiles {
        cert: issued.cert.clone(),
        key: issued.key.clone(),
        client_ca: client_ca.map(Path::to_owned),
        client_crl: crl.map(Path::to_owned),
    })
    .expect("good files")
}

fn client(mode: SslMode, root_cert: Option<&Path>) -> ClientTls {
    ClientTls {
        mode,
        root_cert: root_cert.map(Path::to_owned),
        ..ClientTls::default()
    }
}

/// Two ends of a connection that is not encrypted yet.
fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let near = TcpStream::connect(address).expect("connected");
    let (far, _) = listener.accept().expect("accepted");
    for socket in [&near, &far] {
        let patience = Some(Duration::from_secs(10));
        socket.set_read_timeout(patience).expect("set");
        socket.set_write_timeout(patience).expect("set");
    }
    (near, far)
}

/// Both ends after the handshake, or why one has none. The server answers the question by `answer`.
fn shake_hands(
    tls: &ClientTls,
    host: &str,
    server: Option<&ServerTls>,
) -> (Result<Channel, TlsError>, Result<Channel, TlsError>) {
    let (near, mut far) = pair();
    std::thread::scope(|scope| {
        let accepted = scope.spawn(move || {
            if tls.mode == SslMode::Disable {
                return Ok(Channel::from(far));
            }
            let mut question = [0; 8];
            far.read_exact(&mut question)?;
            assert_eq!(question, ssl_request());
            far.write_all(if server.is_some() { b"S" } else { b"N" })?;
            let mut channel = Channel::from(far);
            if let Some(server) = server {
                channel.accept_tls(server.config.clone(), &[], soon())?;
            }
            Ok(channel)
        });
        let mut channel = Channel::from(near);
        let connected = channel.request_tls(tls, host, soon()).map(|()| channel);
        (connected, accepted.join().expect("no panic"))
    })
}

fn encrypted() -> (Channel, Channel) {
    let (_, near, far) = encrypted_by(&Authority::new("authority"));
    (near, far)
}

/// With the server's files, of a certificate that this authority has signed.
fn encrypted_by(authority: &Authority) -> (ServerTls, Channel, Channel) {
    let dir = tempfile::tempdir().expect("a directory");
    let server = server(&authority.issue(dir.path(), "server", GOOD), None);
    let root = authority.store(dir.path(), "root");
    let tls = client(SslMode::VerifyFull, Some(&root));
    let (near, far) = shake_hands(&tls, "localhost", Some(&server));
    (server, near.expect("connected"), far.expect("accepted"))
}

/// What libpq's modes promise, against good servers and bad ones.
#[test]
fn each_mode_keeps_its_promise() {
    let dir = tempfile::tempdir().expect("a directory");
    let (ours, others) = (Authority::new("ours"), Authority::new("others"));
    let issue = |authority: &Authority, name: &str, subject| {
        Some(server(&authority.issue(dir.path(), name, subject), None))
    };
    let expired = Subject {
        is_expired: true,
        ..GOOD
    };
    let nowhere = Subject { hosts: &[], ..GOOD };
    let good = issue(&ours, "good", GOOD);
    let stranger = issue(&others, "stranger", GOOD);
    let late = issue(&ours, "late", expired);
    let nameless = issue(&ours, "nameless", nowhere);
    let root = ours.store(dir.path(), "root");
    use SslMode::*;
    for (mode, has_root, host, server, wanted) in [
        (Disable, false, "localhost", &good, "clear"),
        (Prefer, false, "localhost", &None, "clear"),
        (Prefer, false, "localhost", &stranger, "encrypted"),
        (Prefer, false, "no_host_name", &stranger, "encrypted"),
        (Prefer, true, "localhost", &stranger, "UnknownIssuer"),
        (Require, false, "localhost", &None, "sslmode demands"),
        (Require, false, "elsewhere", &late, "encrypted"),
        (Require, true, "elsewhere", &good, "encrypted"),
        (Require, true, "elsewhere", &late, "expired"),
        (VerifyCa, false, "localhost", &good, "needs sslrootcert"),
        (VerifyCa, true, "elsewhere", &good, "encrypted"),
        (VerifyCa, true, "localhost", &nameless, "encrypted"),
        (VerifyCa, true, "localhost", &stranger, "UnknownIssuer"),
        (VerifyCa, true, "localhost", &late, "expired"),
        (VerifyFull, false, "localhost", &good, "needs sslrootcert"),
        (VerifyFull, true, "localhost", &None, "sslmode demands"),
        (VerifyFull, true, "localhost", &good, "encrypted"),
        (VerifyFull, true, "127.0.0.1", &good, "encrypted"),
        (VerifyFull, true, "127.0.0.2", &good, "not valid for name"),
        (VerifyFull, true, "elsewhere", &good, "not valid for name"),
        (VerifyFull, true, "no host", &good, "no host name"),
        (
            VerifyFull,
            true,
            "localhost",
            &nameless,
            "not valid for name",
        ),
        (VerifyFull, true, "localhost", &stranger, "UnknownIssuer"),
        (VerifyFull, true, "localhost", &late, "expired"),
    ] {
        let tls = client(mode, has_root.then_some(&root));
        let (connected, accepted) = shake_hands(&tls, host, server.as_ref());
        let found = match &connected {
            Ok(channel) if channel.is_encrypted() => "encrypted".to_owned(),
            Ok(_) => "clear".to_owned(),
            Err(error) => error.to_string(),
        };
        assert!(
            found.contains(wanted),
            "{mode} {host}: {found}, not {wanted}"
        );
        if let (Ok(near), Ok(far)) = (&connected, &accepted) {
            assert_eq!(near.is_encrypted(), far.is_encrypted());
            assert_eq!(near.has_named_protocol(), near.is_encrypted());
            let own = server.as_ref().map(|server| server.end_point.clone());
            let wanted = match own.filter(|_| near.is_encrypted()) {
                Some(hash) => EndPoint::Hash(hash.expect("it has one")),
                None => EndPoint::Clear,
            };
            assert_eq!(near.peer_end_point(), wanted);
        }
    }
}

#[test]
fn a_certificate_without_a_hash_is_not_taken_for_none() {
    let (server, near, _far) = encrypted_by(&Authority::without_hash("authority"));
    assert_eq!(near.peer_end_point(), EndPoint::NoHash);
    assert_eq!(server.end_point, None);
}

/// A client's certificate is known by its common name; one that is not good ends the handshake.
#[test]
fn clients_show_certificates() {
    let dir = tempfile::tempdir().expect("a directory");
    let (ours, others) = (Authority::new("ours"), Authority::new("others"));
    let root = ours.store(dir.path(), "root");
    let server = server(&ours.issue(dir.path(), "server", GOOD), Some(&root));
    let subject = |is_expired| Subject {
        common_name: "walproposer",
        hosts: &[],
        is_expired,
    };
    for (issued, name) in [
        (None, Ok(None)),
        (
            Some(ours.issue(dir.path(), "good", subject(false))),
            Ok(Some("walproposer")),
        ),
        (
            Some(others.issue(dir.path(), "stranger", subject(false))),
            Err("UnknownIssuer"),
        ),
        (
            Some(ours.issue(dir.path(), "late", subject(true))),
            Err("expired"),
        ),
    ] {
        let tls = ClientTls {
            cert: issued.as_ref().map(|issued| issued.cert.clone()),
            key: issued.as_ref().map(|issued| issued.key.clone()),
            ..client(SslMode::VerifyFull, Some(&root))
        };
        let (_, accepted) = shake_hands(&tls, "localhost", Some(&server));
        match (accepted, name) {
            (Ok(channel), Ok(name)) => assert_eq!(channel.peer_name().as_deref(), name),
            (Err(error), Err(name)) => assert!(error.to_string().contains(name), "{error}"),
            (accepted, name) => panic!("{accepted:?}, not {name:?}"),
        }
    }
}

/// Either end refuses what was revoked, and everything where it can't know: by a list that is out of date, or
/// another authority's.
#[test]
fn certificates_that_were_revoked_are_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let ours = Authority::new("ours");
    let root = ours.store(dir.path(), "root");
    let own = ours.issue(dir.path(), "server", GOOD);
    let subject = Subject {
        common_name: "walproposer",
        hosts: &[],
        is_expired: false,
    };
    let client_own = ours.issue(dir.path(), "client", subject);
    let other = ours.issue(dir.path(), "other", subject);
    let list = |name, revoked: &[&Issued], up_to| ours.revoke(dir.path(), name, revoked, up_to);
    let others = Authority::new("others").revoke(dir.path(), "others", &[], 2100);
    for (crl, wanted) in [
        (list("nobody", &[], 2100), ""),
        (list("another", &[&other], 2100), ""),
        (list("both", &[&own, &client_own], 2100), "Revoked"),
        (list("old", &[], 2020), "revocation list expired"),
        (others, "UnknownRevocationStatus"),
    ] {
        let plain = server(&own, None);
        let mut tls = ClientTls {
            crl: Some(crl.clone()),
            ..client(SslMode::VerifyFull, Some(&root))
        };
        for mode in [SslMode::Prefer, SslMode::VerifyCa, SslMode::VerifyFull] {
            tls.mode = mode;
            let found = shake_hands(&tls, "localhost", Some(&plain)).0.err();
            let found = found.map(|error| error.to_string()).unwrap_or_default();
            assert!(found.contains(wanted), "{mode} {crl:?}: {found}");
            assert_eq!(
                found.is_empty(),
                wanted.is_empty(),
                "{mode} {crl:?}: {found}"
            );
        }
        let asking = server_with_crl(&own, Some(&root), Some(&crl));
        let tls = ClientTls {
            cert: Some(client_own.cert.clone()),
            key: Some(client_own.key.clone()),
            ..client(SslMode::VerifyFull, Some(&root))
        };
        let found = shake_hands(&tls, "localhost", Some(&asking)).1.err();
        let found = found.map(|error| error.to_string()).unwrap_or_default();
        assert!(found.contains(wanted), "{crl:?}: {found}");
        assert_eq!(found.is_empty(), wanted.is_empty(), "{crl:?}: {found}");
    }
    let none = ClientTls {
        crl: Some(root.clone()),
        ..client(SslMode::VerifyFull, Some(&root))
    };
    let refused = none.load().expect_err("certificates").to_string();
    assert!(refused.contains("no revocation list"), "{refused}");
    let without_roots = ClientTls {
        root_cert: None,
        mode: SslMode::Require,
        ..none
    };
    assert!(matches!(
        without_roots.load(),
        Err(TlsError::RevokedByNobody)
    ));
}

/// Files that are none, keys that others can read, halves of pairs.
#[test]
fn files_that_cannot_be_used_are_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let authority = Authority::new("authority");
    let issued = authority.issue(dir.path(), "server", GOOD);
    let other = authority.issue(dir.path(), "other", GOOD);
    let load = |cert: &Path, key: &Path| {
        let files = ServerTlsFiles {
            cert: cert.to_owned(),
            key: key.to_owned(),
            client_ca: None,
            client_crl: None,
        };
        ServerTls::load(&files).err().map(|error| error.to_string())
    };
    assert_eq!(load(&issued.cert, &issued.key), None);
    let missing = dir.path().join("missing");
    let mixed_up = load(&issued.cert, &other.key).expect("another's key");
    assert!(mixed_up.contains("server.crt"), "{mixed_up}");
    let error = load(&missing, &issued.key).expect("no file");
    assert!(
        error.contains("could not read certificate") && error.contains("missing"),
        "{error}"
    );
    let error = load(&issued.key, &issued.key).expect("no certificate");
    assert!(error.contains("no certificate"), "{error}");
    let mode = |path: &Path, mode| {
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(path, mode).expect("our own file");
    };
    mode(&other.cert, 0o600);
    let error = load(&issued.cert, &other.cert).expect("no key");
    assert!(error.contains("no private key"), "{error}");
    mode(&issued.key, 0o644);
    let error = load(&issued.cert, &issued.key).expect("everybody reads it");
    assert!(
        error.contains("644") && error.contains("server.key"),
        "{error}"
    );
    let half = ClientTls {
        cert: Some(issued.cert.clone()),
        ..client(SslMode::Require, None)
    };
    assert!(matches!(half.load(), Err(TlsError::HalfAPair)));
}

/// A sender that does not block, and more than fits: all of it comes, in order, and what the kernel has not
/// taken is told of.
#[test]
fn what_the_socket_does_not_take_is_kept() {
    let (mut near, mut far) = encrypted();
    near.set_nonblocking(true).expect("set");
    let bytes: Vec<u8> = (0..20_000_000u32).map(|n| (n % 251) as u8).collect();
    let mut sent = 0;
    while sent < bytes.len() {
        match near.write(&bytes[sent..]) {
            Ok(taken) => sent += taken,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
    }
    assert!(sent < bytes.len() && near.has_output());
    assert_eq!(
        near.flush().expect_err("full").kind(),
        ErrorKind::WouldBlock
    );
    let reader = std::thread::spawn(move || {
        let mut received = Vec::new();
        far.read_to_end(&mut received).expect("open");
        received
    });
    while sent < bytes.len() {
        match near.write(&bytes[sent..]) {
            Ok(taken) => sent += taken,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
    near.set_nonblocking(false).expect("set");
    near.end_output();
    assert!(reader.join().expect("no panic") == bytes);
}

/// A server's own socket after the handshake, and messages that TLS takes for itself, as many as are wanted;
/// behind them a byte for us.
fn tickets(server: Channel, n: usize, byte: u8) -> (TcpStream, Vec<u8>) {
    const DATA: u8 = 0x17;
    const HANDSHAKE: u8 = 0x16;
    /// NewSessionTicket: its length, lifetime, age, nonce, ticket, extensions. (RFC 8446, section 4.6.1)
    const TICKET: &[u8] = b"\x04\x00\x00\x0E\x00\x00\x0E\x10\x00\x00\x00\x00\x00\x00\x01t\x00\x00";
    let Channel {
        socket, session, ..
    } = server;
    let Some(rustls::Connection::Server(session)) = session.map(|session| *session) else {
        panic!("a server's");
    };
    let secrets = session.dangerous_extract_secrets().expect("enabled");
    let (sequence, ConnectionTrafficSecrets::Aes256Gcm { key, iv }) = secrets.tx else {
        panic!("another cipher");
    };
    let key = UnboundKey::new(&AES_256_GCM, key.as_ref()).expect("a key");
    let key = LessSafeKey::new(key);
    let byte = [byte];
    let contents = std::iter::repeat_n((TICKET, HANDSHAKE), n).chain([(&byte[..], DATA)]);
    let mut records = Vec::new();
    for (sequence, (contents, kind)) in (sequence..).zip(contents) {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&sequence.to_be_bytes());
        for (byte, iv) in nonce.iter_mut().zip(iv.as_ref()) {
            *byte ^= iv;
        }
        let mut inner = [contents, &[kind]].concat();
        let len = u8::try_from(inner.len() + 16).expect("a short one");
        let head = [DATA, 3, 3, 0, len];
        let nonce = Nonce::assume_unique_for_key(nonce);
        key.seal_in_place_append_tag(nonce, Aad::from(head), &mut inner)
            .expect("sealed");
        records.extend(head);
        records.extend(inner);
    }
    (socket, records)
}

/// Who must not wait is done with a flood of records that hold nothing for us before it is over.
#[test]
fn a_flood_of_nothing_keeps_nobody_who_does_not_wait() {
    let dir = tempfile::tempdir().expect("a directory");
    let authority = Authority::new("authority");
    let server = server(&authority.issue(dir.path(), "server", GOOD), None);
    let mut config = (*server.config).clone();
    config.enable_secret_extraction = true;
    for blocks in [true, false] {
        let (near, far) = pair();
        let (mut near, mut far) = (Channel::from(near), Channel::from(far));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut question = [0; 8];
                near.read_exact(&mut question).expect("a question");
                near.write_all(b"S").expect("sent");
                near.accept_tls(Arc::new(config.clone()), &[], soon())
                    .expect("good");
            });
            let tls = client(SslMode::Require, None);
            far.request_tls(&tls, "localhost", soon()).expect("good");
        });
        let (mut socket, records) = tickets(near, 2_000, 7);
        socket.write_all(&records).expect("the kernel has room");
        far.set_nonblocking(!blocks).expect("set");
        let wait = if blocks { Wait::No } else { Wait::Yes };
        let (mut room, mut n_floods) = ([0; 100], 0);
        let taken = loop {
            let waiting = bytes_waiting(&far);
            match far.receive(&mut room, wait) {
                Ok(taken) => break taken,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
            }
            // It was not the end of what had arrived that made it return.
            n_floods += u32::from(waiting > 0 && bytes_waiting(&far) > 0);
        };
        assert_eq!(room[..taken], [7]);
        assert!(n_floods > 0, "never");
    }
}

/// Nor by a peer that takes nothing, and at whom there is something to be said: an alert.
#[test]
fn a_peer_that_takes_nothing_keeps_nobody_who_does_not_wait() {
    let (near, mut far) = encrypted();
    far.set_nonblocking(true).expect("set");
    let full = loop {
        if let Err(error) = far.write(&[0; 16_384]) {
            break error;
        }
    };
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    far.set_nonblocking(false).expect("set");
    let ages = Some(Duration::from_secs(3600));
    far.socket().set_write_timeout(ages).expect("set");
    near.socket()
        .write_all(&[0x17, 3, 3, 0, 5, 1, 2, 3, 4, 5])
        .expect("sent");
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let error = far.receive(&mut [0; 100], Wait::No).expect_err("no record");
        sender.send(error.kind()).expect("heard");
    });
    let kind = receiver.recv_timeout(Duration::from_secs(20));
    assert_eq!(kind, Ok(ErrorKind::InvalidData));
}

/// Whoever says a byte now and then gains no time, neither in a record nor between them.
#[test]
fn a_conversation_is_over_in_time() {
    let (near, mut far) = encrypted();
    let mut socket = near.socket().try_clone().expect("another handle");
    let drip = std::thread::spawn(move || {
        // A record that is long in coming.
        let _ = socket.write_all(&[0x17, 3, 3, 0x40, 0]);
        while socket.write_all(&[0]).is_ok() {
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    let mut room = [0; 100];
    let deadline = Instant::now() + Duration::from_millis(100);
    let over = loop {
        if let Err(error) = far.until(deadline).read(&mut room) {
            match error.kind() {
                ErrorKind::WouldBlock => {}
                kind => break kind,
            }
        }
    };
    assert_eq!(over, ErrorKind::TimedOut);
    drop(far);
    drop(near);
    drip.join().expect("no panic");
}

fn bytes_waiting(channel: &Channel) -> u64 {
    rustix::io::ioctl_fionread(channel).expect("a socket")
}

/// Who gets less than there was room for may sleep in poll(2).
#[test]
fn nothing_that_is_decrypted_stays_behind() {
    let (mut near, mut far) = encrypted();
    for len in [1usize, 16_384, 40_000] {
        near.send_all(&mut [IoSlice::new(&vec![7; len]), IoSlice::new(b"tail")])
            .expect("sent");
        let mut received = 0;
        while received < len + 4 {
            let mut room = [0; 1000];
            let taken = far.receive(&mut room, Wait::Yes).expect("open");
            received += taken;
            assert_eq!(far.has_input(), taken == room.len() && received < len + 4);
            if taken < room.len() {
                let nothing = take_decrypted(far.session.as_mut().expect("encrypted"), &mut room);
                assert_eq!(nothing.expect("open"), None);
            }
        }
        assert_eq!(received, len + 4);
        let mut room = [0; 10];
        let nothing = far.receive(&mut room, Wait::No).expect_err("nothing");
        assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
    }
    drop(near);
    assert_eq!(far.receive(&mut [0; 10], Wait::Yes).expect("the end"), 0);
}

/// Whatever comes in place of a handshake, or into a connection, is an error and no more.
#[test]
fn rubbish_is_an_error() {
    let dir = tempfile::tempdir().expect("a directory");
    let authority = Authority::new("authority");
    let server = server(&authority.issue(dir.path(), "server", GOOD), None);
    for rubbish in [
        &b""[..],
        b"\x16",
        b"\x16\x03\x01\xff\xff",
        b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        &[0; 70_000],
        &[0x16; 70_000],
    ] {
        let (near, far) = pair();
        let writer = std::thread::spawn({
            let rubbish = rubbish.to_vec();
            move || {
                let _ = (&near).write_all(&rubbish);
                let _ = near.shutdown(Shutdown::Write);
                let _ = (&near).read(&mut [0; 100]);
            }
        });
        let mut channel = Channel::from(far);
        let refused = channel.accept_tls(server.config.clone(), &[], soon());
        assert!(refused.is_err());
        drop(channel);
        writer.join().expect("no panic");
    }
    let (near, mut far) = encrypted();
    (&near.socket)
        .write_all(&[
            0x17, 3, 3, 0, 20, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0,
        ])
        .expect("sent");
    let refused = far.receive(&mut [0; 10], Wait::Yes).expect_err("forged");
    assert_eq!(refused.kind(), ErrorKind::InvalidData);
}

/// Neither a silent peer nor one that says a byte now and then holds a handshake up.
#[test]
fn a_handshake_has_its_time() {
    let dir = tempfile::tempdir().expect("a directory");
    let authority = Authority::new("authority");
    let server = server(&authority.issue(dir.path(), "server", GOOD), None);
    let (near, far) = pair();
    let mut channel = Channel::from(far);
    let slow = std::thread::spawn(move || {
        for byte in b"\x16\x03\x01\x20\x00".iter().chain(std::iter::repeat(&0)) {
            if (&near).write_all(&[*byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    let began = Instant::now();
    let refused = channel.accept_tls(
        server.config.clone(),
        &[],
        began + Duration::from_millis(200),
    );
    let refused = refused.expect_err("too slow").to_string();
    assert!(refused.contains("timed out"), "{refused}");
    drop(channel);
    slow.join().expect("no panic");
}

/// A record that comes a byte at a time is waited for as long as a silent peer, or twice as long.
#[test]
fn a_record_that_trickles_in_is_not_waited_for() {
    let (near, mut far) = encrypted();
    let patience = Duration::from_millis(100);
    far.socket().set_read_timeout(Some(patience)).expect("set");
    let slow = std::thread::spawn(move || {
        let record = [&[0x17, 3, 3, 0x20, 0][..], &[0; 8192]].concat();
        for byte in record {
            if (&near.socket).write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    let began = Instant::now();
    let nothing = far.receive(&mut [0; 10], Wait::Yes).expect_err("nothing");
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
    assert!(began.elapsed() < 20 * patience);
    drop(far);
    slow.join().expect("no panic");
}

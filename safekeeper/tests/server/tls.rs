//! Connections that are encrypted, and who shows which certificate.

use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use safekeeper::config::{Config, TlsFiles};
use safekeeper::users::{Role, User, Users};
use safekeeper_client::wal_client::{ClientError, WalClient, WalClientConfig, WalEvent};
use safekeeper_protocol::Tli;
use safekeeper_wire::certificates::{Authority, Issued, Subject};
use safekeeper_wire::channel::Channel;
use safekeeper_wire::credentials::Credentials;
use safekeeper_wire::login::BindingMode;
use safekeeper_wire::scram::Verifier;
use safekeeper_wire::startup::{encode_startup, ssl_request};
use safekeeper_wire::tls::{ClientTls, ServerTls, ServerTlsFiles, SslMode};

use super::client::{LOG_START, parse_error};
use super::{Daemon, some_wal};

const RULES: &str = r#"
    [[access]]
    user = "local"
    method = "trust"
    [[access]]
    user = "certified"
    method = "cert"
    [[access]]
    tls = true
    method = "scram"
"#;

const SERVER: Subject<'_> = Subject {
    common_name: "safekeeper",
    hosts: &["localhost"],
    is_expired: false,
};

/// A daemon that encrypts, and what its clients need.
struct Encrypted {
    daemon: Daemon,
    dir: tempfile::TempDir,
    authority: Authority,
    root: PathBuf,
}

impl Encrypted {
    fn start() -> Encrypted {
        let dir = tempfile::tempdir().expect("a directory");
        let authority = Authority::new("authority");
        let root = authority.store(dir.path(), "root");
        let server = authority.issue(dir.path(), "server", SERVER);
        let daemon = Daemon::with(|config| {
            config.tls = Some(TlsFiles {
                cert: server.cert,
                key: server.key,
                client_ca: Some(root.clone()),
                client_crl: None,
            });
            config.access = Config::from_toml(RULES).expect("valid").access;
        });
        let mut encrypted = Encrypted {
            daemon,
            dir,
            authority,
            root,
        };
        let mut users = Users::default();
        for (name, password) in [("standby", Some("secret")), ("certified", None)] {
            let user = User {
                name: name.to_owned(),
                roles: vec![Role::Replication],
                verifier: password.map(Verifier::of_password),
            };
            users.add(user).expect("a new one");
        }
        users.store(&encrypted.daemon.data_dir()).expect("stored");
        encrypted.daemon.restart();
        encrypted
    }

    fn credentials(&self, user: &str, password: &str) -> Credentials {
        let passfile = self.dir.path().join(format!("{user}.{password}"));
        std::fs::write(&passfile, format!("*:*:*:{user}:{password}\n")).expect("written");
        let only_owner = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&passfile, only_owner).expect("our own file");
        Credentials {
            user: user.to_owned(),
            passfile: Some(passfile),
            tls: ClientTls {
                mode: SslMode::VerifyFull,
                root_cert: Some(self.root.clone()),
                ..ClientTls::default()
            },
            binding: BindingMode::Require,
        }
    }

    fn connect(&self, credentials: Credentials) -> Result<WalClient, ClientError> {
        self.connect_by(self.daemon.address().port(), credentials)
    }

    fn connect_by(&self, port: u16, credentials: Credentials) -> Result<WalClient, ClientError> {
        WalClient::connect(&WalClientConfig {
            address: format!("localhost:{port}"),
            credentials,
            application_name: "test".to_owned(),
            cluster: None,
            timeout: Duration::from_secs(10),
        })
    }

    fn refusal(&self, credentials: Credentials) -> String {
        let refused = self.connect(credentials).map(drop);
        refused.expect_err("refused").to_string()
    }

    fn certificate(&self, authority: &Authority, name: &str, subject: Subject<'_>) -> Issued {
        authority.issue(self.dir.path(), name, subject)
    }
}

#[test]
fn wal_is_read_through_an_encrypted_connection() {
    let encrypted = Encrypted::start();
    let wal = some_wal(3_000_000);
    let mut proposer = super::Proposer::lead_by(
        super::Client::connect(encrypted.daemon.address(), &[("user", "local")]).expect("trusted"),
        super::cluster(1, "main"),
    );
    proposer.append_all(&wal, 100_000);
    proposer.commit(wal.position());
    let mut client = encrypted
        .connect(encrypted.credentials("standby", "secret"))
        .expect("let in");
    let identity = client.identify_system().expect("one");
    assert_eq!(identity.end_lsn, wal.position());
    let mut stream = client
        .start_replication(LOG_START, Tli(1))
        .expect("a stream");
    let mut received = Vec::new();
    while stream.position() < wal.position() {
        match stream.next_event(Duration::from_secs(10)).expect("sound") {
            Some(WalEvent::Wal { wal, .. }) => received.extend(wal),
            Some(_) => {}
            None => panic!("nothing came at {}", stream.position()),
        }
        let at = stream.position();
        stream.report(at, at, at).expect("taken");
    }
    assert!(received == wal.bytes_from(LOG_START));
}

#[test]
fn the_rules_tell_who_must_encrypt_and_who_must_show_a_certificate() {
    let encrypted = Encrypted::start();
    let standby = || encrypted.credentials("standby", "secret");
    // Who has the password, and does not encrypt, is not even asked for it.
    let mut clear = standby();
    clear.tls = ClientTls::disabled();
    let refused = encrypted.refusal(clear);
    assert!(
        refused.contains("no access rule") && refused.contains("no encryption"),
        "{refused}"
    );
    let refused = encrypted.refusal(encrypted.credentials("standby", "guess"));
    assert!(
        refused.contains("password authentication failed"),
        "{refused}"
    );
    let refused = encrypted.refusal(encrypted.credentials("certified", "secret"));
    assert!(
        refused.contains("requires a valid client certificate"),
        "{refused}"
    );

    let strangers = Authority::new("strangers");
    let subject = |common_name| Subject {
        common_name,
        hosts: &[],
        is_expired: false,
    };
    let late = Subject {
        is_expired: true,
        ..subject("certified")
    };
    let own = &encrypted.authority;
    for (user, issued, wanted) in [
        (
            "certified",
            encrypted.certificate(own, "good", subject("certified")),
            None,
        ),
        (
            "certified",
            encrypted.certificate(own, "other", subject("standby")),
            Some("certificate authentication failed"),
        ),
        // It has a password, but not this way: the rule for it asks for one.
        (
            "standby",
            encrypted.certificate(own, "standby", subject("standby")),
            Some("none is known"),
        ),
        (
            "certified",
            encrypted.certificate(own, "late", late),
            Some(""),
        ),
        (
            "certified",
            encrypted.certificate(&strangers, "stranger", subject("certified")),
            Some(""),
        ),
    ] {
        let mut credentials = encrypted.credentials(user, "x");
        credentials.passfile = None;
        credentials.binding = BindingMode::Prefer;
        credentials.tls.cert = Some(issued.cert);
        credentials.tls.key = Some(issued.key);
        match (encrypted.connect(credentials), wanted) {
            (Ok(_), None) => {}
            (Err(error), Some(wanted)) => {
                assert!(error.to_string().contains(wanted), "{error}");
            }
            (Ok(_), Some(_)) => panic!("{user} was let in"),
            (Err(error), None) => panic!("{user}: {error}"),
        }
    }
}

/// A certificate is good until a list that is read again says that it was revoked. Who demands that a proof be
/// bound is not content with a server that wants none.
#[test]
fn certificates_are_revoked_when_told_so() {
    let mut encrypted = Encrypted::start();
    let subject = Subject {
        common_name: "certified",
        hosts: &[],
        is_expired: false,
    };
    let issued = encrypted.certificate(&encrypted.authority, "good", subject);
    let revoke = |revoked: &[&Issued]| {
        let dir = encrypted.dir.path();
        encrypted.authority.revoke(dir, "revoked", revoked, 2100)
    };
    let list = revoke(&[]);
    let mut credentials = encrypted.credentials("certified", "x");
    credentials.passfile = None;
    credentials.tls.cert = Some(issued.cert.clone());
    credentials.tls.key = Some(issued.key.clone());
    let refused = encrypted.refusal(credentials.clone());
    assert!(refused.contains("channel_binding=require"), "{refused}");
    credentials.binding = BindingMode::Prefer;
    let tls = encrypted.daemon.config.tls.as_mut().expect("encrypted");
    tls.client_crl = Some(list);
    let server = encrypted.daemon.server.as_ref().expect("running");
    server.reload(&encrypted.daemon.config).expect("sound");
    encrypted.connect(credentials.clone()).expect("let in");
    revoke(&[&issued]);
    encrypted
        .connect(credentials.clone())
        .expect("not read yet");
    server.reload(&encrypted.daemon.config).expect("sound");
    encrypted.refusal(credentials);
    encrypted
        .connect(encrypted.credentials("standby", "secret"))
        .expect("it shows no certificate");
}

#[test]
fn certificates_are_read_again_when_told_so() {
    let encrypted = Encrypted::start();
    let server = encrypted.daemon.server.as_ref().expect("running");
    let standby = || encrypted.credentials("standby", "secret");
    let mut open = encrypted.connect(standby()).expect("let in");
    let next = Authority::new("the next one");
    let next_root = next.store(encrypted.dir.path(), "next");
    encrypted.certificate(&next, "server", SERVER);
    encrypted.connect(standby()).expect("not read yet");
    server.reload(&encrypted.daemon.config).expect("sound");
    let refused = encrypted.refusal(standby());
    assert!(refused.contains("UnknownIssuer"), "{refused}");
    let mut trusting = standby();
    trusting.tls.root_cert = Some(next_root);
    encrypted.connect(trusting.clone()).expect("trusted");
    // Who is in stays in, and is answered.
    let answer = open.query_row("SHOW wal_segment_size");
    let answer = answer.expect_err("there is no cluster");
    assert!(matches!(answer, ClientError::Server(_)), "{answer}");
    // A key that does not fit changes nothing.
    let key = encrypted.dir.path().join("server.key");
    std::fs::write(&key, "no key").expect("written");
    let error = server.reload(&encrypted.daemon.config).expect_err("no key");
    assert!(error.to_string().contains("server.key"), "{error}");
    encrypted.connect(trusting).expect("as before");
}

/// What an unencrypted peer smuggles in before the handshake is not taken for the client's; and a client may
/// leave out the question.
#[test]
fn a_handshake_begins_where_it_is_expected() {
    let encrypted = Encrypted::start();
    let address = encrypted.daemon.address();
    let mut socket = TcpStream::connect(address).expect("connected");
    let smuggled = encode_startup(&[("user", "local"), ("replication", "true")]);
    socket
        .write_all(&[&ssl_request()[..], &smuggled].concat())
        .expect("sent");
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).expect("closed");
    assert_eq!(answer.first(), Some(&b'E'));
    let error = parse_error(&answer[5..]);
    assert_eq!(error.sqlstate, "08P01");
    assert!(
        error.message.contains("unencrypted data"),
        "{}",
        error.message
    );
    for rubbish in [&b"\x16"[..], b"\x16\x03\x01\x00\x05hello", &[0x16; 20_000]] {
        let mut socket = TcpStream::connect(address).expect("connected");
        socket.write_all(rubbish).expect("sent");
        socket.shutdown(std::net::Shutdown::Write).expect("open");
        // An alert of TLS, or nothing.
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer);
        assert!(matches!(answer.first(), None | Some(0x15)), "{answer:?}");
        encrypted
            .connect(encrypted.credentials("standby", "secret"))
            .expect("as before");
    }
}

/// What somebody in between makes of the question for a password.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trick {
    Nothing,
    /// Binding is not offered.
    LeaveOut,
    /// It is, and then the client is asked again without.
    AskTwice,
    /// The session begins, though nobody has asked for anything.
    AskNothing,
    /// The same after the client's proof, of which the daemon does not hear.
    Skip,
}

fn next_message(channel: &mut Channel) -> io::Result<Vec<u8>> {
    let mut message = vec![0; 5];
    channel.read_exact(&mut message)?;
    let len = u32::from_be_bytes([message[1], message[2], message[3], message[4]]) as usize;
    message.resize(1 + len, 0);
    channel.read_exact(&mut message[5..])?;
    Ok(message)
}

/// Passes on what client and daemon say to one another, but for its trick. True: the daemon has let it in, as
/// the client.
fn stand_between(
    client: TcpStream,
    tls: &ServerTls,
    daemon: TcpStream,
    trick: Trick,
) -> io::Result<bool> {
    const PLAIN: &[u8] = b"R\0\0\0\x17\0\0\0\x0ASCRAM-SHA-256\0\0";
    const READY: &[u8] = b"Z\0\0\0\x05I";
    let deadline = Instant::now() + Duration::from_secs(10);
    let (mut client, mut daemon) = (Channel::from(client), Channel::from(daemon));
    let mut question = [0; 8];
    client.read_exact(&mut question)?;
    client.write_all(b"S")?;
    let accepted = client.accept_tls(tls.config.clone(), &[], deadline);
    accepted.map_err(io::Error::other)?;
    let any = ClientTls {
        mode: SslMode::Require,
        ..ClientTls::default()
    };
    let connected = daemon.request_tls(&any, "localhost", deadline);
    connected.map_err(io::Error::other)?;
    let mut startup = vec![0; 4];
    client.read_exact(&mut startup)?;
    let len = u32::from_be_bytes([startup[0], startup[1], startup[2], startup[3]]) as usize;
    startup.resize(len, 0);
    client.read_exact(&mut startup[4..])?;
    daemon.write_all(&startup)?;
    loop {
        let said = next_message(&mut daemon)?;
        match (said[0], said.get(8)) {
            (b'Z', _) => return Ok(true),
            (b'R', Some(10)) if trick == Trick::AskNothing => {
                client.write_all(READY)?;
                return Ok(false);
            }
            (b'R', Some(11)) if trick == Trick::Skip => {
                client.write_all(&said)?;
                next_message(&mut client)?;
                client.write_all(READY)?;
                return Ok(false);
            }
            (b'R', Some(10)) if trick == Trick::LeaveOut => client.write_all(PLAIN)?,
            (b'R', Some(10)) if trick == Trick::AskTwice => {
                client.write_all(&said)?;
                next_message(&mut client)?;
                client.write_all(PLAIN)?;
            }
            _ => client.write_all(&said)?,
        }
        if let (b'R', Some(10 | 11)) = (said[0], said.get(8)) {
            daemon.write_all(&next_message(&mut client)?)?;
        }
    }
}

/// The client takes any certificate. What keeps out who stands in between, with one of his own, is the binding.
#[test]
fn who_stands_in_between_is_not_let_in() {
    let encrypted = Encrypted::start();
    let issue = |authority: &Authority, name: &str| {
        let issued = encrypted.certificate(authority, name, SERVER);
        let files = ServerTlsFiles {
            cert: issued.cert,
            key: issued.key,
            client_ca: None,
            client_crl: None,
        };
        ServerTls::load(&files).expect("good files")
    };
    let own = issue(&encrypted.authority, "between");
    let no_hash = issue(&Authority::without_hash("between"), "no_hash");
    use BindingMode::{Disable, Prefer, Require};
    for (binding, tls, trick, wanted) in [
        // Without binding he is: the tricks are not what he lacks.
        (Disable, &own, Trick::Nothing, None),
        (Disable, &no_hash, Trick::Nothing, None),
        (Prefer, &own, Trick::Nothing, Some("malformed SCRAM")),
        (Prefer, &own, Trick::LeaveOut, Some("malformed SCRAM")),
        (Prefer, &own, Trick::AskTwice, Some("out of turn")),
        (Prefer, &no_hash, Trick::Nothing, Some("in between")),
        (Prefer, &no_hash, Trick::LeaveOut, Some("malformed SCRAM")),
        (Prefer, &no_hash, Trick::AskTwice, Some("in between")),
        (Require, &own, Trick::Nothing, Some("malformed SCRAM")),
        (Require, &own, Trick::LeaveOut, Some("does not offer")),
        (Require, &own, Trick::AskTwice, Some("out of turn")),
        (Require, &no_hash, Trick::LeaveOut, Some("nothing to bind")),
        (Require, &own, Trick::AskNothing, Some("having let us in")),
        (Prefer, &own, Trick::AskNothing, Some("having let us in")),
        (Disable, &own, Trick::AskNothing, Some("having let us in")),
        (Disable, &own, Trick::Skip, Some("having let us in")),
    ] {
        let mut credentials = encrypted.credentials("standby", "secret");
        credentials.binding = binding;
        credentials.tls = ClientTls {
            mode: SslMode::Require,
            ..ClientTls::default()
        };
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let daemon = TcpStream::connect(encrypted.daemon.address()).expect("connected");
        let (connected, is_in) = std::thread::scope(|scope| {
            let between = scope.spawn(|| {
                let (client, _) = listener.accept().expect("a client");
                stand_between(client, tls, daemon, trick)
            });
            let connected = encrypted.connect_by(port, credentials).map(drop);
            (connected, between.join().expect("no panic"))
        });
        match wanted {
            None => assert!(is_in.is_ok_and(|it| it), "{trick:?}"),
            Some(wanted) => {
                assert!(!is_in.is_ok_and(|it| it), "{binding} {trick:?}: he is in");
                let error = connected.expect_err("nobody is believed").to_string();
                assert!(error.contains(wanted), "{binding} {trick:?}: {error}");
            }
        }
    }
}

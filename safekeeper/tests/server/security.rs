//! Who is let in, and what they may do there.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use safekeeper::config::Config;
use safekeeper::users::{Role, User, Users};
use safekeeper_wire::scram::{ClientBinding, ClientExchange, Verifier};
use safekeeper_wire::startup::ssl_request;

use super::client::{Client, PgError, Proposer, cluster};
use super::{Daemon, some_wal, wait_for};

const RULES: &str = r#"
    [[access]]
    user = "banned"
    method = "reject"
    [[access]]
    user = "local"
    address = "127.0.0.0/8"
    method = "trust"
    [[access]]
    address = "127.0.0.0/8"
    method = "scram"
"#;

fn add_user(daemon: &Daemon, name: &str, roles: &[Role], password: &str) {
    let mut users = Users::load(&daemon.data_dir()).expect("sound");
    let user = User {
        name: name.to_owned(),
        roles: roles.to_vec(),
        verifier: Some(Verifier::of_password(password)),
    };
    users.add(user).expect("a new one");
    users.store(&daemon.data_dir()).expect("stored");
}

fn rules(text: &str) -> Config {
    Config::from_toml(text).expect("valid")
}

fn daemon() -> Daemon {
    let mut daemon = Daemon::with(|config| {
        config.access = rules(RULES).access;
    });
    add_user(&daemon, "standby", &[Role::Replication], "secret");
    add_user(&daemon, "primary", &[Role::Proposer], "push");
    daemon.restart();
    daemon
}

/// Begins the exchange; the server's first message, or its error.
fn begin(client: &mut Client, exchange: &ClientExchange) -> Result<Vec<u8>, PgError> {
    let (tag, body) = client.receive().expect("a question");
    assert_eq!((tag, &body[..4]), (b'R', &[0, 0, 0, 10][..]), "{body:?}");
    assert_eq!(&body[4..], b"SCRAM-SHA-256\0\0");
    let first = exchange.message();
    let mut response = b"SCRAM-SHA-256\0".to_vec();
    response.extend((first.len() as u32).to_be_bytes());
    response.extend(first);
    client.send(b'p', &response);
    answer(client, 11)
}

fn answer(client: &mut Client, code: u32) -> Result<Vec<u8>, PgError> {
    match client.receive().expect("an answer") {
        (b'R', body) => {
            assert_eq!(body[..4], code.to_be_bytes());
            Ok(body[4..].to_vec())
        }
        (b'E', body) => Err(super::client::parse_error(&body)),
        other => panic!("unexpected {other:?}"),
    }
}

/// A client that has been asked for its proof, and has it.
fn asked(daemon: &Daemon, user: &str, password: &str) -> Result<(Client, ClientExchange), PgError> {
    let mut client = Client::opened_by(daemon.address(), user);
    let mut exchange = ClientExchange::begin(password, ClientBinding::Impossible);
    let first = begin(&mut client, &exchange)?;
    exchange.on_server_first(&first).expect("the server's");
    Ok((client, exchange))
}

fn log_in(daemon: &Daemon, user: &str, password: &str) -> Result<Client, PgError> {
    let (mut client, mut exchange) = asked(daemon, user, password)?;
    client.send(b'p', exchange.message());
    let last = answer(&mut client, 12)?;
    exchange
        .on_server_final(&last)
        .expect("it has the verifier");
    client.until_ready().map(|_| client)
}

#[test]
fn who_proves_the_password_is_let_in_and_nobody_else() {
    let daemon = daemon();
    let wal = some_wal(10_000);
    let mut proposer = Proposer::lead_by(
        log_in(&daemon, "primary", "push").expect("let in"),
        cluster(1, "main"),
    );
    proposer.append_all(&wal, 100_000);
    proposer.commit(wal.position());
    let mut client = log_in(&daemon, "standby", "secret").expect("let in");
    let rows = client.query("IDENTIFY_SYSTEM").expect("a row");
    assert_eq!(
        rows[0][2].as_deref(),
        Some(wal.position().to_string().as_str())
    );
    // Whom there is, and whom there is not, is told the same.
    let wrong = log_in(&daemon, "standby", "Secret").expect_err("refused");
    let unknown = log_in(&daemon, "nobody", "secret").expect_err("refused");
    assert_eq!(wrong.sqlstate, "28P01");
    assert_eq!(unknown.sqlstate, "28P01");
    assert_eq!(wrong.message.replace("standby", "nobody"), unknown.message);
    let refused = |user: &str| {
        let mut client = Client::opened_by(daemon.address(), user);
        client.last_words().expect("a reason")
    };
    let banned = refused("banned");
    assert_eq!(banned.sqlstate, "28000");
    assert!(banned.message.contains("banned"), "{}", banned.message);
    Client::opened_by(daemon.address(), "local")
        .until_ready()
        .expect("trusted");
}

/// Whoever comes again, also after a restart, is asked as before: else that would tell whom there is.
#[test]
fn a_restart_tells_nobody_whom_there_is() {
    let mut daemon = daemon();
    let salts = |daemon: &Daemon| {
        ["standby", "nobody"].map(|user| {
            let mut client = Client::opened_by(daemon.address(), user);
            let exchange = ClientExchange::begin("x", ClientBinding::Impossible);
            let first = begin(&mut client, &exchange).expect("asked");
            let first = String::from_utf8(first).expect("text");
            let salt = first.split(',').find(|it| it.starts_with("s="));
            salt.expect("a salt").to_owned()
        })
    };
    let before = salts(&daemon);
    assert_ne!(before[0], before[1]);
    daemon.restart();
    assert_eq!(salts(&daemon), before);
    add_user(&daemon, "new", &[Role::Replication], "one");
    let server = daemon.server.as_ref().expect("running");
    server.reload(&rules(RULES)).expect("sound");
    assert_eq!(salts(&daemon), before);
}

#[test]
fn a_role_allows_what_it_is_for() {
    let daemon = daemon();
    let mut standby = log_in(&daemon, "standby", "secret").expect("let in");
    let refused = standby.start("START_WAL_PUSH").expect_err("not a proposer");
    assert_eq!(refused.sqlstate, "42501");
    assert!(refused.detail.contains("proposer"), "{}", refused.detail);
    // A proposer reads, too.
    let mut primary = log_in(&daemon, "primary", "push").expect("let in");
    let no_cluster = primary
        .query("IDENTIFY_SYSTEM")
        .expect_err("no cluster yet");
    assert_ne!(no_cluster.sqlstate, "42501");
    primary.start("START_WAL_PUSH").expect("it may");
}

#[test]
fn what_was_overheard_and_what_is_no_answer_opens_nothing() {
    let daemon = daemon();
    let mut overheard = ClientExchange::begin("secret", ClientBinding::Impossible);
    let mut client = Client::opened_by(daemon.address(), "standby");
    let first = begin(&mut client, &overheard).expect("asked");
    overheard.on_server_first(&first).expect("the server's");
    let proof = overheard.message().to_vec();
    client.send(b'p', &proof);
    answer(&mut client, 12).expect("right");
    // The same words again, in an exchange of their own.
    let mut replayed = Client::opened_by(daemon.address(), "standby");
    let fresh = ClientExchange::begin("whatever", ClientBinding::Impossible);
    begin(&mut replayed, &fresh).expect("asked");
    replayed.send(b'p', &proof);
    assert_eq!(replayed.last_words().expect("a reason").sqlstate, "08P01");
    for (tag, body) in [
        (b'p', &b""[..]),
        (b'p', b"SCRAM-SHA-256-PLUS\0\0\0\0\x01n"),
        (b'p', b"SCRAM-SHA-256\0\0\0\0\xFFn,,n=,r=abc"),
        (b'p', b"SCRAM-SHA-256\0\xFF\xFF\xFF\xFFn,,n=,r=abc"),
        (b'p', b"SCRAM-SHA-256\0\0\0\0\x04p=x,"),
        (b'Q', b"IDENTIFY_SYSTEM\0"),
    ] {
        let mut client = Client::opened_by(daemon.address(), "standby");
        client.receive().expect("a question");
        client.send(tag, body);
        let words = client.last_words().expect("a reason");
        assert_eq!(words.sqlstate, "08P01", "{}", words.message);
    }
}

#[test]
fn users_are_read_again_when_told_so() {
    let daemon = daemon();
    let server = daemon.server.as_ref().expect("running");
    add_user(&daemon, "new", &[Role::Replication], "one");
    log_in(&daemon, "new", "one").expect_err("not known yet");
    let config = rules(RULES);
    server.reload(&config).expect("sound");
    log_in(&daemon, "new", "one").expect("known");
    // A file that is damaged changes nothing.
    std::fs::write(daemon.data_dir().join("users.toml"), "[[user").expect("written");
    server.reload(&config).expect_err("damaged");
    log_in(&daemon, "new", "one").expect("still known");
    // Nor does one that is empty or gone for a moment.
    std::fs::write(daemon.data_dir().join("users.toml"), "").expect("written");
    server.reload(&config).expect_err("no users");
    std::fs::remove_file(daemon.data_dir().join("users.toml")).expect("there");
    server.reload(&config).expect_err("no users");
    log_in(&daemon, "new", "one").expect("still known");
    // Rules, too.
    add_user(&daemon, "new", &[Role::Replication], "one");
    let banned = "[[access]]\nuser = \"new\"\nmethod = \"reject\"\n".to_owned() + RULES;
    server.reload(&rules(&banned)).expect("sound");
    let refused = Client::opened_by(daemon.address(), "new").last_words();
    assert_eq!(refused.expect("a reason").sqlstate, "28000");
}

/// The address that is listened on is not that of a file which takes effect at the next start.
#[test]
fn rules_stay_as_long_as_others_can_come() {
    let mut daemon = Daemon::with(|config| {
        config.listen = "0.0.0.0:0".into();
        config.access = rules(RULES).access;
    });
    add_user(&daemon, "standby", &[Role::Replication], "secret");
    daemon.restart();
    let server = daemon.server.as_ref().expect("running");
    for (listen, trust_network, text, problem) in [
        ("127.0.0.1:0", false, "", "can be reached from other hosts"),
        ("0.0.0.0:0", true, "", "can be reached from other hosts"),
        (
            "127.0.0.1:0",
            false,
            "[[access]]\nmethod = \"trust\"",
            "can be reached from other hosts",
        ),
        (
            "127.0.0.1:0",
            false,
            "[[access]]\nmethod = \"cert\"",
            "no [tls] table",
        ),
    ] {
        let config = Config {
            listen: listen.into(),
            trust_network,
            ..rules(text)
        };
        let refused = server.reload(&config).expect_err("refused").to_string();
        assert!(refused.contains(problem), "{refused}");
        let mut stranger = Client::opened_by(daemon.address(), "standby");
        let (tag, body) = stranger.receive().expect("a question");
        assert_eq!((tag, &body[..4]), (b'R', &[0, 0, 0, 10][..]));
    }
    log_in(&daemon, "standby", "secret").expect("as before");
    // Nor does a file that is empty for a moment open what its operator has called safe for other reasons.
    let mut trusting = Daemon::with(|config| {
        config.trust_network = true;
        config.access = rules(RULES).access;
    });
    let server = trusting.server.as_ref().expect("running");
    let empty = Config {
        trust_network: true,
        ..rules("")
    };
    let refused = server.reload(&empty).expect_err("refused").to_string();
    assert!(refused.contains("no [[access]] table"), "{refused}");
    trusting.config.access.clear();
    trusting.restart();
    Client::opened_by(trusting.address(), "standby")
        .until_ready()
        .expect("trusted");
}

/// Whoever is about to be let in by rules that have just gone is not.
#[test]
fn a_reload_counts_for_those_who_have_not_come_in() {
    let daemon = daemon();
    let (mut client, exchange) = asked(&daemon, "standby", "secret").expect("asked");
    let mut users = Users::load(&daemon.data_dir()).expect("sound");
    users.remove("standby").expect("there");
    users.store(&daemon.data_dir()).expect("stored");
    let server = daemon.server.as_ref().expect("running");
    server.reload(&rules(RULES)).expect("sound");
    client.send(b'p', exchange.message());
    let refused = client.last_words().expect("a reason");
    assert_eq!(refused.sqlstate, "57P03");
}

/// However many come to read, a primary finds a place.
#[test]
fn some_places_are_for_those_who_push() {
    let mut daemon = daemon();
    daemon.config.max_connections = 12;
    daemon.restart();
    let readers: Vec<_> = (0..7)
        .map(|_| log_in(&daemon, "standby", "secret").expect("a place"))
        .collect();
    let refused = log_in(&daemon, "standby", "secret").expect_err("no place");
    assert_eq!(refused.sqlstate, "53300");
    let pushers: Vec<_> = (0..5)
        .map(|_| log_in(&daemon, "primary", "push").expect("a place"))
        .collect();
    let refused = log_in(&daemon, "primary", "push").expect_err("no place");
    assert_eq!(refused.sqlstate, "53300");
    // The places are those that they have: whoever comes first.
    drop(readers);
    daemon.wait_for_connections(5);
    let readers: Vec<_> = (0..7)
        .map(|_| log_in(&daemon, "standby", "secret").expect("a place"))
        .collect();
    drop((readers, pushers));
}

/// Those who never say who they are do not keep others out: the oldest makes room.
#[test]
fn strangers_do_not_keep_others_out() {
    let daemon = daemon();
    let silent: Vec<_> = (0..300)
        .map(|n| {
            let mut client = Client::raw(daemon.address());
            if n % 2 == 0 {
                // The beginning of a startup packet that never ends.
                let _ = client.socket.write_all(&[0, 0, 0, 100, 0, 3]);
            }
            client
        })
        .collect();
    log_in(&daemon, "standby", "secret").expect("there is room");
    wait_for("the strangers' threads to be few", || {
        let metrics = daemon.http("/metrics");
        let count = metrics
            .lines()
            .find_map(|line| line.strip_prefix("safekeeper_connections "))
            .and_then(|count| count.parse::<u64>().ok());
        count.expect("a count") <= 60
    });
    drop(silent);
}

/// A host that floods the safekeeper crowds out itself, and nobody else who is about to show who it is.
#[test]
fn a_flood_from_one_host_leaves_the_others_time() {
    let daemon = daemon();
    let (mut client, exchange) = asked(&daemon, "standby", "secret").expect("asked");
    let flood: Vec<_> = (0..300)
        .map(|_| {
            let socket = connect_from([127, 0, 0, 2], daemon.address());
            socket.set_nonblocking(true).expect("set");
            socket
        })
        .collect();
    // Nothing is said to those who have said nothing.
    let is_shut = |socket: &TcpStream| match socket.peek(&mut [0]) {
        Ok(_) => true,
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    };
    wait_for("most of the flood to be shut", || {
        flood.iter().filter(|socket| is_shut(socket)).count() >= 250
    });
    client.send(b'p', exchange.message());
    answer(&mut client, 12).expect("still there");
    client.until_ready().expect("let in");
}

fn connect_from(host: [u8; 4], to: SocketAddr) -> TcpStream {
    use rustix::net;
    let socket = net::socket(net::AddressFamily::INET, net::SocketType::STREAM, None);
    let socket = socket.expect("a socket");
    net::bind(&socket, &SocketAddr::from((host, 0))).expect("an address of our own");
    net::connect(&socket, &to).expect("connected");
    socket.into()
}

/// Who asks for encryption again and again gains no time by it.
#[test]
fn encryption_is_asked_for_once() {
    let daemon = daemon();
    const GSSAPI: [u8; 8] = [0, 0, 0, 8, 4, 0xD2, 0x16, 0x30];
    for (questions, n_answers) in [
        (&[ssl_request(), GSSAPI, ssl_request()][..], 2),
        (&[GSSAPI, GSSAPI], 1),
        (&[ssl_request(), ssl_request()], 1),
    ] {
        let mut client = Client::raw(daemon.address());
        client
            .socket
            .write_all(&questions.concat())
            .expect("the kernel takes it");
        let mut said = Vec::new();
        client.socket.read_to_end(&mut said).expect("closed");
        assert_eq!(said[..n_answers], vec![b'N'; n_answers]);
        assert_eq!(said[n_answers], b'E');
        let error = super::client::parse_error(&said[n_answers + 5..]);
        assert_eq!(error.sqlstate, "08P01");
        assert!(error.message.contains("twice"), "{}", error.message);
    }
}

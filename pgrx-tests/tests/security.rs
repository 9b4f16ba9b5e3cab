//! A cluster in which everybody must encrypt and prove who they are, and ten thousand who can't.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cluster_tests::Cluster;
use cluster_tests::place::{Programs, give_to_server_user};
use cluster_tests::poll::{SOON, wait_for, wait_until};
use cluster_tests::process::{Process, run, run_ok, signal_descendant, spawn};
use cluster_tests::safekeeper::Safekeeper;
use safekeeper_wire::certificates::{Authority, Issued, Subject};
use safekeeper_wire::channel::Channel;
use safekeeper_wire::scram::{ClientBinding, ClientExchange};
use safekeeper_wire::startup::{encode_startup, ssl_request};
use safekeeper_wire::tls::{ClientTls, SslMode};

const PASSWORDS: &str = "*:*:replication:walproposer:push\n*:*:replication:standby:read\n";

/// Rules, users and certificates for a cluster that is not started yet.
struct Secure {
    cluster: Cluster,
    authority: Authority,
    /// Its certificate.
    root: PathBuf,
    /// A proposer's certificate, as good as any but for being revoked, and the list that says so.
    revoked: Issued,
    crl: PathBuf,
    passfile: PathBuf,
    /// How a client verifies, in libpq's words.
    verify: String,
}

impl Secure {
    fn prepare() -> Secure {
        let cluster = Cluster::prepare(&[]);
        let authority = Authority::new("authority");
        let root = authority.store(cluster.dir.path(), "authority");
        let subject = Subject {
            common_name: "certified",
            hosts: &[],
            is_expired: false,
        };
        let revoked = authority.issue(cluster.dir.path(), "revoked", subject);
        let crl = authority.revoke(cluster.dir.path(), "authority", &[&revoked], 2100);
        let passfile = cluster.dir.path().join("pgpass");
        write_for_server(&passfile, PASSWORDS);
        let verify = format!(
            "passfile={} sslmode=verify-full sslrootcert={} sslcrl={}",
            passfile.display(),
            root.display(),
            crl.display()
        );
        let mut secure = Secure {
            cluster,
            authority,
            root,
            revoked,
            crl,
            passfile,
            verify,
        };
        for at in 0..secure.cluster.safekeepers.len() {
            secure.issue_for_safekeeper(at, false);
            let config = secure.config(at);
            let safekeeper = &mut secure.cluster.safekeepers[at];
            let file = safekeeper.data().with_extension("toml");
            write_for_server(&file, &config);
            safekeeper.set_settings(&["--config", file.to_str().expect("our own name")]);
            add_user(safekeeper, "walproposer", "proposer", Some("push"));
            add_user(safekeeper, "standby", "replication", Some("read"));
            add_user(safekeeper, "certified", "proposer", None);
        }
        secure.cluster.consumer = format!("user=standby {}", secure.verify);
        secure.push_as("walproposer", "channel_binding=require");
        secure
    }

    fn config(&self, at: usize) -> String {
        let data = self.cluster.safekeepers[at].data();
        let (cert, key) = (data.with_extension("crt"), data.with_extension("key"));
        format!(
            "[tls]\ncert = {:?}\nkey = {:?}\nclient_ca = {:?}\nclient_crl = {:?}\n\
             [[access]]\nuser = \"certified\"\nmethod = \"cert\"\n\
             [[access]]\naddress = \"127.0.0.0/8\"\ntls = true\nmethod = \"scram\"\n",
            cert, key, self.root, self.crl
        )
    }

    /// For the address that it listens on. What was there is replaced.
    fn issue_for_safekeeper(&self, at: usize, is_expired: bool) {
        let safekeeper = &self.cluster.safekeepers[at];
        let host = safekeeper.address().ip().to_string();
        let data = safekeeper.data();
        let name = data.file_name().expect("a name").to_string_lossy();
        let subject = Subject {
            common_name: "safekeeper",
            hosts: &[&host],
            is_expired,
        };
        let dir = data.parent().expect("a directory");
        give_to_server_user(&self.authority.issue(dir, &name, subject).key);
    }

    /// As whom the extension comes, from its next start or reload on.
    fn push_as(&self, user: &str, more: &str) {
        self.cluster.primary.configure(&format!(
            "walproposer.conninfo = 'user={user} {} {more}'",
            self.verify
        ));
    }

    fn certificate_for(&self, name: &str, is_expired: bool) -> Issued {
        let subject = Subject {
            common_name: name,
            hosts: &[],
            is_expired,
        };
        let issued =
            self.authority
                .issue(self.cluster.dir.path(), &format!("client-{name}"), subject);
        give_to_server_user(&issued.key);
        issued
    }

    /// What psql is told, as somebody at a safekeeper.
    fn psql(&self, conninfo: &str, password: &str) -> (bool, String) {
        let address = self.cluster.safekeepers[0].address();
        let mut command = Command::new(Programs::postgres("psql"));
        command.env("PGPASSWORD", password);
        command.env("PGPASSFILE", "/nonexistent");
        command.args(["-X", "-c", "IDENTIFY_SYSTEM"]);
        command.arg(format!(
            "host={} port={} replication=true sslrootcert={} {conninfo}",
            address.ip(),
            address.port(),
            self.root.display()
        ));
        run(command)
    }
}

fn write_for_server(path: &Path, text: &str) {
    std::fs::write(path, text).expect("our own directory");
    let only_owner = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path, only_owner).expect("our own file");
    give_to_server_user(path);
}

fn add_user(safekeeper: &Safekeeper, name: &str, role: &str, password: Option<&str>) {
    let mut command = Safekeeper::program();
    command.args(["user", "add", name, "--role", role, "--data-dir"]);
    command.arg(safekeeper.data());
    match password {
        Some(password) => {
            let file = safekeeper.data().with_extension("password");
            write_for_server(&file, password);
            command.arg("--password-file").arg(file);
        }
        None => {
            command.arg("--no-password");
        }
    }
    run_ok(command);
}

fn remove_user(safekeeper: &Safekeeper, name: &str) {
    let mut command = Safekeeper::program();
    command
        .args(["user", "remove", name, "--data-dir"])
        .arg(safekeeper.data());
    run_ok(command);
}

/// Commits, a crash and its recovery, a standby, a receiver, our own tools, and what psql is told: all of it
/// encrypted and with a password.
#[test]
fn everybody_encrypts_and_proves_a_password() {
    let mut secure = Secure::prepare();
    secure.cluster.start_all();
    let cluster = &secure.cluster;
    cluster.primary.pgbench_init(1);
    let received = cluster.dir.create("received");
    let mut command = Command::new(Programs::postgres("pg_receivewal"));
    command
        .args([
            "--dbname",
            &cluster.conninfo("receiver"),
            "--synchronous",
            "--directory",
        ])
        .arg(&received);
    let log = cluster.dir.path().join("receiver.log");
    let _receiver = Process::start("pg_receivewal", command, &log);
    let standby = cluster.start_standby("standby");
    cluster.primary.pgbench(4, Duration::from_secs(2));
    let end = cluster.wait_all_caught_up(SOON);
    wait_until("the standby follows", SOON, || standby.replay_lsn() >= end);
    cluster.wait_flushed_by("receiver", end);

    let cluster = &mut secure.cluster;
    cluster.primary.kill9();
    cluster.primary.start();
    cluster.wait_streaming(3);
    cluster.primary.pgbench(2, Duration::from_secs(1));
    let end = cluster.wait_all_caught_up(SOON);
    cluster.assert_wal_equal(end);

    let cluster = &secure.cluster;
    let mut version = Command::new(Programs::postgres("psql"));
    version.arg("--version");
    let version = run_ok(version);
    let knows_direct = ![") 15", ") 16"].iter().any(|major| version.contains(major));
    for (more, is_known) in [
        ("sslmode=verify-full", true),
        ("sslmode=verify-full channel_binding=require", true),
        ("sslmode=verify-full sslnegotiation=direct", knows_direct),
    ] {
        if !is_known {
            continue;
        }
        let (ok, text) = secure.psql(&format!("user=standby {more}"), "read");
        assert!(
            ok && text.contains(&cluster.system_id.to_string()),
            "{text}"
        );
    }
    for (conninfo, password, expected) in [
        (
            "user=standby sslmode=verify-full",
            "push",
            "password authentication failed for user \"standby\"",
        ),
        (
            "user=nobody sslmode=verify-full",
            "read",
            "password authentication failed for user \"nobody\"",
        ),
        (
            "user=standby sslmode=disable",
            "read",
            "no access rule for host",
        ),
        (
            "user=certified sslmode=verify-full",
            "read",
            "requires a valid client certificate",
        ),
    ] {
        let (ok, text) = secure.psql(conninfo, password);
        assert!(!ok && text.contains(expected), "{conninfo}: {text}");
    }

    let start = end.segment_start(1 << 24).to_string();
    let address = cluster.safekeepers[0].address().to_string();
    let mut tail = Safekeeper::program();
    tail.args(["tail", "--from", &address, "--start", &start, "--summary"]);
    tail.args([
        "--user",
        "standby",
        "--sslmode",
        "verify-full",
        "--passfile",
    ]);
    tail.arg(&secure.passfile)
        .arg("--sslrootcert")
        .arg(&secure.root);
    run_ok(tail);
    // It finds everything in walproposer.toml, beside pg_wal.
    let fetched = cluster.primary.wal_dir().join("FETCHED");
    let mut fetch = Safekeeper::program();
    fetch
        .args(["fetch-wal", "000000010000000000000003"])
        .arg(&fetched);
    run_ok(fetch);
    std::fs::remove_file(fetched).expect("it is there");

    // No password stands anywhere but where we wrote it.
    for safekeeper in &cluster.safekeepers {
        let users = std::fs::read_to_string(safekeeper.data().join("users.toml"));
        assert!(!users.expect("a file").contains("push"));
    }
    let settings = cluster.primary.data().join("walproposer.toml");
    let settings = std::fs::read_to_string(settings).expect("written at the start");
    assert!(
        settings.contains("pgpass")
            && settings.contains("verify-full")
            && !settings.contains("push"),
        "{settings}"
    );
}

/// Passwords and certificates change while everything runs: who is in stays in, who comes anew needs the new
/// ones, and the view says what is wrong meanwhile. Commits go on with the others.
#[test]
fn what_is_changed_is_read_anew() {
    let mut secure = Secure::prepare();
    secure.cluster.start_all();
    secure.cluster.primary.sql("create table t (a int)");
    let ill = 1;
    let another_worker = |secure: &Secure| {
        let cluster = &secure.cluster;
        let worker = cluster.primary.worker().expect("there is one");
        signal_descendant(worker, libc::SIGTERM);
        wait_until("another worker leads", SOON, || {
            cluster.primary.worker().is_some_and(|pid| pid != worker)
                && cluster.members_active() >= Some(2)
        });
    };
    let said = |secure: &Secure, what: &str| {
        wait_until(what, SOON, || {
            secure.cluster.member(2, "last_error").contains(what)
        });
        secure.cluster.primary.sql("insert into t values (1)");
    };

    // Another password, told to the daemon and then to the extension's file.
    remove_user(&secure.cluster.safekeepers[ill], "walproposer");
    add_user(
        &secure.cluster.safekeepers[ill],
        "walproposer",
        "proposer",
        Some("other"),
    );
    secure.cluster.safekeepers[ill]
        .process()
        .signal(libc::SIGHUP);
    secure.cluster.primary.sql("insert into t values (0)");
    assert_eq!(
        secure.cluster.members_active(),
        Some(3),
        "who is in stays in"
    );
    wait_reloads(&secure.cluster.safekeepers[ill], 1);
    another_worker(&secure);
    said(&secure, "password authentication failed");
    let port = secure.cluster.safekeepers[ill].address().port();
    let passwords = format!("*:{port}:replication:walproposer:other\n{PASSWORDS}");
    write_for_server(&secure.passfile, &passwords);
    secure.cluster.wait_streaming(3);

    // A certificate that has expired, and a good one again.
    secure.issue_for_safekeeper(ill, true);
    secure.cluster.safekeepers[ill]
        .process()
        .signal(libc::SIGHUP);
    wait_reloads(&secure.cluster.safekeepers[ill], 2);
    another_worker(&secure);
    said(&secure, "expired");
    secure.issue_for_safekeeper(ill, false);
    secure.cluster.safekeepers[ill]
        .process()
        .signal(libc::SIGHUP);
    secure.cluster.wait_streaming(3);

    // From a password to a certificate, which must be of that user, and while the worker runs.
    for at in 0..3 {
        remove_user(&secure.cluster.safekeepers[at], "walproposer");
        secure.cluster.safekeepers[at]
            .process()
            .signal(libc::SIGHUP);
    }
    let issued = secure.certificate_for("certified", false);
    let shown = format!(
        "sslcert={} sslkey={}",
        issued.cert.display(),
        issued.key.display()
    );
    secure.push_as("certified", &shown);
    secure.cluster.primary.reload();
    for at in 0..3 {
        secure.cluster.safekeepers[at].kill9();
        secure.cluster.safekeepers[at].start();
        secure.cluster.wait_streaming(3);
    }
    let settings = secure.cluster.primary.data().join("walproposer.toml");
    let settings = std::fs::read_to_string(settings).expect("it is there");
    assert!(settings.contains("certified"), "{settings}");
    secure.cluster.primary.sql("insert into t values (2)");
    let end = secure.cluster.wait_all_caught_up(SOON);
    secure.cluster.assert_wal_equal(end);
}

/// Until the daemon has read everything again so many times.
fn wait_reloads(safekeeper: &Safekeeper, count: usize) {
    wait_until("access control was reloaded", SOON, || {
        let log = safekeeper.process().log();
        log.matches("access control reloaded").count() >= count
    });
}

/// While commits go on, ten thousand come who have no business here. None gets in, no daemon dies or grows.
#[test]
fn ten_thousand_strangers_get_nowhere() {
    const STRANGERS: usize = 10_000;
    const THREADS: usize = 8;
    let mut secure = Secure::prepare();
    secure.cluster.start_all();
    let cluster = &secure.cluster;
    cluster.primary.pgbench_init(1);
    let mut load = cluster.primary.pgbench_command(4, Duration::from_secs(300));
    load.stdout(Stdio::null()).stderr(Stdio::null());
    let mut load = spawn(load).expect("could not start pgbench");
    let commits = || -> u64 {
        let commits = "select count(*) from pgbench_history";
        cluster.primary.value(commits).parse().expect("a number")
    };
    let before = wait_for("the first commits", SOON, || {
        Some(commits()).filter(|n| *n > 0)
    });
    let strangers = Strangers::of(&secure);
    let let_in = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (strangers, let_in) = (&strangers, &let_in);
            scope.spawn(move || {
                let mut silent = Vec::new();
                for n in (thread..STRANGERS).step_by(THREADS) {
                    let is_in = strangers.bother(n, &mut silent);
                    let_in.fetch_add(usize::from(is_in), Ordering::Relaxed);
                }
            });
        }
    });
    let during = commits();
    assert_eq!(let_in.into_inner(), 0, "strangers were let in");
    assert!(during > before, "{before} commits before, {during} after");
    for safekeeper in &cluster.safekeepers {
        assert!(safekeeper.runs());
        let resident = safekeeper.process().resident_bytes();
        assert!(resident < 64 << 20, "{resident} bytes");
    }
    cluster.wait_streaming(3);
    wait_until("commits go on", SOON, || commits() > during);
    load.kill().expect("our own child");
    load.wait().expect("our own child");
    let end = cluster.wait_all_caught_up(SOON);
    cluster.assert_wal_equal(end);
}

/// What they have got hold of.
struct Strangers {
    addresses: Vec<SocketAddr>,
    /// The proof of somebody who was let in.
    overheard: Vec<u8>,
    /// One with an expired certificate, one with another authority's, one with another user's, one with a
    /// revoked one, one with none.
    tls: Vec<ClientTls>,
}

impl Strangers {
    fn of(secure: &Secure) -> Strangers {
        let safekeepers = secure.cluster.safekeepers.iter();
        let addresses: Vec<_> = safekeepers.map(Safekeeper::address).collect();
        let dir = secure.cluster.dir.create("strangers");
        let own = Authority::new("their own");
        let subject = |common_name, is_expired| Subject {
            common_name,
            hosts: &[],
            is_expired,
        };
        let certificates = [
            Some(
                secure
                    .authority
                    .issue(&dir, "late", subject("certified", true)),
            ),
            Some(own.issue(&dir, "own", subject("certified", false))),
            Some(
                secure
                    .authority
                    .issue(&dir, "other", subject("standby", false)),
            ),
            Some(secure.revoked.clone()),
            None,
        ];
        let tls = certificates.into_iter().map(|issued| ClientTls {
            mode: SslMode::VerifyFull,
            root_cert: Some(secure.root.clone()),
            crl: None,
            cert: issued.as_ref().map(|issued| issued.cert.clone()),
            key: issued.map(|issued| issued.key),
        });
        let tls: Vec<_> = tls.collect();
        Strangers {
            overheard: overhear(addresses[0], &tls[4]),
            addresses,
            tls,
        }
    }

    /// One connection that comes to nothing. True if it was let in all the same.
    fn bother(&self, n: usize, silent: &mut Vec<TcpStream>) -> bool {
        let address = self.addresses[n % self.addresses.len()];
        let Ok(socket) = TcpStream::connect(address) else {
            return false;
        };
        let _ = socket.set_read_timeout(Some(SOON));
        let startup = |user: &str| encode_startup(&[("user", user), ("replication", "true")]);
        let guess = ClientExchange::begin("guess", ClientBinding::Impossible);
        let seed = (n as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes();
        let stays = |mut socket: TcpStream, said: &[u8], silent: &mut Vec<TcpStream>| {
            let _ = socket.write_all(said);
            silent.push(socket);
            if silent.len() > 20 {
                silent.remove(0);
            }
            false
        };
        let in_the_clear = |socket: TcpStream, said: &[&[u8]]| talk(socket.into(), said);
        match n % 17 {
            // Anything.
            0 => in_the_clear(socket, &[&seed.repeat(1 + n % 50)]),
            // The beginning of something that never ends, and it stays.
            1 => stays(socket, &startup("standby")[..3 + n % 20], silent),
            // More than there is in the world.
            2 => in_the_clear(socket, &[&[0x7F, 0xFF, 0xFF, 0xFF, 0, 3, 0, 0]]),
            // The right password would not help, unencrypted.
            3 => in_the_clear(socket, &[&startup("standby"), &initial_response(&guess)]),
            // One who leaves in the middle.
            4 => in_the_clear(socket, &[&startup("root")]),
            // Half a handshake, and it stays; or what is none.
            5 => stays(socket, &ssl_request(), silent),
            6 => stays(socket, &[&[0x16, 3, 1, 0, 200], &seed[..]].concat(), silent),
            7 => in_the_clear(socket, &[&ssl_request(), &startup("standby")]),
            8 => in_the_clear(socket, &[&[0x16, 3, 1, 0, 40], &seed.repeat(5)]),
            // Who encrypts, with one certificate or another or none.
            kind => {
                let tls = &self.tls[if kind < 13 { kind - 9 } else { 4 }];
                let mut channel = Channel::from(socket);
                let host = address.ip().to_string();
                let deadline = Instant::now() + SOON;
                if channel.request_tls(tls, &host, deadline).is_err() {
                    return false;
                }
                let _ = channel.socket().set_read_timeout(Some(SOON));
                let oversized = [b'p', 0xFF, 0xFF, 0xFF, 0xFF];
                match kind {
                    9..13 => talk(channel, &[&startup("certified")]),
                    // Straight to the point, without an answer.
                    13 => talk(
                        channel,
                        &[&startup("walproposer"), &message(b'Q', b"START_WAL_PUSH\0")],
                    ),
                    14 => talk(channel, &[&startup("standby"), &oversized]),
                    // The wrong password.
                    15 => talk(
                        channel,
                        &[
                            &startup("walproposer"),
                            &initial_response(&guess),
                            &message(b'p', b"c=biws,r=x,p=AAAA"),
                        ],
                    ),
                    // What was overheard.
                    _ => talk(
                        channel,
                        &[
                            &startup("standby"),
                            &initial_response(&guess),
                            &self.overheard,
                        ],
                    ),
                }
            }
        }
    }
}

/// Says it all and hears the other side out. AuthenticationOk would be a message R with a zero.
fn talk(mut channel: Channel, said: &[&[u8]]) -> bool {
    for part in said {
        if channel.write_all(part).is_err() {
            break;
        }
    }
    channel.end_output();
    let _ = channel.socket().shutdown(Shutdown::Write);
    while let Some((tag, body)) = receive(&mut channel) {
        if tag == b'R' && body == [0; 4] {
            return true;
        }
    }
    false
}

/// Somebody who may.
fn overhear(address: SocketAddr, tls: &ClientTls) -> Vec<u8> {
    let socket = TcpStream::connect(address).expect("connected");
    let mut channel = Channel::from(socket);
    let host = address.ip().to_string();
    channel
        .request_tls(tls, &host, Instant::now() + SOON)
        .expect("encrypted");
    let mut exchange = ClientExchange::begin("read", ClientBinding::Impossible);
    let startup = encode_startup(&[("user", "standby"), ("replication", "true")]);
    channel.write_all(&startup).expect("sent");
    receive(&mut channel).expect("a question");
    channel
        .write_all(&initial_response(&exchange))
        .expect("sent");
    let (_, first) = receive(&mut channel).expect("an answer");
    exchange.on_server_first(&first[4..]).expect("the server's");
    let proof = message(b'p', exchange.message());
    channel.write_all(&proof).expect("sent");
    let (tag, last) = receive(&mut channel).expect("an answer");
    assert_eq!((tag, last[3]), (b'R', 12), "the right password is right");
    proof
}

fn initial_response(exchange: &ClientExchange) -> Vec<u8> {
    let first = exchange.message();
    let len = u32::try_from(first.len()).expect("short").to_be_bytes();
    message(b'p', &[b"SCRAM-SHA-256\0", &len[..], first].concat())
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len() + 4).expect("short").to_be_bytes();
    [&[tag], &len[..], body].concat()
}

fn receive(channel: &mut Channel) -> Option<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    channel.read_exact(&mut head).ok()?;
    let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
    // What answers a handshake that was none is no message.
    let len = usize::try_from(len.checked_sub(4)?).ok()?;
    let mut body = vec![0; Some(len).filter(|len| *len <= 1 << 20)?];
    channel.read_exact(&mut body).ok()?;
    Some((head[0], body))
}

//! A cluster in which everybody must prove a password, and ten thousand who have none.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cluster_tests::Cluster;
use cluster_tests::place::{Programs, give_to_server_user};
use cluster_tests::poll::{SOON, wait_for, wait_until};
use cluster_tests::process::{Process, run, run_ok, spawn};
use cluster_tests::safekeeper::Safekeeper;
use safekeeper_wire::scram::ClientExchange;
use safekeeper_wire::startup::encode_startup;

const RULES: &str = "[[access]]\naddress = \"127.0.0.0/8\"\nmethod = \"scram\"\n";

fn secure_cluster() -> Cluster {
    let mut cluster = Cluster::prepare(&[]);
    let rules = write_for_server(&cluster, "safekeeper.toml", RULES);
    for safekeeper in &mut cluster.safekeepers {
        add_user(safekeeper, "walproposer", "proposer", "push");
        add_user(safekeeper, "standby", "replication", "read");
        let rules = rules.to_str().expect("our own name");
        safekeeper.set_settings(&["--config", rules]);
    }
    let passwords = "*:*:replication:walproposer:push\n*:*:replication:standby:read\n";
    let passfile = write_for_server(&cluster, "pgpass", passwords);
    cluster.primary.configure(&format!(
        "walproposer.conninfo = 'user=walproposer passfile={}'",
        passfile.display()
    ));
    cluster
}

fn write_for_server(cluster: &Cluster, name: &str, text: &str) -> PathBuf {
    let path = cluster.dir.path().join(name);
    std::fs::write(&path, text).expect("our own directory");
    let only_owner = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(&path, only_owner).expect("our own file");
    give_to_server_user(&path);
    path
}

fn add_user(safekeeper: &Safekeeper, name: &str, role: &str, password: &str) {
    let file = safekeeper.data().with_extension("password");
    std::fs::write(&file, password).expect("our own directory");
    give_to_server_user(&file);
    let mut command = Safekeeper::program();
    command.args(["user", "add", name, "--role", role, "--data-dir"]);
    command
        .arg(safekeeper.data())
        .arg("--password-file")
        .arg(&file);
    run_ok(command);
}

fn remove_user(safekeeper: &Safekeeper, name: &str) {
    let mut command = Safekeeper::program();
    command
        .args(["user", "remove", name, "--data-dir"])
        .arg(safekeeper.data());
    run_ok(command);
}

/// Commits, a crash and its recovery, a standby, a receiver, and what libpq's own clients are told.
#[test]
fn everybody_proves_a_password() {
    let mut cluster = secure_cluster();
    cluster.start_all();
    cluster.primary.pgbench_init(1);
    let passfile = cluster.dir.path().join("pgpass");
    let conninfo = |name: &str| {
        format!(
            "{} user=standby passfile={}",
            cluster.conninfo(name),
            passfile.display()
        )
    };
    let received = cluster.dir.create("received");
    let mut command = Command::new(Programs::postgres("pg_receivewal"));
    command
        .args(["--dbname", &conninfo("receiver"), "--directory"])
        .arg(&received);
    let log = cluster.dir.path().join("receiver.log");
    let _receiver = Process::start("pg_receivewal", command, &log);
    let standby = cluster.start_standby("standby");
    standby.configure(&format!("primary_conninfo = '{}'", conninfo("standby")));
    standby.reload();
    cluster.primary.pgbench(4, Duration::from_secs(2));
    let end = cluster.wait_all_caught_up(SOON);
    wait_until("the standby follows", SOON, || standby.replay_lsn() >= end);
    cluster.wait_flushed_by("receiver", end);

    cluster.primary.kill9();
    cluster.primary.start();
    cluster.wait_streaming(3);
    cluster.primary.pgbench(2, Duration::from_secs(1));
    let end = cluster.wait_all_caught_up(SOON);
    cluster.assert_wal_equal(end);

    let address = cluster.safekeepers[0].address();
    let psql = |user: &str, password: &str| {
        let mut command = Command::new(Programs::postgres("psql"));
        command.env("PGPASSWORD", password);
        command.env("PGPASSFILE", "/nonexistent");
        command.args(["-X", "-c", "IDENTIFY_SYSTEM"]);
        command.arg(format!(
            "host={} port={} user={user} replication=true",
            address.ip(),
            address.port()
        ));
        run(command)
    };
    let (ok, text) = psql("standby", "read");
    assert!(
        ok && text.contains(&cluster.system_id.to_string()),
        "{text}"
    );
    for (user, password) in [("standby", "push"), ("nobody", "read")] {
        let (ok, text) = psql(user, password);
        assert!(!ok, "{text}");
        let expected = format!("password authentication failed for user \"{user}\"");
        assert!(text.contains(&expected), "{text}");
    }
    let mut tail = Safekeeper::program();
    tail.args(["tail", "--user", "standby", "--from", &address.to_string()]);
    tail.args([
        "--start",
        &end.segment_start(1 << 24).to_string(),
        "--summary",
        "--passfile",
    ]);
    let tail = tail.arg(&passfile).output().expect("it runs");
    assert!(
        tail.status.success(),
        "{}",
        String::from_utf8_lossy(&tail.stderr)
    );

    // No password stands anywhere but where we wrote it.
    for safekeeper in &cluster.safekeepers {
        let users = std::fs::read_to_string(safekeeper.data().join("users.toml"));
        assert!(!users.expect("a file").contains("push"));
    }
    let settings = cluster.primary.data().join("walproposer.toml");
    let settings = std::fs::read_to_string(settings).expect("written at the start");
    assert!(
        settings.contains("pgpass") && !settings.contains("push"),
        "{settings}"
    );
}

/// One safekeeper is told another password: the view says what is wrong, commits go on with the others, and
/// a new line in the password file is enough.
#[test]
fn a_password_that_is_changed_is_read_anew() {
    let mut cluster = secure_cluster();
    cluster.start_all();
    cluster.primary.sql("create table t (a int)");
    remove_user(&cluster.safekeepers[1], "walproposer");
    add_user(&cluster.safekeepers[1], "walproposer", "proposer", "other");
    cluster.safekeepers[1].kill9();
    cluster.safekeepers[1].start();
    wait_until("the view says why", SOON, || {
        cluster
            .member(2, "last_error")
            .contains("password authentication failed")
    });
    cluster.primary.sql("insert into t values (1)");
    let port = cluster.safekeepers[1].address().port();
    let passwords =
        format!("*:{port}:replication:walproposer:other\n*:*:replication:walproposer:push\n");
    write_for_server(&cluster, "pgpass", &passwords);
    cluster.wait_streaming(3);
    // And back, with the daemon running.
    remove_user(&cluster.safekeepers[1], "walproposer");
    add_user(&cluster.safekeepers[1], "walproposer", "proposer", "push");
    cluster.safekeepers[1].process().signal(libc::SIGHUP);
    write_for_server(&cluster, "pgpass", "*:*:replication:walproposer:push\n");
    let worker = cluster.primary.worker().expect("there is one");
    cluster_tests::process::signal_descendant(worker, libc::SIGTERM);
    wait_until("another worker leads", SOON, || {
        cluster.primary.worker().is_some_and(|pid| pid != worker)
            && cluster.members_active() == Some(3)
    });
    cluster.primary.sql("insert into t values (2)");
}

/// While commits go on, ten thousand come who have no business here. None gets in, no daemon dies or grows.
#[test]
fn ten_thousand_strangers_get_nowhere() {
    const STRANGERS: usize = 10_000;
    const THREADS: usize = 8;
    let mut cluster = secure_cluster();
    cluster.start_all();
    cluster.primary.pgbench_init(1);
    let mut load = cluster.primary.pgbench_command(4, Duration::from_secs(60));
    load.stdout(Stdio::null()).stderr(Stdio::null());
    let mut load = spawn(load).expect("could not start pgbench");
    let addresses: Vec<_> = cluster
        .safekeepers
        .iter()
        .map(Safekeeper::address)
        .collect();
    let let_in = AtomicUsize::new(0);
    let commits = || -> u64 {
        let commits = "select count(*) from pgbench_history";
        cluster.primary.value(commits).parse().expect("a number")
    };
    let before = wait_for("the first commits", SOON, || {
        Some(commits()).filter(|n| *n > 0)
    });
    let overheard = overhear(addresses[0]);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (addresses, let_in, overheard) = (&addresses, &let_in, &overheard);
            scope.spawn(move || {
                let mut silent = Vec::new();
                for n in (thread..STRANGERS).step_by(THREADS) {
                    let address = addresses[n % addresses.len()];
                    let_in.fetch_add(
                        usize::from(bother(address, n, overheard, &mut silent)),
                        Ordering::Relaxed,
                    );
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

/// The proof of somebody who was let in.
fn overhear(address: SocketAddr) -> Vec<u8> {
    let mut socket = TcpStream::connect(address).expect("connected");
    socket.set_read_timeout(Some(SOON)).expect("a timeout");
    let mut exchange = ClientExchange::begin("read");
    socket
        .write_all(&encode_startup(&[
            ("user", "standby"),
            ("replication", "true"),
        ]))
        .expect("sent");
    receive(&mut socket).expect("a question");
    socket
        .write_all(&initial_response(exchange.message()))
        .expect("sent");
    let (_, first) = receive(&mut socket).expect("an answer");
    exchange.on_server_first(&first[4..]).expect("the server's");
    let proof = message(b'p', exchange.message());
    socket.write_all(&proof).expect("sent");
    let (tag, last) = receive(&mut socket).expect("an answer");
    assert_eq!((tag, last[3]), (b'R', 12), "the right password is right");
    proof
}

/// One connection that comes to nothing. True if it was let in all the same.
fn bother(address: SocketAddr, n: usize, overheard: &[u8], silent: &mut Vec<TcpStream>) -> bool {
    let Ok(mut socket) = TcpStream::connect(address) else {
        return false;
    };
    let _ = socket.set_read_timeout(Some(SOON));
    let startup = |user: &str| encode_startup(&[("user", user), ("replication", "true")]);
    let seed = (n as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let said: Vec<Vec<u8>> = match n % 8 {
        // Anything.
        0 => vec![seed.to_be_bytes().repeat(1 + n % 50)],
        // The beginning of something that never ends, and it stays.
        1 => {
            let _ = socket.write_all(&startup("standby")[..3 + n % 20]);
            silent.push(socket);
            if silent.len() > 20 {
                silent.remove(0);
            }
            return false;
        }
        // More than there is in the world.
        2 => vec![vec![0x7F, 0xFF, 0xFF, 0xFF, 0, 3, 0, 0]],
        3 => vec![startup("standby"), vec![b'p', 0xFF, 0xFF, 0xFF, 0xFF]],
        // Straight to the point, without an answer.
        4 => vec![startup("walproposer"), message(b'Q', b"START_WAL_PUSH\0")],
        // The wrong password.
        5 => vec![
            startup("walproposer"),
            initial_response(ClientExchange::begin("guess").message()),
            message(
                b'p',
                b"c=biws,r=x,p=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
            ),
        ],
        // What was overheard.
        6 => vec![
            startup("standby"),
            initial_response(ClientExchange::begin("guess").message()),
            overheard.to_vec(),
        ],
        // One who is not known, and leaves in the middle.
        _ => {
            let _ = socket.write_all(&startup("root"));
            let _ = socket.shutdown(Shutdown::Write);
            vec![]
        }
    };
    for part in said {
        if socket.write_all(&part).is_err() {
            break;
        }
    }
    let _ = socket.shutdown(Shutdown::Write);
    // Until it is closed; AuthenticationOk would be a message R with a zero.
    while let Some((tag, body)) = receive(&mut socket) {
        if tag == b'R' && body == [0; 4] {
            return true;
        }
    }
    false
}

fn initial_response(first: &[u8]) -> Vec<u8> {
    let len = u32::try_from(first.len()).expect("short").to_be_bytes();
    message(b'p', &[b"SCRAM-SHA-256\0", &len[..], first].concat())
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len() + 4).expect("short").to_be_bytes();
    [&[tag], &len[..], body].concat()
}

fn receive(socket: &mut impl Read) -> Option<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    socket.read_exact(&mut head).ok()?;
    let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
    let mut body = vec![0; usize::try_from(len.checked_sub(4)?).ok()?];
    socket.read_exact(&mut body).ok()?;
    Some((head[0], body))
}

//! Bad input gets a clear error that names the value, and loses nothing.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use cluster_tests::link::Link;
use cluster_tests::place::{TestDir, give_to_server_user};
use cluster_tests::poll::{SOON, never_within, wait_until};
use cluster_tests::postgres::Postgres;
use cluster_tests::process::run;
use cluster_tests::safekeeper::Safekeeper;
use cluster_tests::{Cluster, safekeepers_setting, system_id};

#[test]
fn malformed_settings_of_the_server_are_refused_by_name() {
    let dir = TestDir::new();
    let mut server = Postgres::init(&dir, "server", &[]);
    server.configure("shared_preload_libraries = 'walproposer'");
    // Each with the words that the error must have.
    let cases = [
        ("walproposer.safekeepers = 'two words:5454'", "two words"),
        ("walproposer.safekeepers = '127.0.0.1:'", "127.0.0.1:"),
        ("walproposer.safekeepers = ':5454'", ":5454"),
        ("walproposer.safekeepers = '127.0.0.1:0'", "127.0.0.1:0"),
        (
            "walproposer.safekeepers = '127.0.0.1:99999'",
            "127.0.0.1:99999",
        ),
        (
            "walproposer.safekeepers = '127.0.0.1:54x4'",
            "127.0.0.1:54x4",
        ),
        (
            "walproposer.safekeepers = '127.0.0.1:5454,127.0.0.1:5454'",
            "127.0.0.1:5454",
        ),
        (
            "walproposer.safekeepers = '127.0.0.1:5454,,127.0.0.1:5455'",
            "walproposer.safekeepers",
        ),
        ("walproposer.conninfo = 'frobnicate=1'", "frobnicate"),
        ("wal_level = minimal\nmax_wal_senders = 0", "wal_level"),
        (
            "synchronous_standby_names = 'somebody_else'",
            "synchronous_standby_names",
        ),
        // Two standbys called a would do, without any safekeeper.
        (
            "synchronous_standby_names = 'FIRST 2 (a, walproposer)'",
            "synchronous_standby_names",
        ),
        (
            "walproposer.safekeeper = '127.0.0.1:1'",
            "\"walproposer.safekeeper\"",
        ),
        (
            "walproposer.membr_timeout = '1s'",
            "walproposer.membr_timeout",
        ),
    ];
    let good = fs::read_to_string(server.data().join("postgresql.conf")).expect("it is there");
    for (line, word) in cases {
        fs::write(server.data().join("postgresql.conf"), &good).expect("it can be written");
        server.configure("walproposer.safekeepers = '127.0.0.1:5454'");
        server.configure(line);
        let log = server.start_refused();
        let complaint = log
            .lines()
            .find(|l| l.contains("FATAL") || l.contains("ERROR") || l.contains("LOG"));
        assert!(
            complaint.is_some() && log.contains(word),
            "{line}: no word of {word:?} in:\n{log}"
        );
    }
}

/// A value that is none of those there are is reported; Postgres itself then goes on with the
/// default, and that is a safe one.
#[test]
fn unknown_values_are_reported_and_the_defaults_hold() {
    let mut cluster = Cluster::prepare(&[]);
    cluster
        .primary
        .configure("walproposer.min_synchronous_commit = 'perhaps'");
    cluster.start_all();
    let log = cluster.primary.log();
    let value = "invalid value for parameter \"walproposer.min_synchronous_commit\": \"perhaps\"";
    assert!(log.contains(value), "{log}");
    let in_force = cluster
        .primary
        .value("show walproposer.min_synchronous_commit");
    assert_eq!(in_force, "remote_write");
}

/// Commits wait, nothing is lost, and the view names the host. With the right name all is well.
#[test]
fn an_unresolvable_host_is_named_in_the_view() {
    let mut cluster = Cluster::prepare(&[]);
    let others = cluster.safekeepers[..2]
        .iter()
        .map(|s| s.address().to_string());
    let list: Vec<_> = others
        .chain(["no-such-host.invalid:5454".to_owned()])
        .collect();
    cluster
        .primary
        .configure(&format!("walproposer.safekeepers = '{}'", list.join(",")));
    cluster.safekeepers.iter_mut().for_each(Safekeeper::start);
    cluster.primary.start();
    let created = cluster.commit_in_background("create extension walproposer");
    never_within(
        "first use without one of the safekeepers",
        Duration::from_secs(3),
        || created.answered(),
    );
    let log = || cluster.primary.log();
    wait_until("the log names the host", SOON, || {
        log().contains("no-such-host.invalid")
    });

    cluster.primary.kill9();
    assert!(created.wait(SOON).is_err());
    cluster.primary.configure(&safekeepers_setting(
        cluster.safekeepers.iter().map(Safekeeper::address),
    ));
    cluster.primary.start();
    cluster
        .primary
        .sql("create extension if not exists walproposer");
    cluster.wait_streaming(3);
}

/// Another cluster's primary, by mistake given the same safekeepers and the same cluster_name.
#[test]
fn the_primary_of_another_cluster_is_refused() {
    let cluster = Cluster::start();
    let addresses = || cluster.safekeepers.iter().map(Safekeeper::address);
    let mut stranger = Postgres::init(&cluster.dir, "stranger", &[]);
    stranger.configure("shared_preload_libraries = 'walproposer'");
    stranger.configure(&safekeepers_setting(addresses()));
    stranger.start_without_waiting();
    let ids = [cluster.system_id, system_id(&stranger)].map(|id| id.to_string());
    wait_until("the log names both clusters", SOON, || {
        let log = stranger.log();
        ids.iter().all(|id| log.contains(id))
    });
    never_within("the stranger's start", Duration::from_secs(2), || {
        stranger.try_client().is_ok()
    });
    cluster.primary.sql("create table t (a int)");
    stranger.kill9();

    // Under a name of its own it is welcome, with segments of another size too.
    let mut guest = Postgres::init(&cluster.dir, "guest", &["--wal-segsize=1"]);
    guest.configure("shared_preload_libraries = 'walproposer'\nwalproposer.cluster_name = 'guest'");
    guest.configure(&safekeepers_setting(addresses()));
    guest.start();
    guest.sql("create extension walproposer; create table t as select generate_series(1, 10000)");
    cluster.primary.sql("insert into t values (1)");
    let status = cluster.safekeepers[0].status().expect("it answers");
    assert_eq!(
        status["clusters"].as_array().map(Vec::len),
        Some(2),
        "{status}"
    );
}

#[test]
fn the_daemon_refuses_what_is_not_its_data_directory() {
    let dir = TestDir::new();
    let mut safekeeper = Safekeeper::init(&dir, 1);
    safekeeper.start();

    let other = safekeeper_command(&[
        "run",
        "--listen",
        "127.0.0.1:0",
        "--http",
        "127.0.0.1:0",
        "--data-dir",
    ]);
    let run_on = |path: &std::path::Path| {
        let mut command = clone(&other);
        command.arg(path);
        run(command)
    };
    let data = safekeeper.data();
    let pid = safekeeper.process().id().to_string();
    let (ok, text) = run_on(data);
    assert!(
        !ok && text.contains(&data.display().to_string()) && text.contains(&pid),
        "two daemons: {text}"
    );

    let empty = dir.create("empty");
    let (ok, text) = run_on(&empty);
    assert!(
        !ok && text.contains(&empty.display().to_string()),
        "an empty directory: {text}"
    );
    let (ok, text) = run_on(&dir.path().join("missing"));
    assert!(
        !ok && text.contains("missing"),
        "a missing directory: {text}"
    );

    fs::write(empty.join("somebody's file"), "").expect("it is our directory");
    let mut command = safekeeper_command(&["init", "--id", "2", "--data-dir"]);
    command.arg(&empty);
    let (ok, text) = run(command);
    assert!(
        !ok && text.contains(&empty.display().to_string()),
        "init over files: {text}"
    );
    let mut command = safekeeper_command(&["init", "--id", "2", "--data-dir"]);
    command.arg(data);
    let (ok, text) = run(command);
    assert!(!ok, "init twice: {text}");
    assert!(safekeeper.status().is_some(), "the daemon was disturbed");
}

#[test]
fn unknown_and_mistyped_keys_of_the_daemon_are_refused_by_name() {
    let dir = TestDir::new();
    let safekeeper = Safekeeper::init(&dir, 1);
    let config = dir.path().join("safekeeper.toml");
    for (line, word) in [
        ("lisen = '127.0.0.1:1'", "lisen"),
        ("listen = 'nowhere'", "nowhere"),
        ("listen = 7", "listen"),
        ("wal_keep_size = '3 parsecs'", "parsecs"),
        ("listen = '127.0.0.1:1' listen", "listen"),
        ("listen = '0.0.0.0:0'", "0.0.0.0"),
    ] {
        fs::write(&config, line).expect("it is our directory");
        give_to_server_user(&config);
        let mut command = safekeeper_command(&["run", "--data-dir"]);
        command.arg(safekeeper.data()).arg("--config").arg(&config);
        let (ok, text) = run(command);
        assert!(!ok && text.contains(word), "{line}: {text}");
    }
    for arguments in [
        &["run", "--data-dri", "/x"][..],
        &["frobnicate"],
        &["init", "--id", "one"],
    ] {
        let status = safekeeper_command(arguments)
            .output()
            .expect("it starts")
            .status;
        assert_eq!(status.code(), Some(2), "{arguments:?}");
    }
    let status = safekeeper_command(&["status", &safekeeper.http_address().to_string()]).output();
    assert_eq!(
        status.expect("it starts").status.code(),
        Some(3),
        "nobody runs there"
    );
}

/// Strangers on the WAL port: random bytes, lengths beyond reason, half a handshake. Each is sent
/// away, and nobody else notices.
#[test]
fn random_bytes_and_oversized_lengths_on_the_wal_port_do_no_harm() {
    let cluster = Cluster::start();
    cluster.primary.sql("create table t (a int)");
    let safekeeper = &cluster.safekeepers[0];
    let before = safekeeper.process().resident_bytes();
    let mut random = fastrand::Rng::with_seed(7);
    let startup = startup_packet();
    let mut inputs: Vec<Vec<u8>> = vec![
        vec![],
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0x7F, 0xFF, 0xFF, 0xFF, 0, 3, 0, 0],
        vec![0xFF; 64],
        vec![0, 0, 0, 3],
        startup[..startup.len() / 2].to_vec(),
        // After the handshake: a query of 2 GB, and one of negative length.
        [&startup[..], b"Q\x7F\xFF\xFF\xFF"].concat(),
        [&startup[..], b"Q\xFF\xFF\xFF\xFF"].concat(),
        [&startup[..], &query("SELECT 1; DROP TABLE t")[..]].concat(),
        // In the push: a message of 2 GB, an empty one, and one of an unknown kind.
        [
            &startup[..],
            &query("START_WAL_PUSH")[..],
            b"d\x7F\xFF\xFF\xFF",
        ]
        .concat(),
        [
            &startup[..],
            &query("START_WAL_PUSH")[..],
            b"d\x00\x00\x00\x04",
        ]
        .concat(),
        [
            &startup[..],
            &query("START_WAL_PUSH")[..],
            b"d\x00\x00\x00\x08\xEE\xEE\xEE\xEE",
        ]
        .concat(),
    ];
    for len in [1, 8, 100, 10_000, 100_000] {
        inputs.push((0..len).map(|_| random.u8(..)).collect());
        let noise: Vec<u8> = (0..len).map(|_| random.u8(..)).collect();
        inputs.push([&startup[..], &query("START_WAL_PUSH")[..], &noise[..]].concat());
    }
    let strangers: Vec<_> = inputs.iter().map(|input| send(safekeeper, input)).collect();
    cluster.primary.sql("insert into t values (1)");
    for (stranger, input) in strangers.into_iter().zip(&inputs) {
        assert!(
            is_closed(stranger),
            "still open after {:?}…",
            &input[..input.len().min(60)]
        );
    }
    let grown = safekeeper.process().resident_bytes().saturating_sub(before);
    assert!(grown < 64 << 20, "the daemon grew by {grown} bytes");
    cluster.primary.sql("insert into t values (2)");
    cluster.wait_streaming(3);
    let end = cluster.wait_all_caught_up(SOON);
    cluster.assert_wal_equal(end);
}

/// A bit is flipped on the way to one safekeeper. It refuses the WAL before it acknowledges any of
/// it, the view shows it, and sent again the WAL is right.
#[test]
fn wal_with_a_flipped_bit_is_refused() {
    let mut cluster = Cluster::prepare(&[]);
    let link = Link::to(cluster.safekeepers[2].address());
    let addresses = cluster.safekeepers[..2]
        .iter()
        .map(Safekeeper::address)
        .chain([link.address()]);
    cluster.primary.configure(&safekeepers_setting(addresses));
    cluster.start_all();
    cluster.primary.sql("create table t (a int, b text)");
    link.flip_bit(16 << 10);
    cluster
        .primary
        .sql("insert into t select g, repeat('x', 1000) from generate_series(1, 20000) g");
    wait_until("a bit is flipped", SOON, || link.has_flipped());
    let damaged = || {
        let status = cluster.safekeepers[2]
            .cluster(cluster.system_id)
            .expect("it answers");
        status["damaged_appends"].as_u64()
    };
    wait_until("the safekeeper refuses it", SOON, || damaged() == Some(1));
    wait_until("the view shows it", SOON, || {
        let port = link.address().port();
        let query =
            format!("select reconnects, last_error from pg_stat_safekeeper where port = {port}");
        let row = cluster.primary.sql(&query).remove(0);
        row[0].as_deref() != Some("0") && row[1].is_some()
    });
    cluster.wait_streaming(3);
    let end = cluster.wait_all_caught_up(SOON);
    cluster.assert_wal_equal(end);
}

fn safekeeper_command(arguments: &[&str]) -> Command {
    let mut command = Safekeeper::program();
    command.args(arguments);
    command
}

fn clone(command: &Command) -> Command {
    let mut copy = Command::new(command.get_program());
    copy.args(command.get_args());
    copy
}

/// Protocol 3.0, a user and a database.
fn startup_packet() -> Vec<u8> {
    let body = b"\x00\x03\x00\x00user\0postgres\0database\0replication\0replication\0true\0\0";
    [&(body.len() as u32 + 4).to_be_bytes()[..], body].concat()
}

fn query(text: &str) -> Vec<u8> {
    [
        b"Q",
        &(text.len() as u32 + 5).to_be_bytes()[..],
        text.as_bytes(),
        b"\0",
    ]
    .concat()
}

fn send(safekeeper: &Safekeeper, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(safekeeper.address()).expect("the daemon listens");
    // It may be closed before all is written.
    let _ = stream.write_all(bytes);
    stream
}

/// Whether the daemon closes a connection on which nothing more comes, or at least ends it
/// when the stranger has nothing more to say.
fn is_closed(mut stream: TcpStream) -> bool {
    let _ = stream.shutdown(std::net::Shutdown::Write);
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("a timeout can be set");
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

//! Whoever speaks streaming replication can't tell a safekeeper from a primary: both are asked the same,
//! and what they say is laid side by side, message by message.
//!
//! What differs on purpose stands in a list below, with the reason; a reason that has gone is an error too.

use std::process::Command;

use cluster_tests::Cluster;
use cluster_tests::place::Programs;
use cluster_tests::poll::{SOON, wait_for};
use cluster_tests::process::run;
use cluster_tests::wal_compare::WalDir;
use cluster_tests::walsender::WalSender;
use safekeeper_protocol::Lsn;

/// Commands that both must answer with the same messages.
const SAME: &[&str] = &[
    "IDENTIFY_SYSTEM",
    "IDENTIFY_SYSTEM ; ",
    "  IDENTIFY_SYSTEM",
    "IDENTIFY_SYSTEM; IDENTIFY_SYSTEM",
    "IDENTIFY_SYSTEM 1",
    "IDENTIFY_SYSTEMS",
    "identify_system",
    "SHOW wal_segment_size",
    "SHOW \"wal_segment_size\"",
    "SHOW data_directory_mode",
    "SHOW in_hot_standby",
    "SHOW wal_block_size",
    "SHOW block_size",
    "SHOW integer_datetimes",
    "SHOW wal_level",
    "SHOW standard_conforming_strings",
    "SHOW nonsense",
    "SHOW non.sense",
    "SHOW",
    "SHOW wal_segment_size 1",
    "SHOW 'x'",
    "show wal_segment_size",
    "TIMELINE_HISTORY 1",
    "TIMELINE_HISTORY 7",
    "TIMELINE_HISTORY 0",
    "TIMELINE_HISTORY",
    "TIMELINE_HISTORY x",
    "TIMELINE_HISTORY -1",
    "",
    " ",
    ";",
    " ; ",
    "SELECT 1",
    "select pg_switch_wal()",
    "SELECT 1; SELECT 2",
    "BEGIN",
    "VACUUM",
    "-- IDENTIFY_SYSTEM",
    "/* */ IDENTIFY_SYSTEM",
    "\"IDENTIFY_SYSTEM\"",
    "\"not ended",
    "'text'",
    "'not ended",
    "!!",
    "(",
    "123",
    "0/0",
    "\u{e9}t\u{e9}",
    "START_REPLICATION",
    "START_REPLICATION 0/0 TIMELINE",
    "START_REPLICATION 0/0 timeline 1",
    "START_REPLICATION zero",
    "START_REPLICATION 0/1000000 TIMELINE 7",
    "START_REPLICATION 0/1000000 TIMELINE 0",
    "START_REPLICATION 0/1000000 TIMELINE 1 x",
    "START_REPLICATION PHYSICAL SLOT nope 0/1000000",
    "START_REPLICATION SLOT \"\" 0/0",
    "START_REPLICATION SLOT nope 0/1000000",
    "START_REPLICATION SLOT NOPE PHYSICAL 0/1000000 TIMELINE 1",
    "START_REPLICATION SLOT \"No pe\" 0/1000000",
    "READ_REPLICATION_SLOT nope",
    "READ_REPLICATION_SLOT \"No pe\"",
    "READ_REPLICATION_SLOT",
    "DROP_REPLICATION_SLOT nope",
    "DROP_REPLICATION_SLOT nope WAIT",
    "DROP_REPLICATION_SLOT nope WAITS",
    "DROP_REPLICATION_SLOT \"No pe\"",
    "DROP_REPLICATION_SLOT",
    "CREATE_REPLICATION_SLOT",
    "CREATE_REPLICATION_SLOT s PHYSICAL",
    "CREATE_REPLICATION_SLOT s PHYSICAL",
    "READ_REPLICATION_SLOT s",
    "START_REPLICATION SLOT s 0/0 TIMELINE 7",
    "CREATE_REPLICATION_SLOT \"Bad\" PHYSICAL",
    "CREATE_REPLICATION_SLOT s PHYSICAL (sparkle)",
    "CREATE_REPLICATION_SLOT s PHYSICAL TWO_PHASE",
    "DROP_REPLICATION_SLOT s",
    "READ_REPLICATION_SLOT s",
    "CREATE_REPLICATION_SLOT t TEMPORARY PHYSICAL",
    "READ_REPLICATION_SLOT t",
];

/// Commands that are answered differently, and why that is right.
const DIFFERENT: &[(&str, &str)] = &[
    (
        "SHOW server_version",
        "it is the cluster's, but the minor one is unknown",
    ),
    ("SHOW server_version_num", "the same"),
    ("SHOW is_superuser", "nobody is, there is no SQL"),
    (
        "SHOW shared_buffers",
        "of the settings only those that receivers ask for are here",
    ),
    ("SHOW all", "the same"),
    ("BASE_BACKUP", "there is no data directory"),
    (
        "CREATE_REPLICATION_SLOT x LOGICAL pgoutput",
        "nothing is decoded, whatever wal_level is",
    ),
    ("START_REPLICATION SLOT x LOGICAL 0/0", "the same"),
    (
        "START_REPLICATION 0/123456789",
        "a primary cuts a position that is too long, and goes on",
    ),
    ("TIMELINE_HISTORY 4294967296", "the same with a timeline"),
];

#[test]
fn a_safekeeper_answers_as_a_primary_does() {
    let cluster = Cluster::start_with("autovacuum = off", &[]);
    cluster.wait_all_caught_up(SOON);
    let mut wrong = Vec::new();
    for command in SAME {
        let (primary, safekeeper) = both_say(&cluster, command);
        if primary != safekeeper {
            wrong.push(format!(
                "{command:?}\n  primary:    {primary:?}\n  safekeeper: {safekeeper:?}"
            ));
        }
    }
    for (command, why) in DIFFERENT {
        let (primary, safekeeper) = both_say(&cluster, command);
        if primary == safekeeper {
            wrong.push(format!(
                "{command:?}: the same, no more different because {why}"
            ));
        }
        let last = safekeeper.last().map(String::as_str);
        assert_eq!(
            last,
            Some("Z I"),
            "{command}: the connection is of no more use"
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What is said before an error does not count: a primary describes a result that then does not come.
fn both_say(cluster: &Cluster, command: &str) -> (Vec<String>, Vec<String>) {
    let ask = |mut connection: WalSender| {
        let mut lines = connection.command(command);
        if let Some(error) = lines.iter().position(|line| line.starts_with('E')) {
            lines.drain(..error);
        }
        lines
    };
    let both = || {
        let primary = ask(WalSender::of_primary(&cluster.primary));
        (
            primary,
            ask(WalSender::of_safekeeper(&cluster.safekeepers[0])),
        )
    };
    // The server may write a record of its own between the two, of which the safekeeper has not heard; and a
    // session that has ended may still have its temporary slot.
    let changes = ["IDENTIFY_SYSTEM", "READ_REPLICATION_SLOT t"];
    if changes.contains(&command.trim_matches([' ', ';'])) {
        wait_for("both say the same", SOON, || {
            Some(both()).filter(|(primary, safekeeper)| primary == safekeeper)
        })
    } else {
        both()
    }
}

/// Settings that a primary reports at the start of a session; their values, but for some.
#[test]
fn a_session_begins_as_on_a_primary() {
    let cluster = Cluster::start();
    let settings = |connection: WalSender| -> Vec<String> {
        let mut lines = connection.greeting().to_vec();
        lines.sort();
        // The minor version is unknown, encodings are those of databases, nobody is a superuser, and there is
        // no time zone.
        let unlike = [
            "server_version",
            "server_encoding",
            "client_encoding",
            "is_superuser",
            "TimeZone",
        ];
        for line in &mut lines {
            if let Some((name, _)) = line.clone().split_once(" = ")
                && unlike.contains(&name.trim_start_matches("S "))
            {
                *line = name.to_owned();
            }
        }
        lines
    };
    let primary = settings(WalSender::of_primary(&cluster.primary));
    let safekeeper = settings(WalSender::of_safekeeper(&cluster.safekeepers[0]));
    assert_eq!(safekeeper, primary);
}

/// What is no command: messages of the extended protocol, function calls, and what nobody knows.
#[test]
fn other_messages_are_refused_alike() {
    let cluster = Cluster::start();
    let ask = |mut connection: WalSender| {
        let mut said = Vec::new();
        for tag in [b'P', b'B', b'D', b'E', b'C', b'F'] {
            connection.send(tag, &[0; 8]);
            connection.send(b'S', b"");
            said.push(connection.until_ready());
        }
        said.push(connection.until_ready());
        said.push(connection.command("IDENTIFY_SYSTEM").split_off(2));
        connection.send(b'z', &[0; 8]);
        said.push(connection.until_ready());
        said
    };
    let primary = ask(WalSender::of_primary(&cluster.primary));
    let safekeeper = ask(WalSender::of_safekeeper(&cluster.safekeepers[0]));
    assert_eq!(safekeeper, primary);
}

/// Streams from a page's start and from inside a record, and ended by the client; the connection is of use
/// after that. Then over a switch of timelines: the end of the old one, its history, the new one.
#[test]
fn streams_begin_and_end_alike() {
    let mut cluster = Cluster::start_with("wal_keep_size = '1GB'\nautovacuum = off", &[]);
    let standby = cluster.start_standby("standby");
    cluster
        .primary
        .sql("create table t as select generate_series(1, 10000)");
    let end = cluster.wait_all_caught_up(SOON);
    let stream = |mut connection: WalSender, begin: Lsn, end: Lsn| {
        let mut said = connection.begin_copy(&format!("START_REPLICATION {begin}"));
        let (at, mut wal) = connection.wal_up_to(end);
        wal.truncate((end - at) as usize);
        connection.send(b'c', b"");
        said.extend(connection.until_copy_ends());
        said.push(connection.command("SHOW wal_segment_size").join(" "));
        (said, at, wal)
    };
    for begin in [Lsn(0x100_0000), Lsn(0x100_2000), Lsn(end.0 - 1111)] {
        let primary = stream(WalSender::of_primary(&cluster.primary), begin, end);
        let safekeeper = stream(
            WalSender::of_safekeeper(&cluster.safekeepers[0]),
            begin,
            end,
        );
        assert!(safekeeper == primary, "{:?} {:?}", safekeeper.0, primary.0);
    }

    cluster.primary.kill9();
    assert_eq!(standby.value("select walproposer_promote(60)"), "t");
    standby.sql("insert into t values (0)");
    cluster.primary = standby;
    cluster.wait_all_caught_up(SOON);
    let oldest = WalDir::new(cluster.primary.wal_dir()).begin();
    let over = |mut connection: WalSender| {
        let mut said = connection.begin_copy(&format!("START_REPLICATION {oldest} TIMELINE 1"));
        assert_eq!(said, ["W"]);
        said.extend(connection.until_copy_ends_by_itself());
        said.extend(connection.command("TIMELINE_HISTORY 2"));
        // There is nothing of timeline 1 at its end.
        let switch = said.iter().find_map(|line| line.strip_prefix("D 2|"));
        let switch = switch.expect("the next timeline").to_owned();
        said.extend(connection.command(&format!("START_REPLICATION {switch} TIMELINE 1")));
        let beyond = Lsn(switch.parse::<Lsn>().expect("an LSN").0 + 8);
        said.extend(connection.command(&format!("START_REPLICATION {beyond} TIMELINE 1")));
        said
    };
    let primary = over(WalSender::of_primary(&cluster.primary));
    let safekeeper = over(WalSender::of_safekeeper(&cluster.safekeepers[0]));
    assert_eq!(safekeeper, primary);
}

/// Whoever looks by hand sees the same on a safekeeper as on the primary, with psql's wording, and with the
/// code of each error.
#[test]
fn psql_shows_the_same_of_both() {
    let cluster = Cluster::start_with("wal_keep_size = '1GB'\nautovacuum = off", &[]);
    cluster.wait_all_caught_up(SOON);
    let script = [
        "\\set VERBOSITY sqlstate",
        "IDENTIFY_SYSTEM;",
        "SHOW wal_segment_size;",
        "SHOW nonsense;",
        "TIMELINE_HISTORY 7;",
        "SELECT pg_switch_wal();",
        "READ_REPLICATION_SLOT nonsense;",
        "\\set VERBOSITY default",
        "SELECT 1;",
        "DROP_REPLICATION_SLOT nonsense;",
    ];
    let ask = |host: &str, port: &str| {
        let mut command = Command::new(Programs::postgres("psql"));
        command.args(["--no-psqlrc", "--dbname", "replication=true"]);
        command.args(["--host", host, "--port", port, "--username", "postgres"]);
        for line in script {
            command.args(["--command", line]);
        }
        // Its last command fails.
        run(command)
    };
    let address = cluster.safekeepers[0].address();
    let (ip, port) = (address.ip().to_string(), address.port().to_string());
    let socket = cluster.primary.socket_dir().display().to_string();
    // The server may write a record of its own between the two.
    let (_, shown) = wait_for("psql shows the same", SOON, || {
        let (theirs, ours) = (ask(&socket, "5432"), ask(&ip, &port));
        (theirs == ours).then_some(ours)
    });
    let mut codes = shown
        .lines()
        .filter_map(|line| line.strip_prefix("ERROR:  "));
    assert_eq!(codes.next(), Some("42704"), "{shown}");
    assert_eq!(codes.next(), Some("58P01"), "{shown}");
    assert_eq!(codes.next(), Some("0A000"), "{shown}");
}

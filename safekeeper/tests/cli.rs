//! The command as an operator meets it: exit codes, messages that name the value, an orderly end.

use std::io::{BufRead, BufReader, Read as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::time::Duration;

fn safekeeper(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_safekeeper"));
    command.args(arguments).output().expect("the command runs")
}

/// Runs it and expects this exit code and these words on stderr.
fn expect(arguments: &[&str], code: i32, words: &[&str]) {
    let output = safekeeper(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
    for word in words {
        assert!(
            stderr.contains(word),
            "{arguments:?} does not say {word}: {stderr}"
        );
    }
}

/// `safekeeper run` with no more than so many descriptors, and no way to have more.
fn run_with_descriptors(n_max: u32, dir: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -n {n_max} && exec \"$@\""), "sh"]);
    command.arg(env!("CARGO_BIN_EXE_safekeeper"));
    command.args(["run", "--data-dir", dir, "--log-format", "json"]);
    command
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A daemon of its own process, killed if the test fails before it has ended.
struct Daemon {
    child: Child,
    log: BufReader<ChildStderr>,
    /// From its log.
    http: String,
}

impl Daemon {
    fn run(dir: &str) -> Daemon {
        let mut command = Command::new(env!("CARGO_BIN_EXE_safekeeper"));
        command.args(["run", "--data-dir", dir, "--log-format", "json"]);
        Daemon::spawn(command)
    }

    fn spawn(mut command: Command) -> Daemon {
        command.args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
        let mut child = command.stderr(Stdio::piped()).spawn().expect("it starts");
        let log = BufReader::new(child.stderr.take().expect("piped"));
        let mut daemon = Daemon {
            child,
            log,
            http: String::new(),
        };
        let ready = daemon.wait_for_line("ready ");
        let (_, http) = ready.split_once(" http=").expect("an address");
        daemon.http = http.to_owned();
        daemon
    }

    /// The message of the first log line that begins like this.
    fn wait_for_line(&mut self, begin: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            let n = self.log.read_line(&mut line).expect("a log");
            assert!(n > 0, "the log ended without \"{begin}\"");
            let json: serde_json::Value = serde_json::from_str(&line).expect("JSON");
            let message = json["message"].as_str().expect("a message");
            if message.starts_with(begin) {
                return message.to_owned();
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_data_directory_is_made_once_and_only_where_nothing_else_is() {
    let temp = tempfile::tempdir().expect("a directory");
    let dir = temp.path().join("d");
    let init = ["init", "--data-dir", text(&dir), "--id", "7"];
    expect(&init, 0, &[]);
    expect(&init, 1, &[text(&dir), "already"]);
    expect(
        &["init", "--data-dir", text(temp.path()), "--id", "7"],
        1,
        &["not empty"],
    );
    let other = temp.path().join("other");
    expect(
        &["init", "--data-dir", text(&other), "--id", "0"],
        1,
        &["0 is not a member id"],
    );
    expect(&["init", "--data-dir", text(&other)], 2, &["--id"]);
    let dump = safekeeper(&["dump", "--data-dir", text(&dir)]);
    assert!(String::from_utf8_lossy(&dump.stdout).contains("safekeeper 7"));
    expect(&["verify", "--data-dir", text(&dir)], 0, &[]);
    expect(
        &["verify", "--data-dir", text(temp.path())],
        1,
        &["not a safekeeper data directory"],
    );
}

#[test]
fn wrong_settings_are_named() {
    let temp = tempfile::tempdir().expect("a directory");
    let (dir, file) = (temp.path().join("d"), temp.path().join("c.toml"));
    expect(&["init", "--data-dir", text(&dir), "--id", "1"], 0, &[]);
    let run = ["run", "--data-dir", text(&dir)];
    let with = |more: &[&'static str]| [&run, more].concat();
    for (arguments, words) in [
        (
            with(&["--listen", "0.0.0.0:0"]),
            ["listen", "--trust-network"],
        ),
        (with(&["--listen", "nowhere"]), ["listen", "nowhere"]),
        (with(&["--wal-keep-size", "1XB"]), ["wal_keep_size", "1XB"]),
        (with(&["--max-connections", "0"]), ["max_connections", "1"]),
        (
            with(&["--config", "/nonexistent.toml"]),
            ["/nonexistent.toml", "No such file"],
        ),
        (with(&["--colour", "red"]), ["--colour", "unexpected"]),
    ] {
        expect(&arguments, 2, &words);
    }
    std::fs::write(&file, "wal_keep_sise = 1").expect("written");
    expect(
        &["run", "--data-dir", text(&dir), "--config", text(&file)],
        2,
        &["c.toml", "wal_keep_sise"],
    );
    expect(
        &["run", "--data-dir", text(temp.path())],
        1,
        &["not a safekeeper data directory"],
    );
}

#[test]
fn the_daemon_runs_tells_its_status_and_ends_in_order() {
    let temp = tempfile::tempdir().expect("a directory");
    let dir = temp.path().join("d");
    expect(&["init", "--data-dir", text(&dir), "--id", "3"], 0, &[]);
    let mut daemon = Daemon::run(text(&dir));
    let pid = daemon.child.id().to_string();
    expect(
        &[
            "run",
            "--data-dir",
            text(&dir),
            "--listen",
            "127.0.0.1:0",
            "--http",
            "127.0.0.1:0",
        ],
        1,
        &["in use by process", &pid],
    );
    let status = safekeeper(&["status", "--output", "json", &daemon.http]);
    assert_eq!(status.status.code(), Some(0));
    let json: serde_json::Value = serde_json::from_slice(&status.stdout).expect("JSON");
    assert_eq!(json[0]["status"]["id"], 3);
    expect(&["members", &daemon.http], 0, &[]);
    // One that answers does not hide one that does not.
    expect(
        &["status", &daemon.http, "127.0.0.1:1"],
        3,
        &["127.0.0.1:1", "1 of 2"],
    );

    let pid = rustix::process::Pid::from_child(&daemon.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("a signal");
    daemon.wait_for_line("received SIGTERM");
    daemon.wait_for_line("stopped");
    let ended = daemon.child.wait().expect("ended");
    assert_eq!(ended.code(), Some(0));
    expect(&["status", &daemon.http], 3, &["no status from"]);
}

#[test]
fn idle_http_connections_do_not_use_up_the_descriptors() {
    let temp = tempfile::tempdir().expect("a directory");
    let dir = temp.path().join("d");
    expect(&["init", "--data-dir", text(&dir), "--id", "1"], 0, &[]);
    let refused = run_with_descriptors(340, text(&dir)).output();
    let refused = refused.expect("the command runs");
    assert_eq!(refused.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert!(stderr.contains("max_connections: 100"), "{stderr}");

    let mut command = run_with_descriptors(340, text(&dir));
    command.args(["--max-connections", "10"]);
    let mut daemon = Daemon::spawn(command);
    // More than the daemon takes and the kernel queues, and none of them says a word.
    let address = daemon.http.parse().expect("an address");
    let mut idle: Vec<TcpStream> = (0..350)
        .map_while(|_| TcpStream::connect_timeout(&address, Duration::from_millis(500)).ok())
        .collect();
    assert!(
        idle.len() > 100 && idle.len() < 350,
        "{} at a time",
        idle.len()
    );
    let descriptors = format!("/proc/{}/fd", daemon.child.id());
    let descriptors = std::fs::read_dir(descriptors).expect("a process").count();
    assert!(descriptors < 100, "{descriptors} descriptors");
    // Those that were accepted are closed after a while, and so make room for the next.
    let patience = Some(Duration::from_secs(30));
    idle[0].set_read_timeout(patience).expect("a timeout");
    assert_eq!(idle[0].read(&mut [0]).expect("an orderly end"), 0);
    drop(idle);
    expect(&["status", &daemon.http], 0, &[]);
    assert_eq!(daemon.child.try_wait().expect("a child"), None);
}

/// A restore_command that can't be read is no empty archive: recovery must not end there.
#[test]
fn a_misspelt_restore_command_stops_a_recovery() {
    let dir = tempfile::tempdir().expect("a directory");
    let code = || {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_safekeeper"));
        command.args([
            "fetch-wal",
            "--form",
            "a:1",
            "000000010000000000000001",
            "pg_wal/X",
        ]);
        command.current_dir(dir.path());
        command.output().expect("it runs").status.code()
    };
    assert_eq!(code(), Some(2));
    std::fs::write(dir.path().join("recovery.signal"), "").expect("written");
    assert_eq!(code(), Some(128));
    std::fs::write(dir.path().join("standby.signal"), "").expect("written");
    assert_eq!(code(), Some(2));
}

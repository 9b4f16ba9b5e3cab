//! One process of a cluster: started, paused, killed, never left behind.
//!
//! What a test starts dies with it, however the test ends: by `Drop` when it panics, and by the
//! kernel (parent-death signal) when the test program itself is killed. The kernel sends that
//! signal when the *thread* ends that started the process, so all are started by one thread that
//! lives as long as the program.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;
use std::{fs, io, thread};

use crate::place::ServerUser;
use crate::poll::{SOON, wait_for, wait_until};

/// Variables that a process gets beside those of the test program.
pub type Environment = Vec<(OsString, OsString)>;

/// A running or ended process, and its children.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a command as the server's user; what it prints is appended to `log`.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Process {
        let open = || OpenOptions::new().create(true).append(true).open(log);
        let file = open().unwrap_or_else(|e| panic!("could not open {}: {e}", log.display()));
        command
            .stdin(Stdio::null())
            .stderr(file.try_clone().expect("could not duplicate a file"))
            .stdout(file);
        let child = spawn(command).unwrap_or_else(|e| panic!("could not start {name}: {e}"));
        Process {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
        }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// How it ended, or `None` while it runs.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child
            .try_wait()
            .expect("we may wait for our own child")
    }

    #[track_caller]
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let what = format!("{} (pid {}) ends", self.name, self.id());
        wait_for(&what, limit, || self.ended())
    }

    /// Sends a signal to this process only.
    pub fn signal(&self, signal: i32) {
        send_signal(self.id(), signal);
    }

    /// As if the host stood still: process and children stop where they are.
    pub fn pause(&self) {
        self.stop_all();
        wait_until("the process stands still", SOON, || {
            state_of(self.id()) == Some('T')
        });
    }

    /// Returns the children, which are stopped too.
    fn stop_all(&self) -> Vec<u32> {
        // The parent first, lest it starts a child behind our back.
        self.signal(libc::SIGSTOP);
        let children = children_of(self.id());
        for child in &children {
            send_signal(*child, libc::SIGSTOP);
        }
        children
    }

    /// All stand still before the first is gone: a child that notices its parent's end has a last word.
    fn kill_all(&self) -> Vec<u32> {
        let children = self.stop_all();
        self.signal(libc::SIGKILL);
        for child in &children {
            send_signal(*child, libc::SIGKILL);
        }
        children
    }

    pub fn resume(&self) {
        for child in children_of(self.id()) {
            send_signal(child, libc::SIGCONT);
        }
        self.signal(libc::SIGCONT);
    }

    /// As if the host lost its power: process and children end without a last word.
    pub fn kill9(&mut self) {
        if self.ended().is_some() {
            return;
        }
        let children = self.kill_all();
        self.wait(SOON);
        // They are not our children, so their ends are read from /proc. In some containers nobody
        // reaps them, and they stay there as zombies, which hold nothing.
        wait_until("the children are gone", SOON, || {
            children
                .iter()
                .all(|child| matches!(state_of(*child), None | Some('Z' | 'X')))
        });
    }

    /// Resident memory of the process alone.
    pub fn resident_bytes(&self) -> u64 {
        resident_bytes(self.id())
    }

    /// The children whose command line contains `text`. Postgres's processes say there what
    /// they are.
    pub fn children_named(&self, text: &str) -> Vec<u32> {
        let is_named = |pid: &u32| command_line(*pid).contains(text);
        children_of(self.id())
            .into_iter()
            .filter(is_named)
            .collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.kill9();
            return;
        }
        // A second panic would end the program before the other processes are ended.
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill_all();
            let _ = self.child.wait();
        }
    }
}

/// Runs a command to its end as the server's user. Returns what it printed, both streams
/// together, and whether it succeeded.
pub fn run(mut command: Command) -> (bool, String) {
    let name = command.get_program().to_string_lossy().into_owned();
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = spawn(command).unwrap_or_else(|e| panic!("could not start {name}: {e}"));
    let output = child
        .wait_with_output()
        .unwrap_or_else(|e| panic!("could not read from {name}: {e}"));
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

/// The same for a command that must succeed.
#[track_caller]
pub fn run_ok(command: Command) -> String {
    let line = format!("{command:?}");
    let (ok, text) = run(command);
    assert!(ok, "{line} failed:\n{text}");
    text
}

/// Starts a command as the server's user, to end with this program at the latest.
pub fn spawn(mut command: Command) -> io::Result<Child> {
    if let Some(user) = ServerUser::other_than_us() {
        command.uid(user.uid).gid(user.gid);
    }
    // Root's own directories may be closed to that user, and nobody's settings are to count.
    command.current_dir("/");
    if !command.get_envs().any(|(name, _)| name == "HOME") {
        command.env("HOME", "/nonexistent");
    }
    // SAFETY: between fork and exec only this system call is made, which is async-signal-safe.
    unsafe {
        command.pre_exec(
            || match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            },
        );
    }
    on_starting_thread(command)
}

/// See the head of this file for why there is one.
fn on_starting_thread(command: Command) -> io::Result<Child> {
    type Job = (Command, Sender<io::Result<Child>>);
    static THREAD: OnceLock<Sender<Job>> = OnceLock::new();
    let thread = THREAD.get_or_init(|| {
        let (sender, jobs) = channel::<Job>();
        let run = move || {
            for (mut command, answer) in jobs {
                // Whoever asked may have panicked meanwhile; the process then ends with `Child`.
                let _ = answer.send(command.spawn());
            }
        };
        let builder = thread::Builder::new().name("start processes".into());
        builder.spawn(run).expect("could not start a thread");
        sender
    });
    let (sender, answer) = channel();
    thread
        .send((command, sender))
        .expect("the thread never ends");
    answer.recv().expect("the thread answers each job")
}

fn send_signal(pid: u32, signal: i32) {
    // SAFETY: no memory is involved. The process may be gone, which is what is mostly wanted.
    unsafe { libc::kill(pid as i32, signal) };
}

/// Signals a process of the cluster that is not our own child, such as a background worker.
pub fn signal_descendant(pid: u32, signal: i32) {
    send_signal(pid, signal);
}

pub fn resident_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

fn command_line(pid: u32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}

fn children_of(pid: u32) -> Vec<u32> {
    let pids = fs::read_dir("/proc").expect("/proc is there").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|child| stat_fields(*child).is_some_and(|(_, parent)| parent == pid))
        .collect()
}

fn state_of(pid: u32) -> Option<char> {
    stat_fields(pid).map(|(state, _)| state)
}

/// State and parent of a process.
fn stat_fields(pid: u32) -> Option<(char, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in brackets and may contain any character, brackets too.
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

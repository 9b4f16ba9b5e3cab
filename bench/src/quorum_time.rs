//! How long it takes here to have something on two of three hosts, and on this one too: the least that a
//! commit waits, by the smallest programs that do it.
//!
//! ```text
//!   quorum-time DIR ADDRESS..     a byte to each ──── own flush, or none ──── two have answered
//!                                      │                                          ▲
//!   flush-echo ADDRESS DIR (three)     └──────────── flush ───────────────────────┘
//! ```
//!
//! Each is a process of the servers' user, with the preload library that lengthens its host's flushes. The
//! terms of the formulas (`hosts.rs`) are measured together, as they occur in a commit: on processors that all
//! hosts share, a second one's flush begins later than the first one's, and ends when a timer is seen to.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use cluster_tests::place::{TestDir, unused_address};
use cluster_tests::poll::{SOON, wait_until};
use cluster_tests::process::Process;
use cluster_tests::slow_disk::SlowDisk;

use crate::fsync_time::{Flushed, print_percentiles, two_times};
use crate::processors::Processors;
use crate::slow_link::{SlowLink, set_all};

/// In milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct QuorumTimes {
    /// The way, the members' flush, and the way back.
    pub members: f64,
    /// The same while this host flushes, until both are done.
    pub both: f64,
}

pub const VERB: &str = "quorum-time";
pub const ECHO_VERB: &str = "flush-echo";

const MEMBERS: usize = 3;
const QUORUM: usize = 2;
const REPEATS: usize = 300;

/// With disks as the primary's and the members', and links of that delay, or none.
pub fn measure(
    dir: &TestDir,
    primary: &SlowDisk,
    member: &SlowDisk,
    one_way: Option<Duration>,
    processors: Option<&Processors>,
) -> QuorumTimes {
    let addresses: Vec<_> = (0..MEMBERS).map(|_| unused_address()).collect();
    let start = |address: &SocketAddr| start_echo(dir, *address, member);
    let _echoes: Vec<_> = addresses.iter().map(start).collect();
    let links: Vec<_> = match one_way {
        Some(_) => addresses.iter().copied().map(SlowLink::to).collect(),
        None => Vec::new(),
    };
    set_all(&links, one_way.unwrap_or_default());
    let reached = if links.is_empty() {
        addresses
    } else {
        links.iter().map(SlowLink::address).collect()
    };
    let mut command = Command::new(std::env::current_exe().expect("our own program"));
    command.arg(VERB).arg(dir.path());
    command.args(reached.iter().map(SocketAddr::to_string));
    command.envs(primary.environment());
    if let Some(processors) = processors {
        processors.start_as_primary(&mut command);
    }
    let [members, both] = two_times(command);
    QuorumTimes { members, both }
}

fn start_echo(dir: &TestDir, address: SocketAddr, disk: &SlowDisk) -> Process {
    let name = format!("flush-echo-{address}");
    let mut command = Command::new(std::env::current_exe().expect("our own program"));
    command.arg(ECHO_VERB).arg(address.to_string());
    command.arg(dir.create(&name)).envs(disk.environment());
    let process = Process::start(&name, command, &dir.path().join(format!("{name}.log")));
    wait_until("the echo listens", SOON, || {
        TcpStream::connect(address).is_ok()
    });
    process
}

/// What a `flush-echo` does until it is killed: each byte comes back when it is flushed.
pub fn echo(address: &str, dir: &Path) {
    let listener = TcpListener::bind(address).expect("the address is ours alone");
    let mut flushed = Flushed::create(dir);
    for mut stream in listener.incoming().flatten() {
        let _ = stream.set_nodelay(true);
        let mut byte = [0];
        // An error ends the connection: that of the one who only looked whether we listen, too.
        while stream.read_exact(&mut byte).is_ok() {
            flushed.flush();
            if stream.write_all(&byte).is_err() {
                break;
            }
        }
    }
}

/// What a `quorum-time` does: prints both medians in microseconds.
pub fn print(dir: &Path, addresses: &[&str]) {
    let connect = |address: &&str| {
        let stream = TcpStream::connect(*address).expect("the echo listens");
        stream.set_nodelay(true).expect("a TCP socket");
        stream.set_nonblocking(true).expect("a TCP socket");
        stream
    };
    let streams: Vec<_> = addresses.iter().map(connect).collect();
    let mut flushed = Flushed::create(dir);
    let mut members = Vec::new();
    let mut both = Vec::new();
    // By turns: a machine has good and bad moments.
    for _ in 0..REPEATS {
        members.push(time_of_quorum(&streams, || {}));
        both.push(time_of_quorum(&streams, || flushed.flush()));
    }
    for times in [members, both] {
        print_percentiles(times, &[50]);
    }
}

/// Until so many have answered, and what is done meanwhile is done. Waits for the others, too.
fn time_of_quorum(streams: &[TcpStream], meanwhile: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    for mut stream in streams {
        stream.write_all(b"x").expect("the echo reads");
    }
    meanwhile();
    let mut waiting: Vec<&TcpStream> = streams.iter().collect();
    let mut time = None;
    while !waiting.is_empty() {
        wait_for_any(&waiting);
        waiting.retain(|stream| !has_answered(stream));
        if streams.len() - waiting.len() >= QUORUM {
            time.get_or_insert_with(|| begun.elapsed());
        }
    }
    time.expect("all have answered")
}

fn wait_for_any(streams: &[&TcpStream]) {
    let entry = |stream: &&TcpStream| libc::pollfd {
        fd: stream.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let mut polls: Vec<_> = streams.iter().map(entry).collect();
    // SAFETY: as many entries as are named, which live until the call returns.
    let ready = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, -1) };
    assert!(ready > 0, "poll: {}", std::io::Error::last_os_error());
}

/// If so, its byte is taken. The stream does not block.
fn has_answered(mut stream: &TcpStream) -> bool {
    match stream.read_exact(&mut [0]) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => false,
        answered => {
            answered.expect("the echo answers");
            true
        }
    }
}

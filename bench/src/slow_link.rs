//! A network between two hosts, on one: a TCP proxy that delivers every byte a set time later.
//!
//! ```text
//!   client ──► queue: pieces with their due times ──► target
//!          ◄────────── and the same back ◄──────────
//! ```
//!
//! The cluster tests have a link that cuts and heals; this one does nothing but delay, and does it
//! to some ten microseconds: one thread for each direction, so no hand-over, and a timer without
//! slack. It does not limit the throughput. What the proxy itself costs is measured
//! ([`calibrate`]) and taken off the delay. What is left of it where three links share two processors is in
//! what `quorum_time.rs` measures.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cluster_tests::link::listen_for;
use cluster_tests::place::unused_address;

/// Connect to [`SlowLink::address`] instead of the target.
pub struct SlowLink {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Of one direction, in nanoseconds.
    delay: AtomicU64,
    closed: AtomicBool,
}

/// So much may be under way in one direction: more than any window here, and bounded.
const QUEUED_BYTES_MAX: usize = 32 << 20;

impl SlowLink {
    pub fn to(target: SocketAddr) -> SlowLink {
        let shared = Arc::new(Shared::default());
        let (ending, starting) = (shared.clone(), shared.clone());
        let address = listen_for(
            target,
            move || ending.closed.load(Ordering::Relaxed),
            move |client, server| start_connection(client, server, &starting),
        );
        SlowLink { address, shared }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    fn set_delay(&self, one_way: Duration) {
        let ns = u64::try_from(one_way.as_nanos()).expect("less than centuries");
        self.shared.delay.store(ns, Ordering::Relaxed);
    }
}

impl Drop for SlowLink {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        // Wakes the accepting thread. The others end with their connections.
        let _ = TcpStream::connect(self.address);
    }
}

/// The delay of each direction with which a round trip over a link takes so much longer than a direct one.
pub fn calibrate(round_trip: Duration) -> Duration {
    let target = start_echo();
    let link = SlowLink::to(target);
    let direct = round_trip_to(target);
    let mut delay = round_trip / 2;
    for _ in 0..3 {
        link.set_delay(delay);
        let longer = round_trip_to(link.address()).saturating_sub(direct);
        let too_long = longer.saturating_sub(round_trip);
        if too_long < Duration::from_micros(5) {
            break;
        }
        delay = delay.saturating_sub(too_long / 2);
    }
    delay
}

/// Sets all links so that a round trip over each is longer by the same.
pub fn set_all<'a>(links: impl IntoIterator<Item = &'a SlowLink>, one_way: Duration) {
    links.into_iter().for_each(|link| link.set_delay(one_way));
}

fn start_echo() -> SocketAddr {
    let address = unused_address();
    let listener = TcpListener::bind(address).expect("the address is ours alone");
    thread::spawn(move || {
        // The direct ones and the links'.
        for stream in listener.incoming().flatten() {
            thread::spawn(move || echo(stream));
        }
    });
    address
}

fn echo(mut stream: TcpStream) {
    // An error ends the connection, and with it the calibration.
    let _ = stream.set_nodelay(true);
    let mut byte = [0];
    while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
}

/// There and back again; the median of many.
fn round_trip_to(echo: SocketAddr) -> Duration {
    let mut stream = TcpStream::connect(echo).expect("the echo listens");
    stream.set_nodelay(true).expect("a TCP socket");
    let mut times: Vec<_> = (0..300)
        .map(|_| {
            let begun = Instant::now();
            stream.write_all(b"x").expect("the echo reads");
            stream.read_exact(&mut [0]).expect("the echo answers");
            begun.elapsed()
        })
        .collect();
    times.sort();
    times[times.len() / 2]
}

fn start_connection(
    client: TcpStream,
    server: TcpStream,
    shared: &Arc<Shared>,
) -> std::io::Result<()> {
    let (client2, server2) = (client.try_clone()?, server.try_clone()?);
    for (from, to) in [(client, server), (server2, client2)] {
        let shared = shared.clone();
        thread::spawn(move || {
            be_punctual();
            // Whatever ends it, the other end shall see it too; the other direction may go on.
            let _ = carry(&from, &to, &shared);
            let _ = to.shutdown(Shutdown::Write);
        });
    }
    Ok(())
}

/// Asks for timers without slack, and for a CPU whenever one is due: a network needs none. The
/// latter is for root only; without it a busy machine makes the link somewhat late.
fn be_punctual() {
    let priority = libc::sched_param { sched_priority: 1 };
    // SAFETY: the calls concern this thread only; the struct is read, and lives until they return.
    unsafe {
        libc::prctl(libc::PR_SET_TIMERSLACK, 1);
        libc::sched_setscheduler(0, libc::SCHED_RR, &raw const priority);
    }
}

fn carry(mut from: &TcpStream, mut to: &TcpStream, shared: &Shared) -> std::io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    let mut queue: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let mut queued_bytes = 0;
    let mut ended = false;
    loop {
        while let Some((due, piece)) = queue.front() {
            if *due > Instant::now() {
                break;
            }
            to.write_all(piece)?;
            queued_bytes -= piece.len();
            queue.pop_front();
        }
        if ended && queue.is_empty() {
            return Ok(());
        }
        let due = queue.front().map(|(due, _)| *due);
        let may_read = !ended && queued_bytes < QUEUED_BYTES_MAX;
        if wait_readable(from, may_read, due)? {
            let len = from.read(&mut buffer)?;
            ended = len == 0;
            queued_bytes += len;
            let delay = Duration::from_nanos(shared.delay.load(Ordering::Relaxed));
            queue.push_back((Instant::now() + delay, buffer[..len].to_vec()));
        }
    }
}

/// Waits until there is something to read, or until a moment has come.
fn wait_readable(
    stream: &TcpStream,
    may_read: bool,
    until: Option<Instant>,
) -> std::io::Result<bool> {
    let mut poll = libc::pollfd {
        fd: if may_read { stream.as_raw_fd() } else { -1 },
        events: libc::POLLIN,
        revents: 0,
    };
    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
    let timeout = left.map(|left| libc::timespec {
        tv_sec: left.as_secs().cast_signed(),
        tv_nsec: left.subsec_nanos().into(),
    });
    let timeout = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: one pollfd, and a timeout that is null or lives until the call returns.
    let ready = unsafe { libc::ppoll(&raw mut poll, 1, timeout, std::ptr::null()) };
    match ready {
        -1 => Err(std::io::Error::last_os_error()),
        0 => Ok(false),
        _ => Ok(true),
    }
}

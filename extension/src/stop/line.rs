//! How the worker comes by a last sender: by the connection for which the postmaster forks it.
//!
//! ```text
//!             there is none, and we lead
//!   Idle ───────────────────────────────► Dialling
//!    ▲                                        │ greeted; or refused, then again after a pause
//!    └────────────────────────────────────────┘
//! ```
//!
//! Nothing travels on it but the startup packet, which shows the nonce, and a greeting; then it is
//! closed. That the last sender is there is told by shared memory.
//!
//! The other end must be a server of our own user, or the nonce would be told to a stranger. Our own
//! end is shut for writing at once: if pg_hba.conf asks for a password, the server finds that there
//! is none to come, and decides on the authentication, which is when the last sender is recognised.
//! So any method serves, and only `reject`, or no line that fits, does not.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError, bounded};

use crate::pgwire::{WireError, read_message, startup_message_with};
use crate::threads::{self, Waker};
use crate::{postgres, shmem};

/// What an invited connection calls itself, before the nonce in hexadecimal digits.
pub const NAME_PREFIX: &str = "walproposer last sender ";

/// What the last sender says: CopyBothResponse, as a WAL sender that begins, without a column.
pub const GREETING: &[u8] = b"W\0\0\0\x04";

/// After a refusal: somebody must edit a file first, or leave a connection.
const PAUSE: Duration = Duration::from_secs(10);
/// For each step of the handshake, which takes a fork.
const TIMEOUT: Duration = Duration::from_secs(10);

pub struct Line {
    dialling: Option<Receiver<Result<(), String>>>,
    /// Not dialled before.
    pause_until: Instant,
    waker: Waker,
    /// The last obstacle that was reported.
    reported: String,
}

impl Line {
    /// A new worker's.
    pub fn new(waker: Waker) -> Line {
        if let Some(stop) = shmem::stop() {
            stop.enter_worker();
        }
        Line {
            dialling: None,
            pause_until: Instant::now(),
            waker,
            reported: String::new(),
        }
    }

    /// Dials if there should be a last sender, and there is none.
    pub fn turn(&mut self, is_wanted: bool) {
        if let Some(outcome) = &self.dialling {
            match outcome.try_recv() {
                Err(TryRecvError::Empty) => {}
                Ok(Ok(())) => {
                    self.reported.clear();
                    self.dialling = None;
                }
                Ok(Err(reason)) => self.fail(&reason),
                Err(TryRecvError::Disconnected) => self.fail("the thread that dialled has failed"),
            }
        } else if self.is_due(is_wanted) && Instant::now() >= self.pause_until {
            self.dial();
        }
    }

    fn is_due(&self, is_wanted: bool) -> bool {
        let is_missing = shmem::stop().is_some_and(|stop| !stop.has_sender());
        is_wanted && is_missing && self.dialling.is_none()
    }

    /// How long nothing will have to be done if nothing happens.
    pub fn idle_ms(&self, is_wanted: bool) -> u64 {
        if !self.is_due(is_wanted) {
            return u64::MAX;
        }
        let rest = self.pause_until.saturating_duration_since(Instant::now());
        u64::try_from(rest.as_millis()).map_or(u64::MAX, |ms| ms + 1)
    }

    fn dial(&mut self) {
        let Some(stop) = shmem::stop() else {
            return;
        };
        let paths = postgres::socket_paths();
        if paths.is_empty() {
            return self.fail("unix_socket_directories is empty");
        }
        let nonce = postgres::random_u128();
        stop.offer(nonce);
        let user = postgres::os_user();
        let (outcome, receiver) = bounded(1);
        let waker = self.waker.clone();
        let body = move || {
            // If the receiver is gone, so is the worker.
            let _ = outcome.send(reach_one(&paths, &user, nonce));
            waker.wake();
        };
        let waker = self.waker.clone();
        match threads::spawn("last sender".to_owned(), body, move |_| waker.wake()) {
            Ok(()) => self.dialling = Some(receiver),
            Err(error) => self.fail(&error.to_string()),
        }
    }

    fn fail(&mut self, reason: &str) {
        if let Some(stop) = shmem::stop() {
            stop.withdraw();
        }
        self.dialling = None;
        self.pause_until = Instant::now() + PAUSE;
        if self.reported != reason {
            reason.clone_into(&mut self.reported);
            postgres::warning(
                format!(
                    "a stop of this server will not bring the shutdown checkpoint to the safekeepers: could not \
                     connect to the server itself over its local socket: {reason}"
                ),
                "It takes a directory in unix_socket_directories, a pg_hba.conf that does not reject the server's own user \
                 there, and one of max_wal_senders.",
            );
        }
    }
}

/// Over the first socket that leads to a last sender. A connection for replication alone and one
/// with a database are told apart by pg_hba.conf.
fn reach_one(paths: &[String], user: &str, nonce: u128) -> Result<(), String> {
    let mut reason = String::new();
    for path in paths {
        for replication in ["true", "database"] {
            match reach(path, user, replication, nonce) {
                Ok(()) => return Ok(()),
                Err(error) => reason = format!("{path}: {error}"),
            }
        }
    }
    Err(reason)
}

fn reach(path: &str, user: &str, replication: &str, nonce: u128) -> Result<(), WireError> {
    let address = match path.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(path)?,
    };
    let mut stream = UnixStream::connect_addr(&address)?;
    if !is_of_our_user(&stream) {
        return Err(io::Error::other("somebody else's server listens there").into());
    }
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let name = format!("{NAME_PREFIX}{nonce:032x}");
    stream.write_all(&startup_message_with(&[
        ("user", user),
        ("database", "postgres"),
        ("replication", replication),
        ("application_name", &name),
    ]))?;
    stream.shutdown(Shutdown::Write)?;
    // A question for a password may come first.
    while read_message(&mut stream)?.0 != GREETING[0] {}
    Ok(())
}

fn is_of_our_user(stream: &UnixStream) -> bool {
    let mut peer = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the structure is valid for writing, and `len` is its length.
    unsafe {
        let found = libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &mut len,
        );
        found == 0 && peer.uid == libc::geteuid()
    }
}

//! Consumers that cost little: one thread for all of them, which reads what comes and throws it away.
//!
//! Real ones would take the processors from those who are measured. These answer nothing, so they live as
//! long as the sender's timeout allows; a run is shorter. They read every few milliseconds what has come
//! meanwhile, or as fast as they can, or so many bytes a second all together.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use cluster_tests::poll::SOON;
use safekeeper_protocol::Lsn;

pub struct Consumers {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    received: AtomicU64,
}

/// How fast they read.
#[derive(Clone, Copy)]
pub enum Pace {
    /// Whenever something is there.
    AtOnce,
    /// What has come in so long.
    Every(Duration),
    /// Bytes in a second, of all together.
    Limited(u64),
}

impl Consumers {
    /// So many, each with a connection of its own, which all begin there.
    pub fn attach(source: SocketAddr, count: usize, begin: Lsn, pace: Pace) -> Consumers {
        let sockets: Vec<_> = (0..count).map(|_| connect(source, begin)).collect();
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let thread = thread::spawn(move || theirs.read(sockets, pace));
        Consumers { shared, thread }
    }

    /// Bytes up to now, of all together, with the few that are around the WAL.
    pub fn received(&self) -> u64 {
        self.shared.received.load(Ordering::Relaxed)
    }

    pub fn detach(self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("a consumer does not panic");
    }
}

impl Shared {
    fn read(&self, mut sockets: Vec<TcpStream>, pace: Pace) {
        let mut buffer = vec![0; 256 << 10];
        let begun = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            wait_readable(&sockets);
            for socket in &mut sockets {
                match socket.read(&mut buffer) {
                    Ok(0) => panic!("a consumer was dropped"),
                    Ok(len) => {
                        self.received.fetch_add(len as u64, Ordering::Relaxed);
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => panic!("a consumer was dropped: {error}"),
                }
            }
            match pace {
                Pace::AtOnce => {}
                Pace::Every(time) => thread::sleep(time),
                Pace::Limited(rate) => {
                    let due = self.received.load(Ordering::Relaxed) as f64 / rate as f64;
                    thread::sleep(Duration::from_secs_f64(due).saturating_sub(begun.elapsed()));
                }
            }
        }
    }
}

/// Until one of them is, or a moment has passed.
fn wait_readable(sockets: &[TcpStream]) {
    let mut fds: Vec<_> = sockets
        .iter()
        .map(|socket| libc::pollfd {
            fd: socket.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    // SAFETY: the array is ours and as long as we say; its descriptors are open.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 100) };
}

/// A replication connection in its copy.
fn connect(source: SocketAddr, begin: Lsn) -> TcpStream {
    let mut socket = TcpStream::connect(source).expect("the source listens");
    socket
        .set_read_timeout(Some(SOON))
        .expect("not a time of zero");
    let mut startup = 0x0003_0000_u32.to_be_bytes().to_vec();
    startup.extend_from_slice(b"user\0postgres\0replication\0true\0application_name\0fan-out\0\0");
    let mut say = |tag: Option<u8>, body: &[u8]| {
        let len = u32::try_from(body.len() + 4).expect("it is short");
        let message = [tag.as_slice(), &len.to_be_bytes(), body].concat();
        socket.write_all(&message).expect("the source reads");
        wait_for(&mut socket, if tag.is_some() { b'W' } else { b'Z' });
    };
    say(None, &startup);
    let command = format!("START_REPLICATION {begin}\0");
    say(Some(b'Q'), command.as_bytes());
    socket.set_nonblocking(true).expect("any socket may be");
    socket
}

/// Reads up to a message of that kind.
fn wait_for(socket: &mut TcpStream, wanted: u8) {
    loop {
        let mut head = [0; 5];
        socket.read_exact(&mut head).expect("the source answers");
        let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
        let mut body = vec![0; len as usize - 4];
        socket.read_exact(&mut body).expect("the source answers");
        assert_ne!(head[0], b'E', "{}", String::from_utf8_lossy(&body));
        if head[0] == wanted {
            return;
        }
    }
}

//! Listening, one thread for each connection, and an orderly end.
//!
//! | thread         | does                                              | ends when                       |
//! |----------------|---------------------------------------------------|---------------------------------|
//! | `accept`       | accepts connections                               | the listening socket is shut    |
//! | `conn ADDRESS` | serves one proposer or consumer                   | the peer leaves, or its socket is shut |
//! | `housekeeping` | persists commit_lsn and slots, removes WAL, once a second   | told to                         |
//! | `http`         | metrics and status (http.rs)                      | told to                         |
//!
//! [`Server::stop`] ends them in this order: no new connections; those that are there see the end
//! of their input, flush, say why and close; then commit_lsn is persisted. It waits for each.

use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use safekeeper_wire::pgwire::{ErrorReport, Output};

use crate::clusters::Clusters;
use crate::config::{Config, ConfigError};
use crate::connection::{Clock, Connection};
use crate::descriptors;
use crate::disk::StorageError;
use crate::http::HttpServer;
use crate::identity::DataDir;
use crate::metrics::Metrics;
use crate::retention::Retention;

/// How far commit_lsn in the control file lags behind at most.
const HOUSEKEEPING_INTERVAL: Duration = Duration::from_secs(1);

/// A host that is gone is noticed after 15 + 3 * 5 s, well below a proposer's patience.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;

/// When stopping, for connections to end by themselves, and then for them to notice that their
/// sockets are shut.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("could not listen on {address}: {source}")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("could not start a thread: {0}")]
    Thread(io::Error),
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// What all threads share.
#[derive(Debug)]
pub struct Shared {
    pub clusters: Clusters,
    pub config: Config,
    pub metrics: Arc<Metrics>,
    pub clock: Clock,
    stopping: AtomicBool,
    /// Sockets of the open connections, for the end.
    open: Mutex<HashMap<u64, TcpStream>>,
    /// One of `open` was closed, or `stopping` has become true.
    changed: Condvar,
    next_id: AtomicU64,
}

impl Shared {
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    fn open(&self) -> MutexGuard<'_, HashMap<u64, TcpStream>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until `done` holds of the open connections or `timeout` is over. True if it holds.
    fn wait_until(
        &self,
        timeout: Duration,
        done: impl Fn(&HashMap<u64, TcpStream>) -> bool,
    ) -> bool {
        let deadline = Instant::now() + timeout;
        let mut open = self.open();
        while !done(&open) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let woken = self.changed.wait_timeout(open, left);
            open = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

/// A running daemon.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    listener: Arc<TcpListener>,
    accept: JoinHandle<()>,
    housekeeping: JoinHandle<()>,
    http: HttpServer,
    listen: SocketAddr,
    /// Locked for as long as anything of ours runs.
    _data_dir: DataDir,
}

impl Server {
    /// Opens all clusters and begins to serve them.
    pub fn start(data_dir: DataDir, config: Config) -> Result<Server, StartError> {
        let (listen, http) = config.addresses()?;
        descriptors::check(config.max_connections, descriptors::raise_limit())?;
        // Both addresses before anything else: the usual mistake is that one is taken.
        let listener = bind(listen)?;
        let http_listener = bind(http)?;
        let metrics = Arc::new(Metrics::default());
        let clusters = Clusters::open(&data_dir, metrics.clone())?;
        let shared = Arc::new(Shared {
            clusters,
            config,
            metrics,
            clock: Clock::start(),
            stopping: AtomicBool::new(false),
            open: Mutex::default(),
            changed: Condvar::new(),
            next_id: AtomicU64::new(1),
        });
        let http = HttpServer::start(http_listener, shared.clone()).map_err(StartError::Thread)?;
        let listener = Arc::new(listener);
        let listen = listener.local_addr().map_err(|source| StartError::Listen {
            address: listen,
            source,
        })?;
        let accept = spawn("accept", {
            let (shared, listener) = (shared.clone(), listener.clone());
            move || accept(&shared, &listener)
        })?;
        let housekeeping = spawn("housekeeping", {
            let shared = shared.clone();
            move || housekeep(&shared)
        })?;
        log::info!("ready listen={listen} http={}", http.address());
        Ok(Server {
            shared,
            listener,
            accept,
            housekeeping,
            http,
            listen,
            _data_dir: data_dir,
        })
    }

    /// Where proposers and consumers connect.
    pub fn address(&self) -> SocketAddr {
        self.listen
    }

    pub fn http_address(&self) -> SocketAddr {
        self.http.address()
    }

    /// End everything; what was flushed stays, and commit_lsn is persisted.
    pub fn stop(self) {
        let shared = &self.shared;
        log::info!("stopping");
        {
            let _open = shared.open();
            shared.stopping.store(true, Ordering::SeqCst);
        }
        shared.changed.notify_all();
        // On Linux this ends accept(2).
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        join(self.accept);
        for how in [Shutdown::Read, Shutdown::Both] {
            for socket in shared.open().values() {
                // It may be closed already by the peer.
                let _ = socket.shutdown(how);
            }
            if shared.wait_until(FAREWELL_TIMEOUT, HashMap::is_empty) {
                break;
            }
        }
        join(self.housekeeping);
        for keeper in shared.clusters.keepers() {
            keeper.persist_commit_lsn();
            keeper.slots.save_or_warn();
        }
        self.http.stop();
        log::info!("stopped");
    }
}

fn bind(address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).map_err(|source| StartError::Listen { address, source })
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StartError> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(run)
        .map_err(StartError::Thread)
}

fn join(thread: JoinHandle<()>) {
    // In the daemon a panic has ended the process; in a test it shows elsewhere.
    let _ = thread.join();
}

fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    loop {
        let accepted = listener.accept();
        if shared.is_stopping() {
            return;
        }
        match accepted {
            Ok((socket, peer)) => admit(shared, socket, peer),
            Err(error) => {
                log::warn!("could not accept a connection: {error}");
                // Out of descriptors, most likely: wait for one to become free.
                let n_open = shared.open().len();
                shared.wait_until(HOUSEKEEPING_INTERVAL, |open| {
                    open.len() < n_open || shared.is_stopping()
                });
            }
        }
    }
}

/// A thread for the connection, or a word why there is none.
fn admit(shared: &Arc<Shared>, socket: TcpStream, peer: SocketAddr) {
    let id = shared.next_id.fetch_add(1, Ordering::Relaxed);
    let registered = set_keepalive(&socket).and_then(|()| socket.try_clone());
    let for_end = match registered {
        Ok(socket) => socket,
        Err(error) => return log::warn!("connection refused from={peer} ({error})"),
    };
    {
        let mut open = shared.open();
        if open.len() >= shared.config.max_connections {
            drop(open);
            return refuse(shared, socket, peer);
        }
        open.insert(id, for_end);
    }
    let entry = Entry {
        shared: shared.clone(),
        id,
    };
    shared.metrics.connections.inc();
    let started = spawn(&format!("conn {peer}"), move || {
        let connection = Connection::new(socket, peer, id, entry.shared.clone());
        connection.run();
        drop(entry);
    });
    if let Err(error) = started {
        log::warn!("connection refused from={peer} ({error})");
    }
}

fn refuse(shared: &Shared, socket: TcpStream, peer: SocketAddr) {
    shared.metrics.connections_refused.inc();
    log::warn!("connection refused from={peer} (too many connections)");
    let mut output = Output::default();
    output.error(
        "FATAL",
        &ErrorReport::new("53300", "sorry, too many clients already"),
    );
    // The accepting thread waits for nobody; a new socket has room for this.
    if socket.set_nonblocking(true).is_ok() {
        let _ = output.send(&socket);
    }
}

/// A connection's place among the open ones, given up when its thread ends.
struct Entry {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.shared.metrics.connections.dec();
        self.shared.open().remove(&self.id);
        self.shared.changed.notify_all();
    }
}

fn set_keepalive(socket: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    let fd = socket.as_fd();
    sockopt::set_socket_keepalive(fd, true)?;
    sockopt::set_tcp_keepidle(fd, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(fd, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(fd, KEEPALIVE_PROBES)?;
    Ok(())
}

fn housekeep(shared: &Shared) {
    let retention = Retention {
        wal_keep_size: shared.config.wal_keep_size,
        max_wal_keep: shared.config.max_wal_keep,
        min_free_space: shared.config.min_free_space,
    };
    while !shared.wait_until(HOUSEKEEPING_INTERVAL, |_| shared.is_stopping()) {
        shared.clusters.housekeep(&retention);
    }
}

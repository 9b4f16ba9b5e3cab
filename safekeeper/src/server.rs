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

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use safekeeper_wire::pgwire::{ConnectionError, ErrorReport, Output};

use crate::access::{AccessControl, AccessError};
use crate::clusters::Clusters;
use crate::config::{Config, ConfigError};
use crate::connection::{Clock, Connection};
use crate::descriptors;
use crate::disk::StorageError;
use crate::http::HttpServer;
use crate::identity::DataDir;
use crate::metrics::Metrics;
use crate::retention::Retention;
use crate::users::Role;

/// How far commit_lsn in the control file lags behind at most.
const HOUSEKEEPING_INTERVAL: Duration = Duration::from_secs(1);

/// A host that is gone is noticed after 15 + 3 * 5 s, well below a proposer's patience.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;

/// Connections at a time of which it is not known yet who they are. Above it a new one takes the place of
/// another (`make_room`); above twice as many, while those end, it is refused.
pub const STRANGERS_MAX: usize = 50;
/// Of `max_connections`, for those who may push WAL: however many others come, a primary can.
pub const RESERVED_FOR_PROPOSERS: usize = 5;

/// For connections that were shut to be gone.
const STRANGERS_END_WITHIN: Duration = Duration::from_secs(1);

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
    Access(#[from] AccessError),
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
    access: RwLock<Arc<AccessControl>>,
    stopping: AtomicBool,
    /// By the number of the connection.
    open: Mutex<BTreeMap<u64, OpenConnection>>,
    /// One of `open` was closed, or `stopping` has become true.
    changed: Condvar,
    next_id: AtomicU64,
}

/// One that has a thread.
#[derive(Debug)]
struct OpenConnection {
    /// For the end.
    socket: TcpStream,
    host: IpAddr,
    /// It is known who it is, and it counts among `max_connections`.
    is_in: bool,
    /// It may push WAL.
    is_proposer: bool,
    /// It has had to make room.
    is_shut: bool,
}

type OpenConnections = BTreeMap<u64, OpenConnection>;

impl Shared {
    /// As it is now; a connection that has come in stays.
    pub fn access(&self) -> Arc<AccessControl> {
        let access = self.access.read().unwrap_or_else(PoisonError::into_inner);
        access.clone()
    }

    /// The peer of connection `id` has shown who it is, by these rules. An error if there is no room for it, or
    /// the rules are others by now.
    pub fn let_in(
        &self,
        id: u64,
        access: &Arc<AccessControl>,
        roles: &[Role],
    ) -> Result<(), ConnectionError> {
        let mut open = self.open();
        if !Arc::ptr_eq(access, &self.access()) {
            return Err(ConnectionError::Fatal(
                ErrorReport::new("57P03", "the access rules have just been reloaded")
                    .hint("Connect again."),
            ));
        }
        let is_proposer = roles.contains(&Role::Proposer);
        let inside = || open.values().filter(|connection| connection.is_in);
        let n_others = inside().filter(|it| !it.is_proposer).count();
        let max = self.config.max_connections;
        let max_others = max - RESERVED_FOR_PROPOSERS.min(max / 2);
        if inside().count() >= max || (!is_proposer && n_others >= max_others) {
            self.metrics.connections_refused.inc();
            return Err(ConnectionError::Fatal(too_many()));
        }
        match open.get_mut(&id) {
            Some(connection) => (connection.is_in, connection.is_proposer) = (true, is_proposer),
            None => unreachable!("it is open as long as its thread runs"),
        }
        Ok(())
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    fn open(&self) -> MutexGuard<'_, OpenConnections> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until `done` holds of the open connections or `timeout` is over. True if it holds.
    fn wait_until(&self, timeout: Duration, done: impl Fn(&OpenConnections) -> bool) -> bool {
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
    data_dir: DataDir,
}

impl Server {
    /// Opens all clusters and begins to serve them.
    pub fn start(data_dir: DataDir, config: Config) -> Result<Server, StartError> {
        let (listen, http) = config.addresses()?;
        descriptors::check(config.max_connections, descriptors::raise_limit())?;
        // Both addresses before anything else: the usual mistake is that one is taken.
        let listener = bind(listen)?;
        let http_listener = bind(http)?;
        let access = AccessControl::load(data_dir.path(), &config)?;
        let metrics = Arc::new(Metrics::default());
        let clusters = Clusters::open(&data_dir, metrics.clone())?;
        let shared = Arc::new(Shared {
            clusters,
            config,
            metrics,
            clock: Clock::start(),
            access: RwLock::new(Arc::new(access)),
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
            data_dir,
        })
    }

    /// Reads users and certificates again, and takes the rules of `config`. On an error all of it stays as it
    /// was.
    pub fn reload(&self, config: &Config) -> Result<(), AccessError> {
        let in_effect = Config {
            access: config.access.clone(),
            tls: config.tls.clone(),
            ..self.shared.config.clone()
        };
        // For the sockets that are open now, not for those of the next start.
        in_effect.check(self.listen, self.http.address())?;
        let before = self.shared.access();
        if config.access.is_empty() && !before.rules.is_empty() {
            return Err(AccessError::NoRules);
        }
        let access = AccessControl::load(self.data_dir.path(), &in_effect)?;
        // By `user remove` the last one goes, and the file says what it says.
        let is_blank = access.users.list().is_empty() && access.users.salt_key().is_none();
        if is_blank && !before.users.list().is_empty() {
            return Err(AccessError::NoUsers);
        }
        log::info!(
            "access control reloaded n_users={} n_rules={} tls={}",
            access.users.list().len(),
            access.rules.len(),
            access.tls.is_some()
        );
        let mut current = self.shared.access.write();
        let current = current
            .as_mut()
            .unwrap_or_else(|poisoned| poisoned.get_mut());
        **current = Arc::new(access);
        if in_effect != *config {
            log::warn!("other settings were changed, too; they take effect at the next start");
        }
        Ok(())
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
            for connection in shared.open().values() {
                // It may be closed already by the peer.
                let _ = connection.socket.shutdown(how);
            }
            if shared.wait_until(FAREWELL_TIMEOUT, BTreeMap::is_empty) {
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
    // Those whose place was taken end as soon as they have noticed. Others wait in the kernel.
    let has_room = |open: &OpenConnections| n_strangers(open) < 2 * STRANGERS_MAX;
    if !shared.wait_until(STRANGERS_END_WITHIN, has_room) {
        return refuse(shared, socket, peer);
    }
    {
        let mut open = shared.open();
        if n_strangers(&open) >= STRANGERS_MAX {
            make_room(&mut open);
        }
        let connection = OpenConnection {
            socket: for_end,
            host: host_of(peer),
            is_in: false,
            is_proposer: false,
            is_shut: false,
        };
        open.insert(id, connection);
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

/// One stranger has to go: of the host that has most of them, the one that has had the most time. So a host that
/// floods us crowds out itself, and nobody who comes from another one and needs a moment only.
fn make_room(open: &mut OpenConnections) {
    let mut strangers: Vec<_> = open
        .values_mut()
        .filter(|connection| !connection.is_in && !connection.is_shut)
        .collect();
    let mut n_of = HashMap::new();
    for stranger in &strangers {
        *n_of.entry(stranger.host).or_insert(0) += 1;
    }
    let most = n_of.values().max();
    let oldest = strangers
        .iter_mut()
        .find(|stranger| n_of.get(&stranger.host) == most);
    if let Some(oldest) = oldest {
        oldest.is_shut = true;
        // It may be closed already by the peer.
        let _ = oldest.socket.shutdown(Shutdown::Both);
    }
}

/// Where a peer comes from: an IPv4 address, or a network of IPv6, of which one host has all addresses.
fn host_of(peer: SocketAddr) -> IpAddr {
    match peer.ip().to_canonical() {
        IpAddr::V6(address) => {
            let network = address.to_bits() & !u128::from(u64::MAX);
            Ipv6Addr::from_bits(network).into()
        }
        address => address,
    }
}

fn refuse(shared: &Shared, socket: TcpStream, peer: SocketAddr) {
    shared.metrics.connections_refused.inc();
    log::warn!("connection refused from={peer} (too many connections)");
    let mut output = Output::default();
    output.error("FATAL", &too_many());
    // The accepting thread waits for nobody; a new socket has room for this.
    if socket.set_nonblocking(true).is_ok() {
        let _ = output.send(&mut socket.into());
    }
}

/// Of whom it is not known yet who they are.
fn n_strangers(open: &OpenConnections) -> usize {
    open.values().filter(|connection| !connection.is_in).count()
}

fn too_many() -> ErrorReport {
    ErrorReport::new("53300", "sorry, too many clients already")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_of_ipv6_is_one_host() {
        let host = |text: &str| host_of(SocketAddr::new(text.parse().expect("an address"), 1));
        assert_eq!(host("2001:db8::1"), host("2001:db8::ffff:0:0:2"));
        assert_ne!(host("2001:db8::1"), host("2001:db8:0:1::1"));
        assert_eq!(host("::ffff:192.0.2.1"), host("192.0.2.1"));
        assert_ne!(host("192.0.2.2"), host("192.0.2.1"));
    }
}

//! What the worker sleeps on: its latch, the postmaster's life, the threads' wake-ups, and the
//! members' sockets.
//!
//! A `WaitEventSet` can't forget a socket, so it is built anew when the set of connections changes,
//! which is rare; whether a socket is also waited on for writing is changed in place. A socket is
//! known by its connection and not by its descriptor alone, because descriptors are used again.

use std::os::fd::RawFd;

use pgrx::pg_sys;

use crate::threads::WakeReceiver;

/// A connection to wait on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// Place of its peer in the worker's list.
    pub peer: usize,
    /// How many connections that peer has had.
    pub connection: u64,
    pub fd: RawFd,
    /// Bytes wait to be sent.
    pub wants_write: bool,
}

pub struct WaitSet {
    set: *mut pg_sys::WaitEventSet,
    wake_receiver: WakeReceiver,
    wake_position: i32,
    /// The sockets in the set, with the event's position there.
    sockets: Vec<(Socket, i32)>,
    events: Vec<pg_sys::WaitEvent>,
    /// Peers whose sockets could be read or written when the last wait ended.
    ready: Vec<usize>,
    /// What is asked for; kept for its memory.
    wanted: Vec<Socket>,
}

/// The latch, the postmaster's death, the wake-up socket.
const OTHER_EVENTS: usize = 3;

impl WaitSet {
    pub fn new(wake_receiver: WakeReceiver) -> WaitSet {
        WaitSet {
            set: std::ptr::null_mut(),
            wake_receiver,
            wake_position: -1,
            sockets: Vec::new(),
            events: Vec::new(),
            ready: Vec::new(),
            wanted: Vec::new(),
        }
    }

    /// The peers whose sockets could be read or written when the last wait ended.
    pub fn ready(&self) -> &[usize] {
        &self.ready
    }

    /// Sleeps until something happens or `timeout_ms` are over. Ends the process if the postmaster
    /// is dead.
    pub fn wait(&mut self, sockets: impl Iterator<Item = Socket>, timeout_ms: u64) {
        self.wanted.clear();
        self.wanted.extend(sockets);
        self.update();
        let timeout = i64::try_from(timeout_ms)
            .unwrap_or(i64::MAX)
            .min(i32::MAX.into());
        let capacity = i32::try_from(self.events.len()).expect("at most a few dozen");
        // SAFETY: the set is alive, and `events` has room for `capacity` of them.
        let count = unsafe {
            pg_sys::WaitEventSetWait(
                self.set,
                timeout,
                self.events.as_mut_ptr(),
                capacity,
                pg_sys::PG_WAIT_EXTENSION,
            )
        };
        let occurred = &self.events[..usize::try_from(count).unwrap_or(0)];
        // Before anybody looks at what the threads have said: so nothing of it is missed.
        if occurred.iter().any(|it| it.pos == self.wake_position) {
            self.wake_receiver.clear();
        }
        let peer_of = |event: &pg_sys::WaitEvent| {
            let found = self
                .sockets
                .iter()
                .find(|(_, position)| *position == event.pos);
            found.map(|(socket, _)| socket.peer)
        };
        self.ready.clear();
        self.ready.extend(occurred.iter().filter_map(peer_of));
    }

    fn update(&mut self) {
        let same = self.sockets.len() == self.wanted.len()
            && self
                .sockets
                .iter()
                .zip(&self.wanted)
                .all(|((known, _), socket)| {
                    (known.peer, known.connection, known.fd)
                        == (socket.peer, socket.connection, socket.fd)
                });
        if self.set.is_null() || !same {
            return self.rebuild();
        }
        for ((known, position), socket) in self.sockets.iter_mut().zip(&self.wanted) {
            if known.wants_write != socket.wants_write {
                known.wants_write = socket.wants_write;
                // SAFETY: the position is one that this set has given.
                unsafe {
                    pg_sys::ModifyWaitEvent(
                        self.set,
                        *position,
                        socket_events(socket),
                        std::ptr::null_mut(),
                    );
                }
            }
        }
    }

    fn rebuild(&mut self) {
        let size = OTHER_EVENTS + self.wanted.len();
        let none = pg_sys::PGINVALID_SOCKET;
        self.free();
        // SAFETY: the set lives in the longest-lived context and is freed by us; all descriptors
        // are open now. The latch is our own.
        unsafe {
            self.set = create(i32::try_from(size).expect("at most a few dozen"));
            self.add(pg_sys::WL_LATCH_SET, none, pg_sys::MyLatch);
            self.add(pg_sys::WL_EXIT_ON_PM_DEATH, none, std::ptr::null_mut());
            self.wake_position = self.add(
                pg_sys::WL_SOCKET_READABLE,
                self.wake_receiver.fd(),
                std::ptr::null_mut(),
            );
            for at in 0..self.wanted.len() {
                let socket = self.wanted[at];
                let position = self.add(socket_events(&socket), socket.fd, std::ptr::null_mut());
                self.sockets.push((socket, position));
            }
        }
        self.events.resize(size, pg_sys::WaitEvent::default());
    }

    /// # Safety
    /// The set is alive, `fd` is open or `PGINVALID_SOCKET`, `latch` is null or our own.
    unsafe fn add(&mut self, events: u32, fd: i32, latch: *mut pg_sys::Latch) -> i32 {
        // SAFETY: by the caller.
        unsafe { pg_sys::AddWaitEventToSet(self.set, events, fd, latch, std::ptr::null_mut()) }
    }

    fn free(&mut self) {
        self.sockets.clear();
        if !self.set.is_null() {
            // SAFETY: created by us, and not used again.
            unsafe { pg_sys::FreeWaitEventSet(self.set) };
            self.set = std::ptr::null_mut();
        }
    }
}

impl Drop for WaitSet {
    fn drop(&mut self) {
        self.free();
    }
}

fn socket_events(socket: &Socket) -> u32 {
    let write = if socket.wants_write {
        pg_sys::WL_SOCKET_WRITEABLE
    } else {
        0
    };
    pg_sys::WL_SOCKET_READABLE | write
}

/// # Safety
/// The caller frees it.
#[cfg(any(feature = "pg15", feature = "pg16"))]
unsafe fn create(size: i32) -> *mut pg_sys::WaitEventSet {
    // SAFETY: the context lives as long as the process.
    unsafe { pg_sys::CreateWaitEventSet(pg_sys::TopMemoryContext, size) }
}

/// # Safety
/// The caller frees it.
#[cfg(any(feature = "pg17", feature = "pg18"))]
unsafe fn create(size: i32) -> *mut pg_sys::WaitEventSet {
    // SAFETY: without a resource owner the set lives until it is freed.
    unsafe { pg_sys::CreateWaitEventSet(std::ptr::null_mut(), size) }
}

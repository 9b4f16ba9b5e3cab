//! Shared memory: what backends may see of the worker.
//!
//! | what | written by | read by |
//! |---|---|---|
//! | `commit_lsn` | worker, before it releases commits | every committing backend, `walproposer_wait_commit` |
//! | `waits_cancelled` | backends whose wait ended without the quorum | the view |
//! | `wal_senders` | connections that are WAL senders | the next one |
//! | the gate | postmaster, before recovery; worker | sessions that are being authenticated |
//! | `read_only` | worker | every statement |
//! | the won term | postmaster, before recovery; promoter; worker, at a stop | the worker, the last sender, once |
//! | [`Board`] | sessions that ask for a promotion; promoter | each other, under the lock |
//! | `hints` | backends that are about to commit | the worker |
//! | `stop` | see `stop/shared.rs` | |
//! | [`Status`] | worker, under a lock, before it goes to sleep | the views |
//!
//! It is made anew when the server starts and after a crash-restart, and survives a restart of the
//! worker. Texts have a fixed size and are cut at it; nothing here grows.

use std::cell::UnsafeCell;
use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU64, AtomicUsize, Ordering};

use pgrx::{pg_guard, pg_sys};
use safekeeper_protocol::{Configuration, Lsn, WonTerm};

use crate::early_push::{CommitHints, Hint};
use crate::promotion::Board;
use crate::start;
use crate::stop::StopShared;

const NAME: &CStr = c"walproposer";

/// A text of at most `N` bytes.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Text<const N: usize> {
    len: usize,
    bytes: [u8; N],
}

impl<const N: usize> Text<N> {
    pub const EMPTY: Text<N> = Text {
        len: 0,
        bytes: [0; N],
    };

    /// Cut at the end of the last character that fits.
    pub fn set(&mut self, text: &str) {
        self.len = text.floor_char_boundary(N);
        self.bytes[..self.len].copy_from_slice(&text.as_bytes()[..self.len]);
    }

    pub fn get(&self) -> String {
        String::from_utf8_lossy(&self.bytes[..self.len.min(N)]).into_owned()
    }
}

/// One row of `pg_stat_safekeeper`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct MemberStatus {
    /// 0 until it has greeted.
    pub id: u64,
    pub host: Text<256>,
    pub port: u16,
    pub state: Text<32>,
    pub term: u64,
    pub sent_lsn: Lsn,
    pub flush_lsn: Lsn,
    pub commit_lsn: Lsn,
    /// Microseconds; negative if unknown.
    pub flush_lag_us: i64,
    pub reconnects: u64,
    pub last_error: Text<256>,
}

/// The row of `pg_stat_walproposer`, and those of the members.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Status {
    pub state: Text<32>,
    pub term: u64,
    pub generation: u32,
    pub tli: u32,
    pub sent_lsn: Lsn,
    pub quorum_size: u32,
    pub members_configured: u32,
    pub members_active: u32,
    /// Postgres's timestamp; 0 if never elected.
    pub elected_at: pg_sys::TimestampTz,
    pub bytes_from_buffers: u64,
    pub bytes_from_files: u64,
    pub bytes_from_donor: u64,
    /// Turns of the worker's loop.
    pub wakeups: u64,
    pub last_error: Text<512>,
    pub n_peers: usize,
    pub peers: [MemberStatus; Configuration::MEMBERS_MAX],
}

impl Status {
    pub const EMPTY: Status = Status {
        state: Text::EMPTY,
        term: 0,
        generation: 0,
        tli: 0,
        sent_lsn: Lsn::INVALID,
        quorum_size: 0,
        members_configured: 0,
        members_active: 0,
        elected_at: 0,
        bytes_from_buffers: 0,
        bytes_from_files: 0,
        bytes_from_donor: 0,
        wakeups: 0,
        last_error: Text::EMPTY,
        n_peers: 0,
        peers: [MemberStatus {
            id: 0,
            host: Text::EMPTY,
            port: 0,
            state: Text::EMPTY,
            term: 0,
            sent_lsn: Lsn::INVALID,
            flush_lsn: Lsn::INVALID,
            commit_lsn: Lsn::INVALID,
            flush_lag_us: -1,
            reconnects: 0,
            last_error: Text::EMPTY,
        }; Configuration::MEMBERS_MAX],
    };
}

#[repr(C)]
struct Shared {
    commit_lsn: AtomicU64,
    waits_cancelled: AtomicU64,
    wal_senders: AtomicI32,
    hints: CommitHints,
    stop: StopShared,
    commit_moved: UnsafeCell<pg_sys::ConditionVariable>,
    gate: AtomicU64,
    read_only: AtomicBool,
    /// Bytes of the won term; 0 if there is none, or it was taken.
    won_len: AtomicUsize,
    won: UnsafeCell<[u8; WON_LEN_MAX]>,
    board_changed: UnsafeCell<pg_sys::ConditionVariable>,
    /// Guarded, as `status`, by the lock of tranche [`NAME`].
    board: UnsafeCell<Board>,
    status: UnsafeCell<Status>,
}

/// A history of the greatest length takes 80 kB, a configuration 9 kB.
const WON_LEN_MAX: usize = 128 * 1024;

/// Values of `gate` that are no position.
const GATE_OPEN: u64 = 0;
const GATE_CLOSED: u64 = u64::MAX;

/// Set in the postmaster, inherited by all its children; null if the library was not preloaded.
static SHARED: AtomicPtr<Shared> = AtomicPtr::new(std::ptr::null_mut());

static PREVIOUS_REQUEST: PreviousHook = PreviousHook::new();
static PREVIOUS_STARTUP: PreviousHook = PreviousHook::new();

/// What another library had put into a hook before us.
struct PreviousHook(AtomicPtr<()>);

type Hook = unsafe extern "C-unwind" fn();

impl PreviousHook {
    const fn new() -> PreviousHook {
        PreviousHook(AtomicPtr::new(std::ptr::null_mut()))
    }

    fn set(&self, hook: Option<Hook>) {
        let address = hook.map_or(std::ptr::null_mut(), |hook| hook as *mut ());
        self.0.store(address, Ordering::Relaxed);
    }

    fn call(&self) {
        let address = self.0.load(Ordering::Relaxed);
        if !address.is_null() {
            // SAFETY: the address is that of a `Hook`, put there by `set`; null pointers are
            // excluded, and the hook is called where Postgres would have called it.
            unsafe { std::mem::transmute::<*mut (), Hook>(address)() };
        }
    }
}

/// Asks for shared memory. From `_PG_init` in the postmaster.
pub fn register() {
    // SAFETY: the postmaster is single-threaded while it loads libraries.
    unsafe {
        PREVIOUS_REQUEST.set(pg_sys::shmem_request_hook);
        pg_sys::shmem_request_hook = Some(request);
        PREVIOUS_STARTUP.set(pg_sys::shmem_startup_hook);
        pg_sys::shmem_startup_hook = Some(startup);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn request() {
    PREVIOUS_REQUEST.call();
    // SAFETY: called by Postgres when requests are taken; the name ends with a zero byte.
    unsafe {
        pg_sys::RequestAddinShmemSpace(size_of::<Shared>() + align_of::<Shared>());
        pg_sys::RequestNamedLWLockTranche(NAME.as_ptr(), 1);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn startup() {
    PREVIOUS_STARTUP.call();
    let mut found = false;
    // SAFETY: called in the postmaster, which is alone, when shared memory is laid out. Postgres
    // aligns structures to a cache line; all zeroes are valid values of the atomic fields.
    unsafe {
        let shared: *mut Shared =
            pg_sys::ShmemInitStruct(NAME.as_ptr(), size_of::<Shared>(), &mut found).cast();
        if !found {
            shared.cast::<u8>().write_bytes(0, size_of::<Shared>());
            (*shared).status.get().write(Status::EMPTY);
            (*shared).board.get().write(Board::EMPTY);
            pg_sys::ConditionVariableInit((*shared).commit_moved.get());
            pg_sys::ConditionVariableInit((*shared).board_changed.get());
        }
        SHARED.store(shared, Ordering::Relaxed);
    }
    start::before_recovery();
}

fn shared() -> Option<&'static Shared> {
    // SAFETY: null or a structure that stays until the process ends. It is never borrowed
    // mutably: what changes is atomic or in a cell.
    unsafe { SHARED.load(Ordering::Relaxed).as_ref() }
}

/// For the worker that is to start: by the postmaster before recovery, when it is alone, or by the
/// promoter at the end of it, for which the worker waits. For the last sender of a stop: by the
/// worker, which has taken what was there before, as its last act.
pub fn hand_over(won: &WonTerm) {
    let bytes = start::encode_won(won);
    let Some(shared) = shared().filter(|_| bytes.len() <= WON_LEN_MAX) else {
        return;
    };
    // SAFETY: nobody reads while `won_len` is 0; the length is checked.
    unsafe {
        shared
            .won
            .get()
            .cast::<u8>()
            .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
    }
    shared.won_len.store(bytes.len(), Ordering::Release);
}

/// The term that was handed over, for whoever asks first: a worker that is started again stands for
/// election.
pub fn take_won_term() -> Option<WonTerm> {
    let shared = shared()?;
    let len = shared.won_len.swap(0, Ordering::AcqRel).min(WON_LEN_MAX);
    // SAFETY: written before the length was, and by nobody since: it was not taken.
    let bytes = unsafe { std::slice::from_raw_parts(shared.won.get().cast::<u8>(), len) };
    if bytes.is_empty() {
        return None;
    }
    start::decode_won(bytes).ok()
}

/// Sessions wait from here on. By the postmaster, before recovery.
pub fn close_gate() {
    if let Some(shared) = shared() {
        shared.gate.store(GATE_CLOSED, Ordering::Release);
    }
}

pub fn gate_is_open() -> bool {
    shared().is_none_or(|shared| shared.gate.load(Ordering::Acquire) == GATE_OPEN)
}

/// The recovered log ends at `lsn`. Counts if the gate is closed and no end was set before. Whether
/// it was news.
pub fn set_gate(lsn: Lsn) -> bool {
    shared().is_some_and(|shared| {
        let (closed, end) = (GATE_CLOSED, lsn.0.max(1));
        let set = shared
            .gate
            .compare_exchange(closed, end, Ordering::AcqRel, Ordering::Acquire);
        set.is_ok()
    })
}

/// Opens the gate if all of the recovered log is committed. Whether it was closed.
pub fn open_gate_at(commit_lsn: Lsn) -> bool {
    let Some(shared) = shared() else {
        return false;
    };
    let gate = shared.gate.load(Ordering::Acquire);
    if gate == GATE_OPEN || gate == GATE_CLOSED || commit_lsn.0 < gate {
        return false;
    }
    shared.gate.store(GATE_OPEN, Ordering::Release);
    // SAFETY: initialised at startup, never moved.
    unsafe { pg_sys::ConditionVariableBroadcast(shared.commit_moved.get()) };
    true
}

/// Sleeps until the gate is open. Ends as any wait does that is interrupted.
pub fn wait_for_gate() {
    let Some(shared) = shared() else {
        return;
    };
    let moved = shared.commit_moved.get();
    // SAFETY: initialised at startup, never moved. Prepared before the gate is looked at, so that
    // no broadcast in between is lost; cancelled on every way out, by Postgres on errors.
    unsafe {
        pg_sys::ConditionVariablePrepareToSleep(moved);
        while !gate_is_open() {
            pg_sys::ConditionVariableSleep(moved, pg_sys::PG_WAIT_EXTENSION);
        }
        pg_sys::ConditionVariableCancelSleep();
    }
}

pub fn commit_hints() -> Option<&'static CommitHints> {
    shared().map(|shared| &shared.hints)
}

pub fn latest_hint() -> Hint {
    commit_hints().map_or_else(Hint::default, CommitHints::latest)
}

pub fn stop() -> Option<&'static StopShared> {
    shared().map(|shared| &shared.stop)
}

/// No transaction may write any more, or may again. By the worker.
pub fn set_read_only(read_only: bool) {
    if let Some(shared) = shared() {
        shared.read_only.store(read_only, Ordering::Release);
    }
}

pub fn is_read_only() -> bool {
    shared().is_some_and(|shared| shared.read_only.load(Ordering::Acquire))
}

/// Is there shared memory, that is, was the library preloaded?
pub fn is_there() -> bool {
    shared().is_some()
}

/// WAL below is on a quorum; [`Lsn::INVALID`] if there was none since the server started.
pub fn commit_lsn() -> Lsn {
    shared().map_or(Lsn::INVALID, |shared| {
        Lsn(shared.commit_lsn.load(Ordering::Acquire))
    })
}

/// By the worker, before it releases the commits below.
pub fn set_commit_lsn(lsn: Lsn) {
    if let Some(shared) = shared() {
        shared.commit_lsn.fetch_max(lsn.0, Ordering::Release);
        // SAFETY: initialised at startup, never moved.
        unsafe { pg_sys::ConditionVariableBroadcast(shared.commit_moved.get()) };
    }
}

/// Waits until `commit_lsn` has reached `lsn`, or `timeout_ms` are over; whether it has. Where
/// interrupts are held, it can't be cancelled.
pub fn await_commit_for(lsn: Lsn, timeout_ms: u64) -> bool {
    commit_lsn() >= lsn || wait_for_commit(lsn, Some(timeout_ms))
}

/// Waits until `commit_lsn` has reached `lsn`, or `timeout_ms` are over; whether it has. Can be
/// cancelled as any query.
pub fn wait_for_commit(lsn: Lsn, timeout_ms: Option<u64>) -> bool {
    let Some(shared) = shared() else {
        return false;
    };
    let started = std::time::Instant::now();
    let moved = shared.commit_moved.get();
    // SAFETY: initialised at startup, never moved. Prepared before the position is looked at, so
    // that no broadcast in between is lost; cancelled on every way out, by Postgres on errors.
    unsafe {
        pg_sys::ConditionVariablePrepareToSleep(moved);
        let reached = loop {
            if commit_lsn() >= lsn {
                break true;
            }
            let waited_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            match timeout_ms {
                None => pg_sys::ConditionVariableSleep(moved, pg_sys::PG_WAIT_EXTENSION),
                Some(timeout_ms) if waited_ms >= timeout_ms => break false,
                Some(timeout_ms) => {
                    let rest = i64::try_from(timeout_ms - waited_ms).unwrap_or(i64::MAX);
                    pg_sys::ConditionVariableTimedSleep(
                        moved,
                        rest.min(i32::MAX.into()),
                        pg_sys::PG_WAIT_EXTENSION,
                    );
                }
            }
        };
        pg_sys::ConditionVariableCancelSleep();
        reached
    }
}

/// A commit's wait for the quorum ended without it.
pub fn count_cancelled_wait() {
    if let Some(shared) = shared() {
        shared.waits_cancelled.fetch_add(1, Ordering::Relaxed);
    }
}

pub fn waits_cancelled() -> u64 {
    shared().map_or(0, |shared| shared.waits_cancelled.load(Ordering::Relaxed))
}

/// One more WAL sender, unless there are `max` already.
pub fn add_wal_sender(max: i32) -> bool {
    shared().is_none_or(|shared| {
        let one_more = |n| (n < max).then_some(n + 1);
        shared
            .wal_senders
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more)
            .is_ok()
    })
}

pub fn remove_wal_sender() {
    if let Some(shared) = shared() {
        shared.wal_senders.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Puts the worker's status where the views find it.
pub fn publish(status: &Status) {
    with_status(pg_sys::LWLockMode::LW_EXCLUSIVE, |shared| {
        // SAFETY: the lock is held exclusively.
        unsafe { *shared = *status };
    });
}

/// The worker is at its end: what it has published is no longer so.
pub fn publish_stopped() {
    with_status(pg_sys::LWLockMode::LW_EXCLUSIVE, |shared| {
        // SAFETY: the lock is held exclusively.
        let status = unsafe { &mut *shared };
        status.state.set("stopped");
        status.members_active = 0;
        for peer in &mut status.peers {
            peer.state.set("disconnected");
        }
        status
            .last_error
            .set("the worker has ended: the server's log tells why");
    });
}

/// Looks at the board of promotions, or writes on it, under the lock. `None` if there is none.
pub fn with_board<T>(act: impl FnOnce(&mut Board) -> T) -> Option<T> {
    with_lock(pg_sys::LWLockMode::LW_EXCLUSIVE, |shared| {
        // SAFETY: the lock is held exclusively.
        act(unsafe { &mut *shared.board.get() })
    })
}

/// Wakes those who wait for the board to change.
pub fn tell_of_board() {
    if let Some(shared) = shared() {
        // SAFETY: initialised at startup, never moved.
        unsafe { pg_sys::ConditionVariableBroadcast(shared.board_changed.get()) };
    }
}

/// Sleeps until `question` has an answer, which is asked anew when the board has changed, and every
/// `POLL_MS`; or until `timeout` is over. Can be cancelled as any query.
pub fn wait_for_board<T>(
    timeout: std::time::Duration,
    mut question: impl FnMut() -> Option<T>,
) -> Option<T> {
    /// What the question looks at beside the board changes without a word.
    const POLL_MS: i64 = 100;
    let shared = shared()?;
    let started = std::time::Instant::now();
    let changed = shared.board_changed.get();
    // SAFETY: initialised at startup, never moved. Prepared before the first look, so that no
    // broadcast in between is lost; cancelled on every way out, by Postgres on errors.
    unsafe {
        pg_sys::ConditionVariablePrepareToSleep(changed);
        let answer = loop {
            if let Some(answer) = question() {
                break Some(answer);
            }
            if started.elapsed() >= timeout {
                break None;
            }
            pg_sys::ConditionVariableTimedSleep(changed, POLL_MS, pg_sys::PG_WAIT_EXTENSION);
        };
        pg_sys::ConditionVariableCancelSleep();
        answer
    }
}

/// What the worker has published last.
pub fn status() -> Option<Box<Status>> {
    let mut copy = Box::new(Status::EMPTY);
    with_status(pg_sys::LWLockMode::LW_SHARED, |shared| {
        // SAFETY: the lock is held.
        *copy = unsafe { *shared };
    })?;
    Some(copy)
}

fn with_status(mode: pg_sys::LWLockMode::Type, act: impl FnOnce(*mut Status)) -> Option<()> {
    with_lock(mode, |shared| act(shared.status.get()))
}

fn with_lock<T>(
    mode: pg_sys::LWLockMode::Type,
    act: impl FnOnce(&'static Shared) -> T,
) -> Option<T> {
    let shared = shared()?;
    // SAFETY: the tranche was requested with one lock; `act` copies and can't raise an error, and
    // an error would release the lock.
    unsafe {
        let lock = &raw mut (*pg_sys::GetNamedLWLockTranche(NAME.as_ptr())).lock;
        pg_sys::LWLockAcquire(lock, mode);
        let result = act(shared);
        pg_sys::LWLockRelease(lock);
        Some(result)
    }
}

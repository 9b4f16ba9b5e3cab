//! The worker as the synchronous standby: a slot among the server's WAL senders.
//!
//! Commits wait for positions in the slots of `WalSndCtl`, and anyone who owns a slot can release
//! them by raising the positions and calling `SyncRepReleaseWaiters`. So the worker takes a slot,
//! appears in `pg_stat_replication`, and needs no patch. (`walsender_private.h`, `syncrep.c`)
//!
//! There are `max_wal_senders` slots. Two hazards, since Postgres's own routines take it for
//! granted that a WAL sender finds one, and crash the whole server if it doesn't:
//!
//! * ours: we look first, and wait if none is free;
//! * the others': Postgres admits `max_wal_senders` of them, not knowing that we hold one slot. A
//!   hook at the end of authentication refuses the last.
//!
//! The same hook refuses a standby that calls itself `walproposer`: commits would take its
//! acknowledgement for the quorum's.
//!
//! A slot that is left behind would hang the next shutdown, so it is given back on every way out.

use std::ffi::{CStr, c_char, c_int};
use std::sync::atomic::{AtomicUsize, Ordering};

use pgrx::{PgSqlErrorCode, pg_guard, pg_sys};
use safekeeper_protocol::Lsn;

use crate::postgres::{self, ClientAuthentication_hook_type, Port};
use crate::{gate, shmem, stop};

/// The name under which commits wait for us.
pub const APPLICATION_NAME: &CStr = c"walproposer";
const NAME: &str = "walproposer";

/// What the slot shows and commits wait for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Positions {
    pub sent_lsn: Lsn,
    /// On a quorum: stands for written and for flushed.
    pub commit_lsn: Lsn,
    /// Lowest replay position of the standbys behind the safekeepers; invalid if there is none.
    pub apply_lsn: Lsn,
    /// Microseconds from sending to the quorum's acknowledgement, negative if unknown.
    pub lag_us: i64,
}

/// A slot that is ours until the process ends.
pub struct WalSenderSlot {
    slot: *mut pg_sys::WalSnd,
}

impl WalSenderSlot {
    /// Takes a free slot, in state "startup": no commit waits for it yet, and none is released by
    /// it. `None` if all are taken.
    pub fn take() -> Option<WalSenderSlot> {
        // SAFETY: WalSndCtl has max_wal_senders slots. Each is looked at and filled under its lock,
        // and nothing in between can raise an error. MyWalSnd and the callback are set as
        // InitWalSenderSlot would.
        unsafe {
            let slots = (*pg_sys::WalSndCtl).walsnds.as_mut_ptr();
            let count = usize::try_from(pg_sys::max_wal_senders).unwrap_or(0);
            let slot = (0..count)
                .map(|i| slots.add(i))
                .find(|&slot| try_fill(slot))?;
            pg_sys::MyWalSnd = slot;
            pg_sys::on_shmem_exit(Some(give_back), pg_sys::Datum::null());
            Some(WalSenderSlot { slot })
        }
    }

    /// From here on commits wait for our positions.
    pub fn begin_streaming(&self) {
        self.set_state(pg_sys::WalSndState::WALSNDSTATE_STREAMING);
        take_sync_rep_settings();
    }

    /// No reign: nothing is acknowledged until the next.
    pub fn stop_streaming(&self) {
        self.set_state(pg_sys::WalSndState::WALSNDSTATE_CATCHUP);
    }

    fn set_state(&self, state: pg_sys::WalSndState::Type) {
        // SAFETY: our slot, under its lock.
        unsafe {
            pg_sys::SpinLockAcquire(&raw mut (*self.slot).mutex);
            (*self.slot).state = state;
            pg_sys::SpinLockRelease(&raw mut (*self.slot).mutex);
        }
    }

    /// Shows the positions and releases the commits below.
    pub fn advance(&self, positions: &Positions) {
        let now = postgres::timestamp();
        // SAFETY: our slot, under its lock.
        unsafe {
            let slot = self.slot;
            pg_sys::SpinLockAcquire(&raw mut (*slot).mutex);
            (*slot).sentPtr = positions.sent_lsn.0;
            (*slot).write = positions.commit_lsn.0;
            (*slot).flush = positions.commit_lsn.0;
            (*slot).apply = positions.apply_lsn.0;
            (*slot).writeLag = positions.lag_us;
            (*slot).flushLag = positions.lag_us;
            (*slot).applyLag = -1;
            (*slot).replyTime = now;
            pg_sys::SpinLockRelease(&raw mut (*slot).mutex);
            pg_sys::SyncRepReleaseWaiters();
        }
    }

    /// The configuration was read again.
    pub fn on_reload(&self) {
        take_sync_rep_settings();
        // SAFETY: we own a slot.
        unsafe { pg_sys::SyncRepReleaseWaiters() };
    }
}

/// Works out our priority from `synchronous_standby_names`.
fn take_sync_rep_settings() {
    // SAFETY: we own a slot, and application_name is set.
    unsafe { pg_sys::SyncRepInitConfig() };
}

/// Makes the slot ours if it is free.
///
/// # Safety
/// `slot` is one of WalSndCtl's.
unsafe fn try_fill(slot: *mut pg_sys::WalSnd) -> bool {
    // SAFETY: by the caller; fields are touched under the slot's lock only.
    unsafe {
        pg_sys::SpinLockAcquire(&raw mut (*slot).mutex);
        let free = (*slot).pid == 0;
        if free {
            (*slot).pid = pg_sys::MyProcPid;
            (*slot).state = pg_sys::WalSndState::WALSNDSTATE_STARTUP;
            (*slot).sentPtr = 0;
            (*slot).needreload = false;
            (*slot).write = 0;
            (*slot).flush = 0;
            (*slot).apply = 0;
            (*slot).writeLag = -1;
            (*slot).flushLag = -1;
            (*slot).applyLag = -1;
            (*slot).sync_standby_priority = 0;
            (*slot).replyTime = 0;
            set_version_fields(slot);
        }
        pg_sys::SpinLockRelease(&raw mut (*slot).mutex);
        free
    }
}

/// Has the next flush beyond `lsn` wake this process, once. `false` if there was one already, and no
/// reason to sleep.
///
/// From 16 on the server wakes WAL senders not by their slots but by a condition variable, which
/// forgets a sleeper whom it has woken, or who has broadcast to another one.
#[cfg(not(feature = "pg15"))]
pub fn wake_on_flush(lsn: Lsn) -> bool {
    // SAFETY: a variable in shared memory that Postgres initialises before any process starts. What
    // is prepared is undone by the next call, and at the process's end.
    unsafe { pg_sys::ConditionVariablePrepareToSleep(&raw mut (*pg_sys::WalSndCtl).wal_flush_cv) };
    // What was flushed before this was prepared has woken nobody.
    postgres::flushed_lsn() == lsn
}

/// On 15 every flush sets the latch that the slot names.
#[cfg(feature = "pg15")]
pub fn wake_on_flush(lsn: Lsn) -> bool {
    // SAFETY: our own latch.
    name_latch(unsafe { pg_sys::MyLatch }) || postgres::flushed_lsn() == lsn
}

/// Does a commit wait for a standby's replay?
pub fn somebody_waits_for_replay() -> bool {
    // SAFETY: a structure in shared memory. Looked at without its lock: who joins meanwhile could as
    // well have come later.
    unsafe {
        let queues = &raw const (*pg_sys::WalSndCtl).SyncRepQueue;
        let queue = queues.cast::<Queue>().add(REPLAY_QUEUE);
        let next = next_in(queue);
        !next.is_null() && next != head_of(queue)
    }
}

/// `SYNC_REP_WAIT_APPLY` in `syncrep.h`.
const REPLAY_QUEUE: usize = 2;

#[cfg(feature = "pg15")]
type Queue = pg_sys::SHM_QUEUE;
#[cfg(not(feature = "pg15"))]
type Queue = pg_sys::dlist_head;

/// # Safety
/// `queue` is alive.
#[cfg(feature = "pg15")]
unsafe fn next_in(queue: *const Queue) -> *const Queue {
    // SAFETY: by the caller; changed by others with one store.
    unsafe { (&raw const (*queue).next).read_volatile() }
}

#[cfg(feature = "pg15")]
fn head_of(queue: *const Queue) -> *const Queue {
    queue
}

/// # Safety
/// `queue` is alive.
#[cfg(not(feature = "pg15"))]
unsafe fn next_in(queue: *const Queue) -> *const pg_sys::dlist_node {
    // SAFETY: by the caller; changed by others with one store.
    unsafe { (&raw const (*queue).head.next).read_volatile() }
}

#[cfg(not(feature = "pg15"))]
fn head_of(queue: *const Queue) -> *const pg_sys::dlist_node {
    // The head of an empty list points to itself; it is the structure's only field.
    queue.cast()
}

/// A flush need not wake this process: something else will.
pub fn sleep_through_flushes() {
    #[cfg(feature = "pg15")]
    name_latch(std::ptr::null_mut());
    // SAFETY: undoes what was prepared, if anything.
    #[cfg(not(feature = "pg15"))]
    unsafe {
        pg_sys::ConditionVariableCancelSleep();
    }
}

/// In our slot. Whether it was there already.
#[cfg(feature = "pg15")]
fn name_latch(latch: *mut pg_sys::Latch) -> bool {
    // SAFETY: our slot, which nobody else writes this field of, and read by others under its lock.
    unsafe {
        let slot = pg_sys::MyWalSnd;
        if slot.is_null() || (*slot).latch == latch {
            return true;
        }
        pg_sys::SpinLockAcquire(&raw mut (*slot).mutex);
        (*slot).latch = latch;
        pg_sys::SpinLockRelease(&raw mut (*slot).mutex);
        false
    }
}

/// Up to 17 a slot points to its process's latch. On 15 the server wakes WAL senders by it.
#[cfg(feature = "pg15")]
unsafe fn set_version_fields(slot: *mut pg_sys::WalSnd) {
    // SAFETY: as in `try_fill`; the latch is our own process's.
    unsafe { (*slot).latch = pg_sys::MyLatch };
}

#[cfg(any(feature = "pg16", feature = "pg17"))]
unsafe fn set_version_fields(slot: *mut pg_sys::WalSnd) {
    // SAFETY: as in `try_fill`; the latch is our own process's.
    unsafe {
        (*slot).latch = pg_sys::MyLatch;
        (*slot).kind = pg_sys::ReplicationKind::REPLICATION_KIND_PHYSICAL;
    }
}

#[cfg(feature = "pg18")]
unsafe fn set_version_fields(slot: *mut pg_sys::WalSnd) {
    // SAFETY: as in `try_fill`.
    unsafe { (*slot).kind = pg_sys::ReplicationKind::REPLICATION_KIND_PHYSICAL };
}

#[pg_guard]
unsafe extern "C-unwind" fn give_back(_code: c_int, _arg: pg_sys::Datum) {
    // SAFETY: our slot, under its lock; MyWalSnd is cleared first so that nothing uses it again.
    unsafe {
        let slot = pg_sys::MyWalSnd;
        if slot.is_null() {
            return;
        }
        pg_sys::MyWalSnd = std::ptr::null_mut();
        pg_sys::SpinLockAcquire(&raw mut (*slot).mutex);
        #[cfg(not(feature = "pg18"))]
        {
            (*slot).latch = std::ptr::null_mut();
        }
        (*slot).pid = 0;
        pg_sys::SpinLockRelease(&raw mut (*slot).mutex);
    }
}

/// Real WAL senders that hold a slot now.
pub fn count_others() -> i32 {
    // SAFETY: as in `take`; a pid that changes while we look makes the count old, no more.
    unsafe {
        let slots = (*pg_sys::WalSndCtl).walsnds.as_mut_ptr();
        let count = usize::try_from(pg_sys::max_wal_senders).unwrap_or(0);
        let taken = |&i: &usize| {
            let pid = (*slots.add(i)).pid;
            pid != 0 && pid != pg_sys::MyProcPid
        };
        i32::try_from((0..count).filter(taken).count()).unwrap_or(i32::MAX)
    }
}

/// The hook that was there before ours; 0 if none.
static PREVIOUS_HOOK: AtomicUsize = AtomicUsize::new(0);

/// Keeps a slot for the worker, and makes one connection the last sender. From `_PG_init` in the postmaster.
pub fn register_hook() {
    // SAFETY: the postmaster is single-threaded while it loads libraries.
    unsafe {
        let previous = postgres::ClientAuthentication_hook;
        PREVIOUS_HOOK.store(previous.map_or(0, |hook| hook as usize), Ordering::Relaxed);
        postgres::ClientAuthentication_hook = Some(on_authentication);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_authentication(port: *mut Port, status: c_int) {
    // SAFETY: a variable of this process, and the port that Postgres hands over.
    unsafe {
        if pg_sys::am_walsender && shmem::is_there() {
            stop::enter_if_invited(port);
        }
    }
    let previous = PREVIOUS_HOOK.load(Ordering::Relaxed);
    // SAFETY: what `register_hook` found, 0 being a null pointer and that None.
    let previous: ClientAuthentication_hook_type = unsafe { std::mem::transmute(previous) };
    if let Some(previous) = previous {
        // SAFETY: called as Postgres would have called it.
        unsafe { previous(port, status) };
    }
    if status != postgres::STATUS_OK || !shmem::is_there() {
        return;
    }
    // SAFETY: variables of this process, and the port that Postgres hands over. A WAL sender with a
    // database can run queries.
    unsafe {
        if !pg_sys::am_walsender || pg_sys::am_db_walsender {
            gate::hold(port);
        }
        if !pg_sys::am_walsender {
            return;
        }
    }
    // SAFETY: Postgres hands over its own port; both texts are null or C strings.
    let impostor = unsafe {
        let text = |text: *const c_char| match text.is_null() {
            true => String::new(),
            false => CStr::from_ptr(text).to_string_lossy().to_lowercase(),
        };
        text((*port).application_name) == NAME
            // Set there it comes into force later than the other. What a role or a session sets
            // after this is met by `commit.rs`.
            || text((*port).cmdline_options).contains("application_name")
    };
    if impostor {
        postgres::fatal(
            PgSqlErrorCode::ERRCODE_RESERVED_NAME,
            "application_name \"walproposer\" is reserved for pushing WAL to the safekeepers, and a WAL sender's \
             application_name cannot be set by options",
            "Connect with another application_name, given as such, or to a safekeeper.",
        );
    }
    // SAFETY: a variable of this process, and a callback that lives as long as the process.
    unsafe {
        if !shmem::add_wal_sender(pg_sys::max_wal_senders - 1) {
            postgres::fatal(
                PgSqlErrorCode::ERRCODE_TOO_MANY_CONNECTIONS,
                "the last WAL sender slot is reserved for pushing WAL to the safekeepers",
                "Raise max_wal_senders.",
            );
        }
        pg_sys::on_shmem_exit(Some(on_wal_sender_exit), pg_sys::Datum::null());
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_wal_sender_exit(_code: c_int, _arg: pg_sys::Datum) {
    shmem::remove_wal_sender();
}

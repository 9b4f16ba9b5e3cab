//! The background worker: one process, whose main thread is the only one that calls Postgres.
//!
//! ```text
//!   take a WAL sender slot ──► turn ──► sleep until: latch (a commit, a flush, a signal),
//!     (wait for a free one)     ▲        a socket, a thread, the next time-out
//!                               └──────────┘
//! ```
//!
//! How it ends:
//!
//! | | |
//! |---|---|
//! | shutdown of the server | goes on while sessions are there, for their commits; then see `stop.rs` |
//! | SIGTERM without a shutdown | at once |
//! | an ERROR, a panic of a thread | at once |
//! | a safekeeper follows a higher term (`pusher/deposed.rs`) | at once |
//! | the postmaster dies | at once |
//!
//! It ends with status 1, whereupon the postmaster starts it again after a second, unless it is
//! shutting down. The new one stands for election again; commits wait meanwhile.

use pgrx::{PgSqlErrorCode, check_for_interrupts, pg_guard, pg_sys};
use std::ffi::{CStr, c_char, c_int};

use crate::early_push::ceil_ms;
use crate::pusher::Pusher;
use crate::settings;
use crate::shmem::{self, Status};
use crate::start::leave_fetch_settings;
use crate::stop::{self, Line, Stopping};
use crate::threads::{WakeReceiver, Waker, waker};
use crate::wait_set::WaitSet;
use crate::wal_sender_slot::{self, APPLICATION_NAME, WalSenderSlot};
use crate::{postgres, promoter};

const NAME: &CStr = c"walproposer";
const ENTRY: &CStr = c"walproposer_main";

/// An ended worker is started again after so many seconds: the least Postgres knows.
const RESTART_SECONDS: i32 = 1;
/// While waiting for a WAL sender slot, and at shutdown for sessions: neither wakes us.
const POLL_MS: u64 = 50;

/// From `_PG_init` in the postmaster.
pub fn register() {
    let when_recovered = pg_sys::BgWorkerStartTime::BgWorkerStart_RecoveryFinished;
    register_process(NAME, ENTRY, when_recovered);
    // Of use on a standby only; elsewhere it ends at once.
    let when_consistent = pg_sys::BgWorkerStartTime::BgWorkerStart_ConsistentState;
    register_process(promoter::NAME, promoter::ENTRY, when_consistent);
}

fn register_process(name: &CStr, entry: &CStr, start: pg_sys::BgWorkerStartTime::Type) {
    let mut worker = pg_sys::BackgroundWorker {
        bgw_flags: (pg_sys::BGWORKER_SHMEM_ACCESS | pg_sys::BGWORKER_BACKEND_DATABASE_CONNECTION)
            as i32,
        bgw_start_time: start,
        bgw_restart_time: RESTART_SECONDS,
        ..Default::default()
    };
    copy_name(&mut worker.bgw_name, name);
    copy_name(&mut worker.bgw_type, name);
    copy_name(&mut worker.bgw_library_name, NAME);
    copy_name(&mut worker.bgw_function_name, entry);
    // SAFETY: Postgres copies the structure.
    unsafe { pg_sys::RegisterBackgroundWorker(&mut worker) };
}

/// The rest of `field` stays zero.
fn copy_name(field: &mut [c_char], name: &CStr) {
    for (to, from) in field.iter_mut().zip(name.to_bytes()) {
        *to = from.cast_signed();
    }
}

/// Entry of the worker's process.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn walproposer_main(_arg: pg_sys::Datum) {
    prepare_process();
    // SAFETY: a callback that lives as long as the process.
    unsafe { pg_sys::before_shmem_exit(Some(on_exit), pg_sys::Datum::null()) };
    let settings = settings::settings();
    let Some(wal_sender) = take_wal_sender_slot() else {
        end();
    };
    let (waker, wake_receiver) = new_waker();
    promoter::await_end();
    let mut wait_set = WaitSet::new(wake_receiver);
    let mut line = Line::new(waker.clone());
    let mut pusher = Pusher::new(&settings, Some(wal_sender), waker);
    let mut stopping: Option<Stopping> = None;
    let hints = shmem::commit_hints().filter(|_| pusher.has_buffers());
    loop {
        // Before looking at anything: what happens from here on wakes us.
        reset_latch();
        hints.inspect(|hints| hints.listen_from(0));
        let flushed_lsn = postgres::flushed_lsn();
        check_for_interrupts!();
        if postgres::reload_if_asked() {
            pusher.on_reload();
            leave_fetch_settings(&settings::settings());
        }
        pusher.turn(wait_set.ready());
        if stop::is_requested() {
            let stopping = stopping.get_or_insert_with(|| Stopping::begin(&mut pusher));
            if stopping.may_end(&pusher) {
                stopping.hand_over(&mut pusher);
                end();
            }
        }
        let wants_last_sender = stopping.is_none() && pusher.is_leading();
        line.turn(wants_last_sender);
        let limit = if stopping.is_some() {
            POLL_MS
        } else {
            line.idle_ms(wants_last_sender)
        };
        // First, lest it ends between the two: without one there may be a look to take.
        let pause = pusher.pause();
        let timeout_ms = pusher.idle_ms().min(limit);
        let timeout_ms = if let Some(pause) = pause {
            wal_sender_slot::sleep_through_flushes();
            hints.inspect(|hints| hints.listen_from(pause.hints));
            match shmem::latest_hint().count < pause.hints {
                true => timeout_ms.min(ceil_ms(pause.time)),
                false => 0,
            }
        } else if wal_sender_slot::wake_on_flush(flushed_lsn) && !pusher.has_work() {
            timeout_ms
        } else {
            0
        };
        wait_set.wait(pusher.sockets(), timeout_ms);
    }
}

/// The views must not go on telling of a reign that nobody exercises.
#[pg_guard]
unsafe extern "C-unwind" fn on_exit(_code: c_int, _arg: pg_sys::Datum) {
    if let Some(hints) = shmem::commit_hints() {
        hints.ignore();
    }
    shmem::publish_stopped();
    stop::leave();
}

/// For threads to wake a main loop by.
pub fn new_waker() -> (Waker, WakeReceiver) {
    waker().unwrap_or_else(|error| {
        postgres::error(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES,
            format!("could not create a socket pair: {error}"),
            "",
        )
    })
}

pub fn prepare_process() {
    stop::catch_request();
    // SAFETY: the first calls of a background worker, in the order Postgres expects. The handler
    // is Postgres's own: it sets a flag and the latch. Without a database, so that the worker
    // is listed in pg_stat_replication and holds no database up.
    unsafe {
        postgres::pqsignal(libc::SIGHUP, postgres::SignalHandlerForConfigReload);
        pg_sys::BackgroundWorkerUnblockSignals();
        pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0);
        // Commits wait for the standby of this name.
        pg_sys::SetConfigOption(
            c"application_name".as_ptr(),
            APPLICATION_NAME.as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
        );
    }
}

/// Waits for a free slot, and says so; `None` if told to stop.
fn take_wal_sender_slot() -> Option<WalSenderSlot> {
    let mut said_so = false;
    loop {
        if let Some(slot) = WalSenderSlot::take() {
            return Some(slot);
        }
        if stop::is_requested() {
            return None;
        }
        if !said_so {
            said_so = true;
            let reason = "all WAL sender slots are taken: waiting for one, and so do commits";
            postgres::warning(reason, "Raise max_wal_senders, or disconnect a standby.");
            let mut status = Box::new(Status::EMPTY);
            status.state.set("waiting");
            status.last_error.set(reason);
            shmem::publish(&status);
        }
        sleep(POLL_MS);
        check_for_interrupts!();
    }
}

fn sleep(ms: u64) {
    // SAFETY: our own latch.
    unsafe {
        let events = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
        let ms = i64::try_from(ms).unwrap_or(i64::MAX);
        pg_sys::WaitLatch(
            pg_sys::MyLatch,
            events as i32,
            ms,
            pg_sys::PG_WAIT_EXTENSION,
        );
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
}

pub fn reset_latch() {
    // SAFETY: our own latch.
    unsafe { pg_sys::ResetLatch(pg_sys::MyLatch) };
}

/// Status 0, so that the postmaster does not start it again.
pub fn end_for_good() -> ! {
    postgres::exit(0)
}

/// Status 1, so that the postmaster starts it again.
pub fn end() -> ! {
    postgres::exit(1)
}

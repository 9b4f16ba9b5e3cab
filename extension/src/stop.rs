//! How the server stops: sessions get their answers, and the shutdown checkpoint is on the quorum,
//! so that this server can follow the next primary as it is.
//!
//! ```text
//!   postmaster   SIGTERM to sessions, worker ─────► shutdown checkpoint ─────► SIGUSR2 ─────► end
//!   worker       answers commits until no session is left, hands its term over, ends
//!   last sender  asleep since the worker leads ..................................: takes the term,
//!                                                       sends the rest, waits for the quorum, ends
//! ```
//!
//! The worker can't send the last record: background workers end before it is written. WAL senders
//! end after it. So the worker keeps a *last sender*: a WAL sender's process that the postmaster
//! has forked for a connection over the local socket, and that runs our code from the moment it is
//! recognised (`stop/last_sender.rs`, `stop/line.rs`).
//!
//! | who is missing | then |
//! |---|---|
//! | the quorum | sessions that wait are ended after `shutdown_timeout`; so is the last sender's wait; it says which WAL the quorum has. The next start pushes the rest |
//! | the last sender (no local socket, `reject` in pg_hba.conf) | said when it is noticed, and at the stop |
//! | the worker (it has just failed) | the last sender ends the waits in its place |
//! | the reign | said; there is no term to send in |
//!
//! A term is handed over in shared memory, to one process, by one that does not use it any more
//! (S7). The last sender takes it only when the postmaster has told it that the checkpoint is
//! written: no worker is started after that.

mod last_sender;
mod line;
mod shared;
mod waits;

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pgrx::pg_sys;

pub use self::last_sender::enter_if_invited;
pub use self::line::Line;
pub use self::shared::StopShared;
use crate::pusher::Pusher;
use crate::wal_sender_slot::count_others;
use crate::{postgres, settings, shmem};

/// Once their wait is ended, sessions end by themselves; the worker looks on for so long at most.
const LOOK_ON: Duration = Duration::from_secs(5);

static REQUESTED: AtomicBool = AtomicBool::new(false);
static BY_POSTMASTER: AtomicBool = AtomicBool::new(false);

/// SIGTERM is a request to stop: see [`is_requested`] and [`server_is_stopping`].
pub fn catch_request() {
    // SAFETY: all zeroes are a valid value; the handler has the form that SA_SIGINFO asks for.
    unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = on_request as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        libc::sigaction(libc::SIGTERM, &action, std::ptr::null_mut());
    }
}

extern "C" fn on_request(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel hands over who has sent the signal; a variable that never changes here;
    // our own latch; errno is what it was when the handler returns.
    unsafe {
        let errno = *libc::__errno_location();
        if (*info).si_pid() == pg_sys::PostmasterPid {
            BY_POSTMASTER.store(true, Ordering::Relaxed);
        }
        REQUESTED.store(true, Ordering::Relaxed);
        postgres::SetLatch(pg_sys::MyLatch);
        *libc::__errno_location() = errno;
    }
}

/// This worker, or the promoter, is to end.
pub fn is_requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

/// The postmaster has asked for it: it does so when the server stops and sessions are told to end,
/// and starts no worker again. Whoever else sends SIGTERM wants this worker to end and no more.
pub fn server_is_stopping() -> bool {
    BY_POSTMASTER.load(Ordering::Relaxed)
}

/// A stop, as the worker goes through it.
pub struct Stopping {
    since: Instant,
}

impl Stopping {
    /// The slot may be wanted by whoever sent the signal: a server that invalidates slots does so.
    pub fn begin(pusher: &mut Pusher) -> Stopping {
        pusher.release_slot();
        Stopping {
            since: Instant::now(),
        }
    }

    /// Sessions' commits want their answer, and sessions end when they have it.
    pub fn may_end(&self, pusher: &Pusher) -> bool {
        if !server_is_stopping() || !sessions_are_left() {
            return true;
        }
        let patience = match pusher.is_deposed() {
            // There is nothing to wait for.
            true => Duration::ZERO,
            false => settings::shutdown_timeout(),
        };
        let elapsed = self.since.elapsed();
        if elapsed < patience {
            return false;
        }
        waits::end_all();
        elapsed >= patience + LOOK_ON
    }

    /// The last thing the worker does: whoever sends the rest goes on in its term.
    pub fn hand_over(&self, pusher: &mut Pusher) {
        let Some(stop) = shmem::stop().filter(|_| server_is_stopping()) else {
            return;
        };
        stop.set_lingered(self.since.elapsed());
        // Nobody answers commits from here on. Who comes late (SQL on a replication connection, which
        // ends after us) is refused while it can still be undone.
        stop.set_waits_ended();
        if !stop.has_sender() {
            return postgres::warning(
                "there is no last sender: the shutdown checkpoint reaches the safekeepers at the next start only",
                "",
            );
        }
        if let Some(won) = pusher.hand_over() {
            shmem::hand_over(&won);
        }
    }
}

/// Besides the worker, WAL senders and the last sender; of WAL senders those whose commit waits.
fn sessions_are_left() -> bool {
    count_sessions() > 1 || !waits::waiting().is_empty()
}

/// Of sessions and workers, this one included.
fn count_sessions() -> i32 {
    // SAFETY: counts under a lock of its own.
    let processes = unsafe { pg_sys::CountDBBackends(pg_sys::InvalidOid) };
    let last_sender = i32::from(shmem::stop().is_some_and(StopShared::has_sender));
    processes - count_others() - last_sender
}

/// At the worker's end, whatever the reason: if the server stops and there is nobody to do it later,
/// sessions must not be left in a wait that nothing can end.
pub fn leave() {
    let Some(stop) = shmem::stop() else {
        return;
    };
    stop.leave_worker();
    if !stop.has_sender() && postgres::lock_file_says_stopping() {
        waits::end_all();
    }
}

/// What is left of `shutdown_timeout` for the last sender. A little if the worker has used it up:
/// that a quorum was missing for a session does not mean that it is missing still.
fn time_left(stop: &StopShared) -> Duration {
    const LEAST: Duration = Duration::from_millis(500);
    let timeout = settings::shutdown_timeout();
    timeout.saturating_sub(stop.lingered()).max(LEAST)
}

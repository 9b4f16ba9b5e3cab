//! Signals that would end a wait for the quorum stay pending until it is over.
//!
//! The server's own wait ends when the query is cancelled or the session terminated: the commit is
//! on the local disk by then and can't be undone, so it becomes visible, and stock Postgres calls
//! it a success. So that it can't be interrupted, these are blocked from before the commit record is
//! written until the quorum has it:
//!
//! | signal | what it means | while blocked |
//! |---|---|---|
//! | SIGINT | cancel, `statement_timeout`, `lock_timeout` | stays pending, takes effect afterwards |
//! | SIGTERM | `pg_terminate_backend`, a fast stop | likewise |
//! | SIGUSR2 | ours, see `stop/waits.rs`: there will be no quorum | ends the wait, and then the session |
//!
//! SIGUSR2 is handled for that long only; one that is not ours goes to the handler that was there.
//!
//! A library may have started threads in this process (numpy in PL/Python does), on which they are
//! not blocked. There a handler of ours keeps them, and raises them again when the wait is over.
//!
//! SIGALRM is not blocked: the time-outs whose handlers do not send one of these to the process
//! itself set flags that nobody looks at in the wait. SIGQUIT (an immediate stop) is obeyed at once.
//!
//! An ERROR on the way to the commit record leaves without a word to us. `AbortTransaction` and
//! `AbortSubTransaction` unblock all signals by themselves; what remains of us then, the handlers, goes
//! when the transaction ends.

use std::cell::Cell;
use std::ffi::c_int;
use std::sync::atomic::{AtomicUsize, Ordering};

use pgrx::pg_sys;

use super::mask::{self, DEFERRED, action, set_action};
use crate::stop::StopShared;
use crate::{postgres, shmem};

/// Ends a wait. Ordinary sessions ignore it, and WAL senders get it from the postmaster only when
/// no session is left.
pub const END_WAIT: c_int = libc::SIGUSR2;

/// What there was before.
#[derive(Clone, Copy)]
struct Before {
    mask: libc::sigset_t,
    deferred: [libc::sigaction; DEFERRED.len()],
    end_wait: libc::sigaction,
}

std::thread_local! {
    static BEFORE: Cell<Option<Before>> = const { Cell::new(None) };
}

/// What handled [`END_WAIT`] before; 0 if nothing did. For whatever thread it comes on.
static END_WAIT_BEFORE: AtomicUsize = AtomicUsize::new(0);

/// Until [`release`], or until Postgres aborts the transaction.
pub fn defer() {
    let mask = mask::change(libc::SIG_BLOCK, DEFERRED);
    if BEFORE.get().is_none() {
        let deferred = DEFERRED.map(|signal| set_action(signal, &action(mask::keep)));
        let end_wait = set_action(END_WAIT, &action(on_end_wait));
        END_WAIT_BEFORE.store(end_wait.sa_sigaction, Ordering::Relaxed);
        BEFORE.set(Some(Before {
            mask,
            deferred,
            end_wait,
        }));
    }
}

/// What came meanwhile takes effect: the handlers run before this returns.
pub fn release() {
    let Some(before) = BEFORE.take() else {
        return;
    };
    for (signal, action) in DEFERRED.iter().zip(&before.deferred) {
        set_action(*signal, action);
    }
    set_action(END_WAIT, &before.end_wait);
    // SAFETY: a set that sigprocmask filled.
    let was_blocked = |signal: c_int| unsafe { libc::sigismember(&before.mask, signal) == 1 };
    let ours = DEFERRED.into_iter().filter(|&signal| !was_blocked(signal));
    mask::change(libc::SIG_UNBLOCK, ours);
    mask::raise_kept();
}

/// As Postgres's own handler of SIGTERM: the wait is given up, and then the session. Only what a
/// signal handler may do.
extern "C" fn on_end_wait(signal: c_int) {
    if !shmem::stop().is_some_and(StopShared::waits_have_ended) {
        return pass_on(signal);
    }
    // SAFETY: flags of this process that are made to be set by handlers; its own latch; errno is
    // what it was when the handler returns.
    unsafe {
        let errno = *libc::__errno_location();
        postgres::request_death();
        postgres::SetLatch(pg_sys::MyLatch);
        *libc::__errno_location() = errno;
    }
}

/// A background worker may have a use of its own for the signal.
fn pass_on(signal: c_int) {
    let handler = END_WAIT_BEFORE.load(Ordering::Relaxed);
    if handler != libc::SIG_IGN && handler != libc::SIG_DFL {
        // SAFETY: what was registered as a handler, by Postgres's `pqsignal`, which knows this one
        // form; called as the kernel would have called it.
        unsafe { std::mem::transmute::<usize, extern "C" fn(c_int)>(handler)(signal) };
    }
}

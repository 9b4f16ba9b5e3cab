//! Who waits for the quorum, and the end of such waits when the server stops without one.
//!
//! A session that waits can't be interrupted (`commit/signals.rs`), and the server does not stop
//! while it is there. When `shutdown_timeout` is over its wait is ended by a signal of its own: it
//! gets no answer, and ends. Its transaction is committed on the local disk and can't be undone; it
//! is visible from then on to whoever is still connected, which at a fast stop is nobody but
//! sessions that have not yet come to look at their own termination.

use pgrx::pg_sys;

use crate::commit::END_WAIT;
use crate::stop::StopShared;
use crate::{postgres, shmem};

/// Processes in the server's own wait for a synchronous standby, which is us.
pub fn waiting() -> Vec<i32> {
    // SAFETY: the process slots stay; a field that changes while we look makes the list old, no
    // more.
    unsafe {
        let procs = (*pg_sys::ProcGlobal).allProcs;
        let count = (*pg_sys::ProcGlobal).allProcCount as usize;
        let waiting = (0..count).map(|i| procs.add(i)).filter(|&proc| {
            let state = (&raw const (*proc).syncRepState).read_volatile();
            u32::try_from(state) == Ok(pg_sys::SYNC_REP_WAITING)
        });
        let pids = waiting.map(|proc| (&raw const (*proc).pid).read_volatile());
        pids.filter(|&pid| pid != 0).collect()
    }
}

/// Ends all waits that there are, and those that begin until the next call.
pub fn end_all() {
    let pids = waiting();
    let n = pids.len();
    if shmem::stop().is_some_and(StopShared::set_waits_ended) && n > 0 {
        postgres::warning(
            format!(
                "the server is stopping without the safekeepers' quorum: {n} commits are not waited for any longer"
            ),
            "They are not acknowledged. The next start waits for the quorum before it shows them.",
        );
    }
    for pid in pids {
        // SAFETY: a process that waits, and has the handler; if it has just ended its wait, it
        // ignores the signal.
        unsafe { libc::kill(pid, END_WAIT) };
    }
}

//! A deposed primary that only reads: `walproposer.on_deposed = read_only`.
//!
//! The worker raises a flag in shared memory when another primary was elected. From then on every
//! statement, in every session, runs as in a read-only transaction, whatever the session has set:
//! a write is an ERROR at once, with the words and the SQLSTATE that clients know. What had written
//! before is refused when it wants to commit. That is a kindness, not a guarantee: nothing would
//! have been acknowledged anyway; but an application hears that it must go elsewhere.
//!
//! Commits that were waiting for the quorum go on waiting, invisible: nobody can tell what became
//! of them. What is not the work of a session (checkpoints, autovacuum, hint bits) goes on and
//! writes WAL that nobody else will ever have: this data directory diverges, and needs pg_rewind.
//! To stop these too would be to stop the server, which is what `shutdown` does.
//!
//! The flag lives as long as shared memory: it outlives the worker, and a crash-restart clears it,
//! when the start is asked again whether it may lead.

use std::sync::atomic::{AtomicUsize, Ordering};

use pgrx::{PgSqlErrorCode, pg_sys};

use crate::{postgres, shmem};

/// What the executor hook had in it before ours; 0 if nothing.
static PREVIOUS_HOOK: AtomicUsize = AtomicUsize::new(0);

/// From `_PG_init` in the postmaster; children inherit it. Utility commands come to
/// [`enforce`] by `commit.rs`, whose hook sees them all.
pub fn register() {
    // SAFETY: the postmaster is single-threaded while it loads libraries, which stay.
    unsafe {
        let previous = pg_sys::ExecutorStart_hook;
        PREVIOUS_HOOK.store(previous.map_or(0, |hook| hook as usize), Ordering::Relaxed);
        pg_sys::ExecutorStart_hook = Some(on_executor_start);
    }
}

/// The refusal itself is an ERROR of `run`: it passes through this frame untouched, which is why
/// nothing here is guarded by pgrx, can panic, or needs dropping.
unsafe extern "C-unwind" fn on_executor_start(query: *mut pg_sys::QueryDesc, flags: i32) {
    enforce();
    // SAFETY: `PREVIOUS_HOOK` is what `register` found, 0 being None; called as we were called.
    unsafe {
        let previous: pg_sys::ExecutorStart_hook_type =
            std::mem::transmute(PREVIOUS_HOOK.load(Ordering::Relaxed));
        previous.unwrap_or(postgres::standard_ExecutorStart)(query, flags);
    }
}

/// Before each statement: a new transaction, `SET TRANSACTION READ WRITE` and the end of a
/// savepoint have all set the variable to what the session wants.
pub fn enforce() {
    if shmem::is_read_only() {
        // SAFETY: a variable of this process, which statements look at when they begin. Not set as
        // a setting: that could fail, and the end of the transaction would have to undo it.
        unsafe { pg_sys::XactReadOnly = true };
    }
}

/// Before the commit of a transaction that has written WAL, or anything else that would wait for
/// the quorum: an ERROR, while it can still be undone.
pub fn refuse_commit() {
    if shmem::is_read_only() {
        postgres::error(
            PgSqlErrorCode::ERRCODE_READ_ONLY_SQL_TRANSACTION,
            "cannot commit: another primary has been elected, and this server is read-only",
            "Connect to the present primary.",
        );
    }
}

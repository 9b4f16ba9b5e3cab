//! What happens in a committing backend.
//!
//! * Before the commit: `synchronous_commit` is raised to `walproposer.min_synchronous_commit` if
//!   the transaction has written WAL, whatever the session, the role or `SET LOCAL` say.
//! * The same for COMMIT PREPARED and ROLLBACK PREPARED. They are commands, and have no transaction
//!   of their own that could be looked at when it commits; so they are caught as commands.
//! * After it: if the quorum does not have the commit, then its wait was cancelled (by
//!   `pg_cancel_backend`, a time-out, or the end of the connection). Stock Postgres reports success
//!   with a warning then. It can't be told to the client any better from here, but it is counted
//!   (`pg_stat_walproposer.waits_cancelled`) and logged.
//!
//! Autovacuum commits without waiting, as it does with any synchronous standby: nobody is told of
//! its commits, and without a quorum it is needed most.

use std::cell::Cell;
use std::ffi::{c_char, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

use pgrx::pg_sys::{BackendType, SyncCommitLevel, TransactionStmtKind, XactEvent};
use pgrx::{pg_guard, pg_sys};
use safekeeper_protocol::Lsn;

use crate::{postgres, settings, shmem};

/// From `_PG_init` in the postmaster; children inherit it.
pub fn register() {
    // SAFETY: the callbacks live as long as the library, which is never unloaded; the postmaster
    // is single-threaded while it loads libraries.
    unsafe {
        pg_sys::RegisterXactCallback(Some(on_transaction_event), std::ptr::null_mut());
        let previous = pg_sys::ProcessUtility_hook;
        PREVIOUS_HOOK.store(previous.map_or(0, |hook| hook as usize), Ordering::Relaxed);
        pg_sys::ProcessUtility_hook = Some(on_command);
    }
}

/// The hook that was there before ours; 0 if none.
static PREVIOUS_HOOK: AtomicUsize = AtomicUsize::new(0);

#[pg_guard]
#[expect(clippy::too_many_arguments, reason = "the hook's signature")]
unsafe extern "C-unwind" fn on_command(
    statement: *mut pg_sys::PlannedStmt,
    text: *const c_char,
    read_only_tree: bool,
    context: pg_sys::ProcessUtilityContext::Type,
    params: pg_sys::ParamListInfo,
    environment: *mut pg_sys::QueryEnvironment,
    destination: *mut pg_sys::DestReceiver,
    completion: *mut pg_sys::QueryCompletion,
) {
    // SAFETY: Postgres hands over a statement that is alive while the hook runs.
    if unsafe { ends_prepared_transaction(statement) } {
        raise_synchronous_commit();
    }
    let previous = PREVIOUS_HOOK.load(Ordering::Relaxed);
    // SAFETY: what `register` found, 0 being None; called with what we were called with.
    unsafe {
        let previous: pg_sys::ProcessUtility_hook_type = std::mem::transmute(previous);
        match previous {
            Some(previous) => previous(
                statement,
                text,
                read_only_tree,
                context,
                params,
                environment,
                destination,
                completion,
            ),
            None => pg_sys::standard_ProcessUtility(
                statement,
                text,
                read_only_tree,
                context,
                params,
                environment,
                destination,
                completion,
            ),
        }
    }
}

/// # Safety
/// `statement` is that of a utility command.
unsafe fn ends_prepared_transaction(statement: *mut pg_sys::PlannedStmt) -> bool {
    // SAFETY: every node begins with its tag, and a tag tells the node's type.
    unsafe {
        let command = (*statement).utilityStmt;
        if command.is_null() || (*command).type_ != pg_sys::NodeTag::T_TransactionStmt {
            return false;
        }
        let kind = (*command.cast::<pg_sys::TransactionStmt>()).kind;
        kind == TransactionStmtKind::TRANS_STMT_COMMIT_PREPARED
            || kind == TransactionStmtKind::TRANS_STMT_ROLLBACK_PREPARED
    }
}

std::thread_local! {
    /// The transaction that is committing has written WAL and waits for the quorum.
    static AWAITS_QUORUM: Cell<bool> = const { Cell::new(false) };
}

#[pg_guard]
unsafe extern "C-unwind" fn on_transaction_event(event: XactEvent::Type, _arg: *mut c_void) {
    match event {
        XactEvent::XACT_EVENT_PRE_COMMIT | XactEvent::XACT_EVENT_PRE_PREPARE => before_commit(),
        XactEvent::XACT_EVENT_COMMIT if AWAITS_QUORUM.replace(false) => after_commit(),
        XactEvent::XACT_EVENT_ABORT | XactEvent::XACT_EVENT_PREPARE => AWAITS_QUORUM.set(false),
        _ => {}
    }
}

fn before_commit() {
    // SAFETY: variables of this process, and a function that looks at the transaction's state.
    let (has_xid, is_session) = unsafe {
        let xid = pg_sys::GetTopTransactionIdIfAny();
        let kind = pg_sys::MyBackendType;
        let session = kind == BackendType::B_BACKEND || kind == BackendType::B_BG_WORKER;
        (xid != pg_sys::InvalidTransactionId, session)
    };
    if !has_xid || !is_session {
        return;
    }
    raise_synchronous_commit();
    // SAFETY: a variable of this process.
    let current = unsafe { pg_sys::synchronous_commit };
    AWAITS_QUORUM.set(current >= SyncCommitLevel::SYNCHRONOUS_COMMIT_REMOTE_WRITE as i32);
}

/// To the least allowed, until the transaction ends.
fn raise_synchronous_commit() {
    let (level, name) = settings::min_synchronous_commit().level();
    // SAFETY: a variable of this process.
    if unsafe { pg_sys::synchronous_commit } < level as i32 {
        // SAFETY: the value is one of the setting's own; LOCAL ends with this transaction. Set as
        // a setting and not as a variable, because the wait's mode is derived from it.
        unsafe {
            pg_sys::set_config_option(
                c"synchronous_commit".as_ptr(),
                name.as_ptr(),
                pg_sys::GucContext::PGC_SUSET,
                pg_sys::GucSource::PGC_S_SESSION,
                pg_sys::GucAction::GUC_ACTION_LOCAL,
                true,
                0,
                false,
            );
        }
    }
}

fn after_commit() {
    // SAFETY: a variable of this process, the end of the commit record just written.
    let commit_end = Lsn(unsafe { pg_sys::XactLastCommitEnd });
    if shmem::commit_lsn() < commit_end {
        shmem::count_cancelled_wait();
        postgres::log(format!(
            "wait for the safekeepers' quorum was cancelled: the transaction that ends at {commit_end} is \
             committed here, and may be lost if this server is"
        ));
    }
}

//! What happens in a committing backend.
//!
//! * Before the commit: `synchronous_commit` is raised to `walproposer.min_synchronous_commit` if
//!   the transaction has written WAL, whatever the session, the role or `SET LOCAL` say.
//! * The same for COMMIT PREPARED and ROLLBACK PREPARED. They are commands, and have no transaction
//!   of their own that could be looked at when it commits; so they are caught as commands.
//! * After it, before the client hears of it: the quorum must have it. Normally the server's own
//!   wait has seen to that. If it was released by somebody else (a standby that managed to call
//!   itself `walproposer`) or cancelled (`pg_cancel_backend`, a time-out), the acknowledgement is
//!   held here. The transaction is committed locally, and visible, by then: it can neither fail
//!   nor be undone. A second cancel, or the end of the session, ends this wait too; then it is
//!   counted (`pg_stat_walproposer.waits_cancelled`), logged, and the client is warned.
//!
//! On a deposed primary that only reads, the first two are refused (`read_only.rs`).
//!
//! Autovacuum commits without waiting, as it does with any synchronous standby: nobody is told of
//! its commits, and without a quorum it is needed most.

use std::cell::Cell;
use std::ffi::{c_char, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

use pgrx::pg_sys::{BackendType, SyncCommitLevel, TransactionStmtKind, XactEvent};
use pgrx::{pg_guard, pg_sys};
use safekeeper_protocol::Lsn;

use crate::{postgres, read_only, settings, shmem};

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

/// Runs a utility command, as stock Postgres would: an ERROR in it must pass through this frame
/// untouched. So neither it nor what it calls on that way is guarded by pgrx, which would catch
/// the ERROR and raise another one in its place; and it holds nothing that would need dropping.
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
    // SAFETY: Postgres hands over a statement that is alive while the hook runs; `PREVIOUS_HOOK`
    // is what `register` found, 0 being None; it is called with what we were called with.
    unsafe {
        let ends_prepared = before_command(statement);
        let previous: pg_sys::ProcessUtility_hook_type =
            std::mem::transmute(PREVIOUS_HOOK.load(Ordering::Relaxed));
        let run = previous.unwrap_or(postgres::standard_ProcessUtility);
        run(
            statement,
            text,
            read_only_tree,
            context,
            params,
            environment,
            destination,
            completion,
        );
        if ends_prepared {
            after_prepared_end();
        }
    }
}

/// Whether the command ends a prepared transaction; if so, it will wait for the quorum.
#[pg_guard]
unsafe extern "C-unwind" fn before_command(statement: *mut pg_sys::PlannedStmt) -> bool {
    // SAFETY: as the caller's.
    let ends_prepared = unsafe { ends_prepared_transaction(statement) };
    read_only::enforce();
    if ends_prepared {
        read_only::refuse_commit();
        raise_synchronous_commit();
    }
    ends_prepared
}

#[pg_guard]
unsafe extern "C-unwind" fn after_prepared_end() {
    if waits_for_quorum() {
        // SAFETY: a variable of this process, the end of the last record it wrote.
        hold_acknowledgement(Lsn(unsafe { pg_sys::XactLastRecEnd }));
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
        XactEvent::XACT_EVENT_COMMIT if AWAITS_QUORUM.replace(false) => {
            // SAFETY: a variable of this process, the end of the commit record just written.
            hold_acknowledgement(Lsn(unsafe { pg_sys::XactLastCommitEnd }));
        }
        XactEvent::XACT_EVENT_PREPARE if AWAITS_QUORUM.replace(false) => {
            // SAFETY: likewise, of the record that prepares.
            hold_acknowledgement(Lsn(unsafe { pg_sys::XactLastRecEnd }));
        }
        XactEvent::XACT_EVENT_ABORT => AWAITS_QUORUM.set(false),
        _ => {}
    }
}

fn before_commit() {
    // SAFETY: variables of this process, and a function that looks at the transaction's state.
    let (has_xid, wrote_wal, is_session) = unsafe {
        let xid = pg_sys::GetTopTransactionIdIfAny();
        let kind = pg_sys::MyBackendType;
        let internal =
            kind == BackendType::B_AUTOVAC_WORKER || kind == BackendType::B_AUTOVAC_LAUNCHER;
        let wrote_wal = pg_sys::XactLastRecEnd != 0;
        (xid != pg_sys::InvalidTransactionId, wrote_wal, !internal)
    };
    if !has_xid || !is_session {
        return;
    }
    if wrote_wal {
        read_only::refuse_commit();
    }
    raise_synchronous_commit();
    // One that wrote to temporary or unlogged tables only does not wait.
    AWAITS_QUORUM.set(wrote_wal && waits_for_quorum());
}

fn waits_for_quorum() -> bool {
    // SAFETY: a variable of this process.
    let current = unsafe { pg_sys::synchronous_commit };
    current >= SyncCommitLevel::SYNCHRONOUS_COMMIT_REMOTE_WRITE as i32
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

/// Until the quorum has the WAL below `end_lsn`, or the session is told to stop waiting.
fn hold_acknowledgement(end_lsn: Lsn) {
    while !shmem::await_commit_for(end_lsn, LOOK_AT_CANCEL_MS) {
        // SAFETY: flags that signal handlers of this process set, and where its answers go. The
        // interrupts are looked at as `SyncRepWaitForLSN` does: what is committed can't be undone.
        let ends = unsafe {
            if pg_sys::ProcDiePending != 0 {
                pg_sys::whereToSendOutput = pg_sys::CommandDest::DestNone;
            }
            let cancelled = pg_sys::QueryCancelPending != 0;
            pg_sys::QueryCancelPending = 0;
            cancelled || pg_sys::ProcDiePending != 0
        };
        if ends {
            shmem::count_cancelled_wait();
            postgres::warning(
                format!(
                    "canceling wait for the safekeepers' quorum: the transaction that ends at {end_lsn} is \
                     committed here, and may be lost if this server is"
                ),
                "",
            );
            return;
        }
    }
}

/// A cancel is noticed within this time.
const LOOK_AT_CANCEL_MS: u64 = 100;

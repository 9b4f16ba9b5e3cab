//! What happens in a committing backend.
//!
//! * Before the commit: `synchronous_commit` is raised to `walproposer.min_synchronous_commit` if
//!   the transaction has written WAL, whatever the session, the role or `SET LOCAL` say.
//! * From there until the quorum has the commit, whatever would end the wait for it is put off
//!   (`commit/signals.rs`): a cancel, a time-out, the session's termination. One that came before
//!   is obeyed here, where the transaction can still be undone.
//! * The worker is told that a commit record follows, so that it can push it while it is being
//!   flushed here (`early_push.rs`).
//! * The same for COMMIT PREPARED and ROLLBACK PREPARED. They are commands, and have no transaction
//!   of their own that could be looked at when it commits; so they are caught as commands.
//! * After it, before the client hears of it: the quorum must have it. Normally the server's own
//!   wait has seen to that. If somebody else has released it (a standby that managed to call itself
//!   `walproposer`), the acknowledgement is held here.
//!
//! A wait ends without the quorum in one way only that leaves the server in order: the server stops,
//! and `walproposer.shutdown_timeout` is over (`stop/waits.rs`). Then it is counted
//! (`pg_stat_walproposer.waits_cancelled`), logged, and the client gets no answer.
//!
//! On a deposed primary that only reads, commits that have written, and the commands for prepared
//! transactions, are refused (`read_only.rs`).
//!
//! Autovacuum commits without waiting, as it does with any synchronous standby: nobody is told of
//! its commits, and without a quorum it is needed most.

mod mask;
mod signals;

use std::cell::Cell;
use std::ffi::{c_char, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use pgrx::pg_sys::{BackendType, SyncCommitLevel, TransactionStmtKind, XactEvent};
use pgrx::{PgSqlErrorCode, check_for_interrupts, pg_guard, pg_sys};
use safekeeper_protocol::Lsn;

pub use self::signals::END_WAIT;
use crate::early_push::SOON;
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
        before_wait(true);
    }
    ends_prepared
}

/// Signals stay deferred until the command's own transaction has ended, which follows at once: one
/// that took effect in between would tell the client of a failure.
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
    /// It is a session's, and had no number when it began to commit.
    static LACKED_NUMBER: Cell<bool> = const { Cell::new(false) };
    /// How often the worker has been told that its commit record follows.
    static ANNOUNCED: Cell<u64> = const { Cell::new(0) };
    /// When the last one that was announced was over.
    static ENDED_AT: Cell<Option<Instant>> = const { Cell::new(None) };
}

#[pg_guard]
unsafe extern "C-unwind" fn on_transaction_event(event: XactEvent::Type, _arg: *mut c_void) {
    match event {
        XactEvent::XACT_EVENT_PRE_COMMIT => before_commit(false),
        XactEvent::XACT_EVENT_PRE_PREPARE => before_commit(true),
        XactEvent::XACT_EVENT_COMMIT => {
            // Without a number it was no commit, whatever WAL reading has left: nobody waits for that.
            // One that has got its number since has written behind our back: in the callback of a
            // library that was loaded before this one.
            let is_late = LACKED_NUMBER.replace(false) && must_wait_for_quorum();
            if (AWAITS_QUORUM.replace(false) || is_late) && has_transaction_id() {
                // SAFETY: a variable of this process, the end of the commit record just written.
                hold_acknowledgement(Lsn(unsafe { pg_sys::XactLastCommitEnd }));
            }
            transaction_over();
        }
        XactEvent::XACT_EVENT_PREPARE => {
            if AWAITS_QUORUM.replace(false) {
                // The end is forgotten by now. Commits lie at ends of records: what is beyond the
                // beginning of this one is not before its end.
                // SAFETY: a variable of this process, the beginning of the last record.
                hold_acknowledgement(Lsn(unsafe { pg_sys::ProcLastRecPtr } + 1));
            }
            transaction_over();
        }
        XactEvent::XACT_EVENT_ABORT => {
            AWAITS_QUORUM.set(false);
            LACKED_NUMBER.set(false);
            transaction_over();
        }
        _ => {}
    }
}

/// The transaction is over: the worker learns that it is, and what was put off comes.
fn transaction_over() {
    let announced = ANNOUNCED.replace(0);
    if announced > 0
        && let Some(hints) = shmem::commit_hints()
    {
        hints.end(announced);
        ENDED_AT.set(Some(Instant::now()));
    }
    signals::release();
}

/// One that is prepared gets its number, and writes, when this is over, whatever it has done.
fn before_commit(is_prepare: bool) {
    AWAITS_QUORUM.set(false);
    let wrote_wal = is_prepare || wrote_wal();
    // SAFETY: a variable of this process.
    let kind = unsafe { pg_sys::MyBackendType };
    let internal = kind == BackendType::B_AUTOVAC_WORKER || kind == BackendType::B_AUTOVAC_LAUNCHER;
    let has_number = has_transaction_id();
    LACKED_NUMBER.set(!internal && !has_number);
    // One that has written WAL without a number (it pruned a page) may be given one yet, by NOTIFY.
    if (has_number || wrote_wal) && !internal {
        let is_commit = is_prepare || has_number && wrote_wal;
        if is_commit {
            read_only::refuse_commit();
        }
        let waits = before_wait(is_commit);
        // One that wrote to temporary or unlogged tables only does not wait.
        AWAITS_QUORUM.set(wrote_wal && waits);
    }
}

fn wrote_wal() -> bool {
    // SAFETY: a variable of this process.
    unsafe { pg_sys::XactLastRecEnd != 0 }
}

fn has_transaction_id() -> bool {
    // SAFETY: looks at the transaction's state.
    unsafe { pg_sys::GetTopTransactionIdIfAny() != pg_sys::InvalidTransactionId }
}

/// Whether a wait follows. From here until the transaction ends nothing interrupts it. `is_commit`: it
/// can still be refused, and would wait in vain.
fn before_wait(is_commit: bool) -> bool {
    raise_synchronous_commit();
    if !waits_for_quorum() {
        return false;
    }
    if is_commit && shmem::stop().is_some_and(|stop| stop.waits_have_ended()) {
        postgres::error(
            PgSqlErrorCode::ERRCODE_ADMIN_SHUTDOWN,
            "the server is stopping, and the safekeepers' quorum cannot be reached for this commit",
            "",
        );
    }
    signals::defer();
    // After this nothing is pending.
    check_for_interrupts!();
    if is_commit
        && settings::read_wal_buffers()
        && let Some(hints) = shmem::commit_hints()
        && hints.give(ENDED_AT.get().is_some_and(|at| at.elapsed() < SOON))
    {
        ANNOUNCED.set(ANNOUNCED.get() + 1);
    }
    true
}

fn waits_for_quorum() -> bool {
    // SAFETY: a variable of this process.
    let current = unsafe { pg_sys::synchronous_commit };
    current >= SyncCommitLevel::SYNCHRONOUS_COMMIT_REMOTE_WRITE as i32
}

/// Whatever the session says, or by what it says.
fn must_wait_for_quorum() -> bool {
    let (least, _) = settings::min_synchronous_commit().level();
    least >= SyncCommitLevel::SYNCHRONOUS_COMMIT_REMOTE_WRITE || waits_for_quorum()
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

/// Until the quorum has the WAL below `end_lsn`, or will not have it: then the session ends, and the
/// client does not learn what became of its transaction.
fn hold_acknowledgement(end_lsn: Lsn) {
    while shmem::commit_lsn() < end_lsn {
        let ended = shmem::stop().is_some_and(|stop| stop.waits_have_ended());
        // SAFETY: a flag of this process, set by `signals.rs`, or when the postmaster is dead.
        if ended || unsafe { pg_sys::ProcDiePending } != 0 {
            return give_up(end_lsn);
        }
        shmem::await_commit_for(end_lsn, LOOK_MS);
    }
}

fn give_up(end_lsn: Lsn) {
    // SAFETY: variables of this process: where its answers go, and what it looks at next.
    unsafe {
        pg_sys::whereToSendOutput = pg_sys::CommandDest::DestNone;
        postgres::request_death();
    }
    shmem::count_cancelled_wait();
    postgres::warning(
        format!(
            "gave up waiting for the safekeepers' quorum: the transaction that ends at {end_lsn} is committed \
             here, and may be lost if this server is"
        ),
        "",
    );
}

/// The end of a wait that the server's own has let go is noticed within this time.
const LOOK_MS: u64 = 100;

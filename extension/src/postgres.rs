//! Postgres as the rest of the extension sees it: what pgrx does not declare, and safe names for
//! the calls that every module makes.
//!
//! All of this is for the main thread of a backend or worker only; pgrx panics elsewhere. A
//! function of Postgres that raises an ERROR comes back as a panic, which ends the worker.
//!
//! Differences between major versions are kept here and in `wal_sender_slot.rs` and `slot.rs`.

use std::ffi::{CStr, CString, OsStr, c_char, c_int};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use pgrx::PgSqlErrorCode;
use pgrx::pg_sys;
use pgrx::pg_sys::elog::PgLogLevel;
use pgrx::pg_sys::panic::ErrorReport;

use safekeeper_protocol::Lsn;
use safekeeper_wal::SegNo;

/// Called after authentication was decided, before the client hears of it. (`libpq/auth.h`)
#[expect(non_camel_case_types, reason = "Postgres's own name")]
pub type ClientAuthentication_hook_type =
    Option<unsafe extern "C-unwind" fn(port: *mut Port, status: c_int)>;

unsafe extern "C-unwind" {
    pub static mut ClientAuthentication_hook: ClientAuthentication_hook_type;

    /// Reports what fails in the log, and raises nothing. (`xlogarchive.h`)
    fn XLogArchiveNotify(xlog: *const c_char);
    /// `storage/pmsignal.h`.
    pub fn MarkPostmasterChildWalSender();
    pub fn SendPostmasterSignal(reason: c_int);
    /// `utils/timeout.h`.
    pub fn disable_all_timeouts(keep_indicators: bool);

    // pgrx wraps these; here the bare functions are needed: in signal handlers, and the last two so
    // that an ERROR in a command or a query passes as it is.
    pub fn SetLatch(latch: *mut pg_sys::Latch);
    pub fn SignalHandlerForConfigReload(signal: c_int);
    pub fn standard_ProcessUtility(
        statement: *mut pg_sys::PlannedStmt,
        text: *const c_char,
        read_only_tree: bool,
        context: pg_sys::ProcessUtilityContext::Type,
        params: pg_sys::ParamListInfo,
        environment: *mut pg_sys::QueryEnvironment,
        destination: *mut pg_sys::DestReceiver,
        completion: *mut pg_sys::QueryCompletion,
    );
    pub fn standard_ExecutorStart(query: *mut pg_sys::QueryDesc, flags: c_int);
}

/// The fields of a client's connection up to the last one that we look at. (`libpq/libpq-be.h`)
#[repr(C)]
pub struct Port {
    sock: c_int,
    noblock: bool,
    proto: u32,
    laddr: pg_sys::SockAddr,
    raddr: pg_sys::SockAddr,
    remote_host: *mut c_char,
    remote_hostname: *mut c_char,
    remote_hostname_resolv: c_int,
    remote_hostname_errcode: c_int,
    remote_port: *mut c_char,
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    can_accept_connections: c_int,
    #[cfg(feature = "pg18")]
    local_host: [c_char; 64],
    database_name: *mut c_char,
    pub user_name: *mut c_char,
    /// Of the startup packet's `options`; null if it had none.
    pub cmdline_options: *mut c_char,
    guc_options: *mut pg_sys::List,
    /// As in the startup packet; null if it had none.
    pub application_name: *mut c_char,
}

impl Port {
    pub fn socket(&self) -> c_int {
        self.sock
    }

    /// The client came over a Unix-domain socket.
    pub fn is_local_socket(&self) -> bool {
        i32::from(self.raddr.addr.ss_family) == libc::AF_UNIX
    }
}

/// `PMSIGNAL_ADVANCE_STATE_MACHINE` of `storage/pmsignal.h`.
#[cfg(not(feature = "pg18"))]
pub const ADVANCE_STATE_MACHINE: c_int = 7;
#[cfg(feature = "pg18")]
pub const ADVANCE_STATE_MACHINE: c_int = 8;

/// Sets a signal handler, with the flags that Postgres's own have. 18 has renamed the function.
///
/// # Safety
/// `handler` does only what a signal handler may do.
pub unsafe fn pqsignal(signal: c_int, handler: unsafe extern "C-unwind" fn(c_int)) {
    // SAFETY: by the caller.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        pg_sys::pqsignal(signal, Some(handler));
        #[cfg(feature = "pg18")]
        pg_sys::pqsignal_be(signal, Some(handler));
    }
}

/// Ends this process: runs Postgres's exit callbacks, which give back what we hold.
pub fn exit(code: c_int) -> ! {
    // SAFETY: outside a callback of that kind.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        pg_sys::proc_exit(code);
        // It does not return there either, but its declaration does not say so to pgrx.
        #[cfg(feature = "pg18")]
        {
            pg_sys::proc_exit(code);
            std::process::abort()
        }
    }
}

/// As after SIGTERM: the session ends when it next looks. May be called by a signal handler.
///
/// # Safety
/// In a backend or worker.
pub unsafe fn request_death() {
    // SAFETY: flags of this process, of a type that handlers may set.
    unsafe {
        pg_sys::ProcDiePending = 1;
        pg_sys::InterruptPending = 1;
    }
}

/// `STATUS_OK` of `c.h`.
pub const STATUS_OK: c_int = 0;

/// One line in the server's log, at level LOG.
pub fn log(text: impl Into<String>) {
    report(
        PgLogLevel::LOG,
        PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION,
        text.into(),
        "",
    );
}

pub fn warning(text: impl Into<String>, hint: &str) {
    report(
        PgLogLevel::WARNING,
        PgSqlErrorCode::ERRCODE_WARNING,
        text.into(),
        hint,
    );
}

/// Ends this process, and the server if it is the postmaster.
pub fn fatal(code: PgSqlErrorCode, text: impl Into<String>, hint: &str) -> ! {
    report(PgLogLevel::FATAL, code, text.into(), hint);
    unreachable!("FATAL does not return")
}

/// The same, with the reason as DETAIL.
pub fn fatal_because(code: PgSqlErrorCode, text: impl Into<String>, reason: &str) -> ! {
    let report = ErrorReport::new(code, text.into(), "walproposer").set_detail(reason);
    report.report(PgLogLevel::FATAL);
    unreachable!("FATAL does not return")
}

/// Ends the command, or the worker, which the postmaster starts again.
pub fn error(code: PgSqlErrorCode, text: impl Into<String>, hint: &str) -> ! {
    report(PgLogLevel::ERROR, code, text.into(), hint);
    unreachable!("ERROR does not return")
}

fn report(level: PgLogLevel, code: PgSqlErrorCode, text: String, hint: &str) {
    let report = ErrorReport::new(code, text, "walproposer");
    if hint.is_empty() {
        report.report(level);
    } else {
        report.set_hint(hint).report(level);
    }
}

/// Stops the server as `pg_ctl stop -m immediate` does: sessions end where they are, nothing more
/// is written. The postmaster does it when the signal reaches it, not before this returns.
pub fn stop_server_immediately() {
    // SAFETY: no memory is involved; the number is that of our parent, which can't be another
    // process's while we run, since we die with it.
    unsafe { libc::kill(pg_sys::PostmasterPid, libc::SIGQUIT) };
}

/// End of the WAL that is flushed here.
pub fn flushed_lsn() -> Lsn {
    // SAFETY: a null pointer says that the timeline is not wanted.
    Lsn(unsafe { pg_sys::GetFlushRecPtr(std::ptr::null_mut()) })
}

/// End of the WAL that is written to files here, whether or not it is flushed.
pub fn written_lsn() -> Lsn {
    // SAFETY: reads shared memory that every process is attached to.
    Lsn(unsafe { pg_sys::GetXLogWriteRecPtr() })
}

/// Where recovery would begin now, or, if a checkpoint is on its way, soon.
pub fn redo_lsn() -> Lsn {
    // SAFETY: reads shared memory that every process is attached to.
    Lsn(unsafe { pg_sys::GetRedoRecPtr() })
}

/// Where the next record will begin: behind a page header, if the last one filled its page.
pub fn insert_lsn() -> Lsn {
    // SAFETY: reads shared memory that every process is attached to.
    Lsn(unsafe { pg_sys::GetXLogInsertRecPtr() })
}

/// Waits until the WAL up to `lsn`, which must have been inserted, is flushed.
pub fn flush_wal(lsn: Lsn) {
    // SAFETY: no critical section and no lock of ours is open.
    unsafe { pg_sys::XLogFlush(lsn.0) }
}

/// Has this server not ended recovery yet? A standby never has.
pub fn in_recovery() -> bool {
    // SAFETY: reads shared memory that every process is attached to.
    unsafe { pg_sys::RecoveryInProgress() }
}

/// A place in the WAL of a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub lsn: Lsn,
    pub tli: u32,
}

/// End of the last record that recovery has replayed.
pub fn replayed() -> Position {
    let mut tli = 0;
    // SAFETY: reads shared memory; the pointer is valid.
    let lsn = Lsn(unsafe { pg_sys::GetXLogReplayRecPtr(&mut tli) });
    Position { lsn, tli }
}

/// End of the WAL that a standby has received and flushed since it last connected; 0/0 if none.
pub fn received() -> Position {
    let mut tli = 0;
    // SAFETY: reads shared memory; a null pointer says that the chunk's start is not wanted.
    let lsn = Lsn(unsafe { pg_sys::GetWalRcvFlushRecPtr(std::ptr::null_mut(), &mut tli) });
    Position { lsn, tli }
}

/// Has somebody paused replay?
pub fn replay_is_paused() -> bool {
    // SAFETY: reads shared memory under its spinlock.
    unsafe { pg_sys::GetRecoveryPauseState() != pg_sys::RecoveryPauseState::RECOVERY_NOT_PAUSED }
}

/// Ends recovery, as `pg_promote` does: by a file that the startup process looks for when the
/// postmaster tells it to.
pub fn end_recovery() -> std::io::Result<()> {
    std::fs::write(data_directory().join("promote"), "")?;
    // SAFETY: the postmaster's number is set in every child; SIGUSR1 makes it look for the file.
    match unsafe { libc::kill(pg_sys::PostmasterPid, libc::SIGUSR1) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Asks the process that receives WAL to end; whether there is none. Another one is started after
/// `wal_retrieve_retry_interval`.
pub fn end_receiver() -> bool {
    // SAFETY: a structure in shared memory; the number is read under its lock.
    let pid = unsafe {
        let receiver = pg_sys::WalRcv;
        pg_sys::SpinLockAcquire(&raw mut (*receiver).mutex);
        let pid = (*receiver).pid;
        pg_sys::SpinLockRelease(&raw mut (*receiver).mutex);
        pid
    };
    if pid != 0 {
        // SAFETY: a process of this server's, or one that has just ended.
        unsafe { libc::kill(pid, libc::SIGTERM) };
    }
    pid == 0
}

/// Has replay cancelled this session, because it could see what is to be removed?
pub fn is_cancelled_by_replay() -> bool {
    // SAFETY: our own structure, which startup sets the flag in before it signals us.
    unsafe { !pg_sys::MyProc.is_null() && (*pg_sys::MyProc).recoveryConflictPending }
}

/// Replay may remove what this statement could see: it reads nothing any more. Outside a transaction
/// block only, where a later statement could.
pub fn give_snapshot_up() {
    // SAFETY: looks at the transaction's state; our own structure, whose field others only read.
    // `SnapshotResetXmin` and `GetSnapshotData` take an invalid number for none.
    unsafe {
        if !pg_sys::IsTransactionBlock() {
            (*pg_sys::MyProc).xmin = pg_sys::InvalidTransactionId;
        }
    }
}

/// Is there such a session or worker?
pub fn is_there(pid: i32) -> bool {
    // SAFETY: looks for the process under a lock.
    unsafe { !pg_sys::BackendPidGetProc(pid).is_null() }
}

/// Has the archiver take a file of `pg_wal`, if there is an archiver.
pub fn archive(name: &str) {
    let name = CString::new(name).expect("a file's name");
    // SAFETY: a setting; a C string that is copied.
    unsafe {
        if pg_sys::XLogArchiveMode > pg_sys::ArchiveMode::ARCHIVE_MODE_OFF as i32 {
            XLogArchiveNotify(name.as_ptr());
        }
    }
}

/// Wakes a process of this server from its latch; nothing happens if it is gone.
pub fn wake(pid: i32) {
    // SAFETY: looks for the process under a lock; its structure is never freed, and a latch that
    // another process has by now is woken for nothing.
    unsafe {
        let process = pg_sys::BackendPidGetProc(pid);
        if !process.is_null() {
            pg_sys::SetLatch(&raw mut (*process).procLatch);
        }
    }
}

/// Timeline on which this server writes.
pub fn insertion_tli() -> u32 {
    // SAFETY: reads shared memory; the worker runs after recovery only, as it demands.
    unsafe { pg_sys::GetWALInsertionTimeLine() }
}

/// Number of the last segment that was removed or recycled since the server started, or 0.
pub fn last_removed_segno() -> SegNo {
    // SAFETY: reads shared memory under its spinlock.
    unsafe { pg_sys::XLogGetLastRemovedSegno() }
}

pub fn system_id() -> u64 {
    // SAFETY: reads the control file's copy in shared memory.
    unsafe { pg_sys::GetSystemIdentifier() }
}

/// `wal_segment_size`, in bytes.
pub fn wal_segment_size() -> u32 {
    // SAFETY: set once, before any process of ours starts.
    let size = unsafe { pg_sys::wal_segment_size };
    u32::try_from(size).expect("Postgres keeps it between 1 MB and 1 GB")
}

/// What the control file says of the last run. (`catalog/pg_control.h`)
pub struct ControlFile {
    pub system_id: u64,
    /// Where recovery begins.
    pub redo_lsn: Lsn,
    /// Record of the last checkpoint.
    pub checkpoint_lsn: Lsn,
    /// Timeline on which recovery ends: after a promotion the checkpoint may still be of the old
    /// one. (`InitWalRecovery` in `xlogrecovery.c`)
    pub tli: u32,
    state: pg_sys::DBState::Type,
}

impl ControlFile {
    /// In the postmaster, before recovery.
    pub fn read() -> ControlFile {
        let mut crc_is_right = false;
        // SAFETY: the path is a C string; what comes back is a palloc'd structure, copied at once.
        let control = unsafe {
            let control = pg_sys::get_controlfile(pg_sys::DataDir, &mut crc_is_right);
            let copy = control.read();
            pg_sys::pfree(control.cast());
            copy
        };
        if !crc_is_right {
            fatal(
                PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
                "incorrect checksum in control file",
                "",
            );
        }
        ControlFile {
            system_id: control.system_identifier,
            redo_lsn: Lsn(control.checkPointCopy.redo),
            checkpoint_lsn: Lsn(control.checkPoint),
            tli: control
                .checkPointCopy
                .ThisTimeLineID
                .max(control.minRecoveryPointTLI),
            state: control.state,
        }
    }

    /// Nothing is to be recovered, as far as the control file knows.
    pub fn is_shut_down(&self) -> bool {
        self.state == pg_sys::DBState::DB_SHUTDOWNED
    }

    /// As after a crash: WAL behind the last checkpoint is recovered.
    pub fn set_in_production(&self) {
        let mut found = false;
        // SAFETY: the postmaster is alone; the name and the size are those of Postgres's own copy,
        // which exists by now.
        unsafe {
            let shared: *mut pg_sys::ControlFileData = pg_sys::ShmemInitStruct(
                c"Control File".as_ptr(),
                size_of::<pg_sys::ControlFileData>(),
                &mut found,
            )
            .cast();
            (*shared).state = pg_sys::DBState::DB_IN_PRODUCTION;
            pg_sys::update_controlfile(pg_sys::DataDir, shared, true);
        }
    }
}

/// Now, as Postgres counts: microseconds since 2000.
pub fn timestamp() -> pg_sys::TimestampTz {
    // SAFETY: asks the clock.
    unsafe { pg_sys::GetCurrentTimestamp() }
}

/// 16 bytes that nobody can guess.
pub fn random_u128() -> u128 {
    let mut bytes = [0u8; 16];
    // SAFETY: the pointer is valid for the length given.
    if !unsafe { pg_sys::pg_strong_random(bytes.as_mut_ptr().cast(), bytes.len()) } {
        error(
            PgSqlErrorCode::ERRCODE_INTERNAL_ERROR,
            "could not generate random numbers",
            "",
        );
    }
    u128::from_be_bytes(bytes)
}

/// The value of a setting that may not exist yet, such as one that was read from the
/// configuration file before its owner was loaded.
pub fn setting(name: &CStr) -> Option<String> {
    // SAFETY: missing settings are allowed; the text is copied before anything else happens.
    unsafe {
        let value = pg_sys::GetConfigOption(name.as_ptr(), true, false);
        (!value.is_null()).then(|| CStr::from_ptr(value).to_string_lossy().into_owned())
    }
}

/// Sets a setting for as long as the server runs: not even a reload changes it.
pub fn pin_setting(name: &CStr, value: &str) {
    let value = CString::new(value).expect("values of settings hold no zero byte");
    // SAFETY: both texts end with a zero byte and are copied.
    unsafe {
        pg_sys::SetConfigOption(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_POSTMASTER,
            pg_sys::GucSource::PGC_S_OVERRIDE,
        );
    }
}

/// Names of the settings that are set, but that no library has declared.
#[cfg(feature = "pg15")]
pub fn placeholder_settings() -> Vec<String> {
    // SAFETY: an array of as many pointers to settings, each with a name that ends with a zero
    // byte; Postgres changes it when a setting is declared, which does not happen here.
    unsafe {
        let count = usize::try_from(pg_sys::GetNumConfigOptions()).unwrap_or(0);
        let settings = std::slice::from_raw_parts(pg_sys::get_guc_variables(), count);
        placeholders_among(settings)
    }
}

/// Names of the settings that are set, but that no library has declared.
#[cfg(not(feature = "pg15"))]
pub fn placeholder_settings() -> Vec<String> {
    // SAFETY: a palloc'd array of as many pointers to settings, each with a name that ends with a
    // zero byte.
    unsafe {
        let mut count: c_int = 0;
        let settings = pg_sys::get_guc_variables(&mut count);
        placeholders_among(std::slice::from_raw_parts(
            settings,
            usize::try_from(count).unwrap_or(0),
        ))
    }
}

/// # Safety
/// Each points to a setting.
unsafe fn placeholders_among(settings: &[*mut pg_sys::config_generic]) -> Vec<String> {
    let name = |&setting: &*mut pg_sys::config_generic| {
        // SAFETY: by the caller.
        let (flags, name) = unsafe { ((*setting).flags, CStr::from_ptr((*setting).name)) };
        let placeholder = flags.cast_unsigned() & pg_sys::GUC_CUSTOM_PLACEHOLDER != 0;
        placeholder.then(|| name.to_string_lossy().into_owned())
    };
    settings.iter().filter_map(name).collect()
}

/// Reads the configuration again if a signal has asked for it. Whether it has.
pub fn reload_if_asked() -> bool {
    // SAFETY: a flag that a signal handler of this process sets; outside a transaction, as
    // Postgres's own workers do it.
    unsafe {
        let asked = pg_sys::ConfigReloadPending != 0;
        if asked {
            pg_sys::ConfigReloadPending = 0;
            pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
        }
        asked
    }
}

/// The postmaster writes it there before it signals anybody. A smart stop does so too, long before
/// sessions end. (`miscadmin.h`)
pub fn lock_file_says_stopping() -> bool {
    const STATUS_LINE: usize = 8;
    let lock_file = std::fs::read_to_string(data_directory().join("postmaster.pid"));
    lock_file.is_ok_and(|text| {
        text.lines()
            .nth(STATUS_LINE - 1)
            .is_some_and(|status| status.trim() == "stopping")
    })
}

/// The Unix-domain sockets on which this server listens; one that begins with `@` is no file.
pub fn socket_paths() -> Vec<String> {
    let directories = setting(c"unix_socket_directories").unwrap_or_default();
    // SAFETY: set once at start.
    let port = unsafe { pg_sys::PostPortNumber };
    let directories = directories.split(',').map(|directory| {
        let directory = directory.trim();
        directory.trim_matches('"')
    });
    let directories = directories.filter(|directory| !directory.is_empty());
    directories
        .map(|directory| format!("{directory}/.s.PGSQL.{port}"))
        .collect()
}

/// The data directory, as an absolute path.
pub fn data_directory() -> PathBuf {
    // SAFETY: set once at start, a C string.
    let path = unsafe { CStr::from_ptr(pg_sys::DataDir) };
    PathBuf::from(OsStr::from_bytes(path.to_bytes()))
}

/// Name of the operating system's user, which libpq takes for the role if none is given.
pub fn os_user() -> String {
    // SAFETY: no other thread of this process asks for users; the entry is copied at once.
    unsafe {
        let entry = libc::getpwuid(libc::geteuid());
        if entry.is_null() {
            return "postgres".to_owned();
        }
        CStr::from_ptr((*entry).pw_name)
            .to_string_lossy()
            .into_owned()
    }
}

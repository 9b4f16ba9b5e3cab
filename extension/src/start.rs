//! Before recovery: what the server's start does in the postmaster (design §7.1).
//!
//! A disk may lose what it has said to have flushed, and WAL may one day leave before it says so. Then
//! the safekeepers hold more of this server's own WAL than it does; and they may hold another primary's.
//! Recovery must not begin before that is known. `shmem_startup_hook` is the place: the data
//! directory is locked, no session can connect, the startup process has not been forked; and it is
//! called again when the postmaster restarts its children after a crash.
//!
//! ```text
//!   postmaster    fork ────────────────── wait ─────────────────────► take the term, close the gate
//!                  │                obey stop signals                      ▲
//!   candidate      └─► find the log's end, win a term, compare, complete ──┘ one message on a pipe
//! ```
//!
//! The postmaster must stay single-threaded, and nothing of ours may crash it. So the work is a
//! forked process's, the *candidate* (`start/candidate.rs`): it has threads and connections, calls
//! nothing of Postgres, writes nothing to shared memory, and dies with the postmaster.
//!
//! | the candidate says | then |
//! |---|---|
//! | nothing to recover | no quorum was ever configured: recovery, and first use by the worker |
//! | won | recovery of the log, completed if need be; the worker goes on in the won term |
//! | refused | FATAL: another primary has written, or other bytes; the advice that fits |
//!
//! The won term is handed over in shared memory, for this start only (S7). Sessions are held until
//! the recovered WAL is on the quorum (`gate.rs`).

mod candidate;
mod local_end;
mod message;

use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use pgrx::PgSqlErrorCode;
use safekeeper_protocol::{ClusterIdentity, LocalLog, Lsn, ProposerSettings, Tli};

use self::candidate::Candidate;
use self::local_end::LocalEnd;
use self::message::{FromCandidate, MessageError};
pub use self::message::{decode_won, encode_won};
use crate::local_history::LocalHistory;
use crate::local_log::{
    forget_reigns, load_local_history, load_timelines, store_local_history, unled_from, wal_format,
};
use crate::settings::{self, Settings, settings};
use crate::{fetch_settings, postgres, promoter, shmem};

/// While the candidate works, a stop signal is looked for this often.
const POLL: Duration = Duration::from_millis(100);

/// From `shmem_startup_hook`, when shared memory is laid out.
pub fn before_recovery() {
    // Blocked already on 15; later versions have handlers that only set a flag, which nobody would
    // look at before the server has started.
    let _blocked = StopSignalsBlocked::new();
    let data_dir = postgres::data_directory();
    let system_id = postgres::system_id();
    let settings = settings();
    leave_fetch_settings(&settings);
    promoter::remove_placeholders(&data_dir.join("pg_wal"));
    if is_standby() {
        return become_standby();
    }
    let control = postgres::ControlFile::read();
    let local = load_local_history(&data_dir, system_id);
    refuse_half_a_promotion(&control, &local);
    if settings::start_without_quorum() {
        return start_alone(&control, local);
    }
    let candidate = Candidate::new(job(&settings, &control, local));
    let last_word = match run(candidate) {
        Outcome::Said(last_word) => last_word,
        Outcome::StopWanted => postgres::fatal(
            PgSqlErrorCode::ERRCODE_ADMIN_SHUTDOWN,
            "stopped while waiting for the safekeepers",
            "",
        ),
        Outcome::TimedOut => postgres::fatal(
            PgSqlErrorCode::ERRCODE_CANNOT_CONNECT_NOW,
            "walproposer.start_timeout is over, and the safekeepers have not let this server start",
            "Start the safekeepers; or, at the risk of losing commits, set walproposer.start_without_quorum.",
        ),
    };
    // An administrator may have seen what it waits for, and decided.
    if is_standby() {
        return become_standby();
    }
    match last_word {
        FromCandidate::NothingToRecover => {
            postgres::log("the safekeepers hold no WAL of this cluster yet");
        }
        FromCandidate::Won {
            won,
            completed,
            is_beyond_checkpoint,
        } => {
            if completed > 0 {
                postgres::log(format!(
                    "{completed} bytes of WAL that the local disk had lost were fetched from the safekeepers"
                ));
            }
            // After a clean stop nothing is recovered unless the control file says otherwise; and
            // then WAL behind the shutdown checkpoint would be written over.
            if is_beyond_checkpoint && control.is_shut_down() {
                control.set_in_production();
            }
            postgres::log(format!("the start was elected in term {}", won.term));
            shmem::hand_over(&won);
            shmem::close_gate();
        }
        FromCandidate::Refused { reason, hint } => postgres::fatal(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("this server must not start as a primary: {reason}"),
            &hint,
        ),
        FromCandidate::Failed(reason) => postgres::fatal(
            PgSqlErrorCode::ERRCODE_INTERNAL_ERROR,
            format!("could not find out before recovery whether this server may lead: {reason}"),
            "",
        ),
        FromCandidate::Log(_) => unreachable!("logged while waiting"),
    }
}

/// A server that can't say it to its `restore_command` can run all the same.
pub fn leave_fetch_settings(settings: &Settings) {
    let stored = fetch_settings::store(
        &postgres::data_directory(),
        &settings.safekeepers,
        &settings.cluster_name,
        &user(settings),
        &settings.conninfo,
    );
    if let Err(error) = stored {
        postgres::warning(
            format!("could not write file \"walproposer.toml\": {error}"),
            "A restore_command that uses safekeeper fetch-wal must name the safekeepers with --from.",
        );
    }
}

/// As whom the safekeepers are asked.
fn user(settings: &Settings) -> String {
    let user = settings.conninfo.user.clone();
    user.unwrap_or_else(postgres::os_user)
}

/// Nobody's wish to end recovery outlives the server that it was told. Postgres itself removes the
/// file only when the postmaster starts.
fn become_standby() {
    forget_half_a_promotion();
    forget_reigns();
    let _ = std::fs::remove_file(postgres::data_directory().join("promote"));
    let setting = |name| postgres::setting(name).unwrap_or_default();
    if setting(c"archive_mode") == "always" && setting(c"restore_command").contains("fetch-wal") {
        postgres::warning(
            "archive_mode is \"always\", and restore_command brings segments that are not complete yet",
            "The archive would get them. Archive from the primary, or set archive_mode to \"on\".",
        );
    }
}

/// It died while it was promoted. The history file of the timeline that it was about to begin may be there,
/// and would have it wait for WAL that nobody will ever write.
fn forget_half_a_promotion() {
    let data_dir = postgres::data_directory();
    let local = load_local_history(&data_dir, postgres::system_id());
    let claimed = claimed_tli(&local);
    if claimed > postgres::ControlFile::read().tli {
        let pg_wal = data_dir.join("pg_wal");
        if let Err(error) = promoter::remove_timeline(&pg_wal, claimed) {
            postgres::fatal(
                PgSqlErrorCode::ERRCODE_IO_ERROR,
                format!(
                    "could not remove timeline {claimed}, which was never begun, from pg_wal: {error}"
                ),
                "",
            );
        }
        promoter::remove_placeholders(&pg_wal);
    }
}

/// The timeline of its last reign.
fn claimed_tli(local: &LocalHistory) -> u32 {
    local.history.last().map_or(0, |reign| reign.tli.0)
}

/// When recovery ends, `standby.signal` goes a moment before the new timeline is noted in the control
/// file. A server that died in between would go on writing on the old timeline, in the name of a
/// reign that was won for the new one.
fn refuse_half_a_promotion(control: &postgres::ControlFile, local: &LocalHistory) {
    let claimed = claimed_tli(local);
    if claimed > control.tli {
        postgres::fatal(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!(
                "this server must not start as a primary: it died while it was promoted to timeline {claimed}, and \
                 is on timeline {} still",
                control.tli
            ),
            "Create \"standby.signal\", start this server as a standby, and promote it again.",
        );
    }
}

/// It recovers to no end of its own: another server's WAL, or up to a point in time.
fn is_standby() -> bool {
    let data_dir = postgres::data_directory();
    ["standby.signal", "recovery.signal"]
        .iter()
        .any(|name| data_dir.join(name).exists())
}

/// The loud override. What is written from here on is no quorum's, until one says so.
fn start_alone(control: &postgres::ControlFile, local: LocalHistory) {
    let end = local_end(control);
    let unled_from = local
        .unled_from
        .map_or(end.end_lsn, |lsn| lsn.min(end.end_lsn));
    let unled = LocalHistory {
        unled_from: Some(unled_from),
        ..local
    };
    store_local_history(&unled);
    // An earlier start may have completed the log and not come to say so.
    if control.is_shut_down() && end.end_lsn > end.checkpoint_end_lsn {
        control.set_in_production();
    }
    postgres::warning(
        format!(
            "walproposer.start_without_quorum is on: starting without asking the safekeepers; WAL from {unled_from} \
             on is led by no term, and commits that the safekeepers hold beyond it are not here"
        ),
        "Switch it off again. If the safekeepers hold more, this server can never lead again.",
    );
}

fn local_end(control: &postgres::ControlFile) -> LocalEnd {
    let pg_wal = postgres::data_directory().join("pg_wal");
    let (timelines, _) = load_timelines(&pg_wal, control.tli);
    let found = local_end::find(
        &pg_wal,
        wal_format(),
        timelines,
        control.redo_lsn,
        control.checkpoint_lsn,
    );
    found.unwrap_or_else(|error| {
        postgres::fatal(PgSqlErrorCode::ERRCODE_IO_ERROR, error.to_string(), "")
    })
}

fn job(
    settings: &Settings,
    control: &postgres::ControlFile,
    local: LocalHistory,
) -> candidate::Job {
    let data_dir = postgres::data_directory();
    let pg_wal = data_dir.join("pg_wal");
    let (timelines, timeline_files) = load_timelines(&pg_wal, control.tli);
    let format = wal_format();
    let dial = |address| settings.conninfo.dial(address, postgres::os_user);
    let dials = settings.safekeepers.iter().map(dial);
    candidate::Job {
        log: LocalLog {
            history: local.history.clone(),
            tli: Tli(control.tli),
            end_lsn: Lsn::INVALID,
            unled_from: unled_from(&local, &timelines, format.segment_size),
            timeline_files,
            configuration: local.configuration.clone(),
        },
        settings: ProposerSettings {
            proposer_id: local.proposer_id,
            cluster: ClusterIdentity {
                system_id: control.system_id,
                name: settings.cluster_name.clone(),
                pg_major: format.version.major(),
                segment_size: format.segment_size.bytes(),
            },
            peers: settings.safekeepers.clone(),
            member_timeout_ms: u64::try_from(settings.member_timeout.as_millis())
                .unwrap_or(u64::MAX),
            seed: postgres::random_u128() as u64,
        },
        dials: dials.collect(),
        data_dir,
        format,
        timelines,
        local,
        redo_lsn: control.redo_lsn,
        checkpoint_lsn: control.checkpoint_lsn,
    }
}

/// How waiting for the candidate ended.
enum Outcome {
    Said(FromCandidate),
    StopWanted,
    TimedOut,
}

/// Forks the candidate and waits for its last word. Logs what it says before. The candidate is gone
/// when this returns.
fn run(candidate: Candidate) -> Outcome {
    let (reader, writer) = match pipe() {
        Ok(ends) => ends,
        Err(error) => postgres::fatal(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES,
            format!("could not create a pipe: {error}"),
            "",
        ),
    };
    // SAFETY: asks for our own number.
    let postmaster = unsafe { libc::getpid() };
    // SAFETY: the postmaster has one thread. What the child does is in `candidate.rs`; it leaves
    // by `_exit`, so that no callback of Postgres's is run twice.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => postgres::fatal(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES,
            format!("could not fork: {}", std::io::Error::last_os_error()),
            "",
        ),
        0 => {
            drop(reader);
            candidate.run_and_exit(postmaster, writer)
        }
        _ => drop(writer),
    }
    let child = Child(pid);
    let outcome = listen(reader);
    drop(child);
    outcome
}

fn listen(reader: OwnedFd) -> Outcome {
    let failed = |reason: String| Outcome::Said(FromCandidate::Failed(reason));
    let mut pipe = std::fs::File::from(reader);
    let mut inbox = message::Inbox::default();
    let started = Instant::now();
    let timeout = settings::start_timeout();
    loop {
        match inbox.next() {
            Ok(Some(FromCandidate::Log(text))) => {
                postgres::log(text);
                continue;
            }
            Ok(Some(last)) => return Outcome::Said(last),
            Ok(None) => {}
            Err(MessageError(what)) => return failed(what),
        }
        // Neither is reported from here: FATAL does not return, and the candidate must end first.
        if stop_is_wanted() {
            return Outcome::StopWanted;
        }
        if timeout.is_some_and(|timeout| started.elapsed() >= timeout) {
            return Outcome::TimedOut;
        }
        if is_readable(&pipe, POLL) {
            let mut bytes = [0; 4096];
            match pipe.read(&mut bytes) {
                Ok(0) => return failed("it ended without a word".to_owned()),
                Ok(n) => inbox.push(&bytes[..n]),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return failed(error.to_string()),
            }
        }
    }
}

/// The candidate: killed, and reaped, on every way out.
struct Child(libc::pid_t);

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: our own child, not reaped before.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            while libc::waitpid(self.0, std::ptr::null_mut(), 0) == -1
                && *libc::__errno_location() == libc::EINTR
            {}
        }
    }
}

fn pipe() -> std::io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: an array of two; on success both are descriptors that nobody else owns.
    unsafe {
        if libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok((OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])))
    }
}

fn is_readable(pipe: &std::fs::File, timeout: Duration) -> bool {
    let mut poll = libc::pollfd {
        fd: pipe.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let timeout_ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one descriptor, valid for as long as the call lasts.
    unsafe { libc::poll(&mut poll, 1, timeout_ms) > 0 }
}

const STOP_SIGNALS: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT];

/// Stop signals stay pending while this lives.
struct StopSignalsBlocked(libc::sigset_t);

impl StopSignalsBlocked {
    fn new() -> StopSignalsBlocked {
        let mut stop = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset fills the one set, sigprocmask the other; the numbers are signals'.
        unsafe {
            libc::sigemptyset(stop.as_mut_ptr());
            for signal in STOP_SIGNALS {
                libc::sigaddset(stop.as_mut_ptr(), signal);
            }
            libc::sigprocmask(libc::SIG_BLOCK, stop.as_ptr(), before.as_mut_ptr());
            StopSignalsBlocked(before.assume_init())
        }
    }
}

impl Drop for StopSignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: the mask as it was.
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
    }
}

/// A stop signal is pending.
fn stop_is_wanted() -> bool {
    let mut pending = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigpending fills the set.
    unsafe {
        if libc::sigpending(pending.as_mut_ptr()) != 0 {
            return false;
        }
        let pending = pending.assume_init();
        STOP_SIGNALS
            .iter()
            .any(|&signal| libc::sigismember(&pending, signal) == 1)
    }
}

//! The last sender: a WAL sender's process that sends what is written after the worker's end.
//!
//! The postmaster forks a process for each connection and lets those that call themselves WAL
//! senders live until the shutdown checkpoint is written; then it sends them SIGUSR2 and waits for
//! their end. The worker opens such a connection to its own server (`stop/line.rs`). This process
//! recognises it where Postgres has just decided on its authentication, and never returns there.
//!
//! **So the nonce is a way around authentication**, and all that is given for it is the part below:
//! the process serves no query and reads nothing from its connection. The nonce is 128 random bits
//! in shared memory, good once, offered for a moment, compared in constant time, and taken over a
//! local socket from a process of our own user only. Whoever shows another one is authenticated like
//! anybody.
//!
//! It stays when the worker ends: the next one finds it there, even during a smart stop, when no new
//! connection is let in. It holds no WAL sender slot, only the place among the processes that belongs to one: the worker
//! holds a slot and no such place. It sleeps without a time-out, and costs a process that has
//! touched few pages.

use std::ffi::{CStr, c_int};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pgrx::{check_for_interrupts, pg_guard, pg_sys};
use safekeeper_protocol::Lsn;

use super::line::{GREETING, NAME_PREFIX};
use super::{StopShared, count_sessions, time_left, waits};
use crate::postgres::{self, Port};
use crate::pusher::Pusher;
use crate::settings::settings;
use crate::shmem;
use crate::wait_set::WaitSet;
use crate::worker::{new_waker, reset_latch};

/// How it is called in pg_stat_activity.
const APPLICATION_NAME: &CStr = c"walproposer last sender";

/// What `ps` shows of it.
const PS_TITLE: &CStr = c"waiting for the shutdown";

/// While there is no worker, nobody tells of a stop: it is looked for this often.
const POLL: Duration = Duration::from_millis(250);

/// Once the quorum has everything, members that are about to have it are waited for so long.
const FOR_THE_OTHERS: Duration = Duration::from_secs(1);

/// SIGUSR2: the shutdown checkpoint is written.
static IS_LAST_CYCLE: AtomicBool = AtomicBool::new(false);

/// Does not return if this connection is the one that the worker has asked for.
///
/// # Safety
/// In the process of a WAL sender that is being authenticated: `port` is Postgres's own.
pub unsafe fn enter_if_invited(port: *mut Port) {
    // SAFETY: by the caller; the name is null or a C string.
    let nonce = unsafe {
        let name = (*port).application_name;
        if name.is_null() || !(*port).is_local_socket() {
            return;
        }
        let name = CStr::from_ptr(name).to_bytes();
        let shown = name.strip_prefix(NAME_PREFIX.as_bytes());
        let shown = shown.and_then(|hex| std::str::from_utf8(hex).ok());
        shown.and_then(|hex| u128::from_str_radix(hex, 16).ok())
    };
    // SAFETY: by the caller.
    let socket = unsafe { (*port).socket() };
    if let Some(nonce) = nonce
        && is_of_our_user(socket)
        && let Some(stop) = shmem::stop()
        && stop.redeem(nonce)
    {
        run(stop, socket)
    }
}

fn is_of_our_user(socket: c_int) -> bool {
    let (mut uid, mut gid) = (0, 0);
    // SAFETY: both are valid for writing; the descriptor is open.
    unsafe { pg_sys::getpeereid(socket, &mut uid, &mut gid) == 0 && uid == libc::geteuid() }
}

fn run(stop: &'static StopShared, socket: c_int) -> ! {
    prepare_process();
    if !stop.enter_sender() {
        end();
    }
    greet(socket);
    let mut stopping_since = None;
    loop {
        reset_latch();
        check_for_interrupts!();
        postgres::reload_if_asked();
        if !stop.is_sender() {
            end();
        }
        if IS_LAST_CYCLE.load(Ordering::Relaxed) {
            send_the_rest(stop);
            end();
        }
        if stop.has_worker() {
            stopping_since = None;
            sleep(None);
        } else {
            stand_in(stop, &mut stopping_since);
            sleep(Some(POLL));
        }
    }
}

/// What was begun for the session that the postmaster takes this to be is ended here, as
/// `InitPostgres` does it for a WAL sender: its transaction, which holds back vacuum.
fn prepare_process() {
    // SAFETY: functions of Postgres, called as it would call them for a WAL sender; variables of
    // this process. Nothing is said to the client, which is the worker.
    unsafe {
        pg_sys::whereToSendOutput = pg_sys::CommandDest::DestNone;
        pg_sys::ClientAuthInProgress = false;
        postgres::disable_all_timeouts(false);
        pg_sys::CommitTransactionCommand();
        pg_sys::before_shmem_exit(Some(on_exit), pg_sys::Datum::null());
        postgres::pqsignal(libc::SIGUSR2, on_last_cycle);
        // It is not for the asking: `pg_terminate_backend` of everybody, before a stop, must leave it.
        libc::signal(libc::SIGINT, libc::SIG_IGN);
        libc::signal(libc::SIGTERM, libc::SIG_IGN);
        // From here on the postmaster does not wait for it as it does for sessions.
        postgres::MarkPostmasterChildWalSender();
        postgres::SendPostmasterSignal(postgres::ADVANCE_STATE_MACHINE);
        pg_sys::SetConfigOption(
            c"application_name".as_ptr(),
            APPLICATION_NAME.as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
        );
        show_as_begun();
        #[cfg(feature = "pg15")]
        pg_sys::set_ps_display(PS_TITLE.as_ptr());
        #[cfg(not(feature = "pg15"))]
        pg_sys::set_ps_display_with_len(PS_TITLE.as_ptr(), PS_TITLE.count_bytes());
    }
}

/// In pg_stat_activity, where it has been "starting" so far on 18, and was not at all before.
///
/// # Safety
/// Once, by a session's process.
unsafe fn show_as_begun() {
    // SAFETY: by the caller.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        pg_sys::pgstat_bestart();
        #[cfg(feature = "pg18")]
        pg_sys::pgstat_bestart_final();
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_exit(_code: c_int, _arg: pg_sys::Datum) {
    if let Some(stop) = shmem::stop() {
        stop.leave_sender();
    }
}

unsafe extern "C-unwind" fn on_last_cycle(_signal: c_int) {
    // SAFETY: our own latch; errno is what it was when the handler returns.
    unsafe {
        let errno = *libc::__errno_location();
        IS_LAST_CYCLE.store(true, Ordering::Relaxed);
        postgres::SetLatch(pg_sys::MyLatch);
        *libc::__errno_location() = errno;
    }
}

/// The worker learns that it has a last sender.
fn greet(socket: c_int) {
    // SAFETY: the bytes are valid for the length given. If the worker has gone meanwhile, the next
    // one will say so.
    unsafe {
        let bytes = GREETING.as_ptr().cast();
        libc::send(socket, bytes, GREETING.len(), libc::MSG_NOSIGNAL);
    }
}

/// Without a worker nobody answers commits, nor ends the wait for that.
fn stand_in(stop: &StopShared, stopping_since: &mut Option<Instant>) {
    if !postgres::lock_file_says_stopping() {
        *stopping_since = None;
        return;
    }
    // A smart stop lets the worker be started again after a second, but the postmaster does not wake
    // up for that. A fast one does nothing then.
    // SAFETY: signals the postmaster to look around.
    unsafe { postgres::SendPostmasterSignal(postgres::ADVANCE_STATE_MACHINE) };
    const FOR_ANOTHER_WORKER: Duration = Duration::from_secs(5);
    let since = stopping_since.get_or_insert_with(Instant::now);
    // In a smart stop sessions may stay, and would see what is not on the quorum. In a fast one those
    // that do not wait are gone by now.
    let waiting = i32::try_from(waits::waiting().len()).unwrap_or(i32::MAX);
    let is_late = since.elapsed() >= time_left(stop).max(FOR_ANOTHER_WORKER);
    if is_late && count_sessions() <= waiting {
        waits::end_all();
    }
}

/// Sends the WAL up to its end, which is the shutdown checkpoint's, and says what came of it.
fn send_the_rest(stop: &StopShared) {
    let end_lsn = postgres::flushed_lsn();
    match send_up_to(end_lsn, time_left(stop)) {
        Ok(()) => postgres::log(format!(
            "the shutdown checkpoint, which ends at {end_lsn}, is on the safekeepers' quorum"
        )),
        Err(NotSent { commit_lsn, reason }) => postgres::warning(
            format!(
                "the shutdown checkpoint, which ends at {end_lsn}, is not on the safekeepers' quorum, which has the \
                 WAL up to {commit_lsn}: {reason}"
            ),
            "The next start of this server pushes the rest. If another one takes over before, this one may need \
             pg_rewind.",
        ),
    }
}

struct NotSent {
    commit_lsn: Lsn,
    reason: &'static str,
}

fn send_up_to(end_lsn: Lsn, time: Duration) -> Result<(), NotSent> {
    let (waker, wake_receiver) = new_waker();
    let mut pusher = Pusher::new(&settings(), None, waker);
    let mut wait_set = WaitSet::new(wake_receiver);
    let mut deadline = Instant::now() + time;
    let mut is_committed = false;
    loop {
        reset_latch();
        check_for_interrupts!();
        let not_sent = |reason| NotSent {
            commit_lsn: shmem::commit_lsn(),
            reason,
        };
        if !pusher.is_leading() {
            return Err(not_sent("this server does not lead"));
        }
        pusher.turn(wait_set.ready());
        let now = Instant::now();
        if !is_committed && pusher.commit_lsn() >= end_lsn {
            is_committed = true;
            deadline = deadline.min(now + FOR_THE_OTHERS);
        }
        if is_committed && (!pusher.is_awaiting(end_lsn) || now >= deadline) {
            pusher.say_goodbye();
            return Ok(());
        }
        if now >= deadline {
            return Err(not_sent("walproposer.shutdown_timeout is over"));
        }
        let rest = u64::try_from((deadline - now).as_millis()).unwrap_or(u64::MAX) + 1;
        wait_set.wait(pusher.sockets(), pusher.idle_ms().min(rest));
    }
}

fn sleep(time: Option<Duration>) {
    let timeout = time.map_or(0, |_| pg_sys::WL_TIMEOUT);
    let events = pg_sys::WL_LATCH_SET | pg_sys::WL_EXIT_ON_PM_DEATH | timeout;
    let ms = time.map_or(-1, |time| {
        i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
    });
    // SAFETY: our own latch.
    unsafe {
        pg_sys::WaitLatch(
            pg_sys::MyLatch,
            events as i32,
            ms,
            pg_sys::PG_WAIT_EXTENSION,
        );
    }
}

fn end() -> ! {
    // SAFETY: outside a transaction. The exit callbacks want statistics to be reported before.
    unsafe { pg_sys::pgstat_report_stat(true) };
    postgres::exit(0)
}

//! Promoting a standby through the quorum: what a session asks, and how it is answered.
//!
//! ```text
//!   session    walproposer_promote(60) ──► board: asked ──► promoter (promoter.rs)
//!              waits                   ◄── board: answered ◄──┘
//! ```
//!
//! The *board* is a few fields in shared memory. One request at a time; it is the promoter's from
//! the moment it is asked until it is answered. Up to the moment when Postgres is told to end
//! recovery, a request that is withdrawn, whose session is gone, or that has taken too long is given
//! up: the term it has won stays an empty reign, and whoever led before may lead again.
//!
//! The session holds a snapshot, and what is replayed may remove rows that it could see: then replay,
//! which the session waits for, would wait for the session. So while it waits it gives its snapshot
//! up; in a transaction block, where more may be read with it, it does not, and may be cancelled by
//! replay. That is nobody's wish, and withdraws nothing.

use std::time::{Duration, Instant};

use pgrx::prelude::*;

use crate::postgres;
use crate::shmem::{self, Text};

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Wanted {
    /// Everything, and the end of recovery with it.
    Promotion,
    /// Everything up to the end of recovery, which somebody else will see to.
    Preparation,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Answer {
    /// Recovery has ended in the won term; or it may be ended now.
    Done,
    /// It must not be promoted, now or later.
    Refused,
    /// It could not be done in time.
    GivenUp,
}

/// Of sessions and the promoter, in shared memory.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Board {
    /// 0 if none runs.
    promoter_pid: i32,
    /// Requests so far, and the number of the last one that was answered or withdrawn.
    asked: u64,
    answered: u64,
    withdrawn: u64,
    /// Whose end withdraws the request; 0: nobody's.
    asker_pid: i32,
    /// Postgres has been told to end recovery.
    is_ending: bool,
    wanted: Wanted,
    /// How long it may take.
    wait_ms: u64,
    answer: Answer,
    reason: Text<512>,
}

/// A request that has no answer yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub number: u64,
    pub wanted: Wanted,
    pub wait: Duration,
}

impl Board {
    pub const EMPTY: Board = Board {
        promoter_pid: 0,
        asked: 0,
        answered: 0,
        withdrawn: 0,
        asker_pid: 0,
        is_ending: false,
        wanted: Wanted::Promotion,
        wait_ms: 0,
        answer: Answer::Done,
        reason: Text::EMPTY,
    };

    /// The request's number; or why it can't be taken, and a hint.
    fn ask(&mut self, wanted: Wanted, wait: Duration) -> Result<u64, [&'static str; 2]> {
        if self.promoter_pid == 0 {
            return Err([
                "the walproposer's promoter does not run",
                "Try again in a moment. A server that was no standby when it was started must be started again.",
            ]);
        }
        if self.answered < self.asked {
            return Err(["another promotion is under way", "Wait for its end."]);
        }
        self.asked += 1;
        // SAFETY: a variable of this process.
        self.asker_pid = unsafe { pg_sys::MyProcPid };
        self.wanted = wanted;
        self.wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        Ok(self.asked)
    }

    fn answer_to(&self, number: u64) -> Option<(Answer, String)> {
        match self.answered {
            answered if answered < number => None,
            answered if answered == number => Some((self.answer, self.reason.get())),
            _ => Some((Answer::GivenUp, "another one was asked for".to_owned())),
        }
    }
}

// ---- the promoter's side ------------------------------------------------------------------

/// From here on promotions can be asked for, and the worker waits for our end. What another promoter
/// has left open is given up: with it went the term that it had won.
pub fn open_board(pid: i32) {
    shmem::with_board(|board| {
        board.promoter_pid = pid;
        if board.answered < board.asked {
            board.answered = board.asked;
            board.answer = Answer::GivenUp;
            board
                .reason
                .set("the promoter has ended in the middle of it");
        }
    });
    shmem::tell_of_board();
}

/// The promoter's end.
pub fn close_board() {
    shmem::with_board(|board| board.promoter_pid = 0);
    shmem::tell_of_board();
}

pub fn open_request() -> Option<Request> {
    shmem::with_board(|board| {
        (board.answered < board.asked).then_some(Request {
            number: board.asked,
            wanted: board.wanted,
            wait: Duration::from_millis(board.wait_ms),
        })
    })?
}

/// Whoever asked does not wait any more.
pub fn is_withdrawn(request: &Request) -> bool {
    let asked = shmem::with_board(|board| (board.withdrawn >= request.number, board.asker_pid));
    asked.is_none_or(|(withdrawn, pid)| withdrawn || pid != 0 && !postgres::is_there(pid))
}

/// Postgres is about to be told to end recovery: nothing is given up from here on, not even by a
/// promoter that is started again.
pub fn set_ending() {
    shmem::with_board(|board| board.is_ending = true);
}

pub fn is_ending() -> bool {
    shmem::with_board(|board| board.is_ending).unwrap_or(false)
}

pub fn answer(request: &Request, answer: Answer, reason: &str) {
    shmem::with_board(|board| {
        board.answered = request.number;
        board.asker_pid = 0;
        board.answer = answer;
        board.reason.set(reason);
    });
    shmem::tell_of_board();
}

/// Wakes the promoter, to see that recovery is over; whether there is one.
pub fn wake_promoter() -> bool {
    let pid = shmem::with_board(|board| board.promoter_pid).unwrap_or(0);
    if pid != 0 {
        postgres::wake(pid);
    }
    pid != 0
}

// ---- the session's side -------------------------------------------------------------------

/// Withdraws the request, unless it was answered: also when the session is cancelled. If it is
/// replay that has cancelled it, the promotion goes on, and nobody waits for it.
struct Asking(u64);

impl Drop for Asking {
    fn drop(&mut self) {
        if postgres::is_cancelled_by_replay() {
            shmem::with_board(|board| {
                if board.asked == self.0 {
                    board.asker_pid = 0;
                }
            });
            return;
        }
        let pid = shmem::with_board(|board| {
            let is_open = board.answered < self.0;
            is_open.then(|| {
                board.withdrawn = self.0;
                board.promoter_pid
            })
        });
        if let Some(Some(pid)) = pid {
            postgres::wake(pid);
        }
    }
}

/// Makes this standby the primary, by the quorum: the present primary is fenced first, and all that
/// was committed is replayed. True when this server leads; false, with a warning, if that took
/// longer than `wait_seconds`.
#[pg_extern(volatile, strict)]
fn walproposer_promote(wait_seconds: default!(i32, 60)) -> bool {
    let started = Instant::now();
    let wait = checked(wait_seconds);
    if !ask(Wanted::Promotion, wait) {
        return false;
    }
    let rest = wait.saturating_sub(started.elapsed());
    let leads = || {
        let leading = shmem::status().is_some_and(|status| status.state.get() == "leading");
        (leading && !postgres::in_recovery()).then_some(())
    };
    let leading = shmem::wait_for_board(rest, leads).is_some();
    if !leading {
        postgres::warning(
            "this server is promoted, and does not lead yet",
            "See pg_stat_walproposer.",
        );
    }
    leading
}

/// The same up to the end of recovery, which must follow (`pg_promote()`, an HA manager) within
/// `wait_seconds` more. True when it may.
#[pg_extern(volatile, strict)]
fn walproposer_prepare_promotion(wait_seconds: default!(i32, 60)) -> bool {
    ask(Wanted::Preparation, checked(wait_seconds))
}

fn checked(wait_seconds: i32) -> Duration {
    match u64::try_from(wait_seconds) {
        Ok(seconds) if seconds > 0 => Duration::from_secs(seconds),
        _ => postgres::error(
            PgSqlErrorCode::ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE,
            format!("\"wait_seconds\" is {wait_seconds}, and must be positive"),
            "",
        ),
    }
}

/// Whether it was done. An ERROR if it can't be asked for, or must not be done.
fn ask(wanted: Wanted, wait: Duration) -> bool {
    let not_now = |text: &str, hint: &str| -> ! {
        let code = PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        postgres::error(code, text, hint)
    };
    if !shmem::is_there() {
        not_now(
            "walproposer is not active",
            "Add walproposer to shared_preload_libraries, set walproposer.safekeepers, and restart the server.",
        );
    }
    if !postgres::in_recovery() {
        not_now(
            "recovery is not in progress",
            "Only a standby can be promoted.",
        );
    }
    let asked = shmem::with_board(|board| (board.ask(wanted, wait), board.promoter_pid));
    let (number, pid) = match asked {
        Some((Ok(number), pid)) => (number, pid),
        Some((Err([reason, hint]), _)) => not_now(reason, hint),
        None => return false,
    };
    let asking = Asking(number);
    postgres::wake(pid);
    postgres::give_snapshot_up();
    let answer_to = || shmem::with_board(|board| board.answer_to(number))?;
    // The promoter keeps the time, and says why it was not enough; this is for one that died.
    const GRACE: Duration = Duration::from_secs(5);
    let answer = shmem::wait_for_board(wait + GRACE, answer_to);
    drop(asking);
    match answer {
        Some((Answer::Done, _)) => true,
        Some((Answer::Refused, reason)) => {
            not_now(&format!("this standby must not be promoted: {reason}"), "")
        }
        Some((Answer::GivenUp, reason)) => {
            postgres::warning(format!("this standby was not promoted: {reason}"), "");
            false
        }
        None => {
            postgres::warning("this standby was not promoted in time", "");
            false
        }
    }
}

extension_sql_file!(
    "../../sql/promotion.sql",
    name = "promotion",
    requires = [walproposer_promote, walproposer_prepare_promotion]
);

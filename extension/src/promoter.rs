//! The promoter: a standby's background worker, which makes it the primary when asked (design §7.3).
//!
//! ```text
//!            asked                     Replay            Switch              recovery is over
//!   idle ───────────► win a term, bring ───► wait for ────► end recovery ────────────────► hand the
//!    ▲                a majority to its      replay         or let others                  term over,
//!    └── given up: ── start ◄──────────────────┘            end it                         exit
//!        refused, too late, withdrawn
//! ```
//!
//! Winning the term fences the present primary; only then is known where the log ends that must be
//! replayed. Each step is the condition of the next. The promoter exists while the server is in
//! recovery, and sleeps on its latch when nobody asks. When recovery has ended the worker starts,
//! waits for the promoter's end, and goes on in the term that it has handed over; without one, after
//! a promotion by hand, it stands for election.
//!
//! Postgres chooses its new timeline by itself: the one after the newest history file that it finds.
//! Numbers that were taken by promotions that died have no file, so the promoter puts *placeholders*
//! in their place, which name no ancestor and are therefore followed by nobody. Behind the newest
//! real one they must not stay for ever: a standby would take them for the newest timeline when it
//! starts. So they go before the next start. Until then they are kept, and one is added for the
//! number that was given up: whoever ends recovery by hand must not get it again.
//!
//! What a crash leaves: a standby as before. A won term that nobody uses is an empty reign; the
//! local history and the placeholders are void at the next start, and so are the first files of the
//! timeline, if Postgres had come to write them. After the end of recovery: a
//! primary that has begun its timeline in a term that is its own.

use std::ffi::CStr;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use pgrx::{check_for_interrupts, pg_guard, pg_sys};
use safekeeper_protocol::{Lsn, Tli};
use safekeeper_wal::{GIVEN_UP, history_file_name, is_given_up, parse_history_file_name};

use crate::local_log::forget_reigns;
use crate::promotion::{self, Answer, Request, Wanted};
use crate::pusher::{PromotionStep, Pusher, Replayed};
use crate::settings::settings;
use crate::shmem::{self, Status};
use crate::threads::Waker;
use crate::wait_set::WaitSet;
use crate::{postgres, stop, worker};

pub const NAME: &CStr = c"walproposer promoter";
pub const ENTRY: &CStr = c"walproposer_promoter_main";

/// Nobody tells how far replay is, or that recovery has ended.
const POLL_MS: u64 = 20;

/// Entry of the promoter's process.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn walproposer_promoter_main(_arg: pg_sys::Datum) {
    worker::prepare_process();
    // SAFETY: a callback that lives as long as the process.
    unsafe { pg_sys::before_shmem_exit(Some(on_exit), pg_sys::Datum::null()) };
    // First of all: from here on the worker waits for our end, before it looks at the history.
    // SAFETY: a variable of this process.
    promotion::open_board(unsafe { pg_sys::MyProcPid });
    if postgres::in_recovery() {
        // One that ended in the middle of a promotion may have left it; unless it is the term in
        // which recovery is about to end.
        if !promotion::is_ending() {
            forget_reigns();
        }
        publish_idle();
        serve();
    }
    worker::end_for_good();
}

#[pg_guard]
unsafe extern "C-unwind" fn on_exit(_code: std::ffi::c_int, _arg: pg_sys::Datum) {
    promotion::close_board();
}

/// Until recovery is over.
fn serve() {
    let (waker, wake_receiver) = worker::new_waker();
    let mut wait_set = WaitSet::new(wake_receiver);
    let mut attempt: Option<Attempt> = None;
    loop {
        worker::reset_latch();
        check_for_interrupts!();
        postgres::reload_if_asked();
        if stop::is_requested() {
            worker::end();
        }
        let is_over = !postgres::in_recovery();
        match &mut attempt {
            None if is_over => {
                if let Some(request) = promotion::open_request() {
                    let reason = "recovery was ended meanwhile";
                    promotion::answer(&request, Answer::GivenUp, reason);
                }
                return;
            }
            None => attempt = promotion::open_request().map(|it| Attempt::begin(it, &waker)),
            Some(running) => {
                if let Some((outcome, reason)) = running.turn(wait_set.ready(), is_over) {
                    attempt
                        .take()
                        .into_iter()
                        .for_each(|it| it.end(outcome, &reason));
                    // A request may have come meanwhile.
                    continue;
                }
            }
        }
        match &attempt {
            Some(running) => {
                let timeout_ms = running.pusher.idle_ms().min(POLL_MS);
                wait_set.wait(running.pusher.sockets(), timeout_ms);
            }
            None => wait_set.wait(std::iter::empty(), u64::MAX),
        }
    }
}

fn publish_idle() {
    let mut status = Box::new(Status::EMPTY);
    status.state.set("standby");
    shmem::publish(&status);
}

fn pg_wal() -> std::path::PathBuf {
    postgres::data_directory().join("pg_wal")
}

/// One request, from the first greeting to its end.
struct Attempt {
    request: Request,
    pusher: Pusher,
    deadline: Instant,
    /// Why it is not further, for whoever asked.
    waits_for: String,
    stage: Stage,
    /// While it is prepared: no quorum has answered since.
    unheard_since: Option<Instant>,
    /// How far WAL was received and replayed, and since when.
    progress: (Lsn, Instant),
}

/// A receiver that brings nothing for so long, while there is something to bring, is started anew.
const STUCK: Duration = Duration::from_secs(3);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Up to the moment when recovery may end.
    Preparing,
    /// Somebody else will end recovery.
    Prepared,
    /// Postgres has been told to end recovery: there is no way back.
    Ending,
}

/// How an attempt has ended, and why.
type Outcome = (Answer, String);

impl Attempt {
    fn begin(request: Request, waker: &Waker) -> Attempt {
        let replayed = postgres::replayed();
        postgres::log(format!(
            "promotion: asked for; WAL is replayed up to {} on timeline {}",
            replayed.lsn, replayed.tli
        ));
        // When recovery ends Postgres looks there once more, for whatever there is.
        let command = postgres::setting(c"restore_command").unwrap_or_default();
        if !command.is_empty() && !command.contains("fetch-wal") {
            postgres::warning(
                "restore_command is not safekeeper fetch-wal: WAL from an archive may lie beyond the quorum's log",
                "If it does, recovery ends in the wrong place, and this server cannot lead.",
            );
        }
        Attempt {
            request,
            pusher: Pusher::for_standby(&settings(), waker.clone()),
            deadline: Instant::now() + request.wait,
            waits_for: "nothing was heard from the safekeepers".to_owned(),
            stage: Stage::Preparing,
            unheard_since: None,
            progress: (Lsn::INVALID, Instant::now()),
        }
    }

    /// What came of it, when it is over.
    fn turn(&mut self, readable: &[usize], is_over: bool) -> Option<Outcome> {
        self.pusher.turn(readable);
        if let Some(reason) = self.pusher.wait_reason() {
            self.waits_for = reason;
        }
        match self.stage {
            _ if is_over => Some(self.take_over()),
            Stage::Ending => None,
            Stage::Prepared => self.stay_prepared(),
            Stage::Preparing => self.prepare(),
        }
    }

    fn prepare(&mut self) -> Option<Outcome> {
        let refused = match self.pusher.promotion_step() {
            _ if self.pusher.is_hopeless() => Some(self.waits_for.clone()),
            Some(PromotionStep::Replay { end_lsn }) => match self.pusher.replayed(end_lsn) {
                Replayed::Waiting(how_far) => {
                    self.watch_receiver(end_lsn);
                    self.not_yet(how_far)
                }
                Replayed::Wrong(reason) => Some(reason),
                Replayed::Whole => {
                    self.pusher.on_replayed();
                    None
                }
            },
            Some(PromotionStep::Switch { tli, switch_lsn }) => {
                self.let_recovery_end(tli, switch_lsn)
            }
            None => None,
        };
        if let Some(reason) = refused {
            return Some((Answer::Refused, reason));
        }
        let gives_up = self.stage == Stage::Preparing
            && (Instant::now() >= self.deadline || promotion::is_withdrawn(&self.request));
        gives_up.then(|| (Answer::GivenUp, self.waits_for.clone()))
    }

    /// The receiver has no time-out for a host that takes connections and never answers. When it is
    /// gone Postgres asks its restore_command, and then another receiver tries.
    fn watch_receiver(&mut self, end_lsn: Lsn) {
        let received = postgres::received().lsn.max(postgres::replayed().lsn);
        if received != self.progress.0 || received >= end_lsn {
            self.progress = (received, Instant::now());
        } else if self.progress.1.elapsed() >= STUCK && !postgres::end_receiver() {
            self.progress.1 = Instant::now();
            postgres::log(format!(
                "promotion: restarting the WAL receiver, which has brought nothing beyond {received} for {} s",
                STUCK.as_secs()
            ));
        }
    }

    fn not_yet(&mut self, reason: String) -> Option<String> {
        self.waits_for = reason;
        None
    }

    /// All is done but the end of recovery. The reason, if it turns out that it must not end.
    fn let_recovery_end(&mut self, tli: Tli, switch_lsn: Lsn) -> Option<String> {
        let is_promotion = self.request.wanted == Wanted::Promotion;
        // Nothing more may come between the last look and the end.
        if is_promotion && !postgres::end_receiver() {
            return self.not_yet("the process that receives WAL has yet to end".to_owned());
        }
        match self.pusher.still_whole(switch_lsn) {
            Replayed::Whole => {}
            Replayed::Waiting(why) => return self.not_yet(why),
            Replayed::Wrong(reason) => return Some(reason),
        }
        match take_timelines(&pg_wal(), postgres::replayed().tli, tli.0) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                return Some(format!(
                    "there is a history file of timeline {tli} in pg_wal, of which the quorum knows nothing"
                ));
            }
            Err(error) => {
                return self.not_yet(format!("could not write into pg_wal: {error}"));
            }
        }
        if !is_promotion {
            postgres::log(format!(
                "promotion: prepared for timeline {tli} at {switch_lsn}; waiting for recovery to be ended"
            ));
            self.stage = Stage::Prepared;
            self.deadline = Instant::now() + self.request.wait;
            promotion::answer(&self.request, Answer::Done, "");
            return None;
        }
        promotion::set_ending();
        match postgres::end_recovery() {
            Ok(()) => {
                postgres::log(format!(
                    "promotion: ending recovery, for timeline {tli} at {switch_lsn}"
                ));
                self.stage = Stage::Ending;
                None
            }
            Err(error) => self.not_yet(format!("could not end recovery: {error}")),
        }
    }

    /// Whoever has prepared may ask for the promotion itself, or for more time. Until recovery ends
    /// all must stay as it was found.
    fn stay_prepared(&mut self) -> Option<Outcome> {
        if let Some(request) = promotion::open_request() {
            self.request = request;
            self.deadline = Instant::now() + request.wait;
            self.stage = Stage::Preparing;
            return self.prepare();
        }
        if self.pusher.is_hopeless() {
            return Some((Answer::Refused, self.waits_for.clone()));
        }
        if let Some(PromotionStep::Switch { switch_lsn, .. }) = self.pusher.promotion_step()
            && let Some(reason) = self.pusher.is_beyond(switch_lsn)
        {
            return Some((Answer::Refused, reason));
        }
        let unheard = match self.pusher.hears_a_quorum() {
            true => {
                self.unheard_since = None;
                Duration::ZERO
            }
            false => self
                .unheard_since
                .get_or_insert_with(Instant::now)
                .elapsed(),
        };
        let gives_up = |why: &str| Some((Answer::GivenUp, why.to_owned()));
        if unheard >= settings().member_timeout {
            return gives_up("no quorum answers any more");
        }
        if Instant::now() >= self.deadline {
            return gives_up("recovery was not ended in time");
        }
        None
    }

    /// Recovery has ended; by whom does not matter, but where.
    fn take_over(&mut self) -> Outcome {
        let switch = match self.pusher.promotion_step() {
            Some(PromotionStep::Switch { .. }) => self.pusher.on_promoted(),
            _ => Err("recovery was ended by somebody else, before the quorum was ready".to_owned()),
        };
        match switch {
            Ok(won) => {
                shmem::hand_over(&won);
                (Answer::Done, String::new())
            }
            Err(reason) => (Answer::Refused, reason),
        }
    }

    fn end(self, outcome: Answer, reason: &str) {
        let claimed = self.pusher.claimed_tli().map_or(0, |tli| tli.0);
        match outcome {
            Answer::Done => {
                archive_placeholders(&pg_wal(), claimed);
                postgres::log("promotion: recovery has ended; the worker goes on");
            }
            Answer::Refused | Answer::GivenUp => {
                // First of all: what was won must not be taken for a reign that was led.
                forget_reigns();
                if postgres::in_recovery() {
                    keep_number(claimed);
                    publish_idle();
                }
                postgres::log(format!("promotion: given up: {reason}"));
            }
        }
        if self.stage != Stage::Prepared {
            promotion::answer(&self.request, outcome, reason);
        }
    }
}

/// The quorum remembers the number that was claimed. Should somebody end recovery by hand after all,
/// Postgres must not choose it again, or this server could never lead.
fn keep_number(claimed: u32) {
    if let Err(error) = take_timelines(&pg_wal(), postgres::replayed().tli, claimed + 1) {
        postgres::log(format!(
            "promotion: could not note in pg_wal that timeline {claimed} is taken: {error}"
        ));
    }
}

/// Takes the timelines between `current` and `next` that have no history file, and leaves `next`
/// free. `AlreadyExists` if that has a real one.
fn take_timelines(pg_wal: &Path, current: u32, next: u32) -> std::io::Result<()> {
    for tli in current + 1..next {
        let created = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(pg_wal.join(history_file_name(tli)));
        match created {
            Ok(mut file) => {
                file.write_all(GIVEN_UP.as_bytes())?;
                file.sync_all()?;
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    let path = pg_wal.join(history_file_name(next));
    match std::fs::read(&path) {
        Ok(content) if is_given_up(&content) => std::fs::remove_file(&path)?,
        Ok(_) => return Err(ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    std::fs::File::open(pg_wal)?.sync_all()
}

/// Whoever restores from an archive looks there for one number after another, too.
fn archive_placeholders(pg_wal: &Path, newest: u32) {
    for tli in 2..newest {
        let name = history_file_name(tli);
        if std::fs::read(pg_wal.join(&name)).is_ok_and(|content| is_given_up(&content)) {
            postgres::archive(&name);
        }
    }
}

/// Those behind the newest real history file. One that can't be removed stays, and the standby's
/// start will say what is wrong.
pub fn remove_placeholders(pg_wal: &Path) {
    let entries = std::fs::read_dir(pg_wal).into_iter().flatten().flatten();
    let files = entries.filter_map(|entry| {
        let tli = parse_history_file_name(entry.file_name().to_str()?)?;
        let content = std::fs::read(entry.path()).ok()?;
        Some((tli, is_given_up(&content), entry.path()))
    });
    let files: Vec<_> = files.collect();
    let real = files
        .iter()
        .filter(|(_, is_placeholder, _)| !is_placeholder);
    let newest = real.map(|(tli, ..)| *tli).max().unwrap_or(0);
    for (tli, is_placeholder, path) in &files {
        if *is_placeholder && *tli > newest {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// All that there is of a timeline. The history file goes last: while it is there, this is done again.
pub fn remove_timeline(pg_wal: &Path, tli: u32) -> std::io::Result<()> {
    let history = history_file_name(tli);
    let segments = format!("{tli:08X}");
    for entry in std::fs::read_dir(pg_wal)? {
        let entry = entry?;
        let name = entry.file_name();
        let is_segment = |name: &str| name.len() == 24 && name.starts_with(&segments);
        if name.to_str().is_some_and(is_segment) {
            std::fs::remove_file(entry.path())?;
        }
    }
    match std::fs::remove_file(pg_wal.join(history)) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::fs::File::open(pg_wal)?.sync_all()
}

/// The worker's first step: a term is handed over, or will not be.
pub fn await_end() {
    let is_gone = || (!promotion::wake_promoter() || stop::is_requested()).then_some(());
    shmem::wait_for_board(Duration::MAX, is_gone);
}

#[cfg(test)]
mod tests {
    use super::*;
    use safekeeper_wal::TimelineHistory;

    #[test]
    fn a_timeline_goes_with_all_its_files_and_no_others() {
        let dir = tempfile::tempdir().expect("a directory");
        let all = [
            "000000010000000000000005",
            "00000002.history",
            "000000020000000000000005",
            "000000020000000000000006",
            "00000003.history",
            "000000030000000200000002",
        ];
        for name in all {
            std::fs::write(dir.path().join(name), "x").expect("written");
        }
        for _ in 0..2 {
            remove_timeline(dir.path(), 2).expect("removed");
            let left = all.iter().filter(|name| dir.path().join(name).exists());
            assert_eq!(
                left.collect::<Vec<_>>(),
                [&all[0], &all[4], &all[5]],
                "once, and again"
            );
        }
    }

    #[test]
    fn placeholders_take_what_is_free_and_stay_only_below_a_real_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let real = "1\t0/2000000\tno recovery target specified\n";
        std::fs::write(dir.path().join("00000003.history"), real).expect("written");
        let tlis = || {
            let entries = std::fs::read_dir(dir.path()).expect("listed");
            let mut tlis: Vec<_> = entries
                .filter_map(|entry| {
                    parse_history_file_name(entry.expect("an entry").file_name().to_str()?)
                })
                .collect();
            tlis.sort_unstable();
            tlis
        };
        take_timelines(dir.path(), 1, 6).expect("written");
        assert_eq!(tlis(), [2, 3, 4, 5]);
        let taken = take_timelines(dir.path(), 1, 3).expect_err("it is real");
        assert_eq!(taken.kind(), ErrorKind::AlreadyExists);
        take_timelines(dir.path(), 1, 5).expect("what was given up is free");
        assert_eq!(tlis(), [2, 3, 4]);
        take_timelines(dir.path(), 1, 6).expect("written again");
        let text = std::fs::read_to_string(dir.path().join("00000002.history")).expect("read");
        let parsed = TimelineHistory::parse(2, &text).expect("a history file");
        assert!(parsed.ancestors.is_empty());
        // Whatever a crash has left of one.
        std::fs::write(dir.path().join("00000004.history"), &GIVEN_UP[..9]).expect("written");
        std::fs::write(dir.path().join("00000005.history"), "").expect("written");
        std::fs::write(dir.path().join("00000006.history"), [0; 7]).expect("written");
        remove_placeholders(dir.path());
        assert_eq!(tlis(), [2, 3]);
    }
}

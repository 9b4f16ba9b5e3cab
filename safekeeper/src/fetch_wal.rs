//! `safekeeper fetch-wal %f %p`: a `restore_command` that takes WAL from the safekeepers.
//!
//! ```text
//!   main       one thread for each safekeeper
//!                connect, IDENTIFY_SYSTEM, START_REPLICATION, first bytes
//!         ◄────  an offer: all of the file, or a part of it; or "not there"; or a failure
//!   the first whole offer, or the longest ──► temporary file beside %p ──► fsync ──► rename to %p
//! ```
//!
//! What is handed out is committed WAL and nothing else, so it is what a primary's archive would
//! hold, only sooner:
//!
//! * **The newest segment**, committed in part, is filled up with zeros, where recovery finds the
//!   end of WAL. A standby goes on from there, by streaming or by asking again; a recovery without
//!   `standby.signal` ends there, at the last commit that the safekeepers know of, instead of the last
//!   segment. While no primary is alive they may know of less than they hold: only an election tells,
//!   that is, a standby's promotion.
//! * Recovery puts what it is given in the place of a file of the same name in `pg_wal`, and that
//!   may reach further: safekeepers learn late what is committed. A standby that lost its tail so
//!   would not be consistent any more, and could not be promoted just when nobody else is there to
//!   lead. So a part that is the beginning of the local file is *not there* (exit 1), and recovery
//!   takes its own file. That keeps a standby from copying the same part every 5 s, too.
//! * **A segment in which a timeline ended**: its bytes up to the switch, and zeros. Recovery along
//!   several timelines asks for the newer one's segment first, which begins with the same bytes; the
//!   older one's is for a recovery that is told to stay on it. pg_rewind reads the end of the
//!   target's own WAL, and fails on the zeros, as it must, if that is not in its `pg_wal`.
//!
//! | exit | |
//! |---|---|
//! | 0 | `%p` is there, as a whole, and on stable storage |
//! | 1 | not there; or, for a standby, not to be had now: it asks again |
//! | 2 | wrong usage |
//! | 128 | with `recovery.signal` only: it could not be found out, was asked in a wrong way, or the WAL was there once and has been removed |
//!
//! The last is for a recovery that ends where the archive ends: to tell it that an archive is empty
//! because nobody answered would make a server of a past that nobody asked for. A code above 125
//! stops it instead, and it can be started again. A standby must not be stopped by it.
//!
//! A crash leaves a temporary file `NAME.PID.fetching`, which the next call for the same name removes.
//! Nothing but `%p` and it is ever written.

mod offer;
mod sources;
mod target;

use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use safekeeper_client::wal_client::WalClientConfig;
use safekeeper_protocol::Tli;
use safekeeper_wal::parse_history_file_name;

use self::offer::{Answer, Question, SegmentOffer, Wanted};
use self::sources::Sources;
use self::target::Target;

/// For each step of asking one safekeeper.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// For asking all of them. A name server may take longer than anything else.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);
/// Once a majority has answered and none of them has removed it, the others have so long to offer more.
const GRACE: Duration = Duration::from_millis(500);

/// Why there is no file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FetchError {
    /// It is not there (yet), as far as those know who answered.
    NotThere(String),
    /// It could not be found out, or could not be brought here.
    Unknown(String),
    /// Asked in a wrong way, or nobody to ask.
    Usage(String),
}

/// Exit code for a recovery that must not take "I don't know" for "there is no more".
const STOP_RECOVERY: u8 = 128;

impl FetchError {
    pub fn message(&self) -> &str {
        match self {
            FetchError::NotThere(text) | FetchError::Unknown(text) | FetchError::Usage(text) => {
                text
            }
        }
    }

    /// See the head of this file. `path` is %p.
    pub fn exit_code(&self, path: &Path) -> u8 {
        match self {
            FetchError::NotThere(_) => 1,
            _ if Target::new(path).is_ok_and(|target| target.ends_with_the_archive()) => {
                STOP_RECOVERY
            }
            FetchError::Unknown(_) => 1,
            FetchError::Usage(_) => 2,
        }
    }
}

/// Exit code for a command line that can't be read: it must not be taken for the end of an archive
/// either. The working directory is that of a server in recovery, or nobody's.
pub fn exit_code_for_usage() -> u8 {
    FetchError::Usage(String::new()).exit_code(Path::new("pg_wal/RECOVERYXLOG"))
}

/// What the command line says.
#[derive(Clone, Debug, Default)]
pub struct FetchRequest<'a> {
    /// %f
    pub file: &'a str,
    /// Entries of --from.
    pub from: &'a [String],
    pub cluster: Option<&'a str>,
    pub user: Option<&'a str>,
}

/// Brings a file to `path`. See the head of this file.
pub fn fetch_wal(request: &FetchRequest<'_>, path: &Path) -> Result<(), FetchError> {
    let target = Target::new(path).map_err(FetchError::Usage)?;
    let sources = Sources::find(request, target.data_dir()).map_err(FetchError::Usage)?;
    let wanted = wanted(request.file)?;
    let question = Question {
        wanted,
        system_id: target.system_id(),
    };
    let mut asked = Asked {
        answers: ask_all(&sources, &question),
        majority: sources.addresses.len() / 2 + 1,
        started: Instant::now(),
        graced: None,
        is_final: target.ends_with_the_archive(),
        parts: Vec::new(),
        absent: 0,
        removed: Vec::new(),
        failures: Vec::new(),
        is_broken: false,
    };
    match asked.first_whole(&target) {
        Some(done) => done,
        None => asked.longest_part(request.file, &target),
    }
}

fn wanted(file: &str) -> Result<Wanted, FetchError> {
    if let Some(tli) = parse_history_file_name(file) {
        return Ok(Wanted::History(Tli(tli)));
    }
    // Whether there can be such a segment depends on its size, which a safekeeper tells.
    let is_segment = file.len() == 24 && file.bytes().all(|b| b.is_ascii_hexdigit());
    if is_segment {
        Ok(Wanted::Segment(file.to_owned()))
    } else {
        Err(FetchError::NotThere(format!(
            "{file} is neither a WAL segment nor a history file: safekeepers have no others"
        )))
    }
}

/// What one of them said, or why it said nothing.
type Reply = (String, Result<Answer, String>);

fn ask_all(sources: &Sources, question: &Question) -> Receiver<Reply> {
    let (sender, answers) = channel();
    for address in &sources.addresses {
        let config = WalClientConfig {
            address: address.clone(),
            credentials: sources.credentials.clone(),
            application_name: "fetch-wal".to_owned(),
            cluster: sources.cluster.clone(),
            timeout: ANSWER_TIMEOUT,
        };
        let (sender, question) = (sender.clone(), question.clone());
        let ask = move || {
            let answer = offer::ask(&config, &question).map_err(|error| error.to_string());
            // When nobody listens any more, another one had it.
            let _ = sender.send((config.address, answer));
        };
        let spawned = std::thread::Builder::new().spawn(ask);
        // Too few threads are too few answers.
        drop(spawned);
    }
    answers
}

/// Answers as they come.
struct Asked {
    answers: Receiver<Reply>,
    majority: usize,
    started: Instant,
    /// When a majority had answered.
    graced: Option<Instant>,
    /// A wrong "not there" could not be mended.
    is_final: bool,
    parts: Vec<(String, SegmentOffer)>,
    /// How many said that they don't have it.
    absent: usize,
    /// Those who had it once, and say so.
    removed: Vec<String>,
    failures: Vec<String>,
    /// One of the failures is of somebody who had it.
    is_broken: bool,
}

impl Asked {
    /// The outcome, if somebody has all of the file; none when all have answered, or are late.
    fn first_whole(&mut self, target: &Target) -> Option<Result<(), FetchError>> {
        while let Some((address, answer)) = self.next() {
            let brought = match answer {
                Ok(Answer::History(text)) => target.put(text.as_bytes()),
                Ok(Answer::Segment(offer)) if offer.is_whole() => offer.bring(target),
                Ok(Answer::Segment(offer)) => {
                    self.parts.push((address, offer));
                    continue;
                }
                Ok(Answer::Absent) => {
                    self.absent += 1;
                    continue;
                }
                Ok(Answer::Removed(text)) => {
                    self.removed.push(format!("{address}: {text}"));
                    continue;
                }
                Err(reason) => {
                    self.failures.push(format!("{address}: {reason}"));
                    continue;
                }
            };
            match brought {
                Ok(()) => return Some(Ok(())),
                Err(reason) => self.broke(&address, &reason),
            }
        }
        None
    }

    fn broke(&mut self, address: &str, reason: &str) {
        self.failures.push(format!("{address}: {reason}"));
        self.is_broken = true;
    }

    fn next(&mut self) -> Option<Reply> {
        // Who has removed it knows nothing of the others.
        let enough = self.parts.len() + self.absent >= self.majority;
        if enough && !self.is_final && self.graced.is_none() {
            self.graced = Some(Instant::now());
        }
        let deadline = self.started + ASK_TIMEOUT;
        let deadline = match self.graced {
            Some(since) => deadline.min(since + GRACE),
            None => deadline,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        self.answers.recv_timeout(left).ok()
    }

    /// So many have answered that one of them would have it, had it been known to be committed.
    fn majority_answered(&self) -> bool {
        self.parts.len() + self.absent + self.removed.len() >= self.majority
    }

    /// Nobody has brought all of it.
    fn longest_part(mut self, file: &str, target: &Target) -> Result<(), FetchError> {
        if self.is_final && (self.is_broken || !self.majority_answered()) {
            return Err(FetchError::Unknown(self.nobody_has(file)));
        }
        let is_known = self.majority_answered();
        // The longest last.
        self.parts.sort_by_key(|(_, offer)| offer.len());
        while let Some((address, offer)) = self.parts.pop() {
            match offer.bring_part(file, target) {
                Ok(true) => return Ok(()),
                Ok(false) => {
                    return Err(FetchError::NotThere(format!(
                        "what is committed of {file} is in pg_wal already"
                    )));
                }
                Err(reason) => self.broke(&address, &reason),
            }
            // Somebody has more than what is left: a recovery must not end without it.
            if self.is_final {
                return Err(FetchError::Unknown(self.nobody_has(file)));
            }
        }
        let text = self.nobody_has(file);
        let is_lost = !self.removed.is_empty() && !target.has_beside(file);
        if !is_known || self.is_broken || is_lost {
            return Err(FetchError::Unknown(text));
        }
        Err(FetchError::NotThere(text))
    }

    fn nobody_has(&self, file: &str) -> String {
        let mut text = format!("no safekeeper has {file}");
        for reason in self.removed.iter().chain(&self.failures) {
            text.push_str("; ");
            text.push_str(reason);
        }
        text
    }
}

//! The candidate: a process that wins a term for the start of a server, and completes its log.
//!
//! It is forked from the postmaster and calls nothing of Postgres. Its loop is small: it hosts a
//! proposer that stands before recovery, waits on the sockets of its peers, and leaves with one last
//! word. What it does to the data directory is to append WAL to the local log, which recovery would
//! have found there had the disk kept it, and to replace the local history file.
//!
//! A crash at any point is a crash of a server that had not started: appended WAL is our own and
//! stays true, and a won term that nobody uses is an empty reign.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use safekeeper_protocol::{
    AcceptorMessage, Compared, Completed, Divergence, LocalLog, Lsn, PeerIdx, Proposer,
    ProposerAction, ProposerGreeting, ProposerSettings, Standing, Term, WaitReason,
};
use safekeeper_wal::{TimelineHistory, WalFormat};

use super::local_end::{self, LocalEnd};
use super::message::FromCandidate;
use crate::compare::{Comparison, ComparisonEvent, Stretch};
use crate::completion::{Completion, CompletionEvent};
use crate::connect::Dial;
use crate::donor::{Donor, DonorRequest};
use crate::local_history::{self, LocalHistory};
use crate::peer::{DialEvent, Peer};
use crate::threads::{WakeReceiver, Waker, waker};
use crate::wal_source::WalSource;

/// While nothing changes, the log tells of it this often.
const REMINDER: Duration = Duration::from_secs(10);
/// A log that can't lead by what a bare majority says may do so by what the others say, a little
/// later. After this it is refused.
const LAST_CHANCE: Duration = Duration::from_secs(3);

/// All that it needs to know, gathered by the postmaster.
pub struct Job {
    pub settings: ProposerSettings,
    /// Its end is still to be found: that takes a while, in which stop signals must be obeyed.
    pub log: LocalLog,
    pub local: LocalHistory,
    /// Where recovery begins, and the record of the last checkpoint.
    pub redo_lsn: Lsn,
    pub checkpoint_lsn: Lsn,
    /// One for each peer of `settings`.
    pub dials: Vec<Dial>,
    pub data_dir: PathBuf,
    pub format: WalFormat,
    pub timelines: TimelineHistory,
}

pub struct Candidate {
    job: Job,
}

impl Candidate {
    pub fn new(job: Job) -> Candidate {
        Candidate { job }
    }

    /// In the forked process: works, says its last word on `pipe`, and is gone.
    pub fn run_and_exit(self, postmaster: libc::pid_t, pipe: OwnedFd) -> ! {
        // SAFETY: without it the process would outlive a killed postmaster, and keep its shared
        // memory from being replaced; and one that died before is nobody's parent any more.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            if libc::getppid() != postmaster {
                libc::_exit(1);
            }
        }
        let mut pipe = File::from(pipe);
        // What the closure had in hand is not looked at again.
        let outcome = catch_unwind(AssertUnwindSafe(|| self.work(&mut pipe)));
        let last = outcome.unwrap_or_else(|_| FromCandidate::Failed("it panicked".to_owned()));
        let said = pipe.write_all(&last.encode());
        // SAFETY: no callback of Postgres's may run in this process.
        unsafe { libc::_exit(i32::from(said.is_err())) }
    }

    fn work(self, pipe: &mut File) -> FromCandidate {
        let (waker, receiver) = match waker() {
            Ok(ends) => ends,
            Err(error) => {
                return FromCandidate::Failed(format!("could not create a socket pair: {error}"));
            }
        };
        let found = local_end::find(
            &self.job.data_dir.join("pg_wal"),
            self.job.format,
            self.job.timelines.clone(),
            self.job.redo_lsn,
            self.job.checkpoint_lsn,
        );
        let mut campaign = match found {
            Ok(end) => Campaign::new(self.job, end, waker),
            Err(error) => return FromCandidate::Failed(error.to_string()),
        };
        loop {
            receiver.clear();
            campaign.turn();
            for line in campaign.lines.drain(..) {
                // If nobody listens, the postmaster is gone, and so are we at the next moment.
                let _ = pipe.write_all(&FromCandidate::Log(line).encode());
            }
            if let Some(outcome) = campaign.outcome.take() {
                return outcome;
            }
            campaign.wait(&receiver);
        }
    }
}

struct Campaign {
    job: Job,
    end: LocalEnd,
    proposer: Proposer,
    peers: Vec<Peer>,
    greeting: ProposerGreeting,
    source: WalSource,
    comparison: Option<Comparison>,
    completion: Option<Completion>,
    completed: u64,
    actions: Vec<ProposerAction>,
    waker: Waker,
    started: Instant,
    lines: Vec<String>,
    reminded: Instant,
    /// Since when this log could not lead. By which log of the quorum changes while another primary
    /// writes.
    doomed: Option<Instant>,
    outcome: Option<FromCandidate>,
}

impl Campaign {
    fn new(mut job: Job, end: LocalEnd, waker: Waker) -> Campaign {
        job.log.end_lsn = end.end_lsn;
        let pg_wal = job.data_dir.join("pg_wal");
        // Nothing is removed before recovery.
        let source = WalSource::new(pg_wal, job.format, job.timelines.clone(), end.end_lsn, || 0);
        Campaign {
            proposer: Proposer::new(
                job.settings.clone(),
                job.log.clone(),
                Standing::BeforeRecovery,
                0,
            ),
            peers: job.dials.iter().cloned().map(Peer::new).collect(),
            greeting: ProposerGreeting {
                proposer_id: job.settings.proposer_id,
                cluster: job.settings.cluster.clone(),
            },
            job,
            end,
            source,
            comparison: None,
            completion: None,
            completed: 0,
            actions: Vec::new(),
            waker,
            started: Instant::now(),
            lines: Vec::new(),
            reminded: Instant::now(),
            doomed: None,
            outcome: None,
        }
    }

    fn turn(&mut self) {
        for at in 0..self.peers.len() {
            self.poll_dial(at);
            self.receive(at);
        }
        self.poll_comparison();
        self.poll_completion();
        let now_ms = self.now_ms();
        self.proposer.on_tick(now_ms, &mut self.actions);
        self.carry_out();
        for at in 0..self.peers.len() {
            if let Err(error) = self.peers[at].flush() {
                self.close(at, &error.to_string());
            }
        }
        self.carry_out();
        self.consider();
    }

    /// Until something has come, or is due.
    fn wait(&self, receiver: &WakeReceiver) {
        let now_ms = self.now_ms();
        let dials = self.peers.iter().map(Peer::next_dial_ms);
        let next_ms = dials.fold(self.proposer.next_tick_ms(|_| true), u64::min);
        let idle_ms = next_ms.saturating_sub(now_ms).min(500);
        let mut polled = vec![libc::pollfd {
            fd: receiver.fd(),
            events: libc::POLLIN,
            revents: 0,
        }];
        for (fd, wants_write) in self.peers.iter().filter_map(Peer::socket) {
            let events = if wants_write {
                libc::POLLIN | libc::POLLOUT
            } else {
                libc::POLLIN
            };
            polled.push(libc::pollfd {
                fd,
                events,
                revents: 0,
            });
        }
        // SAFETY: an array of so many, all descriptors open for as long as the call lasts.
        unsafe {
            libc::poll(
                polled.as_mut_ptr(),
                polled.len() as libc::nfds_t,
                i32::try_from(idle_ms).unwrap_or(i32::MAX),
            );
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    // ---- peers ----------------------------------------------------------------------------

    fn poll_dial(&mut self, at: usize) {
        let now_ms = self.now_ms();
        let peer = &mut self.peers[at];
        if let Err(error) = peer.dial_if_due(now_ms, &self.waker) {
            return self.fail(format!("could not start a thread: {error}"));
        }
        match peer.poll_dial(now_ms) {
            DialEvent::Nothing => {}
            DialEvent::Connected => {
                let actions = &mut self.actions;
                self.proposer.on_connected(PeerIdx(at), now_ms, actions);
                self.carry_out();
            }
            DialEvent::Failed(reason) => self.close(at, &reason),
            DialEvent::Panicked(text) => self.fail(text),
        }
    }

    fn receive(&mut self, at: usize) {
        loop {
            match self.peers[at].receive() {
                Ok(may_be_more) => {
                    if !self.take_messages(at) || !may_be_more {
                        return;
                    }
                }
                Err(error) => return self.close(at, &error.to_string()),
            }
        }
    }

    /// Whether the connection is still there.
    fn take_messages(&mut self, at: usize) -> bool {
        loop {
            match self.peers[at].next_message() {
                Ok(Some(message)) => {
                    if let AcceptorMessage::Greeting(_) = message {
                        self.peers[at].on_greeted();
                    }
                    let (now_ms, actions) = (self.now_ms(), &mut self.actions);
                    self.proposer
                        .on_message(PeerIdx(at), &message, now_ms, actions);
                    self.carry_out();
                }
                Ok(None) => return self.peers[at].is_up(),
                Err(error) => {
                    self.close(at, &error.to_string());
                    return false;
                }
            }
        }
    }

    fn close(&mut self, at: usize, reason: &str) {
        let now_ms = self.now_ms();
        let peer = &mut self.peers[at];
        let was_up = peer.is_up();
        if peer.close(reason, now_ms) {
            let address = &peer.dial().address;
            self.lines.push(format!(
                "could not ask safekeeper {address} before recovery: {reason}"
            ));
        }
        if was_up {
            self.proposer.on_disconnected(PeerIdx(at), now_ms);
        }
    }

    // ---- actions --------------------------------------------------------------------------

    fn carry_out(&mut self) {
        while !self.actions.is_empty() {
            for action in std::mem::take(&mut self.actions) {
                self.carry_out_one(action);
            }
        }
    }

    fn carry_out_one(&mut self, action: ProposerAction) {
        match action {
            ProposerAction::Send { to, message } => self.peers[to.0].send(&message),
            ProposerAction::Disconnect { peer, reason } => self.close(peer.0, &reason),
            ProposerAction::Compare {
                donor,
                term,
                begin_lsn,
                end_lsn,
            } => self.begin_comparison(Stretch {
                donor,
                term,
                begin_lsn,
                end_lsn,
            }),
            ProposerAction::Complete {
                donor,
                term,
                begin_lsn,
                end_lsn,
            } => self.begin_completion(donor, term, begin_lsn, end_lsn),
            ProposerAction::PersistHistory {
                history,
                configuration,
            } => {
                let local = LocalHistory {
                    history,
                    configuration,
                    unled_from: None,
                    ..self.job.local.clone()
                };
                let system_id = self.job.format.system_id;
                if let Err(error) = local_history::store(&self.job.data_dir, system_id, &local) {
                    return self.fail(error.to_string());
                }
                self.job.local = local;
                let (now_ms, actions) = (self.now_ms(), &mut self.actions);
                self.proposer.on_history_persisted(now_ms, actions);
            }
            ProposerAction::Lead { .. } => {
                if let Some(won) = self.proposer.hand_over() {
                    let end_lsn = self.end.end_lsn + self.completed;
                    self.outcome = Some(FromCandidate::Won {
                        won,
                        completed: self.completed,
                        is_beyond_checkpoint: end_lsn > self.end.checkpoint_end_lsn,
                    });
                }
            }
            ProposerAction::NothingToRecover => {
                self.outcome = Some(FromCandidate::NothingToRecover);
            }
            // Told when it is the end; until then it would be told anew whenever the other writes.
            ProposerAction::Wait(WaitReason::Diverged(_)) => {}
            ProposerAction::Wait(reason) => {
                self.lines
                    .push(format!("waiting before recovery: {reason}"));
                self.reminded = Instant::now();
            }
            // Of a reign, which begins with the end of this process.
            ProposerAction::Commit(_)
            | ProposerAction::Replay { .. }
            | ProposerAction::Promote { .. }
            | ProposerAction::Deposed { .. } => {}
        }
    }

    /// Is there a reason not to go on?
    fn consider(&mut self) {
        if self.outcome.is_some() {
            return;
        }
        let reason = self.proposer.wait_reason().cloned();
        match reason {
            Some(WaitReason::Diverged(divergence)) => {
                let since = *self.doomed.get_or_insert_with(Instant::now);
                if since.elapsed() >= LAST_CHANCE {
                    self.refuse(divergence.to_string(), advice(&divergence));
                }
            }
            Some(reason @ WaitReason::BytesDiffer { .. }) => {
                self.refuse(reason.to_string(), OTHER_BYTES.to_owned());
            }
            Some(reason) => {
                self.doomed = None;
                if self.reminded.elapsed() >= REMINDER {
                    self.reminded = Instant::now();
                    self.lines
                        .push(format!("still waiting before recovery: {reason}"));
                }
            }
            None => self.doomed = None,
        }
    }

    fn refuse(&mut self, reason: String, hint: String) {
        self.outcome = Some(FromCandidate::Refused { reason, hint });
    }

    fn fail(&mut self, reason: String) {
        self.outcome = Some(FromCandidate::Failed(reason));
    }

    // ---- donor ----------------------------------------------------------------------------

    fn donor_request(
        &self,
        donor: PeerIdx,
        term: Term,
        begin_lsn: Lsn,
        end_lsn: Lsn,
    ) -> DonorRequest {
        DonorRequest {
            dial: self.job.dials[donor.0].clone(),
            greeting: self.greeting.clone(),
            configuration_version: self.proposer.configuration().version,
            term,
            begin_lsn,
            end_lsn,
        }
    }

    fn begin_comparison(&mut self, stretch: Stretch) {
        let begun = Comparison::begin(stretch, &self.source, self.waker.clone(), |part| {
            self.donor_request(part.donor, part.term, part.begin_lsn, part.end_lsn)
        });
        match begun {
            Ok(comparison) => self.comparison = Some(comparison),
            Err(outcome) => self.end_comparison(outcome),
        }
    }

    fn poll_comparison(&mut self) {
        let Some(comparison) = &self.comparison else {
            return;
        };
        let stretch = comparison.stretch;
        match comparison.poll(&mut self.source) {
            ComparisonEvent::Nothing => {}
            ComparisonEvent::Ended(outcome) => self.end_comparison(outcome),
            ComparisonEvent::Removed { oldest_lsn } => self.begin_comparison(Stretch {
                begin_lsn: oldest_lsn.max(stretch.begin_lsn),
                ..stretch
            }),
            ComparisonEvent::Panicked(text) => self.fail(text),
        }
    }

    fn end_comparison(&mut self, outcome: Compared) {
        self.comparison = None;
        let (now_ms, actions) = (self.now_ms(), &mut self.actions);
        self.proposer.on_compared(outcome, now_ms, actions);
    }

    fn begin_completion(&mut self, donor: PeerIdx, term: Term, begin_lsn: Lsn, end_lsn: Lsn) {
        let request = self.donor_request(donor, term, begin_lsn, end_lsn);
        let history = &self.job.local.history;
        let tli = history.tli_at(begin_lsn);
        if tli != Some(self.job.log.tli) || history.tli_at(Lsn(end_lsn.0 - 1)) != tli {
            return self.refuse(
                format!(
                    "the WAL from {begin_lsn} to {end_lsn} that the local disk has lost lies on another timeline \
                     than {}, on which recovery would end",
                    self.job.log.tli
                ),
                REBUILD.to_owned(),
            );
        }
        let started = Donor::start(request, self.waker.clone()).map_err(|error| error.to_string());
        let pg_wal = self.job.data_dir.join("pg_wal");
        let last_record = self.end.last_record.filter(|_| self.completed == 0);
        let begun = started.map(|donor| {
            Completion::new(
                donor,
                &pg_wal,
                self.job.format,
                self.job.log.tli,
                begin_lsn..end_lsn,
                last_record,
            )
        });
        match begun {
            Ok(completion) => self.completion = Some(completion),
            Err(reason) => self.end_completion(Completed::Partly {
                end_lsn: begin_lsn,
                reason,
            }),
        }
    }

    fn poll_completion(&mut self) {
        let Some(completion) = &mut self.completion else {
            return;
        };
        match completion.poll() {
            CompletionEvent::Nothing => {}
            CompletionEvent::Ended(outcome) => self.end_completion(outcome),
            CompletionEvent::Failed(reason) => self.fail(reason),
        }
    }

    fn end_completion(&mut self, outcome: Completed) {
        if let Some(completion) = self.completion.take() {
            self.completed += completion.appended(&outcome);
        }
        let (now_ms, actions) = (self.now_ms(), &mut self.actions);
        self.proposer.on_completed(outcome, now_ms, actions);
    }
}

const OTHER_BYTES: &str = "This server has written without the safekeepers, or was restored to an earlier point. \
     Make a new base backup of the present primary.";
const REBUILD: &str =
    "Make a new base backup of the present primary, and start this server from it as a standby.";

/// What an administrator can do about it.
fn advice(divergence: &Divergence) -> String {
    let local_end = divergence.local.end_lsn;
    match divergence.common {
        Some(common) if common == local_end => {
            "Another primary has written since. Its log continues this server's: create \"standby.signal\" and start \
             this server as its standby."
        }
        Some(_) => {
            "Another primary has written since, and this server holds WAL that was never committed. Run pg_rewind \
             against the present primary, after a CHECKPOINT there, or make a new base backup of it; and start \
             this server as a standby."
        }
        None => REBUILD,
    }
    .to_owned()
}

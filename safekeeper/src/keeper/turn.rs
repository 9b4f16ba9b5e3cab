//! A turn: one thread acts for a keeper.
//!
//! ```text
//!   take_turn ─► append, append, … ─► finish          write, write, …, one flush, one answer
//!             ─► handle             ─► finish          flush first: it speaks of the log's end
//!             ─► disconnect                            flush, forget the reign, persist commit_lsn
//! ```
//!
//! Actions are carried out in their order, each one done before the next is looked at (the
//! contract of the protocol's action.rs). When one is refused for damage or want of room, those
//! behind it are dropped: the connection ends, and the next Elected puts the log in order.
//!
//! A turn that ends early, by an error, flushes when it is dropped.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::MutexGuard;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use safekeeper_protocol::{
    Acceptor, AcceptorAction, AcceptorMessage, Append, Lsn, ProposerMessage, Session, Term, Tli,
};
use safekeeper_wire::pgwire::ErrorReport;

use super::{Held, Keeper, PushError, lock, stop_on};
use crate::view::View;
use crate::wal_storage::{TruncateError, WriteError};

/// The right to act for a keeper, until dropped.
#[derive(Debug)]
pub struct Turn<'a> {
    keeper: &'a Keeper,
    held: MutexGuard<'a, Held>,
}

impl<'a> Turn<'a> {
    pub(super) fn new(keeper: &'a Keeper, held: MutexGuard<'a, Held>) -> Turn<'a> {
        Turn { keeper, held }
    }

    /// WAL, or a heartbeat: written, not flushed.
    pub fn append(
        &mut self,
        session: Session,
        append: &Append,
        wal: &[u8],
        now_ms: u64,
        replies: &mut Vec<AcceptorMessage>,
    ) -> Result<(), PushError> {
        let held = &mut *self.held;
        if append.reply_requested {
            held.acceptor.set_feedback(self.keeper.consumers.feedback());
        }
        held.acceptor
            .on_append(session, append, now_ms, &mut held.actions)?;
        self.carry_out(wal, replies)
    }

    /// Any message but Append and Read.
    pub fn handle(
        &mut self,
        session: Session,
        address: SocketAddr,
        message: &ProposerMessage,
        now_ms: u64,
        replies: &mut Vec<AcceptorMessage>,
    ) -> Result<(), PushError> {
        self.flush(replies);
        // The answer speaks for standbys too; and an acceptor that is new knows of none.
        let feedback = self.keeper.consumers.feedback();
        self.held.acceptor.set_feedback(feedback);
        let term_before = self.held.acceptor.term();
        let Held {
            acceptor, actions, ..
        } = &mut *self.held;
        match message {
            ProposerMessage::Greeting(greeting) => acceptor.on_greeting(greeting, now_ms, actions),
            ProposerMessage::Configure(configure) => acceptor.on_configure(configure, actions),
            ProposerMessage::VoteRequest(request) => acceptor.on_vote_request(request, actions),
            ProposerMessage::Elected(elected) => {
                acceptor.on_elected(session, elected, now_ms, actions)
            }
            ProposerMessage::Append(_) | ProposerMessage::Read(_) => {
                unreachable!("have their own ways")
            }
        }?;
        self.carry_out(&[], replies)?;
        self.publish_positions();
        self.publish_proposer(session, address);
        self.log_handled(message, address, term_before);
        Ok(())
    }

    /// Flush, and give the keeper back.
    pub fn finish(mut self, replies: &mut Vec<AcceptorMessage>) {
        self.flush(replies);
    }

    /// The proposer's connection is at its end. True if it was the elected one.
    pub fn disconnect(mut self, session: Session) -> bool {
        self.flush(&mut Vec::new());
        let led = self.held.acceptor.leads(session);
        if led {
            *lock(&self.keeper.proposer) = None;
        }
        self.held.acceptor.on_disconnected(session);
        let keeper = self.keeper;
        drop(self);
        keeper.persist_commit_lsn();
        led
    }

    fn flush(&mut self, replies: &mut Vec<AcceptorMessage>) {
        if !self.held.acceptor.needs_flush() {
            return;
        }
        let held = &mut *self.held;
        let started = Instant::now();
        let flush_lsn = match held.storage.flush() {
            Ok(flush_lsn) => flush_lsn,
            Err(error) => stop_on(&error),
        };
        let seconds = started.elapsed().as_secs_f64();
        self.keeper.metrics.flush_wal_seconds.observe(seconds);
        held.acceptor.set_feedback(self.keeper.consumers.feedback());
        held.acceptor.on_flushed(flush_lsn, &mut held.actions);
        self.publish_positions();
        self.carry_out(&[], replies)
            .expect("only a Write can be refused, and a flush asks for none");
    }

    /// In order; what comes after one that is refused is dropped. But for one thing: commit_lsn has
    /// moved in the acceptor, which will not ask for it again, and is true whatever was refused.
    fn carry_out(
        &mut self,
        wal: &[u8],
        replies: &mut Vec<AcceptorMessage>,
    ) -> Result<(), PushError> {
        let mut actions = std::mem::take(&mut self.held.actions);
        let result = actions
            .drain(..)
            .try_for_each(|action| self.carry_out_one(action, wal, replies));
        self.held.actions = actions;
        if result.is_err() {
            let commit_lsn = self.held.acceptor.commit_lsn();
            self.keeper.commit_lsn.advance(commit_lsn.0);
            self.keeper.consumers.wake();
        }
        result
    }

    fn carry_out_one(
        &mut self,
        action: AcceptorAction,
        wal: &[u8],
        replies: &mut Vec<AcceptorMessage>,
    ) -> Result<(), PushError> {
        match action {
            AcceptorAction::Write { tli, begin_lsn } => return self.write(tli, begin_lsn, wal),
            AcceptorAction::Persist(state) => {
                self.held.persisted_commit_lsn = state.commit_lsn;
                let control = lock(&self.keeper.control);
                self.keeper.write_control_file(control, &state);
                self.publish_view();
            }
            AcceptorAction::Truncate { tli, end_lsn } => return self.truncate(tli, end_lsn),
            AcceptorAction::ReplaceTimelineFiles(files) => {
                match self.held.storage.replace_timeline_files(&files) {
                    Ok(()) => self.publish_view(),
                    // Some may be in place, as after a crash, and the history is not persisted.
                    Err(error) if error.is_no_space() => {
                        self.begin_again();
                        return Err(PushError::NoSpace(error));
                    }
                    Err(error) => stop_on(&error),
                }
            }
            AcceptorAction::Commit(commit_lsn) => {
                self.keeper.commit_lsn.advance(commit_lsn.0);
                self.keeper.consumers.wake();
            }
            AcceptorAction::Send(message) => replies.push(message),
            AcceptorAction::Read(_) => unreachable!("asked for by begin_read only"),
        }
        Ok(())
    }

    fn write(&mut self, tli: Tli, begin_lsn: Lsn, wal: &[u8]) -> Result<(), PushError> {
        let metrics = &self.keeper.metrics;
        match self.held.storage.write(tli, begin_lsn, wal) {
            Ok(()) => {
                metrics.write_wal_bytes.inc_by(wal.len() as u64);
                Ok(())
            }
            Err(WriteError::Failed(error)) => stop_on(&error),
            Err(WriteError::NoSpace(error)) => {
                metrics.no_space_appends.inc();
                Err(PushError::NoSpace(error))
            }
            Err(error @ WriteError::Damaged(..)) => {
                metrics.damaged_appends.inc();
                log::error!(
                    "refused damaged WAL cluster={} begin_lsn={begin_lsn} tli={tli} ({error})",
                    self.keeper.cluster.name
                );
                Err(PushError::Damaged(error.to_string()))
            }
        }
    }

    fn truncate(&mut self, tli: Tli, end_lsn: Lsn) -> Result<(), PushError> {
        let error = match self.held.storage.truncate(tli, end_lsn) {
            Ok(()) => return Ok(()),
            Err(TruncateError::Failed(error)) => stop_on(&error),
            Err(error) => error,
        };
        // The log is as it was, and the acceptor believes otherwise.
        self.begin_again();
        Err(match error {
            TruncateError::NoSpace(error) => PushError::NoSpace(error),
            error => PushError::Cluster(ErrorReport::new("55000", error.to_string())),
        })
    }

    /// What a restart would do: the acceptor as it was persisted. All it has promised is there.
    fn begin_again(&mut self) {
        let keeper = self.keeper;
        let mut state = lock(&keeper.control).persisted().clone();
        // The running process never takes this back.
        state.commit_lsn = state.commit_lsn.max(keeper.commit_lsn());
        // The first part of a record may be written. Nobody counts on it, and a new acceptor does
        // not know of it.
        let storage = &mut self.held.storage;
        let flush_lsn = storage.flush_lsn();
        if storage.write_lsn() != flush_lsn {
            let tli = state.history.tli_at(flush_lsn).unwrap_or(Tli(1));
            match storage.truncate(tli, flush_lsn) {
                Ok(()) => {}
                Err(TruncateError::Failed(error) | TruncateError::NoSpace(error)) => {
                    stop_on(&error)
                }
                Err(error) => panic!("a log can end where it is flushed: {error}"),
            }
        }
        self.held.acceptor = Acceptor::new(
            keeper.identity.id,
            keeper.identity.incarnation,
            state,
            flush_lsn,
        );
        *lock(&keeper.proposer) = None;
        self.publish_view();
        self.publish_positions();
    }

    fn publish_positions(&self) {
        let (keeper, held) = (self.keeper, &self.held);
        let publish = |to: &AtomicU64, lsn: Lsn| to.store(lsn.0, Ordering::Relaxed);
        publish(&keeper.write_lsn, held.acceptor.write_lsn());
        publish(&keeper.flush_lsn, held.acceptor.flush_lsn());
        publish(&keeper.oldest_lsn, held.storage.oldest_lsn());
    }

    fn publish_view(&self) {
        let timeline_files = self.held.storage.timeline_files();
        let timeline_files = timeline_files.unwrap_or_else(|error| stop_on(&error));
        let view = View::new(self.held.acceptor.state(), timeline_files);
        *lock(&self.keeper.view) = Arc::new(view);
    }

    fn publish_proposer(&self, session: Session, address: SocketAddr) {
        let mut proposer = lock(&self.keeper.proposer);
        if self.held.acceptor.leads(session) {
            *proposer = Some(address);
        } else if !self.held.acceptor.has_leader() {
            *proposer = None;
        }
    }

    /// One line for what changed.
    fn log_handled(&self, message: &ProposerMessage, address: SocketAddr, term_before: Term) {
        let acceptor = &self.held.acceptor;
        let (name, term) = (&self.keeper.cluster.name, acceptor.term());
        match message {
            ProposerMessage::VoteRequest(_) if term > term_before => {
                log::info!("voted cluster={name} term={term}");
            }
            ProposerMessage::Elected(elected) if elected.term == term => log::info!(
                "follows elected proposer from={address} cluster={name} term={term} write_lsn={} commit_lsn={}",
                acceptor.write_lsn(),
                acceptor.commit_lsn()
            ),
            ProposerMessage::Configure(_) => log::info!(
                "configured cluster={name} term={term} configuration={}",
                acceptor.configuration()
            ),
            _ => {}
        }
    }
}

/// A turn that ends by an error has written WAL all the same.
impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.flush(&mut Vec::new());
        }
    }
}

//! The daemon as the model plays it, and its disk: what `action.rs` demands of a host.
//!
//! Actions in order, nothing after a `Persist` or `Truncate` before that one is on disk; what is
//! written is not there after a crash unless it was flushed, though some of it may be.
//! [`Step::DieWithin`](super::step::Step::DieWithin) cuts a list of actions short. A [`Mutation`]
//! breaks one of these promises, to show that the properties notice.

use safekeeper_protocol::mutation::Mutation;
use safekeeper_protocol::*;

use super::scope::cluster;
use super::step::{LONG_AFTER_MS, NOW_MS, Run};
use super::world::*;

impl Run<'_> {
    pub fn hand_over(
        &mut self,
        server: usize,
        safekeeper: usize,
        message: &ProposerMessage,
        entries: &Entries,
    ) {
        let session = World::session(server, self.world.links[server][safekeeper].slot);
        if self.handle(safekeeper, session, message, entries, None) {
            return;
        }
        self.world.safekeepers[safekeeper]
            .edit()
            .acceptor
            .on_disconnected(session);
        let link = self.world.links[server][safekeeper].edit();
        link.ended = true;
        link.requests.clear();
        if link.answers.is_empty() {
            self.disconnect(server, safekeeper);
            self.reconnect(server, safekeeper);
        }
    }

    /// False if the connection ends by it. With `die_after`, only so many things reach the disk.
    pub fn handle(
        &mut self,
        safekeeper: usize,
        session: Session,
        message: &ProposerMessage,
        entries: &Entries,
        die_after: Option<usize>,
    ) -> bool {
        if !matches!(
            message,
            ProposerMessage::Append(_) | ProposerMessage::Read(_)
        ) {
            self.flush(safekeeper);
        }
        let mut actions = Vec::new();
        let acceptor = &mut self.world.safekeepers[safekeeper].edit().acceptor;
        let handled = match message {
            ProposerMessage::Greeting(m) => acceptor.on_greeting(m, LONG_AFTER_MS, &mut actions),
            ProposerMessage::Configure(m) => acceptor.on_configure(m, &mut actions),
            ProposerMessage::VoteRequest(m) => acceptor.on_vote_request(m, &mut actions),
            ProposerMessage::Elected(m) => acceptor.on_elected(session, m, NOW_MS, &mut actions),
            ProposerMessage::Append(m) => acceptor.on_append(session, m, NOW_MS, &mut actions),
            ProposerMessage::Read(m) => acceptor.on_read(m, &mut actions),
        };
        if let Err(refusal) = handled {
            self.scope.seen.refused.count();
            // The last line of defence was reached: another one has failed.
            if matches!(
                refusal,
                Refusal::WouldCutCommitted { .. } | Refusal::BadHistory | Refusal::Malformed(_)
            ) {
                self.world.accuse(Violation::Refused(refusal.to_string()));
            }
            return false;
        }
        if self.scope.breaks(Mutation::HistoryBeforeTruncation) {
            history_first(&mut actions);
        }
        self.carried_out = 0;
        for action in actions {
            let durable = matches!(
                action,
                AcceptorAction::Persist(_) | AcceptorAction::Truncate { .. }
            );
            if durable && Some(self.carried_out) == die_after {
                break;
            }
            self.carried_out += usize::from(durable);
            self.carry_out_acceptor(safekeeper, session, action, entries);
        }
        true
    }

    fn carry_out_acceptor(
        &mut self,
        safekeeper: usize,
        session: Session,
        action: AcceptorAction,
        entries: &Entries,
    ) {
        let node = self.world.safekeepers[safekeeper].edit();
        match action {
            AcceptorAction::Write { begin_lsn, .. } => {
                for (i, entry) in entries.iter().enumerate() {
                    let at = place(begin_lsn) + i;
                    match node.entries.get_mut(at) {
                        // Only where a truncation has left something behind.
                        Some(old) => *old = *entry,
                        None => node.entries.push(*entry),
                    }
                }
            }
            AcceptorAction::Persist(state) => {
                let is_vote = state.history == node.durable.history;
                if !(is_vote && self.scope.breaks(Mutation::VoteNotDurable)) {
                    node.durable = state;
                }
            }
            AcceptorAction::Truncate { end_lsn, .. } => {
                node.begun = true;
                let end = place(end_lsn);
                if end < node.entries.len() {
                    self.scope.seen.truncated.count();
                }
                node.flushed = end;
                if !self.scope.breaks(Mutation::TailNotZeroed) {
                    node.entries.truncate(end);
                }
            }
            AcceptorAction::Send(answer) => {
                self.check_answer(safekeeper, &answer);
                let server = (session.id / 2) as usize;
                let link = &mut self.world.links[server][safekeeper];
                if link.open && !link.ended && link.slot == session.id % 2 {
                    link.edit().answers.push_back(answer);
                }
            }
            AcceptorAction::ReplaceTimelineFiles(_)
            | AcceptorAction::Commit(_)
            | AcceptorAction::Read(_) => {}
        }
    }

    /// Nothing is said that a power cut could make a lie.
    fn check_answer(&mut self, safekeeper: usize, answer: &AcceptorMessage) {
        let node = &self.world.safekeepers[safekeeper];
        let (term, flush_lsn) = match answer {
            AcceptorMessage::VoteResponse(m) => (m.term, m.flush_lsn),
            AcceptorMessage::AppendResponse(m) => (m.term, m.flush_lsn),
            AcceptorMessage::ConfigureResponse(m) => (m.term, m.flush_lsn),
            AcceptorMessage::Greeting(_) | AcceptorMessage::ReadResponse(_) => return,
        };
        let broken = self.scope.mutation.is_some();
        if !broken && (node.durable.term != term || node.flushed < place(flush_lsn)) {
            self.world.accuse(Violation::AnsweredBeforeDurable);
        }
    }

    /// Flush what is written; the answer goes to the connection that leads. Its server, if it has one.
    pub fn flush(&mut self, safekeeper: usize) -> Option<usize> {
        let node = &mut self.world.safekeepers[safekeeper];
        if !node.acceptor.needs_flush() {
            return None;
        }
        let node = node.edit();
        let mut actions = Vec::new();
        node.acceptor
            .on_flushed(node.acceptor.write_lsn(), &mut actions);
        if !self.scope.breaks(Mutation::AnswerBeforeFsync) {
            node.flushed = place(node.acceptor.write_lsn());
        }
        let sessions = (0..SERVERS)
            .flat_map(|server| (0..2).map(move |slot| (server, World::session(server, slot))));
        let leader = sessions
            .into_iter()
            .find(|(_, session)| self.world.safekeepers[safekeeper].acceptor.leads(*session));
        let (server, session) = leader?;
        for action in actions {
            self.carry_out_acceptor(safekeeper, session, action, &Vec::new());
        }
        Some(server)
    }

    pub fn die_within(
        &mut self,
        server: usize,
        safekeeper: usize,
        message: &ProposerMessage,
        entries: &Entries,
        done: usize,
    ) -> Option<()> {
        let session = World::session(server, self.world.links[server][safekeeper].slot);
        let n_answers = self.world.links[server][safekeeper].answers.len();
        self.handle(safekeeper, session, message, entries, Some(done));
        if self.carried_out < done {
            return None;
        }
        // Nobody hears what was said meanwhile.
        self.world.links[server][safekeeper]
            .edit()
            .answers
            .truncate(n_answers);
        let kept = self.world.safekeepers[safekeeper].flushed;
        self.restart(safekeeper, kept);
        Some(())
    }

    pub fn restart(&mut self, safekeeper: usize, kept: usize) {
        let node = self.world.safekeepers[safekeeper].edit();
        node.entries.truncate(kept);
        node.flushed = kept;
        let flush_lsn = if node.begun { lsn(kept) } else { Lsn::INVALID };
        let id = MemberId(safekeeper as u64 + 1);
        node.acceptor = Acceptor::new(id, node.incarnation, node.durable.clone(), flush_lsn);
        self.hang_up(safekeeper);
    }

    pub fn wipe(&mut self, safekeeper: usize) {
        let node = self.world.safekeepers[safekeeper].edit();
        if !self.scope.breaks(Mutation::WipedMemberVotes) {
            node.incarnation = Incarnation(node.incarnation.0 + 100);
        }
        node.entries.clear();
        node.begun = false;
        let configuration = if self.scope.breaks(Mutation::WipedMemberVotes) {
            node.durable.configuration.clone()
        } else {
            Configuration::default()
        };
        node.durable = AcceptorState {
            configuration,
            ..AcceptorState::unconfigured(cluster())
        };
        self.restart(safekeeper, 0);
    }

    /// The process is gone, and its connections; what it answered before may still be heard.
    fn hang_up(&mut self, safekeeper: usize) {
        for server in 0..SERVERS {
            let link = self.world.links[server][safekeeper].edit();
            link.old = None;
            if !link.open {
                continue;
            }
            link.ended = true;
            link.requests.clear();
            if link.answers.is_empty() {
                self.disconnect(server, safekeeper);
                self.reconnect(server, safekeeper);
            }
        }
    }
}

/// The last `Persist` before the truncation it should follow.
fn history_first(actions: &mut Vec<AcceptorAction>) {
    let truncation = actions
        .iter()
        .position(|a| matches!(a, AcceptorAction::Truncate { .. }));
    let persist = actions
        .iter()
        .rposition(|a| matches!(a, AcceptorAction::Persist(_)));
    if let (Some(truncation), Some(persist)) = (truncation, persist)
        && truncation < persist
    {
        let history = actions.remove(persist);
        actions.insert(truncation, history);
    }
}

//! What a server's proposer asks for, carried out; and the WAL it pushes.
//!
//! This file stands where the extension's worker does. Everything that takes time there (the local
//! history's fsync, reading from a donor) is an event of its own here, so that anything can happen
//! in between.

use safekeeper_protocol::codec::encode_proposer_message;
use safekeeper_protocol::{Lsn, Proposer, ProposerAction, ProposerMessage, Term, WaitReason};
use safekeeper_wal::PAGE_SIZE;

use super::checker::Event as Fact;
use super::cluster::{Cluster, Event};
use super::faults::Mark;
use super::network::{NodeIdx, ServerIdx};
use super::postgres::{LocalHistory, Reading};

/// No record here is longer, page headers included.
const RECORD_LEN_MAX: u64 = 256 << 10;

impl Cluster {
    /// Runs `with` on the proposer, and carries out what it asks for.
    pub fn with_proposer(
        &mut self,
        idx: ServerIdx,
        with: impl FnOnce(&mut Proposer, u64, &mut Vec<ProposerAction>),
    ) {
        let now_ms = self.server_clock(idx);
        let Some(process) = &mut self.servers[idx].process else {
            return;
        };
        if process.won.is_some() {
            return;
        }
        let id = process.id;
        let mut actions = Vec::new();
        with(&mut process.proposer, now_ms, &mut actions);
        self.carry_out_all(idx, id, actions);
    }

    /// Carries out what a proposer asked for, as far as it lives, and sends what it can then.
    pub fn carry_out_all(&mut self, idx: ServerIdx, id: u64, actions: Vec<ProposerAction>) {
        for action in actions {
            if self.process_of(idx, id).is_none() {
                return;
            }
            self.carry_out(idx, action);
        }
        self.pump(idx);
        self.watch_change(idx);
        let now_ms = self.server_clock(idx);
        let Some(process) = self.process_of(idx, id) else {
            return;
        };
        let tick_ms = process.proposer.next_tick_ms(|_| true);
        if tick_ms < process.next_tick_ms {
            process.next_tick_ms = tick_ms;
            let in_ms = tick_ms.saturating_sub(now_ms).max(1);
            self.at(
                in_ms,
                Event::Tick {
                    server: idx,
                    proposer: id,
                },
            );
        }
    }

    pub fn carry_out(&mut self, idx: ServerIdx, action: ProposerAction) {
        self.say(|| format!("server {idx}: {action:?}"));
        let process = self.servers[idx]
            .process
            .as_mut()
            .expect("a running server acts");
        let id = process.id;
        match action {
            ProposerAction::Send { to, message } => self.send(idx, to.0, &message, &[]),
            ProposerAction::Disconnect { peer, .. } => {
                if let Some(connection) = process.connections[peer.0].take() {
                    self.server_closes(connection);
                }
                let in_ms = self.random.range(5..300);
                self.at(
                    in_ms,
                    Event::Dial {
                        server: idx,
                        peer: peer.0,
                    },
                );
            }
            ProposerAction::Compare {
                donor,
                term,
                begin_lsn,
                end_lsn,
            } => {
                let next = begin_lsn.max(self.servers[idx].data.base);
                let process = self.servers[idx]
                    .process
                    .as_mut()
                    .expect("a running server acts");
                process.reading = Some(Reading {
                    donor: donor.0,
                    term,
                    next,
                    end: end_lsn,
                    completes: false,
                });
                let in_ms = self.random.range(1..20);
                self.at(
                    in_ms,
                    Event::ReadDonor {
                        server: idx,
                        proposer: id,
                    },
                );
            }
            ProposerAction::Complete {
                donor,
                term,
                begin_lsn,
                end_lsn,
            } => {
                process.reading = Some(Reading {
                    donor: donor.0,
                    term,
                    next: begin_lsn,
                    end: end_lsn,
                    completes: true,
                });
                let in_ms = self.random.range(1..20);
                self.at(
                    in_ms,
                    Event::ReadDonor {
                        server: idx,
                        proposer: id,
                    },
                );
            }
            ProposerAction::PersistHistory {
                history,
                configuration,
            } => {
                self.servers[idx].data.next_history = Some(LocalHistory {
                    history,
                    configuration,
                    unled_from: None,
                });
                let in_ms = self.random.range(1..10);
                self.at(
                    in_ms,
                    Event::HistoryPersisted {
                        server: idx,
                        proposer: id,
                    },
                );
            }
            ProposerAction::Lead { term, start_lsn } => self.lead(idx, term, start_lsn),
            ProposerAction::Commit(lsn) => self.commit(idx, lsn),
            ProposerAction::Wait(reason) => self.wait(idx, &reason),
            ProposerAction::NothingToRecover => {
                let mut random = self.random.fork();
                self.unchecked
                    .extend(self.servers[idx].recover(&mut random));
                self.flush_later(idx);
                self.restart_worker(idx);
            }
            ProposerAction::Replay { end_lsn } => {
                process.replay_to = Some(end_lsn);
                self.replay(idx);
            }
            ProposerAction::Promote { tli, .. } => {
                process.promotes_to = Some(tli);
                let in_ms = [1, 20, 1000][self.random.below(3) as usize];
                let (server, proposer) = (idx, id);
                self.at(in_ms, Event::Promoted { server, proposer });
            }
            ProposerAction::Deposed { .. } => {
                self.tally.add(Mark::Deposed);
                if self.servers[idx].standby.is_some() {
                    return self.stop_promotion(idx);
                }
                // By its setting it shuts down, or lives on and can commit nothing.
                let process = self.servers[idx].process.as_ref().expect("looked up above");
                if process.wal.is_none() || self.random.chance(700) {
                    self.crash_server(idx);
                    let in_ms = self.random.range(100..3000);
                    self.at(in_ms, Event::StartServer { server: idx });
                }
            }
        }
    }

    pub fn lead(&mut self, idx: ServerIdx, term: Term, start_lsn: Lsn) {
        let process = self.servers[idx].process.as_ref().expect("it leads");
        if process.reign != process.id {
            // The start has won it, and the judge knows.
            self.note_change_of_others(idx);
            return self.tally.add(Mark::TermHandedOver);
        }
        self.note_promotion(idx);
        self.note_change_of_others(idx);
        self.n_elections += 1;
        if self.n_elections > 1 {
            self.tally.add(Mark::ElectedMoreThanOnce);
        }
        let held = self
            .nodes
            .iter()
            .filter_map(|node| Some(node.log()?.2))
            .max();
        let data = &self.servers[idx].data;
        if held.is_some_and(|held| held.is_valid() && held < data.end()) {
            self.tally.add(Mark::ExtraWal);
        }
        let process = self.servers[idx].process.as_ref().expect("it leads");
        let base = data.base;
        self.checker.observe(&Fact::Led {
            proposer: process.id,
            term,
            base,
            log: data.bytes(base, start_lsn),
        });
        if process.wal.is_none() {
            let process = self.servers[idx].process.as_mut().expect("it leads");
            process.won = process.proposer.hand_over();
            let proposer = process.id;
            // What it still has to say gets out, or not.
            if self.random.chance(500) {
                self.close_all(idx);
            }
            let in_ms = self.random.range(1..500);
            let server = idx;
            self.at(in_ms, Event::Recover { server, proposer });
        }
    }

    /// For the tally: is this reign one of those that come from a promotion?
    fn note_promotion(&mut self, idx: ServerIdx) {
        let server = &mut self.servers[idx];
        let process = server.process.as_ref().expect("it leads");
        let history = process.proposer.history();
        if history.newest_tli() > server.data.tli() {
            self.tally.add(Mark::LedAfterDeadPromotion);
        }
        if std::mem::take(&mut server.data.promoted_by_hand) {
            self.tally.add(Mark::PromotedByHandLed);
        }
        let first = history
            .entries()
            .iter()
            .filter(|entry| entry.tli == server.data.tli());
        if server.data.promotion > 0 && first.count() == 1 {
            self.n_promoted += 1;
            self.tally.add(Mark::Promoted);
            if self.n_promoted > 1 {
                self.tally.add(Mark::PromotedTwice);
            }
        }
    }

    /// Recovery ends and the server writes; then the worker comes, with the term that was won.
    pub fn recover(&mut self, idx: ServerIdx, proposer: u64) {
        let Some(process) = self.process_of(idx, proposer) else {
            return;
        };
        if process.wal.is_none() {
            let mut random = self.random.fork();
            self.unchecked
                .extend(self.servers[idx].recover(&mut random));
            self.flush_later(idx);
            let in_ms = [1, 10, 1000][self.random.below(3) as usize];
            let server = idx;
            return self.at(in_ms, Event::Recover { server, proposer });
        }
        self.close_all(idx);
        let (id, settings) = (self.next_proposer_id(), self.settings());
        let mut random = self.random.fork();
        let now_ms = self.server_clock(idx);
        let actions = self.servers[idx].start_worker(id, settings, &mut random, now_ms);
        self.say(|| format!("server {idx} hands its term over to its worker, proposer {id}"));
        self.carry_out_all(idx, id, actions);
        self.dial_all(idx);
    }

    pub fn commit(&mut self, idx: ServerIdx, lsn: Lsn) {
        let server = &mut self.servers[idx];
        let process = server.process.as_mut().expect("it commits");
        let (before, data) = (process.commit_lsn, &server.data);
        process.commit_lsn = lsn;
        // A standby that is promoted lacks some of what its term commits.
        let known;
        let (base, log) = if server.standby.is_some() {
            let history = process.proposer.history();
            let first = history.first().map_or(lsn, |first| first.start_lsn);
            let base = first.max(self.checker.committed_begin());
            known = self.checker.known(history, base, lsn);
            (
                base,
                known.as_deref().expect("somebody wrote what is committed"),
            )
        } else {
            (data.base, data.bytes(data.base, lsn))
        };
        self.checker.observe(&Fact::Committed {
            proposer: process.reign,
            history: process.proposer.history(),
            before,
            base,
            log,
        });
        self.tally.add(Mark::Committed);
    }

    pub fn wait(&mut self, idx: ServerIdx, reason: &WaitReason) {
        match reason {
            WaitReason::Rival { .. } => self.tally.add(Mark::RivalRespected),
            // The donor's disk has decayed, in a record that was compared before its last byte, and
            // with it the checksum, had come.
            WaitReason::BytesDiffer { .. } if self.nodes.iter().any(|node| node.is_lost) => {
                self.crash_server(idx);
                let in_ms = self.random.range(100..3000);
                self.at(in_ms, Event::StartServer { server: idx });
            }
            WaitReason::BytesDiffer { at } => {
                panic!("same_term_same_lsn_same_byte: server {idx} and its donor differ at {at}")
            }
            WaitReason::Diverged(_) => {
                // A standby holds committed WAL only. But a safekeeper may have greeted before it
                // became a member, and be behind by what it said then: the next greetings tell.
                if self.servers[idx].standby.is_some() {
                    return;
                }
                self.tally.add(Mark::Diverged);
                if self.servers[idx].data.promoted_by_hand {
                    self.tally.add(Mark::PromotedByHandRefused);
                }
                let process = self.servers[idx].process.as_ref().expect("it waits");
                if process.wal.is_none() {
                    // FATAL, and the advice to rejoin as a standby.
                    self.crash_server(idx);
                    self.servers[idx].is_given_up = true;
                }
            }
            _ => {}
        }
    }

    pub fn history_persisted(&mut self, idx: ServerIdx, proposer: u64) {
        if self.process_of(idx, proposer).is_none() {
            return;
        }
        if let Some(next) = self.servers[idx].data.next_history.take() {
            self.servers[idx].data.history = next;
            self.with_proposer(idx, |proposer, now_ms, out| {
                proposer.on_history_persisted(now_ms, out)
            });
        }
    }

    /// Sends WAL to whoever takes it.
    pub fn pump(&mut self, idx: ServerIdx) {
        self.tell_inserted(idx);
        let connections = self.servers[idx]
            .process
            .as_ref()
            .map(|p| p.connections.len());
        for peer in 0..connections.unwrap_or_default() {
            while self.push_one(idx, peer) {}
        }
    }

    /// What was inserted in this reign is WAL of its term, sent or not: a safekeeper may hold the
    /// zeros behind a switch record before they come, since its segments are zeroed.
    fn tell_inserted(&mut self, idx: ServerIdx) {
        let server = &mut self.servers[idx];
        let end = server.data.end();
        let Some(process) = server.process.as_mut() else {
            return;
        };
        if !process.proposer.is_leading() || end <= process.told_lsn {
            return;
        }
        let begin = process.told_lsn.max(server.data.base);
        process.told_lsn = end;
        // Who asked nobody can't know what is taken, as long as the quorum does not know either.
        if !server.data.by_hand || process.commit_lsn.is_valid() {
            self.checker.observe(&Fact::WroteOn {
                tli: server.data.tli(),
                promotion: server.data.promotion,
            });
        }
        self.checker.observe(&Fact::Holds {
            whose: &format!("server {idx}"),
            history: process.proposer.history(),
            begin,
            bytes: server.data.bytes(begin, end),
        });
    }

    pub fn send(&mut self, idx: ServerIdx, peer: usize, message: &ProposerMessage, wal: &[u8]) {
        let Some(process) = &self.servers[idx].process else {
            return;
        };
        let Some(id) = process.connections[peer] else {
            return;
        };
        self.remember_configuration(message);
        let mut bytes = Vec::new();
        encode_proposer_message(message, &mut bytes);
        let header_len = bytes.len();
        bytes.extend_from_slice(wal);
        if let ProposerMessage::Append(append) = message
            && self.damages_next_append
            && append.len > 0
        {
            let at = self.random.below(wal.len() as u64);
            let lsn = append.begin_lsn + at;
            if self.is_checked(lsn) && !self.may_be_leading_rest(peer, lsn) {
                self.damages_next_append = false;
                bytes[header_len + at as usize] ^= 1 << self.random.below(8);
            }
        }
        let in_ms = self.latency(id);
        let Some(connection) = self.network.connections.get_mut(&id) else {
            return;
        };
        let arrives_ms = connection.to_node.send(self.now_ms + in_ms, bytes);
        self.at_ms(arrives_ms, Event::ToNode { connection: id });
    }

    /// Where a learner's log begins there may be the rest of a record whose beginning it will never
    /// have. No checksum that it could compute covers that.
    fn may_be_leading_rest(&self, node: NodeIdx, lsn: Lsn) -> bool {
        let log = self.nodes[node].log();
        log.is_none_or(|(_, oldest, _)| lsn < oldest + RECORD_LEN_MAX)
    }

    /// Is a flipped bit at this place certain to be noticed? Not in the flags of a page header, one
    /// of which means nothing to us.
    pub fn is_checked(&self, lsn: Lsn) -> bool {
        !matches!(lsn.segment_offset(PAGE_SIZE), 2 | 3)
            && !self.unchecked.iter().any(|range| range.contains(&lsn))
    }
}

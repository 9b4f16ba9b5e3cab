//! What a server's proposer asks for, carried out; and the WAL it pushes.
//!
//! This file stands where the extension's worker does. Everything that takes time there (the local
//! history's fsync, reading from a donor) is an event of its own here, so that anything can happen
//! in between.

use safekeeper_protocol::codec::encode_proposer_message;
use safekeeper_protocol::{
    Compared, Completed, Lsn, PeerIdx, Proposer, ProposerAction, ProposerMessage, Read, Term,
    WaitReason,
};
use safekeeper_wal::PAGE_SIZE;

use super::checker::Event as Fact;
use super::cluster::{Cluster, Event};
use super::faults::Mark;
use super::network::ServerIdx;
use super::node::{NotRead, Outcome};
use super::postgres::{LocalHistory, Reading};

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
            ProposerAction::Replay { .. } | ProposerAction::Promote { .. } => {
                unreachable!("no server is a standby")
            }
            ProposerAction::StandAgain => self.restart_worker(idx),
            ProposerAction::Deposed { .. } => {
                self.tally.add(Mark::Deposed);
                // By its setting it shuts down, or lives on and can commit nothing.
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
            return self.tally.add(Mark::TermHandedOver);
        }
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
        let (id, settings) = (self.next_proposer_id(), self.settings);
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
        self.checker.observe(&Fact::Committed {
            proposer: process.reign,
            term: process.proposer.term(),
            before,
            base: data.base,
            log: data.bytes(data.base, lsn),
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
                self.tally.add(Mark::Diverged);
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

    /// Reads the next stretch from the donor.
    pub fn read_donor(&mut self, idx: ServerIdx, proposer: u64) {
        let random_len = self.random.range(1..100_000) as u32;
        let Some(process) = self.process_of(idx, proposer) else {
            return;
        };
        let Some(mut reading) = process.reading.take() else {
            return;
        };
        let version = process.proposer.configuration().version;
        if reading.next < reading.end {
            let left = (reading.end - reading.next).min(1 << 20) as u32;
            let read = Read {
                configuration_version: version,
                term: reading.term,
                begin_lsn: reading.next,
                len: left.min(random_len),
            };
            let donor = &mut self.nodes[reading.donor];
            let reachable = donor.is_up()
                && donor.stopped_until_ms <= self.now_ms
                && self.network.is_open(idx, reading.donor);
            let answer = if reachable {
                donor.read(read)
            } else {
                Outcome::Done(Err(NotRead::Failed))
            };
            let bytes = match answer {
                Outcome::Done(Ok(bytes)) => bytes,
                // What the donor has removed can't be compared.
                Outcome::Done(Err(NotRead::Removed { oldest_lsn })) if !reading.completes => {
                    reading.next = oldest_lsn.min(reading.end);
                    self.process_of(idx, proposer)
                        .expect("looked up above")
                        .reading = Some(reading);
                    return self.at(
                        1,
                        Event::ReadDonor {
                            server: idx,
                            proposer,
                        },
                    );
                }
                Outcome::Done(Err(_)) => return self.donor_failed(idx, &reading),
                Outcome::Died => {
                    self.node_died(reading.donor);
                    return self.donor_failed(idx, &reading);
                }
            };
            let end = reading.next + bytes.len() as u64;
            let data = &mut self.servers[idx].data;
            if reading.completes {
                data.complete(&bytes);
            } else if data.bytes(reading.next, end) != bytes {
                let at = reading.next;
                let outcome = Compared::Differs { at };
                return self.with_proposer(idx, |proposer, now_ms, out| {
                    proposer.on_compared(outcome, now_ms, out)
                });
            }
            reading.next = end;
            let process = self.process_of(idx, proposer).expect("looked up above");
            process.reading = Some(reading);
            let in_ms = self.random.range(1..10);
            return self.at(
                in_ms,
                Event::ReadDonor {
                    server: idx,
                    proposer,
                },
            );
        }
        if reading.completes {
            self.tally.add(Mark::CompletedFromQuorum);
            self.with_proposer(idx, |proposer, now_ms, out| {
                proposer.on_completed(Completed::Whole, now_ms, out)
            });
        } else {
            self.with_proposer(idx, |proposer, now_ms, out| {
                proposer.on_compared(Compared::Equal, now_ms, out)
            });
        }
    }

    pub fn donor_failed(&mut self, idx: ServerIdx, reading: &Reading) {
        self.say(|| format!("server {idx} can't read from its donor"));
        if reading.completes {
            // What has been read so far is WAL like any other.
            self.servers[idx].data.find_end();
            let outcome = Completed::Partly {
                end_lsn: self.servers[idx].data.end(),
                reason: "the donor failed".into(),
            };
            self.with_proposer(idx, |proposer, now_ms, out| {
                proposer.on_completed(outcome, now_ms, out)
            });
        } else {
            let outcome = Compared::Unavailable {
                reason: "the donor failed".into(),
            };
            self.with_proposer(idx, |proposer, now_ms, out| {
                proposer.on_compared(outcome, now_ms, out)
            });
        }
    }

    /// Sends WAL to whoever takes it.
    pub fn pump(&mut self, idx: ServerIdx) {
        self.tell_inserted(idx);
        for peer in 0..self.settings.n_nodes {
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
        self.checker.observe(&Fact::Holds {
            whose: &format!("server {idx}"),
            history: process.proposer.history(),
            begin,
            bytes: server.data.bytes(begin, end),
        });
    }

    pub fn push_one(&mut self, idx: ServerIdx, peer: usize) -> bool {
        let now_ms = self.server_clock(idx);
        let mut wal = self.servers[idx].local_wal();
        let Some(process) = &mut self.servers[idx].process else {
            return false;
        };
        let Some(id) = process.connections[peer] else {
            return false;
        };
        // A socket takes only so much.
        let in_flight = self
            .network
            .connections
            .get(&id)
            .map_or(0, |c| c.to_node.messages.len());
        if in_flight > 8 {
            return false;
        }
        if let Some(next) = process.proposer.next_lsn(PeerIdx(peer)) {
            wal.end_lsn = wal.end_lsn.min(next + process.append_len_max);
        }
        let Some(append) = process.proposer.next_append(PeerIdx(peer), wal, now_ms) else {
            return false;
        };
        let end = append.begin_lsn + u64::from(append.len);
        let bytes = self.servers[idx].data.bytes(append.begin_lsn, end).to_vec();
        self.send(idx, peer, &ProposerMessage::Append(append), &bytes);
        append.len > 0
    }

    pub fn send(&mut self, idx: ServerIdx, peer: usize, message: &ProposerMessage, wal: &[u8]) {
        let Some(process) = &self.servers[idx].process else {
            return;
        };
        let Some(id) = process.connections[peer] else {
            return;
        };
        let mut bytes = Vec::new();
        encode_proposer_message(message, &mut bytes);
        let header_len = bytes.len();
        bytes.extend_from_slice(wal);
        if let ProposerMessage::Append(append) = message
            && self.damages_next_append
            && append.len > 0
        {
            let at = self.random.below(wal.len() as u64);
            if self.is_checked(append.begin_lsn + at) {
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

    /// Is a flipped bit at this place certain to be noticed? Not in the flags of a page header, one
    /// of which means nothing to us.
    pub fn is_checked(&self, lsn: Lsn) -> bool {
        !matches!(lsn.segment_offset(PAGE_SIZE), 2 | 3)
            && !self.unchecked.iter().any(|range| range.contains(&lsn))
    }
}

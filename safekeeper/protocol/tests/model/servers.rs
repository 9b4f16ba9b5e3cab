//! Postgres as the model plays it: start, crash, insert; and the worker, which does what the
//! proposer asks for.
//!
//! The local log may lose at a crash whatever was not certainly flushed, though it was pushed. A
//! task of the host (compare, complete, persist) is done at once, or in a step of its own where the
//! scope says that the host is slow; a crash then finds it undone.
//!
//! A deposed server's worker ends. Only a start of the server brings another.

use safekeeper_protocol::mutation::Mutation;
use safekeeper_protocol::*;

use super::scope::{Scope, cluster};
use super::standby::timeline_files;
use super::step::{NOW_MS, Run};
use super::world::*;

impl Run<'_> {
    /// The postmaster's, or one of a worker alone; then perhaps with the term that the start won.
    pub fn start(&mut self, server: usize) {
        let scope = self.scope;
        if let Some(won) = self.world.servers[server].won.clone() {
            return self.go_on_with(server, won);
        }
        let is_first = !self.world.servers[server].up;
        if is_first && scope.breaks(Mutation::ElectionBeforeRecoverySkipped) {
            // Recovery ends with a record of its own.
            self.world.servers[server].edit().up = true;
            let end = self.world.servers[server].entries.len() + 1;
            self.insert_up_to(server, end);
        }
        let node = self.world.servers[server].edit();
        let standing = if node.up {
            Standing::Running
        } else {
            node.flushed = node.entries.len();
            Standing::BeforeRecovery
        };
        let by_the_file = is_first && scope.breaks(Mutation::TermFromHistoryFile);
        match node.history.last().filter(|_| by_the_file) {
            Some(last) => {
                let won = WonTerm {
                    term: last.term,
                    history: node.history.clone(),
                    configuration: node.configuration.clone(),
                    sent_lsn: Lsn::INVALID,
                };
                self.begin_elected(server, won);
            }
            None => self.begin_proposer(server, standing),
        }
    }

    /// Recovery is over, and the worker takes over the term that was won before it: once.
    fn go_on_with(&mut self, server: usize, won: WonTerm) {
        let node = self.world.servers[server].edit();
        (node.won, node.up) = (None, true);
        self.handed_over = Some(won.term);
        self.scope.seen.handed_over.count();
        self.begin_elected(server, won);
        self.handed_over = None;
    }

    pub fn begin_proposer(&mut self, server: usize, standing: Standing) {
        let scope = self.scope;
        let node = self.world.servers[server].edit();
        node.starts += u8::from(scope.fresh_seeds);
        let (settings, local) = (settings(server, node), local_log(scope, node));
        node.proposer = Some(Proposer::new(settings, local, standing, NOW_MS));
        self.connect_all(server);
    }

    fn begin_elected(&mut self, server: usize, won: WonTerm) {
        let scope = self.scope;
        let node = self.world.servers[server].edit();
        node.starts += u8::from(scope.fresh_seeds);
        let (settings, local) = (settings(server, node), local_log(scope, node));
        let mut actions = Vec::new();
        let proposer = Proposer::elected(settings, local, won, NOW_MS, &mut actions);
        node.proposer = Some(proposer);
        for action in actions {
            self.carry_out(server, action);
        }
        self.connect_all(server);
    }

    fn connect_all(&mut self, server: usize) {
        for safekeeper in self.world.servers[server].list.clone() {
            self.connect(server, safekeeper);
        }
    }

    pub fn stop_worker(&mut self, server: usize) {
        let node = self.world.servers[server].edit();
        node.proposer = None;
        node.task = None;
        for safekeeper in 0..SAFEKEEPERS {
            self.give_up(server, safekeeper);
        }
    }

    pub fn insert_up_to(&mut self, server: usize, end: usize) {
        let node = self.world.servers[server].edit();
        let writer = Writer {
            server: server as u8,
            run: node.run,
        };
        while node.entries.len() < end {
            node.entries.push(writer);
        }
    }

    pub fn stop_server(&mut self, server: usize, kept: usize) {
        self.stop_worker(server);
        let node = self.world.servers[server].edit();
        (node.up, node.deposed, node.won) = (false, false, None);
        node.run += 1;
        node.entries.truncate(kept);
        node.flushed = kept;
    }

    // ---- its worker -----------------------------------------------------------------------

    /// Let the proposer act, then do what it asks for.
    pub fn drive(
        &mut self,
        server: usize,
        act: impl FnOnce(&mut Proposer, &mut Vec<ProposerAction>),
    ) {
        let mut actions = Vec::new();
        if let Some(proposer) = &mut self.world.servers[server].edit().proposer {
            act(proposer, &mut actions);
        }
        for action in actions {
            // The worker may have ended in between.
            if self.world.servers[server].proposer.is_some() {
                self.carry_out(server, action);
            }
        }
        if !self.scope.slow_host && self.world.servers[server].task.is_some() {
            self.work(server);
        }
    }

    pub fn carry_out(&mut self, server: usize, action: ProposerAction) {
        let safekeeper_of = |run: &Run, peer: PeerIdx| run.world.servers[server].list[peer.0];
        let task = match action {
            ProposerAction::Send { to, message } => {
                let safekeeper = safekeeper_of(self, to);
                let link = &mut self.world.links[server][safekeeper];
                if link.open && !link.ended {
                    link.edit().requests.push_back((message, Vec::new()));
                }
                return;
            }
            ProposerAction::Disconnect { peer, .. } => {
                let safekeeper = safekeeper_of(self, peer);
                self.disconnect(server, safekeeper);
                return self.reconnect(server, safekeeper);
            }
            ProposerAction::Lead { term, .. } => return self.lead(server, term),
            ProposerAction::Commit(lsn) => return self.commit(server, place(lsn)),
            ProposerAction::Deposed { .. } => {
                self.stop_worker(server);
                let node = self.world.servers[server].edit();
                // A standby has lost nothing by it.
                node.deposed = !node.standby;
                return;
            }
            ProposerAction::Wait(reason) => {
                let refuses = matches!(reason, WaitReason::Diverged(_) | WaitReason::Membership(_));
                if refuses && self.scope.has_one_rightful_server() {
                    self.world.accuse(Violation::LockedOut);
                }
                return;
            }
            ProposerAction::NothingToRecover => {
                self.stop_worker(server);
                self.world.servers[server].edit().up = true;
                return self.start(server);
            }
            ProposerAction::Replay { end_lsn } => Task::Replay {
                end: place(end_lsn),
            },
            ProposerAction::Promote { tli, .. } => Task::Promote { tli: tli.0 },
            ProposerAction::Compare {
                donor,
                term,
                begin_lsn,
                end_lsn,
            } => Task::Compare {
                donor: safekeeper_of(self, donor),
                term,
                begin: place(begin_lsn),
                end: place(end_lsn),
            },
            ProposerAction::Complete {
                donor,
                term,
                begin_lsn,
                end_lsn,
            } => Task::Complete {
                donor: safekeeper_of(self, donor),
                term,
                begin: place(begin_lsn),
                end: place(end_lsn),
            },
            ProposerAction::PersistHistory {
                history,
                configuration,
            } => Task::Persist {
                history,
                configuration,
            },
        };
        self.world.servers[server].edit().task = Some(task);
    }

    pub fn work(&mut self, server: usize) {
        let Some(task) = self.world.servers[server].edit().task.take() else {
            return;
        };
        match task {
            Task::Compare {
                donor,
                term,
                begin,
                end,
            } => {
                let theirs = &self.world.safekeepers[donor];
                let ours = &self.world.servers[server].entries;
                // A read is answered only in the term it was asked in (W4).
                let outcome = if theirs.acceptor.term() != term || theirs.flushed < end {
                    Compared::Unavailable {
                        reason: String::new(),
                    }
                } else if ours[begin..end] != theirs.entries[begin..end] {
                    if !self.scope.bytes_may_differ {
                        self.world.accuse(Violation::OtherBytes);
                    }
                    Compared::Differs { at: lsn(begin) }
                } else {
                    Compared::Equal
                };
                self.drive(server, |proposer, out| {
                    proposer.on_compared(outcome, NOW_MS, out)
                });
            }
            Task::Complete {
                donor,
                term,
                begin,
                end,
            } => {
                let theirs = &self.world.safekeepers[donor];
                if theirs.acceptor.term() != term || theirs.flushed < end {
                    let outcome = Completed::Partly {
                        end_lsn: lsn(begin),
                        reason: String::new(),
                    };
                    return self.drive(server, |proposer, out| {
                        proposer.on_completed(outcome, NOW_MS, out)
                    });
                }
                let missing = theirs.entries[begin..end].to_vec();
                self.scope.seen.completed.count();
                let node = self.world.servers[server].edit();
                node.entries.extend(missing);
                node.task = Some(Task::Completed);
                if !self.scope.slow_host {
                    self.work(server);
                }
            }
            Task::Completed => {
                let node = self.world.servers[server].edit();
                node.flushed = node.entries.len();
                self.drive(server, |proposer, out| {
                    proposer.on_completed(Completed::Whole, NOW_MS, out)
                });
            }
            Task::Persist {
                history,
                configuration,
            } => {
                let node = self.world.servers[server].edit();
                (node.history, node.configuration) = (history, configuration);
                node.unled_from = None;
                if node.proposer.as_ref().is_some_and(Proposer::is_leading) {
                    self.scope.seen.reconfigured.count();
                }
                self.drive(server, |proposer, out| {
                    proposer.on_history_persisted(NOW_MS, out)
                });
            }
            Task::Replay { end } if self.world.servers[server].entries.len() != end => {
                self.world.servers[server].edit().task = Some(task);
            }
            Task::Replay { .. } => {
                self.drive(server, |proposer, out| proposer.on_replayed(out));
            }
            Task::Promote { tli } => self.leave_recovery(server, tli),
            Task::Promoted { tli, switch } => self.tell_promoted(server, tli, switch),
        }
    }

    pub fn lead(&mut self, server: usize, term: Term) {
        if self.handed_over == Some(term) {
            return;
        }
        let bit = 1 << term.0;
        if self.world.observed.led & bit != 0 {
            self.world.accuse(Violation::TwoLeaders);
        }
        self.world.observed.edit().led |= bit;
        self.scope.seen.led.count();
        let node = self.world.servers[server].edit();
        if self.scope.hands_over && !node.up {
            node.won = node.proposer.as_mut().and_then(Proposer::hand_over);
            return self.stop_worker(server);
        }
        node.up = true;
    }

    pub fn commit(&mut self, server: usize, end: usize) {
        let node = &self.world.servers[server];
        let Some(term) = node
            .proposer
            .as_ref()
            .map(|proposer| proposer.term().0 as usize)
        else {
            return;
        };
        let Some(ours) = self.entries_of_term(server, end) else {
            return self.world.accuse(Violation::CommittedChanged);
        };
        let committed = &self.world.observed.committed;
        let common = committed.len().min(end);
        if committed[..common] != ours[..common] {
            return self.world.accuse(Violation::CommittedChanged);
        }
        let observed = self.world.observed.edit();
        if end > observed.committed.len() {
            observed.committed = ours;
        }
        observed.committed_in[term] = observed.committed_in[term].max(end as u8);
        self.scope.seen.committed.count();
    }

    /// The log of this reign up to `end`: of the server, or, as long as it is a standby that has
    /// replayed less, of a safekeeper that follows it.
    fn entries_of_term(&self, server: usize, end: usize) -> Option<Entries> {
        let node = &self.world.servers[server];
        let proposer = node.proposer.as_ref()?;
        if let Some(entries) = node.entries.get(..end).filter(|_| !node.standby) {
            return Some(entries.to_vec());
        }
        let follows = |s: &&Shared<Safekeeper>| {
            s.acceptor.term() == proposer.term() && s.acceptor.history() == proposer.history()
        };
        let mut followers = self.world.safekeepers.iter().filter(follows);
        followers.find_map(|s| {
            Some(s.entries.get(..end.min(s.flushed))?.to_vec()).filter(|e| e.len() == end)
        })
    }

    /// One entry at a time, though a server would send all it has: a prefix is what may arrive. What
    /// a standby has not replayed comes from a donor.
    pub fn next_append(
        &mut self,
        server: usize,
        safekeeper: usize,
        entry: bool,
    ) -> Option<(Append, Entries)> {
        let node = &self.world.servers[server];
        let peer = node.peer(safekeeper);
        let proposer = node.proposer.as_ref()?;
        let next = place(proposer.next_lsn(peer)?);
        let end = next + usize::from(entry);
        let is_missing = node.standby && end > node.entries.len();
        let read = match proposer.donors_for(lsn(next)).first() {
            _ if !entry || !is_missing => None,
            donor => {
                let donor = &self.world.safekeepers[node.list[donor?.0]];
                // A read is answered only in the term it was asked in (W4).
                let answers = donor.acceptor.term() == proposer.term() && donor.flushed >= end;
                Some(donor.entries.get(next..end).filter(|_| answers)?.to_vec())
            }
        };
        if !node.standby {
            if end > self.scope.entries_max.max(node.entries.len()) {
                return None;
            }
            self.insert_up_to(server, end);
        }
        let node = self.world.servers[server].edit();
        let wal = LocalWal {
            end_lsn: lsn(end),
            flush_lsn: Lsn::INVALID,
        };
        let append = node.proposer.as_mut()?.next_append(peer, wal, NOW_MS)?;
        let entries = match append.len as usize {
            0 => Vec::new(),
            len => match read {
                Some(read) => read[..len].to_vec(),
                None => node.entries[next..next + len].to_vec(),
            },
        };
        Some((append, entries))
    }
}

fn settings(server: usize, node: &Server) -> ProposerSettings {
    let address = |&safekeeper: &usize| PeerAddress {
        host: String::new(),
        port: safekeeper as u16,
    };
    ProposerSettings {
        proposer_id: ProposerId(server as u128 + 1),
        cluster: cluster(),
        peers: node.list.iter().map(address).collect(),
        member_timeout_ms: 10_000,
        seed: 2 * (server as u64 * 100 + u64::from(node.starts)) + 1,
    }
}

/// By the insert position while the server writes, and by all that its history file says.
fn local_log(scope: &Scope, node: &Server) -> LocalLog {
    let by_flush = node.up && scope.breaks(Mutation::WorkerStandsByFlushLsn);
    let end = if by_flush {
        node.flushed
    } else {
        node.entries.len()
    };
    let history = if node.standby || scope.breaks(Mutation::NoLocalHistory) {
        TermHistory::default()
    } else {
        node.history.clone()
    };
    LocalLog {
        history,
        tli: Tli(node.tli),
        end_lsn: lsn(end),
        unled_from: node.unled_from.map(lsn),
        timeline_files: timeline_files(node.tli),
        configuration: node.configuration.clone(),
    }
}

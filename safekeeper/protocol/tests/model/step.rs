//! What can happen next, and what comes of it: the model's daemon, extension and network.
//!
//! A request is handed over, handled, and answered in one step, and the answer heard in the same
//! one; a `late` step leaves it on its way. Requests wait as long as they like. How many answers and
//! appends may be on their way while other things happen, at a time, is the scope's to say.
//!
//! Postgres and the daemon are played as `action.rs` demands: actions in order, nothing after a
//! `Persist` or `Truncate` before that one is on disk. [`Step::DieWithin`] cuts such a list short.
//! [`Mutation`]s break this contract, one promise each, to show that the properties notice.

use safekeeper_protocol::*;

use super::scope::{Mutation, Scope};
use super::world::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A worker begins; before recovery if the server is down.
    Start {
        server: usize,
    },
    /// The worker dies; by now backends have inserted up to `inserted`.
    CrashWorker {
        server: usize,
        inserted: usize,
    },
    /// The log ends at `kept` after it: a part of the unflushed entries is lost, or entries were
    /// inserted that nobody was sent.
    CrashServer {
        server: usize,
        kept: usize,
    },
    /// The time that the proposer waits for has come.
    Tick {
        server: usize,
    },
    /// The host does what it was asked to.
    Work {
        server: usize,
    },
    /// The oldest request is handled.
    Deliver {
        server: usize,
        safekeeper: usize,
        late: bool,
    },
    /// A late answer arrives.
    Hear {
        server: usize,
        safekeeper: usize,
    },
    /// One entry is sent, or the news of a commit; and handled at once unless `late`. A server
    /// inserts an entry when it is about to be sent, or dies: nobody sees the difference.
    Push {
        server: usize,
        safekeeper: usize,
        entry: bool,
        late: bool,
    },
    /// The oldest request of a connection that the server has given up is handled.
    DeliverOld {
        server: usize,
        safekeeper: usize,
    },
    Cut {
        server: usize,
        safekeeper: usize,
    },
    /// The server learns that the safekeeper has ended the connection.
    Notice {
        server: usize,
        safekeeper: usize,
    },
    Flush {
        safekeeper: usize,
        late: bool,
    },
    /// kill -9 and restart. The first `kept` entries have survived: at least the flushed ones.
    CrashSafekeeper {
        safekeeper: usize,
        kept: usize,
    },
    /// The same, while a request is handled, after `done` things that reach the disk.
    DieWithin {
        server: usize,
        safekeeper: usize,
        done: usize,
    },
    Wipe {
        safekeeper: usize,
    },
}

/// Times are forgotten after each step, so it is always the first moment; but for a greeting it is
/// always later than any `member_timeout`: rivals are worst when they are believed dead.
const NOW_MS: u64 = 0;
const LONG_AFTER_MS: u64 = u64::MAX;

/// Steps worth trying; one that comes to nothing is dropped by [`apply`].
pub fn enabled(scope: &Scope, world: &World, steps: &mut Vec<Step>) {
    let may_be_late = n_late(world) < scope.late_max;
    for server in 0..SERVERS {
        of_server(scope, world, server, steps);
        for safekeeper in 0..SAFEKEEPERS {
            of_link(world, server, safekeeper, may_be_late, steps);
        }
    }
    for (safekeeper, node) in world.safekeepers.iter().enumerate() {
        if node.acceptor.needs_flush() {
            steps.push(Step::Flush {
                safekeeper,
                late: false,
            });
            if may_be_late {
                steps.push(Step::Flush {
                    safekeeper,
                    late: true,
                });
            }
        }
        if world.faults.safekeeper_crashes > 0 {
            let written = node.entries.len();
            steps.extend(
                (node.flushed..=written).map(|kept| Step::CrashSafekeeper { safekeeper, kept }),
            );
        }
        if world.faults.wipes > 0 {
            steps.push(Step::Wipe { safekeeper });
        }
    }
}

fn of_server(scope: &Scope, world: &World, server: usize, steps: &mut Vec<Step>) {
    let node = &world.servers[server];
    let inserted = node.entries.len();
    let inserted_max = if node.up {
        scope.entries_max.max(inserted)
    } else {
        inserted
    };
    if world.faults.server_crashes > 0 && (node.proposer.is_some() || node.deposed) {
        steps.extend((node.flushed..=inserted_max).map(|kept| Step::CrashServer { server, kept }));
    }
    let Some(proposer) = &node.proposer else {
        if !node.deposed && server < scope.n_servers {
            steps.push(Step::Start { server });
        }
        return;
    };
    if node.task.is_some() {
        steps.push(Step::Work { server });
    }
    match proposer.state_name() {
        "leading" | "completing" | "persisting" => {}
        "waiting" => steps.push(Step::Tick { server }),
        _ if world.faults.timeouts > 0 => steps.push(Step::Tick { server }),
        _ => {}
    }
    if world.faults.worker_crashes > 0 && node.up {
        steps.extend(
            (inserted..=inserted_max).map(|inserted| Step::CrashWorker { server, inserted }),
        );
    }
}

/// Answers and appends on their way, on connections that both sides have open.
fn n_late(world: &World) -> usize {
    let is_append =
        |(message, _): &&(ProposerMessage, Entries)| matches!(message, ProposerMessage::Append(_));
    let of_link =
        |link: &Shared<Link>| link.answers.len() + link.requests.iter().filter(is_append).count();
    world.links.iter().flatten().map(of_link).sum()
}

fn of_link(
    world: &World,
    server: usize,
    safekeeper: usize,
    may_be_late: bool,
    steps: &mut Vec<Step>,
) {
    let link = &world.links[server][safekeeper];
    if link.old.is_some() {
        steps.push(Step::DeliverOld { server, safekeeper });
    }
    if !link.open {
        return;
    }
    if !link.answers.is_empty() {
        steps.push(Step::Hear { server, safekeeper });
    }
    if link.ended {
        return steps.push(Step::Notice { server, safekeeper });
    }
    if world.faults.cuts > 0 {
        steps.push(Step::Cut { server, safekeeper });
    }
    // What stands behind a late answer is late too.
    let may_be_prompt = link.answers.is_empty();
    let mut either = |step: fn(usize, usize, bool) -> Step| {
        if may_be_prompt {
            steps.push(step(server, safekeeper, false));
        }
        if may_be_late {
            steps.push(step(server, safekeeper, true));
        }
    };
    let Some((message, _)) = link.requests.front() else {
        let node = &world.servers[server];
        let follows = |proposer: &Proposer| {
            let peer = node.list.iter().position(|&listed| listed == safekeeper);
            peer.is_some_and(|peer| proposer.next_lsn(PeerIdx(peer)).is_some())
        };
        if node.proposer.as_ref().is_some_and(follows) {
            either(|server, safekeeper, late| Step::Push {
                server,
                safekeeper,
                entry: true,
                late,
            });
            either(|server, safekeeper, late| Step::Push {
                server,
                safekeeper,
                entry: false,
                late,
            });
        }
        return;
    };
    either(|server, safekeeper, late| Step::Deliver {
        server,
        safekeeper,
        late,
    });
    if world.faults.safekeeper_crashes > 0 {
        // What it takes to the disk, at most.
        let n_durable = match message {
            ProposerMessage::Configure(_) | ProposerMessage::VoteRequest(_) => 1,
            ProposerMessage::Elected(_) => 3,
            ProposerMessage::Greeting(_)
            | ProposerMessage::Append(_)
            | ProposerMessage::Read(_) => 0,
        };
        steps.extend((1..=n_durable).map(|done| Step::DieWithin {
            server,
            safekeeper,
            done,
        }));
    }
}

/// `None` if nothing comes of the step, or if it leads out of the scope.
pub fn apply(scope: &Scope, world: &World, step: Step) -> Option<World> {
    let mut next = Run {
        scope,
        world: world.clone(),
        held: [[false; SAFEKEEPERS]; SERVERS],
        carried_out: 0,
    };
    next.hold_what_is_late(world);
    next.take(step)?;
    next.settle(step)?;
    next.drop_old_news();
    let within = next
        .world
        .safekeepers
        .iter()
        .all(|s| s.acceptor.term().0 <= scope.term_max)
        && next
            .world
            .servers
            .iter()
            .flat_map(|s| &s.proposer)
            .all(|p| p.term().0 <= scope.term_max);
    if !within {
        return None;
    }
    commits_go_forward(world, &mut next.world, step);
    next.world.seal(&scope.pools);
    Some(next.world)
}

/// Of a running process; a restart may take back what was not persisted (W10).
fn commits_go_forward(before: &World, after: &mut World, step: Step) {
    let back = (0..SAFEKEEPERS).any(|i| {
        let restarted = match step {
            Step::CrashSafekeeper { safekeeper, .. }
            | Step::DieWithin { safekeeper, .. }
            | Step::Wipe { safekeeper } => safekeeper == i,
            _ => false,
        };
        let (before, after) = (
            &before.safekeepers[i].acceptor,
            &after.safekeepers[i].acceptor,
        );
        !restarted && after.commit_lsn() < before.commit_lsn()
    });
    let back = back
        || (0..SERVERS).any(
            |i| match (&before.servers[i].proposer, &after.servers[i].proposer) {
                (Some(before), Some(after)) => {
                    before.term() == after.term() && after.commit_lsn() < before.commit_lsn()
                }
                _ => false,
            },
        );
    if back {
        after.accuse(Violation::CommitWentBack);
    }
}

/// A step being taken.
struct Run<'a> {
    scope: &'a Scope,
    world: World,
    /// Links whose answers are not heard in this step.
    held: [[bool; SAFEKEEPERS]; SERVERS],
    /// Things that reached a disk while the last request was handled.
    carried_out: usize,
}

impl Run<'_> {
    fn take(&mut self, step: Step) -> Option<()> {
        match step {
            Step::Start { server } => self.start(server),
            Step::CrashWorker { server, inserted } => {
                self.world.faults.worker_crashes -= 1;
                self.insert_up_to(server, inserted);
                self.stop_worker(server);
            }
            Step::CrashServer { server, kept } => {
                self.world.faults.server_crashes -= 1;
                self.insert_up_to(server, kept);
                self.stop_server(server, kept);
            }
            Step::Tick { server } => {
                let proposer = self.world.servers[server].proposer.as_ref();
                if proposer.is_some_and(|proposer| proposer.state_name() != "waiting") {
                    self.world.faults.timeouts -= 1;
                }
                self.drive(server, |proposer, out| proposer.on_tick(NOW_MS, out));
            }
            Step::Work { server } => self.work(server),
            Step::Deliver {
                server,
                safekeeper,
                late,
            } => {
                let (message, entries) = self.world.links[server][safekeeper]
                    .edit()
                    .requests
                    .pop_front()?;
                self.held[server][safekeeper] |= late;
                self.hand_over(server, safekeeper, &message, &entries);
            }
            Step::Hear { server, safekeeper } => {
                let answer = self.world.links[server][safekeeper]
                    .edit()
                    .answers
                    .pop_front()?;
                self.hear(server, safekeeper, &answer);
            }
            Step::Push {
                server,
                safekeeper,
                entry,
                late,
            } => {
                let (append, entries) = self.next_append(server, safekeeper, entry)?;
                let message = ProposerMessage::Append(append);
                if late {
                    self.world.links[server][safekeeper]
                        .edit()
                        .requests
                        .push_back((message, entries));
                } else {
                    self.hand_over(server, safekeeper, &message, &entries);
                }
            }
            Step::DeliverOld { server, safekeeper } => self.deliver_old(server, safekeeper),
            Step::Cut { server, safekeeper } => {
                self.world.faults.cuts -= 1;
                self.disconnect(server, safekeeper);
                self.reconnect(server, safekeeper);
            }
            Step::Notice { server, safekeeper } => {
                self.disconnect(server, safekeeper);
                self.reconnect(server, safekeeper);
            }
            Step::Flush { safekeeper, late } => {
                let leader = self.flush(safekeeper);
                match leader {
                    Some(server) => self.held[server][safekeeper] |= late,
                    None if late => return None,
                    None => {}
                }
            }
            Step::CrashSafekeeper { safekeeper, kept } => {
                self.world.faults.safekeeper_crashes -= 1;
                self.restart(safekeeper, kept);
            }
            Step::DieWithin {
                server,
                safekeeper,
                done,
            } => {
                self.world.faults.safekeeper_crashes -= 1;
                let (message, entries) = self.world.links[server][safekeeper]
                    .edit()
                    .requests
                    .pop_front()?;
                self.die_within(server, safekeeper, &message, &entries, done)?;
            }
            Step::Wipe { safekeeper } => {
                self.world.faults.wipes -= 1;
                self.wipe(safekeeper);
            }
        }
        Some(())
    }

    // ---- servers --------------------------------------------------------------------------

    fn start(&mut self, server: usize) {
        let scope = self.scope;
        let node = self.world.servers[server].edit();
        node.starts += u8::from(scope.fresh_seeds);
        let standing = if node.up {
            Standing::Running
        } else {
            Standing::BeforeRecovery
        };
        if !node.up {
            node.flushed = node.entries.len();
        }
        let local = LocalLog {
            history: node.history.clone(),
            tli: Tli(1),
            end_lsn: lsn(node.entries.len()),
            unled_from: None,
            timeline_files: Vec::new(),
            configuration: node.configuration.clone(),
        };
        let address = |&safekeeper: &usize| PeerAddress {
            host: String::new(),
            port: safekeeper as u16,
        };
        let settings = ProposerSettings {
            proposer_id: ProposerId(server as u128 + 1),
            cluster: super::scope::cluster(),
            peers: node.list.iter().map(address).collect(),
            member_timeout_ms: 10_000,
            seed: 2 * (server as u64 * 100 + u64::from(node.starts)) + 1,
        };
        node.proposer = Some(Proposer::new(settings, local, standing, NOW_MS));
        for safekeeper in node.list.clone() {
            self.connect(server, safekeeper);
        }
    }

    fn stop_worker(&mut self, server: usize) {
        let node = self.world.servers[server].edit();
        node.proposer = None;
        node.task = None;
        for safekeeper in 0..SAFEKEEPERS {
            self.give_up(server, safekeeper);
        }
    }

    fn insert_up_to(&mut self, server: usize, end: usize) {
        let node = self.world.servers[server].edit();
        let writer = Writer {
            server: server as u8,
            run: node.run,
        };
        while node.entries.len() < end {
            node.entries.push(writer);
        }
    }

    fn stop_server(&mut self, server: usize, kept: usize) {
        self.stop_worker(server);
        let node = self.world.servers[server].edit();
        (node.up, node.deposed) = (false, false);
        node.run += 1;
        node.entries.truncate(kept);
        node.flushed = kept;
    }

    /// Let the proposer act, then do what it asks for.
    fn drive(&mut self, server: usize, act: impl FnOnce(&mut Proposer, &mut Vec<ProposerAction>)) {
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

    fn carry_out(&mut self, server: usize, action: ProposerAction) {
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
            ProposerAction::StandAgain => return self.stop_worker(server),
            ProposerAction::Deposed { .. } => {
                self.stop_worker(server);
                self.world.servers[server].edit().deposed = true;
                return;
            }
            ProposerAction::Wait(_) => return,
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

    fn work(&mut self, server: usize) {
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
                    self.world.accuse(Violation::OtherBytes);
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
                    // Postgres gives up starting; it is started again.
                    return self.stop_worker(server);
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
                self.drive(server, |proposer, out| proposer.on_completed(NOW_MS, out));
            }
            Task::Persist {
                history,
                configuration,
            } => {
                let node = self.world.servers[server].edit();
                (node.history, node.configuration) = (history, configuration);
                self.drive(server, |proposer, out| {
                    proposer.on_history_persisted(NOW_MS, out)
                });
            }
        }
    }

    fn lead(&mut self, server: usize, term: Term) {
        self.world.servers[server].edit().up = true;
        let bit = 1 << term.0;
        if self.world.observed.led & bit != 0 {
            self.world.accuse(Violation::TwoLeaders);
        }
        self.world.observed.edit().led |= bit;
        self.scope.seen.led.count();
    }

    fn commit(&mut self, server: usize, end: usize) {
        let node = &self.world.servers[server];
        let Some(term) = node
            .proposer
            .as_ref()
            .map(|proposer| proposer.term().0 as usize)
        else {
            return;
        };
        let ours = node.entries[..end].to_vec();
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

    /// One entry at a time, though a server would send all it has: a prefix is what may arrive.
    fn next_append(
        &mut self,
        server: usize,
        safekeeper: usize,
        entry: bool,
    ) -> Option<(Append, Entries)> {
        let node = &self.world.servers[server];
        let peer = PeerIdx(node.list.iter().position(|&listed| listed == safekeeper)?);
        let next = place(node.proposer.as_ref()?.next_lsn(peer)?);
        let end = next + usize::from(entry);
        if end > self.scope.entries_max.max(node.entries.len()) {
            return None;
        }
        self.insert_up_to(server, end);
        let node = self.world.servers[server].edit();
        let wal = LocalWal {
            end_lsn: lsn(end),
            flush_lsn: Lsn::INVALID,
        };
        let append = node.proposer.as_mut()?.next_append(peer, wal, NOW_MS)?;
        let entries = node.entries[next..next + append.len as usize].to_vec();
        Some((append, entries))
    }

    // ---- connections ----------------------------------------------------------------------

    fn connect(&mut self, server: usize, safekeeper: usize) {
        let link = self.world.links[server][safekeeper].edit();
        let slot = link.old.as_ref().map_or(0, |old| 1 - old.slot);
        *link = Link {
            open: true,
            slot,
            old: link.old.take(),
            ..Link::default()
        };
        self.held[server][safekeeper] = false;
        let list = &self.world.servers[server].list;
        let peer = PeerIdx(
            list.iter()
                .position(|&listed| listed == safekeeper)
                .expect("a listed safekeeper"),
        );
        self.drive(server, |proposer, out| {
            proposer.on_connected(peer, NOW_MS, out)
        });
    }

    /// The server's end is closed; what it sent may still arrive.
    fn give_up(&mut self, server: usize, safekeeper: usize) {
        let link = self.world.links[server][safekeeper].edit();
        if !link.open {
            return;
        }
        let (slot, ended) = (link.slot, link.ended);
        let requests = std::mem::take(&mut link.requests);
        let older = link.old.take();
        *link = Link::default();
        let acceptor = &mut self.world.safekeepers[safekeeper].edit().acceptor;
        if ended || requests.is_empty() {
            if !ended {
                acceptor.on_disconnected(World::session(server, slot));
            }
            link.old = older;
        } else {
            // Of three connections the oldest is cut in the middle of what it said.
            if let Some(older) = older {
                acceptor.on_disconnected(World::session(server, older.slot));
            }
            link.old = Some(Old { slot, requests });
        }
    }

    fn disconnect(&mut self, server: usize, safekeeper: usize) {
        self.give_up(server, safekeeper);
        let list = &self.world.servers[server].list;
        let peer = PeerIdx(
            list.iter()
                .position(|&listed| listed == safekeeper)
                .expect("a listed safekeeper"),
        );
        self.drive(server, |proposer, _| proposer.on_disconnected(peer, NOW_MS));
    }

    fn reconnect(&mut self, server: usize, safekeeper: usize) {
        if self.world.servers[server].proposer.is_some() {
            self.connect(server, safekeeper);
        }
    }

    /// What a given-up connection still holds is dropped if it changes nothing, now or ever: a
    /// greeting, or a message of a term that is over, if the acceptor treats it so.
    fn drop_old_news(&mut self) {
        for server in 0..SERVERS {
            for safekeeper in 0..SAFEKEEPERS {
                while let Some(old) = &self.world.links[server][safekeeper].old {
                    let acceptor = &self.world.safekeepers[safekeeper].acceptor;
                    let Some((message, _)) = old.requests.front() else {
                        break;
                    };
                    let over = match message {
                        ProposerMessage::Greeting(_) => true,
                        ProposerMessage::VoteRequest(m) => m.term <= acceptor.term(),
                        ProposerMessage::Elected(m) => m.term < acceptor.term(),
                        ProposerMessage::Append(m) => m.term < acceptor.term(),
                        ProposerMessage::Configure(_) | ProposerMessage::Read(_) => false,
                    };
                    if !over || acceptor.needs_flush() {
                        break;
                    }
                    let before = self.world.clone();
                    let (session, message) = (World::session(server, old.slot), message.clone());
                    let taken = self.handle(safekeeper, session, &message, &Vec::new(), None);
                    let changed =
                        *self.world.safekeepers[safekeeper] != *before.safekeepers[safekeeper];
                    self.world = before;
                    if changed {
                        // Not as it should be: let it happen as a step that a trace shows.
                        break;
                    }
                    self.end_old_request(server, safekeeper, taken);
                }
            }
        }
    }

    fn hold_what_is_late(&mut self, before: &World) {
        for (held, links) in self.held.iter_mut().zip(&before.links) {
            for (held, link) in held.iter_mut().zip(links) {
                *held = !link.answers.is_empty();
            }
        }
    }

    /// The end of a step: what was answered is heard, unless it is late. `None` if nothing is late
    /// although it should be.
    fn settle(&mut self, step: Step) -> Option<()> {
        if self.world.faults.safekeeper_crashes == 0 {
            // A flush shows only if something can happen before it.
            for safekeeper in 0..SAFEKEEPERS {
                self.flush(safekeeper);
            }
        }
        if let Step::Deliver {
            server,
            safekeeper,
            late: true,
        } = step
            && self.world.links[server][safekeeper].answers.is_empty()
        {
            return None;
        }
        while self.hear_one() || self.greet_one() {}
        Some(())
    }

    /// A link for which it holds.
    fn link_with(&self, holds: impl Fn(usize, usize, &Link) -> bool) -> Option<(usize, usize)> {
        let pairs = (0..SERVERS)
            .flat_map(|server| (0..SAFEKEEPERS).map(move |safekeeper| (server, safekeeper)));
        pairs.into_iter().find(|&(server, safekeeper)| {
            holds(server, safekeeper, &self.world.links[server][safekeeper])
        })
    }

    fn hear_one(&mut self) -> bool {
        let found = self.link_with(|server, safekeeper, link| {
            !self.held[server][safekeeper] && !link.answers.is_empty()
        });
        let Some((server, safekeeper)) = found else {
            return false;
        };
        if let Some(answer) = self.world.links[server][safekeeper]
            .edit()
            .answers
            .pop_front()
        {
            self.hear(server, safekeeper, &answer);
        }
        true
    }

    fn greet_one(&mut self) -> bool {
        let found = self.link_with(|server, safekeeper, link| {
            let greeting = matches!(
                link.requests.front(),
                Some((ProposerMessage::Greeting(_), _))
            );
            self.scope.prompt_greetings && !self.held[server][safekeeper] && greeting
        });
        let Some((server, safekeeper)) = found else {
            return false;
        };
        if let Some((message, entries)) = self.world.links[server][safekeeper]
            .edit()
            .requests
            .pop_front()
        {
            self.hand_over(server, safekeeper, &message, &entries);
        }
        true
    }

    fn hear(&mut self, server: usize, safekeeper: usize, answer: &AcceptorMessage) {
        let list = &self.world.servers[server].list;
        let Some(peer) = list.iter().position(|&listed| listed == safekeeper) else {
            return;
        };
        self.drive(server, |proposer, out| {
            proposer.on_message(PeerIdx(peer), answer, NOW_MS, out)
        });
        let link = &self.world.links[server][safekeeper];
        if link.open && link.ended && link.answers.is_empty() {
            self.disconnect(server, safekeeper);
            self.reconnect(server, safekeeper);
        }
    }

    fn deliver_old(&mut self, server: usize, safekeeper: usize) {
        let link = self.world.links[server][safekeeper].edit();
        let Some(old) = &mut link.old else { return };
        let slot = old.slot;
        let Some((message, entries)) = old.requests.pop_front() else {
            return;
        };
        old.requests.push_front((message.clone(), Vec::new()));
        let taken = self.handle(
            safekeeper,
            World::session(server, slot),
            &message,
            &entries,
            None,
        );
        self.end_old_request(server, safekeeper, taken);
        self.scope.seen.stale.count();
    }

    /// The oldest request of a given-up connection was `taken`, or refused, which ends it.
    fn end_old_request(&mut self, server: usize, safekeeper: usize, taken: bool) {
        let link = self.world.links[server][safekeeper].edit();
        let Some(old) = &mut link.old else { return };
        old.requests.pop_front();
        if old.requests.is_empty() || !taken {
            let session = World::session(server, old.slot);
            link.old = None;
            self.world.safekeepers[safekeeper]
                .edit()
                .acceptor
                .on_disconnected(session);
        }
    }
}

// ---- safekeepers --------------------------------------------------------------------------

impl Run<'_> {
    fn hand_over(
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
    fn handle(
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
        if self.scope.mutation == Some(Mutation::HistoryBeforeTruncation) {
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
                if !(is_vote && self.scope.mutation == Some(Mutation::VoteNotDurable)) {
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
                if self.scope.mutation != Some(Mutation::TailKept) {
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
    fn flush(&mut self, safekeeper: usize) -> Option<usize> {
        let node = &mut self.world.safekeepers[safekeeper];
        if !node.acceptor.needs_flush() {
            return None;
        }
        let node = node.edit();
        let mut actions = Vec::new();
        node.acceptor
            .on_flushed(node.acceptor.write_lsn(), &mut actions);
        if self.scope.mutation != Some(Mutation::AcknowledgedBeforeFlush) {
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

    fn die_within(
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

    fn restart(&mut self, safekeeper: usize, kept: usize) {
        let node = self.world.safekeepers[safekeeper].edit();
        node.entries.truncate(kept);
        node.flushed = kept;
        let flush_lsn = if node.begun { lsn(kept) } else { Lsn::INVALID };
        let id = MemberId(safekeeper as u64 + 1);
        node.acceptor = Acceptor::new(id, node.incarnation, node.durable.clone(), flush_lsn);
        self.hang_up(safekeeper);
    }

    fn wipe(&mut self, safekeeper: usize) {
        let node = self.world.safekeepers[safekeeper].edit();
        if self.scope.mutation != Some(Mutation::WipedKeepsIncarnation) {
            node.incarnation = Incarnation(node.incarnation.0 + 100);
        }
        node.entries.clear();
        node.begun = false;
        let configuration = match self.scope.mutation {
            Some(Mutation::WipedKeepsIncarnation) => node.durable.configuration.clone(),
            _ => Configuration::default(),
        };
        node.durable = AcceptorState {
            configuration,
            ..AcceptorState::unconfigured(super::scope::cluster())
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

//! What can happen next, and what comes of it.
//!
//! | in                | is played                                       |
//! |-------------------|-------------------------------------------------|
//! | `servers.rs`      | Postgres, its worker, its data directory        |
//! | `standby.rs`      | a standby, and how it becomes a primary         |
//! | `members.rs`      | who wants other members                         |
//! | `links.rs`        | connections, and what is late on them           |
//! | `safekeepers.rs`  | the daemon and its disk                         |
//!
//! A request is handed over, handled, and answered in one step, and the answer heard in the same
//! one; a `late` step leaves it on its way. Requests wait as long as they like. How many answers
//! and appends may be on their way while other things happen, at a time, is the scope's to say.

use safekeeper_protocol::*;

use super::scope::Scope;
use super::world::*;
use super::{members, standby};

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
    /// A standby replays one entry more.
    Replay {
        server: usize,
    },
    /// A standby's worker begins, and stands.
    Promote {
        server: usize,
    },
    /// Without asking; by the time its worker begins, the log ends at `inserted`.
    PromoteByHand {
        server: usize,
        inserted: usize,
    },
    /// A start by override; likewise.
    StartAlone {
        server: usize,
        inserted: usize,
    },
    /// A server that is down becomes a standby; it holds nothing but what is committed.
    Rejoin {
        server: usize,
    },
    /// The members shall be those of the scope's `set`.
    ChangeMembers {
        server: usize,
        set: usize,
    },
    GiveUpChange {
        server: usize,
    },
}

/// Times are forgotten after each step, so it is always the first moment; but for a greeting it is
/// always later than any `member_timeout`: rivals are worst when they are believed dead.
pub const NOW_MS: u64 = 0;
pub const LONG_AFTER_MS: u64 = u64::MAX;

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
    let runs = node.proposer.is_some() || node.deposed || node.won.is_some();
    if world.faults.server_crashes > 0 && runs {
        steps.extend((node.flushed..=inserted_max).map(|kept| Step::CrashServer { server, kept }));
    }
    if node.standby {
        standby::steps(scope, world, server, steps);
    }
    let Some(proposer) = &node.proposer else {
        if node.deposed || node.standby || server >= scope.n_servers {
            return;
        }
        steps.push(Step::Start { server });
        if node.up {
            return;
        }
        if world.faults.overrides > 0 {
            let inserted_max = scope.entries_max.max(inserted);
            steps.extend(
                (inserted..=inserted_max).map(|inserted| Step::StartAlone { server, inserted }),
            );
        }
        if world.faults.rejoins > 0 && world.observed.committed.starts_with(&node.entries) {
            steps.push(Step::Rejoin { server });
        }
        return;
    };
    match &node.task {
        Some(Task::Replay { end }) if inserted != *end => {}
        Some(_) => steps.push(Step::Work { server }),
        None => {}
    }
    members::steps(scope, world, server, proposer, steps);
    // Only a donor that failed is asked again, later.
    let retries = node.task.is_none() && proposer.next_tick_ms(|_| false) == NOW_MS;
    match proposer.state_name() {
        "leading" | "persisting" | "promoting" => {}
        "waiting" => steps.push(Step::Tick { server }),
        "comparing" | "completing" if retries => steps.push(Step::Tick { server }),
        "completing" => {}
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
        let peer = node.peer(safekeeper);
        let follows = |proposer: &Proposer| proposer.next_lsn(peer).is_some();
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
        handed_over: None,
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
pub struct Run<'a> {
    pub scope: &'a Scope,
    pub world: World,
    /// Links whose answers are not heard in this step.
    pub held: [[bool; SAFEKEEPERS]; SERVERS],
    /// Things that reached a disk while the last request was handled.
    pub carried_out: usize,
    /// The term that a worker takes over from its server's start: nobody wins it by that.
    pub handed_over: Option<Term>,
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
                let is_free = |name| matches!(name, "waiting" | "comparing" | "completing");
                if proposer.is_some_and(|proposer| !is_free(proposer.state_name())) {
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
            Step::Replay { server } => self.replay(server)?,
            Step::Promote { server } => self.promote(server),
            Step::PromoteByHand { server, inserted } => self.promote_by_hand(server, inserted),
            Step::StartAlone { server, inserted } => self.start_alone(server, inserted),
            Step::Rejoin { server } => self.rejoin(server),
            Step::ChangeMembers { server, set } => self.change_members(server, set)?,
            Step::GiveUpChange { server } => self.give_up_change(server)?,
        }
        Some(())
    }
}

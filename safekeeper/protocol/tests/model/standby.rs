//! A standby as the model plays it: what it replays, and how it becomes a primary.
//!
//! ```text
//!   replays ──► promotion wanted ──► votes ──► WAL from a donor ──► replayed just so far
//!      ▲               │                                                    │
//!      │               │ by hand, nobody asked                    history on its disk
//!   rejoins            ▼                                                    ▼
//!   down ◄──── up on the next timeline ◄──────────────────────── out of recovery, told later
//! ```
//!
//! It replays what any safekeeper shows as committed, one entry at a time, whenever it likes, while
//! its promotion is under way too: nothing stops it but the term. What is in its history file is
//! void until a promotion has written it, since a copy of a primary's directory brings one along.
//!
//! Promoted by hand, or started by override, a server writes WAL without a term, and may write some
//! before its worker begins.

use safekeeper_protocol::mutation::Mutation;
use safekeeper_protocol::*;

use super::scope::Scope;
use super::step::{NOW_MS, Run, Step};
use super::world::*;

/// What can happen to a standby.
pub fn steps(scope: &Scope, world: &World, server: usize, steps: &mut Vec<Step>) {
    let node = &world.servers[server];
    if shown_by(world, server).is_some() {
        steps.push(Step::Replay { server });
    }
    if world.faults.promotions > 0 && node.proposer.is_none() {
        steps.push(Step::Promote { server });
    }
    if world.faults.by_hand > 0 {
        let inserted = node.entries.len();
        let inserted_max = scope.entries_max.max(inserted);
        steps.extend(
            (inserted..=inserted_max).map(|inserted| Step::PromoteByHand { server, inserted }),
        );
    }
}

/// The safekeeper that shows the entry which a standby lacks; those that show the same are one.
fn shown_by(world: &World, server: usize) -> Option<usize> {
    let end = world.servers[server].entries.len();
    let mut safekeepers = world.safekeepers.iter();
    safekeepers.position(|s| s.entries.len() > end && place(s.acceptor.commit_lsn()) > end)
}

impl Run<'_> {
    pub fn replay(&mut self, server: usize) -> Option<()> {
        let safekeeper = &self.world.safekeepers[shown_by(&self.world, server)?];
        let end = self.world.servers[server].entries.len();
        let entry = safekeeper.entries[end];
        let tli = safekeeper.acceptor.history().tli_at(lsn(end));
        let node = self.world.servers[server].edit();
        node.entries.push(entry);
        node.flushed = node.entries.len();
        node.tli = tli.map_or(node.tli, |tli| tli.0);
        if !self.scope.slow_host {
            self.work(server);
        }
        Some(())
    }

    pub fn promote(&mut self, server: usize) {
        self.world.faults.promotions -= 1;
        self.begin_proposer(server, Standing::Standby);
    }

    /// Recovery ends where it stands: the worker checks afterwards that this was the right place.
    pub fn leave_recovery(&mut self, server: usize, tli: u32) {
        let node = self.world.servers[server].edit();
        let switch = node.entries.len();
        (node.standby, node.up, node.tli) = (false, true, tli);
        node.task = Some(Task::Promoted { tli, switch });
        if !self.scope.slow_host {
            self.work(server);
        }
    }

    pub fn tell_promoted(&mut self, server: usize, tli: u32, switch: usize) {
        self.scope.seen.promoted.count();
        let files = timeline_files(tli);
        self.drive(server, |proposer, out| {
            proposer.on_promoted(Tli(tli), lsn(switch), files, NOW_MS, out);
        });
    }

    pub fn promote_by_hand(&mut self, server: usize, inserted: usize) {
        self.world.faults.by_hand -= 1;
        self.stop_worker(server);
        let keeps = self.scope.breaks(Mutation::HistoryOfStandbyBelieved);
        let node = self.world.servers[server].edit();
        (node.standby, node.up, node.tli) = (false, true, node.tli + 1);
        if !keeps {
            node.history = TermHistory::default();
            node.unled_from = Some(node.entries.len());
        }
        self.insert_up_to(server, inserted);
    }

    /// Without the quorum, on the operator's word. WAL stays unled until a term is won.
    pub fn start_alone(&mut self, server: usize, inserted: usize) {
        self.world.faults.overrides -= 1;
        self.stop_worker(server);
        let node = self.world.servers[server].edit();
        (node.up, node.won) = (true, None);
        node.unled_from = node.unled_from.or(Some(node.entries.len()));
        self.insert_up_to(server, inserted);
    }

    pub fn rejoin(&mut self, server: usize) {
        self.world.faults.rejoins -= 1;
        self.stop_worker(server);
        let node = self.world.servers[server].edit();
        (node.standby, node.won, node.unled_from) = (true, None, None);
        node.flushed = node.entries.len();
    }
}

/// As files they are all alike here: only their numbers matter.
pub fn timeline_files(tli: u32) -> Vec<TimelineFile> {
    let file = |tli| TimelineFile {
        tli: Tli(tli),
        content: Vec::new(),
    };
    (2..=tli).rev().map(file).collect()
}

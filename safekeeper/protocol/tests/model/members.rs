//! An operator who wants other members, and perhaps wants them no more.
//!
//! A set names safekeepers; they are members in the incarnation that they have when it is asked
//! for, so that one which was made anew can be replaced by itself.

use safekeeper_protocol::*;

use super::scope::Scope;
use super::step::{NOW_MS, Run, Step};
use super::world::*;

/// What can be asked of a proposer that leads.
pub fn steps(
    scope: &Scope,
    world: &World,
    server: usize,
    proposer: &Proposer,
    steps: &mut Vec<Step>,
) {
    if !proposer.is_leading() {
        return;
    }
    match proposer.change_step() {
        None if world.faults.changes > 0 => {
            let sets = (0..scope.sets.len()).filter(|set| !scope.own_sets || *set == server);
            steps.extend(sets.map(|set| Step::ChangeMembers { server, set }));
        }
        Some(step) if step != "final" && step != "given up" && world.faults.give_ups > 0 => {
            steps.push(Step::GiveUpChange { server });
        }
        _ => {}
    }
}

impl Run<'_> {
    pub fn change_members(&mut self, server: usize, set: usize) -> Option<()> {
        self.world.faults.changes -= 1;
        let members = self.members_now(self.scope.sets[set]);
        let mut begun = false;
        self.drive(server, |proposer, out| {
            begun = proposer
                .change_members(members, LOG_START, NOW_MS, out)
                .is_ok();
        });
        self.scope.seen.changed.count();
        begun.then_some(())
    }

    pub fn give_up_change(&mut self, server: usize) -> Option<()> {
        self.world.faults.give_ups -= 1;
        let mut given_up = false;
        self.drive(server, |proposer, out| {
            given_up = proposer.give_up_change(NOW_MS, out).is_ok();
        });
        given_up.then_some(())
    }

    fn members_now(&self, set: &[usize]) -> Vec<Member> {
        let member = |&safekeeper: &usize| Member {
            incarnation: self.world.safekeepers[safekeeper].incarnation,
            ..member(safekeeper)
        };
        set.iter().map(member).collect()
    }
}

/// In its first incarnation.
pub fn member(safekeeper: usize) -> Member {
    Member {
        id: MemberId(safekeeper as u64 + 1),
        incarnation: Incarnation(safekeeper as u128 + 1),
        host: String::new(),
        port: 0,
    }
}

/// How the judge compares versions: the core's own comparison may be the rule that is broken.
pub fn version_of(configuration: &Configuration) -> (bool, Term, u32) {
    let version = configuration.version;
    let confirmed = !configuration.is_provisional();
    (confirmed, version.term, version.generation)
}

//! What must hold in every state, one function each.

use safekeeper_protocol::*;

use super::members::version_of;
use super::scope::majority_of_each_set;
use super::world::*;

pub fn one_leader_a_term(world: &World) -> bool {
    world.observed.violation != Some(Violation::TwoLeaders)
}

/// Log matching (G3): where two logs agree on the term of an entry, they agree on the entry. That
/// includes the local logs of servers, each under the history in its data directory.
pub fn same_term_same_position_same_entry(world: &World) -> bool {
    let of_safekeepers = world.safekeepers.iter().map(|s| {
        let end = place(s.acceptor.flush_lsn()).min(s.entries.len());
        (s.acceptor.history(), &s.entries[..end])
    });
    let none = TermHistory::default();
    let of_servers = world.servers.iter().map(|s| {
        let history = if s.standby { &none } else { &s.history };
        let end = s.unled_from.unwrap_or(usize::MAX).min(s.entries.len());
        (history, &s.entries[..end])
    });
    let logs: Vec<(&TermHistory, &[Writer])> = of_safekeepers.chain(of_servers).collect();
    let agree = |one: &(&TermHistory, &[Writer]), other: &(&TermHistory, &[Writer])| {
        one.1.iter().zip(other.1).enumerate().all(|(i, (a, b))| {
            let terms = (one.0.last_log_term(lsn(i)), other.0.last_log_term(lsn(i)));
            terms.0 != terms.1 || terms.0 == Term::NONE || a == b
        })
    };
    let pairs = logs
        .iter()
        .enumerate()
        .flat_map(|(i, one)| logs[..i].iter().map(move |other| (one, other)));
    world.observed.violation != Some(Violation::OtherBytes)
        && pairs.into_iter().all(|(one, other)| agree(one, other))
}

pub fn committed_entries_agree(world: &World) -> bool {
    world.observed.violation != Some(Violation::CommittedChanged)
}

/// Whoever leads holds all that was committed in its term or an earlier one (G1).
pub fn leaders_hold_what_is_committed(world: &World) -> bool {
    world.servers.iter().all(|server| {
        let Some(proposer) = server
            .proposer
            .as_ref()
            .filter(|proposer| proposer.is_leading())
        else {
            return true;
        };
        let terms = &world.observed.committed_in[..=proposer.term().0 as usize];
        let end = usize::from(terms.iter().copied().max().unwrap_or(0));
        server.entries.get(..end) == Some(&world.observed.committed[..end])
    })
}

/// Also after every crash: what is committed is on the disks of a majority (of both sets), while no
/// change of members is anywhere under way. A member that was made anew holds nothing and counts as
/// holding all: its loss was not ours.
pub fn committed_entries_are_on_a_quorum(world: &World) -> bool {
    let committed = &world.observed.committed;
    let holds = |member: &Member| !is_present(world, member) || holds_committed(world, member);
    let known: Vec<&Configuration> = configurations(world).collect();
    let is_joint = known.iter().any(|known| known.new_members.is_some());
    let is_changing = is_joint || known.windows(2).any(|pair| !pair[0].same_members(pair[1]));
    let holds_all = |configuration: &&Configuration| majority_of_each_set(configuration, holds);
    committed.is_empty() || is_changing || known.first().is_some_and(holds_all)
}

/// Whatever configuration is known anywhere: those who would vote under it, because they know of no
/// later one, can elect nobody without one that holds all that is committed. One that only a leader
/// knows is left out: it stands for election no more, and who takes it from there does so in its
/// term.
pub fn every_quorum_has_what_is_committed(world: &World) -> bool {
    let lacks = |configuration: &Configuration, member: &Member| {
        let node = &world.safekeepers[member.id.0 as usize - 1];
        is_present(world, member)
            && version_of(&node.durable.configuration) <= version_of(configuration)
            && !holds_committed(world, member)
    };
    configurations(world).all(|known| !majority_of_each_set(known, |member| lacks(known, member)))
}

fn configurations(world: &World) -> impl Iterator<Item = &Configuration> {
    let of_safekeepers = world.safekeepers.iter().map(|s| &s.durable.configuration);
    let of_servers = world.servers.iter().flat_map(|s| {
        let stands = s
            .proposer
            .as_ref()
            .filter(|proposer| !proposer.is_leading());
        let of_worker = stands.map(|proposer| proposer.configuration());
        [Some(&s.configuration), of_worker].into_iter().flatten()
    });
    let decides = |configuration: &&Configuration| {
        !configuration.is_none() && !configuration.is_provisional()
    };
    of_safekeepers.chain(of_servers).filter(decides)
}

fn is_present(world: &World, member: &Member) -> bool {
    world.safekeepers[member.id.0 as usize - 1].incarnation == member.incarnation
}

fn holds_committed(world: &World, member: &Member) -> bool {
    let safekeeper = &world.safekeepers[member.id.0 as usize - 1];
    let durable = &safekeeper.entries[..safekeeper.flushed.min(safekeeper.entries.len())];
    durable.starts_with(&world.observed.committed)
}

/// What a safekeeper may show to consumers was committed (G4).
pub fn consumers_see_only_what_is_committed(world: &World) -> bool {
    world.safekeepers.iter().all(|safekeeper| {
        let end = place(safekeeper.acceptor.commit_lsn());
        let shown = safekeeper.entries.get(..end);
        shown.is_some() && shown == world.observed.committed.get(..end)
    })
}

pub fn commit_never_goes_back(world: &World) -> bool {
    world.observed.violation != Some(Violation::CommitWentBack)
}

/// One version names one configuration, and only one lineage is ever confirmed for two safekeepers.
pub fn configurations_agree(world: &World) -> bool {
    let of_safekeepers = world.safekeepers.iter().map(|s| &s.durable.configuration);
    let of_servers = world.servers.iter().map(|s| &s.configuration);
    let confirmed: Vec<&Configuration> = of_safekeepers
        .chain(of_servers)
        .filter(|configuration| !configuration.is_none() && !configuration.is_provisional())
        .collect();
    confirmed.iter().enumerate().all(|(i, one)| {
        confirmed[..i].iter().all(|other| {
            one.lineage == other.lineage
                && (one.version != other.version || one.same_members(other))
        })
    })
}

/// A server without a rival is never refused (L3): before recovery it completes its log, while it
/// runs it holds all that anybody has, and its history always goes on.
pub fn nobody_alone_is_locked_out(world: &World) -> bool {
    world.observed.violation != Some(Violation::LockedOut)
}

pub fn nothing_is_answered_before_it_is_durable(world: &World) -> bool {
    world.observed.violation != Some(Violation::AnsweredBeforeDurable)
}

/// Checks that only broken promises can reach: a refusal to cut committed WAL, or to feed a log
/// that claims what was never sent, however often it asks; an assertion.
pub fn no_last_defence_is_reached(world: &World) -> bool {
    !matches!(
        world.observed.violation,
        Some(Violation::Refused(_) | Violation::Panicked(_) | Violation::Endless)
    )
}

//! Every order in which things can happen to three safekeepers and two servers.
//!
//! ```text
//!   scope ──► first states ──► each step that is possible ──► state seen before? drop it
//!                                        ▲                            │ no
//!                                        └──── properties hold? ◄─────┘
//! ```
//!
//! The acceptors and proposers are those that ship; this crate plays the daemon, the extension,
//! the disks and the network around them, and knows no rule of the protocol. The
//! crate `stateright` does the exploring, breadth first, so a violation comes with a shortest
//! trace. A [`Scope`] names what may go wrong, and how often, in one exploration: everything at once
//! is beyond any computer.
//!
//! `cargo test` explores small scopes, each to its end. With `MODEL=full` (`make model`) they are
//! larger; one that was stopped at a limit then says so: it is evidence, not proof.
//!
//! Time is left out: after each step a proposer forgets its times, and every deadline may be the
//! next to pass. Not here: the content of timeline history files, and liveness.

// Under the feature, there is one test in this file: it breaks rules for the whole process.
#![cfg_attr(feature = "mutations", allow(dead_code))]

#[cfg(feature = "mutations")]
mod mutations;

mod model {
    mod links;
    pub mod members;
    pub mod properties;
    mod safekeepers;
    pub mod scope;
    pub mod scopes;
    mod servers;
    mod standby;
    pub mod step;
    pub mod world;
}

use std::hash::{Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use model::scope::Scope;
use model::step::{Step, apply, enabled};
use model::world::{Mixer, Violation, World};
use model::{properties, scopes};
use stateright::{Checker, HasDiscoveries, Model, Property};

struct Explored {
    scope: Arc<Scope>,
    limits: Option<Limits>,
    /// The limit that was reached: no further steps from then on.
    cut_by: Arc<OnceLock<String>>,
}

/// Of one exploration, as `MODEL_MINUTES` and `MODEL_GB` say.
struct Limits {
    begun: Instant,
    minutes: u64,
    /// Of memory that the whole process may take.
    gigabytes: u64,
}

impl Limits {
    fn new() -> Limits {
        let number = |name, usual| {
            let text = std::env::var(name).ok();
            text.map_or(usual, |text| text.parse().expect("a whole number"))
        };
        Limits {
            begun: Instant::now(),
            minutes: number("MODEL_MINUTES", 10),
            gigabytes: number("MODEL_GB", 12),
        }
    }

    fn reached(&self) -> Option<String> {
        if self.begun.elapsed() > Duration::from_secs(60 * self.minutes) {
            return Some(format!("stopped after {} min", self.minutes));
        }
        let status = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
        let pages = status
            .split(' ')
            .nth(1)
            .and_then(|text| text.parse::<u64>().ok());
        let is_full = pages.is_some_and(|pages| pages * 4096 > self.gigabytes << 30);
        is_full.then(|| format!("stopped at {} GB", self.gigabytes))
    }
}

impl Explored {
    /// Asked once for a thousand states or so.
    fn is_at_limit(&self, world: &World) -> bool {
        if self.cut_by.get().is_some() {
            return true;
        }
        let mut hasher = Mixer::default();
        world.hash(&mut hasher);
        let limits = self.limits.as_ref().filter(|_| hasher.finish() % 1024 == 0);
        let Some(reached) = limits.and_then(Limits::reached) else {
            return false;
        };
        self.cut_by.get_or_init(|| reached);
        true
    }
}

impl Model for Explored {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        self.scope.begin()
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        if world.observed.violation.is_none() && !self.is_at_limit(world) {
            enabled(&self.scope, world, steps);
        }
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let taken = catch_unwind(AssertUnwindSafe(|| apply(&self.scope, world, step)));
        taken.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).into()));
            let mut world = world.clone();
            world.accuse(Violation::Panicked(text.unwrap_or_default()));
            world.seal(&self.scope.pools);
            Some(world)
        })
    }

    fn properties(&self) -> Vec<Property<Explored>> {
        /// The property carries the name of the function that judges.
        macro_rules! always {
            ($($name:ident),* $(,)?) => {
                vec![$(Property::always(stringify!($name), |_, world| properties::$name(world))),*]
            };
        }
        always![
            one_leader_a_term,
            same_term_same_position_same_entry,
            committed_entries_agree,
            leaders_hold_what_is_committed,
            committed_entries_are_on_a_quorum,
            every_quorum_has_what_is_committed,
            consumers_see_only_what_is_committed,
            commit_never_goes_back,
            configurations_agree,
            nobody_alone_is_locked_out,
            nothing_is_answered_before_it_is_durable,
            no_last_defence_is_reached,
        ]
    }
}

/// Violated property, and the steps that lead there.
type Trace = (&'static str, Vec<Step>, Option<Violation>);

struct Outcome {
    scope: Arc<Scope>,
    states: usize,
    steps: usize,
    depth: usize,
    took: Duration,
    cut_by: Option<String>,
    violation: Option<Trace>,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let end = match (&self.violation, &self.cut_by) {
            (Some((name, ..)), _) => name,
            (None, Some(limit)) => limit.as_str(),
            (None, None) => "complete",
        };
        write!(
            f,
            "{:<44} {:>10} states {:>11} steps, depth {:>2}, {:>6.1} s, {end}",
            self.scope.name,
            self.states,
            self.steps,
            self.depth,
            self.took.as_secs_f64(),
        )
    }
}

fn is_full() -> bool {
    std::env::var("MODEL").is_ok_and(|which| which == "full")
}

fn explore(scope: Scope) -> Outcome {
    let begun = Instant::now();
    let scope = Arc::new(scope);
    let cut_by = Arc::new(OnceLock::new());
    let explored = Explored {
        scope: Arc::clone(&scope),
        limits: is_full().then(Limits::new),
        cut_by: Arc::clone(&cut_by),
    };
    let checker = explored.checker();
    let checker = checker.finish_when(HasDiscoveries::AnyFailures);
    let checker = checker.spawn_bfs().join();
    let found = checker.discoveries().into_iter().map(|(name, path)| {
        let accused = path.last_state().observed.violation.clone();
        (name, path.into_actions(), accused)
    });
    let violation = found.min_by_key(|(name, steps, _)| (steps.len(), *name));
    Outcome {
        states: checker.unique_state_count(),
        steps: checker.state_count(),
        depth: checker.max_depth(),
        took: begun.elapsed(),
        cut_by: cut_by.get().cloned(),
        violation,
        scope,
    }
}

/// Every property holds, everywhere in these scopes; and something happens in each.
#[cfg(not(feature = "mutations"))]
fn all_hold(scopes: Vec<Scope>) {
    for scope in scopes {
        let outcome = explore(scope);
        println!("{outcome}");
        if let Some((name, steps, accused)) = &outcome.violation {
            let steps: Vec<String> = steps.iter().map(|step| format!("  {step:?}\n")).collect();
            panic!("{name} is violated ({accused:?}):\n{}", steps.concat());
        }
        assert!(is_full() || outcome.cut_by.is_none());
        let seen = &outcome.scope.seen;
        for (name, count) in seen.all() {
            let wanted = outcome.scope.wanted.contains(&name);
            assert!(
                !wanted || count > 0,
                "{name} never happens in {}",
                outcome.scope.name
            );
        }
    }
}

#[cfg(not(feature = "mutations"))]
#[test]
fn a_server_that_lost_its_tail_or_has_more_than_the_quorum() {
    all_hold(scopes::restarted_server(is_full()));
}

#[cfg(not(feature = "mutations"))]
#[test]
fn two_servers_that_both_want_to_lead() {
    all_hold(scopes::rivals(is_full()));
}

#[cfg(not(feature = "mutations"))]
#[test]
fn a_worker_that_stands_again() {
    all_hold(scopes::restarted_worker(is_full()));
}

#[cfg(not(feature = "mutations"))]
#[test]
fn a_first_use() {
    all_hold(scopes::first_use(is_full()));
}

#[cfg(not(feature = "mutations"))]
#[test]
fn a_joint_configuration() {
    all_hold(scopes::joint(is_full()));
}

#[cfg(not(feature = "mutations"))]
#[test]
fn safekeepers_that_crash_or_are_made_anew() {
    all_hold(scopes::lost_safekeepers(is_full()));
}

#[cfg(not(feature = "mutations"))]
#[test]
fn messages_that_are_late_and_connections_that_break() {
    all_hold(scopes::late_messages(is_full()));
}

#[cfg(not(feature = "mutations"))]
#[test]
fn a_standby_that_is_promoted() {
    all_hold(scopes::promotion::promotions(is_full()));
}

#[cfg(not(feature = "mutations"))]
#[test]
fn a_server_that_writes_without_a_term() {
    all_hold(scopes::promotion::without_a_term(is_full()));
}

#[cfg(not(feature = "mutations"))]
#[test]
fn a_start_that_hands_its_term_over() {
    all_hold(scopes::promotion::handed_over(is_full()));
}

#[cfg(not(feature = "mutations"))]
#[test]
fn members_that_change() {
    all_hold(scopes::members::changes(is_full()));
}

/// The properties are worth something: each promise of the host, broken, violates one.
#[cfg(not(feature = "mutations"))]
#[test]
fn broken_promises_are_noticed() {
    use safekeeper_protocol::mutation::Mutation;

    for (mutation, property) in [
        (Mutation::VoteNotDurable, "one_leader_a_term"),
        (
            Mutation::AnswerBeforeFsync,
            "committed_entries_are_on_a_quorum",
        ),
        (Mutation::TailNotZeroed, "committed_entries_are_on_a_quorum"),
        (
            Mutation::HistoryBeforeTruncation,
            "committed_entries_are_on_a_quorum",
        ),
        (Mutation::WipedMemberVotes, "one_leader_a_term"),
        (Mutation::NoLocalHistory, "nobody_alone_is_locked_out"),
        (
            Mutation::ElectionBeforeRecoverySkipped,
            "same_term_same_position_same_entry",
        ),
        (
            Mutation::WorkerStandsByFlushLsn,
            "nobody_alone_is_locked_out",
        ),
    ] {
        let scope = scopes::broken::scope_for(mutation).expect("the model's own promise");
        let outcome = explore(scope);
        println!("{outcome}");
        let Some((name, steps, _)) = outcome.violation else {
            panic!("{mutation:?} goes unnoticed");
        };
        println!("  {steps:?}");
        assert_eq!(name, property, "{mutation:?}");
    }
}

/// A rule of the core or the host is taken away; the shortest trace to a violation is counted in
/// states, since what is explored before it is the work.
#[cfg(feature = "mutations")]
#[test]
fn every_mutation_is_caught() {
    use mutations::Verdict;
    use safekeeper_protocol::mutation::Catcher;

    let missed = mutations::unnoticed(Catcher::Model, "states", |mutation| {
        let Some(scope) = scopes::broken::scope_for(mutation) else {
            return Verdict::MeansNothingHere;
        };
        let outcome = explore(scope);
        let after = outcome.states as u64;
        match outcome.violation {
            Some((name, steps, _)) => Verdict::Caught {
                after,
                by: format!("{name}, {} steps", steps.len()),
            },
            None => Verdict::Missed { after },
        }
    });
    assert!(missed.is_empty(), "not caught: {missed:?}");
}

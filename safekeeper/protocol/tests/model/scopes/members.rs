//! Two proposers that change the members, each interrupted at any point by the other.
//!
//! The log is empty at first, so that one entry is enough to be lost.

use safekeeper_protocol::mutation::Mutation;
use safekeeper_protocol::{Configuration, ConfigurationVersion, Term};

use super::super::scope::{Scope, first_alone, first_two, joint_singles, three};
use super::super::world::Faults;
use super::{ends, settled};

/// The first server leads {1}. Somebody wants {2}, or {3}.
fn one_by_one() -> Scope {
    Scope {
        name: "members {1} to {2} or {3}",
        begin: settled(first_alone, &[ends([0, 0, 0], 0, 0)]),
        led: true,
        sets: &[&[1], &[2]],
        faults: Faults {
            changes: 1,
            ..Faults::default()
        },
        entries_max: 1,
        wanted: &["committed", "changed", "reconfigured"],
        ..Scope::default()
    }
}

fn pairs() -> Scope {
    Scope {
        name: "members {1,2} to {2,3} or {1,3}",
        begin: settled(first_two, &[ends([0, 0, 0], 0, 0)]),
        sets: &[&[1, 2], &[0, 2]],
        ..one_by_one()
    }
}

fn wiped() -> Scope {
    Scope {
        name: "wiped member is replaced by itself",
        begin: settled(three, &[ends([0, 0, 0], 0, 0)]),
        sets: &[&[0, 1, 2]],
        faults: Faults {
            wipes: 1,
            changes: 1,
            ..Faults::default()
        },
        ..one_by_one()
    }
}

/// Two proposers have died, each over a joint configuration that only the one who was to be added
/// has heard of, and whose version was not made safe. Whoever comes next hears of them in any order.
fn half_begun() -> Scope {
    fn held(safekeeper: usize) -> Option<(Term, Configuration)> {
        let configuration = match safekeeper {
            0 => first_alone(),
            1 => joint_singles(2, &[1]),
            _ => joint_singles(3, &[2]),
        };
        let term = match safekeeper {
            1 => Term(2),
            _ => Term(3),
        };
        Some((term, configuration))
    }
    Scope {
        name: "two half-begun changes",
        led: false,
        half_begun: held,
        prompt_greetings: false,
        faults: Faults::default(),
        term_max: 5,
        wanted: &["committed", "reconfigured"],
        ..one_by_one()
    }
}

/// One proposer has died over a joint configuration of generation 2; another makes one of its own.
fn two_second_generations() -> Scope {
    fn held(safekeeper: usize) -> Option<(Term, Configuration)> {
        let version = |generation| ConfigurationVersion {
            term: Term(2),
            generation,
        };
        let joint = Configuration {
            version: version(2),
            ..joint_singles(2, &[1])
        };
        let stamped = Configuration {
            version: version(1),
            ..first_alone()
        };
        match safekeeper {
            0 => Some((Term(2), stamped)),
            1 => Some((Term(2), joint)),
            _ => None,
        }
    }
    Scope {
        name: "a half-begun change and another one",
        half_begun: held,
        own_sets: true,
        sets: &[&[0], &[2]],
        faults: Faults { changes: 1, ..NONE },
        term_max: 4,
        ..half_begun()
    }
}

const GIVEN_UP: Faults = Faults {
    changes: 1,
    give_ups: 1,
    ..NONE
};
const TWO: Faults = Faults { changes: 2, ..NONE };
const TWO_AND_A_CRASH: Faults = Faults {
    worker_crashes: 1,
    ..TWO
};
const NONE: Faults = Faults {
    server_crashes: 0,
    worker_crashes: 0,
    safekeeper_crashes: 0,
    cuts: 0,
    timeouts: 0,
    wipes: 0,
    promotions: 0,
    by_hand: 0,
    overrides: 0,
    rejoins: 0,
    changes: 0,
    give_ups: 0,
};

pub fn changes(full: bool) -> Vec<Scope> {
    let late = || Scope {
        name: "members {1} to {2}, a cut, one late message",
        n_servers: 1,
        sets: &[&[1]],
        faults: Faults {
            cuts: 1,
            ..GIVEN_UP
        },
        late_max: 1,
        wanted: &["committed", "changed", "reconfigured", "stale"],
        ..one_by_one()
    };
    let mut scopes = vec![
        Scope {
            name: "members {1} to {2} or {3}, given up",
            faults: GIVEN_UP,
            ..one_by_one()
        },
        Scope {
            name: "members {1,2} to {2,3} or {1,3}, one server",
            n_servers: 1,
            ..pairs()
        },
        Scope {
            name: "wiped member is replaced by itself, one server",
            n_servers: 1,
            ..wiped()
        },
    ];
    if full {
        scopes.extend([
            pairs(),
            wiped(),
            late(),
            half_begun(),
            two_second_generations(),
            Scope {
                name: "members {1} to {2} to {3}, terms to 4",
                faults: TWO_AND_A_CRASH,
                term_max: 4,
                own_sets: true,
                ..one_by_one()
            },
            Scope {
                name: "members {1} to {2} to {3}, given up, 2 entries",
                faults: Faults {
                    changes: 2,
                    ..GIVEN_UP
                },
                entries_max: 2,
                ..one_by_one()
            },
            Scope {
                name: "members {1,2} to {2,3} to {1,3}, given up",
                faults: Faults {
                    changes: 2,
                    ..GIVEN_UP
                },
                ..pairs()
            },
            Scope {
                name: "members {1,2} to {2,3}, safekeeper crash",
                faults: Faults {
                    safekeeper_crashes: 1,
                    ..GIVEN_UP
                },
                ..pairs()
            },
            Scope {
                name: "wiped member is replaced, given up, terms to 4",
                faults: Faults {
                    wipes: 1,
                    worker_crashes: 1,
                    ..GIVEN_UP
                },
                term_max: 4,
                ..wiped()
            },
        ]);
    }
    scopes
}

pub fn without(mutation: Mutation) -> Scope {
    let base = match mutation {
        Mutation::ConfigurationByGeneration => two_second_generations(),
        Mutation::ChangeWithoutStamping => half_begun(),
        _ => one_by_one(),
    };
    Scope {
        mutation: Some(mutation),
        ..base
    }
}

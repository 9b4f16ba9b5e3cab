//! A standby beside a primary that is alive, or comes back; and servers that write without a term.

use safekeeper_protocol::mutation::Mutation;

use super::super::scope::{Scope, three};
use super::super::world::Faults;
use super::{ends, settled};

/// The first server leads, the second is a standby that lags. Somebody wants it promoted.
fn beside_a_primary() -> Scope {
    Scope {
        name: "promotion beside a primary, 1 entry",
        begin: settled(three, &[ends([1, 1, 0], 1, 0)]),
        standby: true,
        led: true,
        faults: Faults {
            promotions: 1,
            ..Faults::default()
        },
        entries_max: 1,
        wanted: &["committed", "promoted"],
        ..Scope::default()
    }
}

pub fn promotions(full: bool) -> Vec<Scope> {
    let died = || Scope {
        name: "promotion dies between any two steps",
        slow_host: true,
        faults: Faults {
            promotions: 2,
            server_crashes: 1,
            ..Faults::default()
        },
        term_max: 4,
        ..beside_a_primary()
    };
    let returns = || Scope {
        name: "promotion, the primary starts again",
        begin: settled(three, &[ends([1, 1, 0], 0, 0)]),
        led: false,
        hands_over: true,
        wanted: &["committed", "promoted", "handed over"],
        ..beside_a_primary()
    };
    let late = || Scope {
        name: "promotion, a cut, one late message",
        faults: Faults {
            promotions: 1,
            cuts: 1,
            ..Faults::default()
        },
        late_max: 1,
        wanted: &["committed", "promoted", "stale"],
        ..beside_a_primary()
    };
    let crash = || Scope {
        name: "promotion, a crash",
        faults: Faults {
            promotions: 1,
            server_crashes: 1,
            ..Faults::default()
        },
        ..beside_a_primary()
    };
    if !full {
        return vec![beside_a_primary(), crash()];
    }
    vec![
        beside_a_primary(),
        returns(),
        Scope {
            name: "promotion beside a primary, 2 entries",
            entries_max: 2,
            ..beside_a_primary()
        },
        over_a_dead_tail(),
        died(),
        Scope {
            name: "promotion, primary crashes and rejoins",
            faults: Faults {
                promotions: 2,
                server_crashes: 1,
                rejoins: 1,
                ..Faults::default()
            },
            term_max: 4,
            ..beside_a_primary()
        },
        late(),
        Scope {
            name: "copy holds more than the quorum",
            begin: settled(three, &[ends([2, 1, 1], 2, 2)]),
            bytes_may_differ: true,
            entries_max: 2,
            ..beside_a_primary()
        },
    ]
}

/// By hand, or by override.
pub fn without_a_term(full: bool) -> Vec<Scope> {
    let by_hand = || Scope {
        name: "promotion by hand",
        faults: Faults {
            by_hand: 1,
            ..Faults::default()
        },
        wanted: &["committed"],
        ..beside_a_primary()
    };
    let alone = || Scope {
        name: "start by override, a rival",
        begin: settled(three, &[ends([1, 1, 0], 0, 1)]),
        faults: Faults {
            overrides: 1,
            ..Faults::default()
        },
        entries_max: 1,
        wanted: &["committed"],
        ..Scope::default()
    };
    if !full {
        return vec![
            by_hand(),
            Scope {
                name: "start by override, a rival, terms to 2",
                term_max: 2,
                ..alone()
            },
        ];
    }
    vec![
        by_hand(),
        alone(),
        Scope {
            name: "promotion by hand after one that died",
            faults: Faults {
                by_hand: 1,
                promotions: 1,
                server_crashes: 1,
                ..Faults::default()
            },
            slow_host: true,
            term_max: 4,
            ..by_hand()
        },
        Scope {
            name: "start by override, crash",
            faults: Faults {
                overrides: 1,
                server_crashes: 1,
                ..Faults::default()
            },
            entries_max: 2,
            ..alone()
        },
    ]
}

/// A start wins a term and hands it to the worker.
pub fn handed_over(full: bool) -> Vec<Scope> {
    let base = || Scope {
        name: "term handed over, crash in between",
        begin: settled(three, &[ends([1, 1, 0], 0, 0)]),
        n_servers: 1,
        hands_over: true,
        faults: Faults {
            server_crashes: 1,
            ..Faults::default()
        },
        entries_max: 1,
        wanted: &["committed", "completed", "handed over"],
        ..Scope::default()
    };
    let rival = || Scope {
        name: "term handed over, a rival",
        n_servers: 2,
        faults: Faults::default(),
        ..base()
    };
    if !full {
        return vec![
            base(),
            Scope {
                name: "term handed over, a rival, terms to 2",
                term_max: 2,
                ..rival()
            },
        ];
    }
    vec![
        base(),
        Scope {
            name: "term handed over, crashes, terms to 4, 2 entries",
            entries_max: 2,
            term_max: 4,
            faults: Faults {
                server_crashes: 2,
                worker_crashes: 1,
                ..Faults::default()
            },
            ..base()
        },
        rival(),
        Scope {
            name: "term handed over, a cut, one late message",
            faults: Faults {
                server_crashes: 1,
                cuts: 1,
                ..Faults::default()
            },
            late_max: 1,
            ..base()
        },
        Scope {
            name: "term handed over, a rival, crash",
            faults: Faults {
                server_crashes: 1,
                ..Faults::default()
            },
            ..rival()
        },
    ]
}

/// One safekeeper alone holds the last entry, and its server has lost it. The standby sees it, or
/// the server that starts again writes another.
fn over_a_dead_tail() -> Scope {
    Scope {
        name: "promotion over a tail that a minority holds",
        begin: settled(three, &[ends([2, 1, 1], 1, 1)]),
        led: false,
        entries_max: 2,
        ..beside_a_primary()
    }
}

pub fn without(mutation: Mutation) -> Scope {
    let base = match mutation {
        Mutation::HistoryOfStandbyBelieved => Scope {
            faults: Faults {
                by_hand: 1,
                ..Faults::default()
            },
            entries_max: 2,
            ..beside_a_primary()
        },
        _ => over_a_dead_tail(),
    };
    Scope {
        mutation: Some(mutation),
        ..base
    }
}

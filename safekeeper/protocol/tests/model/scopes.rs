//! The scopes: which faults, how often, in how long a log. Small ones for every test run, large
//! ones for `MODEL=full`.

use safekeeper_protocol::Configuration;

use super::scope::{Begin, Ends, Scope, joint_grown, joint_pairs, three};
use super::world::{Faults, SAFEKEEPERS};

pub mod broken;
pub mod members;
pub mod promotion;

fn settled(configuration: fn() -> Configuration, ends: &[Ends]) -> Begin {
    Begin::Settled {
        configuration,
        ends: ends.to_vec(),
    }
}

fn ends(safekeepers: [usize; SAFEKEEPERS], first: usize, second: usize) -> Ends {
    Ends {
        safekeepers,
        servers: [Some(first), Some(second)],
    }
}

/// The local log is shorter than the quorum's, as long, or longer; so is one safekeeper's.
fn shorter_and_longer() -> [Ends; 4] {
    [
        ends([1, 1, 0], 0, 0),
        ends([1, 1, 0], 2, 0),
        ends([1, 0, 0], 1, 0),
        ends([1, 1, 2], 1, 0),
    ]
}

/// Before recovery; crashes in between lose any part of what was not flushed.
pub fn restarted_server(full: bool) -> Vec<Scope> {
    let one_crash = Faults {
        server_crashes: 1,
        ..Faults::default()
    };
    let base = || Scope {
        name: "server crashes once",
        begin: settled(three, &shorter_and_longer()),
        n_servers: 1,
        faults: one_crash,
        wanted: &["committed", "completed", "truncated"],
        ..Scope::default()
    };
    let mut scopes = vec![
        Scope {
            begin: settled(three, &shorter_and_longer()[..1]),
            ..base()
        },
        Scope {
            name: "server crashes once, works slowly",
            slow_host: true,
            entries_max: 1,
            ..base()
        },
    ];
    if full {
        let faults = Faults {
            safekeeper_crashes: 1,
            ..one_crash
        };
        scopes.extend([
            base(),
            Scope {
                name: "server and safekeeper crash",
                faults,
                ..base()
            },
            Scope {
                name: "server crashes twice, terms to 4, 3 entries",
                faults: Faults {
                    server_crashes: 2,
                    ..one_crash
                },
                term_max: 4,
                entries_max: 3,
                ..base()
            },
        ]);
    }
    scopes
}

/// A second server with a copy of the first one's data directory.
pub fn rivals(full: bool) -> Vec<Scope> {
    let base = || Scope {
        name: "two servers, terms to 2, 2 entries",
        begin: settled(three, &[ends([1, 1, 0], 0, 0)]),
        term_max: 2,
        wanted: &["committed", "completed"],
        ..Scope::default()
    };
    let three_terms = || Scope {
        name: "two servers, terms to 3, 1 entry",
        term_max: 3,
        entries_max: 1,
        ..base()
    };
    if !full {
        return vec![three_terms()];
    }
    let no_history = Ends {
        safekeepers: [1, 0, 0],
        servers: [Some(1), None],
    };
    vec![
        base(),
        three_terms(),
        Scope {
            name: "two servers, one without a history",
            begin: settled(three, &[no_history]),
            wanted: &["committed", "truncated"],
            ..three_terms()
        },
        Scope {
            name: "two servers, terms to 3, 2 entries",
            term_max: 3,
            ..base()
        },
        Scope {
            name: "two servers, one crash",
            faults: Faults {
                server_crashes: 1,
                ..Faults::default()
            },
            ..three_terms()
        },
    ]
}

/// By insert position, while backends go on.
pub fn restarted_worker(full: bool) -> Vec<Scope> {
    let base = || Scope {
        name: "worker crashes once",
        begin: settled(three, &[ends([1, 1, 0], 0, 0)]),
        n_servers: 1,
        faults: Faults {
            worker_crashes: 1,
            ..Faults::default()
        },
        wanted: &["committed", "completed"],
        ..Scope::default()
    };
    if !full {
        return vec![base()];
    }
    let and_server = Faults {
        worker_crashes: 1,
        server_crashes: 1,
        ..Faults::default()
    };
    vec![
        base(),
        Scope {
            name: "worker and server crash, terms to 4",
            begin: settled(three, &shorter_and_longer()),
            faults: and_server,
            term_max: 4,
            ..base()
        },
        Scope {
            name: "worker and safekeeper crash",
            faults: Faults {
                server_crashes: 0,
                safekeeper_crashes: 1,
                ..and_server
            },
            ..base()
        },
        Scope {
            name: "worker crashes, a rival",
            n_servers: 2,
            entries_max: 1,
            ..base()
        },
    ]
}

/// Configurations are written, and the first term won. It takes two terms.
pub fn first_use(full: bool) -> Vec<Scope> {
    let all = || vec![0, 1, 2];
    let base = || Scope {
        name: "first use, a crash in between",
        begin: Begin::FirstUse {
            lists: [all(), all()],
            local: [0, 0],
        },
        n_servers: 1,
        faults: Faults {
            server_crashes: 1,
            ..Faults::default()
        },
        fresh_seeds: true,
        term_max: 4,
        entries_max: 1,
        wanted: &["committed"],
        ..Scope::default()
    };
    let rivals = || Scope {
        name: "first use, two servers, terms to 3",
        n_servers: 2,
        faults: Faults::default(),
        term_max: 3,
        ..base()
    };
    let contradicting = || Scope {
        name: "first use, contradicting lists",
        begin: Begin::FirstUse {
            lists: [vec![0, 1], vec![1, 2]],
            local: [0, 0],
        },
        n_servers: 2,
        wanted: &["committed", "refused"],
        ..base()
    };
    if !full {
        return vec![
            base(),
            Scope {
                name: "first use, contradicting lists, no crash",
                faults: Faults::default(),
                term_max: 3,
                ..contradicting()
            },
        ];
    }
    vec![
        base(),
        contradicting(),
        rivals(),
        Scope {
            name: "first use, a safekeeper crashes or is wiped",
            faults: Faults {
                safekeeper_crashes: 1,
                wipes: 1,
                ..Faults::default()
            },
            ..base()
        },
    ]
}

/// Votes and commits need a majority of both sets; no step changes the sets.
pub fn joint(full: bool) -> Vec<Scope> {
    let pairs = [ends([1, 1, 1], 0, 1), ends([1, 1, 0], 1, 0)];
    let base = || Scope {
        name: "joint {1,2} and {2,3}",
        begin: settled(joint_pairs, &pairs),
        entries_max: 1,
        wanted: &["committed", "completed"],
        ..Scope::default()
    };
    let grown = || Scope {
        name: "joint {1} and {1,2,3}",
        begin: settled(joint_grown, &[ends([1, 1, 0], 0, 1)]),
        ..base()
    };
    if !full {
        return vec![Scope {
            name: "joint {1,2} and {2,3}, terms to 2",
            term_max: 2,
            ..base()
        }];
    }
    let crash = Faults {
        server_crashes: 1,
        ..Faults::default()
    };
    vec![
        base(),
        Scope {
            name: "joint {1,2} and {2,3}, 2 entries",
            entries_max: 2,
            ..base()
        },
        grown(),
        Scope {
            name: "joint {1} and {1,2,3}, a crash",
            n_servers: 1,
            entries_max: 2,
            faults: crash,
            ..grown()
        },
    ]
}

pub fn lost_safekeepers(full: bool) -> Vec<Scope> {
    let base = || Scope {
        name: "safekeeper crashes",
        begin: settled(three, &shorter_and_longer()),
        n_servers: 1,
        faults: Faults {
            safekeeper_crashes: 1,
            ..Faults::default()
        },
        wanted: &["committed", "truncated"],
        ..Scope::default()
    };
    let wiped = || Scope {
        name: "safekeeper is wiped, two servers",
        begin: settled(three, &[ends([1, 1, 1], 1, 1)]),
        n_servers: 2,
        faults: Faults {
            wipes: 1,
            ..Faults::default()
        },
        entries_max: 1,
        wanted: &["committed"],
        ..Scope::default()
    };
    if !full {
        return vec![
            base(),
            Scope {
                term_max: 2,
                ..wiped()
            },
        ];
    }
    vec![
        Scope {
            name: "safekeepers crash twice, terms to 4",
            faults: Faults {
                safekeeper_crashes: 2,
                ..Faults::default()
            },
            term_max: 4,
            ..base()
        },
        wiped(),
        Scope {
            name: "safekeeper crashes, two servers",
            faults: Faults {
                safekeeper_crashes: 1,
                ..Faults::default()
            },
            ..wiped()
        },
    ]
}

/// What was said on a connection that is given up may still arrive, long after.
pub fn late_messages(full: bool) -> Vec<Scope> {
    let base = || Scope {
        name: "a cut, one late message",
        begin: settled(three, &shorter_and_longer()),
        n_servers: 1,
        faults: Faults {
            cuts: 1,
            ..Faults::default()
        },
        late_max: 1,
        entries_max: 1,
        wanted: &["committed", "stale"],
        ..Scope::default()
    };
    let greetings = || Scope {
        name: "late greetings, a server crash",
        faults: Faults {
            server_crashes: 1,
            ..Faults::default()
        },
        begin: settled(three, &shorter_and_longer()[..1]),
        late_max: 0,
        prompt_greetings: false,
        ..base()
    };
    let rivals = || Scope {
        name: "two servers, one late message, terms to 2",
        begin: settled(three, &[ends([1, 1, 0], 0, 0)]),
        n_servers: 2,
        faults: Faults::default(),
        term_max: 2,
        wanted: &["committed"],
        ..base()
    };
    if !full {
        return vec![base(), greetings(), rivals()];
    }
    let cut_and_timeout = Faults {
        cuts: 1,
        timeouts: 1,
        ..Faults::default()
    };
    vec![
        Scope {
            name: "a cut, a timeout, two late messages",
            faults: cut_and_timeout,
            late_max: 2,
            entries_max: 2,
            ..base()
        },
        Scope {
            name: "late greetings, a cut, a server crash",
            faults: Faults {
                server_crashes: 1,
                cuts: 1,
                ..Faults::default()
            },
            begin: settled(three, &shorter_and_longer()),
            ..greetings()
        },
        Scope {
            name: "two servers, one late message, terms to 3",
            term_max: 3,
            ..rivals()
        },
    ]
}

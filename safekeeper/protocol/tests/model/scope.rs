//! What is explored: how a state space begins, what may happen in it, and where it ends.

use std::sync::atomic::{AtomicU64, Ordering};

use safekeeper_protocol::mutation::{Keeper, Mutation};
use safekeeper_protocol::*;

use super::members::member;
use super::step::{Step, apply, enabled};
use super::world::*;

/// How the cluster stands when the exploration begins.
#[derive(Clone, Debug)]
pub enum Begin {
    /// Nobody was ever configured. Each server lists these safekeepers, and holds so many entries.
    FirstUse {
        lists: [Vec<usize>; SERVERS],
        local: [usize; SERVERS],
    },
    /// Term 1 has reigned, all with `{1}` as their history. Several ways its end may have left things.
    Settled {
        configuration: fn() -> Configuration,
        ends: Vec<Ends>,
    },
    /// The same, and the first server has won term 2 since, and died before it sent a byte: its
    /// history file alone knows that this reign began at `start`.
    DeadReign { ends: Ends, start: usize },
}

/// How many entries of term 1 each log holds.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    pub safekeepers: [usize; SAFEKEEPERS],
    /// `None`: this server's data directory has no history file.
    pub servers: [Option<usize>; SERVERS],
}

pub struct Scope {
    pub name: &'static str,
    pub begin: Begin,
    /// The second one may be left out.
    pub n_servers: usize,
    pub faults: Faults,
    pub term_max: u64,
    /// Entries of the longest log.
    pub entries_max: usize,
    /// Answers and appends that may be on their way at a time while other things happen.
    pub late_max: usize,
    /// A greeting is answered at once: the log is still asked for by the vote, at any time.
    pub prompt_greetings: bool,
    /// Comparing, completing and persisting take time, in which other things happen.
    pub slow_host: bool,
    /// What the start wins goes to its worker; else the start's proposer stays.
    pub hands_over: bool,
    /// Term of a safekeeper, and what it holds of a change that somebody has begun and died over.
    pub half_begun: fn(usize) -> Option<(Term, Configuration)>,
    /// A server changes the members to the set of its own number only.
    pub own_sets: bool,
    /// The first server leads already, and all members follow it.
    pub led: bool,
    /// The second server is a standby.
    pub standby: bool,
    /// A server may hold other bytes than the quorum under the same terms: comparing is to find them.
    pub bytes_may_differ: bool,
    /// What the members may be changed to.
    pub sets: &'static [&'static [usize]],
    /// Each worker draws random numbers of its own. They matter for the lineage, at first use.
    pub fresh_seeds: bool,
    /// A rule that is broken on purpose.
    pub mutation: Option<Mutation>,
    /// What must happen for the exploration to count.
    pub wanted: &'static [&'static str],
    pub seen: Seen,
    pub pools: Pools,
}

/// How often something happened: that it can happen at all keeps an exploration from being empty.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    pub fn count(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Default)]
pub struct Seen {
    pub led: Count,
    pub committed: Count,
    pub completed: Count,
    pub truncated: Count,
    pub stale: Count,
    pub refused: Count,
    pub promoted: Count,
    pub handed_over: Count,
    pub changed: Count,
    pub reconfigured: Count,
}

impl Seen {
    pub fn all(&self) -> [(&'static str, u64); 10] {
        [
            ("led", self.led.get()),
            ("committed", self.committed.get()),
            ("completed", self.completed.get()),
            ("truncated", self.truncated.get()),
            ("stale", self.stale.get()),
            ("refused", self.refused.get()),
            ("promoted", self.promoted.get()),
            ("handed over", self.handed_over.get()),
            ("changed", self.changed.get()),
            ("reconfigured", self.reconfigured.get()),
        ]
    }
}

impl Default for Scope {
    fn default() -> Scope {
        Scope {
            name: "",
            begin: Begin::Settled {
                configuration: three,
                ends: Vec::new(),
            },
            n_servers: SERVERS,
            faults: Faults::default(),
            term_max: 3,
            entries_max: 2,
            late_max: 0,
            prompt_greetings: true,
            slow_host: false,
            hands_over: false,
            led: false,
            standby: false,
            bytes_may_differ: false,
            sets: &[],
            half_begun: |_| None,
            own_sets: false,
            fresh_seeds: false,
            mutation: None,
            wanted: &[],
            seen: Seen::default(),
            pools: Pools::default(),
        }
    }
}

pub fn cluster() -> ClusterIdentity {
    ClusterIdentity {
        system_id: 7,
        name: String::new(),
        pg_major: 17,
        segment_size: 1 << 20,
    }
}

/// The judge's own arithmetic: that of the core may be the rule that is broken.
pub fn majority_of_each_set(
    configuration: &Configuration,
    holds: impl Fn(&Member) -> bool,
) -> bool {
    let sets = std::iter::once(&configuration.members).chain(&configuration.new_members);
    sets.into_iter()
        .all(|set| 2 * set.iter().filter(|member| holds(member)).count() > set.len())
}

fn members(safekeepers: &[usize]) -> Vec<Member> {
    safekeepers.iter().map(|&i| member(i)).collect()
}

/// From {1} to another one, as written by the proposer of `term`.
pub fn joint_singles(term: u64, new: &[usize]) -> Configuration {
    Configuration {
        version: ConfigurationVersion {
            term: Term(term),
            generation: 1,
        },
        ..configured(&[0], Some(new))
    }
}

fn configured(old: &[usize], new: Option<&[usize]>) -> Configuration {
    Configuration {
        lineage: Lineage(7),
        version: ConfigurationVersion {
            term: Term(1),
            generation: 1,
        },
        members: members(old),
        new_members: new.map(members),
    }
}

pub fn three() -> Configuration {
    configured(&[0, 1, 2], None)
}

pub fn first_alone() -> Configuration {
    configured(&[0], None)
}

pub fn first_two() -> Configuration {
    configured(&[0, 1], None)
}

/// From {1, 2} to {2, 3}: votes and commits need all three.
pub fn joint_pairs() -> Configuration {
    configured(&[0, 1], Some(&[1, 2]))
}

/// From {1} to {1, 2, 3}: the first, and one of the others.
pub fn joint_grown() -> Configuration {
    configured(&[0], Some(&[0, 1, 2]))
}

impl Scope {
    pub fn begin(&self) -> Vec<World> {
        let mut worlds = self.logs();
        for world in &mut worlds {
            if self.standby {
                let second = world.servers[1].edit();
                second.standby = true;
                second.configuration = Configuration::default();
                world.seal(&self.pools);
            }
            if self.led {
                self.let_lead(world);
            }
        }
        worlds
    }

    /// The first server is started; then whatever can be done at once is done.
    fn let_lead(&self, world: &mut World) {
        let mut step = Some(Step::Start { server: 0 });
        while let Some(next) = step {
            *world = apply(self, world, next).expect("a step that is possible");
            let mut steps = Vec::new();
            enabled(self, world, &mut steps);
            let is_due = |step: &Step| match *step {
                Step::Work { .. } => true,
                Step::Start { server }
                | Step::Deliver {
                    server,
                    late: false,
                    ..
                } => server == 0,
                Step::Flush { late, .. }
                | Step::Push {
                    entry: false, late, ..
                } => !late,
                _ => false,
            };
            let due = steps.into_iter().filter(is_due);
            step = due
                .into_iter()
                .find(|&step| apply(self, world, step).is_some());
        }
        let leads = world.servers[0]
            .proposer
            .as_ref()
            .is_some_and(Proposer::is_leading);
        assert!(leads, "the first server does not lead in {}", self.name);
    }

    fn logs(&self) -> Vec<World> {
        match &self.begin {
            Begin::FirstUse { lists, local } => vec![self.first_use(lists, *local)],
            Begin::Settled {
                configuration,
                ends,
            } => ends
                .iter()
                .map(|ends| self.settled(&configuration(), ends))
                .collect(),
            Begin::DeadReign { ends, start } => vec![self.dead_reign(ends, *start)],
        }
    }

    /// One server, and nothing in the cluster that is not its own. At first use a configuration that
    /// it sent before it crashed may arrive late, and contradict the one it sends now.
    pub fn has_one_rightful_server(&self) -> bool {
        self.n_servers == 1 && !matches!(self.begin, Begin::FirstUse { .. })
    }

    /// Is it for the model to break this rule, being the host that keeps it? What the core breaks by
    /// itself, with the feature, is left to the core.
    pub fn breaks(&self, mutation: Mutation) -> bool {
        let is_hosts = mutation.kept_by() != Keeper::Core || !cfg!(feature = "mutations");
        is_hosts && self.mutation == Some(mutation)
    }

    fn first_use(&self, lists: &[Vec<usize>; SERVERS], local: [usize; SERVERS]) -> World {
        let safekeeper = |i| safekeeper(i, AcceptorState::unconfigured(cluster()), 0);
        let server = |i: usize| Server {
            list: lists[i].clone(),
            ..server(TermHistory::default(), Configuration::default(), local[i])
        };
        self.world(
            [0, 1, 2].map(safekeeper),
            [0, 1].map(server),
            Observed::default(),
        )
    }

    fn settled(&self, configuration: &Configuration, ends: &Ends) -> World {
        let reign = TermEntry {
            term: Term(1),
            tli: Tli(1),
            start_lsn: LOG_START,
        };
        let history = TermHistory::new(vec![reign]).expect("one reign");
        let node = |i: usize| {
            let is_member = configuration.all_members().any(|m| *m == member(i));
            if !is_member && (self.half_begun)(i).is_none() {
                return safekeeper(i, AcceptorState::unconfigured(cluster()), 0);
            }
            let held = (self.half_begun)(i);
            let (term, held) = held.unwrap_or_else(|| (Term(1), configuration.clone()));
            let state = AcceptorState {
                term,
                configuration: held,
                history: history.clone(),
                ..AcceptorState::unconfigured(cluster())
            };
            safekeeper(i, state, ends.safekeepers[i])
        };
        let server = |i: usize| match ends.servers[i] {
            Some(end) => server(history.clone(), configuration.clone(), end),
            None => server(TermHistory::default(), Configuration::default(), 1),
        };
        let holds = |end: usize| {
            majority_of_each_set(configuration, |member| {
                ends.safekeepers[member.id.0 as usize - 1] >= end
            })
        };
        let longest = ends.safekeepers.iter().copied().max().unwrap_or(0);
        let committed = (0..=longest).rev().find(|&end| holds(end)).unwrap_or(0);
        let mut observed = Observed {
            led: 1 << 1,
            committed: vec![ANCESTOR; committed],
            ..Observed::default()
        };
        observed.committed_in[1] = committed as u8;
        self.world([0, 1, 2].map(node), [0, 1].map(server), observed)
    }

    fn dead_reign(&self, ends: &Ends, start: usize) -> World {
        let mut world = self.settled(&three(), ends);
        let reign = TermEntry {
            term: Term(2),
            tli: Tli(1),
            start_lsn: lsn(start),
        };
        let first = world.servers[0].edit();
        first.history = first.history.succeeded_by(reign).expect("a later term");
        // Two of three gave it their votes.
        for (i, node) in world.safekeepers[..2].iter_mut().enumerate() {
            let mut state = node.durable.clone();
            state.term = Term(2);
            *node = Shared::new(safekeeper(i, state, ends.safekeepers[i]));
        }
        world.observed.edit().led |= 1 << 2;
        world.seal(&self.pools);
        world
    }

    fn world(
        &self,
        safekeepers: [Safekeeper; SAFEKEEPERS],
        servers: [Server; SERVERS],
        observed: Observed,
    ) -> World {
        let mut world = World {
            safekeepers: safekeepers.map(Shared::new),
            servers: servers.map(Shared::new),
            links: std::array::from_fn(|_| std::array::from_fn(|_| Shared::new(Link::default()))),
            observed: Shared::new(observed),
            faults: self.faults,
        };
        world.seal(&self.pools);
        world
    }
}

fn safekeeper(i: usize, durable: AcceptorState, end: usize) -> Safekeeper {
    let begun = !durable.history.is_empty();
    let flush_lsn = if begun { lsn(end) } else { Lsn::INVALID };
    let incarnation = Incarnation(i as u128 + 1);
    Safekeeper {
        acceptor: Acceptor::new(
            MemberId(i as u64 + 1),
            incarnation,
            durable.clone(),
            flush_lsn,
        ),
        incarnation,
        durable,
        begun,
        entries: vec![ANCESTOR; end],
        flushed: end,
    }
}

fn server(history: TermHistory, configuration: Configuration, end: usize) -> Server {
    Server {
        proposer: None,
        task: None,
        up: false,
        deposed: false,
        standby: false,
        won: None,
        tli: 1,
        unled_from: None,
        run: 0,
        starts: 0,
        list: (0..SAFEKEEPERS).collect(),
        history,
        configuration,
        entries: vec![ANCESTOR; end],
        flushed: end,
    }
}

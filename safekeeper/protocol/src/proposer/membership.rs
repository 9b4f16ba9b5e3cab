//! Members change, driven by the proposer that leads, without a stall of commits (design §4.6).
//!
//! ```text
//!   Stamping     the configuration as it is, under our term, on majorities   so that what an older
//!   │                                                                        proposer had begun is void
//!   CatchingUp   new safekeepers follow as learners: they count for nothing
//!   │
//!   Joint        old and new set; votes and commits need a majority of both
//!   │   └──► (given up) back to the old set
//!   Final        the new set, on a majority of it
//! ```
//!
//! A version is `(term, generation)` and compares as that: two proposers may both write a second
//! generation, and never in the same term. A joint configuration is left, forwards or back, only
//! when a majority of the set it is left for holds it, and holds all that may be committed, in this
//! term; forwards, a majority of the old set must hold it too, so that nobody can be elected any
//! more who has not heard of the new one. Every one of these conditions was found by a trace that
//! loses a commit without it (S1).
//!
//! A proposer that finds a joint configuration at the beginning of its reign finishes it: it was
//! elected by both sets, so both are there.

use super::*;
use crate::ConfigurationDefect;

/// Why a change of members was not begun, or not given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangeRefusal {
    /// Only the proposer that leads changes members.
    NotLeading,
    /// One at a time.
    UnderWay,
    /// There is none, or its outcome is decided.
    NothingToGiveUp,
    /// The members are what they should become.
    NoChange,
    Defect(ConfigurationDefect),
    TooMany {
        n_members: usize,
    },
}

impl fmt::Display for ChangeRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ChangeRefusal::NotLeading => f.write_str("this server does not lead"),
            ChangeRefusal::UnderWay => f.write_str("another change of members is under way"),
            ChangeRefusal::NothingToGiveUp => {
                f.write_str("no change of members is under way that could be given up")
            }
            ChangeRefusal::NoChange => f.write_str("these are the members already"),
            ChangeRefusal::Defect(defect) => defect.fmt(f),
            ChangeRefusal::TooMany { n_members } => write!(
                f,
                "{n_members} members, at most {} are supported",
                Configuration::MEMBERS_MAX
            ),
        }
    }
}

impl core::error::Error for ChangeRefusal {}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Change {
    /// The set that will be.
    target: Vec<Member>,
    step: Step,
    /// A learner whose log is empty begins it with the segment that holds this.
    begin_lsn: Lsn,
    /// Learners must have WAL up to here to become members. Below, the others may have removed it
    /// before there were learners; the segment of `commit_lsn` they had kept, and what comes after
    /// it they keep for the learners too.
    needed_lsn: Lsn,
    /// Safekeepers that have told, in this term, that they hold the present configuration.
    held_by: Vec<(MemberId, Incarnation)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    /// `given_up`: a joint configuration was found, and is to be left for the old set.
    Stamping {
        given_up: bool,
    },
    CatchingUp,
    Joint {
        given_up: bool,
    },
    Final,
}

impl Proposer {
    /// Begins to change the members to `target`. Those that are new must be peers (see
    /// [`Self::add_peer`]), connected at some time. An empty log among them begins with the segment
    /// that holds `begin_lsn`: the oldest WAL which the present members still keep. Later would do
    /// for the log's safety, but what a member that lags still needs would then be on fewer of them,
    /// and with the last of those that member is left behind for ever.
    pub fn change_members(
        &mut self,
        target: Vec<Member>,
        begin_lsn: Lsn,
        now_ms: u64,
        out: &mut Actions,
    ) -> Result<(), ChangeRefusal> {
        if !self.is_leading() {
            return Err(ChangeRefusal::NotLeading);
        }
        if self.change.is_some() {
            return Err(ChangeRefusal::UnderWay);
        }
        if target.len() > Configuration::MEMBERS_MAX {
            let n_members = target.len();
            return Err(ChangeRefusal::TooMany { n_members });
        }
        let wanted = Configuration {
            members: target.clone(),
            ..self.configuration.clone()
        };
        if let Some(defect) = wanted.defect() {
            return Err(ChangeRefusal::Defect(defect));
        }
        if wanted == self.configuration {
            return Err(ChangeRefusal::NoChange);
        }
        let segment_size = self.settings.cluster.segment_size;
        self.change = Some(Change {
            target,
            step: Step::Stamping { given_up: false },
            begin_lsn,
            needed_lsn: self.commit_lsn.segment_start(segment_size),
            held_by: Vec::new(),
        });
        self.stamp(now_ms, out);
        Ok(())
    }

    /// Leaves the members as they were, unless the new ones have been decided upon.
    pub fn give_up_change(&mut self, now_ms: u64, out: &mut Actions) -> Result<(), ChangeRefusal> {
        let Some(change) = self
            .change
            .as_mut()
            .filter(|_| self.phase == Phase::Leading)
        else {
            return Err(ChangeRefusal::NothingToGiveUp);
        };
        match &mut change.step {
            Step::Final => return Err(ChangeRefusal::NothingToGiveUp),
            Step::Joint { given_up } => *given_up = true,
            // A joint configuration that was found can only be left, and only after it is stamped:
            // what its proposer went on to may be on a majority of the new set.
            Step::Stamping { given_up } if self.configuration.new_members.is_some() => {
                *given_up = true;
            }
            Step::Stamping { .. } | Step::CatchingUp => {
                self.change = None;
                self.dismiss_strangers();
            }
        }
        self.advance_change(now_ms, out);
        Ok(())
    }

    /// The step that is under way, for people; `None` if no change is.
    pub fn change_step(&self) -> Option<&'static str> {
        Some(match self.change.as_ref()?.step {
            Step::Stamping { .. } => "stamping",
            Step::CatchingUp => "catching up",
            Step::Joint { given_up: false } => "joint",
            Step::Joint { given_up: true } => "given up",
            Step::Final => "final",
        })
    }

    /// At the beginning of a reign: a joint configuration was left behind.
    pub(super) fn finish_change_of_others(&mut self, now_ms: u64, out: &mut Actions) {
        if self.change.is_some() {
            return;
        }
        if let Some(target) = self.configuration.new_members.clone() {
            self.change = Some(Change {
                target,
                step: Step::Stamping { given_up: false },
                begin_lsn: Lsn::INVALID,
                needed_lsn: Lsn::INVALID,
                held_by: Vec::new(),
            });
            self.stamp(now_ms, out);
        }
    }

    /// The configuration as it is, under our term: whatever another has begun is older from then on.
    fn stamp(&mut self, now_ms: u64, out: &mut Actions) {
        if is_on(Mutation::ChangeWithoutStamping) {
            self.peer_indexes().for_each(|peer| self.note_held(peer));
            return self.advance_change(now_ms, out);
        }
        self.hand_out(self.configuration.clone(), now_ms, out);
    }

    /// Writes the next version, with the members of `configuration`, and sends it to everybody
    /// whom it concerns, those included who are members no more. From here on it is what we go by.
    pub(super) fn hand_out(
        &mut self,
        configuration: Configuration,
        now_ms: u64,
        out: &mut Actions,
    ) {
        let before = self.configuration.clone();
        let generation = match before.version.term == self.term {
            true => before.version.generation + 1,
            false => 1,
        };
        self.configuration = Configuration {
            version: ConfigurationVersion {
                term: self.term,
                generation,
            },
            ..configuration
        };
        if let Some(change) = &mut self.change {
            change.held_by.clear();
        }
        let configuration = self.configuration.clone();
        let concerned: Vec<PeerIdx> = self
            .links_of(|g| self.is_member(g) || self.is_learner(g) || is_in(g, before.all_members()))
            .map(|(peer, _)| peer)
            .collect();
        for peer in concerned {
            self.send_configure(peer, self.term, &configuration, now_ms, out);
        }
    }

    /// This peer's last word on its configuration was the present one, in this term.
    pub(super) fn note_held(&mut self, peer: PeerIdx) {
        let (term, version) = (self.term, self.configuration.version);
        let greeting = self.links[peer.0]
            .as_ref()
            .and_then(|link| link.greeting.as_ref());
        let (Some(change), Some(greeting)) = (&mut self.change, greeting) else {
            return;
        };
        let holder = (greeting.member_id, greeting.incarnation);
        let holds = greeting.term == term && greeting.configuration.version == version;
        if holds && !change.held_by.contains(&holder) {
            change.held_by.push(holder);
        }
    }

    /// Takes as many steps of the change as are due.
    pub(super) fn advance_change(&mut self, now_ms: u64, out: &mut Actions) {
        if self.phase != Phase::Leading {
            return;
        }
        while let Some(change) = &self.change {
            let target = change.target.clone();
            let present = self.configuration.clone();
            let step = change.step;
            match step {
                Step::Stamping { .. } if !present.has_quorum(|member| self.holds(member)) => {
                    return;
                }
                Step::Stamping { given_up } if present.new_members.is_some() => {
                    self.enter(Step::Joint { given_up });
                }
                Step::Stamping { .. } => {
                    self.enter(Step::CatchingUp);
                    self.greet_learners(now_ms, out);
                }
                Step::CatchingUp if !self.learners_are_near() => return,
                Step::CatchingUp => {
                    self.enter(Step::Joint { given_up: false });
                    let joint = Configuration {
                        new_members: Some(target),
                        ..present
                    };
                    self.hand_out(joint, now_ms, out);
                    return;
                }
                Step::Joint { given_up } => {
                    let both_hold = present.has_quorum(|member| self.holds(member))
                        || is_on(Mutation::JointLeftWithoutOldMajority);
                    let members = match given_up {
                        true => present.members.clone(),
                        false => target,
                    };
                    let next = Configuration {
                        members,
                        new_members: None,
                        ..present
                    };
                    if !(given_up || both_hold) || !self.may_be_left_for(&next) {
                        return;
                    }
                    self.enter(Step::Final);
                    self.hand_out(next, now_ms, out);
                    return;
                }
                Step::Final if !present.has_quorum(|member| self.holds(member)) => return,
                Step::Final => {
                    self.change = None;
                    self.dismiss_strangers();
                    self.local.configuration = self.configuration.clone();
                    out.push(ProposerAction::PersistHistory {
                        history: self.history.clone(),
                        configuration: self.configuration.clone(),
                    });
                    self.advance_commit(out);
                }
            }
        }
    }

    fn enter(&mut self, step: Step) {
        if let Some(change) = &mut self.change {
            change.step = step;
        }
    }

    fn holds(&self, member: &Member) -> bool {
        let key = (member.id, member.incarnation);
        self.change
            .as_ref()
            .is_some_and(|change| change.held_by.contains(&key))
    }

    /// A majority of the set that remains holds the joint configuration and all that may be
    /// committed: up to the term's start at least, since below it commits were counted by others.
    fn may_be_left_for(&self, next: &Configuration) -> bool {
        let committed = self.commit_lsn.max(self.term_start_lsn());
        let has_all = |member: &Member| {
            self.flushed(member.id, member.incarnation) >= committed
                || is_on(Mutation::JointLeftWithoutData)
        };
        next.has_quorum(|member| self.holds(member) && has_all(member))
    }

    /// Every learner is so near that as a member it would not hold up commits for long, and lacks
    /// nothing that nobody has any more.
    fn learners_are_near(&self) -> bool {
        let needed_lsn = self.change.as_ref().map(|change| change.needed_lsn);
        self.learners().all(|member| {
            let flushed = self.flushed(member.id, member.incarnation);
            let follows = |link: &Link| {
                link.is_of(member) && link.stream.is_some_and(|stream| stream.following)
            };
            self.links.iter().flatten().any(follows)
                && flushed.is_valid()
                && Some(flushed) >= needed_lsn
                && self.commit_lsn.saturating_distance_from(flushed) <= WINDOW
        })
    }

    /// Safekeepers that are to become members.
    pub(super) fn learners(&self) -> impl Iterator<Item = &Member> {
        let target = self.change.iter().flat_map(|change| &change.target);
        target.filter(|member| {
            let id = (member.id, member.incarnation);
            self.configuration.member(id.0, id.1).is_none()
        })
    }

    fn is_learner(&self, greeting: &AcceptorGreeting) -> bool {
        let stamped = |change: &Change| !matches!(change.step, Step::Stamping { .. });
        self.change.as_ref().is_some_and(stamped) && is_in(greeting, self.learners())
    }

    /// This connection is the one over which a member or a learner gets WAL.
    pub(super) fn is_fed(&self, peer: PeerIdx) -> bool {
        self.links_of(|greeting| self.is_member(greeting) || self.is_learner(greeting))
            .any(|(fed, _)| fed == peer)
    }

    /// What a learner said of its log may be long ago: it may have been a member before.
    fn greet_learners(&mut self, now_ms: u64, out: &mut Actions) {
        let learners: Vec<PeerIdx> = self
            .links_of(|greeting| self.is_learner(greeting))
            .map(|(peer, _)| peer)
            .collect();
        for peer in learners {
            self.greet(peer, now_ms, out);
        }
    }

    /// Where the log of a learner that holds nothing begins. Members begin with the log itself.
    pub(super) fn begin_for_learner(&self, greeting: &AcceptorGreeting) -> Lsn {
        match &self.change {
            // Where no WAL is yet it would acknowledge what it never got.
            Some(change) if is_in(greeting, self.learners()) => change
                .begin_lsn
                .min(self.commit_lsn)
                .segment_start(self.settings.cluster.segment_size),
            _ => Lsn::INVALID,
        }
    }

    /// Those that are no members any more get nothing any more.
    fn dismiss_strangers(&mut self) {
        for peer in self.peer_indexes() {
            if !self.is_fed(peer)
                && let Some(link) = &mut self.links[peer.0]
            {
                link.stream = None;
            }
        }
    }
}

fn is_in<'a>(greeting: &AcceptorGreeting, mut members: impl Iterator<Item = &'a Member>) -> bool {
    members.any(|member| greeting.is_of(member))
}

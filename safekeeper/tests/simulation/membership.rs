//! Members change while everything else goes on, and what may be lost without losing everything.
//!
//! Beside the first members there are spare safekeepers. An operator asks the primary that leads
//! for another set: one more, one less, one for another, a wiped one for itself, or any set at all;
//! and sometimes gives the change up again. What interrupts a change is left to the other faults.

use safekeeper_protocol::{
    Configuration, ConfigurationVersion, Lsn, Member, PeerAddress, PeerIdx, ProposerMessage,
};

use super::cluster::{Cluster, Event};
use super::faults::Mark;
use super::network::{NodeIdx, ServerIdx};
use super::node::Node;
use super::postgres::{Settings, peer_address};

/// Most members that a change here leads to.
const MEMBERS_MAX: usize = 5;

/// A change of members that a process has begun, or found.
#[derive(Clone, Debug)]
pub struct ChangeUnderWay {
    target: Vec<Member>,
    given_up: bool,
    replaces_wiped: bool,
    of_another: bool,
}

impl Cluster {
    /// What a proposer that begins now is told: before there is a quorum the list names those who
    /// are to be its members, afterwards everybody.
    pub fn settings(&self) -> Settings {
        let mut settings = self.settings;
        if self.checker.committed_lsn().is_valid() {
            settings.n_nodes = self.nodes.len();
        }
        settings
    }

    /// One that leads, has its worker, and writes.
    fn leader(&self) -> Option<ServerIdx> {
        let leads = |idx: &ServerIdx| {
            let process = self.servers[*idx].process.as_ref();
            process.is_some_and(|p| p.proposer.is_leading() && p.won.is_none() && p.wal.is_some())
        };
        let leaders = (0..self.servers.len()).filter(leads);
        leaders.max_by_key(|idx| {
            self.servers[*idx]
                .process
                .as_ref()
                .map(|p| p.proposer.term())
        })
    }

    pub fn change_members(&mut self) -> bool {
        let Some(idx) = self.leader() else {
            return false;
        };
        let process = self.servers[idx].process.as_ref().expect("it leads");
        if !process.commit_lsn.is_valid() {
            return false;
        }
        let present = process.proposer.configuration().clone();
        if present.new_members.is_some() {
            return false;
        }
        let begin_lsn = self.kept_by_all(&present.members);
        let target = self.draw_members(&present.members);
        if target.is_empty() || !self.has_sound_majority(&target, None) {
            return false;
        }
        self.list_everybody(idx);
        let (wanted, mut begun) = (target.clone(), false);
        self.with_proposer(idx, |proposer, now_ms, out| {
            begun = proposer
                .change_members(wanted, begin_lsn, now_ms, out)
                .is_ok();
        });
        if !begun {
            return false;
        }
        self.say(|| format!("server {idx} changes members to {target:?}"));
        let replaces_wiped = target.iter().any(|member| {
            let mut twins = present.members.iter();
            twins.any(|old| old.id == member.id && old.incarnation != member.incarnation)
        });
        if let Some(process) = &mut self.servers[idx].process {
            process.change = Some(ChangeUnderWay {
                target,
                given_up: false,
                replaces_wiped,
                of_another: false,
            });
        }
        self.watch_change(idx);
        true
    }

    /// From here on every sound member has the WAL, and keeps it for those who will be members: a
    /// new one's log begins here. One whose log ends below must be made anew first, or it could
    /// become a member and never catch up.
    fn kept_by_all(&self, present: &[Member]) -> Lsn {
        let nodes = self.nodes.iter().filter(|node| !node.is_lost);
        let members = nodes.filter(|node| present.iter().any(|member| is_of(member, node)));
        let kept = members.filter_map(|node| Some(node.log()?.1));
        kept.max().unwrap_or(Lsn::INVALID)
    }

    fn can_catch_up(&self, member: &Member, from: Lsn) -> bool {
        let node = self.nodes.iter().find(|node| is_of(member, node));
        let end = node.and_then(Node::log).map(|(_, _, flush_lsn)| flush_lsn);
        end.is_none_or(|end| !end.is_valid() || end >= from)
    }

    pub fn give_up_change(&mut self) -> bool {
        let changing = |idx: &ServerIdx| {
            let process = self.servers[*idx].process.as_ref();
            process.is_some_and(|process| process.change.is_some())
        };
        let Some(idx) = (0..self.servers.len()).find(changing) else {
            return false;
        };
        let Some(process) = &mut self.servers[idx].process else {
            return false;
        };
        let change = process.change.as_mut().expect("it was looked for");
        let before = std::mem::replace(&mut change.given_up, true);
        let mut given_up = false;
        self.with_proposer(idx, |proposer, now_ms, out| {
            given_up = proposer.give_up_change(now_ms, out).is_ok();
        });
        let process = self.servers[idx].process.as_mut();
        if let Some(change) = process.and_then(|process| process.change.as_mut()) {
            change.given_up = before || given_up;
        }
        given_up
    }

    /// Has the change that this server drives come to its end?
    pub fn watch_change(&mut self, idx: ServerIdx) {
        let Some(process) = &mut self.servers[idx].process else {
            return;
        };
        let proposer = &process.proposer;
        if !proposer.is_leading() || proposer.change_step().is_some() {
            return;
        }
        let Some(change) = process.change.take() else {
            return;
        };
        let reached = proposer.configuration().members == change.target;
        self.tally.add(match reached {
            true => Mark::MembersChanged,
            false => Mark::ChangeGivenUp,
        });
        if reached && change.replaces_wiped {
            self.tally.add(Mark::WipedReplaced);
        }
        if change.of_another {
            self.tally.add(Mark::ChangeFinishedForAnother);
        }
        assert!(
            reached || change.given_up,
            "a change of members ended at {} instead of {:?}",
            proposer.configuration(),
            change.target
        );
    }

    /// A reign begins with a joint configuration.
    pub fn note_change_of_others(&mut self, idx: ServerIdx) {
        let Some(process) = &mut self.servers[idx].process else {
            return;
        };
        let Some(target) = process.proposer.configuration().new_members.clone() else {
            return;
        };
        process.change = Some(ChangeUnderWay {
            target,
            given_up: false,
            replaces_wiped: false,
            of_another: true,
        });
    }

    /// Another set: mostly it differs by one, and mends what is broken.
    fn draw_members(&mut self, present: &[Member]) -> Vec<Member> {
        let all: Vec<Member> = (0..self.nodes.len()).map(|idx| self.member(idx)).collect();
        let strangers: Vec<Member> = all
            .iter()
            .filter(|member| !present.iter().any(|other| other.is_same(member)))
            .filter(|member| self.is_sound(member))
            .filter(|member| self.can_catch_up(member, self.kept_by_all(present)))
            .cloned()
            .collect();
        let mut target = present.to_vec();
        let broken = target.iter().position(|member| !self.is_sound(member));
        let out = match broken {
            Some(broken) if self.random.chance(800) => broken,
            _ => self.random.below(target.len() as u64) as usize,
        };
        // The machine itself, if it was wiped, rather than another.
        let twin = strangers.iter().find(|member| member.id == target[out].id);
        let new = match twin.cloned().filter(|_| self.random.chance(700)) {
            Some(twin) => Some(twin),
            None => self.random.pick(&strangers).cloned(),
        };
        match (self.random.below(10), new) {
            (0..=2, Some(new)) if target.len() < MEMBERS_MAX => target.push(new),
            (3..=4, _) if target.len() > 1 => {
                target.remove(out);
            }
            (5, _) => {
                target.extend(strangers);
                target.retain(|_| self.random.chance(600));
                target.truncate(MEMBERS_MAX);
            }
            (_, Some(new)) => target[out] = new,
            _ => return Vec::new(),
        }
        let mut ids: Vec<_> = target.iter().map(|member| member.id).collect();
        ids.sort_unstable();
        ids.dedup();
        if ids.len() < target.len() {
            return Vec::new();
        }
        target
    }

    fn member(&self, idx: NodeIdx) -> Member {
        let PeerAddress { host, port } = peer_address(idx);
        Member {
            id: self.nodes[idx].id,
            incarnation: self.nodes[idx].incarnation,
            host,
            port,
        }
    }

    /// The operator has put everybody into the list, and had it read anew.
    fn list_everybody(&mut self, idx: ServerIdx) {
        let n_nodes = self.nodes.len();
        let Some(process) = &mut self.servers[idx].process else {
            return;
        };
        for peer in process.connections.len()..n_nodes {
            let place = process.proposer.add_peer(peer_address(peer));
            assert_eq!(place, PeerIdx(peer), "a peer is the node of that index");
            process.connections.push(None);
        }
        for peer in 0..n_nodes {
            self.at(1, Event::Dial { server: idx, peer });
        }
    }

    // ---- what may be lost -----------------------------------------------------------------

    /// May this safekeeper be lost for good? Not before there is something to lose: a first
    /// configuration binds those it names, and nobody else can take their place. And not if one of
    /// the sets that may still count would be left without a majority.
    pub fn may_lose(&mut self, idx: NodeIdx) -> bool {
        if !self.checker.committed_lsn().is_valid() || self.nodes[idx].is_lost {
            return false;
        }
        let sets = self.sets_that_count();
        sets.iter().all(|set| {
            let concerned = set.iter().any(|member| is_of(member, &self.nodes[idx]));
            !concerned || self.has_sound_majority(set, Some(idx))
        })
    }

    fn has_sound_majority(&self, set: &[Member], without: Option<NodeIdx>) -> bool {
        let lost = |member: &&Member| without.is_some_and(|idx| is_of(member, &self.nodes[idx]));
        let sound = set
            .iter()
            .filter(|member| self.is_sound(member) && !lost(member));
        sound.count() > set.len() / 2
    }

    /// It is there, with all it has promised.
    fn is_sound(&self, member: &Member) -> bool {
        let mut nodes = self.nodes.iter();
        nodes.any(|node| is_of(member, node) && !node.is_lost)
    }

    /// Every set of members by which somebody may still be elected, or commit, or change them.
    fn sets_that_count(&mut self) -> Vec<Vec<Member>> {
        let held: Vec<Option<Configuration>> = self
            .nodes
            .iter()
            .map(|node| node.state().map(|state| state.configuration))
            .collect();
        let holds = |member: &Member, version: ConfigurationVersion| {
            let mut nodes = self.nodes.iter().zip(&held);
            nodes.any(|(node, held)| {
                is_of(member, node) && held.as_ref().is_some_and(|held| held.version >= version)
            })
        };
        let decided = self
            .configurations
            .iter()
            .filter(|sent| sent.new_members.is_none() && !sent.is_provisional())
            .filter(|sent| sent.has_quorum(|member| holds(member, sent.version)))
            .map(|sent| sent.version)
            .max()
            .unwrap_or(ConfigurationVersion::NONE);
        self.configurations.retain(|sent| sent.version >= decided);
        let processes = self
            .servers
            .iter()
            .filter_map(|server| server.process.as_ref());
        let known = processes
            .clone()
            .map(|process| process.proposer.configuration());
        let targets = processes.filter_map(|process| Some(process.change.as_ref()?.target.clone()));
        self.configurations
            .iter()
            .chain(held.iter().flatten())
            .chain(known)
            .filter(|configuration| configuration.version >= decided)
            .flat_map(|known| [Some(known.members.clone()), known.new_members.clone()])
            .flatten()
            .chain(targets)
            .collect()
    }

    /// A configuration goes out: from now on it may come into force.
    pub fn remember_configuration(&mut self, message: &ProposerMessage) {
        if let ProposerMessage::Configure(configure) = message {
            let known = self.configurations.last();
            if known.is_none_or(|known| known.version != configure.configuration.version) {
                self.configurations.push(configure.configuration.clone());
            }
        }
    }

    /// The safekeepers that count by the newest configuration anybody holds.
    pub fn is_member(&self, idx: NodeIdx) -> bool {
        let held = self
            .nodes
            .iter()
            .filter_map(|node| Some(node.state()?.configuration));
        let newest = held.max_by_key(|configuration| configuration.version);
        newest.is_none_or(|newest| {
            let mut members = newest.all_members();
            members.any(|member| is_of(member, &self.nodes[idx]))
        })
    }

    /// No reign goes on with two sets of members.
    pub fn joint_is_left(&self) -> bool {
        let leader = self
            .leader()
            .and_then(|idx| self.servers[idx].process.as_ref());
        leader.is_some_and(|process| process.proposer.configuration().new_members.is_none())
    }
}

fn is_of(member: &Member, node: &Node) -> bool {
    member.id == node.id && member.incarnation == node.incarnation
}

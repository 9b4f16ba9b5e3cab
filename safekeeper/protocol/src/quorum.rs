//! Who the members are, and what a majority of them says.
//!
//! A configuration names its members; while membership changes it names two sets, and then every
//! decision needs a majority of both (Raft §6, joint consensus). All counting happens here, over
//! member ids, so that nowhere else an index into one list meets another list.
//!
//! `commit_lsn` is found the way etcd's raft does it: sort what the members have flushed, count a
//! majority down from the top. With three members that is the middle one, with five the third.

use alloc::string::String;
use alloc::vec::Vec;
use core::cmp::Ordering;
use core::fmt;

use crate::mutation::{Mutation, is_on};
use crate::{Lsn, Term};

/// An operator's number for a safekeeper, given at `safekeeper init --id`. Not 0.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberId(pub u64);

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Random identity of a safekeeper's data directory, made at init. A directory that was wiped and
/// made anew has forgotten its votes; its new incarnation keeps it from being counted as the old.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(pub u128);

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One safekeeper as the configuration knows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Member {
    pub id: MemberId,
    pub incarnation: Incarnation,
    /// Where the proposer that added it reached it; for people and for a later proposer.
    pub host: String,
    pub port: u16,
}

impl Member {
    /// Longest `host`, in bytes: what DNS allows.
    pub const HOST_LEN_MAX: usize = 255;

    /// The same safekeeper, with the same memory; its address may differ.
    pub fn is_same(&self, other: &Member) -> bool {
        self.id == other.id && self.incarnation == other.incarnation
    }
}

/// Version of a configuration. The term is that of the proposer that wrote it: two proposers may
/// both write a "generation 2", but never in the same term, so the term compares first (S1).
///
/// Before that, a provisional version compares lower than every confirmed one: a proposer that
/// has not heard of the confirmation and begins anew, in a higher term, must not undo it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ConfigurationVersion {
    pub term: Term,
    pub generation: u32,
}

impl ConfigurationVersion {
    /// "No configuration": lower than every one that was written.
    pub const NONE: ConfigurationVersion = ConfigurationVersion {
        term: Term(0),
        generation: 0,
    };

    /// Generation of a first configuration that is not yet held by all its members.
    pub const PROVISIONAL: u32 = 0;
}

impl Ord for ConfigurationVersion {
    fn cmp(&self, other: &ConfigurationVersion) -> Ordering {
        let rank = |version: &ConfigurationVersion| {
            if is_on(Mutation::ConfigurationByGeneration) {
                return (true, Term::NONE, version.generation);
            }
            let confirmed = version.generation != ConfigurationVersion::PROVISIONAL;
            (confirmed, version.term, version.generation)
        };
        rank(self).cmp(&rank(other))
    }
}

impl PartialOrd for ConfigurationVersion {
    fn partial_cmp(&self, other: &ConfigurationVersion) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for ConfigurationVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.term, self.generation)
    }
}

/// Random number of a quorum, drawn when its first configuration is written and handed down to
/// every later one. Configurations of different lineages are never compared: a safekeeper that was
/// configured by somebody else, for the same cluster, belongs to another quorum, however high its
/// version is.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lineage(pub u128);

impl fmt::Display for Lineage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Lineage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The members of the quorum, and while they change, also those they change to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Configuration {
    pub lineage: Lineage,
    pub version: ConfigurationVersion,
    pub members: Vec<Member>,
    /// Set while the configuration is joint.
    pub new_members: Option<Vec<Member>>,
}

impl Configuration {
    /// Most members of one set. Consensus gains nothing beyond seven; the limit is for decoding.
    pub const MEMBERS_MAX: usize = 16;

    /// Nothing was ever configured here.
    pub fn is_none(&self) -> bool {
        self.version == ConfigurationVersion::NONE
    }

    /// Written, but not yet known to be held by every member: elects nobody.
    pub fn is_provisional(&self) -> bool {
        !self.is_none() && self.version.generation == ConfigurationVersion::PROVISIONAL
    }

    /// The member of either set with this id and incarnation.
    pub fn member(&self, id: MemberId, incarnation: Incarnation) -> Option<&Member> {
        self.sets().flatten().find(|member| {
            member.id == id
                && (member.incarnation == incarnation || is_on(Mutation::WipedMemberVotes))
        })
    }

    /// Every member once, those of the old set first. While a wiped safekeeper is replaced by
    /// itself, both its incarnations.
    pub fn all_members(&self) -> impl Iterator<Item = &Member> {
        let added = self.new_members.iter().flatten();
        self.members
            .iter()
            .chain(added.filter(|new| !self.members.iter().any(|m| m.is_same(new))))
    }

    /// Same safekeepers in the same sets; addresses and versions may differ.
    pub fn same_members(&self, other: &Configuration) -> bool {
        let same = |a: &[Member], b: &[Member]| {
            a.len() == b.len() && a.iter().all(|m| b.iter().any(|n| m.is_same(n)))
        };
        same(&self.members, &other.members)
            && match (&self.new_members, &other.new_members) {
                (None, None) => true,
                (Some(a), Some(b)) => same(a, b),
                _ => false,
            }
    }

    /// A majority of each set satisfies `holds`. Asked of members, not of ids: while a wiped
    /// safekeeper is replaced by its successor, one id stands for two incarnations.
    pub fn has_quorum(&self, holds: impl Fn(&Member) -> bool) -> bool {
        self.sets()
            .all(|set| set.iter().filter(|member| holds(member)).count() >= majority(set.len()))
    }

    /// The highest position that a majority of each set has reached, where `flush_lsn` is what
    /// counts for a member: [`Lsn::INVALID`] for one that has not taken this term's Elected.
    pub fn quorum_lsn(&self, flush_lsn: impl Fn(&Member) -> Lsn) -> Lsn {
        let reached_by = self.sets().map(|set| {
            let mut reached: Vec<Lsn> = set.iter().map(&flush_lsn).collect();
            reached.sort_unstable_by(|a, b| b.cmp(a));
            reached
                .get(majority(set.len()) - 1)
                .copied()
                .unwrap_or(Lsn::INVALID)
        });
        let reached = if is_on(Mutation::CommitInOneSet) {
            reached_by.max()
        } else {
            reached_by.min()
        };
        reached.unwrap_or(Lsn::INVALID)
    }

    /// Of the set that is furthest from a majority: how many satisfy `holds`, and how many would
    /// have to.
    pub fn short_of_quorum(&self, holds: impl Fn(&Member) -> bool) -> (usize, usize) {
        let counts = self.sets().map(|set| {
            let n_holding = set.iter().filter(|member| holds(member)).count();
            (n_holding, majority(set.len()))
        });
        counts
            .max_by_key(|(n_holding, needed)| needed.saturating_sub(*n_holding))
            .unwrap_or_default()
    }

    /// Members whose agreement decides, in the larger set if there are two.
    pub fn quorum_size(&self) -> usize {
        self.sets()
            .map(|set| majority(set.len()))
            .max()
            .unwrap_or(0)
    }

    /// A set names nobody, or names an id twice.
    pub fn defect(&self) -> Option<ConfigurationDefect> {
        for set in self.sets() {
            if set.is_empty() {
                return Some(ConfigurationDefect::EmptySet);
            }
            for (i, member) in set.iter().enumerate() {
                if set[..i].iter().any(|earlier| earlier.id == member.id) {
                    return Some(ConfigurationDefect::DuplicateId(member.id));
                }
            }
        }
        None
    }

    fn sets(&self) -> impl Iterator<Item = &Vec<Member>> {
        core::iter::once(&self.members).chain(self.new_members.iter())
    }
}

impl fmt::Display for Configuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |f: &mut fmt::Formatter<'_>, set: &[Member]| {
            for (i, member) in set.iter().enumerate() {
                let comma = if i > 0 { "," } else { "" };
                write!(f, "{comma}{}", member.id)?;
            }
            Ok(())
        };
        write!(f, "{} {{", self.version)?;
        list(f, &self.members)?;
        if let Some(new_members) = &self.new_members {
            f.write_str("} -> {")?;
            list(f, new_members)?;
        }
        f.write_str("}")
    }
}

/// Why a list of members can't be a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigurationDefect {
    EmptySet,
    DuplicateId(MemberId),
}

impl fmt::Display for ConfigurationDefect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConfigurationDefect::EmptySet => f.write_str("a configuration without members"),
            ConfigurationDefect::DuplicateId(id) => {
                write!(f, "two members of a configuration have the id {id}")
            }
        }
    }
}

/// More than half of `n`.
pub fn majority(n: usize) -> usize {
    if is_on(Mutation::QuorumOfHalf) {
        return (n / 2).max(1);
    }
    n / 2 + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ids: &[u64]) -> Vec<Member> {
        ids.iter()
            .map(|&id| Member {
                id: MemberId(id),
                incarnation: Incarnation(u128::from(id)),
                host: String::from("h"),
                port: 5454,
            })
            .collect()
    }

    fn simple(ids: &[u64]) -> Configuration {
        Configuration {
            members: set(ids),
            ..Configuration::default()
        }
    }

    fn joint(old: &[u64], new: &[u64]) -> Configuration {
        Configuration {
            new_members: Some(set(new)),
            ..simple(old)
        }
    }

    #[test]
    fn a_majority_is_more_than_half() {
        for (n, want) in [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (7, 4)] {
            assert_eq!(majority(n), want, "of {n}");
        }
    }

    #[test]
    fn quorum_of_one_and_of_two_sets() {
        for (configuration, yes, want) in [
            (simple(&[1, 2, 3]), &[1u64, 2][..], true),
            (simple(&[1, 2, 3]), &[3], false),
            (simple(&[1, 2]), &[1], false),
            (simple(&[1]), &[1], true),
            (simple(&[1, 2, 3]), &[4, 5, 6], false),
            (joint(&[1, 2, 3], &[3, 4, 5]), &[1, 2], false),
            (joint(&[1, 2, 3], &[3, 4, 5]), &[4, 5], false),
            (joint(&[1, 2, 3], &[3, 4, 5]), &[1, 3, 4], true),
            (joint(&[1], &[2]), &[1], false),
            (joint(&[1], &[2]), &[1, 2], true),
            (simple(&[]), &[], false),
        ] {
            let quorum = configuration.has_quorum(|member| yes.contains(&member.id.0));
            assert_eq!(quorum, want, "{configuration}, {yes:?}");
        }
    }

    #[test]
    fn quorum_lsn_is_what_a_majority_of_each_set_has() {
        for (configuration, flushed, want) in [
            (
                simple(&[1, 2, 3]),
                &[(1u64, 30u64), (2, 20), (3, 10)][..],
                20,
            ),
            (simple(&[1, 2, 3]), &[(1, 30)], 0),
            (
                simple(&[1, 2, 3, 4]),
                &[(1, 40), (2, 30), (3, 20), (4, 10)],
                20,
            ),
            (simple(&[1, 2, 3, 4, 5]), &[(1, 50), (2, 40), (3, 30)], 30),
            (simple(&[1]), &[(1, 7)], 7),
            // The old set has 30, the new one only 10: a joint configuration commits 10.
            (joint(&[1, 2], &[2, 3]), &[(1, 30), (2, 30), (3, 10)], 10),
            (joint(&[1, 2], &[2, 3]), &[(2, 30), (3, 30)], 0),
            (simple(&[]), &[(1, 30)], 0),
        ] {
            let lsn = configuration.quorum_lsn(|member| {
                flushed
                    .iter()
                    .find(|(m, _)| *m == member.id.0)
                    .map_or(Lsn::INVALID, |(_, l)| Lsn(*l))
            });
            assert_eq!(lsn, Lsn(want), "{configuration}, {flushed:?}");
        }
    }

    #[test]
    fn versions_compare_by_term_before_generation() {
        let version = |term, generation| ConfigurationVersion {
            term: Term(term),
            generation,
        };
        assert!(version(2, 1) > version(1, 9));
        assert!(version(2, 2) > version(2, 1));
        assert!(version(1, 0) > ConfigurationVersion::NONE);
        assert!(version(1, 1) > version(9, ConfigurationVersion::PROVISIONAL));
    }

    #[test]
    fn a_wiped_member_is_no_member() {
        let configuration = simple(&[1, 2, 3]);
        assert!(configuration.member(MemberId(2), Incarnation(2)).is_some());
        assert!(configuration.member(MemberId(2), Incarnation(9)).is_none());
    }

    #[test]
    fn a_configuration_names_each_member_once() {
        assert_eq!(simple(&[1, 2]).defect(), None);
        assert_eq!(simple(&[]).defect(), Some(ConfigurationDefect::EmptySet));
        let twice = ConfigurationDefect::DuplicateId(MemberId(3));
        assert_eq!(joint(&[1], &[3, 3]).defect(), Some(twice));
        assert_eq!(joint(&[1, 2], &[2, 3]).all_members().count(), 3);
        assert!(joint(&[1, 2], &[2, 3]).same_members(&joint(&[2, 1], &[3, 2])));
        assert!(!simple(&[1, 2]).same_members(&joint(&[1, 2], &[1, 2])));
        let mut wiped = simple(&[1, 2]);
        wiped.members[1].incarnation = Incarnation(9);
        assert!(!simple(&[1, 2]).same_members(&wiped));
    }
}

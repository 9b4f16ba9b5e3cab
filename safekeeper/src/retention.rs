//! Which WAL is kept: a decision from a few numbers, made anew each second.
//!
//! ```text
//!   oldest_lsn       needed_from                       commit_lsn
//!   │   may go       │   a member, a consumer, a slot   │
//!   ├────────────────┼─────────────────────────────────┤
//!            wal_keep_size ◄────────────────────────────┤   kept though nobody asks
//!   max_wal_keep ◄──────────────────────────────────────┤   not kept though somebody does
//! ```
//!
//! Two bounds: `max_wal_keep` for each cluster, and `min_free_space` for the disk. Over one of them the
//! oldest WAL goes, whoever needs it: a full disk would stop commits instead. With too little space
//! on the disk, first goes what nobody asks for, of all clusters, and then a segment at a time of the
//! cluster that keeps most; the segment of commit_lsn always stays.
//!
//! A slot that needed what goes is lost, before it goes (slots.rs). A consumer is told 58P01, and a
//! member gets what it lacks from another one.

use safekeeper_protocol::Lsn;

/// How much WAL is kept below commit_lsn, in bytes; see the settings of these names.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    pub wal_keep_size: u64,
    pub max_wal_keep: Option<u64>,
    pub min_free_space: u64,
}

/// A bound that takes WAL from somebody who needs it. Its name is that of the setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    MaxWalKeep,
    MinFreeSpace,
}

impl Bound {
    pub fn name(self) -> &'static str {
        match self {
            Bound::MaxWalKeep => "max_wal_keep",
            Bound::MinFreeSpace => "min_free_space",
        }
    }
}

/// How the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    Enough,
    /// What nobody asks for goes.
    Short,
    /// So many of the oldest segments go, whoever needs them.
    OldestGo(u64),
}

/// What one cluster keeps, and for whom. All of it lies at or below `commit_lsn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    pub oldest_lsn: Lsn,
    pub commit_lsn: Lsn,
    /// Lowest position that a member, a consumer or a slot needs; none if nobody needs any.
    pub needed_from: Option<Lsn>,
    pub segment_size: u32,
}

/// What is to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removal {
    /// WAL of segments that end at or below this one. Not above commit_lsn.
    pub below: Lsn,
    /// By which bound it takes what is needed.
    pub bound: Option<Bound>,
}

impl Kept {
    pub fn removal(&self, retention: &Retention, space: Space) -> Removal {
        let behind = |size: u64| Lsn(self.commit_lsn.0.saturating_sub(size));
        let wanted = match space {
            Space::Enough => behind(retention.wal_keep_size),
            Space::Short | Space::OldestGo(_) => self.commit_lsn,
        };
        let unneeded = self.unneeded().min(wanted);
        let over = retention.max_wal_keep.map_or(Lsn::INVALID, behind);
        let mut removal = Removal {
            below: unneeded,
            bound: None,
        };
        if self.start(over) > unneeded {
            removal = Removal {
                below: over,
                bound: Some(Bound::MaxWalKeep),
            };
        }
        if let Space::OldestGo(segments) = space {
            // To the end of the next one: how far the rest of a record reaches into it is not known
            // here, and a log does not begin with nothing but that.
            let size = u64::from(self.segment_size);
            let len = segments.saturating_add(1).saturating_mul(size) - 1;
            let oldest = self.start(self.oldest_lsn).0;
            let below = Lsn(oldest.saturating_add(len)).min(self.commit_lsn);
            if self.start(below) > self.start(removal.below).max(self.oldest_lsn) {
                removal = Removal {
                    below,
                    bound: Some(Bound::MinFreeSpace),
                };
            }
        }
        removal
    }

    /// So many segments lie below the one of commit_lsn.
    pub fn segments(&self) -> u64 {
        let newest = self.start(self.commit_lsn);
        newest.saturating_distance_from(self.oldest_lsn) / u64::from(self.segment_size)
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.commit_lsn.saturating_distance_from(self.oldest_lsn)
    }

    /// Nobody needs what lies below.
    fn unneeded(&self) -> Lsn {
        self.needed_from
            .map_or(self.commit_lsn, |lsn| lsn.min(self.commit_lsn))
    }

    fn start(&self, lsn: Lsn) -> Lsn {
        lsn.segment_start(self.segment_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: u64 = 1 << 20;

    fn kept(needed_from: Option<u64>) -> Kept {
        Kept {
            oldest_lsn: Lsn(10 * SEGMENT),
            commit_lsn: Lsn(20 * SEGMENT + 500),
            needed_from: needed_from.map(Lsn),
            segment_size: SEGMENT as u32,
        }
    }

    fn retention(wal_keep_size: u64, max_wal_keep: Option<u64>) -> Retention {
        Retention {
            wal_keep_size,
            max_wal_keep,
            min_free_space: 0,
        }
    }

    #[test]
    fn what_is_needed_stays_up_to_the_bound() {
        let commit = 20 * SEGMENT + 500;
        for (needed_from, keep, max, below, bound) in [
            (None, 0, None, commit, None),
            (None, 3 * SEGMENT, None, commit - 3 * SEGMENT, None),
            (None, u64::MAX, None, 0, None),
            (Some(12 * SEGMENT), 0, None, 12 * SEGMENT, None),
            (Some(u64::MAX), 0, None, commit, None),
            (Some(0), 0, None, 0, None),
            // The segment of what is needed is within the bound.
            (
                Some(15 * SEGMENT + 700),
                0,
                Some(5 * SEGMENT),
                15 * SEGMENT + 700,
                None,
            ),
            (
                Some(15 * SEGMENT + 300),
                0,
                Some(5 * SEGMENT),
                15 * SEGMENT + 300,
                None,
            ),
            (
                Some(14 * SEGMENT + 700),
                0,
                Some(5 * SEGMENT),
                commit - 5 * SEGMENT,
                Some(Bound::MaxWalKeep),
            ),
            (Some(0), 0, Some(0), commit, Some(Bound::MaxWalKeep)),
        ] {
            let removal = kept(needed_from).removal(&retention(keep, max), Space::Enough);
            let expected = Removal {
                below: Lsn(below),
                bound,
            };
            assert_eq!(removal, expected, "{needed_from:?} {keep} {max:?}");
        }
    }

    #[test]
    fn a_full_disk_takes_first_what_nobody_asks_for_and_then_the_oldest() {
        let retention = retention(8 * SEGMENT, None);
        let removal = |needed_from, space| kept(needed_from).removal(&retention, space);
        let commit = Lsn(20 * SEGMENT + 500);
        assert_eq!(
            removal(None, Space::Enough).below,
            Lsn(commit.0 - 8 * SEGMENT)
        );
        for (needed_from, space, below, bound) in [
            (None, Space::Short, commit, None),
            (Some(13 * SEGMENT), Space::Short, Lsn(13 * SEGMENT), None),
            (
                Some(13 * SEGMENT),
                Space::OldestGo(1),
                Lsn(13 * SEGMENT),
                None,
            ),
            (
                Some(10 * SEGMENT + 5),
                Space::OldestGo(1),
                Lsn(12 * SEGMENT - 1),
                Some(Bound::MinFreeSpace),
            ),
            (
                Some(10 * SEGMENT + 5),
                Space::OldestGo(3),
                Lsn(14 * SEGMENT - 1),
                Some(Bound::MinFreeSpace),
            ),
            (
                Some(10 * SEGMENT + 5),
                Space::OldestGo(u64::MAX),
                commit,
                Some(Bound::MinFreeSpace),
            ),
        ] {
            assert_eq!(removal(needed_from, space), Removal { below, bound });
        }
        assert_eq!(kept(None).segments(), 10);
        let mut least = kept(Some(0));
        least.oldest_lsn = Lsn(20 * SEGMENT);
        assert_eq!(least.segments(), 0);
        let removal = least.removal(&retention, Space::OldestGo(1));
        assert_eq!(removal.bound, None, "commit_lsn's own segment stays");
    }
}

//! Which transactions standbys behind the safekeepers still need (hot_standby_feedback).
//!
//! ```text
//!   standby ── 'h' ──► safekeeper ── with every answer ──► here ──► our replication slot
//!                      its slots remember                  each member's last word
//! ```
//!
//! Each member tells the oldest of all standbys and slots behind it; the slot holds the oldest of all
//! members. One that has not been heard yet, or is away, may have a standby that needs older ones: what it
//! said last counts for a while, and before its first word nothing is let go. After [`HOLD_MS`] it
//! counts no more, so a member that is gone for good pins nothing.

/// A safekeeper that is restarted is back long before. Its standbys go elsewhere meanwhile, or wait.
const HOLD_MS: u64 = 60_000;

/// Oldest transactions, with epoch; 0 if none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Xmins {
    pub xmin: u64,
    pub catalog_xmin: u64,
}

impl Xmins {
    fn oldest(self, other: Xmins) -> Xmins {
        let oldest = |a: u64, b: u64| if a == 0 || b == 0 { a.max(b) } else { a.min(b) };
        Xmins {
            xmin: oldest(self.xmin, other.xmin),
            catalog_xmin: oldest(self.catalog_xmin, other.catalog_xmin),
        }
    }
}

/// What one member has said.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemberXmins {
    last: Option<Xmins>,
    away_since_ms: Option<u64>,
}

impl MemberXmins {
    /// What it says now; none while it is away.
    pub fn note(&mut self, said: Option<Xmins>, now_ms: u64) {
        match said {
            Some(xmins) => (self.last, self.away_since_ms) = (Some(xmins), None),
            None => {
                self.away_since_ms.get_or_insert(now_ms);
            }
        }
    }

    /// None: not known.
    fn held(&self, now_ms: u64) -> Option<Xmins> {
        match self.away_since_ms {
            Some(since_ms) if now_ms.saturating_sub(since_ms) >= HOLD_MS => Some(Xmins::default()),
            _ => self.last,
        }
    }
}

/// What the slot is to hold; none if it stays as it is.
pub fn to_hold<'a>(
    members: impl IntoIterator<Item = &'a MemberXmins>,
    now_ms: u64,
) -> Option<Xmins> {
    members
        .into_iter()
        .try_fold(Xmins::default(), |oldest, member| {
            Some(oldest.oldest(member.held(now_ms)?))
        })
}

/// The id as the server knows it, without epoch. None if it is not of the recent past, as
/// `TransactionIdInRecentPast` has it: then it is no word to rely on. `next` is the next one to be given.
pub fn in_recent_past(full: u64, next: u64) -> Option<u32> {
    const HALF: u64 = 1 << 31;
    let is_recent = full <= next && next - full < HALF;
    // Ids below 3 are no transactions that anybody needs (FirstNormalTransactionId).
    Some(full as u32).filter(|id| is_recent && *id >= 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xmins(xmin: u64, catalog_xmin: u64) -> Xmins {
        Xmins { xmin, catalog_xmin }
    }

    fn member(said: Option<Xmins>, now_ms: u64) -> MemberXmins {
        let mut member = MemberXmins::default();
        member.note(said, now_ms);
        member
    }

    #[test]
    fn the_oldest_of_all_members_is_held() {
        let said = |xmin, catalog| member(Some(xmins(xmin, catalog)), 0);
        let members = [said(0, 0), said(900, 0), said(800, 50), said(0, 60)];
        assert_eq!(to_hold(&members, 0), Some(xmins(800, 50)));
        assert_eq!(to_hold(&[said(0, 0)], 0), Some(xmins(0, 0)));
        assert_eq!(to_hold(&[], 0), Some(xmins(0, 0)));
    }

    #[test]
    fn a_member_that_is_away_counts_for_a_while_by_its_last_word() {
        let mut one = member(Some(xmins(800, 0)), 0);
        let other = member(Some(xmins(900, 0)), 0);
        for now_ms in [5_000, 30_000] {
            one.note(None, now_ms);
            let held = to_hold(&[one, other], 5_000 + HOLD_MS - 1);
            assert_eq!(held, Some(xmins(800, 0)));
        }
        let held = to_hold(&[one, other], 5_000 + HOLD_MS);
        assert_eq!(held, Some(xmins(900, 0)));
        one.note(Some(xmins(850, 0)), 200_000);
        assert_eq!(to_hold(&[one, other], 200_000), Some(xmins(850, 0)));
    }

    #[test]
    fn nothing_is_let_go_before_all_have_spoken_or_had_the_time_to() {
        let members = [member(Some(xmins(900, 0)), 0), member(None, 1_000)];
        assert_eq!(to_hold(&members, 1_000), None);
        assert_eq!(to_hold(&members, 1_000 + HOLD_MS), Some(xmins(900, 0)));
        assert_eq!(to_hold(&[MemberXmins::default()], 5), None);
    }

    #[test]
    fn ids_that_can_not_be_true_are_not_believed() {
        let epoch = 1u64 << 32;
        for (full, next, id) in [
            (700, 700, Some(700)),
            (700, 701, Some(700)),
            (701, 700, None),
            (0, 700, None),
            (2, 700, None),
            (epoch + 5, epoch + 9, Some(5)),
            (epoch - 5, epoch + 9, Some(u32::MAX - 4)),
            (5, epoch + 9, None),
            (epoch + 9, 9, None),
            (epoch, epoch + 9, None),
        ] {
            assert_eq!(in_recent_past(full, next), id, "{full} {next}");
        }
    }
}

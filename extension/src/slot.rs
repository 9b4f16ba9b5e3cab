//! The replication slot that keeps WAL in `pg_wal` until the members that can be reached have it.
//!
//! ```text
//!   restart_lsn = lowest flush_lsn of the members that are connected and lag by no more than
//!                 max_member_lag; never above commit_lsn, never backwards
//! ```
//!
//! A member that is away or too far behind is let go, so that `pg_wal` never fills because of it;
//! it is fed by another safekeeper when it is back. What the slot says is saved with checkpoints, so
//! after a crash it is a little older, which keeps more WAL than needed and no less.
//!
//! Its xmin is that of the standbys behind the safekeepers, see standby_xmin.rs.
//!
//! An administrator's obstacles (a logical slot of that name, one in use, no slot left) are not
//! errors here but reasons: the worker says so and tries again, and goes on pushing WAL meanwhile.

use std::ffi::{CStr, CString};

use pgrx::pg_sys;
use safekeeper_protocol::Lsn;

use crate::standby_xmin::{Xmins, in_recent_past};

/// Why there is no slot yet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotObstacle {
    #[error(
        "replication slot \"{0}\" is a logical one: drop it, or set walproposer.slot_name to another name"
    )]
    Logical(String),
    #[error("replication slot \"{name}\" is in use by process {pid}")]
    InUse { name: String, pid: i32 },
    #[error("all replication slots are in use: raise max_replication_slots")]
    NoneLeft,
}

/// Our slot, acquired.
pub struct Slot {
    restart_lsn: Lsn,
}

impl Slot {
    /// Acquires the slot, and creates it if there is none.
    pub fn acquire(name: &CString) -> Result<Slot, SlotObstacle> {
        let text = || name.to_string_lossy().into_owned();
        match look(name) {
            Some(found) if found.is_logical => return Err(SlotObstacle::Logical(text())),
            Some(Found {
                active_pid: pid, ..
            }) if pid != 0 => {
                return Err(SlotObstacle::InUse { name: text(), pid });
            }
            Some(found) if found.restart_lsn.is_valid() => acquire(name),
            Some(_) => {
                // Invalidated (max_slot_wal_keep_size): what it kept is gone.
                // SAFETY: no slot is held; the name is a C string.
                unsafe { pg_sys::ReplicationSlotDrop(name.as_ptr(), true) };
                create(name);
            }
            None if free_slots() == 0 => return Err(SlotObstacle::NoneLeft),
            None => create(name),
        }
        // SAFETY: acquired above, and nobody else changes an acquired slot's position.
        let restart_lsn = unsafe { Lsn((*pg_sys::MyReplicationSlot).data.restart_lsn) };
        Ok(Slot { restart_lsn })
    }

    /// Lets go of WAL below `lsn`. Positions not above the current one change nothing.
    pub fn advance(&mut self, lsn: Lsn) {
        if lsn <= self.restart_lsn {
            return;
        }
        self.restart_lsn = lsn;
        // SAFETY: our slot, its position under its lock, then made known as a WAL sender would.
        unsafe {
            let slot = pg_sys::MyReplicationSlot;
            pg_sys::SpinLockAcquire(&raw mut (*slot).mutex);
            (*slot).data.restart_lsn = lsn.0;
            pg_sys::SpinLockRelease(&raw mut (*slot).mutex);
            pg_sys::ReplicationSlotMarkDirty();
            pg_sys::ReplicationSlotsComputeRequiredLSN();
        }
    }

    /// Keeps rows that these transactions may see from vacuum, for standbys (`PhysicalReplicationSlotNewXmin`).
    /// Never backwards; none lets go.
    pub fn hold_transactions(&mut self, xmins: Xmins) {
        // SAFETY: a value in shared memory, read under its lock.
        let next = unsafe { pg_sys::ReadNextFullTransactionId() }.value;
        // SAFETY: our slot, its fields under its lock, then made known as a WAL sender would.
        unsafe {
            let slot = pg_sys::MyReplicationSlot;
            pg_sys::SpinLockAcquire(&raw mut (*slot).mutex);
            let xmin = next_xmin((*slot).data.xmin, xmins.xmin, next);
            let catalog_xmin = next_xmin((*slot).data.catalog_xmin, xmins.catalog_xmin, next);
            if let Some(id) = xmin {
                ((*slot).data.xmin, (*slot).effective_xmin) = (id, id);
            }
            if let Some(id) = catalog_xmin {
                ((*slot).data.catalog_xmin, (*slot).effective_catalog_xmin) = (id, id);
            }
            pg_sys::SpinLockRelease(&raw mut (*slot).mutex);
            if xmin.is_some() || catalog_xmin.is_some() {
                pg_sys::ReplicationSlotMarkDirty();
                pg_sys::ReplicationSlotsComputeRequiredXmin(false);
            }
        }
    }

    pub fn restart_lsn(&self) -> Lsn {
        self.restart_lsn
    }

    /// Gives it back at once, for whoever waits for it.
    pub fn release(self) {
        // SAFETY: acquired by this process.
        unsafe { pg_sys::ReplicationSlotRelease() };
    }
}

/// What a slot's xmin changes to, if it does. `wanted` has an epoch, 0 is none; `next` is the next id to
/// be given.
fn next_xmin(held: pg_sys::TransactionId, wanted: u64, next: u64) -> Option<pg_sys::TransactionId> {
    let held: u32 = held.into_inner();
    let wanted = match wanted {
        0 => 0,
        // What can't be true is as if it had not been said.
        wanted => in_recent_past(wanted, next)?,
    };
    let is_later = wanted.wrapping_sub(held).cast_signed() > 0;
    let moves = wanted != held && (wanted == 0 || held == 0 || is_later);
    moves.then_some(wanted.into())
}

/// The position that a slot should keep: the lowest of the members' `flush_lsn` that lie within
/// `max_lag` of `commit_lsn` and not below `floor`, below which WAL is gone already.
pub fn position_to_keep(
    flushed: impl Iterator<Item = Lsn>,
    commit_lsn: Lsn,
    floor: Lsn,
    max_lag: u64,
) -> Lsn {
    flushed
        .filter(|&lsn| lsn >= floor && commit_lsn.saturating_distance_from(lsn) <= max_lag)
        .fold(commit_lsn, Lsn::min)
}

struct Found {
    is_logical: bool,
    active_pid: i32,
    restart_lsn: Lsn,
}

fn look(name: &CStr) -> Option<Found> {
    // SAFETY: slots are never freed, only reused; the fields are read under the slot's lock.
    unsafe {
        let slot = pg_sys::SearchNamedReplicationSlot(name.as_ptr(), true);
        if slot.is_null() {
            return None;
        }
        pg_sys::SpinLockAcquire(&raw mut (*slot).mutex);
        let found = Found {
            is_logical: (*slot).data.database != pg_sys::InvalidOid,
            active_pid: (*slot).active_pid,
            restart_lsn: Lsn((*slot).data.restart_lsn),
        };
        pg_sys::SpinLockRelease(&raw mut (*slot).mutex);
        Some(found)
    }
}

fn free_slots() -> usize {
    let count = usize::try_from(
        // SAFETY: set once at start.
        unsafe { pg_sys::max_replication_slots },
    )
    .unwrap_or(0);
    // SAFETY: there are max_replication_slots of them; `in_use` is a byte that may be stale, and
    // then creating the slot raises an error of its own.
    unsafe {
        let slots = (&raw mut (*pg_sys::ReplicationSlotCtl).replication_slots)
            .cast::<pg_sys::ReplicationSlot>();
        (0..count).filter(|&i| !(*slots.add(i)).in_use).count()
    }
}

fn acquire(name: &CStr) {
    // SAFETY: no slot is held; if it was taken since we looked, the error ends the worker, and the
    // next one looks again.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        pg_sys::ReplicationSlotAcquire(name.as_ptr(), true);
        #[cfg(feature = "pg18")]
        pg_sys::ReplicationSlotAcquire(name.as_ptr(), true, true);
    }
}

/// Creates the slot, and keeps WAL from the last checkpoint's start on.
fn create(name: &CStr) {
    let persistent = pg_sys::ReplicationSlotPersistency::RS_PERSISTENT;
    // SAFETY: no slot is held.
    unsafe {
        #[cfg(any(feature = "pg15", feature = "pg16"))]
        pg_sys::ReplicationSlotCreate(name.as_ptr(), false, persistent, false);
        #[cfg(any(feature = "pg17", feature = "pg18"))]
        pg_sys::ReplicationSlotCreate(name.as_ptr(), false, persistent, false, false, false);
        pg_sys::ReplicationSlotReserveWal();
        pg_sys::ReplicationSlotMarkDirty();
        pg_sys::ReplicationSlotSave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xmin_goes_forward_or_away() {
        let epoch = 1u64 << 32;
        for (held, wanted, next, to) in [
            (0, 700, 800, Some(700)),
            (700, 700, 800, None),
            (700, 750, 800, Some(750)),
            (700, 650, 800, None),
            (700, 0, 800, Some(0)),
            (0, 0, 800, None),
            (700, 900, 800, None),
            (u32::MAX - 10, epoch + 20, epoch + 30, Some(20)),
            (20, epoch - 11, epoch + 30, None),
        ] {
            let moved = next_xmin(held.into(), wanted, next);
            assert_eq!(moved, to.map(Into::into), "{held} {wanted} {next}");
        }
    }

    #[test]
    fn members_within_the_bound_are_waited_for_and_no_others() {
        for (flushed, commit, floor, max_lag, want) in [
            (&[100u64, 90, 80][..], 95, 0, 1000, 80),
            (&[100, 90], 95, 0, 1000, 90),
            (&[100, 90, 80], 95, 0, 10, 90),
            (&[100, 90, 80], 95, 85, 1000, 90),
            (&[100, 100, 100], 95, 0, 1000, 95),
            (&[], 95, 0, 1000, 95),
            (&[0], 95, 1, 1000, 95),
        ] {
            let lsns = flushed.iter().map(|&lsn| Lsn(lsn));
            let got = position_to_keep(lsns, Lsn(commit), Lsn(floor), max_lag);
            assert_eq!(got, Lsn(want), "{flushed:?}");
        }
    }
}

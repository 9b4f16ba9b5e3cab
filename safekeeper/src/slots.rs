//! Physical replication slots of one cluster: WAL and old rows are kept for a consumer even while
//! it is away (`replication/slot.c`).
//!
//! ```text
//!   CREATE ──► inactive ◄──► active, by one connection            DROP, or the end of the session
//!                  │    START_REPLICATION SLOT                    that made it, if it is temporary
//!                  └──────────► lost      its WAL was more than may be kept
//! ```
//!
//! `restart_lsn` follows the consumer's reports of what it has flushed, as on a primary; before the
//! first one it is where WAL was reserved, if it was. `xmin` is the standby's, and goes to the primary
//! with every answer (consumers.rs), also while the standby is away.
//!
//! **On disk** (slot_file.rs) slots are written when they are made, dropped or lost, and when they keep
//! something for the first time; within a second when a consumer was set back; how far they have come, only now
//! and then. So, but for that second, what is on disk is never newer, and WAL is kept from the older of the two
//! on: after a crash nothing is missing. It is written by consumers' threads and by housekeeping, never by one
//! that acts for the keeper: no commit waits for it.
//!
//! Locks: `file`, behind its door, before `state`; no IO under `state`, which is all that others ever wait for.
//!
//! **A slot file that can't be read** is left as it is, for an administrator. Until then there are
//! no slots, commands for slots are refused with the reason, and WAL is kept as if a slot needed all
//! of it, up to the bounds. All else is served.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use safekeeper_protocol::Lsn;
use safekeeper_wire::pgwire::ErrorReport;

use crate::control_file::cluster_dir;
use crate::disk::{Disk, StorageError};
use crate::keeper::stop_on;
use crate::reserved_file::ReservedFile;
use crate::slot_file::{FILE_LEN, NAME_LEN_MAX, SLOTS, SlotData, is_valid_name, read_slots};
use crate::slot_file::{SLOTS_MAX, encode};

/// Positions on disk lag by about so much. More often would be two more flushes beside those of
/// commits, less often keeps WAL for longer than it is needed.
const SAVE_INTERVAL: Duration = Duration::from_secs(10);

/// A slot is saved at once when it keeps something for the first time: a position, an xmin, a catalog_xmin.
const HURRIES_MAX: u8 = 3;

/// Who waits for a slot looks this often whether its peer is still there.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// The slots of one cluster.
#[derive(Debug)]
pub struct Slots {
    /// None if the file can't be read, and must not be written over.
    file: Mutex<Option<ReservedFile>>,
    /// Held by whoever waits for `file`: a mutex favours who has just released it, and whoever saves again and
    /// again must not keep others from it.
    door: Mutex<()>,
    state: Mutex<State>,
    /// A slot was released or dropped.
    released: Condvar,
}

#[derive(Debug)]
struct State {
    slots: BTreeMap<String, Slot>,
    /// Why there are no slots.
    unreadable: Option<String>,
    /// There is a file.
    is_on_disk: bool,
    /// The file does not say what is here.
    dirty: bool,
    /// Nor does it keep what is needed here, of a consumer that was set back, or is new to it. It is saved within a
    /// second: at once only the first times, or a consumer could have the disk flush as often as it likes.
    is_urgent: bool,
    saved_at: Instant,
}

#[derive(Clone, Debug)]
struct Slot {
    data: SlotData,
    /// As the file has it; the default if it is not there.
    saved: SlotData,
    /// The connection whose end drops it.
    temporary_of: Option<u64>,
    holder: Option<Holder>,
    /// Being dropped: it is not in the next file.
    is_going: bool,
}

/// A connection that uses a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub connection_id: u64,
    /// Who it is, for people.
    pub description: String,
}

/// Where a slot's WAL begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotPosition {
    /// None while nothing is reserved, and when it is lost.
    pub restart_lsn: Option<Lsn>,
}

/// What others may see of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotView {
    pub data: SlotData,
    pub temporary: bool,
    pub active: Option<Holder>,
}

impl Slot {
    fn new(data: SlotData) -> Slot {
        Slot {
            data,
            saved: SlotData::default(),
            temporary_of: None,
            holder: None,
            is_going: false,
        }
    }

    fn needed_from(&self) -> Option<Lsn> {
        let saved = Some(self.saved.restart_lsn).filter(|lsn| lsn.is_valid() && !self.data.lost);
        let known = Some(self.data.restart_lsn).filter(|lsn| lsn.is_valid());
        saved.into_iter().chain(known).min()
    }
}

impl Slots {
    /// As the disk has them. What can't be read is told loudly, and is no reason to serve nothing.
    pub fn open(disk: Arc<dyn Disk>, system_id: u64) -> Slots {
        let (slots, unreadable, is_on_disk) = match read_slots(disk.as_ref(), system_id) {
            Ok(slots) => {
                let is_on_disk = slots.is_some();
                (slots.unwrap_or_default(), None, is_on_disk)
            }
            Err(error) => {
                log::error!(
                    "replication slots of system_id={system_id} are not known: {error}; WAL is kept up to \
                     the bounds. Move the file away and restart; then make the slots anew"
                );
                (Vec::new(), Some(error.to_string()), true)
            }
        };
        let file = unreadable
            .is_none()
            .then(|| ReservedFile::new(disk, cluster_dir(system_id), SLOTS, FILE_LEN));
        let slots = slots.into_iter().map(|data| {
            let slot = Slot {
                saved: data.clone(),
                ..Slot::new(data)
            };
            (slot.data.name.clone(), slot)
        });
        Slots {
            file: Mutex::new(file),
            state: Mutex::new(State {
                slots: slots.collect(),
                unreadable,
                is_on_disk,
                dirty: false,
                is_urgent: false,
                saved_at: Instant::now(),
            }),
            door: Mutex::default(),
            released: Condvar::new(),
        }
    }

    /// Makes a slot; durably, if it is not to end with the connection. `restart_lsn` is where WAL is
    /// reserved from, if it is.
    pub fn create(
        &self,
        name: &str,
        holder: &Holder,
        temporary: bool,
        restart_lsn: Option<Lsn>,
        limit: SlotLimit,
    ) -> Result<(), ErrorReport> {
        check_name(name)?;
        {
            let mut state = self.state()?;
            if state.slots.contains_key(name) {
                return Err(ErrorReport::new(
                    "42710",
                    format!("replication slot \"{name}\" already exists"),
                ));
            }
            if state.slots.len() >= limit.max.min(SLOTS_MAX) {
                return Err(limit.reached());
            }
            let slot = Slot {
                temporary_of: temporary.then_some(holder.connection_id),
                holder: Some(holder.clone()),
                ..Slot::new(SlotData {
                    name: name.to_owned(),
                    restart_lsn: restart_lsn.unwrap_or(Lsn::INVALID),
                    ..SlotData::default()
                })
            };
            state.slots.insert(name.to_owned(), slot);
            state.dirty |= !temporary;
        }
        if temporary {
            return Ok(());
        }
        let saved = self.save();
        let mut state = lock(&self.state);
        match saved {
            Ok(()) => {
                if let Some(slot) = state.slots.get_mut(name) {
                    slot.holder = None;
                }
            }
            Err(_) => {
                state.slots.remove(name);
            }
        }
        self.released.notify_all();
        saved.map_err(|error| no_space(&error))
    }

    /// Removes a slot. In use by another connection it is refused, or with `wait` waited for, as long as
    /// `is_there` says that the peer is.
    pub fn drop_slot(
        &self,
        name: &str,
        connection_id: u64,
        wait: bool,
        mut is_there: impl FnMut() -> bool,
    ) -> Result<(), ErrorReport> {
        let mut state = self.state()?;
        let is_temporary = loop {
            let slot = state.slots.get_mut(name).ok_or_else(|| not_there(name))?;
            match &slot.holder {
                Some(holder) if holder.connection_id != connection_id => {
                    if !wait {
                        return Err(in_use(name, holder));
                    }
                }
                _ => {
                    slot.is_going = true;
                    slot.holder = Some(Holder {
                        connection_id,
                        description: "being dropped".to_owned(),
                    });
                    break slot.temporary_of.is_some();
                }
            }
            let woken = self.released.wait_timeout(state, LOOK_INTERVAL);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
            if !is_there() {
                return Err(ErrorReport::new(
                    "57014",
                    "canceling statement due to user request",
                ));
            }
        };
        state.dirty |= !is_temporary;
        drop(state);
        let saved = match is_temporary {
            true => Ok(()),
            false => self.save(),
        };
        let mut state = lock(&self.state);
        match saved {
            Ok(()) => {
                state.slots.remove(name);
            }
            Err(_) => {
                if let Some(slot) = state.slots.get_mut(name) {
                    (slot.is_going, slot.holder) = (false, None);
                }
            }
        }
        self.released.notify_all();
        saved.map_err(|error| no_space(&error))
    }

    /// The session is over, or a command of it failed: its temporary slots go. True if it had any.
    pub fn drop_temporary(&self, connection_id: u64) -> bool {
        let mut state = lock(&self.state);
        let before = state.slots.len();
        state
            .slots
            .retain(|_, slot| slot.temporary_of != Some(connection_id));
        let dropped = state.slots.len() < before;
        if dropped {
            self.released.notify_all();
        }
        dropped
    }

    /// What READ_REPLICATION_SLOT tells of a slot, if it is there.
    pub fn read(&self, name: &str) -> Result<Option<SlotPosition>, ErrorReport> {
        let state = self.state()?;
        let slot = state.slots.get(name).filter(|slot| !slot.is_going);
        Ok(slot.map(|slot| SlotPosition {
            restart_lsn: Some(slot.data.restart_lsn).filter(|lsn| lsn.is_valid()),
        }))
    }

    /// For one stream at a time, until the returned value is dropped.
    pub fn acquire(&self, name: &str, holder: &Holder) -> Result<Acquired<'_>, ErrorReport> {
        let mut state = self.state()?;
        let slot = state.slots.get_mut(name).ok_or_else(|| not_there(name))?;
        match &slot.holder {
            Some(other) if other.connection_id != holder.connection_id || slot.is_going => {
                return Err(in_use(name, other));
            }
            _ => {}
        }
        if slot.data.lost {
            return Err(lost(name));
        }
        slot.holder = Some(holder.clone());
        Ok(Acquired {
            slots: self,
            name: name.to_owned(),
            n_hurried: AtomicU8::new(0),
        })
    }

    /// WAL from here on is needed by a slot; none if no slot needs any.
    pub fn needed_from(&self) -> Option<Lsn> {
        let state = lock(&self.state);
        if state.unreadable.is_some() {
            return Some(Lsn::INVALID);
        }
        state.slots.values().filter_map(Slot::needed_from).min()
    }

    /// Oldest xmin and catalog_xmin of all slots; 0 if none.
    pub fn xmins(&self) -> (u64, u64) {
        let state = lock(&self.state);
        let least = |xmin: fn(&SlotData) -> u64| {
            let held = state.slots.values().filter(|slot| !slot.data.lost);
            held.map(move |slot| xmin(&slot.data))
                .filter(|xmin| *xmin > 0)
        };
        (
            least(|data| data.xmin).min().unwrap_or(0),
            least(|data| data.catalog_xmin).min().unwrap_or(0),
        )
    }

    /// WAL below `lsn` is about to be removed: who needs it is lost. Returns their names and what they
    /// needed. When this returns, the disk says so too.
    pub fn lose_below(&self, lsn: Lsn) -> Vec<(String, Lsn)> {
        let mut lost = Vec::new();
        let mut state = lock(&self.state);
        for slot in state.slots.values_mut() {
            // By what it needs, not by what is on disk, which is only older.
            let restart_lsn = slot.data.restart_lsn;
            if restart_lsn.is_valid() && restart_lsn < lsn {
                slot.data.lost = true;
                slot.data.restart_lsn = Lsn::INVALID;
                lost.push((slot.data.name.clone(), restart_lsn));
            }
        }
        let to_save = !lost.is_empty();
        state.dirty |= to_save;
        state.is_urgent |= to_save;
        drop(state);
        if to_save && let Err(error) = self.save() {
            log::warn!("lost replication slots are not noted on disk yet ({error})");
        }
        lost
    }

    /// Positions to disk if it is time.
    pub fn save_if_due(&self) {
        {
            let state = lock(&self.state);
            let is_due = state.is_urgent || state.saved_at.elapsed() >= SAVE_INTERVAL;
            if !state.dirty || !is_due {
                return;
            }
        }
        self.save_or_warn();
    }

    /// Everything to disk that is not there.
    pub fn save_or_warn(&self) {
        if let Err(error) = self.save() {
            log::warn!("replication slots are not saved ({error})");
        }
    }

    /// Fails for want of space only; then what is on disk is older.
    fn save(&self) -> Result<(), StorageError> {
        let door = lock(&self.door);
        let mut file = lock(&self.file);
        drop(door);
        let Some(file) = file.as_mut() else {
            return Ok(());
        };
        let (slots, is_on_disk, was_urgent) = {
            let mut state = lock(&self.state);
            if !state.dirty {
                return Ok(());
            }
            let was_urgent = state.is_urgent;
            // What changes from here on makes it dirty again.
            (state.dirty, state.is_urgent) = (false, false);
            state.saved_at = Instant::now();
            let kept = state
                .slots
                .values()
                .filter(|slot| slot.temporary_of.is_none() && !slot.is_going);
            let slots: Vec<SlotData> = kept.map(|slot| slot.data.clone()).collect();
            (slots, state.is_on_disk, was_urgent)
        };
        let bytes = encode(&slots);
        let written = match is_on_disk {
            true => file.replace(&bytes),
            false => file.create(&bytes),
        };
        let mut state = lock(&self.state);
        match written {
            Ok(()) => {
                state.is_on_disk = true;
                for data in slots {
                    if let Some(slot) = state.slots.get_mut(&data.name) {
                        slot.saved = data;
                    }
                }
                Ok(())
            }
            Err(error) if error.is_no_space() => {
                state.dirty = true;
                state.is_urgent |= was_urgent;
                Err(error)
            }
            Err(error) => stop_on(&error),
        }
    }

    /// All of them, by name.
    pub fn list(&self) -> Vec<SlotView> {
        let state = lock(&self.state);
        let slots = state.slots.values().map(|slot| SlotView {
            data: slot.data.clone(),
            temporary: slot.temporary_of.is_some(),
            active: slot.holder.clone(),
        });
        slots.collect()
    }

    /// Why there are none, if it is because they can't be read.
    pub fn unreadable(&self) -> Option<String> {
        lock(&self.state).unreadable.clone()
    }

    /// The slots, if they are known.
    fn state(&self) -> Result<MutexGuard<'_, State>, ErrorReport> {
        let state = lock(&self.state);
        match &state.unreadable {
            None => Ok(state),
            Some(reason) => Err(ErrorReport::new(
                "XX001",
                "replication slots of this cluster can't be read",
            )
            .detail(reason.clone())
            .hint("Move the slot file away and restart the safekeeper; then make the slots anew.")),
        }
    }
}

/// The setting, and how its limit is told.
#[derive(Clone, Copy, Debug)]
pub struct SlotLimit {
    pub max: usize,
    /// Whose words are used.
    pub pg_major: u16,
}

impl SlotLimit {
    fn reached(self) -> ErrorReport {
        let quote = if self.pg_major >= 17 { "\"" } else { "" };
        if self.max == 0 {
            let message = format!(
                "replication slots can only be used if {quote}max_replication_slots{quote} > 0"
            );
            return ErrorReport::new("55000", message);
        }
        ErrorReport::new("53400", "all replication slots are in use").hint(format!(
            "Free one or increase {quote}max_replication_slots{quote}."
        ))
    }
}

/// A slot in use.
#[derive(Debug)]
pub struct Acquired<'a> {
    slots: &'a Slots,
    name: String,
    /// How often it was saved at once for this user.
    n_hurried: AtomicU8,
}

impl Acquired<'_> {
    /// The consumer has flushed WAL up to `flush_lsn` (`PhysicalConfirmReceivedLocation`).
    pub fn flushed(&self, flush_lsn: Lsn) {
        if !flush_lsn.is_valid() {
            return;
        }
        self.change(|slot| {
            if slot.data.lost {
                return Urgency::None;
            }
            slot.data.restart_lsn = flush_lsn;
            urgency(slot.saved.restart_lsn.0, flush_lsn.0)
        });
    }

    /// The standby's oldest transactions; 0 if none (`PhysicalReplicationSlotNewXmin`). True if that changes
    /// something.
    pub fn needs_transactions(&self, xmin: u64, catalog_xmin: u64) -> bool {
        self.change(|slot| {
            let (data, saved) = (&mut slot.data, &slot.saved);
            let moved = |old: u64, new: u64| if new == 0 { 0 } else { old.max(new) };
            data.xmin = moved(data.xmin, xmin);
            data.catalog_xmin = moved(data.catalog_xmin, catalog_xmin);
            urgency(saved.xmin, data.xmin).max(urgency(saved.catalog_xmin, data.catalog_xmin))
        })
    }

    pub fn is_lost(&self) -> bool {
        let state = lock(&self.slots.state);
        state
            .slots
            .get(&self.name)
            .is_none_or(|slot| slot.data.lost)
    }

    /// `change` tells how soon the disk must know of it. True if it changed something.
    fn change(&self, change: impl FnOnce(&mut Slot) -> Urgency) -> bool {
        let urgency = {
            let mut state = lock(&self.slots.state);
            // While it is held nobody drops it.
            let Some(slot) = state.slots.get_mut(&self.name) else {
                return false;
            };
            let positions = |data: &SlotData| (data.restart_lsn, data.xmin, data.catalog_xmin);
            let before = positions(&slot.data);
            let urgency = change(slot);
            if positions(&slot.data) == before {
                return false;
            }
            if slot.temporary_of.is_some() {
                return true;
            }
            state.dirty = true;
            state.is_urgent |= urgency >= Urgency::Soon;
            urgency
        };
        if urgency == Urgency::Now && self.n_hurried.load(Ordering::Relaxed) < HURRIES_MAX {
            self.n_hurried.fetch_add(1, Ordering::Relaxed);
            self.slots.save_or_warn();
        }
        true
    }
}

impl Drop for Acquired<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.slots.state);
        if let Some(slot) = state.slots.get_mut(&self.name)
            && slot.temporary_of.is_none()
        {
            slot.holder = None;
        }
        self.slots.released.notify_all();
    }
}

/// How soon the disk must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Urgency {
    None,
    Soon,
    Now,
}

/// What is on disk would keep nothing of what is known now to be needed, or only what is newer.
fn urgency(saved: u64, known: u64) -> Urgency {
    match (saved, known) {
        (_, 0) => Urgency::None,
        (0, _) => Urgency::Now,
        _ if known < saved => Urgency::Soon,
        _ => Urgency::None,
    }
}

/// As `ReplicationSlotValidateName` says it.
fn check_name(name: &str) -> Result<(), ErrorReport> {
    if name.is_empty() {
        return Err(ErrorReport::new(
            "42602",
            format!("replication slot name \"{name}\" is too short"),
        ));
    }
    if name.len() > NAME_LEN_MAX {
        return Err(ErrorReport::new(
            "42622",
            format!("replication slot name \"{name}\" is too long"),
        ));
    }
    if is_valid_name(name) {
        return Ok(());
    }
    Err(ErrorReport::new(
        "42602",
        format!("replication slot name \"{name}\" contains invalid character"),
    )
    .hint(
        "Replication slot names may only contain lower case letters, numbers, and the underscore \
         character.",
    ))
}

fn not_there(name: &str) -> ErrorReport {
    ErrorReport::new(
        "42704",
        format!("replication slot \"{name}\" does not exist"),
    )
}

/// All connections belong to one process, so the detail says which one it is.
fn in_use(name: &str, holder: &Holder) -> ErrorReport {
    ErrorReport::new(
        "55006",
        format!(
            "replication slot \"{name}\" is active for PID {}",
            std::process::id()
        ),
    )
    .detail(format!("It is used by {}.", holder.description))
}

fn lost(name: &str) -> ErrorReport {
    ErrorReport::new(
        "55000",
        format!("can no longer access replication slot \"{name}\""),
    )
    .detail("This replication slot has been invalidated due to \"wal_removed\".")
}

fn no_space(error: &StorageError) -> ErrorReport {
    ErrorReport::new("53100", error.to_string())
}

/// A panic ends the daemon, so a poisoned lock is only ever seen by a test that failed already.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

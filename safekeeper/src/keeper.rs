//! The keeper: sole owner of one cluster's acceptor and WAL.
//!
//! One thread at a time acts for it, by holding a [`Turn`]; on the hot path that is the thread of
//! the proposer's connection. Within a turn a message goes through the acceptor, and the actions
//! that come of it are carried out in their order; `Persist` and `Truncate` are on stable storage
//! before the next one is looked at. Appends are only written. They are flushed together, before
//! any message that speaks of the log's end and at the end of the turn, whichever way it ends: a
//! keeper that nobody holds has no WAL that is not flushed.
//!
//! ```text
//!   holding the keeper                     without it
//!   take_turn: append, handle, finish      commit_lsn, view, status: published values
//!   begin_read (a look at the term)        reader: the files themselves
//!   housekeep, disconnect
//! ```
//!
//! commit_lsn goes to the control file now and then, by `housekeep`. That one takes the keeper for
//! the moment it needs to copy the state, and waits for the disk with only the control file in its
//! hands; locks are taken in this order, keeper then control file, so an older state never replaces
//! a newer one, and no commit waits for it. Old WAL (retention.rs) is removed a few segments at a time, and who
//! came meanwhile has the keeper first: it is taken through a door, in which the next one waits.
//!
//! **A failed write, flush or rename ends the process**, in [`stop_on`]: what the disk holds is
//! unknown then, and a restart finds out. Two failures are not of that kind: WAL that is damaged
//! was not written at all, and WAL for which there is no room can come again. Both end the
//! proposer's connection, and its next Elected puts the log in order.

mod turn;

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use safekeeper_protocol::{
    Acceptor, AcceptorAction, AcceptorState, ClusterIdentity, Lsn, Read, Refusal, Term,
};
use safekeeper_wire::pgwire::{ConnectionError, ErrorReport};
pub use turn::Turn;

use crate::consumers::Consumers;
use crate::control_file::{ControlFile, ControlFileError};
use crate::disk::{Disk, StorageError};
use crate::identity::Identity;
use crate::metrics::ClusterMetrics;
use crate::retention::{Bound, Kept, Retention, Space};
use crate::slots::{SlotView, Slots};
use crate::status::{
    ClusterStatus, ConfigurationStatus, LsnText, SlotStatus, StandbyStatus, term_history,
};
use crate::view::View;
use crate::wal_reader::{ReadError, WalReader};
use crate::wal_storage::{OpenError, WalStorage};
use crate::watch::Watch;

/// One cluster's keeper.
#[derive(Debug)]
pub struct Keeper {
    cluster: ClusterIdentity,
    identity: Identity,
    disk: Arc<dyn Disk>,
    pub slots: Arc<Slots>,
    pub consumers: Consumers,
    pub metrics: ClusterMetrics,
    commit_lsn: Watch,
    write_lsn: AtomicU64,
    flush_lsn: AtomicU64,
    oldest_lsn: AtomicU64,
    /// WAL from here on is kept though nobody asks, wal_keep_size.
    kept_anyway_from: AtomicU64,
    /// By which WAL that somebody needs is being removed.
    over_bound: Mutex<Option<Bound>>,
    view: Mutex<Arc<View>>,
    /// Whose Elected was taken, while it is connected.
    proposer: Mutex<Option<SocketAddr>>,
    /// Held while waiting for `held`. A mutex may be taken again by who has just released it,
    /// again and again; one who waits in the door can't be overtaken by one who comes after.
    door: Mutex<()>,
    held: Mutex<Held>,
    control: Mutex<ControlFile>,
}

/// What only the thread that has the turn may touch.
#[derive(Debug)]
struct Held {
    acceptor: Acceptor,
    storage: WalStorage,
    /// Kept for its capacity.
    actions: Vec<AcceptorAction>,
    /// commit_lsn in the control file.
    persisted_commit_lsn: Lsn,
}

/// Why a cluster is not served.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    #[error(transparent)]
    Control(#[from] ControlFileError),
    #[error(transparent)]
    Wal(#[from] OpenError),
    #[error("could not start a thread: {0}")]
    Thread(std::io::Error),
}

/// Why a proposer's message ends its connection.
#[derive(Debug)]
pub enum PushError {
    Refused(Refusal),
    /// WAL that fails its checks, with what is wrong.
    Damaged(String),
    NoSpace(StorageError),
    /// Something about its cluster that can't be served here.
    Cluster(ErrorReport),
}

impl From<Refusal> for PushError {
    fn from(refusal: Refusal) -> PushError {
        PushError::Refused(refusal)
    }
}

impl PushError {
    pub fn report(&self) -> ErrorReport {
        match self {
            PushError::Refused(refusal) => {
                ErrorReport::new(sqlstate_of(refusal), refusal.to_string())
            }
            PushError::Damaged(what) => {
                ErrorReport::new("XX001", format!("refused damaged WAL: {what}"))
            }
            PushError::NoSpace(error) => ErrorReport::new("53100", error.to_string())
                .hint("WAL is taken again once there is room on the safekeeper's disk."),
            PushError::Cluster(report) => report.clone(),
        }
    }
}

fn sqlstate_of(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::OtherCluster { .. } => "22023",
        Refusal::NotAMember { .. }
        | Refusal::OtherConfiguration { .. }
        | Refusal::OtherCommonPoint { .. }
        | Refusal::WouldCutCommitted { .. }
        | Refusal::NotElectedHere { .. } => "55000",
        Refusal::BadHistory | Refusal::Gap { .. } | Refusal::Malformed(_) => "08P01",
    }
}

/// How much of the log a proposer may read, at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readable {
    pub term: Term,
    pub oldest_lsn: Lsn,
    pub flush_lsn: Lsn,
}

/// First words of the panic that ends the process when storage has failed.
pub const STORAGE_FAILED: &str = "storage failed, the process ends";

/// Storage failed in a way that leaves the disk's contents unknown. Never to be tried again by
/// this process: the kernel may have dropped the pages, and a second fsync would lie. In the
/// daemon every panic aborts; a simulation, whose processes are only values, catches it.
pub fn stop_on(error: &StorageError) -> ! {
    log::error!("{STORAGE_FAILED}: {error}");
    panic!("{STORAGE_FAILED}: {error}");
}

impl Keeper {
    /// The keeper of a cluster that is in the data directory.
    pub fn open(
        disk: Arc<dyn Disk>,
        identity: Identity,
        system_id: u64,
        metrics: impl FnOnce(&ClusterIdentity) -> ClusterMetrics,
    ) -> Result<Keeper, KeeperError> {
        let (control, state) = ControlFile::open(disk.clone(), system_id)?;
        let metrics = metrics(&state.cluster);
        let storage = WalStorage::open(disk.clone(), &state.cluster, &state)?;
        let acceptor = Acceptor::new(
            identity.id,
            identity.incarnation,
            state,
            storage.flush_lsn(),
        );
        Keeper::new(disk, identity, control, storage, acceptor, metrics)
    }

    /// The keeper of a cluster that becomes known here, by an acceptor that wants its first state
    /// persisted. After an error nothing was promised.
    pub fn create(
        disk: Arc<dyn Disk>,
        identity: Identity,
        acceptor: Acceptor,
        state: &AcceptorState,
        metrics: ClusterMetrics,
    ) -> Result<Keeper, KeeperError> {
        let control =
            ControlFile::create(disk.clone(), state).map_err(ControlFileError::Storage)?;
        let storage = WalStorage::open(disk.clone(), &state.cluster, state)?;
        Keeper::new(disk, identity, control, storage, acceptor, metrics)
    }

    fn new(
        disk: Arc<dyn Disk>,
        identity: Identity,
        control: ControlFile,
        storage: WalStorage,
        acceptor: Acceptor,
        metrics: ClusterMetrics,
    ) -> Result<Keeper, KeeperError> {
        let timeline_files = storage
            .timeline_files()
            .map_err(ControlFileError::Storage)?;
        let view = View::new(acceptor.state(), timeline_files);
        let slots = Arc::new(Slots::open(disk.clone(), acceptor.cluster().system_id));
        Ok(Keeper {
            identity,
            cluster: acceptor.cluster().clone(),
            disk,
            consumers: Consumers::new(slots.clone()),
            slots,
            metrics,
            commit_lsn: Watch::new(acceptor.commit_lsn().0),
            write_lsn: AtomicU64::new(acceptor.write_lsn().0),
            flush_lsn: AtomicU64::new(acceptor.flush_lsn().0),
            oldest_lsn: AtomicU64::new(storage.oldest_lsn().0),
            kept_anyway_from: AtomicU64::new(0),
            over_bound: Mutex::new(None),
            view: Mutex::new(Arc::new(view)),
            proposer: Mutex::new(None),
            control: Mutex::new(control),
            door: Mutex::new(()),
            held: Mutex::new(Held {
                persisted_commit_lsn: acceptor.commit_lsn(),
                acceptor,
                storage,
                actions: Vec::new(),
            }),
        })
    }

    /// Makes segments ahead of the log, on a thread that ends with this keeper.
    pub fn prepare_in_background(&self) -> Result<(), KeeperError> {
        self.hold()
            .storage
            .prepare_in_background()
            .map_err(KeeperError::Thread)
    }

    pub fn cluster(&self) -> &ClusterIdentity {
        &self.cluster
    }

    /// End of the WAL that consumers may have.
    pub fn commit_lsn(&self) -> Lsn {
        Lsn(self.commit_lsn.get())
    }

    /// Start of the WAL that is kept; invalid while there is no log.
    pub fn oldest_lsn(&self) -> Lsn {
        Lsn(self.oldest_lsn.load(Ordering::Relaxed))
    }

    /// `host:port` of the other members, as the proposer knows them.
    pub fn peers(&self) -> Vec<String> {
        let view = self.view();
        let configuration = &view.state.configuration;
        let new = configuration.new_members.iter().flatten();
        let mut peers: Vec<String> = Vec::new();
        for member in configuration.members.iter().chain(new) {
            let address = match member.host.contains(':') {
                true => format!("[{}]:{}", member.host, member.port),
                false => format!("{}:{}", member.host, member.port),
            };
            if member.id != self.identity.id && !peers.contains(&address) {
                peers.push(address);
            }
        }
        peers
    }

    /// From where a new slot can keep WAL: the end that consumers know, which no removal is beyond. Where
    /// nothing is known to be committed, from the log's begin.
    pub fn reservable_lsn(&self) -> Lsn {
        match self.commit_lsn() {
            Lsn::INVALID => self.oldest_lsn(),
            commit_lsn => commit_lsn,
        }
    }

    pub fn view(&self) -> Arc<View> {
        lock(&self.view).clone()
    }

    fn hold(&self) -> MutexGuard<'_, Held> {
        let _door = lock(&self.door);
        lock(&self.held)
    }

    pub fn take_turn(&self) -> Turn<'_> {
        Turn::new(self, self.hold())
    }

    /// Checks a proposer's Read, and tells what there is to read now.
    pub fn begin_read(&self, read: &Read) -> Result<Readable, PushError> {
        let mut actions = Vec::new();
        let held = self.hold();
        held.acceptor.on_read(read, &mut actions)?;
        Ok(Readable {
            term: held.acceptor.term(),
            oldest_lsn: held.storage.oldest_lsn(),
            flush_lsn: held.acceptor.flush_lsn(),
        })
    }

    /// commit_lsn to the control file if it moved, and slots; WAL removed that is not to be kept.
    pub fn housekeep(&self, retention: &Retention, space: Space) {
        self.persist_commit_lsn();
        self.slots.save_if_due();
        let kept_anyway = self.commit_lsn().0.saturating_sub(retention.wal_keep_size);
        self.kept_anyway_from.store(kept_anyway, Ordering::Relaxed);
        if self.remove_wal(retention, space) {
            log::info!(
                "removed WAL cluster={} oldest_lsn={}",
                self.cluster.name,
                self.oldest_lsn()
            );
        }
    }

    fn remove_wal(&self, retention: &Retention, space: Space) -> bool {
        let mut removed = false;
        while self.remove_some(retention, space) {
            removed = true;
        }
        removed
    }

    /// The oldest segment, whoever needs it; more only if a record reaches from it over the next ones. False
    /// if there is none that may go.
    pub fn remove_oldest(&self, retention: &Retention) -> bool {
        (1..=self.kept().segments())
            .any(|segments| self.remove_some(retention, Space::OldestGo(segments)))
    }

    /// What there is, and who needs it.
    pub fn kept(&self) -> Kept {
        let held = self.hold();
        let (commit_lsn, members) = (held.acceptor.commit_lsn(), held.acceptor.truncate_lsn());
        let oldest_lsn = held.storage.oldest_lsn();
        drop(held);
        let others = [self.consumers.needed_from(), self.slots.needed_from()];
        let others = others.into_iter().flatten();
        Kept {
            oldest_lsn,
            commit_lsn,
            needed_from: Some(others.fold(members, Lsn::min)),
            segment_size: self.cluster.segment_size,
        }
    }

    /// Some of what is to be removed. False if there was nothing.
    fn remove_some(&self, retention: &Retention, space: Space) -> bool {
        let kept = self.kept();
        let removal = kept.removal(retention, space);
        if removal.bound.is_none() && space == Space::Enough {
            *lock(&self.over_bound) = None;
        }
        let below = removal.below.segment_start(self.cluster.segment_size);
        if below <= kept.oldest_lsn {
            return false;
        }
        // Without the keeper: it waits for the disk.
        if let Some(bound) = removal.bound {
            self.take_from_the_needy(bound, below);
        }
        let mut held = self.hold();
        if let Err(error) = held.storage.remove_before(removal.below) {
            stop_on(&error);
        }
        let oldest_lsn = held.storage.oldest_lsn();
        drop(held);
        self.oldest_lsn.store(oldest_lsn.0, Ordering::Relaxed);
        if removal.bound.is_some() {
            let needed_from = kept.needed_from.unwrap_or(oldest_lsn).max(kept.oldest_lsn);
            let taken = oldest_lsn.saturating_distance_from(needed_from);
            self.metrics.removed_needed_wal_bytes.inc_by(taken);
        }
        oldest_lsn > kept.oldest_lsn
    }

    /// Says who needs WAL below `lsn`, and notes which slots lose it; not again for the same bound before
    /// nobody is over it.
    fn take_from_the_needy(&self, bound: Bound, lsn: Lsn) {
        let name = &self.cluster.name;
        if lock(&self.over_bound).replace(bound) != Some(bound) {
            log::warn!(
                "removes WAL that is still needed cluster={name} (over {}) below={lsn} needed_by={}",
                bound.name(),
                self.needed_by(lsn)
            );
        }
        let lost = self.slots.lose_below(lsn);
        for (slot, restart_lsn) in &lost {
            log::warn!(
                "replication slot is lost slot={slot} cluster={name} (over {}) \
                 restart_lsn={restart_lsn} kept_from={lsn}",
                bound.name()
            );
        }
        if !lost.is_empty() {
            self.consumers.gather_feedback();
            self.consumers.wake();
        }
    }

    /// Who needs WAL below `lsn`, for the log.
    fn needed_by(&self, lsn: Lsn) -> String {
        let members = self.hold().acceptor.truncate_lsn();
        let member = (members < lsn).then(|| format!("a member of the quorum ({members})"));
        let consumers = self.consumers.list();
        let behind = consumers.iter().filter_map(|consumer| {
            let needed_from = consumer.progress().needed_from();
            let name = &consumer.application_name;
            (needed_from < lsn).then(|| format!("{name} {} ({needed_from})", consumer.address))
        });
        let slots = self.slots.list();
        let slots = slots.iter().filter_map(|slot| {
            let (name, restart_lsn) = (&slot.data.name, slot.data.restart_lsn);
            let needs = restart_lsn.is_valid() && restart_lsn < lsn;
            needs.then(|| format!("slot {name} ({restart_lsn})"))
        });
        member
            .into_iter()
            .chain(behind)
            .chain(slots)
            .collect::<Vec<_>>()
            .join(", ")
    }

    /// What recovery would otherwise have to find out by decoding, and what consumers would have
    /// to wait for after a restart.
    pub fn persist_commit_lsn(&self) {
        let mut held = self.hold();
        let commit_lsn = held.acceptor.commit_lsn();
        if commit_lsn == held.persisted_commit_lsn {
            return;
        }
        held.persisted_commit_lsn = commit_lsn;
        let state = held.acceptor.state();
        let control = lock(&self.control);
        drop(held);
        self.write_control_file(control, &state);
    }

    fn write_control_file(&self, mut control: MutexGuard<'_, ControlFile>, state: &AcceptorState) {
        let started = Instant::now();
        if let Err(error) = control.persist(state) {
            stop_on(&error);
        }
        let seconds = started.elapsed().as_secs_f64();
        self.metrics.persist_control_file_seconds.observe(seconds);
    }

    /// For reading files without the keeper.
    pub fn reader(&self) -> Reader {
        let view = self.view();
        let (disk, history) = (self.disk.clone(), &view.state.history);
        let files = WalReader::new(disk, &self.cluster, history, view.timeline_files());
        Reader {
            files: files.expect("the WAL of this cluster was opened, so its shape is supported"),
            view,
        }
    }

    /// Fills `buffer` with committed WAL.
    pub fn read_committed(
        &self,
        reader: &mut Reader,
        begin: Lsn,
        buffer: &mut [u8],
    ) -> Result<(), ConnectionError> {
        let end = begin + buffer.len() as u64;
        assert!(
            end <= self.commit_lsn(),
            "{end} would be sent, but only {} is committed",
            self.commit_lsn()
        );
        self.read(reader, begin, buffer)
            .map_err(|error| ConnectionError::Command(self.read_failed(&error)))
    }

    /// Appends flushed WAL to `out`, for a proposer; nothing if it has been removed.
    pub fn read_flushed(
        &self,
        reader: &mut Reader,
        range: Range<Lsn>,
        out: &mut Vec<u8>,
    ) -> Result<(), ConnectionError> {
        let start = out.len();
        let len = usize::try_from(range.end - range.start).expect("a message's worth");
        out.resize(start + len, 0);
        let result = self.read(reader, range.start, &mut out[start..]);
        if result.is_err() {
            out.truncate(start);
        }
        match result {
            Ok(()) | Err(ReadError::Removed { .. }) => Ok(()),
            Err(error) => Err(ConnectionError::Fatal(self.read_failed(&error))),
        }
    }

    fn read(&self, reader: &mut Reader, begin: Lsn, buffer: &mut [u8]) -> Result<(), ReadError> {
        let view = self.view();
        if !view.same_timelines(&reader.view) {
            let files = view.timeline_files();
            reader.files.set_history(&view.state.history, files);
        }
        reader.view = view;
        reader.files.read(begin, buffer)
    }

    fn read_failed(&self, error: &ReadError) -> ErrorReport {
        let sqlstate = match error {
            ReadError::Removed { .. } => "58P01",
            ReadError::Damaged(_) => "XX001",
            ReadError::Storage(_) => "58030",
        };
        if !matches!(error, ReadError::Removed { .. }) {
            log::error!(
                "WAL can't be read back cluster={} ({error})",
                self.cluster.name
            );
        }
        ErrorReport::new(sqlstate, error.to_string())
    }

    pub fn status(&self) -> ClusterStatus {
        let view = self.view();
        let position = |lsn: &AtomicU64| LsnText(Lsn(lsn.load(Ordering::Relaxed)));
        let standbys = self.consumers.list();
        ClusterStatus {
            term: view.state.term.0,
            configuration: ConfigurationStatus::from(&view.state.configuration),
            term_history: term_history(&view.state.history),
            write_lsn: position(&self.write_lsn),
            flush_lsn: position(&self.flush_lsn),
            commit_lsn: LsnText(self.commit_lsn()),
            oldest_lsn: position(&self.oldest_lsn),
            proposer: lock(&self.proposer).map(|address| address.to_string()),
            standbys: standbys
                .iter()
                .map(|c| StandbyStatus::from(c.as_ref()))
                .collect(),
            slots: self
                .slots
                .list()
                .iter()
                .map(|s| self.slot_status(s))
                .collect(),
            slots_error: self.slots.unreadable(),
            over_bound: lock(&self.over_bound).map(|bound| bound.name().to_owned()),
            damaged_appends: self.metrics.damaged_appends.get(),
            ..ClusterStatus::of(&self.cluster)
        }
    }
}

impl Keeper {
    fn slot_status(&self, slot: &SlotView) -> SlotStatus {
        let data = &slot.data;
        let kept_anyway_from = Lsn(self.kept_anyway_from.load(Ordering::Relaxed));
        let wal_status = match data.restart_lsn {
            _ if data.lost => Some("lost"),
            Lsn::INVALID => None,
            lsn if lsn >= kept_anyway_from => Some("reserved"),
            _ => Some("extended"),
        };
        SlotStatus {
            slot_name: data.name.clone(),
            temporary: slot.temporary,
            active: slot.active.is_some(),
            active_by: slot
                .active
                .as_ref()
                .map(|holder| holder.description.clone()),
            restart_lsn: Some(LsnText(data.restart_lsn)).filter(|lsn| lsn.0.is_valid()),
            xmin: transaction_id(data.xmin),
            catalog_xmin: transaction_id(data.catalog_xmin),
            wal_status: wal_status.map(str::to_owned),
        }
    }
}

/// As Postgres shows it: without the epoch.
fn transaction_id(full: u64) -> Option<u32> {
    (full > 0).then_some(full as u32)
}

/// Reads a cluster's files, with the history by which their names were chosen.
#[derive(Debug)]
pub struct Reader {
    files: WalReader,
    view: Arc<View>,
}

impl From<&crate::consumers::Consumer> for StandbyStatus {
    fn from(consumer: &crate::consumers::Consumer) -> StandbyStatus {
        let progress = consumer.progress();
        StandbyStatus {
            application_name: consumer.application_name.clone(),
            address: consumer.address.to_string(),
            state: progress.state.name().into(),
            sent_lsn: LsnText(progress.sent_lsn),
            write_lsn: LsnText(progress.write_lsn),
            flush_lsn: LsnText(progress.flush_lsn),
            apply_lsn: LsnText(progress.apply_lsn),
        }
    }
}

/// A panic ends the daemon, so a poisoned lock is only ever seen by a test that failed already.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! Which clusters there are: one directory, one keeper each.
//!
//! ```text
//!   start      every directory with a control file is opened; one that can't be is listed with
//!              its error and not served, the others are
//!   greeting   of an unknown system identifier: answered by an acceptor that holds nothing
//!   Configure  taken by such an acceptor: directory and keeper are made, and it stays
//! ```
//!
//! So a stranger who greets leaves no trace; only a configuration of which this safekeeper is a
//! member does. A cluster's name belongs to one system identifier, for consumers choose by it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use safekeeper_protocol::{
    Acceptor, AcceptorAction, AcceptorMessage, AcceptorState, ClusterIdentity, Lsn,
    ProposerMessage, Read, Session,
};
use safekeeper_wal::{PgVersion, SegmentSize};
use safekeeper_wire::pgwire::ErrorReport;

use crate::control_file::{ControlFileError, list_clusters};
use crate::disk::{Disk, StorageError};
use crate::identity::{DataDir, Identity};
use crate::keeper::{Keeper, KeeperError, PushError, stop_on};
use crate::metrics::Metrics;
use crate::retention::{Retention, Space};
use crate::status::{ClusterStatus, Status};

/// The clusters of one data directory.
#[derive(Debug)]
pub struct Clusters {
    disk: Arc<dyn Disk>,
    identity: Identity,
    metrics: Arc<Metrics>,
    segments: Segments,
    /// By system identifier. Held while a cluster is made, so that it is made once.
    places: Mutex<BTreeMap<u64, Place>>,
}

#[derive(Clone, Debug)]
enum Place {
    Served(Arc<Keeper>),
    /// Could not be opened.
    Broken(Box<ClusterStatus>),
}

/// Who makes the segments that the log will need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segments {
    /// A thread for each cluster, ahead of the log.
    MadeAhead,
    /// The log itself, when it gets there: for a simulation, which has one thread.
    MadeWhenNeeded,
}

/// What became of a message for a cluster without a keeper.
#[derive(Debug)]
pub enum Unknown {
    /// Answered.
    Handled,
    /// To be answered with no WAL.
    Read(Read),
    /// It is known meanwhile: the message is for this keeper.
    Known(Arc<Keeper>),
    /// Answered, and there is a keeper now.
    Created(Arc<Keeper>),
}

impl Clusters {
    /// Opens every cluster of the data directory. Fails only if it can't even be listed.
    pub fn open(data_dir: &DataDir, metrics: Arc<Metrics>) -> Result<Clusters, StorageError> {
        let (disk, identity) = (data_dir.disk(), data_dir.identity());
        Clusters::with_disk(disk, identity, metrics, Segments::MadeAhead)
    }

    /// The same with any disk, which must have been synced since the last process used it.
    pub fn with_disk(
        disk: Arc<dyn Disk>,
        identity: Identity,
        metrics: Arc<Metrics>,
        segments: Segments,
    ) -> Result<Clusters, StorageError> {
        let mut places = BTreeMap::new();
        for system_id in list_clusters(disk.as_ref())? {
            let place = open_one(&disk, identity, system_id, &metrics, segments);
            places.insert(system_id, place);
        }
        Ok(Clusters {
            disk,
            identity,
            metrics,
            segments,
            places: Mutex::new(places),
        })
    }

    /// The clusters that are served.
    pub fn keepers(&self) -> Vec<Arc<Keeper>> {
        let places = self.lock();
        let keepers = places.values().filter_map(|place| match place {
            Place::Served(keeper) => Some(keeper.clone()),
            Place::Broken(_) => None,
        });
        keepers.collect()
    }

    /// The cluster a consumer wants: by name or system identifier, or the only one.
    pub fn choose(&self, name: Option<&str>) -> Result<Arc<Keeper>, ErrorReport> {
        let places = self.lock();
        let found: Vec<&Place> = match name {
            Some(name) => places
                .values()
                .filter(|place| place.is_called(name))
                .collect(),
            None => places.values().collect(),
        };
        match (found.as_slice(), name) {
            ([Place::Served(keeper)], _) => Ok(keeper.clone()),
            ([Place::Broken(status)], _) => Err(broken(status)),
            ([], Some(name)) => Err(ErrorReport::new(
                "3D000",
                format!("cluster \"{name}\" does not exist"),
            )
            .hint(hint_of_names(&places))),
            ([], None) => Err(
                ErrorReport::new("55000", "this safekeeper holds no cluster yet")
                    .hint("A cluster is made here when its primary first connects."),
            ),
            _ => Err(ErrorReport::new(
                "55000",
                "this safekeeper holds several clusters, and none was chosen",
            )
            .hint(hint_of_names(&places))),
        }
    }

    /// Answers one message for a cluster that had no keeper when its connection last looked.
    pub fn handle_unknown(
        &self,
        cluster: &ClusterIdentity,
        session: Session,
        message: &ProposerMessage,
        now_ms: u64,
        replies: &mut Vec<AcceptorMessage>,
    ) -> Result<Unknown, PushError> {
        let mut places = self.lock();
        match places.get(&cluster.system_id) {
            Some(Place::Served(keeper)) => return Ok(Unknown::Known(keeper.clone())),
            Some(Place::Broken(status)) => return Err(PushError::Cluster(broken(status))),
            None => check_new(cluster, &places).map_err(PushError::Cluster)?,
        }
        if let ProposerMessage::Read(read) = message {
            return Ok(Unknown::Read(*read));
        }
        let mut acceptor = Acceptor::new(
            self.identity.id,
            self.identity.incarnation,
            AcceptorState::unconfigured(cluster.clone()),
            Lsn::INVALID,
        );
        let mut actions = Vec::new();
        match message {
            ProposerMessage::Greeting(m) => acceptor.on_greeting(m, now_ms, &mut actions),
            ProposerMessage::Configure(m) => acceptor.on_configure(m, &mut actions),
            ProposerMessage::VoteRequest(m) => acceptor.on_vote_request(m, &mut actions),
            ProposerMessage::Elected(m) => acceptor.on_elected(session, m, now_ms, &mut actions),
            ProposerMessage::Append(m) => acceptor.on_append(session, m, now_ms, &mut actions),
            ProposerMessage::Read(m) => acceptor.on_read(m, &mut actions),
        }?;
        let mut created = None;
        for action in actions {
            match action {
                AcceptorAction::Persist(state) => created = Some(self.create(&acceptor, &state)?),
                AcceptorAction::Send(message) => replies.push(message),
                other => unreachable!("an acceptor that holds nothing asked for {other:?}"),
            }
        }
        Ok(match created {
            None => Unknown::Handled,
            Some(keeper) => {
                places.insert(cluster.system_id, Place::Served(keeper.clone()));
                Unknown::Created(keeper)
            }
        })
    }

    fn create(&self, acceptor: &Acceptor, state: &AcceptorState) -> Result<Arc<Keeper>, PushError> {
        let cluster = &state.cluster;
        let metrics = self.metrics.of_cluster(&label(cluster));
        let created = Keeper::create(
            self.disk.clone(),
            self.identity,
            acceptor.clone(),
            state,
            metrics,
        )
        .and_then(|keeper| self.segments.start(keeper));
        match created {
            Ok(keeper) => {
                log::info!(
                    "made cluster={} system_id={} pg_major={} segment_size={} configuration={}",
                    cluster.name,
                    cluster.system_id,
                    cluster.pg_major,
                    cluster.segment_size,
                    state.configuration
                );
                Ok(Arc::new(keeper))
            }
            Err(KeeperError::Control(ControlFileError::Storage(error))) if error.is_no_space() => {
                Err(PushError::NoSpace(error))
            }
            Err(KeeperError::Control(ControlFileError::Storage(error))) => stop_on(&error),
            Err(error) => Err(PushError::Cluster(ErrorReport::new(
                "58030",
                format!("could not make cluster {}: {error}", label(cluster)),
            ))),
        }
    }

    /// See retention.rs.
    pub fn housekeep(&self, retention: &Retention) {
        let space = match self.is_short(retention) {
            true => Space::Short,
            false => Space::Enough,
        };
        let keepers = self.keepers();
        for keeper in &keepers {
            keeper.housekeep(retention, space);
        }
        if space == Space::Short {
            self.make_space(&keepers, retention);
        }
    }

    /// The oldest segment of who keeps most, again and again.
    fn make_space(&self, keepers: &[Arc<Keeper>], retention: &Retention) {
        while self.is_short(retention) {
            let mut by_size: Vec<_> = keepers.iter().map(|k| (k.kept().size(), k)).collect();
            by_size.sort_by_key(|(size, _)| std::cmp::Reverse(*size));
            let mut largest_first = by_size.iter();
            if !largest_first.any(|(_, keeper)| keeper.remove_oldest(retention)) {
                return;
            }
        }
    }

    fn is_short(&self, retention: &Retention) -> bool {
        if retention.min_free_space == 0 {
            return false;
        }
        match self.disk.free_bytes() {
            Ok(free) => free < retention.min_free_space,
            Err(error) => {
                log::warn!("free space is not known ({error})");
                false
            }
        }
    }

    pub fn status(&self) -> Status {
        let places = self.lock().clone();
        Status {
            id: self.identity.id.0,
            incarnation: self.identity.incarnation.to_string(),
            version: env!("CARGO_PKG_VERSION").into(),
            clusters: places
                .values()
                .map(|place| match place {
                    Place::Served(keeper) => keeper.status(),
                    Place::Broken(status) => status.as_ref().clone(),
                })
                .collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Place>> {
        // A panic ends the daemon, so this is only ever seen by a test that failed already.
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Segments {
    fn start(self, keeper: Keeper) -> Result<Keeper, KeeperError> {
        if self == Segments::MadeAhead {
            keeper.prepare_in_background()?;
        }
        Ok(keeper)
    }
}

impl Place {
    fn names(&self) -> (String, String) {
        match self {
            Place::Served(keeper) => {
                let cluster = keeper.cluster();
                (cluster.name.clone(), cluster.system_id.to_string())
            }
            Place::Broken(status) => (status.name.clone(), status.system_id.clone()),
        }
    }

    fn is_called(&self, wanted: &str) -> bool {
        let (name, system_id) = self.names();
        (!name.is_empty() && name == wanted) || system_id == wanted
    }
}

fn open_one(
    disk: &Arc<dyn Disk>,
    identity: Identity,
    system_id: u64,
    metrics: &Metrics,
    segments: Segments,
) -> Place {
    let mut known = None;
    let opened = Keeper::open(disk.clone(), identity, system_id, |cluster| {
        known = Some(cluster.clone());
        metrics.of_cluster(&label(cluster))
    })
    .and_then(|keeper| segments.start(keeper));
    match opened {
        Ok(keeper) => {
            log::info!(
                "opened cluster={} system_id={system_id} commit_lsn={}",
                keeper.cluster().name,
                keeper.commit_lsn()
            );
            Place::Served(Arc::new(keeper))
        }
        Err(error) => {
            log::error!("cluster with system_id={system_id} is not served: {error}");
            Place::Broken(Box::new(ClusterStatus {
                error: Some(error.to_string()),
                system_id: system_id.to_string(),
                ..known.as_ref().map(ClusterStatus::of).unwrap_or_default()
            }))
        }
    }
}

fn broken(status: &ClusterStatus) -> ErrorReport {
    ErrorReport::new("58030", format!("cluster {} is not served", status.label()))
        .detail(status.error.clone().unwrap_or_default())
}

fn label(cluster: &ClusterIdentity) -> String {
    ClusterStatus::of(cluster).label()
}

fn hint_of_names(places: &BTreeMap<u64, Place>) -> String {
    let names: Vec<String> = places
        .values()
        .map(|place| {
            let (name, system_id) = place.names();
            if name.is_empty() { system_id } else { name }
        })
        .collect();
    format!(
        "Choose one by options='-c cluster=NAME'; there are: {}.",
        names.join(", ")
    )
}

/// What can't be stored here is refused at the greeting, before anybody relies on it.
fn check_new(cluster: &ClusterIdentity, places: &BTreeMap<u64, Place>) -> Result<(), ErrorReport> {
    let invalid = |message: String| Err(ErrorReport::new("22023", message));
    if cluster.system_id == 0 {
        return invalid("0 is not a system identifier".into());
    }
    if !PgVersion::ALL
        .iter()
        .any(|version| version.major() == cluster.pg_major)
    {
        return invalid(format!(
            "PostgreSQL version {} is not supported",
            cluster.pg_major
        ));
    }
    if let Err(error) = SegmentSize::new(cluster.segment_size) {
        return invalid(format!("wal_segment_size: {error}"));
    }
    let is_plain = |c: char| c.is_ascii_graphic() && !matches!(c, '"' | '\'' | '\\');
    if !cluster.name.chars().all(is_plain) {
        return invalid(format!(
            "cluster name \"{}\" holds characters other than plain ASCII ones",
            cluster.name.escape_default()
        ));
    }
    let holder = places
        .values()
        .find(|place| !cluster.name.is_empty() && place.names().0 == cluster.name);
    match holder {
        None => Ok(()),
        Some(holder) => invalid(format!(
            "cluster name \"{}\" belongs to system identifier {} here, not to {}",
            cluster.name,
            holder.names().1,
            cluster.system_id
        )),
    }
}

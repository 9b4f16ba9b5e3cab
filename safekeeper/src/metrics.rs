//! What `/metrics` shows, in the text format of Prometheus.
//!
//! Prefix `safekeeper_`, base units, `_total` on counters, and one label, `cluster`: the cluster's
//! name, or its system identifier if it has none; with slots a second, `slot`. Positions are gauges in bytes of WAL.
//!
//! The WAL path touches counters and histograms only, through handles that each keeper holds;
//! gauges are set from the published state when somebody asks.

use std::sync::atomic::{AtomicI64, AtomicU64};

use prometheus_client::encoding::{EncodeLabelSet, text::encode};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::status::ClusterStatus;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ClusterLabel {
    cluster: String,
}

/// Buckets from 50 µs, doubling, to 1.6 s: an fdatasync on good storage takes a hundred
/// microseconds, and one that takes seconds is an outage whatever its exact length.
#[derive(Clone)]
struct FlushBuckets;

impl MetricConstructor<Histogram> for FlushBuckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(exponential_buckets(50e-6, 2.0, 16))
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SlotLabel {
    cluster: String,
    slot: String,
}

type Seconds = Family<ClusterLabel, Histogram, FlushBuckets>;
type Count = Family<ClusterLabel, Counter>;
type Position = Family<ClusterLabel, Gauge<u64, AtomicU64>>;
type SlotPosition = Family<SlotLabel, Gauge<u64, AtomicU64>>;
type SlotNumber = Family<SlotLabel, Gauge<i64, AtomicI64>>;
type Number = Family<ClusterLabel, Gauge<i64, AtomicI64>>;

/// The metrics of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    flush_wal_seconds: Seconds,
    persist_control_file_seconds: Seconds,
    write_wal_bytes: Count,
    sent_wal_bytes: Count,
    relayed_wal_bytes: Count,
    damaged_appends: Count,
    no_space_appends: Count,
    write_lsn: Position,
    flush_lsn: Position,
    commit_lsn: Position,
    oldest_lsn: Position,
    removed_needed_wal_bytes: Count,
    slot_active: SlotNumber,
    slot_lost: SlotNumber,
    slot_restart_lsn: SlotPosition,
    slot_retained_bytes: SlotPosition,
    term: Position,
    standbys: Number,
    proposer_connected: Number,
    served: Number,
    pub connections: Gauge,
    pub connections_refused: Counter,
}

/// One cluster's part, for the WAL path.
#[derive(Clone, Debug)]
pub struct ClusterMetrics {
    pub flush_wal_seconds: Histogram,
    pub persist_control_file_seconds: Histogram,
    pub write_wal_bytes: Counter,
    pub sent_wal_bytes: Counter,
    pub relayed_wal_bytes: Counter,
    pub damaged_appends: Counter,
    pub no_space_appends: Counter,
    pub removed_needed_wal_bytes: Counter,
}

impl std::fmt::Debug for FlushBuckets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FlushBuckets")
    }
}

impl Default for Metrics {
    fn default() -> Metrics {
        let mut metrics = Metrics {
            registry: Registry::with_prefix("safekeeper"),
            flush_wal_seconds: Family::new_with_constructor(FlushBuckets),
            persist_control_file_seconds: Family::new_with_constructor(FlushBuckets),
            write_wal_bytes: Count::default(),
            sent_wal_bytes: Count::default(),
            relayed_wal_bytes: Count::default(),
            damaged_appends: Count::default(),
            no_space_appends: Count::default(),
            write_lsn: Position::default(),
            flush_lsn: Position::default(),
            commit_lsn: Position::default(),
            oldest_lsn: Position::default(),
            removed_needed_wal_bytes: Count::default(),
            slot_active: SlotNumber::default(),
            slot_lost: SlotNumber::default(),
            slot_restart_lsn: SlotPosition::default(),
            slot_retained_bytes: SlotPosition::default(),
            term: Position::default(),
            standbys: Number::default(),
            proposer_connected: Number::default(),
            served: Number::default(),
            connections: Gauge::default(),
            connections_refused: Counter::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    #[rustfmt::skip] // a table
    fn register(&mut self) {
        let r = &mut self.registry;
        r.register_with_unit("flush_wal", "Time of one flush of WAL to stable storage", Unit::Seconds, self.flush_wal_seconds.clone());
        r.register_with_unit("persist_control_file", "Time to replace the control file", Unit::Seconds, self.persist_control_file_seconds.clone());
        r.register_with_unit("write_wal", "WAL taken from proposers", Unit::Bytes, self.write_wal_bytes.clone());
        r.register_with_unit("sent_wal", "WAL sent to consumers", Unit::Bytes, self.sent_wal_bytes.clone());
        r.register_with_unit("relayed_wal", "WAL brought from a peer for consumers, and among what was sent", Unit::Bytes, self.relayed_wal_bytes.clone());
        r.register("damaged_appends", "Appends refused because their WAL is damaged", self.damaged_appends.clone());
        r.register("no_space_appends", "Appends refused for want of disk space", self.no_space_appends.clone());
        r.register("write_lsn", "End of the WAL given to the operating system", self.write_lsn.clone());
        r.register("flush_lsn", "End of the last whole record on stable storage", self.flush_lsn.clone());
        r.register("commit_lsn", "End of the WAL known to be on a quorum", self.commit_lsn.clone());
        r.register("oldest_lsn", "Start of the WAL that is kept", self.oldest_lsn.clone());
        r.register_with_unit("removed_needed_wal", "WAL removed over a bound though somebody needed it", Unit::Bytes, self.removed_needed_wal_bytes.clone());
        r.register("slot_active", "1 while a consumer uses the replication slot", self.slot_active.clone());
        r.register("slot_lost", "1 if WAL that the replication slot needed has been removed", self.slot_lost.clone());
        r.register("slot_restart_lsn", "Start of the WAL that the replication slot needs", self.slot_restart_lsn.clone());
        r.register_with_unit("slot_retained_wal", "Committed WAL that the replication slot needs", Unit::Bytes, self.slot_retained_bytes.clone());
        r.register("acceptor_term", "Highest term voted for or served", self.term.clone());
        r.register("standbys", "Consumers that stream from here", self.standbys.clone());
        r.register("proposer_connected", "1 while an elected proposer is connected", self.proposer_connected.clone());
        r.register("cluster_served", "0 if the cluster could not be opened, see its error in the status", self.served.clone());
        r.register("connections", "Open connections of proposers and consumers", self.connections.clone());
        r.register("connections_refused", "Connections refused because there were too many", self.connections_refused.clone());
    }

    pub fn of_cluster(&self, name: &str) -> ClusterMetrics {
        let label = ClusterLabel {
            cluster: name.to_owned(),
        };
        ClusterMetrics {
            flush_wal_seconds: self.flush_wal_seconds.get_or_create_owned(&label),
            persist_control_file_seconds: self
                .persist_control_file_seconds
                .get_or_create_owned(&label),
            write_wal_bytes: self.write_wal_bytes.get_or_create_owned(&label),
            relayed_wal_bytes: self.relayed_wal_bytes.get_or_create_owned(&label),
            sent_wal_bytes: self.sent_wal_bytes.get_or_create_owned(&label),
            damaged_appends: self.damaged_appends.get_or_create_owned(&label),
            no_space_appends: self.no_space_appends.get_or_create_owned(&label),
            removed_needed_wal_bytes: self.removed_needed_wal_bytes.get_or_create_owned(&label),
        }
    }

    /// Slots that are gone are gone here too.
    fn set_slots(&self, clusters: &[ClusterStatus]) {
        self.slot_active.clear();
        self.slot_lost.clear();
        self.slot_restart_lsn.clear();
        self.slot_retained_bytes.clear();
        for cluster in clusters {
            for slot in &cluster.slots {
                let label = SlotLabel {
                    cluster: cluster.label(),
                    slot: slot.slot_name.clone(),
                };
                let lost = slot.wal_status.as_deref() == Some("lost");
                self.slot_active
                    .get_or_create(&label)
                    .set(i64::from(slot.active));
                self.slot_lost.get_or_create(&label).set(i64::from(lost));
                if let Some(restart_lsn) = slot.restart_lsn {
                    let retained = cluster.commit_lsn.0.saturating_distance_from(restart_lsn.0);
                    self.slot_restart_lsn
                        .get_or_create(&label)
                        .set(restart_lsn.0.0);
                    self.slot_retained_bytes.get_or_create(&label).set(retained);
                }
            }
        }
    }

    /// Everything as text, with the gauges of `clusters` as they are now.
    pub fn render(&self, clusters: &[ClusterStatus]) -> String {
        self.set_slots(clusters);
        for status in clusters {
            let label = ClusterLabel {
                cluster: status.label(),
            };
            for (family, lsn) in [
                (&self.write_lsn, status.write_lsn),
                (&self.flush_lsn, status.flush_lsn),
                (&self.commit_lsn, status.commit_lsn),
                (&self.oldest_lsn, status.oldest_lsn),
            ] {
                family.get_or_create(&label).set(lsn.0.0);
            }
            self.term.get_or_create(&label).set(status.term);
            let standbys = i64::try_from(status.standbys.len()).unwrap_or(i64::MAX);
            self.standbys.get_or_create(&label).set(standbys);
            let proposer_connected = i64::from(status.proposer.is_some());
            self.proposer_connected
                .get_or_create(&label)
                .set(proposer_connected);
            let served = i64::from(status.error.is_none());
            self.served.get_or_create(&label).set(served);
        }
        let mut text = String::new();
        // Only a String is written to, and that does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

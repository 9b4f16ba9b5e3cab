//! What may go wrong, how often in one run, and how often it did.
//!
//! A run draws its faults from its seed: each kind is on or off, and has a rate of its own. A run
//! with everything on all the time gets nowhere and shows little; a few kinds at a time, in every
//! combination over many seeds, show more.
//!
//! Some things can't be survived by anybody, and are kept out by a budget. A minority of members
//! of every set that may still count may be lost for good (wiped, or damaged where committed WAL or promises stand). And no bit of
//! WAL is flipped *above* the commit_lsn that is persisted: recovery can't tell that from a torn
//! write, cuts the log there, and has then forgotten what it acknowledged in the last moments.

use std::collections::BTreeMap;
use std::fmt;

use super::random::Random;

/// One kind of trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    ConnectionLost,
    SlowLink,
    /// The server dials again while the safekeeper still serves the old connection.
    DuplicateConnection,
    OneWayPartition,
    Partition,
    NodeKilled,
    NodePowerCut,
    /// The machine stops at some operation of the disk, in the midst of whatever is being done.
    CrashInAction,
    NodeStopped,
    ClockJump,
    DiskError,
    DiskFull,
    SlowDisk,
    WalBitFlip,
    ControlBitFlip,
    NodeWiped,
    ServerCrash,
    ServerStopped,
    WorkerRestart,
    /// A standby is promoted while the old primary lives, is stopped, cut off or dead.
    Failover,
    /// A standby is promoted without asking anybody.
    HandPromotion,
    /// A server that was refused or deposed becomes a standby.
    Rejoin,
    MemberChange,
    MemberChangeGivenUp,
    /// A server made from a copy of another's data directory.
    Copy,
    /// A bit flips between proposer and safekeeper.
    DamagedAppend,
    /// A server started by override, without a quorum.
    StartedAlone,
}

impl Fault {
    pub const ALL: [Fault; 27] = [
        Fault::ConnectionLost,
        Fault::SlowLink,
        Fault::DuplicateConnection,
        Fault::OneWayPartition,
        Fault::Partition,
        Fault::NodeKilled,
        Fault::NodePowerCut,
        Fault::CrashInAction,
        Fault::NodeStopped,
        Fault::ClockJump,
        Fault::DiskError,
        Fault::DiskFull,
        Fault::SlowDisk,
        Fault::WalBitFlip,
        Fault::ControlBitFlip,
        Fault::NodeWiped,
        Fault::ServerCrash,
        Fault::ServerStopped,
        Fault::WorkerRestart,
        Fault::Failover,
        Fault::HandPromotion,
        Fault::Rejoin,
        Fault::MemberChange,
        Fault::MemberChangeGivenUp,
        Fault::Copy,
        Fault::DamagedAppend,
        Fault::StartedAlone,
    ];

    /// How often it is drawn, against the others.
    fn weight(self) -> u64 {
        match self {
            Fault::CrashInAction | Fault::ServerCrash | Fault::NodePowerCut => 12,
            Fault::MemberChange => 12,
            Fault::ConnectionLost | Fault::Failover | Fault::WorkerRestart | Fault::Rejoin => 8,
            Fault::NodeWiped
            | Fault::HandPromotion
            | Fault::StartedAlone
            | Fault::ControlBitFlip => 3,
            _ => 5,
        }
    }
}

/// The faults of one run.
#[derive(Debug)]
pub struct Plan {
    weights: Vec<(Fault, u64)>,
    /// Mean time between two faults.
    pub pause_ms: u64,
    /// Mean time between two insertions into one server's WAL.
    pub insert_ms: u64,
}

impl Plan {
    pub fn draw(random: &mut Random) -> Plan {
        let mut weights: Vec<(Fault, u64)> = Vec::new();
        let on = [300, 600, 1000][random.below(3) as usize];
        for fault in Fault::ALL {
            if random.chance(on) {
                weights.push((fault, fault.weight() * random.range(1..5)));
            }
        }
        Plan {
            weights,
            pause_ms: [100, 300, 1000, 3000][random.below(4) as usize],
            insert_ms: [10, 30, 100][random.below(3) as usize],
        }
    }

    pub fn next_fault(&self, random: &mut Random) -> Option<Fault> {
        let total: u64 = self.weights.iter().map(|(_, weight)| weight).sum();
        if total == 0 {
            return None;
        }
        let mut at = random.below(total);
        for (fault, weight) in &self.weights {
            if at < *weight {
                return Some(*fault);
            }
            at -= weight;
        }
        None
    }
}

/// Something that has to happen in some runs for the run set to mean anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mark {
    Struck(Fault),
    Committed,
    ElectedMoreThanOnce,
    /// A worker went on with the term that the start of its server had won.
    TermHandedOver,
    /// A server died between winning and its worker's beginning.
    DiedBeforeHandOver,
    ThreeServers,
    Promoted,
    PromotedTwice,
    /// A promotion ended before its server led.
    PromotionDied,
    /// A reign on an older timeline, after a promotion that had begun another died.
    LedAfterDeadPromotion,
    PromotedByHandLed,
    PromotedByHandRefused,
    /// A standby went over to the next timeline.
    TimelineFollowed,
    /// A server became a standby without losing a byte.
    RejoinedAsItIs,
    /// A member got WAL that its proposer had not.
    FedFromDonor,
    MembersChanged,
    ChangeGivenUp,
    /// A joint configuration was left by another than who wrote it.
    ChangeFinishedForAnother,
    /// A wiped safekeeper took its own place.
    WipedReplaced,
    /// A safekeeper cut WAL that it had flushed.
    Truncated,
    /// A server lost WAL in a crash that it had pushed to somebody.
    LocalTailLost,
    /// A server fetched its own lost WAL from the quorum before recovery.
    CompletedFromQuorum,
    /// A reign began with WAL that no safekeeper held.
    ExtraWal,
    /// A server was refused: its log is not the quorum's.
    Diverged,
    RivalRespected,
    Deposed,
    SectorsLost,
    SectorsTorn,
    NamesLost,
    IoError,
    NoSpace,
    DamagedWalRefused,
    /// A safekeeper came up and did not serve the cluster.
    NotServed,
    SegmentSwitched,
    SegmentsRemoved,
    ConsumerFed,
    /// After healing a server went on that was there before.
    HealedWithoutRebuild,
    OneMember,
    ThreeMembers,
    FiveMembers,
}

impl Mark {
    pub const EVENTS: [Mark; 39] = [
        Mark::Committed,
        Mark::ElectedMoreThanOnce,
        Mark::TermHandedOver,
        Mark::DiedBeforeHandOver,
        Mark::ThreeServers,
        Mark::Promoted,
        Mark::PromotedTwice,
        Mark::PromotionDied,
        Mark::LedAfterDeadPromotion,
        Mark::PromotedByHandLed,
        Mark::PromotedByHandRefused,
        Mark::TimelineFollowed,
        Mark::RejoinedAsItIs,
        Mark::FedFromDonor,
        Mark::MembersChanged,
        Mark::ChangeGivenUp,
        Mark::ChangeFinishedForAnother,
        Mark::WipedReplaced,
        Mark::Truncated,
        Mark::LocalTailLost,
        Mark::CompletedFromQuorum,
        Mark::ExtraWal,
        Mark::Diverged,
        Mark::RivalRespected,
        Mark::Deposed,
        Mark::SectorsLost,
        Mark::SectorsTorn,
        Mark::NamesLost,
        Mark::IoError,
        Mark::NoSpace,
        Mark::DamagedWalRefused,
        Mark::NotServed,
        Mark::SegmentSwitched,
        Mark::SegmentsRemoved,
        Mark::ConsumerFed,
        Mark::HealedWithoutRebuild,
        Mark::OneMember,
        Mark::ThreeMembers,
        Mark::FiveMembers,
    ];

    pub fn all() -> impl Iterator<Item = Mark> {
        Mark::EVENTS.into_iter().chain(Fault::ALL.map(Mark::Struck))
    }
}

/// How often each mark was reached: in one run, or, summed up, in how many runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally(BTreeMap<Mark, u64>);

impl Tally {
    pub fn add(&mut self, mark: Mark) {
        *self.0.entry(mark).or_default() += 1;
    }

    pub fn count(&self, mark: Mark) -> u64 {
        self.0.get(&mark).copied().unwrap_or_default()
    }

    /// Counts another run: each of its marks once.
    pub fn add_run(&mut self, run: &Tally) {
        for mark in run.0.keys() {
            self.add(*mark);
        }
    }

    pub fn merge(&mut self, runs: &Tally) {
        for (mark, n) in &runs.0 {
            *self.0.entry(*mark).or_default() += n;
        }
    }

    pub fn missing(&self) -> Vec<Mark> {
        Mark::all().filter(|mark| self.count(*mark) == 0).collect()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Mark::all().try_for_each(|mark| writeln!(f, "{:>8}  {mark:?}", self.count(mark)))
    }
}

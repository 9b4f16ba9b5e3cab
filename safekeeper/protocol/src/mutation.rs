//! Rules broken on purpose, one at a time, to see whether the tests would notice.
//!
//! A test that has never failed proves little. Each [`Mutation`] takes one rule away at the place
//! where it is kept, and the tests must then find what it was for. `Mutation::caught_by` is the one
//! list of who must notice; `make mutations` demands it, and `docs/testing.md` has the table of who
//! else does, and how soon.
//!
//! Without the feature `mutations`, [`is_on`] is the constant `false` and nothing of this is in the
//! program. With it there is one switch for the whole process. Rules that the host keeps (the
//! server's start, the local history) are broken by those who play the host in the tests.

/// A rule that can be taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mutation {
    /// Half of the members are a quorum.
    QuorumOfHalf = 1,
    /// WAL of older terms is committed by counting.
    CommitWithoutTermStart,
    /// The donor is who had the highest term, whatever the term of its log.
    DonorRankedByTerm,
    /// At Elected the new history is persisted first, and the log cut then.
    HistoryBeforeTruncation,
    /// A vote is answered and not persisted.
    VoteNotDurable,
    /// A vote does not end the older proposer's reign here.
    StaleAppendAccepted,
    /// WAL is acknowledged when it is written.
    AnswerBeforeFsync,
    /// A failed fsync of WAL is taken for a success.
    FsyncErrorIgnored,
    /// What lies behind the end of a cut log stays there.
    TailNotZeroed,
    /// A safekeeper is known by its id alone, so that a wiped one is taken for the old.
    WipedMemberVotes,
    /// flush_lsn is what was written, not the end of a record.
    FlushLsnInsideRecord,
    /// In a joint configuration one of the two sets commits.
    CommitInOneSet,
    /// The local history goes on beyond the end of the local log.
    LocalHistoryNotClipped,
    /// The proposer has no memory of its former reigns.
    NoLocalHistory,
    /// The server starts without having won a term.
    ElectionBeforeRecoverySkipped,
    /// The term in the local history file is taken for a right to lead: no new one is won.
    TermFromHistoryFile,
    /// The worker that is started again stands with what is flushed, not with what is inserted.
    WorkerStandsByFlushLsn,
    /// commit_lsn is taken from a proposer whose Elected was not.
    CommitWithoutElected,
    /// Of two configurations the one with the higher generation is newer, whatever its term.
    ConfigurationByGeneration,
    /// What recovery reads is taken for durable, though the last process may have failed to sync.
    FailedSyncBelieved,
    /// WAL is not decoded before it is written.
    DamagedWalTaken,
    /// A standby is promoted when it has replayed up to the term's start, whoever holds the WAL.
    PromotedBeforeCompletion,
    /// A joint configuration is left, forwards or back, by a set that lacks what is committed.
    JointLeftWithoutData,
    /// A joint configuration is left forwards though the old set may not know of it.
    JointLeftWithoutOldMajority,
    /// A change of members begins without putting the present configuration under its own term.
    ChangeWithoutStamping,
    /// In a joint configuration the old set elects.
    VotesOfOneSet,
    /// What a copied history file says counts for a server that was promoted by hand.
    HistoryOfStandbyBelieved,
}

impl Mutation {
    pub const ALL: [Mutation; 27] = [
        Mutation::QuorumOfHalf,
        Mutation::CommitWithoutTermStart,
        Mutation::DonorRankedByTerm,
        Mutation::HistoryBeforeTruncation,
        Mutation::VoteNotDurable,
        Mutation::StaleAppendAccepted,
        Mutation::AnswerBeforeFsync,
        Mutation::FsyncErrorIgnored,
        Mutation::TailNotZeroed,
        Mutation::WipedMemberVotes,
        Mutation::FlushLsnInsideRecord,
        Mutation::CommitInOneSet,
        Mutation::LocalHistoryNotClipped,
        Mutation::NoLocalHistory,
        Mutation::ElectionBeforeRecoverySkipped,
        Mutation::TermFromHistoryFile,
        Mutation::WorkerStandsByFlushLsn,
        Mutation::CommitWithoutElected,
        Mutation::ConfigurationByGeneration,
        Mutation::FailedSyncBelieved,
        Mutation::DamagedWalTaken,
        Mutation::PromotedBeforeCompletion,
        Mutation::JointLeftWithoutData,
        Mutation::JointLeftWithoutOldMajority,
        Mutation::ChangeWithoutStamping,
        Mutation::VotesOfOneSet,
        Mutation::HistoryOfStandbyBelieved,
    ];
}

/// Whose rule it is, and so who breaks it: in the tests, the servers are played.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeper {
    /// This crate.
    Core,
    /// The daemon's storage.
    Storage,
    /// PostgreSQL's host of the proposer.
    Server,
}

impl Mutation {
    pub const fn kept_by(self) -> Keeper {
        match self {
            Mutation::QuorumOfHalf
            | Mutation::CommitWithoutTermStart
            | Mutation::DonorRankedByTerm
            | Mutation::HistoryBeforeTruncation
            | Mutation::VoteNotDurable
            | Mutation::StaleAppendAccepted
            | Mutation::WipedMemberVotes
            | Mutation::CommitInOneSet
            | Mutation::LocalHistoryNotClipped
            | Mutation::CommitWithoutElected
            | Mutation::PromotedBeforeCompletion
            | Mutation::JointLeftWithoutData
            | Mutation::JointLeftWithoutOldMajority
            | Mutation::ChangeWithoutStamping
            | Mutation::VotesOfOneSet
            | Mutation::ConfigurationByGeneration => Keeper::Core,
            Mutation::AnswerBeforeFsync
            | Mutation::FsyncErrorIgnored
            | Mutation::TailNotZeroed
            | Mutation::FlushLsnInsideRecord
            | Mutation::FailedSyncBelieved
            | Mutation::DamagedWalTaken => Keeper::Storage,
            Mutation::NoLocalHistory
            | Mutation::ElectionBeforeRecoverySkipped
            | Mutation::TermFromHistoryFile
            | Mutation::HistoryOfStandbyBelieved
            | Mutation::WorkerStandsByFlushLsn => Keeper::Server,
        }
    }
}

/// A layer of the tests that can notice a broken rule.
#[cfg(feature = "mutations")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Catcher {
    /// `protocol/tests/scenarios.rs`: a trace is not as it was written.
    Scenarios,
    /// `protocol/tests/model.rs`: a property is violated.
    Model,
    /// `tests/simulation.rs`: the judge ends a run.
    Simulation,
    /// `tests/simulation/storage_model.rs`: the storage alone is not as its model.
    Storage,
}

#[cfg(feature = "mutations")]
impl Mutation {
    /// Who must notice: whoever names what is lost and takes a few seconds for it. Others notice
    /// too, later.
    pub const fn caught_by(self) -> &'static [Catcher] {
        use Catcher::{Model, Scenarios, Simulation, Storage};
        match self {
            Mutation::QuorumOfHalf | Mutation::VoteNotDurable => &[Scenarios, Model, Simulation],
            Mutation::NoLocalHistory
            | Mutation::ElectionBeforeRecoverySkipped
            | Mutation::TermFromHistoryFile => &[Model, Simulation],
            Mutation::CommitWithoutTermStart
            | Mutation::DonorRankedByTerm
            | Mutation::HistoryBeforeTruncation
            | Mutation::StaleAppendAccepted
            | Mutation::WipedMemberVotes
            | Mutation::CommitInOneSet => &[Scenarios, Model],
            Mutation::WorkerStandsByFlushLsn
            | Mutation::JointLeftWithoutData
            | Mutation::JointLeftWithoutOldMajority
            | Mutation::ChangeWithoutStamping
            | Mutation::VotesOfOneSet
            | Mutation::HistoryOfStandbyBelieved
            | Mutation::PromotedBeforeCompletion => &[Model],
            // The shortest trace is long, or there is none: connections keep the order.
            Mutation::LocalHistoryNotClipped
            | Mutation::CommitWithoutElected
            | Mutation::ConfigurationByGeneration => &[Scenarios],
            Mutation::AnswerBeforeFsync => &[Model, Simulation],
            Mutation::FsyncErrorIgnored
            | Mutation::FlushLsnInsideRecord
            | Mutation::FailedSyncBelieved
            | Mutation::DamagedWalTaken => &[Simulation],
            Mutation::TailNotZeroed => &[Model, Storage],
        }
    }
}

#[cfg(feature = "mutations")]
mod switch {
    use core::sync::atomic::{AtomicU8, Ordering};

    use super::Mutation;

    static ON: AtomicU8 = AtomicU8::new(0);

    /// Takes this rule away, for the whole process, and gives all others back.
    pub fn switch_on(mutation: Option<Mutation>) {
        ON.store(
            mutation.map_or(0, |mutation| mutation as u8),
            Ordering::Relaxed,
        );
    }

    pub fn is_on(mutation: Mutation) -> bool {
        ON.load(Ordering::Relaxed) == mutation as u8
    }
}

#[cfg(feature = "mutations")]
pub use switch::{is_on, switch_on};

/// Is this rule taken away?
#[cfg(not(feature = "mutations"))]
#[inline(always)]
pub const fn is_on(_: Mutation) -> bool {
    false
}

//! For each rule a scope in which its loss shows soon.

use safekeeper_protocol::mutation::Mutation;

use super::super::scope::{Begin, Scope, three};
use super::super::world::Faults;
use super::{ends, members, promotion, settled};

/// A scope in which a broken rule shows soon; `None` for a rule that means nothing here: the model's
/// disks keep what they are told to keep, its records are one byte long, its connections keep the
/// order.
pub fn scope_for(mutation: Mutation) -> Option<Scope> {
    let none = Faults::default();
    let worker_crash = Faults {
        worker_crashes: 1,
        ..none
    };
    let crash = Faults {
        safekeeper_crashes: 1,
        ..none
    };
    let wipe = Faults { wipes: 1, ..none };
    let (ends, n_servers, faults) = match mutation {
        Mutation::QuorumOfHalf => (ends([1, 1, 1], 1, 1), 2, none),
        Mutation::CommitWithoutTermStart => return Some(term_start_ignored()),
        Mutation::DonorRankedByTerm => (ends([1, 1, 0], 0, 0), 2, none),
        Mutation::HistoryBeforeTruncation => (ends([1, 1, 2], 1, 1), 1, crash),
        Mutation::VoteNotDurable => (ends([1, 1, 1], 1, 1), 2, crash),
        Mutation::StaleAppendAccepted => (ends([0, 0, 0], 0, 0), 2, none),
        Mutation::AnswerBeforeFsync => (ends([1, 0, 0], 1, 1), 1, crash),
        Mutation::TailNotZeroed => (ends([1, 1, 2], 1, 1), 1, crash),
        Mutation::WipedMemberVotes => (ends([1, 1, 1], 1, 1), 2, wipe),
        Mutation::LocalHistoryNotClipped => return Some(two_reigns_lost()),
        Mutation::NoLocalHistory => (ends([1, 1, 0], 0, 0), 1, none),
        Mutation::ElectionBeforeRecoverySkipped => (ends([1, 1, 0], 0, 0), 1, worker_crash),
        Mutation::TermFromHistoryFile => (ends([1, 1, 1], 1, 1), 1, none),
        Mutation::WorkerStandsByFlushLsn => (ends([1, 1, 0], 1, 1), 1, worker_crash),
        Mutation::ConfigurationByGeneration
        | Mutation::ChangeWithoutStamping
        | Mutation::CommitInOneSet
        | Mutation::JointLeftWithoutOldMajority
        | Mutation::JointLeftWithoutData
        | Mutation::VotesOfOneSet => return Some(members::without(mutation)),
        Mutation::PromotedBeforeCompletion | Mutation::HistoryOfStandbyBelieved => {
            return Some(promotion::without(mutation));
        }
        Mutation::FsyncErrorIgnored
        | Mutation::FlushLsnInsideRecord
        | Mutation::CommitWithoutElected
        | Mutation::FailedSyncBelieved
        | Mutation::DamagedWalTaken => return None,
    };
    Some(Scope {
        name: "a rule is broken",
        begin: settled(three, &[ends]),
        n_servers,
        faults,
        mutation: Some(mutation),
        ..Scope::default()
    })
}

/// A worker that is elected twice while backends insert, and a crash that takes the WAL below both
/// starts.
fn two_reigns_lost() -> Scope {
    Scope {
        name: "the history runs ahead of the log",
        begin: settled(three, &[ends([1, 1, 1], 1, 1)]),
        n_servers: 1,
        faults: Faults {
            worker_crashes: 2,
            server_crashes: 1,
            ..Faults::default()
        },
        entries_max: 3,
        term_max: 5,
        mutation: Some(Mutation::LocalHistoryNotClipped),
        ..Scope::default()
    }
}

/// A newer reign than that of the longer log is on one disk alone, and will be heard of later.
fn term_start_ignored() -> Scope {
    Scope {
        name: "WAL of an older term is committed by counting",
        begin: Begin::DeadReign {
            ends: ends([1, 1, 1], 1, 3),
            start: 1,
        },
        entries_max: 3,
        term_max: 4,
        mutation: Some(Mutation::CommitWithoutTermStart),
        ..Scope::default()
    }
}

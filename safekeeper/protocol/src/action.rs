//! What a state machine asks of its host, and the order it may rely on.
//!
//! **The contract: actions are carried out in the order given, and nothing after a `Persist` or
//! `Truncate` happens before that one is on stable storage.** So a vote is `[Persist, Send]` and
//! reads like the rule it is. If an action fails, the host ends: the daemon its process, the
//! extension its worker. There is no half-carried-out list.
//!
//! An append is only `[Write]`. The host goes on taking what has arrived, flushes once when its
//! input runs dry, and reports how far; *that* yields the response. Many appends, one fsync, one
//! answer, and no internal message in the wire format. Every other message speaks of the log's
//! end, so before handing one over the host flushes what [`Acceptor::needs_flush`] says is open.
//!
//! [`Acceptor::needs_flush`]: crate::Acceptor::needs_flush

use crate::{
    AcceptorMessage, AcceptorState, Configuration, Lsn, ProposerMessage, Read, Term, TermHistory,
    TimelineFile, Tli,
};
use alloc::vec::Vec;

/// What an [`Acceptor`](crate::Acceptor) asks of the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AcceptorAction {
    /// Write the payload of the Append being handled at `begin_lsn` on timeline `tli`.
    Write { tli: Tli, begin_lsn: Lsn },
    /// Replace the control file by this state.
    Persist(AcceptorState),
    /// Cut the log to end at `end_lsn`: zero what lies beyond, remove later segments, flush. The
    /// log goes on at `end_lsn` on timeline `tli`. With an empty log: begin one there.
    Truncate { tli: Tli, end_lsn: Lsn },
    /// Replace the timeline history files by these, and remove those of later timelines.
    ReplaceTimelineFiles(Vec<TimelineFile>),
    /// Publish to consumers: WAL below `commit_lsn` may be sent.
    Commit(Lsn),
    /// Answer on the connection whose message is being handled.
    Send(AcceptorMessage),
    /// Read WAL for a [`ReadResponse`](crate::ReadResponse) and answer with it.
    Read(Read),
}

/// Names one of the proposer's peers: its place in `walproposer.safekeepers`. Not a member id; a
/// peer is an address that is dialled, and only its greeting says which member answers there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerIdx(pub usize);

/// What a [`Proposer`](crate::Proposer) asks of Postgres's side. WAL itself is pulled, by
/// [`Proposer::next_append`](crate::Proposer::next_append), when a connection can take more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProposerAction {
    Send {
        to: PeerIdx,
        message: ProposerMessage,
    },
    /// Close the connection and dial again; `reason` goes to the view and the log.
    Disconnect {
        peer: PeerIdx,
        reason: alloc::string::String,
    },
    /// Compare `begin_lsn..end_lsn` of the local log with the donor's, reading there in `term`;
    /// tell [`Proposer::on_compared`](crate::Proposer::on_compared). What either side has removed
    /// meanwhile is left out; a stretch that neither removed is never skipped.
    Compare {
        donor: PeerIdx,
        term: Term,
        begin_lsn: Lsn,
        end_lsn: Lsn,
    },
    /// Append `begin_lsn..end_lsn` of the donor's log to the local one and fsync it, then tell
    /// [`Proposer::on_completed`](crate::Proposer::on_completed). Before recovery only. Stops at a
    /// record's end if the donor fails. Every record is checked before it counts: a donor whose disk
    /// has decayed does not notice it in a record that is read in parts.
    Complete {
        donor: PeerIdx,
        term: Term,
        begin_lsn: Lsn,
        end_lsn: Lsn,
    },
    /// Replace the local history file, fsync it, then tell
    /// [`Proposer::on_history_persisted`](crate::Proposer::on_history_persisted). The same write
    /// clears the mark of unled WAL, which is led from now on, and records the configuration.
    PersistHistory {
        history: TermHistory,
        configuration: Configuration,
    },
    /// No quorum was ever configured for this cluster: there is nothing to recover. Final for this
    /// proposer; a server that runs configures one.
    NothingToRecover,
    /// Wait until the standby has replayed WAL up to `end_lsn`, where the quorum's log ends, and no
    /// further; then tell [`Proposer::on_replayed`](crate::Proposer::on_replayed). A standby that
    /// has replayed more must not be promoted: it holds what the quorum does not.
    Replay { end_lsn: Lsn },
    /// End recovery, with every timeline up to the one before `tli` taken; then tell
    /// [`Proposer::on_promoted`](crate::Proposer::on_promoted).
    Promote { tli: Tli, switch_lsn: Lsn },
    /// Won: WAL from `start_lsn` on is of this term. Before recovery: the server may start.
    Lead { term: Term, start_lsn: Lsn },
    /// Commits up to here are on a quorum: release them, and tell the members.
    Commit(Lsn),
    /// May not lead, or not yet; the reason is for the log and the view. Asked again by `on_tick`.
    Wait(crate::WaitReason),
    /// Another proposer holds a higher term. Final.
    Deposed { term: Term },
}

//! The consensus core of Safekeeper for PostgreSQL: who may write, and when WAL is committed.
//!
//! One PostgreSQL server, the *proposer*, writes WAL; a few safekeepers, the *acceptors*, store it.
//! The proposer wins a *term* with the votes of a majority, brings every acceptor's log to a prefix
//! of its own, and appends. WAL is committed once a majority of all members has flushed it, in the
//! current term. Whoever holds a term later was voted for by a majority, one of which has that WAL;
//! and from then on the older proposer can get nothing more acknowledged. It is Raft's safety
//! argument with Paxos's division of roles: the leader is never one of the acceptors, and its log
//! is a run of bytes.
//!
//! This crate is that, and nothing else: state machines that take messages and return ordered
//! actions, and the messages' wire format. It has no clock, no randomness, no disk, no socket and
//! no dependency; `no_std` lets the compiler keep it so. Read in this order:
//!
//! - [`term`]: terms, histories, where two logs part;
//! - [`quorum`]: configurations, majorities, the commit position;
//! - [`message`] and [`codec`]: what is said, and its bytes;
//! - [`action`]: the contract between a state machine and its host;
//! - [`acceptor`]: promise, take, acknowledge;
//! - [`election`]: which log may lead;
//! - [`proposer`]: greet, win, stream.
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod acceptor;
pub mod action;
pub mod codec;
pub mod election;
pub mod lsn;
pub mod message;
#[doc(hidden)]
pub mod mutation;
pub mod proposer;
pub mod quorum;
pub mod term;

pub use acceptor::{Acceptor, AcceptorState, Refusal, Session};
pub use action::{AcceptorAction, PeerIdx, ProposerAction};
pub use election::{Claim, Divergence, LocalLog, Standing, Verdict, decide};
pub use lsn::{InvalidLsn, Lsn};
pub use message::*;
pub use proposer::{
    ChangeRefusal, Compared, Completed, LocalWal, PeerAddress, PeerStatus, Proposer,
    ProposerSettings, WaitReason, WonTerm,
};
pub use quorum::{
    Configuration, ConfigurationDefect, ConfigurationVersion, Incarnation, Lineage, Member,
    MemberId, majority,
};
pub use term::{InvalidHistory, Log, Run, Term, TermEntry, TermHistory, Tli, common_end};

//! The consensus core of Safekeeper for PostgreSQL.
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod acceptor;
pub mod action;
pub mod codec;
mod election;
mod lsn;
mod message;

mod quorum;
mod term;

pub use acceptor::{Acceptor, AcceptorState, Refusal, Session};
pub use action::{AcceptorAction, PeerIdx, ProposerAction};
pub use election::{COMPARE_LEN_MAX, Claim, Divergence, LocalLog, Standing, Verdict, decide};
pub use lsn::{InvalidLsn, Lsn};
pub use message::*;
pub use quorum::{
    Configuration, ConfigurationDefect, ConfigurationVersion, Incarnation, Member, MemberId,
    majority,
};
pub use term::{InvalidHistory, Log, Run, Term, TermEntry, TermHistory, Tli, common_end};

//! What proposer and acceptor say to each other.
//!
//! ```text
//!   proposer (Postgres)                     acceptor (safekeeper)
//!      Greeting           ─────────────►
//!                         ◄─────────────    Greeting          who I am, what I hold
//!      Configure          ─────────────►                      only to write the first one, or to change it
//!                         ◄─────────────    ConfigureResponse
//!      VoteRequest        ─────────────►
//!                         ◄─────────────    VoteResponse
//!      Elected            ─────────────►                      truncate to the common point, take the history
//!                         ◄─────────────    AppendResponse
//!      Append             ─────────────►                      again and again, several in flight
//!                         ◄─────────────    AppendResponse    after each flush
//!
//!      Read               ─────────────►                      bytes of the donor's log, conditional on the term
//!                         ◄─────────────    ReadResponse
//! ```
//!
//! A refusal is an answer: every response carries the acceptor's own term and configuration
//! version, and a proposer that reads a higher one there knows all it needs. What breaks the
//! protocol itself (another cluster, a gap in the log, damaged WAL) ends the connection with an
//! error; see [`Refusal`](crate::Refusal).
//!
//! Payload bytes of Append and ReadResponse are not part of these types: they stay in the buffer
//! they arrived in.

use alloc::string::String;
use alloc::vec::Vec;

use crate::mutation::{Mutation, is_on};
use crate::{
    Configuration, ConfigurationVersion, Incarnation, Lsn, Member, MemberId, Term, TermHistory, Tli,
};

/// Random identity of one proposer. Postgres keeps it for as long as its data directory was
/// neither copied nor restored, so that after a crash its own former session is known as its own.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct ProposerId(pub u128);

impl core::fmt::Display for ProposerId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl core::fmt::Debug for ProposerId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}

/// Which Postgres cluster the WAL belongs to, and its shape. Fixed at the first configuration;
/// a proposer of another shape is refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClusterIdentity {
    pub system_id: u64,
    /// Name by which consumers choose the cluster, at most [`ClusterIdentity::NAME_LEN_MAX`] bytes.
    pub name: String,
    /// Postgres's major version: it decides the format of WAL pages.
    pub pg_major: u16,
    /// `wal_segment_size`, in bytes.
    pub segment_size: u32,
}

impl ClusterIdentity {
    /// As Postgres's own names (`NAMEDATALEN` less the terminator).
    pub const NAME_LEN_MAX: usize = 63;
    /// What initdb allows, in bytes, and only powers of two.
    pub const SEGMENT_SIZES: core::ops::RangeInclusive<u32> = 1 << 20..=1 << 30;
}

/// Proposer's first words on a connection. Repeated when it wants to look again.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProposerGreeting {
    pub proposer_id: ProposerId,
    pub cluster: ClusterIdentity,
}

/// Acceptor's answer: all that the look before the leap needs (design §4.3).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AcceptorGreeting {
    pub member_id: MemberId,
    pub incarnation: Incarnation,
    pub term: Term,
    pub configuration: Configuration,
    pub history: TermHistory,
    pub flush_lsn: Lsn,
    pub commit_lsn: Lsn,
    /// Milliseconds since another proposer of the current term was last heard here;
    /// [`AcceptorGreeting::NEVER_HEARD`] if none was since this process started.
    pub rival_heard_ms: u32,
}

impl AcceptorGreeting {
    pub const NEVER_HEARD: u32 = u32::MAX;

    /// It comes from this member, in this incarnation.
    pub fn is_of(&self, member: &Member) -> bool {
        self.member_id == member.id
            && (self.incarnation == member.incarnation || is_on(Mutation::WipedMemberVotes))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VoteRequest {
    pub configuration_version: ConfigurationVersion,
    pub term: Term,
}

/// `granted` is for exactly the term that was asked for on this connection; `term` is the
/// acceptor's own after having answered.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct VoteResponse {
    pub configuration_version: ConfigurationVersion,
    pub granted: bool,
    pub term: Term,
    pub history: TermHistory,
    pub flush_lsn: Lsn,
    pub commit_lsn: Lsn,
}

/// A Postgres timeline history file, as it stands in `pg_wal`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TimelineFile {
    pub tli: Tli,
    pub content: Vec<u8>,
}

impl TimelineFile {
    /// Longest file that travels, in bytes: a switch takes about 60, so a thousand of them.
    pub const LEN_MAX: usize = 64 * 1024;
    /// Most files in one message: those of the newest timeline and its ancestors.
    pub const COUNT_MAX: usize = 1024;
}

/// "I have won this term. Cut your log to `start_lsn`, take this history, and expect my bytes
/// from there." Its last entry is the new reign's, and gives `term_start_lsn`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Elected {
    pub configuration_version: ConfigurationVersion,
    pub term: Term,
    pub history: TermHistory,
    /// Last common point of the new history and the acceptor's log, by the proposer's reckoning;
    /// the acceptor checks it. For an empty log: where the proposer begins to send.
    pub start_lsn: Lsn,
    /// Postgres's timeline history of the elected log, newest file first; empty on timeline 1.
    pub timeline_files: Vec<TimelineFile>,
}

/// WAL of the elected log, or a heartbeat if `len` is 0. The payload follows on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Append {
    pub configuration_version: ConfigurationVersion,
    pub term: Term,
    pub tli: Tli,
    pub begin_lsn: Lsn,
    /// Length of the payload, in bytes, 0..=[`Append::LEN_MAX`].
    pub len: u32,
    pub commit_lsn: Lsn,
    /// No member needs WAL below this from here any more; never above `commit_lsn`.
    pub truncate_lsn: Lsn,
    /// A heartbeat that wants an answer. WAL is always answered, after its flush.
    pub reply_requested: bool,
}

impl Append {
    /// Most WAL in one message, in bytes. Large enough that a bulk load is bound by copying, not
    /// by messages; several may be in flight.
    pub const LEN_MAX: u32 = 1024 * 1024;

    pub fn end_lsn(&self) -> Option<Lsn> {
        self.begin_lsn.checked_add(u64::from(self.len))
    }
}

/// What standbys attached to an acceptor report, for the primary's slot and `remote_apply`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct StandbyFeedback {
    /// Lowest replay position of the attached standbys; [`Lsn::INVALID`] if there is none.
    pub apply_lsn: Lsn,
    /// Oldest transactions they need, with epoch; 0 if none.
    pub xmin: u64,
    pub catalog_xmin: u64,
}

/// "My log is this far on stable storage." Also the answer to Elected, and to a heartbeat that
/// asks for one. If `term` is higher than the proposer's, its reign is over and nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AppendResponse {
    pub configuration_version: ConfigurationVersion,
    pub term: Term,
    /// All bytes below are flushed. For flow control only: it may lie within a record.
    pub write_lsn: Lsn,
    /// End of the last complete, checked record that is flushed.
    pub flush_lsn: Lsn,
    pub commit_lsn: Lsn,
    pub feedback: StandbyFeedback,
}

/// "Hold this configuration." Refused by an acceptor with a higher term; raises a lower one.
/// The cluster's identity travels along because the first Configure creates the cluster there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Configure {
    pub term: Term,
    pub configuration: Configuration,
}

/// The acceptor's term and the configuration it holds now, which is the one sent if it was taken.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ConfigureResponse {
    pub term: Term,
    pub configuration: Configuration,
    pub flush_lsn: Lsn,
}

/// "Give me bytes of your log": to compare with or complete the local log, or to feed a member
/// that needs WAL which has left the primary. Answered only while the acceptor's term is `term`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Read {
    pub configuration_version: ConfigurationVersion,
    pub term: Term,
    pub begin_lsn: Lsn,
    /// In bytes, 1..=[`Append::LEN_MAX`].
    pub len: u32,
}

/// Bytes from `begin_lsn`, as many as were asked for or as there are below `flush_lsn`; none if
/// the term has moved on or the WAL there is no longer kept (then `begin_lsn` < `oldest_lsn`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReadResponse {
    pub term: Term,
    pub begin_lsn: Lsn,
    pub len: u32,
    pub oldest_lsn: Lsn,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ProposerMessage {
    Greeting(ProposerGreeting),
    VoteRequest(VoteRequest),
    Elected(Elected),
    Append(Append),
    Configure(Configure),
    Read(Read),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum AcceptorMessage {
    Greeting(AcceptorGreeting),
    VoteResponse(VoteResponse),
    AppendResponse(AppendResponse),
    ConfigureResponse(ConfigureResponse),
    ReadResponse(ReadResponse),
}

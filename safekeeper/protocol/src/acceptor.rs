//! The safekeeper's half of the protocol: promise, take, acknowledge.
//!
//! ```text
//!   start_lsn  <=  commit_lsn  <=  flush_lsn  <=  write_lsn
//! ```
//!
//! What a crash may take: `write_lsn` falls back to `flush_lsn`, and `commit_lsn` to what was
//! last persisted (it is persisted lazily, and consumers ahead of it wait). `term`, history and
//! configuration never fall back: they are persisted before anything that depends on them is said.
//!
//! Appends are taken only on the connection that delivered this term's Elected. A second
//! connection of the same proposer may greet and read, and takes the reign over with an Elected of
//! its own; the first one is refused from then on.
//!
//! Time arrives as milliseconds of any clock that does not go backwards. Unknown here: disk,
//! sockets, the format of WAL. The host has decoded and checked a payload before it carries out
//! the `Write`, and reports record ends, not byte counts, to [`Acceptor::on_flushed`].

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

use crate::mutation::{Mutation, is_on};
use crate::{
    AcceptorAction, AcceptorGreeting, AcceptorMessage, Append, AppendResponse, ClusterIdentity,
    Configuration, ConfigurationVersion, Configure, ConfigureResponse, Elected, Incarnation, Log,
    Lsn, MemberId, ProposerGreeting, ProposerId, Read, StandbyFeedback, Term, TermHistory,
    VoteRequest, VoteResponse, common_end,
};

/// What an acceptor keeps in its control file, per cluster.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AcceptorState {
    pub cluster: ClusterIdentity,
    /// Highest term voted for or served; no lower one is followed.
    pub term: Term,
    pub configuration: Configuration,
    pub history: TermHistory,
    /// Lags behind the running acceptor's; never ahead of what a quorum has flushed.
    pub commit_lsn: Lsn,
}

impl AcceptorState {
    /// Of a cluster that nobody has configured here.
    pub fn unconfigured(cluster: ClusterIdentity) -> AcceptorState {
        AcceptorState {
            cluster,
            term: Term::NONE,
            configuration: Configuration::default(),
            history: TermHistory::default(),
            commit_lsn: Lsn::INVALID,
        }
    }
}

/// One connection of a proposer. The host makes one after the greeting, with an `id` it never
/// uses again while the process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Session {
    pub id: u64,
    pub proposer_id: ProposerId,
}

/// Why a message can't be answered at all: the connection ends with this text. Ordinary refusals
/// (stale term, older configuration) are answers and not listed here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A proposer of another shape: Postgres version, segment size, name.
    OtherCluster {
        what: &'static str,
        ours: alloc::string::String,
        theirs: alloc::string::String,
    },
    /// Vote or Elected for a cluster nobody has configured here; or a vote of one of which this
    /// safekeeper (by id and incarnation) is not a member.
    NotAMember {
        id: MemberId,
        incarnation: Incarnation,
        configuration: Box<Configuration>,
    },
    /// The first configuration is being written by two proposers with different members.
    OtherConfiguration {
        ours: Box<Configuration>,
        theirs: Box<Configuration>,
    },
    /// Elected whose start is not the last common point by our reckoning.
    OtherCommonPoint { ours: Lsn, theirs: Lsn },
    /// Elected that would cut WAL which is known to be committed.
    WouldCutCommitted { common: Lsn, commit_lsn: Lsn },
    /// Elected whose history does not end with the term it is sent in, or has no entries.
    BadHistory,
    /// Append on a connection that has not delivered this term's Elected, or no longer counts.
    NotElectedHere { term: Term },
    /// Append that does not continue the log.
    Gap { write_lsn: Lsn, begin_lsn: Lsn },
    /// Numbers that contradict themselves.
    Malformed(&'static str),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::OtherCluster { what, ours, theirs } => {
                write!(
                    f,
                    "{what} is {theirs}, but this cluster was configured with {ours}"
                )
            }
            Refusal::NotAMember {
                id,
                incarnation,
                configuration,
            } if configuration.is_none() => write!(
                f,
                "safekeeper {id} (incarnation {incarnation}) has no configuration for this cluster"
            ),
            Refusal::NotAMember {
                id,
                incarnation,
                configuration,
            } => write!(
                f,
                "safekeeper {id} (incarnation {incarnation}) is not a member of configuration {configuration}"
            ),
            Refusal::OtherConfiguration { ours, theirs } => write!(
                f,
                "configuration {theirs} is of another lineage than {ours}, which this safekeeper belongs to"
            ),
            Refusal::OtherCommonPoint { ours, theirs } => {
                write!(f, "start {theirs} is not the last common point {ours}")
            }
            Refusal::WouldCutCommitted { common, commit_lsn } => {
                write!(
                    f,
                    "log would be cut at {common}, below committed WAL up to {commit_lsn}"
                )
            }
            Refusal::BadHistory => f.write_str("term history does not end with the elected term"),
            Refusal::NotElectedHere { term } => {
                write!(
                    f,
                    "WAL of term {term} on a connection that has not delivered its election"
                )
            }
            Refusal::Gap {
                write_lsn,
                begin_lsn,
            } => {
                write!(
                    f,
                    "WAL from {begin_lsn} does not continue the log, which ends at {write_lsn}"
                )
            }
            Refusal::Malformed(what) => f.write_str(what),
        }
    }
}

impl core::error::Error for Refusal {}

/// Where the log goes on under a new reign.
#[derive(Clone, Copy, Debug)]
struct Start {
    lsn: Lsn,
    /// Begin of our log, if none of it is kept.
    discard_from: Option<Lsn>,
}

/// The connection that leads here: it has delivered this term's Elected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Reign {
    session_id: u64,
    /// Highest `commit_lsn` it announced; may be ahead of what is flushed here.
    announced_commit_lsn: Lsn,
}

/// Consensus state of one cluster on one safekeeper.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Acceptor {
    id: MemberId,
    incarnation: Incarnation,
    state: AcceptorState,
    write_lsn: Lsn,
    flush_lsn: Lsn,
    /// Of the running process: never falls, and is at least the persisted one.
    commit_lsn: Lsn,
    truncate_lsn: Lsn,
    /// Something was written since the last flush.
    unflushed: bool,
    reign: Option<Reign>,
    /// Who was last heard in the current term, and when.
    heard: Option<(ProposerId, u64)>,
    feedback: StandbyFeedback,
}

type Handled = Result<(), Refusal>;

impl Acceptor {
    /// From the control file and the end of the log that recovery found on disk: the end of its
    /// last complete record, or [`Lsn::INVALID`] if there is no WAL.
    pub fn new(
        id: MemberId,
        incarnation: Incarnation,
        state: AcceptorState,
        flush_lsn: Lsn,
    ) -> Acceptor {
        let commit_lsn = state.commit_lsn;
        assert!(
            commit_lsn <= flush_lsn,
            "commit_lsn {commit_lsn} in the control file is beyond the log's end {flush_lsn}"
        );
        Acceptor {
            id,
            incarnation,
            state,
            write_lsn: flush_lsn,
            flush_lsn,
            commit_lsn,
            truncate_lsn: Lsn::INVALID,
            unflushed: false,
            reign: None,
            heard: None,
            feedback: StandbyFeedback::default(),
        }
    }

    pub fn on_greeting(
        &self,
        greeting: &ProposerGreeting,
        now_ms: u64,
        out: &mut Vec<AcceptorAction>,
    ) -> Handled {
        self.check_cluster(&greeting.cluster)?;
        let rival_heard_ms = match self.heard {
            Some((rival, at)) if rival != greeting.proposer_id => {
                u32::try_from(now_ms.saturating_sub(at)).unwrap_or(AcceptorGreeting::NEVER_HEARD)
            }
            _ => AcceptorGreeting::NEVER_HEARD,
        };
        out.push(AcceptorAction::Send(AcceptorMessage::Greeting(
            AcceptorGreeting {
                member_id: self.id,
                incarnation: self.incarnation,
                term: self.state.term,
                configuration: self.state.configuration.clone(),
                history: self.state.history.clone(),
                flush_lsn: self.flush_lsn,
                commit_lsn: self.commit_lsn,
                rival_heard_ms,
            },
        )));
        Ok(())
    }

    /// Take a configuration if its version is higher than ours and its term is not lower. One that
    /// does not name us makes us a learner, or tells that we are a member no more: we take WAL under
    /// it, count for nothing and vote for nobody.
    ///
    /// A first configuration binds, even while it is provisional: one of another lineage is refused
    /// for good, because the proposer that wrote ours may have gone on to confirm it elsewhere.
    pub fn on_configure(
        &mut self,
        configure: &Configure,
        out: &mut Vec<AcceptorAction>,
    ) -> Handled {
        let theirs = &configure.configuration;
        if theirs.defect().is_some() || theirs.is_none() || theirs.version.term > configure.term {
            return Err(Refusal::Malformed(
                "a configuration without members, term or order",
            ));
        }
        let ours = &self.state.configuration;
        let contradicts = !ours.is_none()
            && (ours.lineage != theirs.lineage
                || ours.version == theirs.version && !ours.same_members(theirs));
        if contradicts {
            let (ours, theirs) = (Box::new(ours.clone()), Box::new(theirs.clone()));
            return Err(Refusal::OtherConfiguration { ours, theirs });
        }
        if configure.term >= self.state.term && theirs.version >= ours.version {
            self.enter_term(configure.term);
            self.state.configuration = theirs.clone();
            out.push(self.persist());
        }
        out.push(AcceptorAction::Send(AcceptorMessage::ConfigureResponse(
            ConfigureResponse {
                term: self.state.term,
                configuration: self.state.configuration.clone(),
                flush_lsn: self.flush_lsn,
            },
        )));
        Ok(())
    }

    /// One vote a term, durable before it is given. The answer tells where the log ends, and the
    /// candidate will choose its start by that: so the host has flushed it (see [`crate::action`]).
    pub fn on_vote_request(
        &mut self,
        request: &VoteRequest,
        out: &mut Vec<AcceptorAction>,
    ) -> Handled {
        self.assert_flushed();
        // A candidate that goes by a later configuration knows better whether we are a member: ours
        // may be from when we were a learner.
        let ours = &self.state.configuration;
        if ours.is_none() || request.configuration_version <= ours.version {
            self.check_membership()?;
        }
        let granted = request.term > self.state.term
            && request.configuration_version >= self.state.configuration.version;
        if granted {
            self.enter_term(request.term);
            if !is_on(Mutation::VoteNotDurable) {
                out.push(self.persist());
            }
        }
        out.push(AcceptorAction::Send(AcceptorMessage::VoteResponse(
            VoteResponse {
                configuration_version: self.state.configuration.version,
                granted,
                term: self.state.term,
                history: self.state.history.clone(),
                flush_lsn: self.flush_lsn,
                commit_lsn: self.commit_lsn,
            },
        )));
        Ok(())
    }

    /// A proposer won: become a prefix of its log. Truncation comes before the history, so that a
    /// crash in between leaves a shorter log under its true history, never bytes of a dead reign
    /// under the name of another. The term comes before both.
    pub fn on_elected(
        &mut self,
        session: Session,
        elected: &Elected,
        now_ms: u64,
        out: &mut Vec<AcceptorAction>,
    ) -> Handled {
        self.assert_flushed();
        if self.state.configuration.is_none() {
            return Err(self.not_a_member());
        }
        if elected.term < self.state.term
            || elected.configuration_version < self.state.configuration.version
        {
            out.push(self.append_response());
            return Ok(());
        }
        let (Some(first), Some(last)) = (elected.history.first(), elected.history.last()) else {
            return Err(Refusal::BadHistory);
        };
        if last.term != elected.term {
            return Err(Refusal::BadHistory);
        }
        if self.leads(session) && self.state.history == elected.history {
            // Repeated to bring a longer timeline history: the log stays as it is, a record that
            // has arrived in part included.
            out.push(AcceptorAction::ReplaceTimelineFiles(
                elected.timeline_files.clone(),
            ));
            out.push(self.append_response());
            return Ok(());
        }

        let Start {
            lsn: start_lsn,
            discard_from,
        } = self.start_of(elected, first.start_lsn)?;
        if elected.term > self.state.term {
            self.enter_term(elected.term);
            out.push(self.persist());
        }
        if is_on(Mutation::HistoryBeforeTruncation) {
            self.state.history = elected.history.clone();
            out.push(self.persist());
        }
        if let Some(end_lsn) = discard_from.filter(|&begin| begin != start_lsn) {
            let tli = self.state.history.tli_at(end_lsn).unwrap_or(first.tli);
            out.push(AcceptorAction::Truncate { tli, end_lsn });
        }
        let tli = elected.history.tli_at(start_lsn).unwrap_or(first.tli);
        if start_lsn != self.write_lsn || self.flush_lsn != self.write_lsn {
            out.push(AcceptorAction::Truncate {
                tli,
                end_lsn: start_lsn,
            });
        }
        self.write_lsn = start_lsn;
        self.flush_lsn = start_lsn;
        out.push(AcceptorAction::ReplaceTimelineFiles(
            elected.timeline_files.clone(),
        ));
        if self.state.history != elected.history {
            self.state.history = elected.history.clone();
            out.push(self.persist());
        }
        self.reign = Some(Reign {
            session_id: session.id,
            announced_commit_lsn: Lsn::INVALID,
        });
        self.heard = Some((session.proposer_id, now_ms));
        out.push(self.append_response());
        Ok(())
    }

    /// Where the log goes on under `elected`: our own reckoning, checked against the proposer's.
    fn start_of(&self, elected: &Elected, log_start: Lsn) -> Result<Start, Refusal> {
        let ours = Log::new(&self.state.history, self.flush_lsn);
        let theirs = Log::new(&elected.history, Lsn(u64::MAX));
        let common = common_end(&ours, &theirs);
        let start = match (ours.runs().next(), common) {
            (_, Some(common)) => Start {
                lsn: common,
                discard_from: None,
            },
            // An empty log may begin where the proposer still has WAL, later than the others'.
            (None, None) => Start {
                lsn: elected.start_lsn.max(log_start),
                discard_from: None,
            },
            // Nothing of what we hold is of the elected log, which may begin elsewhere.
            (Some(first), None) => Start {
                lsn: log_start,
                discard_from: Some(first.begin),
            },
        };
        let kept = start
            .discard_from
            .map_or(start.lsn, |discard| discard.min(start.lsn));
        if kept < self.commit_lsn {
            let commit_lsn = self.commit_lsn;
            return Err(Refusal::WouldCutCommitted {
                common: kept,
                commit_lsn,
            });
        }
        if elected.start_lsn != start.lsn {
            let (ours, theirs) = (start.lsn, elected.start_lsn);
            return Err(Refusal::OtherCommonPoint { ours, theirs });
        }
        Ok(start)
    }

    /// WAL, or a heartbeat. Yields `Write` and no answer: that comes with [`Self::on_flushed`].
    pub fn on_append(
        &mut self,
        session: Session,
        append: &Append,
        now_ms: u64,
        out: &mut Vec<AcceptorAction>,
    ) -> Handled {
        // A proposer that lost its reign may still be sending. Its bytes must not touch the log,
        // however harmless they look: with our vote we told the new proposer where our log ends.
        // The answer carries our term, and that is all the old one needs to stop. (Raft §5.1)
        if append.term < self.state.term && !is_on(Mutation::StaleAppendAccepted)
            || append.configuration_version < self.state.configuration.version
        {
            out.push(self.append_response());
            return Ok(());
        }
        let Some(end_lsn) = append.end_lsn().filter(|_| append.len <= Append::LEN_MAX) else {
            return Err(Refusal::Malformed("WAL of impossible length or position"));
        };
        let reign = match &mut self.reign {
            Some(reign)
                if reign.session_id == session.id
                    && (append.term == self.state.term || is_on(Mutation::StaleAppendAccepted)) =>
            {
                reign
            }
            _ if is_on(Mutation::CommitWithoutElected) && append.len == 0 => {
                self.commit_lsn = self.commit_lsn.max(append.commit_lsn.min(self.flush_lsn));
                out.push(AcceptorAction::Commit(self.commit_lsn));
                return Ok(());
            }
            _ => return Err(Refusal::NotElectedHere { term: append.term }),
        };
        self.heard = Some((session.proposer_id, now_ms));
        reign.announced_commit_lsn = reign.announced_commit_lsn.max(append.commit_lsn);
        self.truncate_lsn = self.truncate_lsn.max(append.truncate_lsn);
        if append.len > 0 {
            if append.begin_lsn != self.write_lsn {
                let (write_lsn, begin_lsn) = (self.write_lsn, append.begin_lsn);
                return Err(Refusal::Gap {
                    write_lsn,
                    begin_lsn,
                });
            }
            if self.state.history.tli_at(append.begin_lsn) != Some(append.tli) {
                return Err(Refusal::Malformed(
                    "WAL of another timeline than its history names",
                ));
            }
            self.write_lsn = end_lsn;
            self.unflushed = true;
            out.push(AcceptorAction::Write {
                tli: append.tli,
                begin_lsn: append.begin_lsn,
            });
        }
        self.advance_commit(out);
        if append.reply_requested {
            out.push(self.append_response());
        }
        Ok(())
    }

    /// The host has flushed all that was written; `flush_lsn` is the end of the last complete
    /// record in it. The answer is for the leading connection, if there is one. The daemon never
    /// gives a keeper from one connection to another with WAL unflushed, so there it is the one
    /// being handled.
    pub fn on_flushed(&mut self, flush_lsn: Lsn, out: &mut Vec<AcceptorAction>) {
        assert!(
            self.flush_lsn <= flush_lsn && flush_lsn <= self.write_lsn,
            "flushed up to {flush_lsn}, which is not within {}..{}",
            self.flush_lsn,
            self.write_lsn
        );
        self.flush_lsn = flush_lsn;
        self.unflushed = false;
        self.advance_commit(out);
        if self.reign.is_some() {
            out.push(self.append_response());
        }
    }

    /// A connection ended. Its reign here ends with it, its term does not. What it wrote and was
    /// not flushed may stay; the next Elected cuts it at the last record end.
    pub fn on_disconnected(&mut self, session: Session) {
        if self
            .reign
            .is_some_and(|reign| reign.session_id == session.id)
        {
            self.reign = None;
        }
    }

    /// Bytes for a candidate or an elected proposer, only while its term is ours: a term later,
    /// what we hold may be another log. (W4)
    pub fn on_read(&self, read: &Read, out: &mut Vec<AcceptorAction>) -> Handled {
        let end_lsn = read.begin_lsn.checked_add(u64::from(read.len));
        if read.len == 0 || read.len > Append::LEN_MAX || end_lsn.is_none() {
            return Err(Refusal::Malformed("read of impossible length"));
        }
        out.push(AcceptorAction::Read(*read));
        Ok(())
    }

    /// Standbys have reported; travels with the next answers.
    pub fn set_feedback(&mut self, feedback: StandbyFeedback) {
        self.feedback = feedback;
    }

    /// The session whose Elected of the current term was taken, if it is still connected.
    pub fn leads(&self, session: Session) -> bool {
        self.reign
            .is_some_and(|reign| reign.session_id == session.id)
    }

    pub fn has_leader(&self) -> bool {
        self.reign.is_some()
    }

    /// What the control file should hold by now, `commit_lsn` included.
    pub fn state(&self) -> AcceptorState {
        AcceptorState {
            commit_lsn: self.commit_lsn,
            ..self.state.clone()
        }
    }

    pub fn term(&self) -> Term {
        self.state.term
    }

    pub fn history(&self) -> &TermHistory {
        &self.state.history
    }

    pub fn configuration(&self) -> &Configuration {
        &self.state.configuration
    }

    pub fn cluster(&self) -> &ClusterIdentity {
        &self.state.cluster
    }

    pub fn write_lsn(&self) -> Lsn {
        self.write_lsn
    }

    pub fn flush_lsn(&self) -> Lsn {
        self.flush_lsn
    }

    pub fn commit_lsn(&self) -> Lsn {
        self.commit_lsn
    }

    /// No member needs WAL below this from here.
    pub fn truncate_lsn(&self) -> Lsn {
        self.truncate_lsn.min(self.commit_lsn)
    }

    /// WAL was written that is not flushed yet. Before any message but Append and Read the host
    /// flushes it and reports.
    pub fn needs_flush(&self) -> bool {
        self.unflushed
    }

    fn assert_flushed(&self) {
        assert!(
            !self.unflushed,
            "asked for the end of a log that is not flushed"
        );
    }

    fn enter_term(&mut self, term: Term) {
        if term > self.state.term {
            self.state.term = term;
            if !is_on(Mutation::StaleAppendAccepted) {
                self.reign = None;
            }
            self.heard = None;
        }
    }

    fn persist(&self) -> AcceptorAction {
        AcceptorAction::Persist(self.state())
    }

    fn advance_commit(&mut self, out: &mut Vec<AcceptorAction>) {
        let Some(reign) = self.reign else { return };
        let commit_lsn = reign.announced_commit_lsn.min(self.flush_lsn);
        if commit_lsn > self.commit_lsn {
            self.commit_lsn = commit_lsn;
            out.push(AcceptorAction::Commit(commit_lsn));
        }
    }

    fn append_response(&self) -> AcceptorAction {
        let term = match self.state.history.last() {
            Some(last) if is_on(Mutation::StaleAppendAccepted) && self.reign.is_some() => last.term,
            _ => self.state.term,
        };
        AcceptorAction::Send(AcceptorMessage::AppendResponse(AppendResponse {
            configuration_version: self.state.configuration.version,
            term,
            write_lsn: if self.unflushed {
                self.flush_lsn
            } else {
                self.write_lsn
            },
            flush_lsn: self.flush_lsn,
            commit_lsn: self.commit_lsn,
            feedback: self.feedback,
        }))
    }

    fn not_a_member(&self) -> Refusal {
        Refusal::NotAMember {
            id: self.id,
            incarnation: self.incarnation,
            configuration: Box::new(self.state.configuration.clone()),
        }
    }

    fn check_membership(&self) -> Handled {
        let ours = &self.state.configuration;
        match ours.member(self.id, self.incarnation) {
            Some(_) if ours.version != ConfigurationVersion::NONE => Ok(()),
            _ if is_on(Mutation::WipedMemberVotes) => Ok(()),
            _ => Err(self.not_a_member()),
        }
    }

    fn check_cluster(&self, theirs: &ClusterIdentity) -> Handled {
        use alloc::string::ToString;
        let ours = &self.state.cluster;
        let differs = |what, ours: &dyn ToString, theirs: &dyn ToString| {
            Err(Refusal::OtherCluster {
                what,
                ours: ours.to_string(),
                theirs: theirs.to_string(),
            })
        };
        if theirs.system_id != ours.system_id {
            return differs("system identifier", &ours.system_id, &theirs.system_id);
        }
        if theirs.pg_major != ours.pg_major {
            return differs("PostgreSQL version", &ours.pg_major, &theirs.pg_major);
        }
        if theirs.segment_size != ours.segment_size {
            return differs("wal_segment_size", &ours.segment_size, &theirs.segment_size);
        }
        if theirs.name != ours.name {
            return differs("cluster name", &ours.name, &theirs.name);
        }
        Ok(())
    }
}

//! Messages to bytes and back.
//!
//! Each message is the payload of one CopyData message of the Postgres protocol. Numbers are
//! big-endian, as everywhere in that protocol; nothing is platform-sized.
//!
//! ```text
//!   offset  size
//!   0       1     tag: see `TAG_*`
//!   1       1     VERSION
//!   2       ...   fields, in the order of the structs in message.rs
//!
//!   Lsn, Term          8            bool          1, 0 or 1
//!   Tli                4            string        2 length, bytes in UTF-8
//!   ConfigurationVersion   12 = term 8, generation 4
//!   TermHistory        4 count, then 20 each = term 8, tli 4, start_lsn 8; newest tli 4
//!   Member             8 id, 16 incarnation, string host, 2 port
//!   set of members     2 count, then the members
//!   Configuration      lineage 16, version, set, bool joint, set if joint
//!   TimelineFile       4 tli, 4 length, bytes
//!   timeline files     2 count, then the files
//!   WAL                the rest of the message, after Append's or ReadResponse's `len`
//! ```
//!
//! Whatever is wrong with a message is an error and nothing else: every count and length is held
//! against its limit and against the bytes that are there before anything is allocated, and bytes
//! left over at the end are refused too. A version we don't know is refused, not guessed.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::{
    AcceptorGreeting, AcceptorMessage, Append, AppendResponse, ClusterIdentity, Configuration,
    ConfigurationVersion, Configure, ConfigureResponse, Elected, Incarnation, Lineage, Lsn, Member,
    MemberId, ProposerGreeting, ProposerId, ProposerMessage, Read, ReadResponse, StandbyFeedback,
    Term, TermEntry, TermHistory, TimelineFile, Tli, VoteRequest, VoteResponse,
};

/// Version of all messages. Raised when any of them changes.
pub const VERSION: u8 = 1;

const TAG_PROPOSER_GREETING: u8 = b'g';
const TAG_CONFIGURE: u8 = b'c';
const TAG_VOTE_REQUEST: u8 = b'v';
const TAG_ELECTED: u8 = b'e';
const TAG_APPEND: u8 = b'a';
const TAG_READ: u8 = b'r';
const TAG_ACCEPTOR_GREETING: u8 = b'G';
const TAG_CONFIGURE_RESPONSE: u8 = b'C';
const TAG_VOTE_RESPONSE: u8 = b'V';
const TAG_APPEND_RESPONSE: u8 = b'A';
const TAG_READ_RESPONSE: u8 = b'R';

/// Longest message of either direction, in bytes: WAL and its header, or an Elected with a full
/// history and timeline files. A receiver refuses a longer one by its length word alone.
pub const MESSAGE_LEN_MAX: usize = 2 * 1024 * 1024;

/// Bytes of an encoded [`Append`] before its WAL.
pub const APPEND_HEADER_LEN: usize = 2 + 12 + 8 + 4 + 8 + 4 + 8 + 8 + 1;

/// Why bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// A message of a version this build does not speak.
    Version(u8),
    Tag(u8),
    /// Ends before its last field.
    Short,
    /// Goes on after its last field.
    Long,
    /// A count or length beyond its limit.
    Limit(&'static str),
    /// A value no sender may produce.
    Value(&'static str),
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DecodeError::Version(version) => {
                write!(
                    f,
                    "message version {version} is not supported, this build speaks {VERSION}"
                )
            }
            DecodeError::Tag(tag) => write!(f, "unknown message tag 0x{tag:02x}"),
            DecodeError::Short => f.write_str("message ends too early"),
            DecodeError::Long => f.write_str("message goes on after its last field"),
            DecodeError::Limit(what) => write!(f, "message exceeds the limit of {what}"),
            DecodeError::Value(what) => write!(f, "message holds an invalid {what}"),
        }
    }
}

impl core::error::Error for DecodeError {}

type Decoded<T> = Result<T, DecodeError>;

/// Append the encoding of `message` to `out`. The WAL of an Append follows it, by the caller.
pub fn encode_proposer_message(message: &ProposerMessage, out: &mut Vec<u8>) {
    match message {
        ProposerMessage::Greeting(greeting) => {
            begin(out, TAG_PROPOSER_GREETING);
            put_u128(out, greeting.proposer_id.0);
            put_cluster(out, &greeting.cluster);
        }
        ProposerMessage::Configure(configure) => {
            begin(out, TAG_CONFIGURE);
            put_u64(out, configure.term.0);
            put_configuration(out, &configure.configuration);
        }
        ProposerMessage::VoteRequest(request) => {
            begin(out, TAG_VOTE_REQUEST);
            put_version(out, request.configuration_version);
            put_u64(out, request.term.0);
        }
        ProposerMessage::Elected(elected) => {
            begin(out, TAG_ELECTED);
            put_version(out, elected.configuration_version);
            put_u64(out, elected.term.0);
            put_history(out, &elected.history);
            put_u64(out, elected.start_lsn.0);
            put_timeline_files(out, &elected.timeline_files);
        }
        ProposerMessage::Append(append) => encode_append(append, out),
        ProposerMessage::Read(read) => {
            begin(out, TAG_READ);
            put_version(out, read.configuration_version);
            put_u64(out, read.term.0);
            put_u64(out, read.begin_lsn.0);
            put_u32(out, read.len);
        }
    }
}

/// Append the [`APPEND_HEADER_LEN`] bytes that precede the WAL.
pub fn encode_append(append: &Append, out: &mut Vec<u8>) {
    begin(out, TAG_APPEND);
    put_version(out, append.configuration_version);
    put_u64(out, append.term.0);
    put_u32(out, append.tli.0);
    put_u64(out, append.begin_lsn.0);
    put_u32(out, append.len);
    put_u64(out, append.commit_lsn.0);
    put_u64(out, append.truncate_lsn.0);
    out.push(u8::from(append.reply_requested));
}

/// Append the encoding of `message` to `out`. The WAL of a ReadResponse follows it, by the caller.
pub fn encode_acceptor_message(message: &AcceptorMessage, out: &mut Vec<u8>) {
    match message {
        AcceptorMessage::Greeting(greeting) => {
            begin(out, TAG_ACCEPTOR_GREETING);
            put_u64(out, greeting.member_id.0);
            put_u128(out, greeting.incarnation.0);
            put_u64(out, greeting.term.0);
            put_configuration(out, &greeting.configuration);
            put_history(out, &greeting.history);
            put_u64(out, greeting.flush_lsn.0);
            put_u64(out, greeting.commit_lsn.0);
            put_u32(out, greeting.rival_heard_ms);
        }
        AcceptorMessage::ConfigureResponse(response) => {
            begin(out, TAG_CONFIGURE_RESPONSE);
            put_u64(out, response.term.0);
            put_configuration(out, &response.configuration);
            put_u64(out, response.flush_lsn.0);
        }
        AcceptorMessage::VoteResponse(response) => {
            begin(out, TAG_VOTE_RESPONSE);
            put_version(out, response.configuration_version);
            out.push(u8::from(response.granted));
            put_u64(out, response.term.0);
            put_history(out, &response.history);
            put_u64(out, response.flush_lsn.0);
            put_u64(out, response.commit_lsn.0);
        }
        AcceptorMessage::AppendResponse(response) => {
            begin(out, TAG_APPEND_RESPONSE);
            put_version(out, response.configuration_version);
            put_u64(out, response.term.0);
            put_u64(out, response.write_lsn.0);
            put_u64(out, response.flush_lsn.0);
            put_u64(out, response.commit_lsn.0);
            put_u64(out, response.feedback.apply_lsn.0);
            put_u64(out, response.feedback.xmin);
            put_u64(out, response.feedback.catalog_xmin);
        }
        AcceptorMessage::ReadResponse(response) => {
            begin(out, TAG_READ_RESPONSE);
            put_u64(out, response.term.0);
            put_u64(out, response.begin_lsn.0);
            put_u32(out, response.len);
            put_u64(out, response.oldest_lsn.0);
        }
    }
}

/// The message, and its WAL: empty for all but Append.
pub fn decode_proposer_message(bytes: &[u8]) -> Decoded<(ProposerMessage, &[u8])> {
    let mut input = Input(bytes);
    let tag = input.begin()?;
    let message = match tag {
        TAG_PROPOSER_GREETING => ProposerMessage::Greeting(ProposerGreeting {
            proposer_id: ProposerId(input.u128()?),
            cluster: input.cluster()?,
        }),
        TAG_CONFIGURE => ProposerMessage::Configure(Configure {
            term: input.term()?,
            configuration: input.configuration()?,
        }),
        TAG_VOTE_REQUEST => ProposerMessage::VoteRequest(VoteRequest {
            configuration_version: input.version()?,
            term: input.term()?,
        }),
        TAG_ELECTED => ProposerMessage::Elected(Elected {
            configuration_version: input.version()?,
            term: input.term()?,
            history: input.history()?,
            start_lsn: input.lsn()?,
            timeline_files: input.timeline_files()?,
        }),
        TAG_APPEND => {
            let append = input.append()?;
            let wal = input.take(append.len as usize)?;
            input.end()?;
            return Ok((ProposerMessage::Append(append), wal));
        }
        TAG_READ => ProposerMessage::Read(Read {
            configuration_version: input.version()?,
            term: input.term()?,
            begin_lsn: input.lsn()?,
            len: input.u32()?,
        }),
        tag => return Err(DecodeError::Tag(tag)),
    };
    input.end()?;
    Ok((message, &[]))
}

/// The message, and its WAL: empty for all but ReadResponse.
pub fn decode_acceptor_message(bytes: &[u8]) -> Decoded<(AcceptorMessage, &[u8])> {
    let mut input = Input(bytes);
    let tag = input.begin()?;
    let message = match tag {
        TAG_ACCEPTOR_GREETING => AcceptorMessage::Greeting(AcceptorGreeting {
            member_id: MemberId(input.u64()?),
            incarnation: Incarnation(input.u128()?),
            term: input.term()?,
            configuration: input.configuration()?,
            history: input.history()?,
            flush_lsn: input.lsn()?,
            commit_lsn: input.lsn()?,
            rival_heard_ms: input.u32()?,
        }),
        TAG_CONFIGURE_RESPONSE => AcceptorMessage::ConfigureResponse(ConfigureResponse {
            term: input.term()?,
            configuration: input.configuration()?,
            flush_lsn: input.lsn()?,
        }),
        TAG_VOTE_RESPONSE => AcceptorMessage::VoteResponse(VoteResponse {
            configuration_version: input.version()?,
            granted: input.bool()?,
            term: input.term()?,
            history: input.history()?,
            flush_lsn: input.lsn()?,
            commit_lsn: input.lsn()?,
        }),
        TAG_APPEND_RESPONSE => AcceptorMessage::AppendResponse(AppendResponse {
            configuration_version: input.version()?,
            term: input.term()?,
            write_lsn: input.lsn()?,
            flush_lsn: input.lsn()?,
            commit_lsn: input.lsn()?,
            feedback: StandbyFeedback {
                apply_lsn: input.lsn()?,
                xmin: input.u64()?,
                catalog_xmin: input.u64()?,
            },
        }),
        TAG_READ_RESPONSE => {
            let response = ReadResponse {
                term: input.term()?,
                begin_lsn: input.lsn()?,
                len: input.wal_len()?,
                oldest_lsn: input.lsn()?,
            };
            let wal = input.take(response.len as usize)?;
            input.end()?;
            return Ok((AcceptorMessage::ReadResponse(response), wal));
        }
        tag => return Err(DecodeError::Tag(tag)),
    };
    input.end()?;
    Ok((message, &[]))
}

/// Encode a configuration alone, for the control file.
pub fn encode_configuration(configuration: &Configuration, out: &mut Vec<u8>) {
    put_configuration(out, configuration);
}

/// Encode a term history alone, for the control file and the proposer's local history file.
pub fn encode_history(history: &TermHistory, out: &mut Vec<u8>) {
    put_history(out, history);
}

/// Encode a cluster's identity alone, for the control file.
pub fn encode_cluster(cluster: &ClusterIdentity, out: &mut Vec<u8>) {
    put_cluster(out, cluster);
}

/// Bytes being decoded. Public for the control file and the local history file, which hold the
/// same structures in the same encoding.
#[derive(Debug)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    fn begin(&mut self) -> Decoded<u8> {
        let (tag, version) = (self.u8()?, self.u8()?);
        if version != VERSION {
            return Err(DecodeError::Version(version));
        }
        Ok(tag)
    }

    /// Nothing may be left.
    pub fn end(&self) -> Decoded<()> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(DecodeError::Long)
        }
    }

    pub fn take(&mut self, len: usize) -> Decoded<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len).ok_or(DecodeError::Short)?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Decoded<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(DecodeError::Short)?;
        self.0 = rest;
        Ok(*head)
    }

    pub fn u8(&mut self) -> Decoded<u8> {
        self.array().map(u8::from_be_bytes)
    }

    pub fn u16(&mut self) -> Decoded<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub fn u32(&mut self) -> Decoded<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub fn u64(&mut self) -> Decoded<u64> {
        self.array().map(u64::from_be_bytes)
    }

    pub fn u128(&mut self) -> Decoded<u128> {
        self.array().map(u128::from_be_bytes)
    }

    pub fn bool(&mut self) -> Decoded<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(DecodeError::Value("boolean")),
        }
    }

    pub fn lsn(&mut self) -> Decoded<Lsn> {
        self.u64().map(Lsn)
    }

    pub fn term(&mut self) -> Decoded<Term> {
        self.u64().map(Term)
    }

    /// A count of things of at least `size_min` bytes each, held against `max` and against what
    /// is left of the message, so that it may size an allocation.
    fn count(&self, n: usize, max: usize, size_min: usize, what: &'static str) -> Decoded<usize> {
        if n > max {
            return Err(DecodeError::Limit(what));
        }
        if n * size_min > self.0.len() {
            return Err(DecodeError::Short);
        }
        Ok(n)
    }

    fn string(&mut self, len_max: usize, what: &'static str) -> Decoded<String> {
        let len = usize::from(self.u16()?);
        if len > len_max {
            return Err(DecodeError::Limit(what));
        }
        let text = core::str::from_utf8(self.take(len)?).map_err(|_| DecodeError::Value(what))?;
        if text.contains('\0') {
            return Err(DecodeError::Value(what));
        }
        Ok(String::from(text))
    }

    fn wal_len(&mut self) -> Decoded<u32> {
        let len = self.u32()?;
        if len > Append::LEN_MAX {
            return Err(DecodeError::Limit("1 MiB of WAL"));
        }
        Ok(len)
    }

    fn version(&mut self) -> Decoded<ConfigurationVersion> {
        Ok(ConfigurationVersion {
            term: self.term()?,
            generation: self.u32()?,
        })
    }

    pub fn cluster(&mut self) -> Decoded<ClusterIdentity> {
        let cluster = ClusterIdentity {
            system_id: self.u64()?,
            name: self.string(ClusterIdentity::NAME_LEN_MAX, "cluster name")?,
            pg_major: self.u16()?,
            segment_size: self.u32()?,
        };
        // Divided by everywhere.
        if !cluster.segment_size.is_power_of_two()
            || !ClusterIdentity::SEGMENT_SIZES.contains(&cluster.segment_size)
        {
            return Err(DecodeError::Value("WAL segment size"));
        }
        Ok(cluster)
    }

    pub fn history(&mut self) -> Decoded<TermHistory> {
        let n = self.u32()? as usize;
        let n = self.count(n, TermHistory::LEN_MAX, 20, "term history entries")?;
        let mut entries = Vec::with_capacity(n);
        for _ in 0..n {
            entries.push(TermEntry {
                term: self.term()?,
                tli: Tli(self.u32()?),
                start_lsn: self.lsn()?,
            });
        }
        let history = TermHistory::new(entries).map_err(|_| DecodeError::Value("term history"))?;
        let newest_tli = Tli(self.u32()?);
        if newest_tli < history.newest_tli() {
            return Err(DecodeError::Value("newest timeline"));
        }
        Ok(history.with_newest_tli(newest_tli))
    }

    fn members(&mut self) -> Decoded<Vec<Member>> {
        let n = usize::from(self.u16()?);
        let n = self.count(n, Configuration::MEMBERS_MAX, 28, "members")?;
        let mut members = Vec::with_capacity(n);
        for _ in 0..n {
            members.push(Member {
                id: MemberId(self.u64()?),
                incarnation: Incarnation(self.u128()?),
                host: self.string(Member::HOST_LEN_MAX, "host name")?,
                port: self.u16()?,
            });
        }
        Ok(members)
    }

    pub fn configuration(&mut self) -> Decoded<Configuration> {
        Ok(Configuration {
            lineage: Lineage(self.u128()?),
            version: self.version()?,
            members: self.members()?,
            new_members: if self.bool()? {
                Some(self.members()?)
            } else {
                None
            },
        })
    }

    fn timeline_files(&mut self) -> Decoded<Vec<TimelineFile>> {
        let n = usize::from(self.u16()?);
        let n = self.count(n, TimelineFile::COUNT_MAX, 8, "timeline files")?;
        let mut files = Vec::with_capacity(n);
        for _ in 0..n {
            let tli = Tli(self.u32()?);
            let len = self.u32()? as usize;
            if len > TimelineFile::LEN_MAX {
                return Err(DecodeError::Limit("a timeline history file"));
            }
            files.push(TimelineFile {
                tli,
                content: self.take(len)?.to_vec(),
            });
        }
        Ok(files)
    }

    fn append(&mut self) -> Decoded<Append> {
        Ok(Append {
            configuration_version: self.version()?,
            term: self.term()?,
            tli: Tli(self.u32()?),
            begin_lsn: self.lsn()?,
            len: self.wal_len()?,
            commit_lsn: self.lsn()?,
            truncate_lsn: self.lsn()?,
            reply_requested: self.bool()?,
        })
    }
}

fn begin(out: &mut Vec<u8>, tag: u8) {
    out.extend_from_slice(&[tag, VERSION]);
}

fn put_u16(out: &mut Vec<u8>, n: u16) {
    out.extend_from_slice(&n.to_be_bytes());
}

fn put_u32(out: &mut Vec<u8>, n: u32) {
    out.extend_from_slice(&n.to_be_bytes());
}

fn put_u64(out: &mut Vec<u8>, n: u64) {
    out.extend_from_slice(&n.to_be_bytes());
}

fn put_u128(out: &mut Vec<u8>, n: u128) {
    out.extend_from_slice(&n.to_be_bytes());
}

/// Counts and lengths were held to limits far below 65,536 where the value was made.
fn put_count(out: &mut Vec<u8>, n: usize) {
    put_u16(
        out,
        u16::try_from(n).expect("limited to less than 65536 where it was made"),
    );
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    put_count(out, text.len());
    out.extend_from_slice(text.as_bytes());
}

fn put_version(out: &mut Vec<u8>, version: ConfigurationVersion) {
    put_u64(out, version.term.0);
    put_u32(out, version.generation);
}

fn put_cluster(out: &mut Vec<u8>, cluster: &ClusterIdentity) {
    put_u64(out, cluster.system_id);
    put_string(out, &cluster.name);
    put_u16(out, cluster.pg_major);
    put_u32(out, cluster.segment_size);
}

fn put_history(out: &mut Vec<u8>, history: &TermHistory) {
    put_u32(
        out,
        u32::try_from(history.entries().len()).expect("far fewer than 2^32 reigns"),
    );
    for entry in history.entries() {
        put_u64(out, entry.term.0);
        put_u32(out, entry.tli.0);
        put_u64(out, entry.start_lsn.0);
    }
    put_u32(out, history.newest_tli().0);
}

fn put_members(out: &mut Vec<u8>, members: &[Member]) {
    put_count(out, members.len());
    for member in members {
        put_u64(out, member.id.0);
        put_u128(out, member.incarnation.0);
        put_string(out, &member.host);
        put_u16(out, member.port);
    }
}

fn put_configuration(out: &mut Vec<u8>, configuration: &Configuration) {
    put_u128(out, configuration.lineage.0);
    put_version(out, configuration.version);
    put_members(out, &configuration.members);
    out.push(u8::from(configuration.new_members.is_some()));
    if let Some(new_members) = &configuration.new_members {
        put_members(out, new_members);
    }
}

fn put_timeline_files(out: &mut Vec<u8>, files: &[TimelineFile]) {
    put_count(out, files.len());
    for file in files {
        put_u32(out, file.tli.0);
        put_u32(
            out,
            u32::try_from(file.content.len()).expect("at most LEN_MAX"),
        );
        out.extend_from_slice(&file.content);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use core::fmt::Write as _;

    fn version() -> ConfigurationVersion {
        ConfigurationVersion {
            term: Term(2),
            generation: 1,
        }
    }

    fn member(id: u64) -> Member {
        Member {
            id: MemberId(id),
            incarnation: Incarnation(0xAB),
            host: "sk".into(),
            port: 5454,
        }
    }

    fn configuration() -> Configuration {
        let new_members = Some(vec![member(2)]);
        Configuration {
            lineage: Lineage(0xCD),
            version: version(),
            members: vec![member(1)],
            new_members,
        }
    }

    fn history() -> TermHistory {
        let entry = |term, lsn| TermEntry {
            term: Term(term),
            tli: Tli(1),
            start_lsn: Lsn(lsn),
        };
        TermHistory::new(vec![entry(2, 0x100), entry(3, 0x200)]).expect("a history")
    }

    fn proposer_messages() -> Vec<(ProposerMessage, &'static str)> {
        let configuration_version = version();
        vec![
            (
                ProposerMessage::Greeting(ProposerGreeting {
                    proposer_id: ProposerId(7),
                    cluster: ClusterIdentity {
                        system_id: 9,
                        name: "main".into(),
                        pg_major: 15,
                        segment_size: 1 << 24,
                    },
                }),
                "6701 00000000000000000000000000000007 0000000000000009 00046d61696e 000f 01000000",
            ),
            (
                ProposerMessage::Configure(Configure {
                    term: Term(2),
                    configuration: configuration(),
                }),
                "6301 0000000000000002 000000000000000000000000000000cd 000000000000000200000001 \
                 0001 0000000000000001 000000000000000000000000000000ab 0002736b 154e \
                 01 0001 0000000000000002 000000000000000000000000000000ab 0002736b 154e",
            ),
            (
                ProposerMessage::VoteRequest(VoteRequest {
                    configuration_version,
                    term: Term(3),
                }),
                "7601 000000000000000200000001 0000000000000003",
            ),
            (
                ProposerMessage::Elected(Elected {
                    configuration_version,
                    term: Term(3),
                    history: history(),
                    start_lsn: Lsn(0x1F0),
                    timeline_files: vec![TimelineFile {
                        tli: Tli(2),
                        content: b"1\t0".to_vec(),
                    }],
                }),
                "6501 000000000000000200000001 0000000000000003 \
                 00000002 0000000000000002 00000001 0000000000000100 \
                 0000000000000003 00000001 0000000000000200 \
                 00000001 00000000000001f0 0001 00000002 00000003 310930",
            ),
            (
                ProposerMessage::Append(Append {
                    configuration_version,
                    term: Term(3),
                    tli: Tli(1),
                    begin_lsn: Lsn(0x200),
                    len: 0,
                    commit_lsn: Lsn(0x1F0),
                    truncate_lsn: Lsn(0x100),
                    reply_requested: true,
                }),
                "6101 000000000000000200000001 0000000000000003 00000001 0000000000000200 \
                 00000000 00000000000001f0 0000000000000100 01",
            ),
            (
                ProposerMessage::Read(Read {
                    configuration_version,
                    term: Term(3),
                    begin_lsn: Lsn(0x100),
                    len: 4096,
                }),
                "7201 000000000000000200000001 0000000000000003 0000000000000100 00001000",
            ),
        ]
    }

    fn acceptor_messages() -> Vec<(AcceptorMessage, &'static str)> {
        vec![
            (
                AcceptorMessage::Greeting(AcceptorGreeting {
                    member_id: MemberId(1),
                    incarnation: Incarnation(0xAB),
                    term: Term(3),
                    configuration: Configuration {
                        new_members: None,
                        ..configuration()
                    },
                    history: history().with_newest_tli(Tli(4)),
                    flush_lsn: Lsn(0x210),
                    commit_lsn: Lsn(0x1F0),
                    rival_heard_ms: 5,
                }),
                "4701 0000000000000001 000000000000000000000000000000ab 0000000000000003 \
                 000000000000000000000000000000cd 000000000000000200000001 \
                 0001 0000000000000001 000000000000000000000000000000ab 0002736b 154e 00 \
                 00000002 0000000000000002 00000001 0000000000000100 \
                 0000000000000003 00000001 0000000000000200 00000004 \
                 0000000000000210 00000000000001f0 00000005",
            ),
            (
                AcceptorMessage::ConfigureResponse(ConfigureResponse {
                    term: Term(2),
                    configuration: Configuration {
                        new_members: None,
                        ..configuration()
                    },
                    flush_lsn: Lsn(0x210),
                }),
                "4301 0000000000000002 000000000000000000000000000000cd 000000000000000200000001 \
                 0001 0000000000000001 000000000000000000000000000000ab 0002736b 154e 00 \
                 0000000000000210",
            ),
            (
                AcceptorMessage::VoteResponse(VoteResponse {
                    configuration_version: version(),
                    granted: true,
                    term: Term(3),
                    history: TermHistory::default(),
                    flush_lsn: Lsn(0x210),
                    commit_lsn: Lsn(0x1F0),
                }),
                "5601 000000000000000200000001 01 0000000000000003 00000000 00000000 \
                 0000000000000210 00000000000001f0",
            ),
            (
                AcceptorMessage::AppendResponse(AppendResponse {
                    configuration_version: version(),
                    term: Term(3),
                    write_lsn: Lsn(0x220),
                    flush_lsn: Lsn(0x210),
                    commit_lsn: Lsn(0x1F0),
                    feedback: StandbyFeedback {
                        apply_lsn: Lsn(0x1E0),
                        xmin: 4,
                        catalog_xmin: 5,
                    },
                }),
                "4101 000000000000000200000001 0000000000000003 0000000000000220 \
                 0000000000000210 00000000000001f0 00000000000001e0 0000000000000004 \
                 0000000000000005",
            ),
            (
                AcceptorMessage::ReadResponse(ReadResponse {
                    term: Term(3),
                    begin_lsn: Lsn(0x100),
                    len: 0,
                    oldest_lsn: Lsn(0x80),
                }),
                "5201 0000000000000003 0000000000000100 00000000 0000000000000080",
            ),
        ]
    }

    fn to_hex(bytes: &[u8]) -> String {
        bytes.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }

    fn packed(golden: &str) -> String {
        golden.split_whitespace().collect()
    }

    /// Bytes of every message of ours, for the tests that damage them.
    fn encodings() -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        for (message, _) in proposer_messages() {
            let mut bytes = Vec::new();
            encode_proposer_message(&message, &mut bytes);
            all.push(bytes);
        }
        for (message, _) in acceptor_messages() {
            let mut bytes = Vec::new();
            encode_acceptor_message(&message, &mut bytes);
            all.push(bytes);
        }
        all
    }

    /// Decodes in the direction that its tag belongs to.
    fn decode(bytes: &[u8]) -> Decoded<()> {
        match decode_proposer_message(bytes) {
            Err(DecodeError::Tag(_)) => decode_acceptor_message(bytes).map(|_| ()),
            other => other.map(|_| ()),
        }
    }

    #[test]
    fn bytes_are_golden() {
        for (message, golden) in proposer_messages() {
            let mut bytes = Vec::new();
            encode_proposer_message(&message, &mut bytes);
            assert_eq!(to_hex(&bytes), packed(golden), "{message:?}");
            assert_eq!(decode_proposer_message(&bytes), Ok((message, &[][..])));
        }
        for (message, golden) in acceptor_messages() {
            let mut bytes = Vec::new();
            encode_acceptor_message(&message, &mut bytes);
            assert_eq!(to_hex(&bytes), packed(golden), "{message:?}");
            assert_eq!(decode_acceptor_message(&bytes), Ok((message, &[][..])));
        }
    }

    #[test]
    fn wal_stays_where_it_arrived() {
        let (ProposerMessage::Append(append), _) = proposer_messages().swap_remove(4) else {
            panic!("the fifth message is Append");
        };
        let append = Append { len: 3, ..append };
        let mut bytes = Vec::new();
        encode_append(&append, &mut bytes);
        assert_eq!(bytes.len(), APPEND_HEADER_LEN);
        bytes.extend_from_slice(b"wal");
        let decoded = decode_proposer_message(&bytes);
        assert_eq!(decoded, Ok((ProposerMessage::Append(append), &b"wal"[..])));
        bytes.push(b'!');
        assert_eq!(decode_proposer_message(&bytes), Err(DecodeError::Long));
    }

    #[test]
    fn every_shortened_or_lengthened_message_is_refused() {
        for bytes in encodings() {
            for len in 0..bytes.len() {
                assert!(
                    decode(&bytes[..len]).is_err(),
                    "{} cut to {len}",
                    to_hex(&bytes)
                );
            }
            let mut longer = bytes.clone();
            longer.push(0);
            assert_eq!(
                decode(&longer),
                Err(DecodeError::Long),
                "{}",
                to_hex(&bytes)
            );
        }
    }

    #[test]
    fn an_unknown_version_or_tag_is_refused() {
        for mut bytes in encodings() {
            bytes[1] = VERSION + 1;
            assert_eq!(decode(&bytes), Err(DecodeError::Version(VERSION + 1)));
        }
        assert_eq!(decode(&[b'?', VERSION]), Err(DecodeError::Tag(b'?')));
    }

    #[test]
    fn counts_are_held_to_limits_before_they_size_anything() {
        let mut elected = Vec::new();
        encode_proposer_message(&proposer_messages()[3].0, &mut elected);
        let count_at = 2 + 12 + 8;
        elected[count_at..count_at + 4].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(
            decode(&elected),
            Err(DecodeError::Limit("term history entries"))
        );
        elected[count_at..count_at + 4].copy_from_slice(&4096u32.to_be_bytes());
        assert_eq!(decode(&elected), Err(DecodeError::Short));

        let mut append = Vec::new();
        encode_proposer_message(&proposer_messages()[4].0, &mut append);
        let len_at = 2 + 12 + 8 + 4 + 8;
        append[len_at..len_at + 4].copy_from_slice(&(Append::LEN_MAX + 1).to_be_bytes());
        assert_eq!(decode(&append), Err(DecodeError::Limit("1 MiB of WAL")));
    }

    #[test]
    fn damaged_bytes_never_panic_and_a_history_that_falls_is_refused() {
        // xorshift, fixed seed: each message with one to three bytes overwritten.
        let mut random = 0x9E37_79B9_7F4A_7C15_u64;
        let mut next = move |below: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            usize::try_from(random % below as u64).expect("below a usize")
        };
        for bytes in encodings() {
            for _ in 0..2000 {
                let mut damaged = bytes.clone();
                for _ in 0..=next(3) {
                    let at = next(damaged.len());
                    damaged[at] = u8::try_from(next(256)).expect("below 256");
                }
                let _ = decode(&damaged);
            }
        }
        let mut elected = Vec::new();
        encode_proposer_message(&proposer_messages()[3].0, &mut elected);
        let second_term_at = 2 + 12 + 8 + 4 + 20;
        elected[second_term_at + 7] = 1;
        assert_eq!(decode(&elected), Err(DecodeError::Value("term history")));
    }
}

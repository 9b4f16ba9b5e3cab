//! The protocol's codec, in both directions: what a safekeeper reads of a proposer, and the reverse.
//!
//! The encoding is canonical, so bytes that decode must be the bytes that the message encodes to.

use allocation_counter::measure;
use safekeeper_protocol::codec::{
    decode_acceptor_message, decode_proposer_message, encode_acceptor_message,
    encode_proposer_message,
};
use safekeeper_protocol::{
    AcceptorGreeting, AcceptorMessage, Append, AppendResponse, ClusterIdentity, Configuration,
    ConfigurationVersion, Configure, ConfigureResponse, Elected, Incarnation, Lineage, Lsn, Member,
    MemberId, ProposerGreeting, ProposerId, ProposerMessage, Read, ReadResponse, StandbyFeedback,
    Term, TermEntry, TermHistory, TimelineFile, Tli, VoteRequest, VoteResponse,
};

/// Decoding takes at most so many times the bytes of the message, even if it is refused in the end.
/// The list of timeline files costs four times what is there for it, an entry being at least 8
/// bytes on the wire and 32 in memory; and then come the contents. All else grows by less.
const HEAP_PER_BYTE: u64 = 5;

pub fn check(input: &[u8]) {
    let heap_max = HEAP_PER_BYTE * input.len() as u64;

    let mut decoded = None;
    let heap = measure(|| decoded = Some(decode_proposer_message(input))).bytes_max;
    assert!(heap <= heap_max, "{heap} bytes on the heap");
    if let Some(Ok((message, wal))) = decoded {
        let mut again = Vec::new();
        encode_proposer_message(&message, &mut again);
        again.extend_from_slice(wal);
        assert_eq!(again, input, "{message:?}");
    }

    let mut decoded = None;
    let heap = measure(|| decoded = Some(decode_acceptor_message(input))).bytes_max;
    assert!(heap <= heap_max, "{heap} bytes on the heap");
    if let Some(Ok((message, wal))) = decoded {
        let mut again = Vec::new();
        encode_acceptor_message(&message, &mut again);
        again.extend_from_slice(wal);
        assert_eq!(again, input, "{message:?}");
    }
}

/// One of each kind of message, two of those that carry WAL.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for message in proposer_messages() {
        let mut bytes = Vec::new();
        encode_proposer_message(&message, &mut bytes);
        if let ProposerMessage::Append(append) = message {
            bytes.extend(vec![0xD1; append.len as usize]);
        }
        seeds.push(bytes);
    }
    for message in acceptor_messages() {
        let mut bytes = Vec::new();
        encode_acceptor_message(&message, &mut bytes);
        if let AcceptorMessage::ReadResponse(response) = message {
            bytes.extend(vec![0xD1; response.len as usize]);
        }
        seeds.push(bytes);
    }
    seeds
}

fn version() -> ConfigurationVersion {
    ConfigurationVersion {
        term: Term(2),
        generation: 1,
    }
}

fn cluster() -> ClusterIdentity {
    ClusterIdentity {
        system_id: 7_000_000_000_000_000_001,
        name: "main".to_owned(),
        pg_major: 15,
        segment_size: 16 << 20,
    }
}

fn configuration() -> Configuration {
    let member = |id| Member {
        id: MemberId(id),
        incarnation: Incarnation(u128::from(id) << 90),
        host: format!("sk{id}"),
        port: 5454,
    };
    Configuration {
        lineage: Lineage(0xCD),
        version: version(),
        members: (1..=3).map(member).collect(),
        new_members: Some((2..=4).map(member).collect()),
    }
}

fn history() -> TermHistory {
    let entry = |term: u64| TermEntry {
        term: Term(term),
        tli: Tli(1),
        start_lsn: Lsn(term << 20),
    };
    TermHistory::new((1..=3).map(entry).collect()).expect("terms and positions grow")
}

fn proposer_messages() -> Vec<ProposerMessage> {
    let append = |len| {
        ProposerMessage::Append(Append {
            configuration_version: version(),
            term: Term(3),
            tli: Tli(1),
            begin_lsn: Lsn(3 << 20),
            len,
            commit_lsn: Lsn(3 << 20),
            truncate_lsn: Lsn(1 << 20),
            reply_requested: len == 0,
        })
    };
    let file = |tli: u32, content: &str| TimelineFile {
        tli: Tli(tli),
        content: content.as_bytes().to_vec(),
    };
    vec![
        ProposerMessage::Greeting(ProposerGreeting {
            proposer_id: ProposerId(0x1234 << 100),
            cluster: cluster(),
        }),
        ProposerMessage::Configure(Configure {
            term: Term(2),
            configuration: configuration(),
        }),
        ProposerMessage::VoteRequest(VoteRequest {
            configuration_version: version(),
            term: Term(3),
        }),
        ProposerMessage::Elected(Elected {
            configuration_version: version(),
            term: Term(3),
            history: history(),
            start_lsn: Lsn(2 << 20),
            timeline_files: vec![file(2, "1\t0/200000\tx\n"), file(3, "")],
        }),
        append(0),
        append(24),
        ProposerMessage::Read(Read {
            configuration_version: version(),
            term: Term(3),
            begin_lsn: Lsn(2 << 20),
            len: 1 << 20,
        }),
    ]
}

fn acceptor_messages() -> Vec<AcceptorMessage> {
    let read_response = |len| {
        AcceptorMessage::ReadResponse(ReadResponse {
            term: Term(3),
            begin_lsn: Lsn(2 << 20),
            len,
            oldest_lsn: Lsn(1 << 20),
        })
    };
    vec![
        AcceptorMessage::Greeting(AcceptorGreeting {
            member_id: MemberId(1),
            incarnation: Incarnation(1 << 90),
            term: Term(3),
            configuration: configuration(),
            history: history(),
            flush_lsn: Lsn(3 << 20),
            commit_lsn: Lsn(2 << 20),
            rival_heard_ms: AcceptorGreeting::NEVER_HEARD,
        }),
        AcceptorMessage::ConfigureResponse(ConfigureResponse {
            term: Term(2),
            configuration: configuration(),
            flush_lsn: Lsn(3 << 20),
        }),
        AcceptorMessage::VoteResponse(VoteResponse {
            configuration_version: version(),
            granted: true,
            term: Term(3),
            history: history(),
            flush_lsn: Lsn(3 << 20),
            commit_lsn: Lsn(2 << 20),
        }),
        AcceptorMessage::AppendResponse(AppendResponse {
            configuration_version: version(),
            term: Term(3),
            write_lsn: Lsn(3 << 20),
            flush_lsn: Lsn(3 << 20),
            commit_lsn: Lsn(2 << 20),
            feedback: StandbyFeedback {
                apply_lsn: Lsn(1 << 20),
                xmin: 700,
                catalog_xmin: 0,
            },
        }),
        read_response(0),
        read_response(24),
    ]
}

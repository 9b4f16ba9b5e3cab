//! A connection as the daemon reads it: startup packets, commands, then what the command leads to.
//!
//! The first byte of the input is the size of the pieces in which the rest arrives. It must be
//! understood the same in pieces as in one. And a peer that has only claimed a length costs the
//! buffer that every connection has; not before it pushes WAL does that grow, to one message.
//!
//! The harness follows `connection.rs` from frame to frame but answers nothing. What travels inside
//! the frames of a proposer is the business of `protocol_messages`.

use std::fmt::Debug;

use allocation_counter::{measure, opt_out};
use safekeeper::connection::command_of;
use safekeeper::replication_command::ReplicationCommand;
use safekeeper_protocol::codec::MESSAGE_LEN_MAX;
use safekeeper_wire::pgwire::{ErrorReport, Filled, Input, LEN_MAX_UNAUTHENTICATED, PROTOCOL_3_0};
use safekeeper_wire::standby_message::{STANDBY_MESSAGE_LEN_MAX, decode_standby_message};
use safekeeper_wire::startup::{Opening, next_opening};

/// The buffer of every connection, 128 KiB, and as much again for parsed text and for an error,
/// which may quote it.
const HEAP_MAX: u64 = 256 * 1024;

/// Where WAL is pushed the buffer grows to the length that one frame claims, twice that while it
/// is being moved.
const HEAP_MAX_PUSHING: u64 = HEAP_MAX + 3 * MESSAGE_LEN_MAX as u64;

pub fn check(input: &[u8]) {
    let Some((&piece, stream)) = input.split_first() else {
        return;
    };
    let whole = converse(stream, usize::MAX);
    let in_pieces = converse(stream, 1 + usize::from(piece));
    assert_eq!(whole, in_pieces, "in pieces of {}", 1 + usize::from(piece));
}

/// What the next bytes mean.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Opening,
    Command,
    /// WAL is streamed to a consumer, which says how far it is.
    Streaming,
    /// A proposer pushes WAL.
    Pushing,
    /// Nothing more is read.
    Closed,
}

/// All that was understood of `stream`, in order, as text.
fn converse(stream: &[u8], piece: usize) -> Vec<String> {
    let mut said = Vec::new();
    let mut note = |what: &dyn Debug| opt_out(|| said.push(format!("{what:?}")));
    let mut phase = Phase::Opening;
    let mut has_pushed = false;
    let heap = measure(|| {
        let mut input = Input::default();
        let mut rest = stream;
        while phase != Phase::Closed {
            match step(&mut input, phase, &mut note) {
                Ok(Some(next)) => phase = next,
                Ok(None) => {
                    let filled = input.fill_with(|room| {
                        assert!(!room.is_empty(), "no room: it would look like the end");
                        let len = room.len().min(piece).min(rest.len());
                        room[..len].copy_from_slice(&rest[..len]);
                        rest = &rest[len..];
                        Ok(len)
                    });
                    if matches!(filled, Ok(Filled::Closed)) {
                        phase = Phase::Closed;
                    }
                }
                Err(report) => {
                    note(&report);
                    phase = Phase::Closed;
                }
            }
            has_pushed |= phase == Phase::Pushing;
        }
    })
    .bytes_max;
    let heap_max = if has_pushed {
        HEAP_MAX_PUSHING
    } else {
        HEAP_MAX
    };
    assert!(heap <= heap_max, "{heap} bytes on the heap");
    said
}

/// Reads one packet or frame, if it is here, and says what is expected after it.
fn step(
    input: &mut Input,
    phase: Phase,
    note: &mut impl FnMut(&dyn Debug),
) -> Result<Option<Phase>, ErrorReport> {
    let limit = match phase {
        Phase::Opening => {
            let opening = next_opening(input)?;
            if let Some(opening) = &opening {
                note(opening);
            }
            return Ok(opening.map(|opening| match opening {
                Opening::Tls | Opening::Gssapi => Phase::Opening,
                Opening::Cancel => Phase::Closed,
                Opening::Startup(_) => Phase::Command,
            }));
        }
        Phase::Command => LEN_MAX_UNAUTHENTICATED,
        Phase::Streaming => STANDBY_MESSAGE_LEN_MAX,
        Phase::Pushing => 4 + MESSAGE_LEN_MAX,
        Phase::Closed => return Ok(None),
    };
    let has_frame = input.has_frame(limit)?;
    let Some(frame) = input.next_frame(limit)? else {
        assert!(!has_frame);
        return Ok(None);
    };
    assert!(has_frame && frame.body.len() + 4 <= limit);
    note(&frame);
    Ok(Some(match (phase, frame.tag) {
        (_, b'X') => Phase::Closed,
        (Phase::Command, b'Q') => {
            let command = command_of(frame.body);
            note(&command);
            match command {
                Ok(ReplicationCommand::StartReplication { .. }) => Phase::Streaming,
                Ok(ReplicationCommand::StartWalPush) => Phase::Pushing,
                _ => Phase::Command,
            }
        }
        (Phase::Streaming, b'd') => {
            note(&decode_standby_message(frame.body)?);
            Phase::Streaming
        }
        (Phase::Streaming, b'c') => Phase::Command,
        (Phase::Pushing, b'c') => Phase::Closed,
        (phase, _) => phase,
    }))
}

/// Sessions of a standby, of a proposer, of psql.
pub fn seeds() -> Vec<Vec<u8>> {
    let startup = startup_packet(&[
        ("user", "rep"),
        ("replication", "true"),
        ("options", "-c cluster=main"),
        ("_pq_.x", "1"),
    ]);
    let ssl_request = [0, 0, 0, 8, 0x04, 0xD2, 0x16, 0x2F].to_vec();
    let status = [&b"r"[..], &[0; 24], &[1; 9]].concat();
    let feedback = [&b"h"[..], &[7; 24]].concat();
    let query = |text: &str| frame(b'Q', format!("{text}\0").as_bytes());
    let session =
        |messages: &[Vec<u8>]| [&[3][..], &ssl_request, &startup, &messages.concat()].concat();
    let standby = session(&[
        query("IDENTIFY_SYSTEM"),
        query("TIMELINE_HISTORY 2"),
        query("START_REPLICATION SLOT \"s\"\"b\" PHYSICAL 0/3000000 TIMELINE 1"),
        frame(b'd', &status),
        frame(b'd', &feedback),
        frame(b'c', b""),
        frame(b'X', b""),
    ]);
    let proposer = session(&[
        query("START_WAL_PUSH"),
        frame(b'd', &[0x61; 70]),
        frame(b'c', b""),
    ]);
    let receiver = session(&[
        query("SHOW wal_segment_size;"),
        query("READ_REPLICATION_SLOT \"s\""),
        query("CREATE_REPLICATION_SLOT s PHYSICAL (RESERVE_WAL)"),
        query("DROP_REPLICATION_SLOT s WAIT"),
        query(" ; "),
        frame(b'P', b"\0"),
        frame(b'S', b""),
        frame(b'X', b""),
    ]);
    let cancel = [0, 0, 0, 0, 8, 0x04, 0xD2, 0x16, 0x2E].to_vec();
    vec![standby, proposer, receiver, cancel]
}

fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
    [&[tag][..], &len_word(4 + body.len()), body].concat()
}

fn startup_packet(parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut body = PROTOCOL_3_0.to_be_bytes().to_vec();
    for (name, value) in parameters {
        body.extend(format!("{name}\0{value}\0").bytes());
    }
    body.push(0);
    [&len_word(4 + body.len())[..], &body].concat()
}

fn len_word(len: usize) -> [u8; 4] {
    u32::try_from(len).expect("seeds are short").to_be_bytes()
}

//! The daemon's own small files: control file and identity.
//!
//! The input is tried as it is, and as the body of a file with a right head, length and checksum:
//! what a safekeeper with a broken memory could have written, and what no search would find. What
//! decodes must encode to the same bytes; and one flipped bit, anywhere, must be noticed.

use std::path::Path;

use allocation_counter::measure;
use safekeeper::slot_file::SlotData;
use safekeeper::{control_file, identity, slot_file};
use safekeeper_protocol::{
    AcceptorState, ClusterIdentity, Configuration, ConfigurationVersion, Incarnation, Lineage, Lsn,
    Member, MemberId, Term, TermEntry, TermHistory, Tli,
};

/// Head and total length of a control file, as control_file.rs has them.
const CONTROL_HEAD: &[u8] = b"SKCTRL\r\n\0\0\0\x01";
const CONTROL_LEN: usize = 128 * 1024;
const SLOTS_HEAD: &[u8] = b"SKSLOTS\n\0\0\0\x01";
const IDENTITY_HEAD: &[u8] = b"SKIDENT\n\0\0\0\x01";

/// What is decoded takes at most so many times the bytes of its file, errors with their texts
/// included.
const HEAP_PER_BYTE: u64 = 4;
const HEAP_OF_ERROR: u64 = 1024;

pub fn check(input: &[u8]) {
    check_control_file(input);
    check_control_file(&file_with(CONTROL_HEAD, input, CONTROL_LEN));
    check_slot_file(input);
    check_slot_file(&file_with(SLOTS_HEAD, input, slot_file::FILE_LEN));
    check_identity(input);
    let short = &input[..input.len().min(24)];
    check_identity(&with_checksum([IDENTITY_HEAD, short].concat()));
}

fn check_control_file(bytes: &[u8]) {
    let path = Path::new("control");
    let mut decoded = None;
    let heap = measure(|| decoded = Some(control_file::decode(bytes, path))).bytes_max;
    assert!(heap <= HEAP_PER_BYTE * bytes.len() as u64 + HEAP_OF_ERROR);
    if let Some(Ok(state)) = decoded {
        assert!(control_file::encode(&state) == bytes, "{state:?}");
        let mut flipped = bytes.to_vec();
        flip_some_bit(&mut flipped);
        assert!(control_file::decode(&flipped, path).is_err());
    }
}

fn check_slot_file(bytes: &[u8]) {
    let path = Path::new("slots");
    let mut decoded = None;
    let heap = measure(|| decoded = Some(slot_file::decode(bytes, path))).bytes_max;
    assert!(heap <= HEAP_PER_BYTE * bytes.len() as u64 + HEAP_OF_ERROR);
    if let Some(Ok(slots)) = decoded {
        assert!(slot_file::encode(&slots) == bytes, "{slots:?}");
        let mut flipped = bytes.to_vec();
        flip_some_bit(&mut flipped);
        assert!(slot_file::decode(&flipped, path).is_err());
    }
}

fn check_identity(bytes: &[u8]) {
    let dir = Path::new("data");
    if let Ok(identity) = identity::decode(bytes, dir) {
        assert_eq!(identity::encode(&identity), bytes);
        let mut flipped = bytes.to_vec();
        flip_some_bit(&mut flipped);
        assert!(identity::decode(&flipped, dir).is_err());
    }
}

/// Which one depends on all of the bytes, so that in the long run it is every one.
fn flip_some_bit(bytes: &mut [u8]) {
    let digest = crc32c::crc32c_append(1, bytes) as usize;
    let bit = digest % (bytes.len() * 8);
    bytes[bit / 8] ^= 1 << (bit % 8);
}

/// A file of `len` bytes whose body is `body`, as far as it has room for it.
fn file_with(head: &[u8], body: &[u8], len: usize) -> Vec<u8> {
    let body = &body[..body.len().min(len - 20)];
    let mut bytes = head.to_vec();
    bytes.extend((body.len() as u32).to_be_bytes());
    bytes.extend(body);
    bytes.resize(len - 4, 0);
    with_checksum(bytes)
}

fn with_checksum(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.extend(crc32c::crc32c(&bytes).to_be_bytes());
    bytes
}

/// Bodies of control files, of slot files and of an identity.
pub fn seeds() -> Vec<Vec<u8>> {
    let joint = AcceptorState {
        configuration: configuration(Some(2)),
        ..state(3)
    };
    let body_of = |bytes: &[u8]| {
        let len = u32::from_be_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
        bytes[16..16 + len as usize].to_vec()
    };
    let body = |state: &AcceptorState| body_of(&control_file::encode(state));
    let slots = [("a", 0), ("standby_1", 0x123_4568)].map(|(name, restart_lsn)| SlotData {
        name: name.to_owned(),
        restart_lsn: Lsn(restart_lsn),
        xmin: 1 << 32 | 700,
        catalog_xmin: 0,
        lost: restart_lsn == 0,
    });
    let identity = identity::encode(&identity::Identity {
        id: MemberId(7),
        incarnation: Incarnation(u128::MAX / 3),
    });
    vec![
        body(&state(0)),
        body(&state(5)),
        body(&joint),
        body_of(&slot_file::encode(&[])),
        body_of(&slot_file::encode(&slots)),
        identity[IDENTITY_HEAD.len()..36].to_vec(),
        identity,
    ]
}

fn configuration(n_new: Option<u64>) -> Configuration {
    let member = |id| Member {
        id: MemberId(id),
        incarnation: Incarnation(u128::from(id) << 90),
        host: format!("sk{id}"),
        port: 5454,
    };
    Configuration {
        lineage: Lineage(9),
        version: ConfigurationVersion {
            term: Term(1),
            generation: 1,
        },
        members: (1..=3).map(member).collect(),
        new_members: n_new.map(|n| (1..=n).map(member).collect()),
    }
}

fn state(n_reigns: u64) -> AcceptorState {
    let entry = |term| TermEntry {
        term: Term(term),
        tli: Tli(1),
        start_lsn: Lsn(term << 24),
    };
    AcceptorState {
        cluster: ClusterIdentity {
            system_id: 7_000_000_000_000_000_001,
            name: "main".to_owned(),
            pg_major: 15,
            segment_size: 16 << 20,
        },
        term: Term(n_reigns),
        configuration: configuration(None),
        history: TermHistory::new((1..=n_reigns).map(entry).collect()).expect("it grows"),
        commit_lsn: Lsn(0x123_4568),
    }
}

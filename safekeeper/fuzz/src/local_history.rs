//! The proposer's own term history, a file in Postgres's data directory.
//!
//! The input is tried as a whole file, and as the body of one with a right head, length and
//! checksum. What is loaded must be what the bytes say, to the last one.
//!
//! The module under test is the extension's, which needs no Postgres; see `safekeeper_messages`.

use std::sync::OnceLock;

use safekeeper_protocol::codec::{encode_configuration, encode_history};
use safekeeper_protocol::{
    Configuration, Incarnation, Lsn, Member, MemberId, ProposerId, Term, TermEntry, TermHistory,
    Tli,
};

#[allow(dead_code)]
#[path = "../../../extension/src/local_history.rs"]
mod shipped;

use shipped::{LocalHistory, load};

const HEAD: &[u8] = b"WPHISTRY\0\0\0\x01";
const SYSTEM_ID: u64 = 7_000_000_000_000_000_001;

pub fn check(input: &[u8]) {
    check_file(input);
    let len = u32::try_from(input.len()).expect("an input is short");
    let mut file = [HEAD, &len.to_be_bytes(), input].concat();
    file.extend(crc32c::crc32c(&file).to_be_bytes());
    check_file(&file);
}

fn check_file(bytes: &[u8]) {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    let dir = DIR.get_or_init(|| {
        // In memory if there is a place for it: a search writes thousands of files a second.
        tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .expect("a temporary directory")
    });
    // One file for each thread: tests run on several.
    let own = dir
        .path()
        .join(format!("{:?}", std::thread::current().id()));
    std::fs::create_dir_all(&own).expect("a directory");
    std::fs::write(own.join("walproposer.history"), bytes).expect("a file");
    let system_id = bytes
        .get(16..)
        .and_then(|body| body.first_chunk())
        .map_or(SYSTEM_ID, |word| u64::from_be_bytes(*word));
    if let Ok(Some(local)) = load(&own, system_id, ProposerId(99)) {
        // The first 40 bytes of the body are numbers; the identity among them is only taken over
        // from the very file that was written.
        assert_eq!(encode_lists(&local), bytes[16 + 40..bytes.len() - 4]);
        let unled_from = local.unled_from.unwrap_or(Lsn::INVALID);
        assert_eq!(unled_from.0.to_be_bytes(), bytes[48..56]);
    }
}

fn encode_lists(local: &LocalHistory) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_history(&local.history, &mut bytes);
    encode_configuration(&local.configuration, &mut bytes);
    bytes
}

/// Bodies of files: before the first reign, and after some.
pub fn seeds() -> Vec<Vec<u8>> {
    let member = |id| Member {
        id: MemberId(id),
        incarnation: Incarnation(u128::from(id) << 90),
        host: format!("sk{id}"),
        port: 5454,
    };
    let entry = |term| TermEntry {
        term: Term(term),
        tli: Tli(1),
        start_lsn: Lsn(term << 24),
    };
    let after_three = LocalHistory {
        proposer_id: ProposerId(1 << 100),
        history: TermHistory::new((1..=3).map(entry).collect()).expect("it grows"),
        configuration: Configuration {
            members: (1..=3).map(member).collect(),
            ..Configuration::default()
        },
        unled_from: Some(Lsn(77)),
    };
    let before_the_first = LocalHistory {
        history: TermHistory::default(),
        configuration: Configuration::default(),
        unled_from: None,
        ..after_three.clone()
    };
    [before_the_first, after_three].iter().map(body).collect()
}

fn body(local: &LocalHistory) -> Vec<u8> {
    let mut body = SYSTEM_ID.to_be_bytes().to_vec();
    body.extend(5u64.to_be_bytes());
    body.extend(local.proposer_id.0.to_be_bytes());
    body.extend(local.unled_from.map_or(0, |lsn| lsn.0).to_be_bytes());
    body.extend(encode_lists(local));
    body
}

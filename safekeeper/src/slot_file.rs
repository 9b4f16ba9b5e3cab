//! The slot file: what a cluster's physical replication slots say, one file for each cluster.
//!
//! ```text
//!   D/<system_id>/slots       the slots; missing until the first one is made
//!   D/<system_id>/slots.tmp   space for the next version, see reserved_file.rs
//! ```
//!
//! Exactly [`FILE_LEN`] bytes, big-endian:
//!
//! ```text
//!   offset          size
//!   0               8      magic "SKSLOTS\n"
//!   8               4      version, 1
//!   12              4      length of the body
//!   16              2      body: number of slots, at most SLOTS_MAX, then each, in order of names:
//!                   1 + n    length of the name, name
//!                   1        1: it is lost
//!                   8        restart_lsn; 0/0 if nothing is reserved, or it is lost
//!                   8 + 8    xmin, catalog_xmin, with epoch; 0 if none
//!   ...             ...    zeros
//!   FILE_LEN - 4    4      CRC-32C of all before
//! ```
//!
//! Temporary slots are not in it. A file that can't be read is not written over: see slots.rs.

use std::path::{Path, PathBuf};

use safekeeper_protocol::Lsn;
use safekeeper_protocol::codec::{DecodeError, Input};

use crate::control_file::cluster_dir;
use crate::disk::{Disk, StorageError};
use crate::reserved_file::read_reserved;

/// Slots of one cluster, at most; each costs a connection of a consumer, and 89 bytes in the file.
pub const SLOTS_MAX: usize = 256;

/// In bytes (`NAMEDATALEN - 1`).
pub const NAME_LEN_MAX: usize = 63;

pub const SLOTS: &str = "slots";

/// 256 slots with the longest names take 22,808 bytes.
pub const FILE_LEN: usize = 24 * 1024;

/// What is kept of one slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotData {
    pub name: String,
    /// WAL from here on is kept. Invalid while nothing is reserved.
    pub restart_lsn: Lsn,
    /// Oldest transactions that the standby needs, with epoch; 0 if none.
    pub xmin: u64,
    pub catalog_xmin: u64,
    /// WAL that it kept has been removed. For ever.
    pub lost: bool,
}

/// Why the slots of a cluster are not known.
#[derive(Debug, thiserror::Error)]
pub enum SlotFileError {
    #[error("slot file \"{}\" is damaged: {problem}", path.display())]
    Damaged { path: PathBuf, problem: String },
    #[error(
        "slot file \"{}\" has version {found}, this build reads version {VERSION}: \
         it was written by a newer safekeeper, start that one",
        path.display()
    )]
    UnknownVersion { path: PathBuf, found: u32 },
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// Lower-case letters, digits, underscores.
pub fn is_valid_name(name: &str) -> bool {
    let is_valid = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_';
    (1..=NAME_LEN_MAX).contains(&name.len()) && name.bytes().all(is_valid)
}

/// Reads a cluster's slots and changes nothing; none if there is no file.
pub fn read_slots(disk: &dyn Disk, system_id: u64) -> Result<Option<Vec<SlotData>>, SlotFileError> {
    let path = cluster_dir(system_id).join(SLOTS);
    let bytes = read_reserved(disk, &path, FILE_LEN)?;
    bytes.map(|bytes| decode(&bytes, &path)).transpose()
}

/// The bytes of a file with `slots`, which are in order of their names.
pub fn encode(slots: &[SlotData]) -> Vec<u8> {
    assert!(slots.len() <= SLOTS_MAX, "{} slots", slots.len());
    let mut bytes = Vec::with_capacity(FILE_LEN);
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend((slots.len() as u16).to_be_bytes());
    for slot in slots {
        assert!(is_valid_name(&slot.name), "a slot named {:?}", slot.name);
        bytes.push(slot.name.len() as u8);
        bytes.extend(slot.name.bytes());
        bytes.push(u8::from(slot.lost));
        for number in [slot.restart_lsn.0, slot.xmin, slot.catalog_xmin] {
            bytes.extend(number.to_be_bytes());
        }
    }
    let body_len = (bytes.len() - BODY) as u32;
    bytes[BODY - 4..BODY].copy_from_slice(&body_len.to_be_bytes());
    bytes.resize(CRC, 0);
    bytes.extend(crc32c::crc32c(&bytes).to_be_bytes());
    bytes
}

/// What the bytes of a slot file say; `path` is for the error's text.
pub fn decode(bytes: &[u8], path: &Path) -> Result<Vec<SlotData>, SlotFileError> {
    let damaged = |problem: &str| SlotFileError::Damaged {
        path: path.to_owned(),
        problem: problem.to_owned(),
    };
    let wrong = |error: DecodeError| damaged(&error.to_string());
    let mut input = Input(bytes);
    if input.take(MAGIC.len()).map_err(wrong)? != MAGIC {
        return Err(damaged("it does not begin as one"));
    }
    let found = input.u32().map_err(wrong)?;
    if found != VERSION {
        let path = path.to_owned();
        return Err(SlotFileError::UnknownVersion { path, found });
    }
    if bytes.len() != FILE_LEN {
        return Err(damaged("its length is wrong"));
    }
    if bytes[CRC..] != crc32c::crc32c(&bytes[..CRC]).to_be_bytes() {
        return Err(damaged("its checksum is wrong"));
    }
    let body_len = input.u32().map_err(wrong)? as usize;
    if body_len > CRC - BODY {
        return Err(damaged("its body is too long"));
    }
    let (body, padding) = bytes[BODY..CRC].split_at(body_len);
    if padding.iter().any(|byte| *byte != 0) {
        return Err(damaged("it goes on behind its body"));
    }
    let slots = decode_body(body).map_err(wrong)?;
    match check(&slots) {
        Ok(()) => Ok(slots),
        Err(problem) => Err(damaged(&problem)),
    }
}

fn decode_body(body: &[u8]) -> Result<Vec<SlotData>, DecodeError> {
    let mut input = Input(body);
    let mut slots = Vec::new();
    for _ in 0..input.u16()? {
        let name_len = usize::from(input.u8()?);
        let name = input.take(name_len)?;
        slots.push(SlotData {
            // What is no text is no valid name either.
            name: String::from_utf8_lossy(name).into_owned(),
            lost: input.bool()?,
            restart_lsn: input.lsn()?,
            xmin: input.u64()?,
            catalog_xmin: input.u64()?,
        });
    }
    input.end()?;
    Ok(slots)
}

fn check(slots: &[SlotData]) -> Result<(), String> {
    if slots.len() > SLOTS_MAX {
        return Err(format!("it holds {} slots", slots.len()));
    }
    if let Some(slot) = slots.iter().find(|slot| !is_valid_name(&slot.name)) {
        return Err(format!("\"{}\" names no slot", slot.name.escape_default()));
    }
    if let Some(pair) = slots.windows(2).find(|pair| pair[0].name >= pair[1].name) {
        return Err(format!("slot \"{}\" is out of order", pair[1].name));
    }
    match slots
        .iter()
        .find(|slot| slot.lost && slot.restart_lsn.is_valid())
    {
        Some(slot) => Err(format!("lost slot \"{}\" keeps WAL", slot.name)),
        None => Ok(()),
    }
}

const MAGIC: &[u8; 8] = b"SKSLOTS\n";
const VERSION: u32 = 1;
const BODY: usize = 16;
const CRC: usize = FILE_LEN - 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(name: &str, restart_lsn: u64) -> SlotData {
        SlotData {
            name: name.to_owned(),
            restart_lsn: Lsn(restart_lsn),
            xmin: 7 << 32 | 3,
            catalog_xmin: 0,
            lost: restart_lsn == 0,
        }
    }

    fn decoded(bytes: &[u8]) -> Result<Vec<SlotData>, String> {
        decode(bytes, Path::new("s")).map_err(|error| error.to_string())
    }

    #[test]
    fn slots_survive_their_file_and_the_most_fit_into_it() {
        for slots in [
            vec![],
            vec![slot("a", 0)],
            vec![slot("a", 1), slot("b_2", 2)],
        ] {
            assert_eq!(decoded(&encode(&slots)), Ok(slots));
        }
        let long = |n: usize| slot(&format!("{n:063}"), u64::MAX);
        let most: Vec<SlotData> = (0..SLOTS_MAX).map(long).collect();
        assert_eq!(decoded(&encode(&most)), Ok(most));
    }

    #[test]
    fn every_flipped_byte_and_every_other_length_is_noticed() {
        let good = encode(&[slot("a", 1), slot("b", 2)]);
        let mut bytes = good.clone();
        for i in 0..good.len() {
            // The checksum of all of it is slow in a debug build.
            if i < 128 || i % 97 == 0 || i >= CRC {
                bytes[i] ^= 0x10;
                assert!(decoded(&bytes).is_err(), "byte {i}");
                bytes[i] ^= 0x10;
            }
        }
        for len in [0, 7, 8, 12, 16, CRC, FILE_LEN - 1] {
            assert!(decoded(&good[..len]).is_err(), "{len} bytes");
        }
        assert!(decoded(&[good.as_slice(), &[0]].concat()).is_err());
    }

    #[test]
    fn what_no_safekeeper_writes_is_refused_whatever_its_checksum() {
        let with = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = encode(&[slot("a", 1), slot("b", 2)]);
            change(&mut bytes);
            let crc = crc32c::crc32c(&bytes[..CRC]).to_be_bytes();
            bytes[CRC..].copy_from_slice(&crc);
            decoded(&bytes).expect_err("refused")
        };
        let (first_name, first_lost, second_name) = (BODY + 3, BODY + 4, BODY + 2 + 27 + 1);
        assert!(with(&|bytes| bytes[11] = 2).contains("has version 2"));
        assert!(with(&|bytes| bytes[first_name] = b'A').contains("\"A\" names no slot"));
        assert!(with(&|bytes| bytes[first_lost] = 1).contains("lost slot \"a\" keeps WAL"));
        assert!(with(&|bytes| bytes[second_name] = b'a').contains("out of order"));
        assert!(with(&|bytes| bytes[CRC - 1] = 1).contains("behind its body"));
        assert!(with(&|bytes| bytes[13] = 1).contains("too long"));
        assert!(with(&|bytes| bytes[BODY] = 1).contains("damaged"));
    }

    #[test]
    fn names_are_those_of_a_primary() {
        for (name, is_valid) in [
            ("a", true),
            ("standby_1", true),
            (&"x".repeat(63), true),
            ("", false),
            (&"x".repeat(64), false),
            ("Standby", false),
            ("a-b", false),
            ("é", false),
        ] {
            assert_eq!(is_valid_name(name), is_valid, "{name}");
        }
    }
}

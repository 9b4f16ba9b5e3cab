//! The proposer's own term history: `walproposer.history` in the data directory.
//!
//! With it the local WAL is itself a log that an election can compare (design §4.1). It records
//! what was; it never confers a right to lead.
//!
//! ```text
//!   offset  size
//!   0       8     magic "WPHISTRY"
//!   8       4     version, 1
//!   12      4     length of what follows, without the CRC
//!   16      8     system_identifier of the cluster
//!   24      8     inode number of this very file
//!   32      16    proposer_id
//!   48      8     unled_from, 0 if all WAL was written in a term
//!   56      ...   term history, as on the wire (codec.rs)
//!   ...     ...   configuration, likewise: that of the quorum it led last
//!   end     4     CRC-32C of all before
//! ```
//!
//! Numbers are big-endian. The file is replaced as a whole: written under another name, fsynced,
//! renamed, the directory fsynced. A crash leaves the old one or the new one, and perhaps
//! `walproposer.history.new`, which the next replacement overwrites.
//!
//! The inode number tells a copy from the original. A copied data directory keeps the history, for
//! its WAL is copied with it, but not the identity: two servers with one `proposer_id` would each
//! take the other's session for its own former one, and a rival would go unnoticed.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use safekeeper_protocol::codec::{DecodeError, Input, encode_configuration, encode_history};
use safekeeper_protocol::{Configuration, Lsn, ProposerId, TermHistory};

const FILE_NAME: &str = "walproposer.history";
const NEW_FILE_NAME: &str = "walproposer.history.new";
const MAGIC: &[u8; 8] = b"WPHISTRY";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 16;
const CRC_LEN: usize = 4;
/// A full term history takes 80 kB; a larger file was not written by us.
const FILE_LEN_MAX: u64 = 1024 * 1024;

/// What the file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalHistory {
    pub proposer_id: ProposerId,
    pub history: TermHistory,
    /// The quorum that this server led last. Another's safekeepers are not counted.
    pub configuration: Configuration,
    /// Earliest LSN from which WAL was written without a term. Never moves forward.
    pub unled_from: Option<Lsn>,
}

#[derive(Debug, thiserror::Error)]
pub enum LocalHistoryError {
    #[error("could not {doing} file \"{}\": {source}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("file \"{}\" {what}", path.display())]
    Damaged { path: PathBuf, what: String },
}

type Loaded<T> = Result<T, LocalHistoryError>;

/// Reads the file of `data_dir`; `None` if there is none. With `new_id` as proposer_id if the file
/// is a copy, or if the cluster is another one than it was written for (then its history is void).
pub fn load(data_dir: &Path, system_id: u64, new_id: ProposerId) -> Loaded<Option<LocalHistory>> {
    let path = data_dir.join(FILE_NAME);
    let io_error = |doing, source| LocalHistoryError::Io {
        doing,
        path: path.clone(),
        source,
    };
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("open", error)),
    };
    let inode = file.metadata().map_err(|e| io_error("stat", e))?.ino();
    let mut bytes = Vec::new();
    let limited = &mut file.take(FILE_LEN_MAX + 1);
    limited
        .read_to_end(&mut bytes)
        .map_err(|e| io_error("read", e))?;
    let stored = decode(&bytes).map_err(|what| LocalHistoryError::Damaged {
        path: path.clone(),
        what,
    })?;
    if stored.system_id != system_id {
        return Ok(None);
    }
    let mut local = stored.local;
    if stored.inode != inode {
        local.proposer_id = new_id;
    }
    Ok(Some(local))
}

/// Replaces the file. On stable storage when it returns.
pub fn store(data_dir: &Path, system_id: u64, local: &LocalHistory) -> Loaded<()> {
    let (path, new_path) = (data_dir.join(FILE_NAME), data_dir.join(NEW_FILE_NAME));
    let io_error = |doing, path: &Path| {
        let path = path.to_owned();
        move |source| LocalHistoryError::Io {
            doing,
            path,
            source,
        }
    };
    // A file left by a crash is removed rather than reused: its inode may be the current one's
    // number after a copy with hard links.
    match std::fs::remove_file(&new_path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(io_error("remove", &new_path)(error));
        }
        _ => {}
    }
    let create = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new_path);
    let mut file = create.map_err(io_error("create", &new_path))?;
    let inode = file.metadata().map_err(io_error("stat", &new_path))?.ino();
    let bytes = encode(&Stored {
        system_id,
        inode,
        local: local.clone(),
    });
    file.write_all(&bytes)
        .map_err(io_error("write", &new_path))?;
    file.sync_all().map_err(io_error("fsync", &new_path))?;
    std::fs::rename(&new_path, &path).map_err(io_error("rename", &new_path))?;
    let directory = File::open(data_dir).map_err(io_error("open", data_dir))?;
    directory.sync_all().map_err(io_error("fsync", data_dir))
}

struct Stored {
    system_id: u64,
    inode: u64,
    local: LocalHistory,
}

fn encode(stored: &Stored) -> Vec<u8> {
    let local = &stored.local;
    let mut body = Vec::new();
    body.extend_from_slice(&stored.system_id.to_be_bytes());
    body.extend_from_slice(&stored.inode.to_be_bytes());
    body.extend_from_slice(&local.proposer_id.0.to_be_bytes());
    body.extend_from_slice(&local.unled_from.unwrap_or(Lsn::INVALID).0.to_be_bytes());
    encode_history(&local.history, &mut body);
    encode_configuration(&local.configuration, &mut body);
    let len = u32::try_from(body.len()).expect("a history is limited to 80 kB");
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&VERSION.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(&body);
    let crc = crc32c::crc32c(&out);
    out.extend_from_slice(&crc.to_be_bytes());
    out
}

/// The reason why it can't be read, to follow the file's name.
fn decode(bytes: &[u8]) -> Result<Stored, String> {
    let header: &[u8; HEADER_LEN] = bytes.first_chunk().ok_or("is too short")?;
    let word = |at: usize| {
        u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    if !header.starts_with(MAGIC) {
        return Err("is not a term history".into());
    }
    if word(8) != VERSION {
        return Err(format!(
            "has version {}, this build reads {VERSION}",
            word(8)
        ));
    }
    let body_len = usize::try_from(word(12)).map_err(|_| "is too long")?;
    if bytes.len() as u64 > FILE_LEN_MAX
        || bytes.len() - HEADER_LEN != body_len.saturating_add(CRC_LEN)
    {
        return Err(format!(
            "has {} bytes, which is not its length",
            bytes.len()
        ));
    }
    let (covered, crc) = bytes.split_at(bytes.len() - CRC_LEN);
    if crc != crc32c::crc32c(covered).to_be_bytes() {
        return Err("has an incorrect checksum".into());
    }
    let body = &mut Input(&covered[HEADER_LEN..]);
    let damaged = |error: DecodeError| error.to_string();
    let system_id = body.u64().map_err(damaged)?;
    let inode = body.u64().map_err(damaged)?;
    let proposer_id = ProposerId(body.u128().map_err(damaged)?);
    let unled_from = Some(body.lsn().map_err(damaged)?).filter(|lsn| lsn.is_valid());
    let history = body.history().map_err(damaged)?;
    let configuration = body.configuration().map_err(damaged)?;
    body.end().map_err(damaged)?;
    Ok(Stored {
        system_id,
        inode,
        local: LocalHistory {
            proposer_id,
            history,
            configuration,
            unled_from,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use safekeeper_protocol::{Lineage, Term, TermEntry, Tli};

    const SYSTEM: u64 = 7_000_000_000_000_000_001;
    const NEW_ID: ProposerId = ProposerId(99);

    fn local() -> LocalHistory {
        let entry = |term, start| TermEntry {
            term: Term(term),
            tli: Tli(1),
            start_lsn: Lsn(start),
        };
        LocalHistory {
            proposer_id: ProposerId(0x1234 << 100),
            history: TermHistory::new(vec![entry(1, 10), entry(4, 20)]).expect("a history"),
            configuration: Configuration {
                lineage: Lineage(5),
                ..Configuration::default()
            },
            unled_from: Some(Lsn(77)),
        }
    }

    fn loaded(dir: &Path) -> Option<LocalHistory> {
        load(dir, SYSTEM, NEW_ID).expect("readable")
    }

    #[test]
    fn what_is_stored_is_loaded() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(loaded(dir.path()), None);
        store(dir.path(), SYSTEM, &local()).expect("stored");
        assert_eq!(loaded(dir.path()), Some(local()));
        let next = LocalHistory {
            unled_from: None,
            ..local()
        };
        store(dir.path(), SYSTEM, &next).expect("stored again");
        assert_eq!(loaded(dir.path()), Some(next));
        assert!(!dir.path().join(NEW_FILE_NAME).exists());
    }

    #[test]
    fn a_crash_before_the_rename_changes_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        store(dir.path(), SYSTEM, &local()).expect("stored");
        std::fs::write(dir.path().join(NEW_FILE_NAME), b"half").expect("written");
        assert_eq!(loaded(dir.path()), Some(local()));
        store(dir.path(), SYSTEM, &local()).expect("stored again");
    }

    #[test]
    fn a_copy_keeps_the_history_and_loses_the_identity() {
        let (dir, copy) = (
            tempfile::tempdir().expect("one"),
            tempfile::tempdir().expect("two"),
        );
        store(dir.path(), SYSTEM, &local()).expect("stored");
        std::fs::copy(dir.path().join(FILE_NAME), copy.path().join(FILE_NAME)).expect("copied");
        let of_copy = loaded(copy.path()).expect("a history");
        assert_eq!(of_copy.proposer_id, NEW_ID);
        assert_eq!(of_copy.history, local().history);
    }

    #[test]
    fn the_history_of_another_cluster_is_void() {
        let dir = tempfile::tempdir().expect("a directory");
        store(dir.path(), SYSTEM, &local()).expect("stored");
        assert_eq!(
            load(dir.path(), SYSTEM + 1, NEW_ID).expect("readable"),
            None
        );
    }

    #[test]
    fn damage_is_found_wherever_it_is() {
        let stored = Stored {
            system_id: SYSTEM,
            inode: 5,
            local: local(),
        };
        let good = encode(&stored);
        assert!(decode(&good).is_ok());
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            assert!(decode(&bad).is_err(), "byte {at}");
            assert!(decode(&good[..at]).is_err(), "cut at {at}");
        }
        let longer = [good, vec![0]].concat();
        assert!(decode(&longer).is_err());
    }
}

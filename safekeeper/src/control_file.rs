//! The control file: what an acceptor has promised, one file for each cluster.
//!
//! ```text
//!   D/<system_id>/control       the state
//!   D/<system_id>/control.tmp   space for the next one; what it holds means nothing
//!   D/<system_id>/wal/          see wal_storage.rs
//! ```
//!
//! Both files are exactly `FILE_LEN` bytes long, big-endian:
//!
//! ```text
//!   offset          size
//!   0               8      magic "SKCTRL\r\n"
//!   8               4      version, 1
//!   12              4      length of the body
//!   16              ...    body: term 8, commit_lsn 8, cluster, configuration, term history,
//!                          the last three in the encodings of the protocol's codec.rs
//!   ...             ...    zeros
//!   FILE_LEN - 4    4      CRC-32C of all before
//! ```
//!
//! It is replaced as a whole, and needs no space for that: a full disk cannot stop a vote. How, and
//! what a crash leaves, see reserved_file.rs. The length is fixed, and large enough for the longest
//! history and configuration that the protocol allows.
//!
//! It is written for every vote, Elected and Configure, never for a commit: `commit_lsn` is only
//! brought up to date now and then, and recovery knows that it may lag.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use safekeeper_protocol::AcceptorState;
use safekeeper_protocol::codec::{
    DecodeError, Input, encode_cluster, encode_configuration, encode_history,
};

use crate::disk::{Disk, StorageError};
use crate::reserved_file::{ReservedFile, read_reserved};

/// Why a cluster's state can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ControlFileError {
    #[error("there is no control file \"{}\"", .0.display())]
    Missing(PathBuf),
    #[error("control file \"{}\" is damaged: {problem}", path.display())]
    Damaged { path: PathBuf, problem: String },
    #[error(
        "control file \"{}\" has version {found}, this build reads version {VERSION}: \
         it was written by a newer safekeeper, start that one",
        path.display()
    )]
    UnknownVersion { path: PathBuf, found: u32 },
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// The control file of one cluster. Whoever holds this is the only one who writes it.
#[derive(Debug)]
pub struct ControlFile {
    file: ReservedFile,
    persisted: AcceptorState,
}

impl ControlFile {
    /// Makes the directory of a cluster that is new here, with its first state. If it fails for
    /// lack of space, nothing was promised and it can be tried again.
    pub fn create(disk: Arc<dyn Disk>, state: &AcceptorState) -> Result<ControlFile, StorageError> {
        let dir = cluster_dir(state.cluster.system_id);
        disk.create_dir(&dir)?;
        disk.create_dir(&wal_dir(state.cluster.system_id))?;
        let file = ReservedFile::new(disk.clone(), dir, CONTROL, FILE_LEN);
        // Once `control` is there, the cluster is.
        file.create(&encode(state))?;
        disk.sync_dir(Path::new(""))?;
        let persisted = state.clone();
        Ok(ControlFile { file, persisted })
    }

    /// Opens the control file of a cluster and reads its state.
    pub fn open(
        disk: Arc<dyn Disk>,
        system_id: u64,
    ) -> Result<(ControlFile, AcceptorState), ControlFileError> {
        let state = read_state(disk.as_ref(), system_id)?;
        let file = ReservedFile::new(disk, cluster_dir(system_id), CONTROL, FILE_LEN);
        match file.check_reserve() {
            Ok(()) => {}
            // Votes still work as long as there is a little space; and starting must not depend
            // on more of it, since space is made by what runs after the start.
            Err(error) if error.is_no_space() => {
                log::warn!("no space is reserved for the control file ({error})");
            }
            Err(error) => return Err(error.into()),
        }
        let persisted = state.clone();
        Ok((ControlFile { file, persisted }, state))
    }

    /// What it holds. The file need not be read for that, and may have been damaged since.
    pub fn persisted(&self) -> &AcceptorState {
        &self.persisted
    }

    /// Replaces the state. When this returns, the new one is on stable storage. After an error it
    /// may be there or not: the process must end.
    pub fn persist(&mut self, state: &AcceptorState) -> Result<(), StorageError> {
        self.file.replace(&encode(state))?;
        self.persisted = state.clone();
        Ok(())
    }
}

/// System identifiers of the clusters in a data directory, sorted.
pub fn list_clusters(disk: &dyn Disk) -> Result<Vec<u64>, StorageError> {
    let mut system_ids = Vec::new();
    for name in disk.list(Path::new(""))? {
        let Ok(system_id) = name.parse::<u64>() else {
            continue;
        };
        // A directory without a control file was being made when the process ended.
        let control = cluster_dir(system_id).join(CONTROL);
        if cluster_dir(system_id) == Path::new(&name) && disk.file_id(&control)?.is_some() {
            system_ids.push(system_id);
        }
    }
    system_ids.sort_unstable();
    Ok(system_ids)
}

/// Directory of a cluster, relative to the data directory.
pub fn cluster_dir(system_id: u64) -> PathBuf {
    PathBuf::from(system_id.to_string())
}

/// Directory of a cluster's WAL, relative to the data directory.
pub fn wal_dir(system_id: u64) -> PathBuf {
    cluster_dir(system_id).join("wal")
}

/// Reads a cluster's state and changes nothing.
pub fn read_state(disk: &dyn Disk, system_id: u64) -> Result<AcceptorState, ControlFileError> {
    let path = cluster_dir(system_id).join(CONTROL);
    let bytes = read_reserved(disk, &path, FILE_LEN)?;
    let bytes = bytes.ok_or_else(|| ControlFileError::Missing(path.clone()))?;
    let state = decode(&bytes, &path)?;
    if state.cluster.system_id == system_id {
        Ok(state)
    } else {
        let problem = format!("it is of cluster {}", state.cluster.system_id);
        Err(ControlFileError::Damaged { path, problem })
    }
}

/// The bytes of a control file that holds `state`.
pub fn encode(state: &AcceptorState) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(FILE_LEN);
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(state.term.0.to_be_bytes());
    bytes.extend(state.commit_lsn.0.to_be_bytes());
    encode_cluster(&state.cluster, &mut bytes);
    encode_configuration(&state.configuration, &mut bytes);
    encode_history(&state.history, &mut bytes);
    let body_len = bytes.len() - BODY;
    assert!(
        body_len <= BODY_LEN_MAX,
        "a state of {body_len} bytes is beyond the protocol's limits"
    );
    let body_len = u32::try_from(body_len).expect("at most BODY_LEN_MAX");
    bytes[BODY - 4..BODY].copy_from_slice(&body_len.to_be_bytes());
    bytes.resize(CRC, 0);
    bytes.extend(crc32c::crc32c(&bytes).to_be_bytes());
    bytes
}

/// What the bytes of a control file say; `path` is for the error's text.
pub fn decode(bytes: &[u8], path: &Path) -> Result<AcceptorState, ControlFileError> {
    let damaged = |problem: &str| ControlFileError::Damaged {
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
        return Err(ControlFileError::UnknownVersion { path, found });
    }
    if bytes.len() != FILE_LEN {
        return Err(damaged("its length is wrong"));
    }
    if bytes[CRC..] != crc32c::crc32c(&bytes[..CRC]).to_be_bytes() {
        return Err(damaged("its checksum is wrong"));
    }
    let body_len = input.u32().map_err(wrong)? as usize;
    if body_len > BODY_LEN_MAX {
        return Err(damaged("its body is too long"));
    }
    let mut body = Input(input.take(body_len).map_err(wrong)?);
    let state = (|| {
        let (term, commit_lsn) = (body.term()?, body.lsn()?);
        let state = AcceptorState {
            cluster: body.cluster()?,
            term,
            configuration: body.configuration()?,
            history: body.history()?,
            commit_lsn,
        };
        body.end()?;
        Ok(state)
    })();
    state.map_err(wrong)
}

const CONTROL: &str = "control";
const MAGIC: &[u8; 8] = b"SKCTRL\r\n";
const VERSION: u32 = 1;
/// A history of `TermHistory::LEN_MAX` reigns takes 80 KiB, a joint configuration of
/// `Configuration::MEMBERS_MAX` members with the longest names 9 KiB.
const FILE_LEN: usize = 128 * 1024;
const BODY: usize = 16;
const CRC: usize = FILE_LEN - 4;
const BODY_LEN_MAX: usize = CRC - BODY;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::RealDisk;
    use safekeeper_protocol::{
        ClusterIdentity, Configuration, ConfigurationVersion, Incarnation, Lineage, Lsn, Member,
        MemberId, Term, TermEntry, TermHistory, Tli,
    };

    const RESERVE: &str = "control.tmp";
    const SYSTEM_ID: u64 = 7_000_000_000_000_000_001;

    fn members(n: usize, host_len: usize) -> Vec<Member> {
        (1..=n as u64)
            .map(|id| Member {
                id: MemberId(id),
                incarnation: Incarnation(u128::from(id) << 100),
                host: "h".repeat(host_len),
                port: 5454,
            })
            .collect()
    }

    fn state(term: u64, n_reigns: usize) -> AcceptorState {
        let reigns = (1..=n_reigns as u64).map(|n| TermEntry {
            term: Term(n),
            tli: Tli(1),
            start_lsn: Lsn(n * 0x100_0000),
        });
        AcceptorState {
            cluster: ClusterIdentity {
                system_id: SYSTEM_ID,
                name: "main".to_owned(),
                pg_major: 15,
                segment_size: 16 << 20,
            },
            term: Term(term),
            configuration: Configuration {
                lineage: Lineage(9),
                version: ConfigurationVersion {
                    term: Term(1),
                    generation: 1,
                },
                members: members(3, 10),
                new_members: None,
            },
            history: TermHistory::new(reigns.collect()).unwrap(),
            commit_lsn: Lsn(0x123_4568),
        }
    }

    fn disk() -> (tempfile::TempDir, Arc<dyn Disk>) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let disk = Arc::new(RealDisk::new(dir.path()));
        (dir, disk)
    }

    #[test]
    fn what_was_persisted_last_is_read_back() {
        let (_dir, disk) = disk();
        let mut control = ControlFile::create(disk.clone(), &state(1, 0)).unwrap();
        for term in 2..6 {
            control.persist(&state(term, term as usize)).unwrap();
            let read = read_state(disk.as_ref(), SYSTEM_ID).unwrap();
            assert_eq!(read, state(term, term as usize));
        }
        drop(control);
        let (_, read) = ControlFile::open(disk.clone(), SYSTEM_ID).unwrap();
        assert_eq!(read, state(5, 5));
        assert_eq!(list_clusters(disk.as_ref()).unwrap(), [SYSTEM_ID]);
    }

    #[test]
    fn the_largest_state_fits_into_the_space_reserved() {
        let mut largest = state(1 << 60, TermHistory::LEN_MAX);
        largest.cluster.name = "n".repeat(ClusterIdentity::NAME_LEN_MAX);
        let all = members(Configuration::MEMBERS_MAX, Member::HOST_LEN_MAX);
        largest.configuration.members = all.clone();
        largest.configuration.new_members = Some(all);
        assert_eq!(decode(&encode(&largest), Path::new("c")).unwrap(), largest);
    }

    #[test]
    fn every_flipped_byte_and_every_other_length_is_noticed() {
        let path = Path::new("c");
        let good = encode(&state(9, 3));
        assert_eq!(decode(&good, path).unwrap(), state(9, 3));
        let mut bytes = good.clone();
        for i in 0..good.len() {
            // The checksum runs over all of it, which is slow in a debug build: the stretch that
            // means something whole, of the zeros behind it a sample.
            if i < 1024 || i % 997 == 0 || i >= CRC {
                bytes[i] ^= 0x10;
                assert!(decode(&bytes, path).is_err(), "byte {i}");
                bytes[i] ^= 0x10;
            }
        }
        for len in 0..good.len() {
            assert!(decode(&good[..len], path).is_err(), "{len} bytes");
        }
        assert!(decode(&[good.as_slice(), &[0]].concat(), path).is_err());
    }

    #[test]
    fn an_unknown_version_is_refused_by_its_number() {
        let mut bytes = encode(&state(1, 1));
        bytes[11] = 2;
        let error = decode(&bytes, Path::new("c")).unwrap_err();
        assert!(matches!(
            error,
            ControlFileError::UnknownVersion { found: 2, .. }
        ));
    }

    #[test]
    fn a_torn_successor_leaves_the_state_as_it_was() {
        let (dir, disk) = disk();
        drop(ControlFile::create(disk.clone(), &state(4, 2)).unwrap());
        let reserve = dir.path().join(cluster_dir(SYSTEM_ID)).join(RESERVE);
        let next = encode(&state(5, 2));
        for len in [0, 1, 4096, FILE_LEN / 2, FILE_LEN - 1] {
            std::fs::write(&reserve, &next[..len]).unwrap();
            let (mut control, read) = ControlFile::open(disk.clone(), SYSTEM_ID).unwrap();
            assert_eq!(read, state(4, 2));
            control.persist(&state(4, 2)).unwrap();
        }
    }

    #[test]
    fn the_reserve_is_kept_and_made_again_if_it_is_gone() {
        let (dir, disk) = disk();
        let mut control = ControlFile::create(disk.clone(), &state(1, 0)).unwrap();
        let reserve = dir.path().join(cluster_dir(SYSTEM_ID)).join(RESERVE);
        let reserved = || std::fs::metadata(&reserve).map(|m| m.len()).ok();
        for term in 2..5 {
            assert_eq!(reserved(), Some(FILE_LEN as u64));
            control.persist(&state(term, 0)).unwrap();
        }
        std::fs::remove_file(&reserve).unwrap();
        control.persist(&state(7, 0)).unwrap();
        assert_eq!(read_state(disk.as_ref(), SYSTEM_ID).unwrap(), state(7, 0));
        std::fs::remove_file(&reserve).unwrap();
        drop(ControlFile::open(disk, SYSTEM_ID).unwrap());
        assert_eq!(reserved(), Some(FILE_LEN as u64));
    }

    #[test]
    fn a_cluster_being_made_when_the_process_ended_is_no_cluster() {
        let (dir, disk) = disk();
        std::fs::create_dir(dir.path().join("42")).unwrap();
        std::fs::create_dir(dir.path().join("042")).unwrap();
        std::fs::write(dir.path().join("42/control.tmp"), "").unwrap();
        assert_eq!(list_clusters(disk.as_ref()).unwrap(), [0u64; 0]);
        let error = ControlFile::open(disk, 42).unwrap_err();
        assert!(matches!(error, ControlFileError::Missing(_)));
    }

    #[test]
    fn the_state_of_another_cluster_is_refused() {
        let (dir, disk) = disk();
        drop(ControlFile::create(disk.clone(), &state(1, 0)).unwrap());
        std::fs::rename(
            dir.path().join(cluster_dir(SYSTEM_ID)),
            dir.path().join("42"),
        )
        .unwrap();
        let error = ControlFile::open(disk, 42).unwrap_err();
        assert!(matches!(error, ControlFileError::Damaged { .. }), "{error}");
    }
}

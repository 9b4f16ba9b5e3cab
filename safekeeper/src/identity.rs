//! The data directory: whose it is, and that only one daemon uses it.
//!
//! ```text
//!   D/safekeeper.identity      written once, by init
//!   D/safekeeper.lock          locked while a daemon runs, holds its process id
//!   D/<system_id>/             one directory for each cluster (see control_file.rs)
//! ```
//!
//! The identity file, big-endian:
//!
//! ```text
//!   offset  size
//!   0       8     magic "SKIDENT\n"
//!   8       4     version, 1
//!   12      8     member id, not 0
//!   20      16    incarnation
//!   36      4     CRC-32C of all before
//! ```
//!
//! The incarnation is drawn at random when the directory is made. A directory that was wiped and
//! made anew under the old id has forgotten its votes; by its new incarnation nobody takes it for
//! the old one.
//!
//! The file is the marker, too: a directory without it is not a safekeeper's. That is what an
//! empty mount point looks like whose disk was not mounted, and to begin anew there would be to
//! forget every promise; so only `init` writes one, and only where nothing else is.
//!
//! A crash in `init` leaves `safekeeper.identity.tmp`, and `init` can be called again.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safekeeper_protocol::codec::Input;
use safekeeper_protocol::{Incarnation, MemberId};

use crate::disk::{Disk, RealDisk, StorageError};

/// Who this safekeeper is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub id: MemberId,
    pub incarnation: Incarnation,
}

/// Why a directory can't be used as a data directory.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error(
        "\"{}\" is not a safekeeper data directory: it has no file {IDENTITY_FILE} \
         (is the disk mounted? a new directory is made by \"safekeeper init\")",
        .0.display()
    )]
    NotADataDir(PathBuf),
    #[error("\"{}\" is a safekeeper data directory already", .0.display())]
    AlreadyInitialized(PathBuf),
    #[error("\"{}\" is not empty, it holds \"{holds}\"", dir.display())]
    NotEmpty { dir: PathBuf, holds: String },
    #[error("0 is not a member id")]
    InvalidId,
    #[error("data directory \"{}\" is in use by process {holder}", dir.display())]
    InUse { dir: PathBuf, holder: String },
    #[error("identity file of \"{}\" is damaged: {problem}", dir.display())]
    Damaged { dir: PathBuf, problem: &'static str },
    #[error(
        "identity file of \"{}\" has version {found}, this build reads version {VERSION}: \
         it was written by a newer safekeeper",
        dir.display()
    )]
    UnknownVersion { dir: PathBuf, found: u32 },
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// A data directory in use by this process, until it is dropped.
#[derive(Debug)]
pub struct DataDir {
    disk: Arc<RealDisk>,
    identity: Identity,
    /// Closing the file releases the lock.
    _lock: File,
}

impl DataDir {
    /// Makes `dir` a data directory. It is created if missing, its parent is not.
    pub fn init(dir: &Path, id: MemberId, incarnation: Incarnation) -> Result<(), DataDirError> {
        if id == MemberId::default() {
            return Err(DataDirError::InvalidId);
        }
        let disk = RealDisk::new(dir);
        disk.create_dir(Path::new(""))?;
        for name in disk.list(Path::new(""))? {
            match name.as_str() {
                IDENTITY_FILE => return Err(DataDirError::AlreadyInitialized(dir.to_owned())),
                // Of a file system's root, and of an init that crashed.
                "lost+found" | IDENTITY_TMP => {}
                _ => {
                    let (dir, holds) = (dir.to_owned(), name);
                    return Err(DataDirError::NotEmpty { dir, holds });
                }
            }
        }
        let file = disk.create(Path::new(IDENTITY_TMP))?;
        file.write_at(&encode(&Identity { id, incarnation }), 0)?;
        file.sync_all()?;
        disk.rename(Path::new(IDENTITY_TMP), Path::new(IDENTITY_FILE))?;
        disk.sync_dir(Path::new(""))?;
        // The directory's own name, too, is to survive.
        match dir.parent() {
            Some(parent) if parent == Path::new("") => {
                RealDisk::new(Path::new(".")).sync_dir(Path::new(""))?
            }
            Some(parent) => RealDisk::new(parent).sync_dir(Path::new(""))?,
            None => {}
        }
        Ok(())
    }

    /// Takes `dir` for this process: checks its identity, locks it, and makes durable what an
    /// earlier process wrote and this one is going to rely on.
    pub fn open(dir: &Path) -> Result<DataDir, DataDirError> {
        let identity = read_identity(dir)?;
        let disk = RealDisk::new(dir);
        let pid = format!("{}\n", std::process::id());
        let lock = match disk.try_lock(Path::new(LOCK_FILE), &pid)? {
            Ok(lock) => lock,
            Err(holder) => {
                let (dir, holder) = (dir.to_owned(), holder.trim().to_owned());
                return Err(DataDirError::InUse { dir, holder });
            }
        };
        disk.sync_everything()?;
        Ok(DataDir {
            disk: Arc::new(disk),
            identity,
            _lock: lock,
        })
    }

    pub fn identity(&self) -> Identity {
        self.identity
    }

    pub fn disk(&self) -> Arc<dyn Disk> {
        self.disk.clone()
    }

    pub fn path(&self) -> &Path {
        self.disk.root()
    }
}

/// Identity of the data directory `dir`, which may be in use.
pub fn read_identity(dir: &Path) -> Result<Identity, DataDirError> {
    let file = match RealDisk::new(dir).open_read_only(Path::new(IDENTITY_FILE)) {
        Ok(file) => file,
        Err(error) if error.is_not_found() => {
            return Err(DataDirError::NotADataDir(dir.to_owned()));
        }
        Err(error) => return Err(error.into()),
    };
    let mut bytes = [0; FILE_LEN + 1];
    let len = file.read_at(&mut bytes, 0)?;
    decode(&bytes[..len], dir)
}

/// A new incarnation, from the system's source of randomness.
pub fn random_incarnation() -> io::Result<Incarnation> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(Incarnation(u128::from_be_bytes(bytes)))
}

/// The bytes of an identity file.
pub fn encode(identity: &Identity) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(FILE_LEN);
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_be_bytes());
    bytes.extend(identity.id.0.to_be_bytes());
    bytes.extend(identity.incarnation.0.to_be_bytes());
    bytes.extend(crc32c::crc32c(&bytes).to_be_bytes());
    bytes
}

/// What the bytes of an identity file say; `dir` is for the error's text.
pub fn decode(bytes: &[u8], dir: &Path) -> Result<Identity, DataDirError> {
    let damaged = |problem| DataDirError::Damaged {
        dir: dir.to_owned(),
        problem,
    };
    let short = |_| damaged("it is too short");
    let mut input = Input(bytes);
    if input.take(MAGIC.len()).map_err(short)? != MAGIC {
        return Err(damaged("it does not begin as one"));
    }
    // The version stands outside the checksum's protection when it is not ours, since we don't
    // know where such a file keeps its checksum.
    let found = input.u32().map_err(short)?;
    if found != VERSION {
        let dir = dir.to_owned();
        return Err(DataDirError::UnknownVersion { dir, found });
    }
    let identity = Identity {
        id: MemberId(input.u64().map_err(short)?),
        incarnation: Incarnation(input.u128().map_err(short)?),
    };
    let crc = input.u32().map_err(short)?;
    input.end().map_err(|_| damaged("it is too long"))?;
    if crc != crc32c::crc32c(&bytes[..FILE_LEN - 4]) {
        return Err(damaged("its checksum is wrong"));
    }
    Ok(identity)
}

pub const IDENTITY_FILE: &str = "safekeeper.identity";
const IDENTITY_TMP: &str = "safekeeper.identity.tmp";
const LOCK_FILE: &str = "safekeeper.lock";
const MAGIC: &[u8; 8] = b"SKIDENT\n";
const VERSION: u32 = 1;
const FILE_LEN: usize = 40;

#[cfg(test)]
mod tests {
    use super::*;

    fn temp_dir() -> tempfile::TempDir {
        tempfile::tempdir().expect("a temporary directory")
    }

    fn init(dir: &Path, id: u64) -> Result<(), DataDirError> {
        DataDir::init(dir, MemberId(id), Incarnation(0xABCD))
    }

    #[test]
    fn init_makes_a_directory_that_opens_once() {
        let temp = temp_dir();
        let dir = temp.path().join("sk1");
        init(&dir, 7).unwrap();
        let opened = DataDir::open(&dir).unwrap();
        let identity = Identity {
            id: MemberId(7),
            incarnation: Incarnation(0xABCD),
        };
        assert_eq!(opened.identity(), identity);
        assert_eq!(read_identity(&dir).unwrap(), identity);

        let error = DataDir::open(&dir).unwrap_err();
        let pid = std::process::id().to_string();
        assert!(
            matches!(&error, DataDirError::InUse { holder, .. } if *holder == pid),
            "{error}"
        );
        drop(opened);
        DataDir::open(&dir).unwrap();
    }

    #[test]
    fn init_touches_nothing_that_is_there() {
        let temp = temp_dir();
        init(temp.path(), 1).unwrap();
        let again = init(temp.path(), 2).unwrap_err();
        assert!(matches!(again, DataDirError::AlreadyInitialized(_)));
        assert_eq!(read_identity(temp.path()).unwrap().id, MemberId(1));

        let other = temp_dir();
        std::fs::write(other.path().join("precious"), "x").unwrap();
        let error = init(other.path(), 1).unwrap_err();
        assert!(matches!(error, DataDirError::NotEmpty { holds, .. } if holds == "precious"));
        assert!(matches!(
            init(&temp.path().join("z"), 0),
            Err(DataDirError::InvalidId)
        ));
    }

    #[test]
    fn a_directory_without_the_marker_is_refused() {
        let temp = temp_dir();
        let error = DataDir::open(temp.path()).unwrap_err();
        assert!(matches!(error, DataDirError::NotADataDir(_)), "{error}");
        // Nothing was made there either: it may be a mount point.
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
    }

    #[test]
    fn every_flipped_bit_and_every_other_length_is_noticed() {
        let identity = Identity {
            id: MemberId(3),
            incarnation: Incarnation(u128::MAX / 3),
        };
        let dir = Path::new("d");
        let good = encode(&identity);
        assert_eq!(decode(&good, dir).unwrap(), identity);
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bytes, dir).is_err(), "bit {bit}");
        }
        for len in 0..good.len() {
            assert!(decode(&good[..len], dir).is_err(), "{len} bytes");
        }
        assert!(decode(&[good.as_slice(), &[0]].concat(), dir).is_err());
    }

    #[test]
    fn an_unknown_version_is_refused_by_its_number() {
        let mut bytes = encode(&Identity {
            id: MemberId(3),
            incarnation: Incarnation(1),
        });
        bytes[11] = 9;
        let error = decode(&bytes, Path::new("d")).unwrap_err();
        assert!(matches!(
            error,
            DataDirError::UnknownVersion { found: 9, .. }
        ));
    }

    #[test]
    fn golden_bytes() {
        let bytes = encode(&Identity {
            id: MemberId(1),
            incarnation: Incarnation(2),
        });
        let mut want = b"SKIDENT\n\0\0\0\x01".to_vec();
        want.extend([0, 0, 0, 0, 0, 0, 0, 1]);
        want.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        assert_eq!(bytes[..36], want);
        assert_eq!(bytes[36..], crc32c::crc32c(&want).to_be_bytes());
    }
}

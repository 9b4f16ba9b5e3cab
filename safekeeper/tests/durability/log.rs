//! What a test can say about one cluster's log: a data directory, WAL to write, and what the files
//! hold.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;

use safekeeper::control_file::{ControlFile, wal_dir};
use safekeeper::disk::{Disk, RealDisk};
use safekeeper::identity::DataDir;
use safekeeper::segment::wal_format;
use safekeeper::wal_reader::{ReadError, WalReader};
use safekeeper::wal_storage::{OpenError, WalStorage};
use safekeeper_protocol::{
    AcceptorState, ClusterIdentity, Incarnation, Lsn, MemberId, Term, TermEntry, TermHistory, Tli,
};
use safekeeper_wal::synthetic::WalBuilder;

pub const SYSTEM_ID: u64 = 77;
pub const SEGMENT: u64 = 1 << 20;
/// Where the log begins.
pub const START: Lsn = Lsn(3 * SEGMENT);

/// A data directory with one cluster of 1 MB segments.
pub struct LogDir {
    pub temp: tempfile::TempDir,
    pub disk: Arc<dyn Disk>,
    pub state: AcceptorState,
}

pub fn cluster() -> ClusterIdentity {
    ClusterIdentity {
        system_id: SYSTEM_ID,
        name: "main".to_owned(),
        pg_major: 15,
        segment_size: SEGMENT as u32,
    }
}

/// `(tli, start)` of each term, from term 1 on.
pub fn history(entries: &[(u32, Lsn)]) -> TermHistory {
    let entries = (1..)
        .zip(entries)
        .map(|(term, (tli, start_lsn))| TermEntry {
            term: Term(term),
            tli: Tli(*tli),
            start_lsn: *start_lsn,
        });
    TermHistory::new(entries.collect()).expect("a history")
}

pub fn wal_from(lsn: Lsn) -> WalBuilder {
    WalBuilder::new(wal_format(&cluster()).expect("supported"), 1, lsn)
}

impl LogDir {
    pub fn new() -> LogDir {
        let temp = tempfile::tempdir().expect("a temporary directory");
        let disk: Arc<dyn Disk> = Arc::new(RealDisk::new(temp.path()));
        let state = AcceptorState {
            history: history(&[(1, START)]),
            ..AcceptorState::unconfigured(cluster())
        };
        ControlFile::create(disk.clone(), &state).expect("a new cluster");
        LogDir { temp, disk, state }
    }

    pub fn try_open(&self) -> Result<WalStorage, OpenError> {
        WalStorage::open(self.disk.clone(), &cluster(), &self.state)
    }

    pub fn open(&self) -> WalStorage {
        self.try_open().expect("the log opens")
    }

    /// An open log that begins at `START`.
    pub fn begin(&self) -> WalStorage {
        let mut storage = self.open();
        storage.truncate(Tli(1), START).expect("a log begins");
        storage
    }

    /// A log that holds `wal`, flushed and closed.
    pub fn hold(&self, wal: &WalBuilder) {
        let mut storage = self.begin();
        storage
            .write(Tli(1), wal.start(), wal.bytes())
            .expect("sound WAL");
        storage.flush().expect("a flush");
    }

    /// Gives the directory an identity, as `init` does.
    pub fn make_data_dir(&self) {
        let made = self.temp.path().join("made");
        DataDir::init(&made, MemberId(1), Incarnation(5)).expect("an empty directory");
        let identity = "safekeeper.identity";
        let to = self.temp.path().join(identity);
        std::fs::rename(made.join(identity), to).expect("a move");
        std::fs::remove_dir(made).expect("it is empty");
    }

    /// Writes `state` to the control file.
    pub fn persist(&self) {
        let opened = ControlFile::open(self.disk.clone(), SYSTEM_ID);
        let (mut control, _) = opened.expect("the control file");
        control.persist(&self.state).expect("persisted");
    }

    pub fn wal_dir(&self) -> PathBuf {
        self.temp.path().join(wal_dir(SYSTEM_ID))
    }

    pub fn reader(&self) -> WalReader {
        let (disk, history) = (self.disk.clone(), &self.state.history);
        WalReader::new(disk, &cluster(), history, &[]).expect("supported")
    }

    /// What a consumer gets.
    pub fn read(&self, begin: Lsn, end: Lsn) -> Result<Vec<u8>, ReadError> {
        let mut bytes = vec![0; (end - begin) as usize];
        let read = self.reader().read(begin, &mut bytes);
        read.map(|()| bytes)
    }

    /// All files of the WAL directory, but for one that is given another name meanwhile.
    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let entries = std::fs::read_dir(self.wal_dir()).expect("the WAL directory");
        let files = entries.filter_map(|entry| {
            let entry = entry.expect("an entry");
            let name = entry.file_name().into_string().expect("an ASCII name");
            match std::fs::read(entry.path()) {
                Err(error) if error.kind() == ErrorKind::NotFound => None,
                bytes => Some((name, bytes.expect("a file"))),
            }
        });
        files.collect()
    }

    pub fn segment_names(&self) -> Vec<String> {
        let names = self.files().into_keys();
        names.filter(|name| !name.ends_with(".tmp")).collect()
    }

    /// Changes one byte of the WAL on disk.
    pub fn flip(&self, lsn: Lsn) {
        let file = format!(
            "00000001{:08X}{:08X}",
            lsn.0 >> 32,
            (lsn.0 & 0xFFFF_FFFF) / SEGMENT
        );
        let path = self.wal_dir().join(file);
        let mut bytes = std::fs::read(&path).expect("the segment");
        bytes[(lsn.0 % SEGMENT) as usize] ^= 0x04;
        std::fs::write(&path, bytes).expect("written back");
    }

    /// Every byte at or behind `end`, in every segment, is zero.
    pub fn assert_zero_behind(&self, end: Lsn) {
        for (name, bytes) in self.files() {
            let Some(segno) = name.get(16..24).filter(|_| name.len() == 24) else {
                continue;
            };
            let start = u64::from_str_radix(segno, 16).expect("a segment's name") * SEGMENT;
            assert_eq!(bytes.len() as u64, SEGMENT, "{name}");
            let from = end.0.saturating_sub(start).min(SEGMENT) as usize;
            let first = bytes[from..].iter().position(|&byte| byte != 0);
            assert_eq!(first, None, "{name} is not zero behind {end}");
        }
    }
}

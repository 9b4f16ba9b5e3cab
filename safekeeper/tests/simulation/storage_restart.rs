//! The model of the storage is started again: what may be found, what may be read, and what decays.

use std::path::Path;
use std::sync::Arc;

use safekeeper::control_file::{ControlFile, ControlFileError, wal_dir};
use safekeeper::disk::Disk;
use safekeeper::wal_reader::{ReadError, WalReader};
use safekeeper::wal_storage::{OpenError, WalStorage};
use safekeeper_protocol::{AcceptorState, Lsn};
use safekeeper_wal::{PAGE_SIZE, parse_segment_file_name};

use super::super::disk::FaultRates;
use super::super::expected_log::ExpectedLog;
use super::{Model, SYSTEM_ID, Underway, timeline_files};

impl Model {
    /// The process is gone, or the power was; then the log is found again, maybe not at once.
    pub fn restart(&mut self) {
        self.counts.n_restarts += 1;
        let (control, state, storage) = loop {
            self.storage = None;
            self.control = None;
            match self.random.chance(500) {
                true => self.disk.cut_power(),
                false => self.disk.kill(),
            }
            self.disk.set_rates(FaultRates::default());
            let in_trouble = self.random.chance(400);
            if in_trouble {
                self.trouble();
                self.disk.crash_after(self.random.range(1..25));
            }
            if let Some(opened) = self.open(in_trouble) {
                break opened;
            }
            self.counts.n_failed_recoveries += 1;
        };
        self.disk.disarm();
        self.disk.set_rates(FaultRates::default());
        let (begin, end) = (storage.oldest_lsn(), storage.flush_lsn());
        self.check_found(&state, begin, end);
        self.state = state;
        self.storage = Some(storage);
        self.control = Some(control);
        self.underway = Underway::Nothing;
        self.elected = false;
        self.log.cut(end);
        (self.written, self.flushed) = (end, end);
        self.look_at(begin, end, None);
    }

    /// None if the disk fails, which it may only when it is in trouble.
    fn open(&mut self, in_trouble: bool) -> Option<(ControlFile, AcceptorState, WalStorage)> {
        let shared: Arc<dyn Disk> = Arc::new(self.disk.clone());
        if let Err(error) = shared.sync_everything() {
            assert!(in_trouble, "a sound disk can't be synced: {error}");
            return None;
        }
        let (control, state) = match ControlFile::open(shared.clone(), SYSTEM_ID) {
            Ok(opened) => opened,
            Err(ControlFileError::Storage(_)) if in_trouble => return None,
            Err(error) => panic!("the control file is lost: {error}"),
        };
        match WalStorage::open(shared, &self.cluster, &state) {
            Ok(storage) => Some((control, state, storage)),
            Err(OpenError::Storage(_)) if in_trouble => None,
            Err(error) => panic!("the log is not found: {error}"),
        }
    }

    /// Is it a log that the model allows?
    fn check_found(&mut self, state: &AcceptorState, begin: Lsn, end: Lsn) {
        let persisted = self.state.commit_lsn;
        assert!(state.commit_lsn >= persisted, "what was persisted is there");
        let (flushed, written) = (self.flushed, self.written);
        let (lowest, highest) = match std::mem::replace(&mut self.underway, Underway::Nothing) {
            Underway::Nothing => (flushed, self.log.zeros_end(written)),
            Underway::Cut(to, next) if state.history == next => (to, to),
            Underway::Cut(to, _) => (to.min(flushed), self.log.zeros_end(written)),
            // What was there may be whole by the zeros that were to come.
            Underway::Anew(_, next) if state.history != next && begin == self.log.begin() => {
                (begin, self.log.zeros_end(written))
            }
            Underway::Anew(at, next) => {
                let is_new = state.history == next;
                assert!(
                    begin == at || !is_new && !begin.is_valid(),
                    "it begins at {begin}"
                );
                self.log = ExpectedLog::new(self.format, begin);
                (begin, begin)
            }
        };
        assert!(
            lowest <= end && end <= highest,
            "the log ends at {end}, and not from {lowest} to {highest}"
        );
        assert_eq!(end, self.log.record_end(end), "it ends with a record");
    }

    /// Reads the log, which must be as expected; what has decayed, at `decayed`, may be refused.
    pub fn look_at(&mut self, begin: Lsn, end: Lsn, decayed: Option<Lsn>) {
        if begin >= end {
            return;
        }
        let shared: Arc<dyn Disk> = Arc::new(self.disk.clone());
        let history = &self.state.history;
        let files = timeline_files(history);
        let reader = WalReader::new(shared, &self.cluster, history, &files);
        let mut reader = reader.expect("supported");
        let mut found = vec![0; (end - begin) as usize];
        match reader.read(begin, &mut found) {
            Ok(()) => {}
            Err(ReadError::Damaged(_)) if decayed.is_some() => {
                self.counts.n_refused_when_decayed += 1;
                return;
            }
            Err(error) => panic!("what recovery found can't be read: {error}"),
        }
        let expected = self.log.bytes(begin..end);
        let differs = found.iter().zip(expected).position(|(a, b)| a != b);
        let Some(at) = differs else { return };
        let (lsn, bits) = (begin + at as u64, found[at] ^ expected[at]);
        let hidden = decayed == Some(lsn) && self.log.is_unchecked(lsn, bits, begin);
        assert!(hidden, "it holds another byte at {lsn}, by {bits:#x}");
    }

    /// A bit flips in something at rest.
    pub fn decay(&mut self) {
        self.disk.set_capacity(u64::MAX);
        let (begin, end) = (self.storage().oldest_lsn(), self.storage().flush_lsn());
        self.storage = None;
        self.control = None;
        self.disk.kill();
        let shared: Arc<dyn Disk> = Arc::new(self.disk.clone());
        let mut decayed = None;
        let history = |path: &Path| path.extension().is_some_and(|name| name == "history");
        match self.random.below(10) {
            0 => {
                let control = |path: &Path| path.file_name().is_some_and(|name| name == "control");
                self.disk.flip_bit(control).expect("a control file");
                let opened = ControlFile::open(shared, SYSTEM_ID);
                assert!(matches!(opened, Err(ControlFileError::Damaged { .. })));
                self.counts.n_refused_when_decayed += 1;
                return;
            }
            1..=3 if self.disk.flip_bit(history).is_some() => {}
            _ if begin < end => decayed = Some(self.flip_wal(begin, end)),
            _ => return,
        }
        self.look_at(begin, end, decayed);
        match WalStorage::open(shared, &self.cluster, &self.state) {
            Ok(storage) => {
                let (begin, end) = (storage.oldest_lsn(), storage.flush_lsn());
                assert!(end >= self.state.commit_lsn, "the log ends at {end}");
                if decayed.is_none() {
                    assert_eq!(end, self.flushed, "a history file's decay cuts the log");
                }
                self.look_at(begin, end, decayed);
            }
            Err(OpenError::Corrupt { .. }) => self.counts.n_refused_when_decayed += 1,
            Err(error) => panic!("{error}"),
        }
    }

    /// Half of the time in the header of a page, most of whose fields no checksum covers.
    fn flip_wal(&mut self, begin: Lsn, end: Lsn) -> Lsn {
        let mut lsn = begin + self.random.below(end - begin);
        if self.random.chance(500) {
            lsn = lsn.segment_start(PAGE_SIZE) + self.random.below(24);
        }
        let size = self.format.segment_size;
        let names = self.disk.list(&wal_dir(SYSTEM_ID)).expect("a sound disk");
        let of_segment = |name: &&String| {
            let parsed = parse_segment_file_name(name, size);
            parsed.is_some_and(|(_, segno)| segno == lsn.segno(size.bytes()))
        };
        let newest = names.iter().rfind(of_segment);
        let path = wal_dir(SYSTEM_ID).join(newest.expect("a segment of the log"));
        let offset = lsn.segment_offset(size.bytes()) as usize;
        let bit = self.random.below(8) as u32;
        self.disk.flip_bit_at(&path, offset, bit);
        lsn
    }
}

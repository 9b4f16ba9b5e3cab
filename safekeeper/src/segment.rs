//! Segments: the files of a cluster's WAL, and which of them holds the byte at a position.
//!
//! ```text
//!   D/<system_id>/wal/
//!     000000010000000000000002     a segment, named and filled as in pg_wal
//!     000000020000000000000002     the same segment of the next timeline: a copy up to the switch
//!     00000002.history             where timeline 2 left timeline 1
//!     *.tmp                        being made, or a spare: means nothing, removed at start
//! ```
//!
//! A segment has its full size and its full set of disk blocks from the moment it has its name:
//! under a temporary name it is filled with zeros, or, while WAL comes in bulk and where the file system can
//! do that, only given its blocks, which read as zeros; then it is synced, renamed, and the directory synced.
//! So whoever finds the name finds the whole file, writing into it allocates nothing, and a sync of
//! its data is enough. What the log has not reached is zero.
//!
//! Which file? A segment in which a timeline ended exists once for each of the two, with the same
//! bytes up to the switch. It is read from the newest timeline of the log that has such a file.
//!
//! Unknown here: where the log ends, and what its bytes mean.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safekeeper_protocol::{ClusterIdentity, Lsn, TermHistory, Tli};
use safekeeper_wal::{
    PgVersion, SegNo, SegmentSize, TimelineHistory, TimelineSwitch, WalFormat,
    parse_segment_file_name, segment_file_name,
};

use crate::control_file::wal_dir;
use crate::disk::{Disk, DiskFile, FileId, StorageError};

/// A cluster whose WAL this build can't read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnsupportedCluster {
    #[error("PostgreSQL {0} is not supported, this build knows 15, 16, 17 and 18")]
    Version(u16),
    #[error(transparent)]
    SegmentSize(#[from] safekeeper_wal::InvalidSegmentSize),
}

/// What must be known of a cluster to read its WAL.
pub fn wal_format(cluster: &ClusterIdentity) -> Result<WalFormat, UnsupportedCluster> {
    let version = PgVersion::ALL
        .into_iter()
        .find(|version| version.major() == cluster.pg_major)
        .ok_or(UnsupportedCluster::Version(cluster.pg_major))?;
    Ok(WalFormat {
        version,
        segment_size: SegmentSize::new(cluster.segment_size)?,
        system_id: cluster.system_id,
    })
}

/// One segment file, by what its name says. Ordered as the WAL is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SegmentId {
    pub segno: SegNo,
    pub tli: Tli,
}

/// The directory of one cluster's segment files.
#[derive(Clone, Debug)]
pub struct SegmentDir {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    size: SegmentSize,
}

impl SegmentDir {
    pub fn new(disk: Arc<dyn Disk>, format: &WalFormat) -> SegmentDir {
        SegmentDir {
            disk,
            dir: wal_dir(format.system_id),
            size: format.segment_size,
        }
    }

    pub fn disk(&self) -> &dyn Disk {
        self.disk.as_ref()
    }

    /// Relative to the data directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Bytes in a segment.
    pub fn size(&self) -> u32 {
        self.size.bytes()
    }

    /// Position of the first byte of a segment.
    pub fn start(&self, segno: SegNo) -> Lsn {
        Lsn(segno.saturating_mul(u64::from(self.size())))
    }

    pub fn name(&self, id: SegmentId) -> String {
        segment_file_name(id.tli.0, id.segno, self.size)
    }

    pub fn path(&self, id: SegmentId) -> PathBuf {
        self.dir.join(self.name(id))
    }

    /// All segments there are, in order.
    pub fn list(&self) -> Result<Vec<SegmentId>, StorageError> {
        let names = self.disk.list(&self.dir)?;
        let parsed = names
            .iter()
            .filter_map(|name| parse_segment_file_name(name, self.size));
        let mut ids: Vec<_> = parsed
            .map(|(tli, segno)| SegmentId {
                segno,
                tli: Tli(tli),
            })
            .collect();
        ids.sort_unstable();
        Ok(ids)
    }

    pub fn open(&self, id: SegmentId) -> Result<Box<dyn DiskFile>, StorageError> {
        self.disk.open(&self.path(id))
    }

    pub fn open_read_only(&self, id: SegmentId) -> Result<Box<dyn DiskFile>, StorageError> {
        self.disk.open_read_only(&self.path(id))
    }

    /// Fills a file that has no segment's name with zeros, its whole size of them, and syncs it.
    /// `tmp` may be there already, with anything in it. If there is no space for it, it is gone.
    pub fn make_zeroed(&self, tmp: &Path) -> Result<(), StorageError> {
        self.make_under(tmp, |file| zero(file, 0, self.size()))
    }

    /// The same without writing a byte, where the file system can do that: half the work, but each
    /// flush of what is later written there needs the file system's journal.
    pub fn make_allocated(&self, tmp: &Path) -> Result<(), StorageError> {
        self.make_under(tmp, |file| {
            file.set_len(0)?;
            match file.allocate(self.size().into())? {
                true => Ok(()),
                false => zero(file, 0, self.size()),
            }
        })
    }

    /// As [`SegmentDir::make_zeroed`], with the first `len` bytes of `source` in front.
    pub fn make_copy(
        &self,
        tmp: &Path,
        source: &dyn DiskFile,
        len: u32,
    ) -> Result<(), StorageError> {
        self.make_under(tmp, |file| {
            let mut buffer = vec![0; CHUNK as usize];
            let mut offset = 0;
            while offset < len {
                let part = &mut buffer[..CHUNK.min(len - offset) as usize];
                let n_read = source.read_at(part, offset.into())?;
                if n_read < part.len() {
                    return Err(self.broken(tmp, "copy to", io::ErrorKind::UnexpectedEof));
                }
                file.write_at(part, offset.into())?;
                offset += n_read as u32;
            }
            zero(file, len, self.size())
        })
    }

    /// Gives a file made by one of these its name, and makes that durable.
    ///
    /// The name must be free: what is under it might be WAL that somebody was promised.
    pub fn install(&self, tmp: &Path, id: SegmentId) -> Result<(), StorageError> {
        let path = self.path(id);
        if self.disk.file_id(&path)?.is_some() {
            return Err(self.broken(&path, "make", io::ErrorKind::AlreadyExists));
        }
        self.disk.rename(tmp, &path)?;
        self.disk.sync_dir(&self.dir)
    }

    /// Makes all of a segment from `offset` on zero, and durable. A file that lacks its end gets
    /// it back.
    ///
    /// What a power cut leaves of it must be read as a log that ends at `offset`, or as the one
    /// that was there, and not as one with holes: no checksum covers a record that was lost in a
    /// crash of the server. So the word at `offset`, which holds the length of the next record or
    /// the magic of its page, goes first and alone. Without it nothing behind is read any more.
    pub fn zero_tail(&self, id: SegmentId, offset: u32) -> Result<(), StorageError> {
        let file = self.open(id)?;
        let mut buffer = vec![0; CHUNK as usize];
        let mut at = offset;
        let mut is_cut = false;
        while at < self.size() {
            let part = &mut buffer[..CHUNK.min(self.size() - at) as usize];
            let n_read = file.read_at(part, at.into())?;
            // Mostly it is zero already, and then it need not be written.
            if n_read < part.len() || part.iter().any(|&byte| byte != 0) {
                if !is_cut {
                    zero(file.as_ref(), offset, self.size().min(offset + WORD))?;
                    file.sync_data()?;
                    is_cut = true;
                }
                zero(file.as_ref(), at, at + part.len() as u32)?;
            }
            at += part.len() as u32;
        }
        if file.size()? != u64::from(self.size()) {
            file.set_len(self.size().into())?;
        }
        file.sync_all()
    }

    fn make_under(
        &self,
        tmp: &Path,
        fill: impl Fn(&dyn DiskFile) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        let made = self.disk.open(tmp).or_else(|error| match error {
            error if error.is_not_found() => self.disk.create(tmp),
            error => Err(error),
        });
        let made = made.and_then(|file| {
            fill(file.as_ref())?;
            file.set_len(self.size().into())?;
            file.sync_all()
        });
        match made {
            Err(error) if error.is_no_space() => {
                // Half a segment is of no use, and somebody else may need its space.
                match self.disk.remove(tmp) {
                    Err(error) if !error.is_not_found() => Err(error),
                    _ => Err(error),
                }
            }
            other => other,
        }
    }

    fn broken(&self, path: &Path, doing: &'static str, kind: io::ErrorKind) -> StorageError {
        StorageError {
            doing,
            path: path.to_owned(),
            source: kind.into(),
        }
    }
}

/// Enough for the disk to work in long strokes; no system call is worth less than that.
const CHUNK: u32 = 256 << 10;
/// What no device writes in part, be it disk or memory. Records and pages begin at a multiple.
const WORD: u32 = 8;
static ZEROS: [u8; CHUNK as usize] = [0; CHUNK as usize];

fn zero(file: &dyn DiskFile, begin: u32, end: u32) -> Result<(), StorageError> {
    let mut offset = begin;
    while offset < end {
        let len = CHUNK.min(end - offset);
        file.write_at(&ZEROS[..len as usize], offset.into())?;
        offset += len;
    }
    Ok(())
}

/// The timelines a log runs over, oldest first: each with the position of its first byte. Both
/// grow strictly. Before the first position lies WAL of the first timeline, as far as is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timelines {
    begins: Vec<(Tli, Lsn)>,
}

impl Timelines {
    pub fn new(history: &TermHistory) -> Timelines {
        let mut timelines = Timelines::default();
        for entry in history.entries() {
            if timelines.last() != Some(entry.tli) {
                timelines.go_on(entry.tli, entry.start_lsn);
            }
        }
        timelines
    }

    /// From `lsn` on the log is of timeline `tli`.
    pub fn go_on(&mut self, tli: Tli, lsn: Lsn) {
        self.begins.retain(|(_, begin)| *begin < lsn);
        if self.last() != Some(tli) {
            self.begins.push((tli, lsn));
        }
    }

    /// The log ends at `lsn`. A timeline that would begin there has no byte yet, and no file.
    pub fn cut(&mut self, lsn: Lsn) {
        let first = self.begins.first().copied();
        self.begins.retain(|(_, begin)| *begin < lsn);
        if self.begins.is_empty() {
            self.begins.extend(first);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.begins.is_empty()
    }

    pub fn contains(&self, tli: Tli) -> bool {
        self.begins.iter().any(|(known, _)| *known == tli)
    }

    pub fn last(&self) -> Option<Tli> {
        self.begins.last().map(|(tli, _)| *tli)
    }

    /// The files in which the bytes `begin..end` of one segment may stand, newest first.
    /// Where the range is empty, those in which the next byte would.
    pub fn candidates(&self, begin: Lsn, end: Lsn) -> impl Iterator<Item = Tli> + '_ {
        let ends = self.begins.iter().skip(1).map(|(_, next)| *next);
        let ends = ends.chain([Lsn(u64::MAX)]);
        let spans = self.begins.iter().zip(ends).enumerate();
        let tlis = spans.filter_map(move |(i, ((tli, from), to))| {
            let reaches = i == 0 || *from < end.max(begin + 1);
            (reaches && begin < to).then_some(*tli)
        });
        tlis.collect::<Vec<_>>().into_iter().rev()
    }

    /// The same as a server's history file has it.
    pub fn to_history(&self) -> TimelineHistory {
        let tli = self.last().map_or(1, |tli| tli.0);
        let ancestors = self.begins.windows(2).map(|pair| TimelineSwitch {
            tli: pair[0].0.0,
            end_lsn: pair[1].1,
            reason: String::new(),
        });
        TimelineHistory {
            tli,
            ancestors: ancestors.collect(),
        }
    }
}

/// Reads a log's bytes by position, from whichever file they are in.
#[derive(Debug)]
pub struct SegmentReader {
    segments: SegmentDir,
    timelines: Timelines,
    open: Option<OpenSegment>,
}

#[derive(Debug)]
struct OpenSegment {
    id: SegmentId,
    file: Box<dyn DiskFile>,
    file_id: FileId,
    /// It had its name when the disk counted so many lost ones.
    names_lost: Option<u64>,
}

impl SegmentReader {
    pub fn new(segments: SegmentDir, timelines: Timelines) -> SegmentReader {
        SegmentReader {
            segments,
            timelines,
            open: None,
        }
    }

    /// Fills `buffer` from `lsn` on, at most up to the end of the segment. Returns how many bytes
    /// it got: 0 where there is no file, or where it is too short.
    pub fn read(&mut self, lsn: Lsn, buffer: &mut [u8]) -> Result<usize, StorageError> {
        let size = self.segments.size();
        let (segno, offset) = (lsn.segno(size), lsn.segment_offset(size));
        if self.open.as_ref().is_none_or(|open| open.id.segno != segno) {
            self.open = self.open_segment(segno)?;
        }
        let len = buffer.len().min((size - offset) as usize);
        match &self.open {
            Some(open) => open.file.read_at(&mut buffer[..len], offset.into()),
            None => Ok(0),
        }
    }

    /// The file last read from has still the name it was opened by. If so, it had not been taken
    /// for another use when it was read: files lose their name before they lose their contents.
    pub fn still_there(&mut self) -> Result<bool, StorageError> {
        let Some(open) = &mut self.open else {
            return Ok(true);
        };
        let disk = self.segments.disk();
        // Mostly no file of the disk has lost its name, and then there is no need to ask for this one's.
        let names_lost = disk.names_lost();
        if names_lost.is_some() && names_lost == open.names_lost {
            return Ok(true);
        }
        let has_name = disk.file_id(&self.segments.path(open.id))? == Some(open.file_id);
        if has_name {
            open.names_lost = names_lost;
        }
        Ok(has_name)
    }

    /// The segment of the newest timeline that can hold bytes of segment `segno`, if there is one.
    pub fn find(&self, segno: SegNo) -> Result<Option<SegmentId>, StorageError> {
        for id in self.candidates(segno) {
            let path = self.segments.path(id);
            if self.segments.disk().file_id(&path)?.is_some() {
                return Ok(Some(id));
            }
        }
        Ok(None)
    }

    /// Name of the file in which a reader would expect the byte at `lsn`.
    pub fn expected_name(&self, lsn: Lsn) -> String {
        let tli = self.timelines.candidates(lsn, lsn).next().unwrap_or(Tli(1));
        let segno = lsn.segno(self.segments.size());
        self.segments.name(SegmentId { segno, tli })
    }

    /// Opens files anew from now on.
    pub fn close(&mut self) {
        self.open = None;
    }

    fn candidates(&self, segno: SegNo) -> impl Iterator<Item = SegmentId> + '_ {
        let begin = self.segments.start(segno);
        let end = Lsn(begin.0.saturating_add(self.segments.size().into()));
        let tlis = self.timelines.candidates(begin, end);
        tlis.map(move |tli| SegmentId { segno, tli })
    }

    fn open_segment(&self, segno: SegNo) -> Result<Option<OpenSegment>, StorageError> {
        let names_lost = self.segments.disk.names_lost();
        for id in self.candidates(segno) {
            match self.segments.disk.open_read_only(&self.segments.path(id)) {
                Ok(file) => {
                    return Ok(Some(OpenSegment {
                        id,
                        file_id: file.file_id()?,
                        file,
                        names_lost,
                    }));
                }
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::RealDisk;
    use safekeeper_protocol::{Term, TermEntry};

    const MB: u64 = 1 << 20;

    fn timelines(entries: &[(u32, u64)]) -> Timelines {
        let entries = (1..).zip(entries).map(|(term, (tli, lsn))| TermEntry {
            term: Term(term),
            tli: Tli(*tli),
            start_lsn: Lsn(*lsn),
        });
        Timelines::new(&TermHistory::new(entries.collect()).unwrap())
    }

    fn segments() -> (tempfile::TempDir, SegmentDir) {
        let temp = tempfile::tempdir().expect("a temporary directory");
        let disk = Arc::new(RealDisk::new(temp.path()));
        let format = WalFormat {
            version: PgVersion::V15,
            segment_size: SegmentSize::MIN,
            system_id: 5,
        };
        std::fs::create_dir_all(temp.path().join("5/wal")).unwrap();
        (temp, SegmentDir::new(disk, &format))
    }

    fn read_file(temp: &tempfile::TempDir, name: &str) -> Vec<u8> {
        std::fs::read(temp.path().join("5/wal").join(name)).unwrap()
    }

    #[test]
    fn an_allocated_segment_is_zero_whatever_the_file_held() {
        let (temp, segments) = segments();
        let spare = temp.path().join("5/wal/spare");
        std::fs::write(&spare, vec![7; MB as usize + 1]).unwrap();
        segments
            .make_allocated(Path::new("5/wal/spare"))
            .expect("made");
        assert!(read_file(&temp, "spare") == vec![0; MB as usize]);
    }

    #[test]
    fn a_segment_is_looked_for_on_the_newest_timeline_that_reaches_it() {
        let t = timelines(&[
            (1, MB),
            (1, 2 * MB),
            (2, 2 * MB + 100),
            (4, 3 * MB),
            (4, 4 * MB),
        ]);
        for (segno, want) in [(0, &[1][..]), (1, &[1]), (2, &[2, 1]), (3, &[4]), (9, &[4])] {
            let (begin, end) = (Lsn(segno * MB), Lsn((segno + 1) * MB));
            let tlis: Vec<_> = t.candidates(begin, end).map(|tli| tli.0).collect();
            assert_eq!(tlis, want, "segment {segno}");
        }
        for (lsn, want) in [(2 * MB + 99, 1), (2 * MB + 100, 2), (3 * MB, 4), (0, 1)] {
            let first = t.candidates(Lsn(lsn), Lsn(lsn)).next();
            assert_eq!(first, Some(Tli(want)), "{lsn}");
        }
        let history = t.to_history();
        for lsn in [0, MB, 2 * MB + 99, 2 * MB + 100, 3 * MB - 1, 3 * MB, 7 * MB] {
            let first = t.candidates(Lsn(lsn), Lsn(lsn)).next();
            assert_eq!(first, Some(Tli(history.tli_at(Lsn(lsn)))), "{lsn}");
        }
    }

    #[test]
    fn cutting_and_going_on_drops_timelines_that_begin_later() {
        let all = timelines(&[(1, MB), (2, 2 * MB), (3, 3 * MB)]);
        let cut = |lsn| {
            let mut cut = all.clone();
            cut.cut(Lsn(lsn));
            cut
        };
        assert_eq!(cut(4 * MB), all);
        assert_eq!(cut(3 * MB), timelines(&[(1, MB), (2, 2 * MB)]));
        assert_eq!(cut(2 * MB), timelines(&[(1, MB)]));
        assert_eq!(cut(MB), timelines(&[(1, MB)]));
        let mut on = cut(3 * MB);
        on.go_on(Tli(5), Lsn(3 * MB));
        assert_eq!(on, timelines(&[(1, MB), (2, 2 * MB), (5, 3 * MB)]));
        on.go_on(Tli(6), Lsn(3 * MB));
        assert_eq!(on, timelines(&[(1, MB), (2, 2 * MB), (6, 3 * MB)]));
    }

    #[test]
    fn a_segment_appears_whole_and_never_over_another() {
        let (temp, segments) = segments();
        let id = SegmentId {
            segno: 2,
            tli: Tli(1),
        };
        let tmp = segments.dir().join("a.tmp");
        std::fs::write(temp.path().join(&tmp), vec![7; 2 * MB as usize]).unwrap();
        segments.make_zeroed(&tmp).unwrap();
        assert_eq!(segments.list().unwrap(), []);
        segments.install(&tmp, id).unwrap();
        assert_eq!(segments.list().unwrap(), [id]);
        assert_eq!(read_file(&temp, &segments.name(id)), vec![0; MB as usize]);

        segments.open(id).unwrap().write_at(b"precious", 0).unwrap();
        segments.make_zeroed(&tmp).unwrap();
        let error = segments.install(&tmp, id).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::AlreadyExists);
        assert!(read_file(&temp, &segments.name(id)).starts_with(b"precious"));
    }

    #[test]
    fn a_copy_ends_at_the_switch_and_a_tail_can_be_zeroed() {
        let (temp, segments) = segments();
        let [old, new] = [1, 2].map(|tli| SegmentId {
            segno: 2,
            tli: Tli(tli),
        });
        // Too short, as a file copied in part would be.
        let short = vec![9; 600_000];
        std::fs::write(temp.path().join(segments.path(old)), &short).unwrap();
        let source = segments.open(old).unwrap();
        let tmp = segments.dir().join("a.tmp");
        let error = segments
            .make_copy(&tmp, source.as_ref(), 600_001)
            .unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::UnexpectedEof);
        segments.make_copy(&tmp, source.as_ref(), 400_001).unwrap();
        segments.install(&tmp, new).unwrap();
        let mut want = vec![0; MB as usize];
        want[..400_001].fill(9);
        assert_eq!(read_file(&temp, &segments.name(new)), want);

        segments.zero_tail(old, 300_000).unwrap();
        want[300_000..].fill(0);
        assert_eq!(read_file(&temp, &segments.name(old)), want);
    }

    #[test]
    fn bytes_come_from_the_newer_file_and_a_renamed_one_is_noticed() {
        let (temp, segments) = segments();
        let [old, new] = [1, 2].map(|tli| SegmentId {
            segno: 2,
            tli: Tli(tli),
        });
        let path = |id| temp.path().join(segments.path(id));
        std::fs::write(path(old), vec![1; MB as usize]).unwrap();
        let switch = timelines(&[(1, MB), (2, 2 * MB + 100)]);
        let mut reader = SegmentReader::new(segments.clone(), switch);
        let mut buffer = [0; 4];
        assert_eq!(reader.read(Lsn(2 * MB), &mut buffer).unwrap(), 4);
        assert_eq!(buffer, [1; 4]);
        std::fs::write(path(new), vec![2; MB as usize]).unwrap();
        reader.close();
        assert_eq!(reader.read(Lsn(3 * MB - 2), &mut buffer).unwrap(), 2);
        assert_eq!(buffer, [2, 2, 1, 1]);
        assert!(reader.still_there().unwrap());
        // Another file loses its name, and then this one.
        segments.disk().remove(&segments.path(old)).unwrap();
        assert!(reader.still_there().unwrap());
        let spare = segments.dir().join("spare");
        segments.disk().rename(&segments.path(new), &spare).unwrap();
        assert!(!reader.still_there().unwrap());
        assert!(!reader.still_there().unwrap(), "and it stays so");
        assert_eq!(reader.read(Lsn(3 * MB), &mut buffer).unwrap(), 0);
        assert_eq!(
            reader.expected_name(Lsn(3 * MB)),
            "000000020000000000000003"
        );
    }

    #[test]
    fn clusters_of_another_shape_are_named() {
        let cluster = |pg_major, segment_size| ClusterIdentity {
            system_id: 1,
            name: String::new(),
            pg_major,
            segment_size,
        };
        assert!(wal_format(&cluster(15, 1 << 20)).is_ok());
        let error = wal_format(&cluster(14, 1 << 20)).unwrap_err();
        assert_eq!(error, UnsupportedCluster::Version(14));
        let error = wal_format(&cluster(15, 12345)).unwrap_err();
        assert!(error.to_string().contains("12345"), "{error}");
    }
}

//! Timeline history files: the server's own, kept byte for byte beside the WAL.
//!
//! They serve two readers. A standby asks for them when it follows a switch. And the decoder learns
//! from them which timeline every page must be of: the term history tells where *our* log changed
//! timelines, a history file also where that happened before our log began.
//!
//! A file is written under a temporary name, synced, and renamed. Replacing several is not one
//! step, and need not be: a crash in between leaves a mixture, but on every timeline of the log
//! below its end old and new files say the same, and the acceptor takes the history behind it only
//! after all are in place.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use safekeeper_protocol::{Lsn, TimelineFile, Tli};
use safekeeper_wal::{TimelineHistory, TimelineSwitch, history_file_name, parse_history_file_name};

use crate::disk::{Disk, StorageError};
use crate::segment::Timelines;

/// The history files of one cluster.
#[derive(Debug)]
pub struct TimelineFiles {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    /// What the file of the newest timeline says, if there is one.
    newest: Option<TimelineHistory>,
}

impl TimelineFiles {
    /// `dir` is relative to the data directory.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path) -> Result<TimelineFiles, StorageError> {
        let dir = dir.to_owned();
        let mut files = TimelineFiles {
            disk,
            dir,
            newest: None,
        };
        files.newest = files.read_all()?.first().and_then(parse);
        Ok(files)
    }

    /// What the page headers of a log over `timelines` must say.
    pub fn expected(&self, timelines: &Timelines) -> TimelineHistory {
        expected(self.newest.as_ref(), timelines)
    }

    /// Makes `files` the ones that are there, newest first. Others stay only if the newest of
    /// `files` calls their timeline an ancestor, or if our log runs over it: a standby that is being
    /// promoted may not have come so far, and brings no file of a timeline that it is about to
    /// follow us to.
    pub fn replace(&mut self, files: &[TimelineFile], log: &Timelines) -> Result<(), StorageError> {
        let newest = files.first().and_then(parse);
        let mut changed = false;
        for file in files {
            if self.read(file.tli)?.as_ref() != Some(&file.content) {
                self.write(file)?;
                changed = true;
            }
        }
        for tli in self.list()? {
            let is_ancestor = |history: &TimelineHistory| {
                let mut ancestors = history.ancestors.iter();
                ancestors.any(|ancestor| ancestor.tli == tli.0)
            };
            let wanted = files.iter().any(|file| file.tli == tli);
            let is_ours = log.contains(tli) || newest.as_ref().is_some_and(is_ancestor);
            if !wanted && !is_ours {
                self.disk.remove(&self.path(tli))?;
                changed = true;
            }
        }
        if changed {
            self.disk.sync_dir(&self.dir)?;
        }
        self.newest = self.read_all()?.first().and_then(parse);
        Ok(())
    }

    /// All files, newest first.
    pub fn read_all(&self) -> Result<Vec<TimelineFile>, StorageError> {
        let mut files = Vec::new();
        for tli in self.list()?.into_iter().rev() {
            if let Some(content) = self.read(tli)? {
                files.push(TimelineFile { tli, content });
            }
        }
        Ok(files)
    }

    /// Timelines that have a file, oldest first.
    fn list(&self) -> Result<Vec<Tli>, StorageError> {
        let names = self.disk.list(&self.dir)?;
        let tlis = names
            .iter()
            .filter_map(|name| parse_history_file_name(name));
        Ok(tlis.map(Tli).collect())
    }

    /// Content of a file, if it is there. What is longer than any file we take is not ours.
    fn read(&self, tli: Tli) -> Result<Option<Vec<u8>>, StorageError> {
        let file = match self.disk.open_read_only(&self.path(tli)) {
            Ok(file) => file,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut content = vec![0; TimelineFile::LEN_MAX + 1];
        let len = file.read_at(&mut content, 0)?;
        content.truncate(len);
        Ok((len <= TimelineFile::LEN_MAX).then_some(content))
    }

    fn write(&self, file: &TimelineFile) -> Result<(), StorageError> {
        let tmp = self.dir.join("history.tmp");
        let handle = self.disk.create(&tmp)?;
        handle.write_at(&file.content, 0)?;
        handle.sync_all()?;
        self.disk.rename(&tmp, &self.path(file.tli))
    }

    fn path(&self, tli: Tli) -> PathBuf {
        self.dir.join(history_file_name(tli.0))
    }
}

/// What the page headers of a log over `timelines` must say, to which these files belong, the newest
/// first.
pub fn expected_timelines(files: &[TimelineFile], timelines: &Timelines) -> TimelineHistory {
    expected(files.first().and_then(parse).as_ref(), timelines)
}

fn expected(newest: Option<&TimelineHistory>, timelines: &Timelines) -> TimelineHistory {
    let own = timelines.to_history();
    // A file that is older than the log's last switch can't tell about it. By the rules of the
    // protocol the file comes first; if it did not, our own knowledge has to do.
    let Some(newest) = newest.filter(|newest| newest.tli >= own.tli) else {
        return own;
    };
    // Of the switches within the log the control file knows too, and it has a checksum. A history
    // file has none, and one flipped bit must not make sound WAL look damaged.
    let mut switches = own.ancestors.iter();
    let agrees = |switch: &TimelineSwitch| {
        let before = Lsn(switch.end_lsn.0.saturating_sub(1));
        [before, switch.end_lsn]
            .iter()
            .all(|lsn| newest.tli_at(*lsn) == own.tli_at(*lsn))
    };
    if switches.all(agrees) {
        newest.clone()
    } else {
        own
    }
}

/// What a file says; none if it says nothing a server would write. Then pages are checked by what
/// the term history tells.
fn parse(file: &TimelineFile) -> Option<TimelineHistory> {
    let text = std::str::from_utf8(&file.content).ok()?;
    match TimelineHistory::parse(file.tli.0, text) {
        Ok(history) => Some(history),
        Err(error) => {
            log::warn!("timeline history file is not used ({error})");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::RealDisk;

    fn file(tli: u32, content: &str) -> TimelineFile {
        TimelineFile {
            tli: Tli(tli),
            content: content.as_bytes().to_vec(),
        }
    }

    fn open(temp: &tempfile::TempDir) -> TimelineFiles {
        let disk = Arc::new(RealDisk::new(temp.path()));
        TimelineFiles::open(disk, Path::new("")).unwrap()
    }

    fn tlis(files: &TimelineFiles) -> Vec<u32> {
        let all = files.read_all().unwrap();
        all.iter().map(|file| file.tli.0).collect()
    }

    #[test]
    fn files_of_dead_timelines_go_and_those_of_ancestors_stay() {
        let temp = tempfile::tempdir().unwrap();
        let mut files = open(&temp);
        let two = file(2, "1\t0/2000000\tno recovery target specified\n");
        let three = file(3, "1\t0/2000000\tx\n\n2\t0/3000000\ty\n");
        let none = Timelines::default();
        files.replace(&[three.clone(), two.clone()], &none).unwrap();
        assert_eq!(files.read_all().unwrap(), [three.clone(), two.clone()]);

        // Only the newest is brought: timeline 2 is its ancestor.
        let four = file(4, "1\t0/2000000\tx\n2\t0/3500000\ty\n");
        files.replace(std::slice::from_ref(&four), &none).unwrap();
        assert_eq!(tlis(&files), [4, 2]);
        assert_eq!(open(&temp).read_all().unwrap(), [four, two]);

        files.replace(&[], &none).unwrap();
        assert_eq!(tlis(&files), [0u32; 0]);
    }

    /// Found by the simulation: a standby won that had not come to timeline 2 yet, and the file of
    /// timeline 2, of which the log had WAL, was gone from the quorum.
    #[test]
    fn the_files_of_timelines_in_the_log_outlive_a_proposer_that_does_not_know_them() {
        let temp = tempfile::tempdir().unwrap();
        let mut files = open(&temp);
        let mut log = Timelines::default();
        log.go_on(Tli(1), Lsn(0x100_0000));
        let two = file(2, "1\t0/2000000\tx\n");
        files.replace(std::slice::from_ref(&two), &log).unwrap();
        log.go_on(Tli(2), Lsn(0x200_0000));
        files.replace(&[], &log).unwrap();
        assert_eq!(files.read_all().unwrap(), [two]);
        assert_eq!(files.expected(&log).tli_at(Lsn(0x200_0000)), 2);
        // A promotion to it that left no WAL is undone.
        log.cut(Lsn(0x200_0000));
        files.replace(&[], &log).unwrap();
        assert_eq!(tlis(&files), [0u32; 0]);
    }

    #[test]
    fn pages_are_expected_as_the_newest_file_has_them() {
        let temp = tempfile::tempdir().unwrap();
        let mut files = open(&temp);
        let mut timelines = Timelines::default();
        timelines.go_on(Tli(2), Lsn(0x200_0000));
        // Where the log begins there are pages of timeline 1, which only the file knows.
        assert_eq!(files.expected(&timelines).tli_at(Lsn(0x200_0000)), 2);
        let log = Timelines::default();
        files
            .replace(&[file(2, "1\t0/2000100\tx\n")], &log)
            .unwrap();
        assert_eq!(files.expected(&timelines).tli_at(Lsn(0x200_0000)), 1);
        assert_eq!(files.expected(&timelines).tli_at(Lsn(0x200_0100)), 2);
        // An older file says nothing about a newer timeline.
        timelines.go_on(Tli(3), Lsn(0x300_0000));
        assert_eq!(files.expected(&timelines).tli_at(Lsn(0x300_0000)), 3);
        // One that contradicts what the control file knows of the log has decayed.
        timelines.go_on(Tli(4), Lsn(0x400_0000));
        let decayed = "1\t0/2000100\tx\n2\t0/3000000\tx\n3\t0/4800000\tx\n";
        files.replace(&[file(4, decayed)], &log).unwrap();
        assert_eq!(files.expected(&timelines).tli_at(Lsn(0x400_0000)), 4);
        assert_eq!(files.expected(&timelines).tli_at(Lsn(0x3FF_FFFF)), 3);
        timelines.cut(Lsn(0x400_0000));
        // One that can't be read is kept for whoever asks, and not believed.
        files.replace(&[file(3, "nonsense")], &log).unwrap();
        assert_eq!(files.expected(&timelines).tli_at(Lsn(0x300_0000)), 3);
        assert_eq!(tlis(&files), [3]);
    }
}

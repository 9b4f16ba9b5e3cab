//! `verify`: reads everything in a data directory and says what is wrong with it.
//!
//! Checked, for each cluster: the control file and the slot file; that no segment is missing between the first and
//! the last, and each has its full size; every page and record from the first segment to the end,
//! with the chain and the checksums; that the end is not below `commit_lsn`; timeline history
//! files; that copies of a segment on an older timeline agree with the newer one.
//!
//! Nothing is written, no lock is taken, and a daemon may be running: what it appends meanwhile
//! lies behind what is looked at, and when it removes a segment under our hands we begin again
//! with what is left. What stands *behind* the end is none of the log's and not judged: after a
//! crash it may be a torn record, which the next start cuts.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use safekeeper_protocol::{AcceptorState, Lsn};
use safekeeper_wal::TimelineHistory;

use crate::control_file::{list_clusters, read_state};
use crate::disk::{Disk, RealDisk, StorageError};
use crate::identity::{DataDirError, Identity, read_identity};
use crate::recovery::LogReader;
use crate::segment::{SegmentDir, SegmentId, Timelines, wal_format};
use crate::slot_file::read_slots;
use crate::timeline_files::TimelineFiles;

/// What was found in a data directory.
#[derive(Debug)]
pub struct Report {
    pub identity: Identity,
    pub clusters: Vec<ClusterReport>,
}

/// What was found of one cluster.
#[derive(Debug, Default)]
pub struct ClusterReport {
    pub system_id: u64,
    pub name: String,
    pub commit_lsn: Lsn,
    /// The sound WAL is `begin_lsn..end_lsn`.
    pub begin_lsn: Lsn,
    pub end_lsn: Lsn,
    pub n_segments: usize,
    /// One sentence each; empty if all is well.
    pub problems: Vec<String>,
}

impl Report {
    pub fn is_sound(&self) -> bool {
        self.clusters.iter().all(|c| c.problems.is_empty())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Identity { id, incarnation } = self.identity;
        writeln!(f, "safekeeper {id}, incarnation {incarnation}")?;
        for c in &self.clusters {
            writeln!(
                f,
                "cluster {} \"{}\": WAL {}..{} in {} segments, commit_lsn {}",
                c.system_id, c.name, c.begin_lsn, c.end_lsn, c.n_segments, c.commit_lsn
            )?;
            for problem in &c.problems {
                writeln!(f, "  PROBLEM: {problem}")?;
            }
        }
        let n_problems: usize = self.clusters.iter().map(|c| c.problems.len()).sum();
        match n_problems {
            0 => writeln!(f, "no problems found"),
            n => writeln!(f, "{n} problems found"),
        }
    }
}

/// Checks the data directory `dir`.
pub fn verify(dir: &Path) -> Result<Report, DataDirError> {
    let identity = read_identity(dir)?;
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::new(dir));
    let mut clusters = Vec::new();
    for system_id in list_clusters(disk.as_ref())? {
        clusters.push(verify_cluster(&disk, system_id));
    }
    Ok(Report { identity, clusters })
}

fn verify_cluster(disk: &Arc<dyn Disk>, system_id: u64) -> ClusterReport {
    let mut report = ClusterReport {
        system_id,
        ..ClusterReport::default()
    };
    let state = match read_state(disk.as_ref(), system_id) {
        Ok(state) => state,
        Err(error) => {
            report.problems.push(error.to_string());
            return report;
        }
    };
    report.name = state.cluster.name.clone();
    report.commit_lsn = state.commit_lsn;
    if let Err(error) = read_slots(disk.as_ref(), system_id) {
        report.problems.push(error.to_string());
    }
    if let Err(error) = verify_wal(disk, &state, &mut report) {
        report.problems.push(error.to_string());
    }
    report
}

fn verify_wal(
    disk: &Arc<dyn Disk>,
    state: &AcceptorState,
    report: &mut ClusterReport,
) -> Result<(), StorageError> {
    let format = match wal_format(&state.cluster) {
        Ok(format) => format,
        Err(error) => {
            report.problems.push(error.to_string());
            return Ok(());
        }
    };
    let segments = SegmentDir::new(disk.clone(), &format);
    let timelines = Timelines::new(&state.history);
    let files = TimelineFiles::open(disk.clone(), segments.dir())?;
    for file in files.read_all()? {
        let text = String::from_utf8_lossy(&file.content);
        if let Err(error) = TimelineHistory::parse(file.tli.0, &text) {
            report.problems.push(error.to_string());
        }
    }
    let expected = files.expected(&timelines);
    let log = LogReader::new(&segments, format, &timelines, &expected);
    for _ in 0..N_TRIES {
        let before = log.present()?.first().copied();
        let mut problems = Vec::new();
        let checked = verify_log(&log, &segments, state, report, &mut problems).and_then(|()| {
            verify_files(&log, &segments, &timelines, report.end_lsn, &mut problems)
        });
        let removed_meanwhile = log.present()?.first().copied() > before;
        if !removed_meanwhile || (checked.is_ok() && problems.is_empty()) {
            report.problems.append(&mut problems);
            return checked;
        }
    }
    report
        .problems
        .push("WAL is being removed faster than it can be read".to_owned());
    Ok(())
}

/// The log as a whole: no gap, sound from its begin to its end, and long enough.
fn verify_log(
    log: &LogReader<'_>,
    segments: &SegmentDir,
    state: &AcceptorState,
    report: &mut ClusterReport,
    problems: &mut Vec<String>,
) -> Result<(), StorageError> {
    let recovered = match log.recover(state) {
        Ok(recovered) => recovered,
        Err(error) => {
            problems.push(error.to_string());
            return Ok(());
        }
    };
    report.begin_lsn = recovered.begin;
    report.end_lsn = recovered.decoder.record_end();
    let present = log.present()?;
    let first = recovered.begin.segno(segments.size());
    let last = report.end_lsn.segno(segments.size());
    report.n_segments = present.range(first..=last).count();
    if let Some(lowest) = present.first().filter(|lowest| **lowest < first) {
        let lsn = segments.start(*lowest);
        problems.push(format!(
            "WAL is missing somewhere between {lsn} and {}",
            recovered.begin
        ));
    }
    // Recovery decodes from commit_lsn's segment on; here from the very first.
    let (decoder, reason) = log.find_end(recovered.begin)?;
    if decoder.last_record().is_some() && decoder.record_end() < report.end_lsn {
        problems.push(format!("WAL is damaged: {reason}"));
        report.end_lsn = decoder.record_end();
    }
    Ok(())
}

/// Each file by itself: its size, and that it agrees with the one it was copied to.
fn verify_files(
    log: &LogReader<'_>,
    segments: &SegmentDir,
    timelines: &Timelines,
    end: Lsn,
    problems: &mut Vec<String>,
) -> Result<(), StorageError> {
    let history = timelines.to_history();
    for id in segments.list()? {
        if segments.start(id.segno) >= end || !log.is_of_log(id, end) {
            continue;
        }
        let name = segments.name(id);
        let size = segments.open_read_only(id)?.size()?;
        if size != u64::from(segments.size()) {
            let full = segments.size();
            problems.push(format!("segment {name} has {size} bytes instead of {full}"));
        }
        let newest = log.reader().find(id.segno)?.unwrap_or(id);
        if let Some(switch) = history.switch_point(id.tli.0).filter(|_| newest != id) {
            let begin = segments.start(id.segno);
            let len = switch.min(end).saturating_distance_from(begin);
            if !same_bytes(segments, id, newest, len)? {
                let newest = segments.name(newest);
                problems.push(format!("segment {name} differs from {newest}"));
            }
        }
    }
    Ok(())
}

fn same_bytes(
    segments: &SegmentDir,
    one: SegmentId,
    other: SegmentId,
    len: u64,
) -> Result<bool, StorageError> {
    let (one, other) = (
        segments.open_read_only(one)?,
        segments.open_read_only(other)?,
    );
    let (mut a, mut b) = (vec![0; READ_SIZE], vec![0; READ_SIZE]);
    let len = len.min(segments.size().into());
    let mut offset = 0;
    while offset < len {
        let part = usize::try_from(len - offset).map_or(READ_SIZE, |left| left.min(READ_SIZE));
        one.read_at(&mut a[..part], offset)?;
        other.read_at(&mut b[..part], offset)?;
        if a[..part] != b[..part] {
            return Ok(false);
        }
        offset += part as u64;
    }
    Ok(true)
}

/// How often removal may outrun us before we report what it left.
const N_TRIES: usize = 10;
const READ_SIZE: usize = 128 << 10;

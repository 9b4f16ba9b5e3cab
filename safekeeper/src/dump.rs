//! `dump`: prints what is in a data directory, for people. It never writes there, takes no lock,
//! and goes on past what it can't read: half of an answer is what one wants of a broken disk.
//!
//! ```text
//! safekeeper 1, incarnation 3f...
//! cluster 7123456789 "main": PostgreSQL 15, segments of 16MB
//!   term 4, commit_lsn 0/31A2B40
//!   configuration 4.1 {1,2,3}
//!     member 1  10.0.0.5:5454  incarnation 3f...
//!   term history 1@0/1000000 4@0/31A0000
//!   slot standby1  restart_lsn 0/2100000  xmin 700  catalog_xmin 0
//!   000000010000000000000002  0/2000000..0/3000000  16777216 bytes
//!   000000010000000000000003  0/3000000..0/4000000  16777216 bytes, WAL ends at 0/31A2BA8
//!   000000010000000000000004  0/4000000..0/5000000  16777216 bytes, behind the end
//!   00000002.history          42 bytes
//! ```

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use safekeeper_protocol::AcceptorState;
use safekeeper_wal::history_file_name;

use crate::control_file::{list_clusters, read_state};
use crate::disk::{Disk, RealDisk, StorageError};
use crate::identity::read_identity;
use crate::recovery::LogReader;
use crate::segment::{SegmentDir, Timelines, wal_format};
use crate::slot_file::read_slots;
use crate::timeline_files::TimelineFiles;

/// Prints what is in the data directory `dir`. Fails only if `out` does.
pub fn dump(dir: &Path, out: &mut dyn Write) -> io::Result<()> {
    match read_identity(dir) {
        Ok(identity) => writeln!(
            out,
            "safekeeper {}, incarnation {}",
            identity.id, identity.incarnation
        )?,
        Err(error) => writeln!(out, "{error}")?,
    }
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::new(dir));
    let system_ids = match list_clusters(disk.as_ref()) {
        Ok(system_ids) => system_ids,
        Err(error) => return writeln!(out, "{error}"),
    };
    for system_id in system_ids {
        match read_state(disk.as_ref(), system_id) {
            Ok(state) => {
                dump_state(&state, out)?;
                dump_slots(disk.as_ref(), system_id, out)?;
                dump_wal(&disk, &state, out)?;
            }
            Err(error) => writeln!(out, "cluster {system_id}: {error}")?,
        }
    }
    Ok(())
}

fn dump_state(state: &AcceptorState, out: &mut dyn Write) -> io::Result<()> {
    let cluster = &state.cluster;
    writeln!(
        out,
        "cluster {} \"{}\": PostgreSQL {}, segments of {}MB",
        cluster.system_id,
        cluster.name,
        cluster.pg_major,
        cluster.segment_size >> 20
    )?;
    let (term, commit_lsn) = (state.term, state.commit_lsn);
    writeln!(out, "  term {term}, commit_lsn {commit_lsn}")?;
    writeln!(out, "  configuration {}", state.configuration)?;
    for member in state.configuration.all_members() {
        writeln!(
            out,
            "    member {}  {}:{}  incarnation {}",
            member.id, member.host, member.port, member.incarnation
        )?;
    }
    writeln!(out, "  term history {}", state.history)
}

fn dump_slots(disk: &dyn Disk, system_id: u64, out: &mut dyn Write) -> io::Result<()> {
    let slots = match read_slots(disk, system_id) {
        Ok(slots) => slots.unwrap_or_default(),
        Err(error) => return writeln!(out, "  {error}"),
    };
    for slot in slots {
        let (name, restart_lsn) = (&slot.name, slot.restart_lsn);
        let lost = if slot.lost { "  lost" } else { "" };
        // Without their epochs, as Postgres shows them.
        let (xmin, catalog_xmin) = (slot.xmin as u32, slot.catalog_xmin as u32);
        writeln!(
            out,
            "  slot {name}  restart_lsn {restart_lsn}  xmin {xmin}  catalog_xmin {catalog_xmin}{lost}"
        )?;
    }
    Ok(())
}

fn dump_wal(disk: &Arc<dyn Disk>, state: &AcceptorState, out: &mut dyn Write) -> io::Result<()> {
    let format = match wal_format(&state.cluster) {
        Ok(format) => format,
        Err(error) => return writeln!(out, "  {error}"),
    };
    let segments = SegmentDir::new(disk.clone(), &format);
    let timelines = Timelines::new(&state.history);
    let written = TimelineFiles::open(disk.clone(), segments.dir()).and_then(|files| {
        let expected = files.expected(&timelines);
        let log = LogReader::new(&segments, format, &timelines, &expected);
        let mut written = dump_segments(&segments, &log, state, out)?;
        for file in files.read_all()? {
            let (name, len) = (history_file_name(file.tli.0), file.content.len());
            written = written.and(writeln!(out, "  {name}          {len} bytes"));
        }
        Ok(written)
    });
    match written {
        Ok(written) => written,
        Err(error) => writeln!(out, "  {error}"),
    }
}

/// Two kinds of failure: the outer is the disk's, the inner that of `out`.
fn dump_segments(
    segments: &SegmentDir,
    log: &LogReader<'_>,
    state: &AcceptorState,
    out: &mut dyn Write,
) -> Result<io::Result<()>, StorageError> {
    let mut written = Ok(());
    let end = match log.recover(state) {
        Ok(recovered) => Some(recovered.decoder.record_end()),
        Err(error) => {
            written = writeln!(out, "  {error}");
            None
        }
    };
    for id in segments.list()? {
        let begin = segments.start(id.segno);
        let segment_end = begin + u64::from(segments.size());
        let size = segments.open_read_only(id)?.size()?;
        let note = match end {
            Some(end) if !log.is_of_log(id, end) && begin < end => ", not of this log".to_owned(),
            Some(end) if (begin..segment_end).contains(&end) => format!(", WAL ends at {end}"),
            Some(end) if begin >= end => ", behind the end".to_owned(),
            _ => String::new(),
        };
        let name = segments.name(id);
        written = written.and(writeln!(
            out,
            "  {name}  {begin}..{segment_end}  {size} bytes{note}"
        ));
    }
    Ok(written)
}

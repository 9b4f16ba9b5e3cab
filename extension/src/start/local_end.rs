//! Where the local log ends, found as recovery will find it: by decoding from the last checkpoint.
//!
//! What was found is fsynced before it is used in a comparison (W8): a page cache can hold more than
//! a power cut will leave, and an election that counted it would promise it.

use std::fs::File;
use std::io;
use std::path::Path;

use safekeeper_protocol::Lsn;
use safekeeper_wal::{
    FindEndError, SegmentFiles, TimelineHistory, WalDecoder, WalFormat, find_end_with,
    segment_file_name,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalEnd {
    /// End of the last whole record, in its canonical form.
    pub end_lsn: Lsn,
    /// Start of that record.
    pub last_record: Option<Lsn>,
    /// End of the record of the last checkpoint.
    pub checkpoint_end_lsn: Lsn,
}

#[derive(Debug, thiserror::Error)]
pub enum LocalEndError {
    #[error(transparent)]
    Read(#[from] FindEndError),
    #[error("could not fsync WAL segment \"{name}\": {source}")]
    Sync { name: String, source: io::Error },
    #[error(
        "WAL ends at {end_lsn} ({reason}), before the record of the last checkpoint at {checkpoint_lsn}"
    )]
    NoCheckpoint {
        end_lsn: Lsn,
        checkpoint_lsn: Lsn,
        reason: String,
    },
}

/// Decodes from `redo_lsn`, where recovery begins, to the end.
pub fn find(
    pg_wal: &Path,
    format: WalFormat,
    timelines: TimelineHistory,
    redo_lsn: Lsn,
    checkpoint_lsn: Lsn,
) -> Result<LocalEnd, LocalEndError> {
    let size = format.segment_size;
    let mut decoder = WalDecoder::new(format, redo_lsn);
    decoder.expect_timelines(timelines.clone());
    decoder.allow_stale_switch_padding();
    let mut files = SegmentFiles::new(pg_wal, timelines.clone(), size);
    let mut checkpoint_end_lsn = None;
    let found = find_end_with(
        decoder,
        |lsn, buffer| files.read(lsn, buffer),
        |record| {
            if record.start_lsn == checkpoint_lsn {
                checkpoint_end_lsn = Some(record.end_lsn);
            }
        },
    )?;
    let Some(checkpoint_end_lsn) = checkpoint_end_lsn else {
        return Err(LocalEndError::NoCheckpoint {
            end_lsn: found.end,
            checkpoint_lsn,
            reason: found.reason.to_string(),
        });
    };
    for segno in redo_lsn.segno(size.bytes())..=found.end.segno(size.bytes()) {
        sync(pg_wal, &timelines, segno, format)?;
    }
    Ok(LocalEnd {
        end_lsn: found.end,
        last_record: found.last_record,
        checkpoint_end_lsn,
    })
}

/// Whatever timeline's file it is that holds the segment.
fn sync(
    pg_wal: &Path,
    timelines: &TimelineHistory,
    segno: u64,
    format: WalFormat,
) -> Result<(), LocalEndError> {
    let tlis = timelines.ancestors.iter().map(|ancestor| ancestor.tli);
    for tli in tlis.chain([timelines.tli]) {
        let name = segment_file_name(tli, segno, format.segment_size);
        match File::open(pg_wal.join(&name)) {
            Ok(file) => file
                .sync_data()
                .map_err(|source| LocalEndError::Sync { name, source })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(LocalEndError::Sync { name, source }),
        }
    }
    Ok(())
}

//! What the data directory says of the local log when the worker starts: the proposer's own history,
//! and Postgres's.

use std::fmt::Display;
use std::io::ErrorKind;
use std::path::Path;

use pgrx::PgSqlErrorCode;
use safekeeper_protocol::{Configuration, Lsn, ProposerId, TermHistory, TimelineFile, Tli};
use safekeeper_wal::{SegmentSize, TimelineHistory, canonical_end, history_file_name};

use crate::local_history::{self, LocalHistory};
use crate::postgres;

/// The local history file, or what a server begins with that never led.
pub fn load_local_history(data_dir: &Path, system_id: u64) -> LocalHistory {
    let new_id = ProposerId(postgres::random_u128());
    match local_history::load(data_dir, system_id, new_id) {
        Ok(Some(local)) => local,
        Ok(None) => LocalHistory {
            proposer_id: new_id,
            history: TermHistory::default(),
            configuration: Configuration::default(),
            unled_from: None,
        },
        Err(error) => postgres::error(
            PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
            error.to_string(),
            "",
        ),
    }
}

/// Where WAL begins that was written without a term: by the override; or after a promotion by hand,
/// since a server with no history of its own has begun its timeline without asking anybody.
pub fn unled_from(
    local: &LocalHistory,
    timelines: &TimelineHistory,
    segment_size: SegmentSize,
) -> Option<Lsn> {
    // The oldest timeline begins nowhere.
    let begun = timelines.begin(timelines.tli).filter(|lsn| lsn.is_valid());
    let led = local.history.last().map(|reign| reign.tli);
    let by_hand = begun.filter(|_| led < Some(Tli(timelines.tli)));
    let by_hand = by_hand.map(|lsn| canonical_end(lsn, segment_size));
    local.unled_from.into_iter().chain(by_hand).min()
}

/// Postgres's history of timeline `tli`, and the files that tell it, newest first.
pub fn load_timelines(pg_wal: &Path, tli: u32) -> (TimelineHistory, Vec<TimelineFile>) {
    let unreadable = |name: &str, error: &dyn Display| -> ! {
        postgres::error(
            PgSqlErrorCode::ERRCODE_IO_ERROR,
            format!("could not read file \"pg_wal/{name}\": {error}"),
            "",
        )
    };
    let read = |tli: u32| {
        let name = history_file_name(tli);
        match std::fs::read(pg_wal.join(&name)) {
            Ok(content) => Some(content),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => unreadable(&name, &error),
        }
    };
    let Some(content) = read(tli) else {
        return (TimelineHistory::root(tli), Vec::new());
    };
    let text = String::from_utf8_lossy(&content).into_owned();
    let history = match TimelineHistory::parse(tli, &text) {
        Ok(history) => history,
        Err(error) => unreadable(&history_file_name(tli), &error),
    };
    let mut files = vec![TimelineFile {
        tli: Tli(tli),
        content,
    }];
    for ancestor in history.ancestors.iter().rev() {
        let tli = Tli(ancestor.tli);
        files.extend(read(ancestor.tli).map(|content| TimelineFile { tli, content }));
    }
    (history, files)
}

//! What the data directory says of the local log when the worker starts: the proposer's own history,
//! and Postgres's.

use std::fmt::Display;
use std::io::ErrorKind;
use std::path::Path;

use pgrx::{PgSqlErrorCode, pg_sys};
use safekeeper_protocol::{Configuration, Lsn, ProposerId, TermHistory, TimelineFile, Tli};
use safekeeper_wal::{
    PgVersion, SegmentSize, TimelineHistory, WalFormat, canonical_end, history_file_name,
};

use crate::local_history::{self, LocalHistory};
use crate::postgres;

/// What Postgres's WAL looks like here.
pub fn wal_format() -> WalFormat {
    WalFormat {
        version: PgVersion::from_version_num(pg_sys::PG_VERSION_NUM)
            .expect("built for a version that is known"),
        segment_size: SegmentSize::new(postgres::wal_segment_size())
            .expect("Postgres has checked its own segment size"),
        system_id: postgres::system_id(),
    }
}

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

/// A standby's WAL is another server's: a history that came with a base backup, or is its own from
/// before, or from a promotion that died, would lend it a rank that it has not (W7).
pub fn forget_reigns() {
    let local = load_local_history(&postgres::data_directory(), postgres::system_id());
    if local.history.is_empty() && local.unled_from.is_none() {
        return;
    }
    store_local_history(&LocalHistory {
        history: TermHistory::default(),
        unled_from: None,
        ..local
    });
}

/// On stable storage when it returns; else this process ends.
pub fn store_local_history(local: &LocalHistory) {
    let stored = local_history::store(&postgres::data_directory(), postgres::system_id(), local);
    if let Err(error) = stored {
        postgres::fatal(PgSqlErrorCode::ERRCODE_IO_ERROR, error.to_string(), "");
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

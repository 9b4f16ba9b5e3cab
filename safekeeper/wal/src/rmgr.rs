//! What a server calls a record: its resource manager, and what that calls it.
//! (`access/rmgrlist.h`; the `*_identify` functions in `access/rmgrdesc`)

use crate::page::PgVersion;

/// All built-in ones, in the order of their numbers; the same in 15 to 18.
const NAMES: [&str; 22] = [
    "XLOG",
    "Transaction",
    "Storage",
    "CLOG",
    "Database",
    "Tablespace",
    "MultiXact",
    "RelMap",
    "Standby",
    "Heap2",
    "Heap",
    "Btree",
    "Hash",
    "Gin",
    "Gist",
    "Sequence",
    "SPGist",
    "BRIN",
    "CommitTs",
    "ReplicationOrigin",
    "Generic",
    "LogicalMessage",
];

/// A resource manager's name; those of extensions are called `custom` and their number.
pub fn rmgr_name(rmgr_id: u8) -> String {
    match NAMES.get(usize::from(rmgr_id)) {
        Some(name) => (*name).to_owned(),
        None => format!("custom{rmgr_id:03}"),
    }
}

/// What the resource manager calls the record, for those that nearly all WAL is of; else `None`.
pub fn record_name(version: PgVersion, rmgr_id: u8, info: u8) -> Option<&'static str> {
    let kind = info & 0xF0;
    Some(match (rmgr_id, kind) {
        (0, 0x00) => "CHECKPOINT_SHUTDOWN",
        (0, 0x10) => "CHECKPOINT_ONLINE",
        (0, 0x20) => "NOOP",
        (0, 0x30) => "NEXTOID",
        (0, 0x40) => "SWITCH",
        (0, 0x50) => "BACKUP_END",
        (0, 0x60) => "PARAMETER_CHANGE",
        (0, 0x70) => "RESTORE_POINT",
        (0, 0x80) => "FPW_CHANGE",
        (0, 0x90) => "END_OF_RECOVERY",
        (0, 0xA0) => "FPI_FOR_HINT",
        (0, 0xB0) => "FPI",
        (0, 0xD0) => "OVERWRITE_CONTRECORD",
        (0, 0xE0) => "CHECKPOINT_REDO",
        // The highest bit says that more follows, not which record it is.
        (1, _) => match kind & 0x70 {
            0x00 => "COMMIT",
            0x10 => "PREPARE",
            0x20 => "ABORT",
            0x30 => "COMMIT_PREPARED",
            0x40 => "ABORT_PREPARED",
            0x50 => "ASSIGNMENT",
            0x60 => "INVALIDATION",
            _ => return None,
        },
        (2, 0x10) => "CREATE",
        (2, 0x20) => "TRUNCATE",
        (3, 0x00) => "ZEROPAGE",
        (3, 0x10) => "TRUNCATE",
        (7, 0x00) => "UPDATE",
        (8, 0x00) => "LOCK",
        (8, 0x10) => "RUNNING_XACTS",
        (8, 0x20) => "INVALIDATIONS",
        (9, _) => match (kind, version) {
            (0x00, _) => "REWRITE",
            (0x10, PgVersion::V15 | PgVersion::V16) => "PRUNE",
            (0x20, PgVersion::V15 | PgVersion::V16) => "VACUUM",
            (0x30, PgVersion::V15 | PgVersion::V16) => "FREEZE_PAGE",
            (0x10, _) => "PRUNE_ON_ACCESS",
            (0x20, _) => "PRUNE_VACUUM_SCAN",
            (0x30, _) => "PRUNE_VACUUM_CLEANUP",
            (0x40, _) => "VISIBLE",
            (0x50, _) => "MULTI_INSERT",
            (0xD0, _) => "MULTI_INSERT+INIT",
            (0x60, _) => "LOCK_UPDATED",
            (0x70, _) => "NEW_CID",
            _ => return None,
        },
        (10, 0x00) => "INSERT",
        (10, 0x80) => "INSERT+INIT",
        (10, 0x10) => "DELETE",
        (10, 0x20) => "UPDATE",
        (10, 0xA0) => "UPDATE+INIT",
        (10, 0x30) => "TRUNCATE",
        (10, 0x40) => "HOT_UPDATE",
        (10, 0xC0) => "HOT_UPDATE+INIT",
        (10, 0x50) => "HEAP_CONFIRM",
        (10, 0x60) => "LOCK",
        (10, 0x70) => "INPLACE",
        (11, 0x00) => "INSERT_LEAF",
        (11, 0x10) => "INSERT_UPPER",
        (11, 0x20) => "INSERT_META",
        (11, 0x30) => "SPLIT_L",
        (11, 0x40) => "SPLIT_R",
        (11, 0x50) => "INSERT_POST",
        (11, 0x60) => "DEDUP",
        (11, 0x70) => "DELETE",
        (11, 0x80) => "UNLINK_PAGE",
        (11, 0x90) => "UNLINK_PAGE_META",
        (11, 0xA0) => "NEWROOT",
        (11, 0xB0) => "MARK_PAGE_HALFDEAD",
        (11, 0xC0) => "VACUUM",
        (11, 0xD0) => "REUSE_PAGE",
        (11, 0xE0) => "META_CLEANUP",
        (15, 0x00) => "LOG",
        (21, 0x00) => "MESSAGE",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_version() {
        assert_eq!(rmgr_name(10), "Heap");
        assert_eq!(rmgr_name(21), "LogicalMessage");
        assert_eq!(rmgr_name(130), "custom130");
        assert_eq!(record_name(PgVersion::V15, 9, 0x10), Some("PRUNE"));
        assert_eq!(
            record_name(PgVersion::V17, 9, 0x10),
            Some("PRUNE_ON_ACCESS")
        );
        assert_eq!(record_name(PgVersion::V17, 1, 0x80), Some("COMMIT"));
        assert_eq!(record_name(PgVersion::V17, 12, 0x00), None);
    }
}

//! `WalError`: what is wrong with the WAL, and where.
//!
//! One type serves two callers. For bytes that come over the network every error is a refusal.
//! For bytes on a disk's last segment the very same error is how a log ends: behind the last
//! record come zeros, or what an earlier use of the file left there, or a torn write.

use safekeeper_protocol::Lsn;

/// The first thing found that a server with sound memory and disk would not have written there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WalError {
    /// Decoding was to begin inside a page header, off the grid of 8 bytes, or beyond 2^63.
    #[error("no WAL record can begin at {lsn}")]
    Start { lsn: Lsn },

    /// The source had no more bytes. Only [`find_end`](crate::find_end) says so: to the decoder
    /// itself the end of the input means nothing.
    #[error("no WAL at {lsn}")]
    NoMoreBytes { lsn: Lsn },

    /// Not a page, or one of another major version.
    #[error("invalid magic number {found:04X} in WAL page at {page_lsn}, expected {expected:04X}")]
    PageMagic {
        page_lsn: Lsn,
        found: u16,
        expected: u16,
    },

    /// The page belongs elsewhere: typically a segment was recycled and not yet written over.
    #[error("unexpected page address {found} in WAL page at {page_lsn}")]
    PageAddress { page_lsn: Lsn, found: Lsn },

    /// WAL of another cluster.
    #[error("WAL page at {page_lsn} is of system identifier {found}, expected {expected}")]
    SystemId {
        page_lsn: Lsn,
        found: u64,
        expected: u64,
    },

    /// A timeline lower than the page before, or not the one the history demands.
    #[error("unexpected timeline {found} in WAL page at {page_lsn}, expected {expected}")]
    Timeline {
        page_lsn: Lsn,
        found: u32,
        expected: u32,
    },

    /// Another field of a page's header has a value it can't have.
    #[error("invalid {name} {found:#X} in WAL page at {page_lsn}")]
    PageField {
        page_lsn: Lsn,
        name: &'static str,
        found: u64,
    },

    /// The page's `rem_len` does not go on with what was before it. `expected` is what is still
    /// due of the record, 0 between records.
    #[error("WAL page at {page_lsn} continues a record with {found} bytes, expected {expected}")]
    Continuation {
        page_lsn: Lsn,
        found: u32,
        expected: u32,
    },

    /// `found` is 0 where nothing has been written yet.
    #[error("invalid WAL record length {found} at {lsn}")]
    RecordLength { lsn: Lsn, found: u32 },

    /// The record does not name the one before it. `expected` is none where that is not known;
    /// then the record named lies ahead.
    #[error("WAL record at {lsn} follows {found}, expected {}", Expected(*expected))]
    RecordPrev {
        lsn: Lsn,
        found: Lsn,
        expected: Option<Lsn>,
    },

    #[error("invalid resource manager {found} in WAL record at {lsn}")]
    RecordRmgr { lsn: Lsn, found: u8 },

    #[error("incorrect checksum in WAL record at {lsn}: {found:08X}, computed {computed:08X}")]
    RecordCrc { lsn: Lsn, found: u32, computed: u32 },

    /// A record that overwrites another's continuation where none was lost; or another record
    /// where one was lost; or the wrong record is named as lost.
    #[error("WAL record at {lsn} does not fit its page's overwrite mark")]
    Overwrite { lsn: Lsn },

    /// Not zero between two records, or in the rest of a segment behind a switch record.
    #[error("byte {found:#04X} in the padding of WAL at {lsn}")]
    Padding { lsn: Lsn, found: u8 },
}

/// Shows the record expected, or says that any earlier one would have done.
struct Expected(Option<Lsn>);

impl std::fmt::Display for Expected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(lsn) => lsn.fmt(f),
            None => f.write_str("an earlier one"),
        }
    }
}

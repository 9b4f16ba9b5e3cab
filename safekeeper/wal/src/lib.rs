//! PostgreSQL's write-ahead log as bytes: what a page, a record, a segment file and a timeline
//! history look like in versions 15 to 18, and how to tell sound WAL from anything else.
//!
//! WAL is one long run of bytes, each with a position, its [`Lsn`](safekeeper_protocol::Lsn).
//! From the outside in:
//!
//! * it is cut into **segments**, one file each, named after timeline and number ([`segment_name`]);
//! * a segment is cut into **pages** of 8 KiB, each with a header that says where it belongs
//!   ([`page`]);
//! * in what is left between the headers stand **records**, each with its length, a checksum and
//!   the position of the one before it ([`record`]);
//! * a **history file** tells at which positions one timeline ended and the next began
//!   ([`history`]).
//!
//! The [`decoder`] reads all this in one pass, from pieces of any size, and knows at every moment
//! where the last whole record ends: the only position a safekeeper promises. [`end_of_log`] runs
//! it over what is on disk. [`synthetic`] goes the other way and makes WAL, for tests.
//!
//! What records *mean* is not known here, but for which blocks they change ([`blocks`]) and what a
//! server calls them ([`rmgr`]). Nothing here writes a file.

pub mod blocks;
mod bytes;
mod crc;
pub mod decoder;
pub mod end_of_log;
pub mod error;
pub mod format;
pub mod history;
pub mod page;
pub mod record;
pub mod rmgr;
pub mod segment_name;
pub mod synthetic;

pub use blocks::{BlockRef, Fork, Image, InvalidBody, Relation, block_refs};
pub use decoder::WalDecoder;
pub use end_of_log::{EndOfLog, FindEndError, SegmentFiles, find_end, find_end_with};
pub use error::WalError;
pub use format::{WalFormat, canonical_end};
pub use history::{GIVEN_UP, HistoryError, TimelineHistory, TimelineSwitch, is_given_up};
pub use page::{PAGE_SIZE, PgVersion};
pub use record::{Record, RecordHeader};
pub use segment_name::{
    InvalidSegmentSize, SegNo, SegmentSize, history_file_name, parse_history_file_name,
    parse_segment_file_name, segment_file_name,
};

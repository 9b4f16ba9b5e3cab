//! WAL out of the server's shared buffers: while it is being flushed, or before it is even written.
//!
//! ```text
//!              written to pg_wal          inserted          reserved
//!   ─────────────────┬────────────────────────┬─────────────────┬──►  LSN
//!    pages may be    │  pages are there, and  │ a backend is    │
//!    recycled        │  do not change         │ copying into it │
//! ```
//!
//! *How far insertion is complete* is found as the server itself finds it before a flush: read how
//! far room has been reserved, then wait for those among the eight insertion locks whose holders are
//! still below (`WaitXLogInsertionsToFinish` in `xlog.c`). Mostly they copy, no more: it takes a moment.
//!
//! *A copy is believed* if the page had the right name (`xlblocks`) before it and after it. Up to
//! 16, a page that is recycled is zeroed before its name changes; but none is recycled before it
//! was written. So there the page must also not have been written yet when the copy is done, and
//! what is written is read from `pg_wal`. (`AdvanceXLInsertBuffer`)
//!
//! The structures are private to the server: `layout.rs` has them, and what is compared before they
//! are believed. If that fails, there are no buffers, and WAL is read from files.
//!
//! Nothing here writes to the server's memory. Nothing is known of what the bytes mean.

mod layout;

use std::ffi::c_void;
use std::sync::atomic::{Ordering, fence};

use pgrx::{PgTryBuilder, pg_sys};
use safekeeper_protocol::Lsn;
use safekeeper_wal::{SegmentSize, WalFormat, canonical_end};

use self::layout::{Addresses, Contents, INSERT_LOCKS, InsertLock, Known, PAGE_SIZE, XLogCtl};
use crate::local_wal::RecentWal;
use crate::postgres;

/// Who has so much left to copy, in bytes, is not waited for.
const WAITED_FOR: u64 = 128 * 1024;

/// The buffers of this server, attached to and checked.
pub struct WalBuffers {
    pages: *const u8,
    /// For each page the position at which it ends.
    xlblocks: *const u64,
    count: usize,
    insert_locks: *mut InsertLock,
    segment_size: SegmentSize,
}

impl WalBuffers {
    /// In a process that has its `PGPROC`, of a server that has recovered. The error says what in the
    /// server's memory is not where it should be.
    pub fn attach(format: WalFormat) -> Result<WalBuffers, String> {
        let refused = |what: &str| format!("\"{what}\" is not as this version expects it");
        let (control, size) = find_control()?;
        // SAFETY: the piece of memory is there and longer than the structure, whatever it holds. It
        // changes while we look, hence no reference to it is made.
        let (addresses, insert_timeline) = unsafe {
            let addresses = Addresses {
                base: control as usize,
                size,
                buffers: usize::try_from(pg_sys::XLOGbuffers).unwrap_or(0),
                xlblocks: (&raw const (*control).xlblocks).read_volatile() as usize,
                insert_locks: (&raw const (*control).insert.wal_insert_locks).read_volatile()
                    as usize,
                pages: (&raw const (*control).pages).read_volatile() as usize,
                cache_blck: (&raw const (*control).xlog_cache_blck)
                    .read_volatile()
                    .into(),
            };
            let timeline = (&raw const (*control).insert_timeline).read_volatile();
            (addresses, timeline)
        };
        addresses.check().map_err(refused)?;
        // SAFETY: the pointers point where they must, within the piece of memory.
        let buffers = unsafe {
            WalBuffers {
                pages: (*control).pages,
                xlblocks: (*control).xlblocks,
                count: addresses.buffers,
                insert_locks: (*control).insert.wal_insert_locks,
                segment_size: format.segment_size,
            }
        };
        let known = Known {
            tranche: u16::try_from(pg_sys::BuiltinTrancheIds::LWTRANCHE_WAL_INSERT).unwrap_or(0),
            insert_timeline: postgres::insertion_tli(),
            redo_lsn: postgres::redo_lsn().0,
            write_lsn: postgres::written_lsn().0,
            magic: format.version.page_magic(),
        };
        // SAFETY: as above.
        let contents = unsafe {
            let initialized_up_to = (&raw const (*control).initialized_up_to).read_volatile();
            Contents {
                tranches: std::array::from_fn(|i| (*buffers.insert_locks.add(i)).lock.tranche),
                insert_timeline,
                redo_lsn: (&raw const (*control).redo_rec_ptr).read_volatile(),
                initialized_up_to,
                magic: buffers.last_magic(initialized_up_to),
                known,
            }
        };
        contents.check().map_err(refused)?;
        Ok(buffers)
    }

    /// End of the WAL for which there is room reserved: some of it may still be being copied.
    pub fn reserved_lsn(&self) -> Lsn {
        canonical_end(postgres::insert_lsn(), self.segment_size)
    }

    /// End of the WAL that is complete: no backend is copying into what lies below. Waits for those
    /// that do, unless one says that it has far to go: it waits for room in the buffers, perhaps for as
    /// long as the disk takes for a gigabyte.
    pub fn inserted_lsn(&self) -> Lsn {
        let reserved_lsn = self.reserved_lsn();
        let mut inserted_lsn = reserved_lsn;
        for at in 0..INSERT_LOCKS {
            // SAFETY: one of the eight locks.
            let lock = unsafe { self.insert_locks.add(at) };
            let mut inserting_at = 0;
            let is_free = loop {
                // SAFETY: a lock and the variable it guards; this process has its PGPROC, and holds
                // no such lock.
                let is_free = unsafe {
                    pg_sys::LWLockWaitForVar(
                        &raw mut (*lock).lock,
                        &raw mut (*lock).inserting_at,
                        inserting_at,
                        &mut inserting_at,
                    )
                };
                let left = reserved_lsn.0.saturating_sub(inserting_at);
                if is_free || left == 0 || (inserting_at != 0 && left > WAITED_FOR) {
                    break is_free;
                }
            };
            if !is_free {
                inserted_lsn = inserted_lsn.min(Lsn(inserting_at));
            }
        }
        inserted_lsn
    }

    /// Of the page that ends at `end_lsn`; none if it is not in the buffers, as after a start on a log
    /// that ends with a page.
    fn last_magic(&self, end_lsn: u64) -> Option<u16> {
        let lsn = end_lsn.checked_sub(1)?;
        // SAFETY: a page begins with it. (`XLogPageHeaderData`)
        self.is_there(lsn, Lsn(end_lsn))
            .then(|| unsafe { self.page(lsn).cast::<u16>().read_volatile() })
    }

    fn index(&self, lsn: u64) -> usize {
        // The remainder is below a usize.
        (lsn / PAGE_SIZE as u64 % self.count as u64) as usize
    }

    /// The page that `lsn` lies in, if it is in the buffers.
    fn page(&self, lsn: u64) -> *const u8 {
        // SAFETY: there are as many pages.
        unsafe { self.pages.add(self.index(lsn) * PAGE_SIZE) }
    }

    fn is_there(&self, lsn: u64, page_end_lsn: Lsn) -> bool {
        // SAFETY: there are as many names. Written by others with one store.
        unsafe { self.xlblocks.add(self.index(lsn)).read_volatile() == page_end_lsn.0 }
    }
}

impl RecentWal for WalBuffers {
    fn read(&self, lsn: Lsn, out: &mut [u8]) -> usize {
        let mut copied = 0;
        while copied < out.len() {
            let at = lsn.0 + copied as u64;
            let offset = (at % PAGE_SIZE as u64) as usize;
            let page_end_lsn = Lsn(at) + (PAGE_SIZE - offset) as u64;
            let len = (PAGE_SIZE - offset).min(out.len() - copied);
            if !self.is_there(at, page_end_lsn) {
                break;
            }
            fence(Ordering::Acquire);
            // SAFETY: within one page, and within `out`. Others may write there at the same time:
            // they are other processes, and a copy in which they did is thrown away below.
            unsafe {
                libc::memcpy(
                    out[copied..].as_mut_ptr().cast::<c_void>(),
                    self.page(at).add(offset).cast::<c_void>(),
                    len,
                );
            }
            fence(Ordering::Acquire);
            if !self.is_there(at, page_end_lsn) || may_be_zeroed(page_end_lsn) {
                break;
            }
            copied += len;
        }
        copied
    }

    fn written_lsn(&self) -> Lsn {
        postgres::written_lsn()
    }
}

/// Its name tells whether a page is being recycled.
#[cfg(any(feature = "pg17", feature = "pg18"))]
fn may_be_zeroed(_page_end_lsn: Lsn) -> bool {
    false
}

/// It may be in the course of being recycled once it is written.
#[cfg(any(feature = "pg15", feature = "pg16"))]
fn may_be_zeroed(page_end_lsn: Lsn) -> bool {
    postgres::written_lsn() >= page_end_lsn
}

/// The server's structure, and the size of the piece of memory that it begins.
fn find_control() -> Result<(*const XLogCtl, usize), String> {
    // SAFETY: computed from settings.
    let size = unsafe { pg_sys::XLOGShmemSize() };
    let mut found = false;
    let control = PgTryBuilder::new(std::panic::AssertUnwindSafe(|| {
        // SAFETY: the name under which `XLOGShmemInit` has made it, and the size it has asked for;
        // with another size this raises an error.
        unsafe { pg_sys::ShmemInitStruct(c"XLOG Ctl".as_ptr(), size, &raw mut found) }
    }))
    .catch_others(|_| std::ptr::null_mut())
    .execute();
    if control.is_null() || !found || size < size_of::<XLogCtl>() {
        return Err("there is no \"XLOG Ctl\" of the size expected".to_owned());
    }
    Ok((control.cast(), size))
}

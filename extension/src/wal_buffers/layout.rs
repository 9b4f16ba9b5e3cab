//! Where the server keeps its WAL buffers: the private structure of `xlog.c`, and how it is told
//! that it looks as we think.
//!
//! `XLogCtlData` is in no header, so it is written down here once more, for the major versions whose
//! sources were read. It has not changed within one of them; should it, the check says so, and WAL is
//! read from files. All that the check compares is known from elsewhere: from exported functions, or
//! because the server lays its parts out one behind the other in one piece of shared memory.
//! (`XLOGShmemInit` in `xlog.c`)
//!
//! Not here: reading anything (`wal_buffers.rs`).

use std::ffi::c_int;

use pgrx::pg_sys;

pub const PAGE_SIZE: usize = pg_sys::XLOG_BLCKSZ as usize;
pub const CACHE_LINE_SIZE: usize = pg_sys::PG_CACHE_LINE_SIZE as usize;

/// `NUM_XLOGINSERT_LOCKS` in `xlog.c`.
pub const INSERT_LOCKS: usize = 8;

/// `XLogCtlInsert`.
#[repr(C)]
pub struct Insert {
    insertpos_lck: pg_sys::slock_t,
    curr_byte_pos: u64,
    prev_byte_pos: u64,
    pad: [u8; CACHE_LINE_SIZE],
    redo_rec_ptr: u64,
    #[cfg(feature = "pg15")]
    force_page_writes: bool,
    full_page_writes: bool,
    running_backups: c_int,
    last_backup_start: u64,
    pub wal_insert_locks: *mut InsertLock,
}

/// `WALInsertLockPadded`.
#[repr(C)]
pub struct InsertLock {
    pub lock: pg_sys::LWLock,
    pub inserting_at: InsertingAt,
    last_important_at: u64,
    pad: [u8; CACHE_LINE_SIZE - size_of::<pg_sys::LWLock>() - 16],
}

#[cfg(any(feature = "pg15", feature = "pg16"))]
pub type InsertingAt = u64;
#[cfg(any(feature = "pg17", feature = "pg18"))]
pub type InsertingAt = pg_sys::pg_atomic_uint64;

/// `XLogCtlData`.
#[repr(C)]
pub struct XLogCtl {
    pub insert: Insert,
    logwrt_rqst: [u64; 2],
    pub redo_rec_ptr: u64,
    ckpt_full_xid: u64,
    async_xact_lsn: u64,
    replication_slot_min_lsn: u64,
    last_removed_seg_no: u64,
    unlogged_lsn: u64,
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    ulsn_lck: pg_sys::slock_t,
    last_seg_switch_time: i64,
    last_seg_switch_lsn: u64,
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    logwrt_result: [u64; 2],
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    log_results: [u64; 3],
    pub initialized_up_to: u64,
    pub pages: *const u8,
    pub xlblocks: *const u64,
    pub xlog_cache_blck: c_int,
    pub insert_timeline: u32,
    prev_timeline: u32,
    shared_recovery_state: c_int,
    install_segment_active: bool,
    wal_writer_sleeping: bool,
    last_checkpoint_rec_ptr: u64,
    last_checkpoint_end_ptr: u64,
    last_checkpoint: pg_sys::CheckPoint,
    last_fpw_disable_rec_ptr: u64,
    info_lck: pg_sys::slock_t,
}

/// Where the structure's pointers point, in bytes of this process's memory.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// Of the structure, and how much is behind it in all.
    pub base: usize,
    pub size: usize,
    /// `wal_buffers`, in pages.
    pub buffers: usize,
    pub xlblocks: usize,
    pub insert_locks: usize,
    pub pages: usize,
    pub cache_blck: i64,
}

impl Addresses {
    /// Must hold before anything is read where they point. An error names what is not as expected.
    pub fn check(&self) -> Result<(), &'static str> {
        let xlblocks = self.base + size_of::<XLogCtl>();
        let behind_xlblocks = xlblocks + size_of::<u64>() * self.buffers;
        // The server leaves a whole lock's room where none would be needed.
        let insert_locks = behind_xlblocks + CACHE_LINE_SIZE - behind_xlblocks % CACHE_LINE_SIZE;
        let pages = (insert_locks + CACHE_LINE_SIZE * INSERT_LOCKS).next_multiple_of(PAGE_SIZE);
        let size = size_of::<XLogCtl>()
            + CACHE_LINE_SIZE * (INSERT_LOCKS + 1)
            + size_of::<u64>() * self.buffers
            + PAGE_SIZE
            + PAGE_SIZE * self.buffers;
        first_that_fails(&[
            (self.buffers > 0, "XLOGbuffers"),
            (self.size == size, "XLOGShmemSize"),
            (self.xlblocks == xlblocks, "xlblocks"),
            (self.insert_locks == insert_locks, "WALInsertLocks"),
            (self.pages == pages, "pages"),
            (
                self.pages + PAGE_SIZE * self.buffers <= self.base + self.size,
                "end of pages",
            ),
            (
                usize::try_from(self.cache_blck) == Ok(self.buffers.wrapping_sub(1)),
                "XLogCacheBlck",
            ),
        ])
    }
}

/// What is found where they point, and what other sources say of it.
#[derive(Clone, Copy, Debug)]
pub struct Contents {
    pub tranches: [u16; INSERT_LOCKS],
    pub insert_timeline: u32,
    pub redo_lsn: u64,
    pub initialized_up_to: u64,
    /// Magic number of the page that ends there, if it is in the buffers.
    pub magic: Option<u16>,
    pub known: Known,
}

/// What exported functions and headers say.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    pub tranche: u16,
    pub insert_timeline: u32,
    /// Read before the structure was.
    pub redo_lsn: u64,
    pub write_lsn: u64,
    pub magic: u16,
}

/// A checkpoint may have begun between two looks at where the last one did.
const REDO_MOVES_MAX: u64 = 1 << 30;

impl Contents {
    pub fn check(&self) -> Result<(), &'static str> {
        let known = &self.known;
        let redo_moved = self.redo_lsn.wrapping_sub(known.redo_lsn);
        first_that_fails(&[
            (
                self.tranches
                    .iter()
                    .all(|&tranche| tranche == known.tranche),
                "tranche of WALInsertLocks",
            ),
            (
                self.insert_timeline == known.insert_timeline,
                "InsertTimeLineID",
            ),
            (redo_moved < REDO_MOVES_MAX, "RedoRecPtr"),
            (
                self.initialized_up_to.is_multiple_of(PAGE_SIZE as u64),
                "InitializedUpTo",
            ),
            (
                self.initialized_up_to + PAGE_SIZE as u64 > known.write_lsn,
                "InitializedUpTo against what is written",
            ),
            (
                self.magic.is_none_or(|magic| magic == known.magic),
                "page at InitializedUpTo",
            ),
        ])
    }
}

fn first_that_fails(checks: &[(bool, &'static str)]) -> Result<(), &'static str> {
    let failed = checks.iter().find(|(holds, _)| !holds);
    failed.map_or(Ok(()), |&(_, what)| Err(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As on a server with `wal_buffers = 64kB`.
    fn addresses() -> Addresses {
        let (base, buffers) = (0x7000_0000usize, 8usize);
        let locks = (base + size_of::<XLogCtl>() + 8 * buffers) / 128 * 128 + 128;
        Addresses {
            base,
            size: size_of::<XLogCtl>() + 128 * 9 + 8 * buffers + 8192 + 8192 * buffers,
            buffers,
            xlblocks: base + size_of::<XLogCtl>(),
            insert_locks: locks,
            pages: (locks + 8 * 128).next_multiple_of(8192),
            cache_blck: 7,
        }
    }

    fn contents() -> Contents {
        Contents {
            tranches: [55; INSERT_LOCKS],
            insert_timeline: 3,
            redo_lsn: 0x200_0028,
            initialized_up_to: 0x300_4000,
            magic: Some(0xD110),
            known: Known {
                tranche: 55,
                insert_timeline: 3,
                redo_lsn: 0x200_0028,
                write_lsn: 0x300_3FFF,
                magic: 0xD110,
            },
        }
    }

    #[test]
    fn the_structure_has_the_size_that_was_measured_on_real_servers() {
        assert_eq!(size_of::<XLogCtl>(), 456);
        assert_eq!(size_of::<InsertLock>(), 128);
    }

    #[test]
    fn addresses_that_are_off_by_anything_are_noticed() {
        assert_eq!(addresses().check(), Ok(()));
        type Change = fn(&mut Addresses);
        let changes: [(Change, &str); 6] = [
            (|a| a.size += 8, "XLOGShmemSize"),
            (|a| a.xlblocks += 8, "xlblocks"),
            (|a| a.insert_locks -= 128, "WALInsertLocks"),
            (|a| a.pages += 8192, "pages"),
            (|a| a.cache_blck = -1, "XLogCacheBlck"),
            (|a| a.buffers = 9, "XLOGShmemSize"),
        ];
        for (change, what) in changes {
            let mut wrong = addresses();
            change(&mut wrong);
            assert_eq!(wrong.check(), Err(what));
        }
    }

    #[test]
    fn contents_that_others_contradict_are_noticed() {
        assert_eq!(contents().check(), Ok(()));
        let mut moved = contents();
        moved.redo_lsn += 0x100_0000; // a checkpoint has begun between two looks
        moved.magic = None; // and the log ends with a page, at the server's start
        assert_eq!(moved.check(), Ok(()));
        type Change = fn(&mut Contents);
        let changes: [(Change, &str); 6] = [
            (|c| c.tranches[7] = 0, "tranche of WALInsertLocks"),
            (|c| c.insert_timeline = 0, "InsertTimeLineID"),
            (|c| c.redo_lsn = 0, "RedoRecPtr"),
            (|c| c.initialized_up_to += 1, "InitializedUpTo"),
            (
                |c| c.initialized_up_to = 0x200_0000,
                "InitializedUpTo against what is written",
            ),
            (|c| c.magic = Some(0), "page at InitializedUpTo"),
        ];
        for (change, what) in changes {
            let mut wrong = contents();
            change(&mut wrong);
            assert_eq!(wrong.check(), Err(what));
        }
    }
}

//! A disk whose flushes last as long as we say, or do not end: our end of `slow_disk.c`.
//!
//! Each disk is a file of four bytes, which the library has mapped into the processes of one host.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::time::Duration;

use crate::place::TestDir;
use crate::process::Environment;

/// `HELD` in `slow_disk.c`.
const HELD: u32 = u32::MAX;

pub struct SlowDisk {
    file: PathBuf,
}

impl SlowDisk {
    /// One that takes no longer than the real one.
    pub fn new(dir: &TestDir, name: &str) -> SlowDisk {
        let file = dir.path().join(format!("{name}.disk"));
        fs::write(&file, 0_u32.to_ne_bytes()).expect("could not write into the test's directory");
        // Whoever runs the servers reads it.
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("our own file");
        SlowDisk { file }
    }

    /// From now on a flush lasts so long.
    pub fn set(&self, flush: Duration) {
        let us = u32::try_from(flush.as_micros()).expect("a flush lasts less than an hour");
        self.write(us);
    }

    /// From now on flushes do not end, until [`SlowDisk::set`] is called; then they begin.
    pub fn hold(&self) {
        self.write(HELD);
    }

    fn write(&self, us: u32) {
        // In place: the processes have mapped this very file.
        let file = OpenOptions::new().write(true).open(&self.file);
        let file = file.expect("our own file");
        file.write_all_at(&us.to_ne_bytes(), 0)
            .expect("our own file");
    }

    /// With these a process has this disk.
    pub fn environment(&self) -> Environment {
        let library = std::env::var_os("SLOW_DISK_LIBRARY")
            .expect("SLOW_DISK_LIBRARY is not set; scripts/cluster-tests builds it and sets it");
        vec![
            ("LD_PRELOAD".into(), library),
            ("SLOW_DISK".into(), self.file.clone().into()),
        ]
    }
}

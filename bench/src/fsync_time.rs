//! How long a flush lasts here: 8 kB written into a segment that is full of zeros, then fdatasync.
//!
//! That is a small commit. It is measured by a child process of the servers' user, so that the
//! preload library can be given to it as to a server: `bench fsync-time DIR` prints microseconds.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use cluster_tests::place::TestDir;
use cluster_tests::process::{Environment, run_ok};

use crate::processors::Processors;

/// In milliseconds.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct FlushTime {
    pub median: f64,
    pub p99: f64,
}

pub const VERB: &str = "fsync-time";

/// In that directory, by a process with these variables, on the primary's processors if they are divided.
pub fn measure(
    dir: &TestDir,
    environment: Environment,
    processors: Option<&Processors>,
) -> FlushTime {
    let mut command = Command::new(std::env::current_exe().expect("our own program"));
    command.arg(VERB).arg(dir.path()).envs(environment);
    if let Some(processors) = processors {
        processors.start_as_primary(&mut command);
    }
    let [median, p99] = two_times(command);
    FlushTime { median, p99 }
}

/// The milliseconds that a child tells of by [`print_percentiles`].
pub fn two_times(command: Command) -> [f64; 2] {
    let output = run_ok(command);
    let mut times = output.lines().map(|line| {
        let us: f64 = line.parse().expect("the child prints numbers");
        us / 1000.0
    });
    let mut next = || times.next().expect("the child prints two numbers");
    [next(), next()]
}

/// In microseconds, a line for each.
pub fn print_percentiles(mut times: Vec<Duration>, percents: &[usize]) {
    times.sort();
    for percent in percents {
        let time = times[times.len() * percent / 100];
        println!("{:.1}", time.as_secs_f64() * 1e6);
    }
}

/// What the child does.
pub fn print(dir: &Path) {
    let mut flushed = Flushed::create(dir);
    let times = (0..400)
        .map(|_| {
            let begun = Instant::now();
            flushed.flush();
            begun.elapsed()
        })
        .collect();
    print_percentiles(times, &[50, 99]);
}

/// A segment that is full of zeros to begin with, and has no name, so that nothing is left of it.
pub struct Flushed {
    file: File,
    block: Vec<u8>,
    offset: u64,
}

impl Flushed {
    const LEN: usize = 8192;
    const SEGMENT: usize = 16 << 20;

    pub fn create(dir: &Path) -> Flushed {
        let path = dir.join("flushed");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path);
        let file = file.expect("could not create a file to flush");
        std::fs::remove_file(&path).expect("our own file");
        file.write_all_at(&vec![0; Flushed::SEGMENT], 0)
            .expect("could not write");
        file.sync_all().expect("could not flush");
        let (block, offset) = (vec![0x5a; Flushed::LEN], 0);
        Flushed {
            file,
            block,
            offset,
        }
    }

    /// Writes the next block and flushes it.
    pub fn flush(&mut self) {
        let written = self.file.write_all_at(&self.block, self.offset);
        written.expect("could not write");
        self.file.sync_data().expect("could not flush");
        self.offset = (self.offset + Flushed::LEN as u64) % Flushed::SEGMENT as u64;
    }
}

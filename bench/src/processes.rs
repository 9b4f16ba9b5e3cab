//! What processes cost: CPU time and memory, read from /proc.
//!
//! CPU time of a tree is that of a process and all below it, and of those among them that have
//! ended and been waited for. The kernel counts it by the nanosecond and tells it in ticks of 10 ms,
//! each process rounded down by itself: over seconds that is little, and not on any side.

use std::fs;
use std::ops::{Add, AddAssign, Sub};

use cluster_tests::process::children_of;

/// Seconds of CPU time.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
pub struct CpuSeconds(pub f64);

impl Add for CpuSeconds {
    type Output = CpuSeconds;
    fn add(self, other: CpuSeconds) -> CpuSeconds {
        CpuSeconds(self.0 + other.0)
    }
}

impl AddAssign for CpuSeconds {
    fn add_assign(&mut self, other: CpuSeconds) {
        self.0 += other.0;
    }
}

impl Sub for CpuSeconds {
    type Output = CpuSeconds;
    fn sub(self, other: CpuSeconds) -> CpuSeconds {
        CpuSeconds(self.0 - other.0)
    }
}

impl std::iter::Sum for CpuSeconds {
    fn sum<I: Iterator<Item = CpuSeconds>>(all: I) -> CpuSeconds {
        all.fold(CpuSeconds::default(), Add::add)
    }
}

/// A process, all below it, and those of them that have ended.
pub fn cpu_of_tree(pid: u32) -> CpuSeconds {
    let below: CpuSeconds = children_of(pid).into_iter().map(cpu_of_tree).sum();
    cpu(pid, 4) + below
}

/// A process alone, with all its threads.
pub fn cpu_of(pid: u32) -> CpuSeconds {
    cpu(pid, 2)
}

/// utime, stime, and then the same of children that were waited for.
fn cpu(pid: u32, fields: usize) -> CpuSeconds {
    // It may have ended just now; then its time is its parent's.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name stands in brackets and may contain any character, brackets too.
    let rest = stat.rfind(')').map_or("", |end| &stat[end + 1..]);
    let ticks = rest.split_whitespace().skip(11).take(fields);
    let ticks: f64 = ticks.filter_map(|tick| tick.parse::<f64>().ok()).sum();
    // SAFETY: no memory is involved.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    CpuSeconds(ticks / per_second as f64)
}

/// Resident memory of a process in megabytes, by what the kernel says it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// Its own: heap and stacks.
    pub anonymous: f64,
    /// Mapped files: mostly code, which all processes of the program share.
    pub file: f64,
    /// Shared memory that it has ever touched, such as the server's buffers. It isn't the
    /// process's own, and there once for all.
    pub shared: f64,
}

impl Memory {
    pub fn of(pid: u32) -> Memory {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let megabytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
            kilobytes.unwrap_or(0.0) / 1024.0
        };
        Memory {
            anonymous: megabytes("RssAnon:"),
            file: megabytes("RssFile:"),
            shared: megabytes("RssShmem:"),
        }
    }

    /// What it would free by ending, and its code.
    pub fn resident(self) -> f64 {
        self.anonymous + self.file
    }

    pub fn plus(self, other: Memory) -> Memory {
        Memory {
            anonymous: self.anonymous + other.anonymous,
            file: self.file + other.file,
            shared: self.shared + other.shared,
        }
    }

    /// The highest of each.
    pub fn max(self, other: Memory) -> Memory {
        Memory {
            anonymous: self.anonymous.max(other.anonymous),
            file: self.file.max(other.file),
            shared: self.shared.max(other.shared),
        }
    }
}

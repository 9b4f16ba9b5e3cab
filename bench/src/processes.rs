//! What processes cost: CPU time and memory, read from /proc.
//!
//! CPU time of a tree is that of a process and all below it, and of those among them that have
//! ended and been waited for. The kernel counts it by the nanosecond and tells it in ticks of 10 ms,
//! each process rounded down by itself: over seconds that is little, and not on any side.

use std::collections::HashMap;
use std::fs;

/// The CPU time of all processes, read in one go: a few milliseconds.
pub struct CpuTimes(HashMap<u32, Entry>);

struct Entry {
    parent: u32,
    /// Seconds, all threads together.
    own: f64,
    /// Of children that have ended and been waited for, and of theirs.
    ended: f64,
}

impl CpuTimes {
    pub fn now() -> CpuTimes {
        // SAFETY: no memory is involved.
        let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
        let pids = fs::read_dir("/proc").expect("/proc is there").flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        CpuTimes(
            pids.filter_map(|pid| Some((pid, Entry::read(pid, per_second)?)))
                .collect(),
        )
    }

    /// Seconds of a process alone.
    pub fn of(&self, pid: u32) -> f64 {
        self.0.get(&pid).map_or(0.0, |entry| entry.own)
    }

    /// A process and all below it.
    pub fn tree(&self, pid: u32) -> Vec<u32> {
        let children = self.0.iter().filter(|(_, entry)| entry.parent == pid);
        let below = children.flat_map(|(child, _)| self.tree(*child));
        std::iter::once(pid).chain(below).collect()
    }

    /// Seconds of a process, all below it, and those of them that have ended.
    pub fn of_tree(&self, pid: u32) -> f64 {
        let children = self.0.iter().filter(|(_, entry)| entry.parent == pid);
        let below: f64 = children.map(|(child, _)| self.of_tree(*child)).sum();
        self.0
            .get(&pid)
            .map_or(0.0, |entry| entry.own + entry.ended)
            + below
    }
}

impl Entry {
    /// `None` if it has ended just now: then its time is its parent's.
    fn read(pid: u32, per_second: f64) -> Option<Entry> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name stands in brackets and may contain any character, brackets too.
        let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
        let parent = fields.nth(1)?.parse().ok()?;
        // utime, stime, and then the same of children.
        let mut ticks = fields.skip(9).filter_map(|field| field.parse::<f64>().ok());
        let mut two = || Some((ticks.next()? + ticks.next()?) / per_second);
        Some(Entry {
            parent,
            own: two()?,
            ended: two()?,
        })
    }
}

/// Time on a processor, in seconds, of each of some threads: as the kernel counts it, by the nanosecond. Many
/// that do little each would be lost in ticks.
#[derive(Default)]
pub struct RunTimes(HashMap<u32, f64>);

impl RunTimes {
    /// Of all threads of these processes that are not among `others`.
    pub fn of(pids: impl IntoIterator<Item = u32>, others: &RunTimes) -> RunTimes {
        let threads = pids.into_iter().flat_map(|pid| {
            let tasks = fs::read_dir(format!("/proc/{pid}/task"));
            tasks
                .into_iter()
                .flatten()
                .flatten()
                .filter_map(move |entry| {
                    let tid = entry.file_name().to_str()?.parse::<u32>().ok()?;
                    let text =
                        fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat")).ok()?;
                    let nanoseconds: f64 = text.split(' ').next()?.parse().ok()?;
                    Some((tid, nanoseconds / 1e9))
                })
        });
        RunTimes(
            threads
                .filter(|(tid, _)| !others.0.contains_key(tid))
                .collect(),
        )
    }

    /// What those have run that were there already.
    pub fn since(&self, earlier: &RunTimes) -> f64 {
        let both = self
            .0
            .iter()
            .filter_map(|(tid, time)| Some(time - earlier.0.get(tid)?));
        both.sum()
    }
}

/// How long all processors together have been busy, and were there, in ticks of the kernel's.
pub struct Busy {
    busy: f64,
    all: f64,
}

impl Busy {
    pub fn now() -> Busy {
        let text = fs::read_to_string("/proc/stat").expect("/proc is there");
        let line = text
            .lines()
            .next()
            .expect("the first line is of all processors");
        let ticks = line.split_whitespace().filter_map(|word| word.parse().ok());
        // user, nice, system, idle, iowait, irq, softirq, steal; those of guests stand under user, too.
        let ticks: Vec<f64> = ticks.take(8).collect();
        let all: f64 = ticks.iter().sum();
        let idle: f64 = ticks.iter().skip(3).take(2).sum();
        Busy {
            busy: all - idle,
            all,
        }
    }

    pub fn percent_since(&self) -> f64 {
        let now = Busy::now();
        100.0 * (now.busy - self.busy) / (now.all - self.all)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Spins for a moment, as a child that ends.
    fn spin() {
        let script = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done";
        let status = std::process::Command::new("sh")
            .args(["-c", script])
            .status();
        assert!(status.unwrap().success());
    }

    #[test]
    fn time_of_children_that_have_ended_counts_in_the_tree_only() {
        let pid = std::process::id();
        let before = CpuTimes::now();
        spin();
        let after = CpuTimes::now();
        assert!(after.of_tree(pid) - before.of_tree(pid) >= 0.02);
        assert!(after.of(pid) < after.of_tree(pid));
    }
}

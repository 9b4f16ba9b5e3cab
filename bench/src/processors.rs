//! Gives the emulated primary's host processors of its own, and all other hosts the rest.
//!
//! A commit on hosts of their own waits for nobody else's work. With two processors or more, the first half of them
//! is the primary's: the server's processes and what is measured in its place. The members, the links and pgbench
//! have the other half, in every setup alike.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::processes::CpuTimes;

/// Until it is dropped.
pub struct Processors {
    all: libc::cpu_set_t,
    primary: libc::cpu_set_t,
}

impl Processors {
    /// This process, all its threads and whatever they start from here on leave the primary's alone.
    pub fn divide() -> Option<Processors> {
        let all = allowed();
        let numbers: Vec<usize> = (0..libc::CPU_SETSIZE as usize)
            .filter(|number| has(&all, *number))
            .collect();
        if numbers.len() < 2 {
            eprintln!("one processor only: the primary shares it with all others");
            return None;
        }
        let (primary, others) = numbers.split_at(numbers.len() / 2);
        move_threads(std::process::id(), &set_of(others));
        Some(Processors {
            all,
            primary: set_of(primary),
        })
    }

    /// A process and all below it, and whatever they start, are the primary's.
    pub fn give_to_primary(&self, pid: u32) {
        for pid in CpuTimes::now().tree(pid) {
            move_threads(pid, &self.primary);
        }
    }

    /// So is what that command starts.
    pub fn start_as_primary(&self, command: &mut Command) {
        let primary = self.primary;
        // SAFETY: between fork and exec only this system call is made, which is async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                set(0, &primary);
                Ok(())
            });
        }
    }
}

impl Drop for Processors {
    fn drop(&mut self) {
        move_threads(std::process::id(), &self.all);
    }
}

fn allowed() -> libc::cpu_set_t {
    let mut set = set_of(&[]);
    // SAFETY: `set` is as large as we say.
    let got = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
    assert_eq!(got, 0, "{}", std::io::Error::last_os_error());
    set
}

fn set_of(numbers: &[usize]) -> libc::cpu_set_t {
    // SAFETY: a set of bits, empty when all are zero.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for number in numbers {
        // SAFETY: the number is one of those that a set has room for.
        unsafe { libc::CPU_SET(*number, &mut set) };
    }
    set
}

fn has(set: &libc::cpu_set_t, number: usize) -> bool {
    // SAFETY: the number is one of those that a set has room for.
    unsafe { libc::CPU_ISSET(number, set) }
}

/// A thread that has ended meanwhile needs no processor.
fn move_threads(pid: u32, to: &libc::cpu_set_t) {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    for task in tasks.into_iter().flatten().flatten() {
        if let Some(tid) = task.file_name().to_str().and_then(|name| name.parse().ok()) {
            set(tid, to);
        }
    }
}

/// 0 is the calling thread.
fn set(tid: libc::pid_t, to: &libc::cpu_set_t) {
    // SAFETY: `to` is as large as we say.
    unsafe { libc::sched_setaffinity(tid, size_of_val(to), to) };
}

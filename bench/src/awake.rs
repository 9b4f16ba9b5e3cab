//! Keeps the processors awake, as a database's host is set up to (`tuned`'s profiles do it by the same means).
//!
//! A processor with nothing to do is halted. A virtual one is given back to the machine below then, which takes
//! some ten microseconds to return it: for whoever wakes a process there, and for a timer. Emulated hosts flush by
//! timers and share two processors that have nothing else to do, so a short commit would mostly be that.
//! What is measured on one machine is measured as it is.

use std::fs::{File, OpenOptions};
use std::io::Write;

/// While it is open, the longest time in microseconds that a processor may take to wake up, as a word of 32 bits
/// (the kernel's `pm_qos_interface`). For root only.
const LATENCY: &str = "/dev/cpu_dma_latency";

/// Until it is dropped.
pub struct KeepAwake {
    _latency: File,
}

impl KeepAwake {
    /// `None`, and a word about it, where it can't be had: figures are higher then, for every setup.
    pub fn begin() -> Option<KeepAwake> {
        let latency = OpenOptions::new().write(true).open(LATENCY);
        let asked = latency.and_then(|mut file| {
            file.write_all(&0_i32.to_ne_bytes())?;
            Ok(file)
        });
        asked
            .map(|latency| KeepAwake { _latency: latency })
            .inspect_err(|error| eprintln!("processors are not kept awake: {LATENCY}: {error}"))
            .ok()
    }
}

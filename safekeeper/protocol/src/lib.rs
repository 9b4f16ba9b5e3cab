#![no_std]

extern crate alloc;

mod lsn;

pub use lsn::{InvalidLsn, Lsn};

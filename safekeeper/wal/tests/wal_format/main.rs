//! The crate's public face, tested with synthetic WAL; one program, so that it links once.

mod damage;
mod decoding;
mod end_of_log;
mod properties;
mod support;

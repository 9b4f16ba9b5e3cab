//! The command `safekeeper`: arguments, logger, panic hook, signals, exit code.
//!
//! Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 not running; `fetch-wal` has one more, which stops a
//! recovery (`fetch_wal.rs`).

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = match cli::Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return cli::refuse(&error),
    };
    match cli::run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("safekeeper: {}", failure.message);
            ExitCode::from(failure.code)
        }
    }
}

//! Properties of whatever reads bytes from the network or the disk, and programs that search for
//! bytes which break them.
//!
//! Each module here is about one decoder, or a few that belong together, and has two functions:
//!
//! * `check` takes any bytes and panics if a property does not hold for them;
//! * `seeds` gives real encodings, from which a search sets out.
//!
//! Two drivers call them. The programs in `targets/` are libFuzzer: instrumented code tells it
//! which mutation of an input reached something new, and it goes on from there for as long as it
//! is let (`scripts/fuzz`). And the tests of the crates that own the decoders include the very same
//! modules and feed them with proptest, a few thousand inputs with every `cargo test`.
//!
//! A property is more than "does not panic". Where an encoding is canonical, what was decoded must
//! encode to the same bytes. How a stream is cut into pieces must not matter. And no decoder
//! may allocate more than a stated multiple of what has arrived, whatever a length word claims:
//! the counting allocator tells.

pub mod data_files;
pub mod local_history;
pub mod postgres_messages;
pub mod protocol_messages;
pub mod safekeeper_messages;
pub mod settings;
pub mod timeline_history;
pub mod wal_bytes;
pub mod wal_records;

/// The main function of a target: libFuzzer's, which calls `check` of the module named.
///
/// With SEEDS_TO set to a directory it writes `seeds` there instead and ends. It does not take a
/// program of its own: nothing links here without libFuzzer.
#[macro_export]
macro_rules! fuzz {
    ($module:ident) => {
        libfuzzer_sys::fuzz_target!(
            init: $crate::write_seeds_if_asked($crate::$module::seeds),
            |input: &[u8]| $crate::$module::check(input)
        );
    };
}

/// For the macro above.
pub fn write_seeds_if_asked(seeds: fn() -> Vec<Vec<u8>>) {
    let Some(dir) = std::env::var_os("SEEDS_TO") else {
        return;
    };
    for (i, seed) in seeds().into_iter().enumerate() {
        let path = std::path::Path::new(&dir).join(format!("seed-{i:02}"));
        std::fs::write(path, seed).expect("the directory can be written to");
    }
    std::process::exit(0);
}

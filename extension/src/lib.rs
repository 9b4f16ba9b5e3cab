//! `walproposer`: PostgreSQL's side of Safekeeper.
//!
//! Loaded by `shared_preload_libraries`, it starts a background worker that pushes WAL to the
//! safekeepers of `walproposer.safekeepers`, and makes commits wait until a majority has flushed
//! it. `CREATE EXTENSION walproposer` adds views and functions, and nothing else.
//!
//! In reading order. What knows Postgres:

mod commit; // what happens in a committing backend
mod postgres;
mod pusher; // drives the proposer and the pipelines to the members
mod settings; // the settings, and configurations that are refused
mod shmem; // what backends may see of the worker
mod slot; // the replication slot that keeps WAL
mod status; // the functions behind the views
mod wait_set; // what the worker sleeps on
mod wal_sender_slot; // the worker as the synchronous standby
mod worker; // the background worker: signals, sleeping, shutdown // Postgres's functions under safe names

// What doesn't:
mod address; // host:port,host:port
mod compare; // the local log against the donor's
mod connect; // resolve, connect, shake hands
mod conninfo; // user=... connect_timeout=...
mod donor; // WAL by position, from a safekeeper
mod feed; // a member whose next byte has left pg_wal
mod lag; // from sent to acknowledged
mod local_history; // the proposer's own term history
mod peer; // one safekeeper's connection and pipeline
mod pgwire; // the slice of Postgres's protocol that is spoken to a safekeeper
mod threads;
mod wal_source; // WAL by position, from pg_wal // signals blocked, panics caught

use pgrx::{pg_guard, pg_sys};

::pgrx::pg_module_magic!(name, version);

/// Called by Postgres when the library is loaded.
#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    // SAFETY: a variable of this process.
    if !unsafe { pg_sys::process_shared_preload_libraries_in_progress } {
        // Views and functions can be created, and say that nothing is there to be shown.
        return;
    }
    settings::check_values_in_file();
    settings::define();
    if !settings::is_active() {
        return postgres::warning(
            "walproposer is loaded, but walproposer.safekeepers is not set: commits wait for no safekeeper",
            "Set walproposer.safekeepers to a list of host:port, or take walproposer out of shared_preload_libraries.",
        );
    }
    settings::check_configuration();
    shmem::register();
    commit::register();
    wal_sender_slot::register_hook();
    worker::register();
}

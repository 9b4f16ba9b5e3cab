//! `walproposer`: PostgreSQL's side of Safekeeper.
//!
//! Loaded by `shared_preload_libraries`, it starts a background worker that pushes WAL to the
//! safekeepers of `walproposer.safekeepers`, and makes commits wait until a majority has flushed
//! it. `CREATE EXTENSION walproposer` adds views and functions, and nothing else.
//!
//! In reading order; below the line nothing knows Postgres:
//!
//! | | |
//! |---|---|
//! | `settings` | the settings, and configurations that are refused |
//! | `start` | before recovery: win a term, complete the local log, or refuse to start |
//! | `gate` | sessions wait until the recovered WAL is on the quorum |
//! | `worker` | the background worker: signals, sleeping, shutdown |
//! | `promotion`, `promoter` | a standby is asked to become the primary, and does |
//! | `pusher` | drives the proposer and the pipelines to the members |
//! | `wal_sender_slot` | the worker as the synchronous standby |
//! | `slot` | the replication slot that keeps WAL |
//! | `commit` | what happens in a committing backend |
//! | `read_only` | a deposed primary that only reads |
//! | `stop` | sessions get their answers, and the shutdown checkpoint is on the quorum |
//! | `wal_buffers` | WAL out of the server's shared buffers |
//! | `early_push` | when WAL is pushed before it is flushed |
//! | `shmem`, `status` | what backends may see of the worker, and the functions behind the views |
//! | `local_log` | what the data directory says of the local log |
//! | `wait_set` | what the worker sleeps on |
//! | `postgres` | Postgres's functions under safe names |
//! | | |
//! | `address`, `conninfo` | the two settings that are little languages |
//! | `pgwire`, `connect`, `peer` | messages, a connection, one safekeeper's pipeline |
//! | `local_wal` | WAL by position: from the buffers, or from files |
//! | `wal_source` | WAL by position, from `pg_wal` |
//! | `donor`, `feed` | WAL by position, from a safekeeper, and a member that needs it |
//! | `compare`, `completion` | the local log against the donor's, and what it lacks of it |
//! | `fetch_settings` | the file by which `restore_command` finds the safekeepers |
//! | `local_history` | the file with the proposer's own term history |
//! | `lag` | from sent to acknowledged |
//! | `threads` | signals blocked, panics caught |

mod address;
mod commit;
mod compare;
mod completion;
mod connect;
mod conninfo;
mod donor;
mod early_push;
mod feed;
mod fetch_settings;
mod gate;
mod lag;
mod local_history;
mod local_log;
mod local_wal;
mod peer;
mod pgwire;
mod postgres;
mod promoter;
mod promotion;
mod pusher;
mod read_only;
mod replay_wait;
mod settings;
mod shmem;
mod slot;
mod standby_xmin;
mod start;
mod status;
mod stop;
mod threads;
mod wait_set;
mod wal_buffers;
mod wal_sender_slot;
mod wal_source;
mod worker;

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
    // SAFETY: variables of this process.
    if !unsafe { pg_sys::IsPostmasterEnvironment } || unsafe { pg_sys::IsBinaryUpgrade } {
        // A single user, or pg_upgrade: no background worker can run, so no commit may wait for it.
        return postgres::warning(
            "WAL is not pushed to the safekeepers in single-user mode and while upgrading",
            "",
        );
    }
    settings::check_configuration();
    shmem::register();
    commit::register();
    read_only::register();
    wal_sender_slot::register_hook();
    worker::register();
}

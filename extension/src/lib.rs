//! `walproposer`: PostgreSQL's side of Safekeeper.

mod address;
mod connect;
mod conninfo;
mod donor;
mod lag;
mod local_history;
mod peer;
mod pgwire;
mod threads;
mod wal_source;

::pgrx::pg_module_magic!(name, version);

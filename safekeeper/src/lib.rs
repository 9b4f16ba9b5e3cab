//! The daemon of Safekeeper for PostgreSQL, as a library so that tests can run one in-process.
//!
//! Below, from the disk upwards; each group knows only those above it.

// What is on disk.
pub mod control_file;
pub mod disk;
pub mod dump;
pub mod identity;
mod prepare;
mod recovery;
mod reserved_file;
pub mod segment;
pub mod slot_file;
mod timeline_files;
pub mod verify;
pub mod wal_reader;
pub mod wal_storage;
mod write_order;

// Leaves: what others are told, and how.
pub mod access;
pub mod config;
pub mod credentials;
pub mod logging;
pub mod metrics;
pub mod replication_command;
pub mod retention;
pub mod status;
pub mod users;
pub mod watch;

// Who owns a cluster, and who reads it.
pub mod clusters;
pub mod consumers;
pub mod keeper;
pub mod slots;
pub mod view;

// Who speaks to the world.
mod authenticate;
pub mod connection;
mod descriptors;
pub mod http;
pub mod receive_wal;
mod relay;
pub mod send_wal;
pub mod server;

// Who asks other safekeepers.
pub mod fetch_wal;
pub mod tail;

//! A client of streaming replication, for those who read WAL: page servers, `safekeeper tail` and
//! `safekeeper fetch-wal`.
//!
//! [`follower`] follows a cluster's log record by record, wherever it is to be had. It stands on
//! [`wal_client`], which asks one safekeeper (or a primary: they speak alike) and takes WAL from it.
//!
//! Not here yet: TLS.

pub mod follower;
pub mod wal_client;

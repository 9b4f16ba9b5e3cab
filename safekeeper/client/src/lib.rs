//! A client of streaming replication, for those who read WAL: page servers, `safekeeper fetch-wal`.
//!
//! [`wal_client`] asks a safekeeper (or a primary: they speak alike) and takes WAL from it.

pub mod wal_client;

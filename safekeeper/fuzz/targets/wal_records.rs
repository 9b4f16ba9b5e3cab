#![no_main]

safekeeper_fuzz::fuzz!(wal_records);

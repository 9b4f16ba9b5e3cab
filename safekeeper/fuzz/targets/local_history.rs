#![no_main]

safekeeper_fuzz::fuzz!(local_history);

#![no_main]

safekeeper_fuzz::fuzz!(timeline_history);

#![no_main]

safekeeper_fuzz::fuzz!(settings);

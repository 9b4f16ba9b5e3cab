#![no_main]

safekeeper_fuzz::fuzz!(data_files);

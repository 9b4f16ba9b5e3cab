#![no_main]

safekeeper_fuzz::fuzz!(postgres_messages);

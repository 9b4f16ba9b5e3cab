#![no_main]

safekeeper_fuzz::fuzz!(safekeeper_messages);

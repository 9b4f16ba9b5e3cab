#![no_main]

safekeeper_fuzz::fuzz!(protocol_messages);

pub mod control_file;
pub mod disk;
pub mod identity;
pub mod watch;

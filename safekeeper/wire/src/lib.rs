//! PostgreSQL's wire protocol, as far as safekeepers and their clients speak it: both ends of it, so
//! that what one writes is what the other reads.
//!
//! [`channel`] is a connection, encrypted by [`tls`] or not; [`pgwire`] has messages and the buffers between
//! them and it, [`startup`] what a connection begins with, [`scram`] how a password is proved ([`login`] for
//! clients, with [`credentials`] and [`passfile`]), [`standby_message`] what a consumer reports while WAL is streamed to it.
//!
//! Not here: the messages of consensus (`safekeeper-protocol`), and what a command does.

#[cfg(any(test, feature = "test-certificates"))]
pub mod certificates;
pub mod channel;
pub mod credentials;
pub mod login;
pub mod passfile;
pub mod pgwire;
pub mod scram;
pub mod standby_message;
pub mod startup;
pub mod tls;

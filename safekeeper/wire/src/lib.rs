//! PostgreSQL's wire protocol, as far as safekeepers and their clients speak it: both ends of it, so
//! that what one writes is what the other reads.
//!
//! [`pgwire`] has messages and the buffers between them and a socket, [`startup`] what a connection
//! begins with, [`scram`] how a password is
//! proved ([`login`] for clients, with [`passfile`]), [`standby_message`] what a consumer reports while WAL is streamed to it.
//!
//! Not here: the messages of consensus (`safekeeper-protocol`), and what a command does.

pub mod login;
pub mod passfile;
pub mod pgwire;
pub mod scram;
pub mod standby_message;
pub mod startup;

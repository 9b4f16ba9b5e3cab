//! The gate: after a restart no ordinary session gets in before the recovered WAL is on the quorum
//! (G5).
//!
//! Recovery replays all that the local disk holds, transactions included that were never
//! acknowledged and that the quorum may not have yet. A session that saw one, before another
//! primary takes over without it, would have seen what never was.
//!
//! The postmaster closes the gate before recovery; the worker, when it leads, writes down how far
//! the log reaches by then, and opens the gate when that much is committed. A restart of the worker
//! alone closes nothing. Sessions wait where they are authenticated, for at most
//! `authentication_timeout`; WAL senders do not.

use std::ffi::CStr;

use pgrx::pg_sys;

use crate::postgres::{self, Port};
use crate::{settings, shmem};

/// Waits until the gate is open, if it is closed for this session.
///
/// # Safety
/// In a backend that is being authenticated: `port` is Postgres's own.
pub unsafe fn hold(port: *mut Port) {
    // SAFETY: by the caller.
    let maintenance = || unsafe { is_local_superuser(port) } && !settings::hold_superusers();
    if shmem::gate_is_open() || !settings::hold_connections() || maintenance() {
        return;
    }
    postgres::log("session is held until the recovered WAL is on the quorum");
    shmem::wait_for_gate();
}

/// # Safety
/// As [`hold`].
unsafe fn is_local_superuser(port: *mut Port) -> bool {
    // SAFETY: by the caller; the name is a C string, and an unknown role has no rights.
    unsafe {
        if !(*port).is_local_socket() || (*port).user_name.is_null() {
            return false;
        }
        let name = CStr::from_ptr((*port).user_name);
        let role = pg_sys::get_role_oid(name.as_ptr(), true);
        role != pg_sys::InvalidOid && pg_sys::superuser_arg(role)
    }
}

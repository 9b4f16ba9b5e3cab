//! The functions behind the views `pg_stat_walproposer` and `pg_stat_safekeeper`, and
//! `walproposer_wait_commit`. The views themselves are in `sql/status.sql`.
//!
//! LSNs cross to SQL as `bigint` and become `pg_lsn` there; unknown values are NULL.

use pgrx::iter::TableIterator;
use pgrx::prelude::*;
use safekeeper_protocol::Lsn;

use crate::{postgres, shmem};

fn lsn(lsn: Lsn) -> Option<i64> {
    if lsn.is_valid() {
        i64::try_from(lsn.0).ok()
    } else {
        None
    }
}

fn count(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn text(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// No row if the library was not preloaded.
#[pg_extern(parallel_safe, volatile)]
#[expect(clippy::type_complexity, reason = "a row of SQL")]
fn walproposer_status() -> TableIterator<
    'static,
    (
        name!(state, String),
        name!(term, i64),
        name!(generation, i64),
        name!(tli, i64),
        name!(insert_lsn, Option<i64>),
        name!(sent_lsn, Option<i64>),
        name!(flush_lsn, Option<i64>),
        name!(commit_lsn, Option<i64>),
        name!(quorum_size, i32),
        name!(members, i32),
        name!(members_active, i32),
        name!(elected_at, Option<TimestampWithTimeZone>),
        name!(bytes_from_buffers, i64),
        name!(bytes_from_files, i64),
        name!(bytes_from_donor, i64),
        name!(wakeups, i64),
        name!(waits_cancelled, i64),
        name!(last_error, Option<String>),
    ),
> {
    let small = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    // SAFETY: asks for the server's state.
    let in_recovery = unsafe { pg_sys::RecoveryInProgress() };
    let local = |position: fn() -> Lsn| if in_recovery { None } else { lsn(position()) };
    let row = shmem::status().map(|status| {
        let elected_at = (status.elected_at != 0).then_some(status.elected_at);
        (
            text(status.state.get()).unwrap_or_else(|| "inactive".to_owned()),
            count(status.term),
            i64::from(status.generation),
            i64::from(status.tli),
            local(postgres::insert_lsn),
            lsn(status.sent_lsn),
            local(postgres::flushed_lsn),
            lsn(shmem::commit_lsn()),
            small(status.quorum_size),
            small(status.members_configured),
            small(status.members_active),
            elected_at.and_then(|at| TimestampWithTimeZone::try_from(at).ok()),
            count(status.bytes_from_buffers),
            count(status.bytes_from_files),
            count(status.bytes_from_donor),
            count(status.wakeups),
            count(shmem::waits_cancelled()),
            text(status.last_error.get()),
        )
    });
    TableIterator::new(row)
}

/// A row for each address in `walproposer.safekeepers`.
#[pg_extern(parallel_safe, volatile)]
#[expect(clippy::type_complexity, reason = "a row of SQL")]
fn walproposer_safekeepers() -> TableIterator<
    'static,
    (
        name!(id, Option<i64>),
        name!(host, String),
        name!(port, i32),
        name!(state, String),
        name!(term, i64),
        name!(sent_lsn, Option<i64>),
        name!(flush_lsn, Option<i64>),
        name!(commit_lsn, Option<i64>),
        name!(flush_lag_us, Option<i64>),
        name!(reconnects, i64),
        name!(last_error, Option<String>),
    ),
> {
    let status = shmem::status();
    let peers =
        status.map(|status| status.peers[..status.n_peers.min(status.peers.len())].to_vec());
    let rows = peers.unwrap_or_default().into_iter().map(|peer| {
        (
            (peer.id != 0).then_some(count(peer.id)),
            peer.host.get(),
            i32::from(peer.port),
            peer.state.get(),
            count(peer.term),
            lsn(peer.sent_lsn),
            lsn(peer.flush_lsn),
            lsn(peer.commit_lsn),
            (peer.flush_lag_us >= 0).then_some(peer.flush_lag_us),
            count(peer.reconnects),
            text(peer.last_error.get()),
        )
    });
    TableIterator::new(rows)
}

/// Waits until the quorum has the WAL up to `lsn`; false if that took longer than `timeout_ms`.
/// A negative time-out waits for ever.
#[pg_extern(volatile, strict)]
fn walproposer_wait_commit_until(lsn: i64, timeout_ms: i64) -> bool {
    if !shmem::is_there() {
        postgres::error(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "walproposer is not active",
            "Add walproposer to shared_preload_libraries, set walproposer.safekeepers, and restart the server.",
        );
    }
    let lsn = Lsn(u64::try_from(lsn).unwrap_or(0));
    shmem::wait_for_commit(lsn, u64::try_from(timeout_ms).ok())
}

extension_sql_file!(
    "../../sql/status.sql",
    name = "status",
    requires = [
        walproposer_status,
        walproposer_safekeepers,
        walproposer_wait_commit_until
    ]
);
extension_sql_file!(
    "../../sql/grants.sql",
    name = "grants",
    requires = ["status"],
    finalize
);

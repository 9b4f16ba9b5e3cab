-- The views over the worker's state, and waiting for a position. See extension/src/status.rs.

CREATE VIEW pg_stat_walproposer AS
SELECT state,
       term,
       generation,
       tli,
       '0/0'::pg_lsn + insert_lsn AS insert_lsn,
       '0/0'::pg_lsn + sent_lsn   AS sent_lsn,
       '0/0'::pg_lsn + flush_lsn  AS flush_lsn,
       '0/0'::pg_lsn + commit_lsn AS commit_lsn,
       quorum_size,
       members,
       members_active,
       elected_at,
       bytes_from_buffers,
       bytes_from_files,
       bytes_from_donor,
       wakeups,
       waits_cancelled,
       last_error
FROM walproposer_status();

COMMENT ON VIEW pg_stat_walproposer IS 'the proposer: its reign, its positions, what it waits for';

-- A safekeeper answers when it has flushed, so write_lag is flush_lag.
CREATE VIEW pg_stat_safekeeper AS
SELECT id,
       host,
       port,
       state,
       term,
       '0/0'::pg_lsn + sent_lsn   AS sent_lsn,
       '0/0'::pg_lsn + flush_lsn  AS flush_lsn,
       '0/0'::pg_lsn + commit_lsn AS commit_lsn,
       CASE WHEN NOT pg_is_in_recovery()
            THEN greatest(pg_wal_lsn_diff(pg_current_wal_flush_lsn(), '0/0'::pg_lsn + flush_lsn), 0)::bigint
       END AS lag_bytes,
       make_interval(secs => flush_lag_us / 1e6) AS write_lag,
       make_interval(secs => flush_lag_us / 1e6) AS flush_lag,
       reconnects,
       last_error
FROM walproposer_safekeepers();

COMMENT ON VIEW pg_stat_safekeeper IS 'the safekeepers of walproposer.safekeepers, a row for each';

CREATE FUNCTION walproposer_wait_commit(lsn pg_lsn, timeout interval DEFAULT NULL) RETURNS bool
    LANGUAGE sql VOLATILE
    RETURN walproposer_wait_commit_until(
        (lsn - '0/0'::pg_lsn)::bigint,
        coalesce(ceil(extract(epoch FROM timeout) * 1000)::bigint, -1));

COMMENT ON FUNCTION walproposer_wait_commit(pg_lsn, interval)
    IS 'waits until a quorum of safekeepers has the WAL up to lsn; false after timeout';

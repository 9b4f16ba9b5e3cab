-- Promotion through the quorum. See extension/src/promotion.rs. As with pg_promote(), a superuser may
-- grant it to others.

REVOKE ALL ON FUNCTION walproposer_promote(integer), walproposer_prepare_promotion(integer) FROM PUBLIC;

COMMENT ON FUNCTION walproposer_promote(integer)
    IS 'makes this standby the primary by the safekeepers'' votes; false after wait_seconds';
COMMENT ON FUNCTION walproposer_prepare_promotion(integer)
    IS 'all of a promotion but the end of recovery, for HA managers; false after wait_seconds';

-- Who may look: error texts name hosts, so monitoring roles only.

REVOKE ALL ON FUNCTION walproposer_status(), walproposer_safekeepers() FROM PUBLIC;
REVOKE ALL ON pg_stat_walproposer, pg_stat_safekeeper FROM PUBLIC;
GRANT EXECUTE ON FUNCTION walproposer_status(), walproposer_safekeepers() TO pg_monitor;
GRANT SELECT ON pg_stat_walproposer, pg_stat_safekeeper TO pg_monitor;

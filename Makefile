# The verbs. Each is a script that can be read and run by itself.

PREFIX ?= /usr/local
# Which PostgreSQL: its major version, or, if that is not enough, its PG_CONFIG. See scripts/settings.
PG ?= 15
export PG

.PHONY: help demo demo-stop test mutations model soak failover-run fuzz bench check install
.DEFAULT_GOAL := help

help: ## what can be made
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: ## three safekeepers, a primary, a standby, pgbench; from nothing. PG=15, 17 or 18
	@scripts/demo

demo-stop: ## stop what `make demo` started, remove its data
	@scripts/demo-stop

test: ## everything: lints, unit tests, tests on real clusters. PG=17: all of it on that one
	@scripts/test

mutations: ## break each rule on purpose; the tests must notice
	@scripts/mutations

model: ## every order of events in small clusters; takes an hour or two
	@scripts/model

soak: ## SEEDS=100000 simulated clusters from FIRST on; takes hours, can be resumed
	@scripts/soak

failover-run: ## CYCLES=200 faults and failovers on real clusters; half an hour
	@scripts/failover-run

fuzz: ## search for bytes that a decoder does not survive, SECONDS_EACH=600
	@scripts/fuzz

bench: ## speed, beside local-only and stock synchronous replication; half an hour, QUICK=1 4 minutes
	@scripts/bench

check: ## formatting and lints only; PG=16 too
	@scripts/install-deps && scripts/check

install: ## daemon to PREFIX/bin, extension into the Postgres of PG or PG_CONFIG
	@scripts/install-deps && scripts/install "$(PREFIX)"

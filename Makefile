# On a machine that has only Python 3.11+ and make: `make demo` shows it at work, `make test` checks all of it.

PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/.ready
BENCH  := .venv/.ready-to-bench
PEERS  := .venv-peers/.ready
MINUTES ?= 40
RUNS   ?= 1000000
SCHEDULES ?= 1000000

.PHONY: help demo test lint format cov chaos conformance fuzz bench clean
.DEFAULT_GOAL := help

help:    ## this list
	@sed -n 's/^\([a-z]*\): .*## /  make \1\t/p' Makefile | expand -t 16

demo: $(READY)    ## the main job: worker processes share flows, one is killed, all is verified
	@$(BIN)/redisflow demo

test: lint    ## lint, then every test
	@$(BIN)/python -m pytest

lint: $(READY)    ## style, types, layers, scripts
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@if command -v luacheck >/dev/null; then luacheck --quiet lua; \
	else echo "luacheck: not on the PATH, the Lua scripts go unchecked (Debian: apt-get install lua-check)"; fi

format: $(READY)    ## rewrite the Python files to the style
	@$(BIN)/ruff check --quiet --fix-only
	@$(BIN)/ruff format

cov: $(READY)    ## every test, measured: branch coverage of redisflow, at least 95 %
	@$(BIN)/python -m pytest --cov --cov-report=term --cov-fail-under=95

chaos: $(READY)    ## 40 minutes of writers while things break: what is lost, doubled or out of order (MINUTES=, SEED=)
	@$(BIN)/python -m tests.chaos --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

conformance: $(READY)    ## a million random schedules of the protocol, on a simulated network: none doubles a change (SCHEDULES=, SEED=)
	@$(BIN)/python -m tests.protocol --schedules $(SCHEDULES) $(if $(SEED),--seed $(SEED))

fuzz: $(READY)    ## a million hostile inputs, guided by coverage: none crashes, hangs or is stored unreadable (RUNS=, SEED=)
	@$(BIN)/python -m tests.fuzz --runs $(RUNS) $(if $(SEED),--seed $(SEED))

bench: $(BENCH) $(PEERS)    ## the speed of it all: a table, and JSON and pictures in benchmarks/results
	@$(BIN)/python -m benchmarks --save

clean:    ## remove all that make made
	rm -rf .venv .venv-peers dist .coverage .coverage.* .fuzz .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(READY): pyproject.toml
	@echo "installing into .venv ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(BENCH): $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

# What the benchmarks compare with, apart from what we run: none of it belongs in our environment.
$(PEERS): pyproject.toml
	@echo "installing the peers of the benchmarks into .venv-peers ..."
	@$(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --group peers
	@touch $@

# `make` lists the targets. Another Python for the environment: make PYTHON=python3.12 setup
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c 'import ensurepip, venv' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/ready
# Two workers for two cores, for every test keeps to one thread.
PYTEST := $(BIN)/pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo fmt lint type test-quick test test-all bench

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' Makefile | while IFS='|' read -r name text; do printf '%-12s %s\n' "$$name" "$$text"; done

setup: $(READY) ## Make .venv with the tested versions; every other target does it by itself

demo: $(READY) ## Train on real digits, save, load in a new process, sample: under 10 minutes on a CPU
	GOMP_SPINCOUNT=10000 $(BIN)/python training/demo.py

fmt: $(READY) ## Format the code and apply the safe fixes
	$(BIN)/ruff format && $(BIN)/ruff check --fix

lint: $(READY) ## Check style and formatting
	$(BIN)/ruff check && $(BIN)/ruff format --check

type: $(READY) ## Check the types
	$(BIN)/mypy

test-quick: $(READY) ## The inner loop: under a minute
	$(PYTEST) -m "not slow"

test: $(READY) ## Every test, offline: about 10 minutes on 2 cores
	$(PYTEST)

test-all: lint type test ## Style, types and every test: what CI runs

bench: $(READY) ## Print timings beside stock diffusers, and keep them in runs/bench
	mkdir -p runs/bench
	for name in $(basename $(notdir $(wildcard tests/benchmarks/bench_*.py))); do $(BIN)/python tests/benchmarks/$$name.py --json runs/bench/$$name.json || exit 1; done

$(READY): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Needs Python 3.11 or newer with its venv module; tried '$(PYTHON)'. Name one: make PYTHON=/path/to/python3.11 setup" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e ".[eval,dev]"
	@touch $@

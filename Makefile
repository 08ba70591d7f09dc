# `make` lists the targets. To use another Python: make PYTHON=python3.12 setup
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c 'import ensurepip, venv' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/ready
# One worker per core, for example `make test WORKERS=8`; each test uses one thread.
WORKERS ?= 2
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo fmt lint type test-quick test test-all bench docs site notebooks reference

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' Makefile | while IFS='|' read -r name text; do printf '%-12s %s\n' "$$name" "$$text"; done

setup: $(READY) ## Create .venv with the tested versions; the other targets run this first

demo: $(READY) ## Train on pixel faces in colour, draw, measure, load without the package: minutes on a CPU
	GOMP_SPINCOUNT=10000 $(BIN)/python training/demo.py

fmt: $(READY) ## Format the code and apply the safe fixes
	$(BIN)/ruff format && $(BIN)/ruff check --fix

lint: $(READY) ## Check style and formatting
	$(BIN)/ruff check && $(BIN)/ruff format --check

type: $(READY) ## Check the types
	$(BIN)/mypy

test-quick: $(READY) ## Tests without the slow ones: about a minute on 2 cores
	$(PYTEST) -m "not slow" $$(grep -L "^pytestmark = .*pytest.mark.slow" tests/test_*.py)

test: $(READY) ## All tests, offline: about 10 minutes on 2 cores
	$(PYTEST)

test-all: lint type test ## Style, types and all tests: what CI runs

bench: $(READY) ## Compare timings with stock diffusers and save them in runs/bench
	mkdir -p runs/bench
	for name in $(filter-out bench_gpu bench_quality,$(basename $(notdir $(wildcard tests/benchmarks/bench_*.py)))); do $(BIN)/python tests/benchmarks/$$name.py --json runs/bench/$$name.json || exit 1; done

docs: $(READY) ## Make the figures of docs/ and check all pages
	$(BIN)/python docs/make.py
	$(PYTEST) tests/test_docs.py

site: $(READY) ## HTML site of the documentation in runs/site, readable offline
	@$(BIN)/python -c 'import furo, sphinx' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[site]"
	$(BIN)/python docs/make_site.py

reference: $(READY) ## Reference from the docstrings and the help of the commands, in runs/reference
	$(BIN)/python docs/make_reference.py

notebooks: $(READY) ## Convert the pages of docs/ to notebooks in runs/notebooks
	mkdir -p runs/notebooks && cp docs/*.md docs/*.png runs/notebooks
	cd runs/notebooks && ../../$(BIN)/jupytext --quiet --to ipynb *.md && rm *.md

$(READY): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Needs Python 3.11 or newer with its venv module; tried '$(PYTHON)'. Set another one: make PYTHON=/path/to/python3.11 setup" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e ".[app,eval,dev]"
	@touch $@

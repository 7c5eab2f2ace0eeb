# Everything runs from .venv, which is made once from any Python 3.11+ and renewed when its inputs change.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready

# Two workers on two cores: one thread each, or they fight.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint types bench studio-model docs

help: ## this list
	@echo "undiffuse: diffusion models from noise to sample"
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo
	@echo "Without make: python3 -m venv .venv && .venv/bin/pip install -c constraints.txt torch==2.13.0"
	@echo "              .venv/bin/pip install -c constraints.txt -e '.[demo,plot,serve,dev]'"

# torch first and alone: a later requirement must find it there rather than choose a build of its own.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "undiffuse needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo,plot,serve,dev]'
	@touch $@

demo: $(READY) ## train on real handwritten digits and sample from the model, into runs/demo (two minutes)
	@unset OMP_NUM_THREADS; $(BIN)/undiffuse demo

lint: $(READY) types ## ruff check, ruff format --check, pyrefly check, tsc
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

TYPESCRIPT := 5.9.3
TSC := .cache/typescript-$(TYPESCRIPT)/node_modules/.bin/tsc

types: ## the studio's page against its JSDoc types; tsc comes from npm, where there is one
	@if test -x $(TSC) || npm install --silent --no-save --no-package-lock --prefix $(patsubst %/node_modules/.bin/tsc,%,$(TSC)) \
		typescript@$(TYPESCRIPT) >/dev/null 2>&1; then echo "$(TSC) -p jsconfig.json"; $(TSC) -p jsconfig.json; \
		else echo "types: SKIPPED, the page's types are not checked: npm is not here, or could not fetch typescript"; fi

test: lint ## everything that CI runs
	$(BIN)/pytest -n 2

test-all: lint ## the same, and the slow tests
	$(BIN)/pytest -n 2 -m ''

bench: $(READY) ## every benchmark, one table each (quiet machine, please)
	@unset OMP_NUM_THREADS; for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

studio-model: $(READY) ## train the small model that ships with the studio again (a minute)
	@unset OMP_NUM_THREADS; $(BIN)/python -m undiffuse.studio.remake

docs: $(READY) ## draw the pictures of the documentation again and run its code blocks
	$(BIN)/python docs/pictures.py
	$(BIN)/python docs/screenshots.py
	$(BIN)/pytest tests/test_docs.py

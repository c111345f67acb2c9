# Everything a person or a machine does with this project. `make` alone lists it.
VENV ?= .venv
PY   ?= python3
BIN  := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo dev test test-fast check fmt bench coverage crash soak mutants constraints clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PY) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "flowstead needs Python 3.11 or newer, found %d.%d; try: make PY=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PY) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv
	@UV_SYSTEM_CERTS=1 $(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e ".[dev]" \
	  || $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

dev: $(VENV)/.ready   ## set up .venv with everything

demo: $(VENV)/.ready  ## triage a real mailbox, kill -9 half way and while it waits for a reply, lose nothing
	@$(BIN)/python examples/inbox_triage.py --demo

test: $(VENV)/.ready  ## the whole suite, on every core
	$(BIN)/python -m pytest -q -n auto --dist worksteal

test-fast: $(VENV)/.ready  ## the suite without processes that are killed
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not crash"

crash: $(VENV)/.ready  ## only the tests that kill processes
	$(BIN)/python -m pytest -q -m crash

soak: $(VENV)/.ready  ## everything that can be run for longer, run for long; an hour of load comes last
	FLOWSTEAD_KILL_CYCLES=1000 $(BIN)/python -m pytest -q -o timeout=0 tests/crash/test_kill.py
	FLOWSTEAD_EVERY_OPERATION=1 FLOWSTEAD_IMAGES=10000 $(BIN)/python -m pytest -q -o timeout=0 tests/disk
	FLOWSTEAD_SEEDS=2000 $(BIN)/python -m pytest -q -o timeout=0 tests/simulation
	$(BIN)/python -m tests.soak.load --minutes 60

mutants: $(VENV)/.ready  ## plant deliberate bugs, one at a time, and see each of them caught
	$(BIN)/python -m tests.mutants.run

coverage: $(VENV)/.ready  ## branch coverage of the floors behind the door; below 95 % of any one it fails
	@rm -rf .coverage
	for part in unit concurrency store runtime simulation; do \
	  $(BIN)/python -m coverage run --branch --parallel-mode \
	    -m pytest -q -p no:xdist -o timeout=600 -m "not crash" tests/$$part || exit 1; done
	@$(BIN)/python -m coverage combine -q
	@low=0; for floor in model rules store engine; do echo; echo "$$floor"; \
	  $(BIN)/python -m coverage report --fail-under=95 --include="src/flowstead/$$floor/*" || low=1; \
	done; exit $$low

check: $(VENV)/.ready  ## format, lint, strict types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fmt: $(VENV)/.ready   ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.ready ## throughput, latency and memory, each beside its ceiling
	$(BIN)/python -m bench

constraints: $(VENV)/.ready  ## write constraints.txt anew
	$(BIN)/uv pip compile -q --universal --all-extras --no-header --no-annotate pyproject.toml -o constraints.txt

clean:  ## remove what can be made again
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage dist

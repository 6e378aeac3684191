# The two commands are `make search` and `make test`; both set up what they need, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
N ?= 50
# Most tests wait for other processes. Files stay whole and in their order: tests share what their file has set up.
JOBS ?= 2

.PHONY: search test lint types report faults

search: $(READY)
	$(BIN)/python tune/search.py $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# N faults of every kind, real processes and SIGKILL, against small searches of the digits; takes minutes.
faults: $(READY)
	$(BIN)/python tests/faults/inject.py --num $(N) $(ARGS)

report: $(READY)
	$(BIN)/python analysis/report.py $(ARGS)

# The package is installed in place, so that `python tune/search.py` finds it and code changes need no new set-up.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

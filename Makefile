# `make test` and `make demo` each set up a fresh machine and are quick when run again.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup lint test demo bench clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := local/demo

# The first interpreter that can make a virtual environment; PYTHON=... chooses another.
PYTHON ?= $(shell for one in python3.11 python3.13 python3.12 python3.10 python3; do \
	$$one -c 'import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' \
	2>/dev/null && { echo $$one; break; }; done)

help:
	@echo "make demo   from a trained vision transformer to answers that are faster than the whole model"
	@echo "make test   format, lint, types, import contracts, tests and docstring examples"
	@echo "make lint   the first four of these"
	@echo "make bench  the measurements quoted in the README (about an hour on a quiet machine)"
	@echo "make setup  only the environment in $(VENV)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python from 3.10 to 3.13 with venv was found; install one" \
	  "(Debian: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing edgeexit into $(VENV) (the first time this fetches torch) ..."
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

lint: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

test: $(READY) lint
	@$(BIN)/python -m pytest

docs/manifest.schema.json: edgeexit/manifest.py $(READY)
	@$(BIN)/python -c "import json, edgeexit.manifest as m; print(json.dumps(m.json_schema(), indent=1))" > $@

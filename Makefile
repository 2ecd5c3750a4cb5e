# `make demo` and `make test` need nothing but Python >= 3.11: the first call creates .venv and installs into it.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
# Without a GPU the tested CPU set is installed; with one, torch is left to what fits its driver.
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo -c constraints/cpu.txt)
# DeepSpeed compiles a small extension at its first start, with the ninja that it brought along: keep it between runs.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo test check faults format install

help:
	@echo 'make demo    align a small one-step SR generator and write runs/demo/report.html'
	@echo 'make check   ruff, pyright and the fast tests'
	@echo 'make test    make check, then the slow tests'
	@echo 'make faults  kill runs, fill disks, damage checkpoints: what docs/reliability.md reports'
	@echo 'make format  rewrite the code in the house format'

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints/cpu.txt
	@test -n '$(PYTHON)' || { echo 'error: no Python >= 3.11 found; fix: install one, or make PYTHON=/path/to/python3.11'; exit 1; }
	@echo 'installing into $(VENV): a few minutes, once'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m refreward_trl demo --output-dir runs/demo

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q -m 'not slow and not faults' -n logical --maxprocesses 4 --dist worksteal

test: check
	@# A run that was killed while it compiled leaves a lock behind, on which the next one would wait for ever.
	@rm -f $(TORCH_EXTENSIONS_DIR)/*/lock
	$(BIN)/python -m pytest -q -m 'slow and not faults'

faults: $(STAMP)
	@mkdir -p docs
	$(BIN)/python -m pytest -q tests/faults -m faults -n 2 --dist worksteal --reliability-report docs/reliability.md

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

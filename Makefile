# Every target makes what it needs in .venv the first time. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile $(if $(CI),--quiet) -c constraints.txt
PACKAGES := pcpo_fast kernels/pcpo_kernels
# One process per core, a file's tests in one process (they share fixtures), in the order of tests/longest_first.py.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# The tests start dozens of processes that load the same libraries. Where Python is told to keep no bytecode, each would
# compile them anew, which takes longer than most tests: theirs is kept in .venv, whatever the environment says.
PYTEST := PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX=$(CURDIR)/$(VENV)/bytecode $(BIN)/python -m pytest

# A stamp is younger than what it was installed from.
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs

.PHONY: help install demo test test-all lint format docs bench kernels-report clean clean-all
.DELETE_ON_ERROR:

help:
	@echo "make demo      train the tiny FLUX pipeline (2 minutes on 2 cores) and write runs/demo/report.html"
	@echo "make test      run the tests, but for the slow ones (make test-all)"
	@echo "make lint      check formatting, lint and types (make format mends the first)"
	@echo "make docs      build the documentation's site into build/site and check its links"
	@echo "make bench     time the operations on this machine"
	@echo "make kernels-report   compile every kernel variant and print what it needs"
	@echo "make install   install with the development tools into .venv, and do nothing else"
	@echo "make clean     remove caches and build output (make clean-all: .venv too); runs/ stays"

install: $(DEV)

demo: $(RUNTIME)
	@$(BIN)/python train.py

test: $(DEV)
	@$(PYTEST) -m "not slow" $(PARALLEL)

test-all: $(DEV)
	@$(PYTEST) $(PARALLEL)

lint: $(DEV)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy $(PACKAGES)

format: $(DEV)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(DOCS)
	@$(BIN)/python docs/site/build_site.py

bench: $(DEV)
	@$(BIN)/python -m pytest benchmarks --benchmark-only

kernels-report: $(DEV)
	@$(BIN)/python -m pcpo_kernels.report

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find $(PACKAGES) tests benchmarks assets -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

clean-all: clean
	rm -rf $(VENV)

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: $(PYTHON) is not installed; name a Python 3.11 or newer with make PYTHON=..." >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$("$(PYTHON)" --version 2>&1), which is too old; name a Python 3.11 or newer with make PYTHON=..." >&2; exit 2; }
	@"$(PYTHON)" -c 'import ensurepip' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments; install its venv package (python3-venv on Debian and Ubuntu)" >&2; exit 2; }
	@echo "Making a virtual environment in $(VENV)"
	@"$(PYTHON)" -m venv $(VENV)

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing what training needs into $(VENV) (minutes, the first time)"
	@$(PIP_INSTALL) -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing what training and development need into $(VENV) (minutes, the first time)"
	@$(PIP_INSTALL) -e ".[dev]"
	@touch $(RUNTIME) $@

$(DOCS): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing what the documentation's site needs into $(VENV)"
	@$(PIP_INSTALL) -e ".[docs]"
	@touch $(RUNTIME) $@

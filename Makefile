# `make help` lists the targets. Everything is installed into .venv; nothing outside this folder is changed.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-long test-slurm format clean distclean
.PHONY: venv venv-test venv-dev venv-gpu venv-benchmark venv-corpora venv-trackers
.PHONY: benchmark-data-order
.PHONY: check check-lint check-format check-cpp check-shell check-imports check-types

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A PYTHONPATH of the user's could bring other versions than those pinned here.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

# Tests start `deepspeed` and `torchrun` as a user with an active environment does.
PYTEST := PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest
PYTEST_ARGS ?=
CPP_SOURCES = $(wildcard csrc/*.cpp csrc/*.h csrc/*.hpp)

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

quickstart: venv ## install, prepare five small corpora, train with replay and Reptile (FRESH=1: begin anew)
	@$(BIN)/python examples/quickstart/start.py $(if $(filter-out 0,$(FRESH)),--fresh)

test: venv-test ## the test suite, without what is slow or needs Slurm or a GPU (PYTEST_ARGS="-k word" for a part)
	$(PYTEST) -m "not slow and not slurm and not gpu" $(PYTEST_ARGS)

test-long: venv-test ## every test that this machine can run; what it cannot is listed with the reason
	$(PYTEST) $(PYTEST_ARGS)

test-slurm: venv-test ## the short tests on a real Slurm of virtual nodes: needs root, slurmctld, slurmd and munge
	$(PYTEST) -m "slurm and not slow" $(PYTEST_ARGS) tests/slurm

benchmark-data-order: venv-benchmark ## measure the data order beside megatron-core's, some minutes (RECORD=1: into benchmarks/RESULTS.md)
	$(BIN)/python benchmarks/data_order.py $(if $(filter-out 0,$(RECORD)),--record)
	$(BIN)/python benchmarks/scale.py $(if $(filter-out 0,$(RECORD)),--record)

check: check-lint check-format check-cpp check-shell check-imports check-types ## lint, format, types, import contracts: changes nothing

check-lint: venv-dev
	$(BIN)/ruff check .

check-format: venv-dev
	$(BIN)/ruff format --check .

check-cpp: venv-dev
	$(if $(CPP_SOURCES),$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES))

check-shell: venv-dev
	$(BIN)/shellcheck --external-sources .ci/run requirements/*.sh examples/slurm/*

check-imports: venv-dev
	$(BIN)/lint-imports --no-cache

check-types: venv-dev
	$(BIN)/mypy

format: venv-dev ## format Python and C++, and apply ruff's safe fixes
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(if $(CPP_SOURCES),$(BIN)/clang-format -i $(CPP_SOURCES))

venv: $(VENV)/.base $(VENV)/.extension ## make .venv: what a run needs, and the C++ extension
venv-test: venv venv-corpora venv-trackers venv-benchmark $(VENV)/.test ## ... and what the tests need
venv-dev: venv-test $(VENV)/.dev ## ... and what `make check` and `make format` need
venv-trackers: venv $(VENV)/.trackers ## ... and wandb and tensorboard, for configurations that name them
venv-corpora: venv $(VENV)/.corpora ## ... and gigatoken, pyarrow and s3fs, to prepare large corpora
venv-gpu: venv $(VENV)/.gpu ## ... and what helps on NVIDIA GPUs
venv-benchmark: venv $(VENV)/.benchmark ## ... and what the benchmarks compare with

clean: ## remove what was built and cached; .venv and runs/ stay
	rm -rf build *.egg-info megatron_mer/_index*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f $(VENV)/.extension
	find . \( -path ./.git -o -path ./$(VENV) \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## ... and .venv too
	rm -rf $(VENV)

# Each step of the installation leaves a stamp that is older than the files it depends on when it has to run again.
$(VENV)/.created: requirements/create_venv.sh requirements/build.txt
	@echo "== Making $(VENV)"
	@bash requirements/create_venv.sh $(VENV)
	@touch $@

# PyTorch first and by name: what follows must find it, not choose another.
$(VENV)/.torch: requirements/torch.txt $(VENV)/.created
	@echo "== Installing PyTorch (the largest download, and silent: some minutes)"
	@$(PIP) --requirement $<
	@touch $@

$(VENV)/.base: requirements/base.txt requirements/constraints.txt $(VENV)/.torch
	@echo "== Installing DeepSpeed and the rest that a run needs"
	@$(PIP) --requirement $<
	@touch $@

$(VENV)/.test $(VENV)/.dev $(VENV)/.gpu $(VENV)/.benchmark $(VENV)/.corpora $(VENV)/.trackers: $(VENV)/.%: requirements/%.txt requirements/constraints.txt $(VENV)/.base
	@echo "== Installing $<"
	@$(PIP) --requirement $<
	@touch $@

$(VENV)/.extension: setup.py pyproject.toml $(CPP_SOURCES) $(VENV)/.base
	@echo "== Building the C++ extension"
	@PYTHONWARNINGS=ignore $(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

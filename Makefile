# Everything runs from a bare machine: Python 3.11, pip and make. `make help` lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
RUN    ?= runs/quickstart

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench bench-data bench-gpu bench-serve bench-tune cluster exact faults mutants soak serve clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the exact versions of requirements.lock

$(STAMP): pyproject.toml requirements.lock
	@echo "set up $(VENV) with $$($(PYTHON) --version); 2 to 4 minutes, log in $(VENV)/setup.log"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]' \
	  >$(VENV)/setup.log 2>&1 || { tail -20 $(VENV)/setup.log; exit 1; }
	@touch $(STAMP)

demo: setup ## the main job: train the default model to know its name, merge it, ask it
	@$(BIN)/python examples/demo.py $(ARGS)

test: setup ## linters, types, structure, then all tests
	@$(MAKE) --no-print-directory lint
	@$(BIN)/python -m pytest -n 2

lint: setup ## ruff, mypy --strict, import layers
	@$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-cache >$(VENV)/imports.log || { cat $(VENV)/imports.log; exit 1; }
	@echo "lint: clean"

bench: setup ## the timings of docs/benchmarks.md
	@$(BIN)/python -m benchmarks.quickstart

bench-data: setup ## the data stream beside datasets + TRL; memory; resuming a million rows
	@$(BIN)/python -m benchmarks.data
	@$(BIN)/python -m benchmarks.data_resume
	@$(BIN)/python -m benchmarks.data_memory

bench-gpu: setup ## the QLoRA step beside its peers, after the check that it is the same step; needs a GPU
	@$(BIN)/python -m benchmarks.qlora_gpu $(ARGS)

bench-serve: setup ## the endpoint beside its engine alone and beside `transformers serve`, under open load
	@$(BIN)/python -m benchmarks.serve $(ARGS)

bench-tune: setup ## trials on one shared base beside trials of their own: trials an hour, memory
	@$(BIN)/python -m benchmarks.tune $(ARGS)

cluster: setup ## several nodes, jobs, hosts in network namespaces (as root) and their faults
	@$(BIN)/python -m pytest -m cluster -s tests/cluster

exact: setup ## gradients of every way to train beside float64, sample by sample; 20 seeds twice
	@$(BIN)/python -m pytest -m exact
	@$(BIN)/python -m pytest tests/training/test_same_bytes.py -s --seeds=20

faults: setup ## 400 runs' processes killed at random instants, hangs, a full disk, a cluster's; hours on 2 cores
	@$(BIN)/python -m pytest tests/data/test_ledger.py --kills=200
	@$(BIN)/python -m pytest tests/faults --faults=4 --plain-faults=0 --ray-faults=0
	@$(BIN)/python -m tests.faults.run --plain 300 --worlds 50 --ray 100 --json faults.json $(ARGS)
	@$(BIN)/python -m pytest -m cluster -s --faults=3 tests/cluster/test_cluster_faults.py

soak: setup ## the endpoint under 20,000 generated requests, kills, redeploys, overload; hours on 2 cores
	@$(BIN)/python -m pytest tests/soak -m soak -s

mutants: setup ## plant known silent bugs, one at a time; the tests must find each
	@$(BIN)/python -m tests.mutants.run $(ARGS)

serve: setup ## chat page and OpenAI endpoint of RUN (default runs/quickstart)
	@$(BIN)/raytune-ft serve $(RUN)

clean: ## remove .venv, runs and caches of this checkout
	@rm -rf $(VENV) runs dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Targets create the virtual environment if it is missing, with the tested versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Optimizer steps of the quickstart, and the folder for its results.
QUICKSTART_STEPS ?= 300
QUICKSTART ?= quickstart

# Tests to run; empty: all.
TESTS ?=

# Number of kills in test-faults.
KILLS ?= 100

.PHONY: help install site quickstart quickstart-weights test test-slow test-faults test-package test-gpu benchmark style quality clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 22

install: $(READY)  ## create a virtual environment with all requirements
$(READY): requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

quickstart: $(READY)  ## fine-tune a small pipeline with LPL on emoji, on a CPU
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/quickstart/finetune.sh $(QUICKSTART)/output $(QUICKSTART_STEPS)
	@echo "See $(QUICKSTART)/output/samples/before_after.png and $(QUICKSTART)/output/loss_curves.png"

quickstart-weights: $(READY)  ## train the quickstart's pipeline from scratch, without LPL (under two hours on a core)
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/quickstart/train_pipeline.sh $(QUICKSTART)

test: $(READY)  ## run all tests, or those given by TESTS=...
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(TESTS)

test-slow: $(READY)  ## run the long tests
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-faults: $(READY)  ## kill a training run at KILLS random moments, and resume it each time
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 KILLS=$(KILLS) $(BIN)/python -m pytest tests/runs/test_killed.py -m slow

test-package: $(READY)  ## build the wheel, train with it outside the repository, and run the notebook
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/installation -m slow

test-gpu:  ## run the tests and measurements that need a GPU; PYTHON=... needs a torch with CUDA
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest tests/gpu
	$(PYTHON) tests/gpu/real_sizes.py

benchmark: $(READY)  ## measure the cost of LPL (over half an hour on 2 cores)
	$(BIN)/python -m benchmarks.lpl_cost
	$(BIN)/python -m benchmarks.lpl_step
	$(BIN)/python -m benchmarks.lpl_estimators

style: $(READY)  ## format the code
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

quality: $(READY)  ## check format, types, and that no import runs upwards
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

site: $(READY)  ## build the site of README and docs/ in build/site; fails on a broken link
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "See build/site/index.html, or run $(BIN)/mkdocs serve"

clean:  ## remove the output of quickstart and tests
	rm -rf $(QUICKSTART) build/site .pytest_cache .ruff_cache

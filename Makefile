# Each target sets up what it needs: a virtual environment with the tried versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The quickstart's length in optimizer steps, and where it puts its data and results.
QUICKSTART_STEPS ?= 400
QUICKSTART ?= quickstart

# What test runs; empty: all.
TESTS ?=

# How often test-faults kills.
KILLS ?= 100

.PHONY: help install quickstart quickstart-weights test test-slow test-faults test-gpu benchmark style quality clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 22

install: $(READY)  ## virtual environment with everything
$(READY): requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

quickstart: $(READY)  ## fine-tune the small shipped pipeline with LPL on real pictures, on a CPU
	$(BIN)/python examples/quickstart/prepare_data.py --output_dir $(QUICKSTART)/data
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/quickstart/finetune.sh $(QUICKSTART)/data $(QUICKSTART)/output $(QUICKSTART_STEPS)
	@echo "Look at $(QUICKSTART)/output/samples/before_after.png and $(QUICKSTART)/output/loss_curves.png"

quickstart-weights: $(READY)  ## train the quickstart's pipeline anew, without LPL (under two hours on 2 cores)
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/quickstart/train_pipeline.sh $(QUICKSTART)

test: $(READY)  ## the tests, or those named by TESTS
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(TESTS)

test-slow: $(READY)  ## the long ones
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-faults: $(READY)  ## kill a training run at random moments, KILLS times, and resume it each time
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 KILLS=$(KILLS) $(BIN)/python -m pytest tests/runs/test_killed.py -m slow

test-gpu:  ## those that need a GPU, and the measurements at real sizes; PYTHON=... names one whose torch has CUDA
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest tests/gpu
	$(PYTHON) tests/gpu/real_sizes.py

benchmark: $(READY)  ## what LPL costs, against the decoder passes that it needs (over half an hour on 2 cores)
	$(BIN)/python -m benchmarks.lpl_cost
	$(BIN)/python -m benchmarks.lpl_step
	$(BIN)/python -m benchmarks.lpl_estimators

style: $(READY)  ## format
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

quality: $(READY)  ## check the format, the types, and that no import runs upwards
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:  ## drop what quickstart and tests made
	rm -rf $(QUICKSTART) .pytest_cache .ruff_cache

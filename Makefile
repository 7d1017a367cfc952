# The front doors. `make` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PYTHON
# Two test processes on two cores: a thread each.
TEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup

help:  ## list the doors
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{ printf "make %-12s %s\n", $$1, $$2 }'

install: $(INSTALLED)  ## put pellucid, every extra and the development tools into .venv

$(INSTALLED): pyproject.toml deploy/constraints.txt deploy/install.sh
	@deploy/install.sh

demo: $(INSTALLED)  ## serve SmolLM2 on this machine, run the first experiment on it, stop
	@$(BIN)/python deploy/demo.py

serve: $(INSTALLED)  ## serve SmolLM2 on port 8470 until Ctrl-C
	@folder=$$($(BIN)/python deploy/smollm2.py) && exec $(BIN)/pellucid up smollm2="$$folder"

test: $(INSTALLED)  ## run the tests
	@$(TEST) -m "not long"

test-long: $(INSTALLED)  ## run all tests, the slow ones too
	@$(TEST)

lint: $(INSTALLED)  ## ruff and mypy
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

bench: $(INSTALLED)  ## print what it costs, beside hand-written hooks
	@$(BIN)/python benchmarks/bench.py

bench-check: $(INSTALLED)  ## the same, and fail past the limits
	@$(BIN)/python benchmarks/bench.py --check

docs:  ## build the documentation's pages
	@echo "the pages are not built yet; read them in docs/"

clean:  ## remove .venv and what the tools left
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build site
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help install demo serve test test-long lint bench bench-check docs clean

# Works with GNU make 3.81 (macOS) and newer. `make help` lists the targets.
PYTHON ?= python3
# Further arguments for pip, such as an index with the CPU build of torch, much smaller than the CUDA one on Linux.
PIP_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test check bench docs clean

help:  ## list the targets
	@awk -F ':.*##  *' '/^[a-z]+:.*##/ { printf "  make %-12s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP)  ## create .venv with everything that the other targets need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "'$(PYTHON)' is not Python 3.11 or newer. Name one that is: make venv PYTHON=python3.11" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev,quickstart,eval,export]'
	@touch $(STAMP)

quickstart: $(STAMP)  ## compress and distil a real model on a CPU, and see what came of it
	$(BIN)/python -m kd_recipes.quickstart

test: $(STAMP)  ## run the tests (offline, on a CPU)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

check: $(STAMP)  ## lint, formatting, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: quickstart  ## compare students, ways to compress, losses, steps, tasks and generation, with others in the same run (hours)
	$(BIN)/python tests/benchmarks/quickstart_baselines.py
	$(BIN)/python tests/benchmarks/compression.py
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps -c constraints.txt liger-kernel
	$(BIN)/python tests/benchmarks/loss_stage.py
	$(BIN)/python tests/benchmarks/training_step.py
	$(BIN)/python tests/benchmarks/tasks.py
	$(BIN)/python tests/benchmarks/generation_speed.py
	$(BIN)/python tests/benchmarks/monitoring.py
	PYTHONPATH=tests $(BIN)/python tests/benchmarks/doctor.py
	$(BIN)/python tests/benchmarks/cached_teachers.py
	$(BIN)/python tests/benchmarks/quantized_teacher.py
	$(PYTHON) -m venv $(VENV)/llama_cpp
	$(VENV)/llama_cpp/bin/python -m pip install $(PIP_ARGS) 'llama-cpp-python[server]'
	$(BIN)/python tests/benchmarks/remote_teacher.py $(VENV)/llama_cpp/bin/python
	$(BIN)/python -m pip install $(PIP_ARGS) llama-cpp-python flatbuffers ruamel.yaml sortedcontainers tabulate
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps executorch==1.5.1
	$(BIN)/python tests/benchmarks/deployment.py

docs: $(STAMP)  ## build the pages into site/, to be opened or served (python -m http.server -d site)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f docs/mkdocs/mkdocs.yml

clean:  ## remove build products and caches; .venv and runs/ stay
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

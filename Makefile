# The same commands for people and CI: `make quickstart`, `make test`. Packages are installed only into .venv.
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-oldest lint types unit docs gpu-dry clean

VENV := .venv
BIN := $(VENV)/bin
# Test processes, with one thread each. The tests of a file run in one process, so that they share what they build.
JOBS ?= 2
UNUSED := /(tests?|testing/_internal)/|site-packages/(pip|setuptools|mypy|mypyc)/
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /: /'

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "kdexport needs Python 3.11 to 3.13; none was found. Pass PYTHON=/path/to/python3.12"; exit 4; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "$(PYTHON) is not Python 3.11 to 3.13"; exit 4; }
	@$(PYTHON) -m venv $(VENV) || { echo "Creating $(VENV) failed; on Debian: apt-get install python3-venv"; exit 4; }
	@echo "Installing into $(VENV): torch, onnxruntime, TensorRT-RTX, a few minutes once ..."
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev,demo,trt-rtx,openvino,ncnn,executorch,litert,coreml,timm,sign,otel]'
	@# pip compiles on one processor. Templates that are not modules cannot be compiled; tests inside libraries are never
	@# imported.
	@$(BIN)/python -m compileall -q -j 0 -x '$(UNUSED)' $(VENV)/lib > /dev/null 2>&1 || true
	@touch $@

setup: $(VENV)/.ready  ## Create .venv with everything that development needs

quickstart: setup  ## Distil, fold, export, verify and package a student on digits
	@$(BIN)/kdexport build --config export_configs/quickstart.toml --out dist/quickstart

lint: setup  ## ruff, and the import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/lint-imports --no-cache > .import-linter.log || { cat .import-linter.log; exit 1; }

types: setup  ## mypy --strict
	@nice -n 19 $(BIN)/mypy

unit: setup  ## pytest
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# mypy runs at low priority while the tests wait for servers and child processes.
test: lint  ## Everything that CI checks
	@$(MAKE) --no-print-directory -j 2 types unit

OLDEST := .venv-oldest
OLDEST_PYTHON ?= python3.12

test-oldest:  ## pytest with the oldest versions that are allowed; another Python by OLDEST_PYTHON
	@$(OLDEST_PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[dev,demo,trt-rtx,openvino,ncnn,litert,coreml,timm,sign,otel]'
	@OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

NULL_DEVICE := build/null-device

gpu-dry: setup  ## Train every method on a CUDA device that runs no kernel, and count what a step does there
	@$(BIN)/python benchmarks/gpu/null_device/build.py $(NULL_DEVICE)
	@$(BIN)/python benchmarks/gpu/dry_run.py --device $(NULL_DEVICE) --keep build/gpu-dry \
		--to docs/results/training.md

docs: setup  ## The documentation site in build/site; a warning is an error
	@$(BIN)/python -m mkdocs --version > /dev/null 2>&1 || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:  ## Remove what was built, not what was installed
	@rm -rf dist build .kdexport .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test lint wheel bench gpu-check clean

demo: .venv/dev
	$(BIN)/fastscore demo --out demo

test: lint
	$(BIN)/python -P -m pytest -n auto --dist loadfile --cov --cov-report=term:skip-covered

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.cu' '*.cuh' '*.cpp' '*.h' | xargs -r $(BIN)/clang-format --dry-run --Werror

wheel: .venv/dev
	$(PIP) wheel --no-deps --wheel-dir dist .

bench: .venv/bench
	$(BIN)/python -P -m pytest benchmarks --benchmark-only --benchmark-disable-gc -q

# With the Python, torch and Triton of the GPU's machine, offline: the package is built beside them, not into them.
gpu-check:
	rm -rf build/gpu && $(PYTHON) -m pip install -q --no-deps --no-build-isolation --target build/gpu .
	PYTHONPATH=$(CURDIR)/build/gpu $(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK)

.venv/base: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt torch
	touch $@

.venv/dev: .venv/base pyproject.toml
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@

.venv/bench: .venv/dev benchmarks/peers.txt
	$(PIP) install -c constraints.txt -r benchmarks/peers.txt
	touch $@

clean:
	rm -rf .venv build dist demo .pytest_cache .ruff_cache .coverage

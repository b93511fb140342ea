# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test lint wheel bench clean

demo: .venv/dev
	$(BIN)/fastscore demo --out demo

test: lint
	$(BIN)/python -P -m pytest --cov --cov-report=term:skip-covered

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.cu' '*.cuh' '*.cpp' '*.h' | xargs -r $(BIN)/clang-format --dry-run --Werror

wheel: .venv/dev
	$(PIP) wheel --no-deps --wheel-dir dist .

bench: .venv/bench
	$(BIN)/python -P -m pytest benchmarks --benchmark-only --benchmark-disable-gc -q

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

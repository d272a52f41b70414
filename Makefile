# From a clean clone with python3, make and a C++ compiler: `make demo`, `make test`. Everything else: `make`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
SCALE_ARGS ?=
TRAIN_ARGS ?=
# Pinned, and installed first: the version that is tested, and an open "torch>=" could fetch another build of gigabytes.
TORCH ?= torch==2.13.0

# Data sets beside the checkout, where there are any.
ifndef SPECTRAL_OPS_DATA
ifneq ($(wildcard ../shared/data/.),)
export SPECTRAL_OPS_DATA := $(abspath ../shared/data)
endif
endif

NATIVE_SOURCES := setup.py $(wildcard csrc/*)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast check bench wheel gpu gpu-build gpu-test gpu-bench gpu-scale gpu-train gpu-sanitize clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

# Everything but our own compiled module, which the second stamp builds: a change in csrc/ then costs its own
# compilation and nothing else.
$(VENV)/stamp-packages: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	SPECTRAL_OPS_NATIVE=0 $(BIN)/python -m pip install $(TORCH) -e '.[test,continual,dev]'
	touch $@

$(VENV)/stamp-native: $(VENV)/stamp-packages $(NATIVE_SOURCES)
	$(BIN)/python -m pip install --no-build-isolation --no-deps -e .
	touch $@

install: $(VENV)/stamp-native  ## .venv with torch, spectral_ops (editable) and all tools

demo: install  ## loss of plasticity on real images, and what prevents it
	$(BIN)/spectral-ops demo $(DEMO_ARGS)

# Tests share the processors by pytest-xdist, one thread each; PYTEST_ARGS="-n 0" has them one by one, of two threads.
TEST_WORKERS = -n $(shell $(PYTHON) -c "import os; print(min(os.cpu_count() or 1, 4))") --dist worksteal

test: install  ## all tests
	$(BIN)/python -m pytest $(TEST_WORKERS) $(PYTEST_ARGS)

test-fast: install  ## the tests without those marked slow
	$(BIN)/python -m pytest $(TEST_WORKERS) -m "not slow" $(PYTEST_ARGS)

check: install  ## ruff and mypy
	@status=0; \
	$(BIN)/ruff check --output-format=concise . || status=1; \
	$(BIN)/mypy || status=1; \
	exit $$status

bench: install  ## measure on the CPU, to bench/results/
	$(BIN)/python -m bench $(BENCH_ARGS)

wheel: install  ## a wheel in dist/
	rm -rf build/lib* build/bdist*
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

# No network and somebody else's Python, with torch in it: nothing is fetched, and test files that a device has no part in
# are not even read, for what they import may be missing. Where that Python cannot be written to, the package goes to
# build/site. PYTHONSAFEPATH keeps the checkout itself, which lacks the compiled module, off the path.
# A kernel that hangs or faults ends its own test file and nothing else; the sanitizers, which are slow, come last. Most of
# the time is compilers', so that tests share the processors where pytest-xdist is there.
GPU_WORKERS = $(shell $(PYTHON) -c "import os, xdist; print('-n', min(os.cpu_count(), 12), '--dist worksteal')" 2>/dev/null)
GPU_TESTS = $(shell grep -l 'mark\.gpu' tests/test_*.py)
gpu gpu-build gpu-test gpu-bench gpu-scale gpu-train gpu-sanitize: export PYTHONSAFEPATH := 1
gpu gpu-build gpu-test gpu-bench gpu-scale gpu-train gpu-sanitize: export PYTHONPATH := $(CURDIR)/build/site$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu gpu-build gpu-test gpu-bench gpu-scale gpu-train gpu-sanitize: export SPECTRAL_OPS_NATIVE := 1
gpu gpu-build gpu-test gpu-bench gpu-scale gpu-train gpu-sanitize: export SPECTRAL_OPS_CUDA := 1

gpu: gpu-build  ## on a machine with a GPU: build for PYTHON, test and measure there, to bench/results/
	@status=0; \
	$(MAKE) gpu-test || status=1; \
	$(MAKE) gpu-bench || status=1; \
	$(MAKE) gpu-train || status=1; \
	$(MAKE) gpu-sanitize || status=1; \
	exit $$status

gpu-build:
	rm -rf build/site build/lib* build/bdist*
	$(PYTHON) -m pip install --no-build-isolation --no-deps -e . || \
	  $(PYTHON) -m pip install --no-build-isolation --no-deps --target build/site .
	$(PYTHON) -c "import sys; from spectral_ops.doctor import main; sys.exit(main(require=('native',)))"

gpu-test:
	@status=0; \
	for file in $(GPU_TESTS); do \
	  timeout 500 $(PYTHON) -m pytest $$file -m "gpu and not slow" $(GPU_WORKERS) $(PYTEST_ARGS) || status=1; \
	done; \
	exit $$status

gpu-bench:
	$(PYTHON) bench --device cuda $(BENCH_ARGS)

gpu-scale: gpu-build  ## the ladder of vision transformers on a GPU, beside its predictions; SCALE_ARGS="--models vit-22b"
	$(PYTHON) bench scale --device cuda $(SCALE_ARGS)

gpu-train:  ## training of a ViT-L with each penalty on one GPU, a minute; TRAIN_ARGS="--batch 128"
	timeout 300 $(PYTHON) bench/train_vit.py --device cuda --model vit-l --steps 60 \
	  --penalty none l2 usual accumulate spectral-adamw --out bench/results $(TRAIN_ARGS)

gpu-sanitize:
	$(PYTHON) -m pytest $(GPU_TESTS) -m "gpu and slow" $(PYTEST_ARGS) || [ $$? -eq 5 ]

clean:  ## everything that make built, .venv included
	rm -rf $(VENV) build dist *.egg-info spectral_ops/_native*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

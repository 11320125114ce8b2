# Longspan's everyday commands. Needs make and Python 3.11 or newer; everything else goes into
# .venv, with the versions of constraints.txt. `make PYTHON=python3.12 …` picks an interpreter.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Every install names the constraints again: a later one must not replace what an earlier one pinned.
PIP := $(BIN)/python -m pip install --quiet --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint sanitize gpu-test gpu-sanitize gpu-bench setup clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s%s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.runtime  ## fetch the demo model, serve it over 2 stages, stream one answer
	@$(BIN)/python -m serving.demo

# Those of the Ray cluster by themselves: they wait for processes, which others would slow down.
test: $(VENV)/.test  ## run all tests
	@$(BIN)/python -m pytest -m "not ray" --numprocesses auto --maxprocesses 8 --dist worksteal
	@$(BIN)/python -m pytest -m ray

lint: $(VENV)/.test  ## check style and types
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check
	@$(BIN)/python -m mypy

# A build of its own beside the installed one. Exceptions need libstdc++ loaded when the sanitizer starts.
SANITIZE := address,undefined,float-cast-overflow
SANITIZE_CXXFLAGS := -O1 -fsanitize=$(SANITIZE) -fno-sanitize=null,object-size,vptr \
    -fno-sanitize-recover=undefined,float-cast-overflow

sanitize: $(VENV)/.test  ## run the CPU kernels' tests under AddressSanitizer and UBSan (10 minutes)
	@rm -rf build/sanitize
	@LONGSPAN_CXXFLAGS='$(SANITIZE_CXXFLAGS)' $(BIN)/python setup.py --quiet build_ext \
	    --build-lib build/sanitize --build-temp build/sanitize-temp
	@LONGSPAN_CPU_MODULE="$$(ls build/sanitize/sharding/kernels/_cpu*.so)" \
	    LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(BIN)/python -m pytest --capture=sys tests/sharding/kernels/test_bounds.py \
	        tests/sharding/kernels/test_head.py $(wildcard tests/sharding/kernels/test_cpu_*.py) \
	        tests/sharding/test_sampling.py tests/sharding/test_logprobs.py

# Another Python than .venv's, say with a torch built for CUDA: `make gpu-test GPU_PYTHON=python3`.
GPU_PYTHON ?= $(BIN)/python
$(if $(filter $(BIN)/python,$(GPU_PYTHON)),gpu-test gpu-sanitize gpu-bench: $(VENV)/.test)

gpu-test:  ## run the GPU kernels' tests on this machine's GPU (4 minutes)
	@$(GPU_PYTHON) -m tests.gpu

gpu-sanitize:  ## run the GPU kernels under compute-sanitizer's memcheck and racecheck
	@$(GPU_PYTHON) -m tests.gpu_sanitize

gpu-bench:  ## measure a 7B model on this machine's GPU, to contexts of 65,536, and in stages (3 minutes)
	@$(GPU_PYTHON) -m bench.gpu --keep
	@$(GPU_PYTHON) -m bench.gpu_stages --keep

setup: $(VENV)/.runtime  ## install Longspan into .venv

clean:  ## remove .venv, build output and caches; models in the user's cache stay
	@rm -rf $(VENV) build sharding/kernels/_cpu*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find actors serving sharding tests bench -name __pycache__ -prune -exec rm -rf {} +

# By name: installing the project's extra would compile the kernels once more.
TEST_PACKAGES = $(shell $(BIN)/python -c 'import tomllib; \
    print(*map(repr, tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["test"]))')

# The stamps are touched last, so that an interrupted installation is simply continued next time.
$(VENV)/.runtime: pyproject.toml constraints.txt setup.py $(wildcard sharding/kernels/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Longspan needs Python 3.11 or newer, and \`$(PYTHON)\` is not that:" \
	        "install one and name it, as in \`make PYTHON=python3.11 $(MAKECMDGOALS)\`" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	    echo "Python's venv module does not work here; on Debian and Ubuntu:" \
	        "apt-get install python3-venv" >&2; exit 1; }
	@echo "installing packages and compiling the CPU kernels (first time: 2-3 minutes)" >&2
	@$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.runtime
	@echo "installing test packages (first time: about a minute)" >&2
	@$(PIP) $(TEST_PACKAGES)
	@touch $@

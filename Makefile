# Longspan's everyday commands. Needs make and Python 3.11 or newer; everything else goes into
# .venv, with the versions of constraints.txt. `make PYTHON=python3.12 …` picks an interpreter.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Every install names the constraints again: a later one must not replace what an earlier one pinned.
PIP := $(BIN)/python -m pip install --quiet --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint setup clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s%s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.runtime  ## fetch the demo model, serve it over 2 stages, stream one answer
	@$(BIN)/python -m serving.demo

test: $(VENV)/.test  ## run all tests
	@$(BIN)/python -m pytest

lint: $(VENV)/.test  ## check style and types
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check
	@$(BIN)/python -m mypy

setup: $(VENV)/.runtime  ## install Longspan into .venv

clean:  ## remove .venv, build output and caches; models in the user's cache stay
	@rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find actors serving sharding tests bench -name __pycache__ -prune -exec rm -rf {} +

# The stamps are touched last, so that an interrupted installation is simply continued next time.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Longspan needs Python 3.11 or newer, and \`$(PYTHON)\` is not that:" \
	        "install one and name it, as in \`make PYTHON=python3.11 $(MAKECMDGOALS)\`" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	    echo "Python's venv module does not work here; on Debian and Ubuntu:" \
	        "apt-get install python3-venv" >&2; exit 1; }
	@echo "installing packages (first time: 1-2 minutes)" >&2
	@$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.runtime
	@echo "installing test packages (first time: about a minute)" >&2
	@$(PIP) -e '.[test]'
	@touch $@

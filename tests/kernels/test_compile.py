"""Every Triton kernel compiles for the GPUs it is meant for, none of which need be here, without spilling registers.

And once: another number of tokens takes what was compiled.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memlayer_kernels import gather, product_key, rows_gpu, scatter

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
PROGRAM = Path(__file__).with_name("compile_kernels.py")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = (product_key, gather, scatter, rows_gpu)
KERNELS = {name for module in MODULES for name, _ in inspect.getmembers(module) if name.endswith("_kernel")}


# The widths are those of the benchmark's shapes, all of which read 32 slots a head; a search keeps up to 128.
@pytest.mark.parametrize("top_k", [32, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_spills_and_for_any_number_of_tokens(target, top_k, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # An empty cache: what is found there was compiled before, and its spills are not reported again.
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    python_path = [str(BENCHMARKS), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(python_path)
    command = [sys.executable, str(PROGRAM), json.dumps(TARGETS[target]), str(top_k)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in built} == KERNELS
    assert all(kernel["bytes"] > 1000 for kernel in built)
    assert [kernel for kernel in built if kernel["spills"] != 0] == []

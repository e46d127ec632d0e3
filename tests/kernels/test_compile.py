"""Every Triton kernel compiles for the GPUs it is meant for, none of which need be here, and once for all tokens.

Without spilling registers under triton 3.9; under 3.6, which torch 2.11 brings, with the few that are known. In as
much shared memory as a program may have there.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from compile_kernels import KERNELS

from memlayer_kernels.half_bounds import MOST_KEPT

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Bytes that a program may have; those of sm_86 and sm_89, which are less than sm_80's, for the code of all three.
SHARED_BYTES = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
# What sorting spills under triton 3.6, by target and slots read per head: bytes, on AMD scalar registers.
KNOWN_SPILLS = {("sm_80", 32): 16, ("gfx942", 32): 4, ("sm_90", 128): 112, ("sm_100", 128): 8}
SORTS = {"half_topk_kernel", "redo_kernel"}
BY_BOUNDS = {"bound_kernel", "collect_kernel", "order_kernel", "redo_kernel"}
MASKS_ON_AMD = 16  # scalar registers of collect_kernel, which go to lanes of vector registers and not to memory
PROGRAM = Path(__file__).with_name("compile_kernels.py")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


QUICK = ("sm_90",)  # half a minute each


@pytest.mark.parametrize("ways", ["chosen", pytest.param("every", marks=pytest.mark.slow)])
# The widths are those of the benchmark's shapes, all of which read 32 slots a head; a search keeps up to 128.
@pytest.mark.parametrize("top_k", [32, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "target", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TARGETS]
)
def test_every_kernel_compiles_within_its_registers_and_shared_memory_for_any_number_of_tokens(
    target, top_k, ways, tmp_path
):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # An empty cache: what is found there was compiled before, and its spills are not reported again.
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    python_path = [str(BENCHMARKS), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(python_path)
    command = [sys.executable, str(PROGRAM), json.dumps(TARGETS[target]), str(top_k), ways]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in built} == KERNELS - (BY_BOUNDS if top_k > MOST_KEPT else set())
    assert all(kernel["bytes"] > 1000 for kernel in built)
    assert [kernel for kernel in built if kernel["shared_bytes"] > SHARED_BYTES[target]] == []
    allowed = KNOWN_SPILLS.get((target, top_k), 0) if triton.__version__.startswith("3.6.") else 0
    spilt = {kernel["kernel"]: kernel["spills"] for kernel in built if kernel["spills"] != 0}
    masks = spilt.pop("collect_kernel", 0)
    assert masks <= (MASKS_ON_AMD if target == "gfx942" else 0)
    assert spilt in ({}, {"half_topk_kernel": allowed}, dict.fromkeys(SORTS, allowed))

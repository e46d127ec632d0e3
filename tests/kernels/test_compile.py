"""Every Triton kernel compiles ahead of time for the GPUs it is meant for, none of which need be here."""

import json
import os
import subprocess
import sys

import pytest

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}

# Run apart, since a process that interprets Triton cannot compile it.
PROGRAM = """
import json, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from memlayer_kernels import gather, scatter

target = GPUTarget(*json.loads(sys.argv[1]))
kernels = {"gather_kernel": gather, "segment_sums_kernel": scatter, "read_products_kernel": scatter}
integers = dict.fromkeys(("slots", "tokens", "reads", "bounds"), "*i64")
integers |= {"top_k": "i32", "width": "i32", "num_reads": "i64"}
sizes = {"ACC": tl.float32, "ROWS": gather.ROWS, "COLUMNS": gather.MAX_COLUMNS, "READS": scatter.READS}
for name, module in kernels.items():
    kernel = getattr(module, name)
    for dtype in ("*fp32", "*bf16"):
        signature = {n: "constexpr" if n in sizes else integers.get(n, dtype) for n in kernel.arg_names}
        if name == "gather_kernel":
            signature["reads"] = dtype
        if name == "read_products_kernel":
            signature |= {"slots": "*i32", "products": "*fp32"}
        constants = {n: v for n, v in sizes.items() if n in kernel.arg_names}
        if name == "read_products_kernel":
            constants["COLUMNS"] = scatter.PRODUCT_COLUMNS
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        binary = triton.compile(source, target=target).asm
        code = binary.get("cubin") or binary.get("hsaco")
        print(json.dumps({"kernel": name, "dtype": dtype, "bytes": len(code)}))
"""


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(TARGETS[target])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(built) == 6
    assert all(kernel["bytes"] > 1000 for kernel in built)

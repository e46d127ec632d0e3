"""PYTHONPATH=benchmarks python tests/kernels/compile_kernels.py '["cuda", 90, 32]' 32 chosen

Compile every Triton kernel for a GPU that need not be here, with so many slots read per head, in the chosen ways of
kernels/variants.py or in every one, and print what became of it, one JSON object a line.

The launchers themselves are called, on small CPU tensors that have the widths of the benchmark's shapes, with
Triton told to compile what it is asked to launch and to go no further. So types, tile sizes and number of warps
are those of a real launch, as is the alignment that Triton specialises for. Results are never computed. Run
apart from the tests, since a process that interprets Triton cannot compile it.
"""

import contextlib
import inspect
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
from kernel_costs import SHAPES, Shape
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from memlayer_kernels import gather, half_bounds, half_lists, product_key, rows_gpu, scatter
from memlayer_kernels.reads import all_segments, sort_reads
from memlayer_kernels.variants import CHOSEN, GATHERS, SEARCHES, Gather, Search

MODULES = (product_key, half_bounds, half_lists, gather, scatter, rows_gpu)
KERNELS = {name for module in MODULES for name, _ in inspect.getmembers(module) if name.endswith("_kernel")}
TOKENS, SLOTS = 8, 64
OTHER_TOKENS = (1, 16, 37)  # for which what was compiled has to do
# ptxas, and what the AMD backend writes into its assembly
SPILLS = (r"(\d+) bytes spill (?:stores|loads)", r"\.[vs]gpr_spill_count: +(\d+)")


@dataclass
class Machine:
    """What Triton asks a driver about its device."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(target: GPUTarget) -> dict[str, str]:
    """Make every launch of this process a compilation for a target, and print each that was not made before.

    Returns:
        The name of each kernel compiled so far, by its hash; grows with every launch that takes a new one.
    """
    triton.runtime.driver.set_active(Machine(target))
    triton.knobs.nvidia.dump_ptxas_log = True
    launch, compiled = JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **options):
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in compiled:
            compiled[kernel.hash] = kernel.metadata.name
            print(json.dumps(describe(kernel, log.getvalue())), flush=True)

    JITFunction.run = compile_only
    return compiled


def describe(kernel, log: str) -> dict:
    """Name, size of the machine code and spilled registers of one compiled kernel."""
    code = kernel.asm.get("cubin") or kernel.asm.get("hsaco")
    reports = log + kernel.asm.get("amdgcn", "")
    spills = [int(count) for pattern in SPILLS for count in re.findall(pattern, reports)]
    return {
        "kernel": kernel.metadata.name,
        "bytes": len(code),
        "warps": kernel.metadata.num_warps,
        "shared_bytes": kernel.metadata.shared,
        "spills": sum(spills) if spills else None,
    }


def ways_of(target: GPUTarget, every: bool) -> tuple[list[Search], list[Gather]]:
    """Searches and gathers of the table that are for this GPU: queries that stay take an H100's shared memory."""
    nvidia = target.backend == "cuda"
    machine = divmod(target.arch, 10) if nvidia else None
    chosen = {CHOSEN.get((operation, machine), CHOSEN[operation, None]) for operation, _ in CHOSEN}
    large = nvidia and target.arch >= 90
    searches = [way for name, way in SEARCHES.items() if every or name in chosen | {"sort"}]
    gathers = [way for name, way in GATHERS.items() if every or name in chosen]
    return [way for way in searches if large or not (way.collect and way.collect.RESIDENT)], gathers


def launch_every_kernel(
    shape: Shape, dtype: torch.dtype, searches: Sequence[Search], gathers: Sequence[Gather]
) -> None:
    """Call every launcher with the widths of a shape and its number of tokens."""
    launch_lookup(shape, dtype, gathers)
    launch_steps(shape, dtype)
    launch_search(shape, dtype, searches)


def launch_lookup(shape: Shape, dtype: torch.dtype, gathers: Sequence[Gather]) -> None:
    values, grad = (torch.randn(rows, shape.width).to(dtype) for rows in (SLOTS, shape.tokens))
    slots = torch.randint(SLOTS, (shape.tokens, shape.reads_per_token))
    slots[: shape.tokens // 2] = 3  # a run of reads long enough to be split
    weights = torch.rand(slots.shape).to(dtype)
    gather.fetch_rows(values, slots.unique())
    for way in gathers:
        gather.weighted_sum(values, slots, weights, way)
    reads = sort_reads(slots.flatten(), shape.reads_per_token, labels=range(SLOTS))
    scatter.segment_sums(grad, reads, weights.flatten(), all_segments(reads.labels_M, SLOTS), dtype)
    scatter.read_products(grad, values, reads)


def launch_steps(shape: Shape, dtype: torch.dtype) -> None:
    values, slots = torch.randn(SLOTS, shape.width).to(dtype), torch.arange(0, SLOTS, 3)
    grad = torch.randn(len(slots), shape.width).to(dtype)
    moments, steps = torch.zeros(2, SLOTS, shape.width), torch.ones(len(slots))
    for seed in (None, 7) if dtype == torch.bfloat16 else (None,):
        rows_gpu.sgd_rows_(values, slots, grad, 0.1, seed)
        rows_gpu.adam_rows_(values, slots, grad, *moments, steps, 0.1, 0.9, 0.999, 1e-8, 0.01, seed)


def launch_search(shape: Shape, dtype: torch.dtype, searches: Sequence[Search]) -> None:
    queries = torch.randn(shape.tokens, shape.heads, 2, shape.key_width).to(dtype)
    half_keys = torch.randn(shape.heads, 2, shape.half_keys, shape.key_width).to(dtype)
    for way in searches:
        product_key.search(queries, half_keys, shape.top_k, way)


def main() -> None:
    target = GPUTarget(*json.loads(sys.argv[1]))
    compiled, top_k, needed = compile_launches(target), int(sys.argv[2]), {}
    searches, gathers = ways_of(target, every=sys.argv[3] == "every")
    for tokens in (TOKENS, *OTHER_TOKENS):
        sizes = {"name": "", "tokens": tokens, "top_k": top_k, "ops": ()}
        for shape in {replace(shape, **sizes) for group in SHAPES.values() for shape in group}:
            for dtype in (torch.float32, torch.bfloat16):
                launch_every_kernel(shape, dtype, searches, gathers)
            launch_lookup(shape, torch.float64, gathers)
        needed = needed or dict(compiled)
        again = {name for key, name in compiled.items() if key not in needed}
        if again:
            sys.exit(f"{tokens} tokens compile {', '.join(again)} again, {TOKENS} should have done")


if __name__ == "__main__":
    main()

"""python benchmarks/patch_apply.py --repeats 15

What a memory patch of 500 rows costs on a table of a million slots: bytes on disk, apply and revert.

Applying checks the product keys and the rows it replaces and then copies, so it costs the bytes of the keys, which are
hashed, and those of the rows; the table's size does not matter. The table is of zeros, memory that the system hands out
without filling it, and the product keys are random. The model is one memory layer in bfloat16.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import finish
from torch import nn

from memlayer.decoders.fingerprint import product_key_fingerprints
from memlayer.layers.memory import MemoryLayer, MemoryTable
from memlayer.patch import Base, MemoryPatch, TablePatch

SIZES = {"num_slots": 1024**2, "width": 1024, "rows": 500}
TABLE = "memory.0"


class OneLayer(nn.Module):
    """The least that a patch takes for a model with memory."""

    def __init__(self, num_slots: int, width: int):
        super().__init__()
        with torch.device("meta"):  # or the table would be filled with random numbers in float32 first
            table = MemoryTable(num_slots, width)
        table.weight = nn.Parameter(torch.zeros(num_slots, width, dtype=torch.bfloat16), requires_grad=False)
        self.memory = nn.ModuleList([table])
        num_keys = math.isqrt(num_slots)
        self.layer = MemoryLayer(width, table, num_keys, top_k=min(32, num_keys)).bfloat16()


def main() -> None:
    options = parse_options()
    torch.manual_seed(0)
    model = OneLayer(options.num_slots, options.width)
    patch = make_patch(model, options.rows)
    with tempfile.TemporaryDirectory() as name:
        patch.save(name)
        num_bytes = sum(path.stat().st_size for path in Path(name).iterdir())
        patch = MemoryPatch.load(name)
    spans: dict[str, list[float]] = {"apply": [], "revert": [], "product_keys": []}
    for repeat in range(options.repeats + 1):
        seconds = {
            "apply": timed(patch.apply, model),
            "revert": timed(patch.revert, model),
            "product_keys": timed(product_key_fingerprints, model),
        }
        if repeat > 0:  # the first touches the table's rows for the first time
            for name, span in seconds.items():
                spans[name].append(span)
    figures = {**{name: getattr(options, name) for name in SIZES}, "repeats": options.repeats}
    figures["patch_bytes"] = num_bytes
    figures |= {f"{name}_s": statistics.median(runs) for name, runs in spans.items()}
    figures |= {f"{name}_worst_s": max(runs) for name, runs in spans.items()}
    show(figures)
    finish("patch_apply", figures)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each (default: %(default)s)")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help="default: %(default)s")
    options = parser.parse_args()
    for name in ("repeats", *SIZES):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, must be at least 1")
    if math.isqrt(options.num_slots) ** 2 != options.num_slots:
        parser.error(f"--num-slots is {options.num_slots}, must be a square: product keys address n * n slots")
    if options.rows > options.num_slots:
        parser.error(f"--rows is {options.rows}, the table has {options.num_slots} slots")
    return options


def make_patch(model: OneLayer, num_rows: int) -> MemoryPatch:
    """Random rows at random slots of the table as it is."""
    weight = model.memory[0].weight
    slots_R = torch.randperm(len(weight))[:num_rows].sort().values
    rows = torch.randn(num_rows, weight.shape[1]).bfloat16()
    product_keys = product_key_fingerprints(model)[TABLE]
    table = TablePatch(slots_R, rows, weight[slots_R], len(weight), product_keys)
    return MemoryPatch({TABLE: table}, base=Base.of(model))


def timed(work: Callable[[nn.Module], object], model: nn.Module) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    work(model)
    return time.perf_counter() - start


def show(figures: dict) -> None:
    print(f"{'':14}{'median':>10}{'worst':>10}")
    for name in ("apply", "revert", "product_keys"):
        print(f"{name:14}{figures[f'{name}_s'] * 1e3:7.1f} ms{figures[f'{name}_worst_s'] * 1e3:7.1f} ms")
    print(f"a patch of {figures['rows']} rows takes {figures['patch_bytes'] / 1e6:.2f} MB with its originals")


if __name__ == "__main__":
    main()

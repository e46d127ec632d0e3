"""python benchmarks/kernel_variants.py --output docs/results

Every way of kernels/variants.py timed on the GPU that is here, each compared with the plainest first, and the lines of
CHOSEN that the fastest ones make. A way that gives other numbers is written down with its error and never the best.

The search is timed at shape A and in decoding (C), gathers at A, B and C. What a search chooses must not depend on the
number of tokens, so that the best of A is what the table should say; decoding shows what that costs.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from clocks import Clock, clock_of
from gpu_records import Records
from kernel_costs import SHAPES, Shape
from kernel_ops import draw
from report import environment, finish

from memlayer_kernels import gather, product_key
from memlayer_kernels.variants import GATHERS, SEARCHES

REPEATS = 15
DRY = Shape("A V=1024", 3, 32, 20, 17, "float16", heads=1, top_k=2, rows=5)
PLAINEST = {"search": "sort", "gather": "wide"}


def shapes_of(clock: Clock) -> dict[str, list[Shape]]:
    """The shapes that each operation is timed at."""
    if clock.dry:
        return {"search": [DRY], "gather": [DRY]}
    decoding = list(SHAPES["C"])
    return {"search": [SHAPES["A"][0], *decoding], "gather": [SHAPES["A"][0], SHAPES["B"][0], *decoding]}


def measurements(clock: Clock) -> dict[str, Callable[[], dict]]:
    """By name, what times all ways of one operation at one shape."""
    return {
        f"variants of {op}, {shape.name}": lambda op=op, shape=shape: time_ways(op, shape, clock)
        for op, shapes in shapes_of(clock).items()
        for shape in shapes
    }


def time_ways(op: str, shape: Shape, clock: Clock) -> dict:
    """Seconds of every way, errors of those that cannot be had, and the fastest."""
    problem = draw(shape, clock.device)
    runs = ways_of(op, problem)
    right, failed = runs[PLAINEST[op]](), {}
    for name, run in list(runs.items()):
        try:
            check_same(op, run(), right)
        except Exception as error:  # too much shared memory, or another result: the others are timed all the same
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
            del runs[name]
    seconds, bandwidth = clock.medians(runs, REPEATS)
    best = min(runs, key=seconds.get)
    return {"seconds": seconds, "copy_bytes_per_s": bandwidth, "wrong_or_impossible": failed, "best": best}


def ways_of(op: str, problem) -> dict[str, Callable]:
    if op == "search":
        inputs = problem.queries_TH2Q, problem.half_keys_H2nQ, problem.shape.top_k
        return {name: lambda way=way: product_key.search(*inputs, way) for name, way in SEARCHES.items()}
    inputs = problem.values_NV, problem.slots_TK, problem.weights_TK
    return {name: lambda way=way: (gather.weighted_sum(*inputs, way),) for name, way in GATHERS.items()}


def check_same(op: str, found: tuple, right: tuple) -> None:
    """Reads to the bit. Scores up to the rounding of another tile: of slots whose scores are that close any may win.

    Raises:
        ValueError: they are not.
    """
    if op == "gather" and not torch.equal(found[0], right[0]):
        raise ValueError("the sums are taken in another order: bits differ")
    if op == "search" and not torch.allclose(found[0], right[0], rtol=1e-5, atol=1e-4):
        raise ValueError(f"scores differ by up to {(found[0] - right[0]).abs().max().item():.1e}")
    same = (found[-1] == right[-1]).double().mean().item()
    if same < 0.999:
        raise ValueError(f"only {same:.1%} of the results are the same")


def advice(records: dict[str, dict]) -> list[str]:
    """Lines of CHOSEN in kernels/variants.py, by what was the fastest."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    decide = {
        "variants of search, A V=1024": "search",
        "variants of gather, A V=1024": "gather",
        "variants of gather, C T=1": "gather few tokens",
    }
    return [
        f'("{operation}", {capability}): "{records[name]["best"]}",'
        for name, operation in decide.items()
        if "best" in records.get(name, {})
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of variants/ (%(default)s)")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, without timing (TRITON_INTERPRET=1)")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --dry tries the script without one")
    clock, records = clock_of(options.dry), Records(options.output / "variants", environment())
    every = measurements(clock)
    for name in records.left(list(every)):
        records.add(name, every[name])
    print("CHOSEN in kernels/variants.py would be faster with:", *advice(records.all), sep="\n    ")
    finish("kernel_variants", records.all)
    if any("failed" in record for record in records.all.values()):
        sys.exit("kernel_variants: some measurements failed, see above")


if __name__ == "__main__":
    main()

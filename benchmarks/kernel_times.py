"""python benchmarks/kernel_times.py --shapes D --repeats 15

Every memory kernel against its floor, the obvious torch composition and F.embedding_bag, at the shapes of four uses:
A pretraining, B fact learning, C decoding, D a CPU. Without --shapes: D on a CPU, A B C on a GPU.

kernel_costs.py has the shapes and counts what must move, kernel_ops.py has the three ways of each operation,
clocks.py times them. Before anything is timed the ways are compared, and the run ends with an error where they
differ. "of floor" is the time that the least bytes, or the operations, take at the copy bandwidth and matrix rate
measured in the same run, over our time; "of copy" the same for the bytes that move when rows do not stay in
cache. What does not fit in memory is reported with its bytes. The file is not named kernels.py because scripts
find this folder first, and transformers imports a package of that name.

`make bench-gpu` runs the tests of the kernels on a GPU and then this. Leave the machine idle; where other
programs use the cores of a CPU, set OMP_WAIT_POLICY=passive.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from clocks import Clock, free_bytes
from kernel_costs import SHAPES, Shape, bytes_needed, cost, input_bytes
from kernel_ops import Problem, comparable, count, draw, ways_of
from report import finish
from torch import Tensor

SIZES = ("tokens", "half_keys", "width", "key_width", "top_k", "rows")
# Root mean square of the difference over that of the numbers. In bfloat16 the composition rounds every product
# to 8 bits.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
RIVALS = ("composition", "embedding_bag")


def main() -> None:
    options = parse_options()
    device = torch.device(options.device)
    clock, ops, skipped, rates = Clock(device), [], [], {}
    for shape in chosen_shapes(options):
        if shape.dtype not in rates:
            rates[shape.dtype] = clock.operations_per_second(getattr(torch, shape.dtype))
        for record in measure(shape, clock, options.repeats, rates[shape.dtype]):
            print(json.dumps(record), file=sys.stderr)
            (skipped if "skipped" in record else ops).append(record)
    table = render(ops, skipped, rates, options.repeats)
    print(table)
    figures = {"repeats": options.repeats, "operations_per_s": rates, "ops": ops, "skipped": skipped}
    result = finish("kernel_times", figures)
    if options.output:
        write(options.output, table, result)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device, help="default: %(default)s")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: D on a CPU, A B C on a GPU")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each way (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder in which kernels-DEVICE/ with table and JSON is written")
    for name in SIZES:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, help=f"in place of every shape's own {name.replace('_', ' ')}")
    options = parser.parse_args()
    for name in ("repeats", *SIZES):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch finds no GPU here")
    return options


def chosen_shapes(options: argparse.Namespace) -> list[Shape]:
    names = options.shapes or (["D"] if options.device == "cpu" else ["A", "B", "C"])
    sizes = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    return [replace(shape, **sizes) for name in names for shape in SHAPES[name]]


def measure(shape: Shape, clock: Clock, repeats: int, operations_per_s: float) -> Iterator[dict]:
    """A record for each operation of a shape, or of what was skipped."""
    needed = input_bytes(shape)
    if needed > free_bytes(clock.device):
        yield skip(shape, "every operation", "every way", memory_reason(needed), needed)
        return
    problem = draw(shape, clock.device)
    drawn = count(problem)
    for op in shape.ops:
        runs = {}
        for way, prepare in ways_of(op, problem).items():
            needed = bytes_needed(op, way, shape)
            if needed > free_bytes(clock.device):
                yield skip(shape, op, way, memory_reason(needed), needed)
                continue
            try:
                run = prepare()
                run()
                runs[way] = run
            except RuntimeError as error:  # torch has no kernel for a dtype, or takes more memory than the bound
                if way == "ours":
                    raise
                yield skip(shape, op, way, str(error).splitlines()[0], needed)
        if "ours" not in runs:
            continue
        check_equal(op, problem, runs)
        seconds, bandwidth = clock.medians(runs, repeats)
        yield record_of(shape, op, seconds, bandwidth, operations_per_s, cost(op, shape, drawn)._asdict())


def memory_reason(needed: int) -> str:
    return f"needs {needed / 1e9:.1f} GB"


def skip(shape: Shape, op: str, way: str, reason: str, needed: int) -> dict:
    return {"shape": shape.name, "op": op, "way": way, "skipped": reason, "needed_bytes": needed}


def check_equal(op: str, problem: Problem, runs: dict) -> None:
    """Ours gives what the other ways give; every way has run as often as the others before.

    Raises:
        RuntimeError: it does not.
    """
    ours = comparable(op, problem, runs["ours"]())
    for way in RIVALS:
        if way not in runs:
            continue
        for found, expected in zip(ours, comparable(op, problem, runs[way]())):
            error, allowed = relative_error(found, expected), TOLERANCE[problem.shape.dtype]
            if not error <= allowed:  # nor if it is not a number
                where = f"{problem.shape.name}, {op}"
                raise RuntimeError(f"{where}: ours differs from {way} by {error:.1e}, {allowed:.0e} is allowed")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what is expected, a block of rows at a time."""
    difference = norm = 0.0
    for block, right in zip(found.split(65536), expected.split(65536)):
        difference += (block.double() - right.double()).square().sum().item()
        norm += right.double().square().sum().item()
    return math.sqrt(difference / norm) if norm else math.sqrt(difference)


def record_of(
    shape: Shape, op: str, seconds: dict[str, float], bandwidth: float, operations_per_s: float, counts: dict[str, int]
) -> dict:
    """What was measured and what it is compared with; a way that was skipped is left out."""
    floor_s = max(counts["floor_bytes"] / bandwidth, counts["operations"] / operations_per_s)
    record = {"shape": shape.name, "op": op, "copy_bytes_per_s": bandwidth, **counts, "floor_s": floor_s}
    record |= {f"{way}_s": span for way, span in seconds.items()}
    record["fraction_of_floor"] = floor_s / seconds["ours"]
    record["fraction_of_copy"] = counts["traffic_bytes"] / bandwidth / seconds["ours"]
    record |= {f"speedup_over_{way}": seconds[way] / seconds["ours"] for way in RIVALS if way in seconds}
    return record


def render(ops: list[dict], skipped: list[dict], rates: dict[str, float], repeats: int) -> str:
    """The figures as a Markdown table."""
    rate = ", ".join(f"{value / 1e12:.2f} TFLOP/s in {dtype}" for dtype, value in rates.items())
    lines = [
        f"Medians of {repeats}; matrix product {rate}. x is how many times faster ours is.",
        "",
        "| shape | operation | ours ms | composition ms | embedding_bag ms | floor MB | traffic MB | GFLOP "
        "| copy GB/s | of floor | of copy |",
        "|---|---|" + "---:|" * 9,
    ]
    lines += [_row(record) for record in ops]
    lines += [f"\nSkipped: {each['shape']}, {each['op']}, {each['way']}: {each['skipped']}" for each in skipped]
    return "\n".join(lines)


def _row(record: dict) -> str:
    cells = [record["shape"], record["op"], f"{record['ours_s'] * 1e3:.3f}"]
    for way in RIVALS:
        known = f"{way}_s" in record
        cells.append(f"{record[f'{way}_s'] * 1e3:.3f} ({record[f'speedup_over_{way}']:.1f}x)" if known else "")
    cells += [f"{record[name] / 1e6:.1f}" for name in ("floor_bytes", "traffic_bytes")]
    cells += [f"{record['operations'] / 1e9:.2f}", f"{record['copy_bytes_per_s'] / 1e9:.1f}"]
    cells += [f"{record[name]:.0%}" for name in ("fraction_of_floor", "fraction_of_copy")]
    return "| " + " | ".join(cells) + " |"


def write(folder: Path, table: str, result: dict) -> None:
    """kernels-DEVICE/table.md and kernels-DEVICE/result.json."""
    device = result["device"].get("gpu", result["device"]["cpu"])
    folder = folder / ("kernels-" + re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-"))
    folder.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    head = f"# Kernels on {device}\n\nCommit {result['commit']}; {versions}; {result['device']['threads']} threads.\n"
    (folder / "table.md").write_text(f"{head}\n{table}\n", encoding="utf-8")
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {folder}", file=sys.stderr)


if __name__ == "__main__":
    main()

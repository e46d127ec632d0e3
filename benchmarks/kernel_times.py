"""python benchmarks/kernel_times.py --shapes D --repeats 15

Every memory kernel against its floor, the obvious torch composition and F.embedding_bag, at the shapes of four uses:
A pretraining, B fact learning, C decoding, D a CPU. Without --shapes: D on a CPU, A B C on a GPU.

kernel_costs.py has the shapes and counts what must move, kernel_ops.py has the three ways of each operation,
clocks.py times them. Before anything is timed the ways are compared. An operation of ours that differs or fails is
recorded with its error, the others are timed, and the run ends with 1. With --output what is known is written after
every operation, and a run that is called again with the same folder, commit, machine and sizes goes on where it was;
--seconds ends it in time for that, with 1 while something is left.

"of floor" is the time that the least bytes, or the operations, take at the copy bandwidth and matrix rate
measured in the same run, over our time; "of copy" the same for the bytes that move when rows do not stay in
cache. What does not fit in memory is reported with its bytes. The file is not named kernels.py because scripts
find this folder first, and transformers imports a package of that name.

"wall" is measured on GPUs: by the clock from an idle GPU, so that the time of the host counts, as it does in decoding.

`make bench-gpu` runs this on a GPU among other things. Leave the machine idle; where other
programs use the cores of a CPU, set OMP_WAIT_POLICY=passive.
"""

import argparse
import json
import math
import re
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from clocks import Clock, free_bytes
from kernel_costs import SHAPES, Drawn, Shape, bytes_needed, cost, input_bytes
from kernel_ops import Problem, comparable, count, draw, ways_of
from report import environment, finish
from torch import Tensor

SIZES = ("tokens", "half_keys", "width", "key_width", "top_k", "rows")
# Root mean square of the difference over that of the numbers. In bfloat16 the composition rounds every product
# to 8 bits.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
RIVALS = ("composition", "embedding_bag")
EVERY_OPERATION, EVERY_WAY = "every operation", "every way"


@dataclass
class Figures:
    """What is known of one machine, commit and choice of sizes."""

    repeats: int
    sizes: dict[str, int]  # in place of every shape's own
    operations_per_s: dict[str, float] = field(default_factory=dict)
    ops: list[dict] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)
    failed: list[dict] = field(default_factory=list)

    def add(self, record: dict) -> None:
        kind = "skipped" if "skipped" in record else "failed" if "failed" in record else "ops"
        getattr(self, kind).append(record)

    def know(self, shape: Shape, op: str) -> bool:
        """Whether our way to do this was measured, skipped or found wrong."""
        without_ours = [record for record in self.skipped if record["way"] in ("ours", EVERY_WAY)]
        return any(
            record["shape"] == shape.name and record["op"] in (op, EVERY_OPERATION)
            for record in (*self.ops, *self.failed, *without_ours)
        )


def main() -> None:
    options = parse_options()
    end = time.monotonic() + options.seconds
    shapes, where = chosen_shapes(options), environment()
    figures = earlier_figures(options, where)
    for record in measure_all(shapes, figures, Clock(torch.device(options.device))):
        print(json.dumps(record), file=sys.stderr)
        figures.add(record)
        if options.output:
            write(options.output, figures, where)
        if time.monotonic() > end:
            break
    print(render(figures))
    finish("kernel_times", asdict(figures))
    left = [f"{shape.name}, {op}" for shape in shapes for op in shape.ops if not figures.know(shape, op)]
    if figures.failed or left:
        sys.exit(f"{len(figures.failed)} operations failed; not measured yet: {'; '.join(left) or 'none'}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device, help="default: %(default)s")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: D on a CPU, A B C on a GPU")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each way (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder in which kernels-DEVICE/ with table and JSON is written")
    parser.add_argument("--earlier", type=Path, help="such a folder of an earlier call, to go on from, if not --output")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no operation after so many")
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
    return [replace(shape, **own_sizes(options)) for name in names for shape in SHAPES[name]]


def own_sizes(options: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}


def earlier_figures(options: argparse.Namespace, where: dict) -> Figures:
    """What an earlier call found under the same circumstances, but for what failed; else nothing."""
    figures = Figures(options.repeats, own_sizes(options))
    for folder in filter(None, (options.output, options.earlier)):
        path = folder_of(folder, where) / "result.json"
        if where["commit"] == "unknown" or where["commit"].endswith("-changed") or not path.exists():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        found = result["figures"]
        if all(result[name] == where[name] for name in where) and (found["repeats"], found["sizes"]) == (
            figures.repeats,
            figures.sizes,
        ):
            return Figures(**found | {"failed": []})
    return figures


def measure_all(shapes: list[Shape], figures: Figures, clock: Clock) -> Iterator[dict]:
    """Records of all that is not known yet."""
    for shape in shapes:
        ops = [op for op in shape.ops if not figures.know(shape, op)]
        if not ops:
            continue
        rates = figures.operations_per_s
        if shape.dtype not in rates:
            rates[shape.dtype] = clock.operations_per_second(getattr(torch, shape.dtype))
        yield from measure(replace(shape, ops=tuple(ops)), clock, figures.repeats, rates[shape.dtype])


def measure(shape: Shape, clock: Clock, repeats: int, operations_per_s: float) -> Iterator[dict]:
    """A record for each operation of a shape, and of what was skipped or failed."""
    needed = input_bytes(shape)
    if needed > free_bytes(clock.device):
        yield skip(shape, EVERY_OPERATION, EVERY_WAY, memory_reason(needed), needed)
        return
    try:
        problem = draw(shape, clock.device)
        drawn = count(problem)
    except Exception as error:  # as all after a kernel that wrote where it must not
        yield fail(shape, EVERY_OPERATION, error)
        return
    for op in shape.ops:
        try:
            yield from measure_operation(op, problem, drawn, clock, repeats, operations_per_s)
        except Exception as error:  # the others are measured all the same
            yield fail(shape, op, error)


def measure_operation(
    op: str, problem: Problem, drawn: Drawn, clock: Clock, repeats: int, operations_per_s: float
) -> Iterator[dict]:
    shape, runs = problem.shape, {}
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
    if "ours" in runs:
        check_equal(op, problem, runs)
        seconds, bandwidth = clock.medians(runs, repeats)
        yield record_of(shape, op, seconds, bandwidth, operations_per_s, cost(op, shape, drawn)._asdict())


def memory_reason(needed: int) -> str:
    return f"needs {needed / 1e9:.1f} GB"


def skip(shape: Shape, op: str, way: str, reason: str, needed: int) -> dict:
    return {"shape": shape.name, "op": op, "way": way, "skipped": reason, "needed_bytes": needed}


def fail(shape: Shape, op: str, error: Exception) -> dict:
    traceback.print_exception(error)
    return {"shape": shape.name, "op": op, "failed": f"{type(error).__name__}: {str(error).strip()[:500]}"}


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


def render(figures: Figures) -> str:
    """The figures as a Markdown table."""
    rate = ", ".join(f"{value / 1e12:.2f} TFLOP/s in {dtype}" for dtype, value in figures.operations_per_s.items())
    sizes = "".join(f" {name} is {size}." for name, size in figures.sizes.items())
    lines = [
        f"Medians of {figures.repeats}; matrix product {rate}. x is how many times faster ours is.{sizes}",
        "",
        "| shape | operation | ours ms | composition ms | embedding_bag ms | floor MB | traffic MB | GFLOP "
        "| copy GB/s | of floor | of copy |",
        "|---|---|" + "---:|" * 9,
    ]
    lines += [_row(record) for record in figures.ops]
    lines += [f"\nSkipped: {each['shape']}, {each['op']}, {each['way']}: {each['skipped']}" for each in figures.skipped]
    lines += [f"\n**Failed**: {each['shape']}, {each['op']}: {each['failed']}" for each in figures.failed]
    return "\n".join(lines)


def _row(record: dict) -> str:
    cells = [record["shape"], record["op"], f"{record['ours_s'] * 1e3:.3f}{_wall(record, 'ours')}"]
    for way in RIVALS:
        known = f"{way}_s" in record
        speedup = f" ({record[f'speedup_over_{way}']:.1f}x)" if known else ""
        cells.append(f"{record[f'{way}_s'] * 1e3:.3f}{speedup}{_wall(record, way)}" if known else "")
    cells += [f"{record[name] / 1e6:.1f}" for name in ("floor_bytes", "traffic_bytes")]
    cells += [f"{record['operations'] / 1e9:.2f}", f"{record['copy_bytes_per_s'] / 1e9:.1f}"]
    cells += [f"{record[name]:.0%}" for name in ("fraction_of_floor", "fraction_of_copy")]
    return "| " + " | ".join(cells) + " |"


def _wall(record: dict, way: str) -> str:
    known = f"{way}_wall_s" in record
    return f", wall {record[f'{way}_wall_s'] * 1e3:.3f}" if known else ""


def write(folder: Path, figures: Figures, where: dict) -> None:
    """kernels-DEVICE/table.md and kernels-DEVICE/result.json."""
    folder = folder_of(folder, where)
    folder.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    head = f"Commit {where['commit']}; {versions}; {where['device']['threads']} threads."
    table = f"# Kernels on {_device(where)}\n\n{head}\n\n{render(figures)}\n"
    (folder / "table.md").write_text(table, encoding="utf-8")
    result = {"name": "kernel_times", "figures": asdict(figures), **where}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def folder_of(folder: Path, where: dict) -> Path:
    return folder / ("kernels-" + re.sub(r"[^a-z0-9]+", "-", _device(where).lower()).strip("-"))


def _device(where: dict) -> str:
    return where["device"].get("gpu", where["device"]["cpu"])


if __name__ == "__main__":
    main()

"""python benchmarks/fact_step.py --repeats 7

One optimizer step on a batch of facts, sparse memory finetuning against the dense way, in one process.

    sparse       ours, SparseMemoryFinetuner: choose the rows, then sum their gradients only
    dense        choose the same rows, let F.embedding_bag make the gradient of the whole table, mask it, step every
                 row with SGD
    own_dense    the same with our lookup, which makes a dense gradient on huge pages

Repeats alternate, each from the same table with nothing learned yet; all three must write the same rows. A step is
timed in four parts: forward, selection, backward, update. given_reads.py says what is read and by what model; the
product-key search, which is in none of the three, is timed by itself.

Peak memory is what the operating system saw, in a process of its own: resident memory is read at the end of the forward
pass, when weights and activations exist, and its high-water mark over selection, backward and update at the end of the
second step. The difference, plus all that the finetuner keeps between steps (rows, row_of_slot, background counts), is
"beyond weights and activations"; the gradient of an activation is in it. glibc is told there to give every large
allocation pages of its own, so that the mark is of memory in use and not of free memory kept in case. On Linux with
glibc only.

The floor is the bytes a step must move at the speed of a large copy measured in the same run: each distinct row read
once, reads written once, slots and scores read once, the gradient of the reads written and read once, each chosen row
read, written and kept as it was.

On a GPU every part ends when the device is done with it, and memory is what torch's allocator counts.
"""

import argparse
import ctypes
import math
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from given_reads import HEADS, TABLE, Reader, make_model
from report import finish
from torch import Tensor

from memlayer.decoders.attach import record_reads
from memlayer.layers.product_keys import ProductKeys
from memlayer.methods.sparse_memory import SparseMemoryFinetuner
from memlayer.patch import TablePatch
from memlayer.slots.selection import tf_idf, top_slots

SIZES = {"num_slots": 1024**2, "width": 1024, "tokens": 4096, "reads": 128, "rows": 500}
PARTS = ("forward", "selection", "backward", "update")
LEARNING_RATE = 1.0
M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def main() -> None:
    options = parse_options()
    print(f"making a table of {options.num_slots * options.width * 4 / 1e9:.1f} GB and its reads", file=sys.stderr)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        memory = pool.submit(peak_memory, options).result()
    torch.manual_seed(0)
    model, background, batch = make_problem(options)
    spans = {"dense": [], "own_dense": [], "sparse": []}
    bandwidths = []
    for repeat in range(options.repeats + 1):
        seconds = {}
        seconds["sparse"], patch = sparse_step(model, background, batch, options.rows)
        for way in ("dense", "own_dense"):
            seconds[way] = dense_step(model, background, batch, patch, with_torch=way == "dense")
        bandwidths.append(copy_bandwidth(model.memory[0].weight))
        if repeat > 0:  # the first is the warm-up
            for way, runs in spans.items():
                runs.append(seconds[way])
    figures = {**{name: getattr(options, name) for name in SIZES}, "repeats": options.repeats}
    figures["distinct_slots"] = model.layer.keys.slots_THK.unique().numel()
    figures.update(step_figures(spans))
    figures.update(memory)
    figures.update(floor_figures(options, figures, statistics.median(bandwidths)))
    figures["search_s"] = search_seconds(options)
    show(figures)
    finish("fact_step", figures)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each (default: %(default)s)")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help="default: %(default)s")
    options = parser.parse_args()
    num_keys = math.isqrt(max(0, options.num_slots))
    for name in ("repeats", "num_slots", "width", "tokens", "rows"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, must be at least 1")
    if num_keys**2 != options.num_slots:
        parser.error(f"--num-slots is {options.num_slots}, must be a square: product keys address n * n slots")
    if options.reads % HEADS or not HEADS <= options.reads <= HEADS * num_keys:
        parser.error(f"--reads is {options.reads}, must be {HEADS} heads times 1 to {num_keys}")
    return options


def sparse_step(model: Reader, background: dict, batch: dict, num_rows: int) -> tuple[dict[str, float], TablePatch]:
    """Seconds of each part, and what was written; the table is as before at the end."""
    finetuner = SparseMemoryFinetuner(model, background, num_rows)
    optimizer = finetuner.watch(torch.optim.SGD(finetuner.parameters(), lr=LEARNING_RATE))
    clock = [now()]
    with finetuner.selecting(batch):
        loss = model(**batch).loss
        clock.append(now())
    clock.append(now())
    loss.backward()
    clock.append(now())
    optimizer.step()
    optimizer.zero_grad()
    clock.append(now())
    patch = finetuner.detach()
    patch.revert(model)
    return parts(clock), patch.tables[TABLE]


def dense_step(
    model: Reader, background: dict, batch: dict, expected: TablePatch, with_torch: bool
) -> dict[str, float]:
    """Seconds of each part; the table is as before at the end.

    Raises:
        RuntimeError: the step wrote other rows, or other numbers, than ``expected``.
    """
    table, weight = model.memory[0], model.memory[0].weight
    table.sparse, model.layer.with_torch = False, with_torch
    optimizer = torch.optim.SGD([weight], lr=LEARNING_RATE)
    clock = [now()]
    with record_reads(model) as reads:
        loss = model(**batch).loss
        clock.append(now())
    slots_U, reads_U = reads.slots(batch["attention_mask"])[TABLE].unique(return_counts=True)
    slots_R = top_slots(slots_U, tf_idf(slots_U, reads_U, background[TABLE]), len(expected.slots))
    clock.append(now())
    loss.backward()
    clock.append(now())
    mask_N1 = torch.zeros(len(weight), 1, device=weight.device).index_fill_(0, slots_R, 1.0)
    weight.grad.mul_(mask_N1)
    optimizer.step()
    optimizer.zero_grad()
    clock.append(now())
    table.sparse, model.layer.with_torch = True, False
    check_equal(weight, slots_R, expected)
    return parts(clock)


@torch.no_grad()
def check_equal(weight: Tensor, slots_R: Tensor, expected: TablePatch) -> None:
    """A dense step wrote what ours did; undo it."""
    if not torch.equal(slots_R, expected.slots):
        raise RuntimeError("the dense step chose other rows than ours")
    torch.testing.assert_close(weight[slots_R], expected.rows, rtol=1e-4, atol=1e-4)
    weight.index_copy_(0, slots_R, expected.originals)


def parts(clock: list[float]) -> dict[str, float]:
    return {name: end - start for name, start, end in zip(PARTS, clock, clock[1:])}


def copy_bandwidth(weight: Tensor) -> float:
    """Bytes a second read and written by copying part of the table into memory that is already there."""
    source = weight.detach()[: max(1, len(weight) // 16)]
    target = source.clone()
    start = now()
    target.copy_(source)
    return 2 * source.nbytes / (now() - start)


def peak_memory(options: argparse.Namespace) -> dict[str, int]:
    """Bytes a step of ours needs beyond weights and activations; nothing where the system does not tell.

    Run in a process of its own, where nothing was freed before that could be used again unseen.
    """
    if options.device == "cuda":
        return gpu_peak_memory(options)
    high_water_reset = Path("/proc/self/clear_refs")
    if not high_water_reset.exists() or platform.libc_ver()[0] != "glibc":
        return {}
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)  # what is larger goes back to the system when freed
    torch.manual_seed(0)
    model, background, batch = make_problem(options)
    finetuner = SparseMemoryFinetuner(model, background, options.rows)
    optimizer = finetuner.watch(torch.optim.SGD(finetuner.parameters(), lr=LEARNING_RATE))
    transient = 0
    for _ in range(2):  # the first step also loads code
        with finetuner.selecting(batch):
            loss = model(**batch).loss
            before = resident("VmRSS")
            # What forward holds by now, and held on the way, are activations.
            high_water_reset.write_text("5", encoding="utf-8")
        loss.backward()
        optimizer.step()
        transient = resident("VmHWM") - before
        optimizer.zero_grad()
    held = held_bytes(model, background)
    return {"transient_bytes": transient, "held_bytes": held, "peak_beyond_bytes": transient + held}


def gpu_peak_memory(options: argparse.Namespace) -> dict[str, int]:
    """The same as torch's allocator counts it."""
    torch.manual_seed(0)
    model, background, batch = make_problem(options)
    finetuner = SparseMemoryFinetuner(model, background, options.rows)
    optimizer = finetuner.watch(torch.optim.SGD(finetuner.parameters(), lr=LEARNING_RATE))
    transient = 0
    for _ in range(2):
        with finetuner.selecting(batch):
            loss = model(**batch).loss
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        loss.backward()
        optimizer.step()
        transient = torch.cuda.max_memory_allocated() - before
        optimizer.zero_grad()
    held = held_bytes(model, background)
    return {"transient_bytes": transient, "held_bytes": held, "peak_beyond_bytes": transient + held}


def held_bytes(model: Reader, background: dict) -> int:
    """What a finetuner keeps between steps."""
    table, counts = model.memory[0], background[TABLE]
    return sum(t.nbytes for t in (table.rows, table.row_of_slot, counts.reads_N, counts.document_frequency_N))


def make_problem(options: argparse.Namespace) -> tuple[Reader, dict, dict[str, Tensor]]:
    """Model, background counts and batch, on the device."""
    model, background = make_model(options.num_slots, options.width, options.tokens, options.reads)
    background = {name: counts.to(options.device) for name, counts in background.items()}
    ones = torch.ones(1, options.tokens, dtype=torch.int64, device=options.device)
    return model.to(options.device), background, dict.fromkeys(("input_ids", "attention_mask", "labels"), ones)


def now() -> float:
    """Seconds, once a GPU has done all it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def resident(field: str) -> int:
    """Bytes by a field of /proc/self/status: VmRSS is resident now, VmHWM the most since it was reset."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


@torch.no_grad()
def search_seconds(options: argparse.Namespace) -> float:
    """Seconds that a real layer of this size takes to find its slots, query projection included."""
    key_width = max(2, options.width // 4 * 2)  # MemoryLayer's default
    keys = ProductKeys(options.width, math.isqrt(options.num_slots), HEADS, options.reads // HEADS, key_width).to(
        options.device
    )
    hidden_TD, spans = torch.randn(options.tokens, options.width, device=options.device), []
    for _ in range(3):
        start = now()
        keys(hidden_TD)
        spans.append(now() - start)
    return statistics.median(spans)


def step_figures(spans: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Median seconds of every part and of whole steps, and how many times faster ours is."""
    figures = {}
    for way, runs in spans.items():
        figures.update({f"{way}_{part}_s": statistics.median(r[part] for r in runs) for part in PARTS})
        figures[f"{way}_step_s"] = statistics.median(sum(r.values()) for r in runs)
        figures[f"{way}_backward_and_update_s"] = statistics.median(r["backward"] + r["update"] for r in runs)
    for way in ("dense", "own_dense"):
        for span in ("step", "backward_and_update"):
            figures[f"{span}_speedup_over_{way}"] = figures[f"{way}_{span}_s"] / figures[f"sparse_{span}_s"]
    return figures


def floor_figures(options: argparse.Namespace, figures: dict, bandwidth: float) -> dict[str, float]:
    """Bytes that a step must move whoever does it, the seconds that takes, and how far ours is from them."""
    row, num_reads = options.width * 4, options.tokens * options.reads
    forward = (figures["distinct_slots"] + options.tokens) * row + num_reads * (8 + 4)
    backward_and_update = (2 * options.tokens + 3 * options.rows) * row
    num_bytes = forward + backward_and_update
    floor_s = num_bytes / bandwidth
    return {
        "copy_bytes_per_s": bandwidth,
        "floor_bytes": num_bytes,
        "floor_s": floor_s,
        "ratio_to_floor": figures["sparse_step_s"] / floor_s,
    }


def show(figures: dict) -> None:
    """The figures as a table for people."""
    print("N={num_slots} V={width} float32 T={tokens} K={reads} t={rows}".format(**figures), end=", ")
    print(f"{figures['distinct_slots']} distinct slots read")
    print(f"{torch.get_num_threads()} threads, median of {figures['repeats']}; both = backward and update")
    columns = {part: part for part in PARTS} | {"both": "backward_and_update", "step": "step"}
    print(f"{'ms':<12}" + "".join(f"{column:>11}" for column in columns))
    for way in ("dense", "own_dense", "sparse"):
        print(f"{way:<12}" + "".join(f"{figures[f'{way}_{key}_s'] * 1e3:>11.1f}" for key in columns.values()))
    for way in ("dense", "own_dense"):
        step, both = figures[f"step_speedup_over_{way}"], figures[f"backward_and_update_speedup_over_{way}"]
        print(f"sparse over {way}: step {step:.1f} times faster, its backward and update {both:.1f} times")
    print(f"floor {figures['floor_s'] * 1e3:.1f} ms at {figures['copy_bytes_per_s'] / 1e9:.1f} GB/s", end=", ")
    print(f"ours is {figures['ratio_to_floor']:.1f} times that; search, in none: {figures['search_s'] * 1e3:.0f} ms")
    if "peak_beyond_bytes" in figures:
        peak, held = figures["peak_beyond_bytes"] / 1e6, figures["held_bytes"] / 1e6
        print(f"sparse beyond weights and activations: {peak:.1f} MB, {held:.1f} MB of it kept between steps")


if __name__ == "__main__":
    main()

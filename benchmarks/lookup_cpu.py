"""python benchmarks/lookup_cpu.py --repeats 15

Forward and backward of the memory lookup on a CPU against F.embedding_bag with per_sample_weights.

Both take the gradients of the weights and of the values: ours row-sparse with one row per distinct
slot, embedding_bag's dense (its sparse=True makes one row per read, and takes half as long again).
Repeats of the two alternate in one process, so that a slow moment of the machine meets both. Leave
the cores idle, or set OMP_WAIT_POLICY=passive: threads that spin while another program wants their core
decide the result. The floor is the bytes that must move at the speed of a copy of the table in the same
run: a value row read for each read forward and for each distinct slot backward, and each row of the
gradient written once.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from report import finish
from torch import Tensor

from memlayer_kernels.ops import memory_lookup

SIZES = {"num_tokens": 2048, "top_k": 128, "num_slots": 65_536, "width": 256}


def main() -> None:
    options = parse_options()
    torch.manual_seed(0)
    values = torch.randn(options.num_slots, options.width)
    slots = torch.randint(options.num_slots, (options.num_tokens, options.top_k))
    weights = torch.randn(options.num_tokens, options.top_k)
    upstream = torch.randn(options.num_tokens, options.width)
    check_equal(values, slots, weights, upstream)
    spans = {"ours": [], "embedding_bag": [], "copy": []}
    for _ in range(options.repeats):
        spans["ours"].append(forward_backward(ours, values, slots, weights, upstream))
        spans["embedding_bag"].append(forward_backward(embedding_bag, values, slots, weights, upstream))
        spans["copy"].append(copy(values))
    report(options, slots, spans)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each (default: %(default)s)")
    for name, size in SIZES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=size, help="default: %(default)s"
        )
    return parser.parse_args()


def ours(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return memory_lookup(values, slots, weights, sparse_grad=True)


def embedding_bag(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights)


def check_equal(values: Tensor, slots: Tensor, weights: Tensor, upstream: Tensor) -> None:
    """Both give the same reads and gradients here; this is also the warm-up."""
    results = []
    for lookup in (ours, embedding_bag):
        inputs = values.clone().requires_grad_(), weights.clone().requires_grad_()
        reads = lookup(inputs[0], slots, inputs[1])
        grads = torch.autograd.grad(reads, inputs, upstream)
        results.append((reads, grads[0].to_dense(), grads[1]))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def forward_backward(
    lookup: Callable, values: Tensor, slots: Tensor, weights: Tensor, upstream: Tensor
) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    values, weights = values.detach().requires_grad_(), weights.detach().requires_grad_()
    start = time.perf_counter()
    reads = lookup(values, slots, weights)
    middle = time.perf_counter()
    reads.backward(upstream)
    return middle - start, time.perf_counter() - middle


def copy(values: Tensor) -> tuple[float, float]:
    """Seconds to copy the table into memory that is already there."""
    target = values.clone()
    start = time.perf_counter()
    target.copy_(values)
    return time.perf_counter() - start, 0.0


def floor(options: argparse.Namespace, slots: Tensor) -> dict[str, int]:
    """Bytes that forward and backward must move when of the rows only those of tokens stay in cache."""
    row, num_distinct = options.width * 4, slots.unique().numel()
    tokens = options.num_tokens * row
    reads = slots.numel() * (8 + 4)
    forward = slots.numel() * row + tokens + reads
    backward = 2 * num_distinct * row + tokens + 2 * reads
    return {"forward": forward, "backward": backward, "both": forward + backward}


def report(options: argparse.Namespace, slots: Tensor, spans: dict[str, list[tuple[float, float]]]) -> None:
    median = {
        name: {
            "forward": statistics.median(forward for forward, _ in runs),
            "backward": statistics.median(backward for _, backward in runs),
            "both": statistics.median(forward + backward for forward, backward in runs),
        }
        for name, runs in spans.items()
    }
    bandwidth = 2 * options.num_slots * options.width * 4 / median.pop("copy")["both"]
    floor_bytes = floor(options, slots)
    median["floor"] = {part: size / bandwidth for part, size in floor_bytes.items()}
    speedup = median["embedding_bag"]["both"] / median["ours"]["both"]
    ratio_to_floor = median["ours"]["both"] / median["floor"]["both"]
    print(f"T={options.num_tokens} K={options.top_k} N={options.num_slots} V={options.width} float32,")
    print(f"{torch.get_num_threads()} threads, median of {options.repeats}; copy {bandwidth / 1e9:.1f} GB/s")
    print(f"{'ms':<16}{'forward':>10}{'backward':>10}{'both':>10}")
    for name, parts in median.items():
        print(f"{name:<16}" + "".join(f"{seconds * 1e3:>10.1f}" for seconds in parts.values()))
    print(f"{speedup:.1f} times faster; {ratio_to_floor:.1f} times the floor")
    figures = {name: getattr(options, name) for name in (*SIZES, "repeats")}
    figures |= {
        f"{name}_{part}_s": seconds for name, parts in median.items() for part, seconds in parts.items()
    }
    figures |= {"floor_bytes": floor_bytes["both"], "copy_bytes_per_s": bandwidth}
    finish("lookup_cpu", figures | {"speedup": speedup, "ratio_to_floor": ratio_to_floor})


if __name__ == "__main__":
    main()

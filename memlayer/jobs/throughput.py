"""How fast a training runs, and how near that comes to what the machine can do.

The ceiling is measured, not taken from a data sheet: the best rate at which this machine, in this run, multiplies two
large square matrices in the run's precision. It is looked for again now and then, as programs beside a run slow both.
A share of it says what the model's own products would take at that rate, over what the steps took; what is left went to
small products, attention masks, memory reads, the optimizer and waiting.

Arithmetic is counted on a forward pass (torch's FlopCounterMode) and taken three times, once forward and twice
backward, whether or not activations are computed anew. What memory reads is added, since nothing outside sees it.
"""

import resource
import sys
import time

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from memlayer.layers.costs import multiply_adds
from memlayer.layers.memory import MemoryLayer

SIDES = {"cpu": (512, 1024), "cuda": (4096, 8192)}  # of the matrices
REPEATS = 3  # of each


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second in the fastest of many products of large matrices."""
    best, generator = 0.0, torch.Generator().manual_seed(0)  # one of its own: a training draws from torch's
    for side in SIDES[device.type]:
        one, other = torch.randn(2, side, side, generator=generator).to(device, dtype)
        for _ in range(REPEATS):
            _wait(device)
            start = time.perf_counter()
            one @ other
            _wait(device)
            best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def flops_per_token(model: nn.Module, length: int) -> float:
    """Floating point operations that training takes for each token of a window of this length."""
    ids = torch.zeros(1, length, dtype=torch.int64, device=model.device)
    training = model.training
    model.eval()
    try:
        # torch counts nothing of its fused attention on a CPU, but all of the products that stand for it.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(input_ids=ids, use_cache=False)
    finally:
        model.train(training)
    unseen = [multiply_adds(module) for module in model.modules() if isinstance(module, MemoryLayer)]
    # Every half-key is compared with every query; going backward only those found are touched.
    searched, reads = (2 * sum(each[part] for each in unseen) for part in ("half_keys", "reads"))
    return 3 * (counter.get_total_flops() / length + reads) + searched


def peak_memory(device: torch.device) -> int:
    """Bytes at most: of a GPU what torch took of it, else what this process held, loaded libraries and all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Clock:
    """Steps of training and their seconds, whatever else is done in a run left out."""

    def __init__(self):
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Go on, if it stands."""
        self._since = time.perf_counter() if self._since is None else self._since

    def stop(self) -> bool:
        """Stand still, since what passes meanwhile is no training; returns whether it ran."""
        if ran := self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None
        return ran

    def count(self, waited: float) -> None:
        """One step more, which waited so many seconds for its text."""
        self._steps += 1
        self._waited += waited

    def lap(self) -> tuple[int, float, float]:
        """Steps and seconds since the last lap, and how many of these were spent waiting for text; both above 0."""
        ran = self.stop()
        told = self._steps, self._seconds, self._waited
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        if ran:
            self.start()
        return told

"""How fast a training runs, and how near that comes to what the machine can do.

The ceiling is measured, not taken from a data sheet: the best rate at which this machine, in this run, multiplies two
large square matrices in the run's precision. A share of it says what the model's own products would take at that rate,
over what a step took; what is left went to small products, attention masks, memory reads, the optimizer and waiting.

Arithmetic is counted on a forward pass (torch's FlopCounterMode) and taken three times, once forward and twice
backward, whether or not activations are computed anew. What memory reads is added, since nothing outside sees it.
"""

import resource
import sys
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from memlayer.layers.costs import multiply_adds
from memlayer.layers.memory import MemoryLayer

SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices; larger ones were no faster
REPEATS = 12


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second in the fastest of several products of large matrices."""
    side = SIDE[device.type]
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS):
        _wait(device)
        start = time.perf_counter()
        one @ other
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


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
        with FlopCounterMode(display=False) as counter:
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

    def stop(self) -> None:
        """Stand still; what passes meanwhile is no training."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def count(self, waited: float) -> None:
        """One step more, which waited so many seconds for its text."""
        self._steps += 1
        self._waited += waited

    def lap(self) -> tuple[int, float, float]:
        """Steps and seconds since the last lap, and how many of these were spent waiting for text; both above 0."""
        running = self._since is not None
        self.stop()
        told = self._steps, self._seconds, self._waited
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        if running:
            self.start()
        return told

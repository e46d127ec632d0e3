"""Time functions that do one job in several ways, and measure what the machine can do in the same run.

Ways alternate, so that a slow moment of the machine meets all of them, in an order drawn anew for each repeat, so
that none always finds the caches as the same other left them. On a GPU a run is timed twice, each time after other
memory was read through the second-level cache: by events, while the host may be ahead, and by the clock from an idle
GPU, which counts the host's own time; on a CPU by the clock. What can be done is the speed of a large copy (bytes read
plus bytes written), measured between the others as one more way, and the rate of a large matrix product on random
numbers.
"""

import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
FLUSH_BYTES = 512 << 20  # several times the largest second-level cache
SMALLEST_MATMUL = 256
LARGEST_MATMUL = {"cpu": 2048, "cuda": 8192}
MATMUL_SECONDS = 0.5  # for one product at most: without bf16 instructions 2048 cubed takes a CPU 20 s


class Clock:
    """Times callables on one device."""

    dry = False

    def __init__(self, device: torch.device):
        self.device = device
        self._source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
        self._target = torch.ones_like(self._source)

    def medians(self, ways: dict[str, Callable[[], object]], repeats: int) -> tuple[dict[str, float], float]:
        """Median seconds of every way, on a GPU by the clock too (NAME_wall); bytes a second of the copies between."""
        ways = ways | {"copy": lambda: self._target.copy_(self._source)}
        spans = {}
        for repeat in range(repeats + 1):
            for name in random.Random(repeat).sample(list(ways), len(ways)):
                for kind, seconds in self._spans(ways[name]).items():
                    if repeat > 0:  # the first is the warm-up
                        spans.setdefault(name + kind, []).append(seconds)
        medians = {name: statistics.median(runs) for name, runs in spans.items()}
        medians.pop("copy_wall", None)
        return medians, 2 * self._source.nbytes / medians.pop("copy")

    def operations_per_second(self, dtype: torch.dtype) -> float:
        """Of a square matrix product in this dtype; float32 without reduced precision.

        The product grows up to LARGEST_MATMUL for as long as the next one promises to take at most MATMUL_SECONDS.
        """
        size = SMALLEST_MATMUL
        seconds = self._product_seconds(size, dtype, runs=2)
        while size < LARGEST_MATMUL[self.device.type] and 8 * seconds <= MATMUL_SECONDS:
            size *= 2
            seconds = self._product_seconds(size, dtype, runs=2)
        return 2 * size**3 / self._product_seconds(size, dtype, runs=6)

    def _product_seconds(self, size: int, dtype: torch.dtype, runs: int) -> float:
        """Median seconds of a square product; the first half of the runs is the warm-up."""
        left, right = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        spans = [self._seconds(lambda: left @ right) for _ in range(runs)]
        return statistics.median(spans[runs // 2 :])

    def _seconds(self, way: Callable[[], object]) -> float:
        if self.device.type == "cpu":
            start = time.perf_counter()
            way()
            return time.perf_counter() - start
        self._flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        way()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _spans(self, way: Callable[[], object]) -> dict[str, float]:
        spans = {"": self._seconds(way)}
        if self.device.type == "cuda":
            self._flush()
            torch.cuda.synchronize()
            start = time.perf_counter()
            way()
            torch.cuda.synchronize()
            spans["_wall"] = time.perf_counter() - start
        return spans

    def _flush(self) -> None:
        """Read much, and write nothing that would go back to memory while the next run is timed."""
        self._source[:FLUSH_BYTES].view(torch.int64).max()


class DryClock(Clock):
    """Runs everything once on a CPU and says that each run took a millisecond: to try scripts where no GPU is."""

    dry = True

    def __init__(self):
        self.device = torch.device("cpu")

    def medians(self, ways: dict[str, Callable[[], object]], repeats: int) -> tuple[dict[str, float], float]:
        for way in ways.values():
            way()
        return dict.fromkeys(ways, 1e-3), 1e12

    def operations_per_second(self, dtype: torch.dtype) -> float:
        return 1e12


def clock_of(dry: bool) -> Clock:
    """That of the GPU, or one that does not time."""
    return DryClock() if dry else Clock(torch.device("cuda"))


def free_bytes(device: torch.device) -> int:
    """Memory that can be had without harm; on a CPU all there is, where the system does not say more."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text(encoding="utf-8").splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
